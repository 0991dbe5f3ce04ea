//! VM exits (SDM 3, "VM Exits"): record why, save the guest, load the host. R16, R17, R18 are what falls out of doing
//! it as the SDM says: no register changes, the activity state is saved as it was, the injection is no longer valid.

mod host;
pub mod reasons;
mod save;

pub(in crate::vmx) use host::CR0_KEPT;

use super::msr_lists::MsrListError;
use super::state::NO_POINTER;
use super::vmcs12::{ABORT_INDICATOR_OFFSET, Field};
use crate::arch::exception;
use crate::arch::vmx::{EventType, InterruptionInfo};
use crate::cpu::{Cpu, Vectored};
use crate::event::{ActivityState, Detail, EventKind, VmxMode};
use reasons::ExitReason;

/// A VM exit on its way: what the exit fields will say (SDM 3, "VM-Exit Information Fields").
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ExitInfo {
    pub reason: u16,
    pub qualification: u64,
    pub guest_linear: u64,
    pub guest_physical: u64,
    pub instruction_length: u32,
    pub instruction_information: u32,
    /// VM-exit interruption information and error code.
    pub interruption: u32,
    pub interruption_error_code: u32,
}

impl ExitInfo {
    /// A fault or EPT violation of an IRET that ended blocking by NMI tells so in bit 12 (SDM 3, "VM-Exit Interruption
    /// Information", "Exit Qualification for EPT Violations").
    fn note_nmi_unblocking(&mut self) {
        let info = InterruptionInfo::from_bits(self.interruption);
        if self.reason == ExitReason::EptViolation.number() {
            self.qualification |= 1 << 12;
        } else if info.event_type() == EventType::HardwareException && info.vector() != exception::DF {
            self.interruption = info.with_nmi_unblocking(info.valid()).into_bits();
        }
    }
}

/// VMX-abort indicators (SDM 3, "VMX Aborts").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Abort {
    SavingMsrs = 1,
    HostPdptes = 2,
    LoadingMsrs = 4,
}

impl Cpu {
    /// Completes the VM exit that an instruction causes, described in `self.exit`; RIP is at its start.
    pub(crate) fn vm_exit_of_instruction(&mut self, length: u8) {
        self.exit.instruction_length = length.into();
        self.vm_exit();
    }

    /// The VM exit that `self.exit` describes, at this boundary.
    pub(crate) fn vm_exit(&mut self) {
        self.vm_exit_caused_by(0);
    }

    /// The same, with what caused it (an INIT's or SIPI's id).
    pub(crate) fn vm_exit_caused_by(&mut self, cause: u64) {
        let mut exit = self.exit;
        if std::mem::take(&mut self.nmi_unblocked_by_iret) && self.delivering.is_none() {
            exit.note_nmi_unblocking();
        }
        if self.bus.wants(EventKind::VmExit) {
            let detail = Detail::VmExit {
                vmcs_gpa: self.vmx.current_gpa,
                reason: exit.reason.into(),
                qualification: exit.qualification,
                rip: self.regs.rip(),
                activity: self.activity,
            };
            self.report(cause, detail);
        }
        self.record(&exit);
        self.save_guest(&exit);
        let nmi_exit = is_nmi(&exit);
        if self.vmx.controls.pin.virtual_nmis() {
            // Physical NMIs are never blocked in non-root operation with virtual NMIs.
            self.nmi_blocked = false;
        }
        self.nmi_blocked |= nmi_exit;
        match self.store_msr_list(Field::ExitMsrStoreCount, Field::ExitMsrStoreGpa) {
            Ok(()) => self.load_host(),
            Err(MsrListError { .. }) => self.vmx_abort(Abort::SavingMsrs),
        }
    }

    /// VM-exit information (SDM 3, "Recording VM-Exit Information and Updating VM-Entry Control Fields").
    fn record(&mut self, exit: &ExitInfo) {
        let original = self.delivering.take();
        let vmx = &mut self.vmx;
        vmx.set(Field::ExitReason, exit.reason.into());
        vmx.set(Field::ExitQualification, exit.qualification);
        vmx.set(Field::GuestLinearAddress, exit.guest_linear);
        vmx.set(Field::GuestPhysicalAddress, exit.guest_physical);
        let length = match original {
            // Of the instruction that raised it, so that L1 can inject it again.
            Some(e) if e.kind.is_software() => e.length.into(),
            _ => exit.instruction_length,
        };
        vmx.set(Field::ExitInstructionLength, length.into());
        vmx.set(Field::ExitInstructionInfo, exit.instruction_information.into());
        vmx.set(Field::ExitInterruptionInfo, exit.interruption.into());
        vmx.set(Field::ExitInterruptionErrorCode, exit.interruption_error_code.into());
        // "Information for VM Exits During Event Delivery".
        vmx.set(Field::IdtVectoringInfo, original.map_or(0, |e| interruption_info(&e).into_bits().into()));
        vmx.set(Field::IdtVectoringErrorCode, original.and_then(|e| e.error).unwrap_or(0).into());
        // R18: an injection happens once.
        let injection = vmx.vmcs.injection().with_valid(false);
        vmx.set(Field::EntryInterruptionInfo, injection.into_bits().into());
    }

    /// A VM entry fails after its checks on controls and host state: exit reason 33 or 34, with bit 31 set. Guest state
    /// and the other exit fields stay (SDM 3, "VM-Entry Failures During or After Loading Guest State").
    pub(crate) fn vm_entry_failed(&mut self, reason: ExitReason, qualification: u64, check: u16) {
        let reason = u32::from(reason.number()) | ExitReason::ENTRY_FAILURE;
        let detail =
            Detail::VmEntryFailed { vmcs_gpa: self.vmx.current_gpa, check, exit_reason: reason, instruction_error: 0 };
        self.report(0, detail);
        self.vmx.set(Field::ExitReason, reason.into());
        self.vmx.set(Field::ExitQualification, qualification);
        self.load_host();
    }

    /// The processor stops; only RESET helps.
    fn vmx_abort(&mut self, why: Abort) {
        let indicator = why as u32;
        if self.vmx.current_gpa != NO_POINTER {
            self.store_physical(self.vmx.current_gpa + ABORT_INDICATOR_OFFSET, indicator);
        }
        self.vmx_mode = VmxMode::Root;
        self.report(0, Detail::VmxAbort { indicator });
        self.vmx.aborted = true;
        self.set_activity(ActivityState::Shutdown);
    }
}

/// An event as interruption-information and IDT-vectoring information fields name it.
pub(super) fn interruption_info(event: &Vectored) -> InterruptionInfo {
    InterruptionInfo::new()
        .with_valid(true)
        .with_vector(event.vector)
        .with_event_type(event.kind)
        .with_error_code(event.error.is_some())
}

fn is_nmi(exit: &ExitInfo) -> bool {
    let info = InterruptionInfo::from_bits(exit.interruption);
    exit.reason == ExitReason::ExceptionOrNmi.number() && info.valid() && info.event_type() == EventType::Nmi
}
