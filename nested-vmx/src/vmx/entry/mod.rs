//! VM entry.
//!
//! The checks (SDM 3, "VM Entries") are rows of tables, in the SDM's order, each with a stable id that a failed entry
//! reports: 100.. controls, 200.. host state, 300.. guest registers, 350.. guest segments, 530.. descriptor tables,
//! RIP and RFLAGS, 600.. non-register state (R13), 640.. PDPTEs. A control that is not offered is refused by the
//! reserved-bit checks (100 to 102, 150, 160), so checks exist for what may be offered.

mod controls;
mod guest;
mod host;
mod load;
mod non_register;
mod segments;

#[cfg(test)]
mod tests;

pub(crate) use controls::eptp_valid;

use super::caps::Caps;
use super::exit::reasons::InstructionError;
use super::vmcs12::{Field, Vmcs12};
use crate::arch::cr::{Cr0, Cr4, rflags};
use crate::arch::vmx::{EntryControls, ExitControls, InterruptionInfo, PinControls, Proc2Controls, ProcControls};

/// What a failed check makes of the VM entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// VMfailValid.
    Instruction(InstructionError),
    /// Exit reason 33 with bit 31 set, and this qualification.
    GuestState { qualification: u64 },
}

/// Qualifications of exit reason 33.
const QUALIFICATION_PDPTE: u64 = 2;
const QUALIFICATION_LINK_POINTER: u64 = 4;

/// One check of VM entry.
pub struct Check {
    /// Stable: events and the API name it.
    pub id: u16,
    pub name: &'static str,
    pub fields: &'static [Field],
    /// Section of SDM volume 3.
    pub section: &'static str,
    pub failure: Failure,
    holds: fn(&Context) -> bool,
}

const fn controls_check(
    id: u16,
    name: &'static str,
    fields: &'static [Field],
    section: &'static str,
    holds: fn(&Context) -> bool,
) -> Check {
    Check { id, name, fields, section, failure: Failure::Instruction(InstructionError::EntryControls), holds }
}

const fn host_check(
    id: u16,
    name: &'static str,
    fields: &'static [Field],
    section: &'static str,
    holds: fn(&Context) -> bool,
) -> Check {
    Check { id, name, fields, section, failure: Failure::Instruction(InstructionError::EntryHostState), holds }
}

const fn guest_check(
    id: u16,
    name: &'static str,
    fields: &'static [Field],
    section: &'static str,
    holds: fn(&Context) -> bool,
) -> Check {
    guest_check_qualified(id, name, fields, section, 0, holds)
}

const fn guest_check_qualified(
    id: u16,
    name: &'static str,
    fields: &'static [Field],
    section: &'static str,
    qualification: u64,
    holds: fn(&Context) -> bool,
) -> Check {
    Check { id, name, fields, section, failure: Failure::GuestState { qualification }, holds }
}

/// The checks on controls and host state, in order: a failure is VMfailValid and leaves L1 running.
pub const CONTROL_AND_HOST_CHECKS: &[&[Check]] = &[controls::CHECKS, host::CHECKS];

/// The checks on guest state, in order: a failure is exit reason 33.
pub const GUEST_CHECKS: &[&[Check]] = &[
    guest::REGISTERS,
    segments::SELECTORS,
    segments::BASES,
    segments::LIMITS,
    segments::RIGHTS,
    segments::TASK_AND_LOCAL,
    guest::TABLES_AND_FLOW,
    non_register::CHECKS,
];

/// Every check.
pub fn checks() -> impl Iterator<Item = &'static Check> {
    CONTROL_AND_HOST_CHECKS.iter().chain(GUEST_CHECKS).copied().flatten()
}

/// The check that an event names.
pub fn check_by_id(id: u16) -> Option<&'static Check> {
    checks().find(|c| c.id == id)
}

/// Guest-physical memory as the checks read it: aligned, and all ones where there is none.
pub trait PhysicalRead {
    fn read_u64(&self, gpa: u64) -> u64;
}

/// What the checks look at. The controls are decoded once.
pub struct Context<'a> {
    vmcs: &'a Vmcs12,
    caps: &'a Caps,
    memory: &'a dyn PhysicalRead,
    /// EFER.LMA at the time of VM entry.
    host_lma: bool,
    vmcs_gpa: u64,
    pin: PinControls,
    proc: ProcControls,
    proc2: Proc2Controls,
    exit: ExitControls,
    entry: EntryControls,
    injection: InterruptionInfo,
    guest_cr0: Cr0,
    guest_cr4: Cr4,
    guest_rflags: u64,
}

impl<'a> Context<'a> {
    /// `vmcs_gpa` is the current-VMCS pointer, `host_lma` the processor's EFER.LMA.
    pub fn new(vmcs: &'a Vmcs12, caps: &'a Caps, memory: &'a dyn PhysicalRead, host_lma: bool, vmcs_gpa: u64) -> Self {
        Self {
            vmcs,
            caps,
            memory,
            host_lma,
            vmcs_gpa,
            pin: vmcs.pin(),
            proc: vmcs.proc(),
            proc2: vmcs.proc2(),
            exit: vmcs.exit_controls(),
            entry: vmcs.entry_controls(),
            injection: vmcs.injection(),
            guest_cr0: Cr0::from_bits(vmcs.get(Field::GuestCr0)),
            guest_cr4: Cr4::from_bits(vmcs.get(Field::GuestCr4)),
            guest_rflags: vmcs.get(Field::GuestRflags),
        }
    }

    /// Evaluates the checks on controls and host state.
    pub fn check_controls_and_host(&self) -> Result<(), &'static Check> {
        self.evaluate(CONTROL_AND_HOST_CHECKS)
    }

    /// Evaluates the checks on guest state.
    pub fn check_guest(&self) -> Result<(), &'static Check> {
        self.evaluate(GUEST_CHECKS)
    }

    fn evaluate(&self, tables: &'static [&'static [Check]]) -> Result<(), &'static Check> {
        match tables.iter().copied().flatten().find(|check| !(check.holds)(self)) {
            Some(failed) => Err(failed),
            None => Ok(()),
        }
    }

    fn get(&self, field: Field) -> u64 {
        self.vmcs.get(field)
    }

    /// Page-aligned.
    fn page_aligned(&self, field: Field) -> bool {
        self.get(field) & 0xfff == 0
    }

    /// Within the physical-address width.
    fn within_physical(&self, field: Field) -> bool {
        !self.caps.beyond_physical(self.get(field))
    }

    fn canonical(&self, field: Field) -> bool {
        crate::arch::is_canonical(self.get(field))
    }

    fn unrestricted(&self) -> bool {
        self.proc2.unrestricted_guest()
    }

    fn virtual_8086(&self) -> bool {
        self.guest_rflags & rflags::VM != 0
    }
}
