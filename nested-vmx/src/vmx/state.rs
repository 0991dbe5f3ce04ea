//! What a processor holds for VMX.

use super::caps::Caps;
use super::vmcs12::{Field, Vmcs12};
use crate::arch::vmx::{EntryControls, ExitControls, PinControls, Proc2Controls, ProcControls};
use crate::cpu::{Cpu, PHYSICAL_ADDRESS_BITS, special};
use crate::event::VmxMode;
use serde::{Deserialize, Serialize};

/// The VMXON or current-VMCS pointer when there is none.
pub const NO_POINTER: u64 = u64::MAX;

/// The controls of the current VMCS as the last VM entry found them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Controls {
    pub pin: PinControls,
    pub proc: ProcControls,
    pub proc2: Proc2Controls,
    pub exit: ExitControls,
    pub entry: EntryControls,
}

impl Controls {
    pub fn of(vmcs: &Vmcs12) -> Self {
        Self {
            pin: vmcs.pin(),
            proc: vmcs.proc(),
            proc2: vmcs.proc2(),
            exit: vmcs.exit_controls(),
            entry: vmcs.entry_controls(),
        }
    }
}

/// VMX state of one processor, and the events that it holds back.
#[derive(Clone, Debug)]
pub struct Vmx {
    pub(crate) caps: &'static Caps,
    /// [`NO_POINTER`] outside VMX operation.
    pub(crate) vmxon_gpa: u64,
    /// [`NO_POINTER`]: no current VMCS.
    pub(crate) current_gpa: u64,
    /// The current VMCS.
    pub(crate) vmcs: Box<Vmcs12>,
    /// In force in non-root operation.
    pub(crate) controls: Controls,
    /// A latched INIT and its cause (R4).
    pub(crate) init: Option<u64>,
    /// A pending NMI and its cause.
    pub(crate) nmi: Option<u64>,
    /// Virtual-NMI blocking; only with "virtual NMIs", when physical NMIs are not blocked in non-root operation.
    pub(crate) virtual_nmi_blocked: bool,
    /// A monitor-trap-flag VM exit is due at the next boundary.
    pub(crate) mtf_pending: bool,
    /// When the preemption timer reaches 0, in the VM's TSC divided by its rate.
    pub(crate) preemption_deadline: Option<u64>,
    /// VPID, EPTP and paging mode that the cached translations of the last guest with a VPID were made under.
    pub(crate) translations: Option<(u16, u64, u64)>,
    /// CR3 and paging mode that L1's cached translations were made under, at the last VM entry.
    pub(crate) host_translations: Option<(u64, u64)>,
    /// A VMX abort happened: only RESET ends the shutdown.
    pub(crate) aborted: bool,
}

impl Default for Vmx {
    fn default() -> Self {
        Self {
            caps: crate::cpu::model::vmx_caps(),
            vmxon_gpa: NO_POINTER,
            current_gpa: NO_POINTER,
            vmcs: Box::default(),
            controls: Controls::default(),
            init: None,
            nmi: None,
            virtual_nmi_blocked: false,
            mtf_pending: false,
            preemption_deadline: None,
            translations: None,
            host_translations: None,
            aborted: false,
        }
    }
}

/// VMX state as it is saved and restored: a latched INIT and a pending NMI travel along.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmxState {
    pub mode: VmxMode,
    pub vmxon_gpa: Option<u64>,
    pub current_vmcs_gpa: Option<u64>,
    pub vmcs: Vmcs12,
    /// The latched INIT's cause.
    pub init: Option<u64>,
    /// The pending NMI's cause.
    pub nmi: Option<u64>,
    pub virtual_nmi_blocked: bool,
    pub mtf_pending: bool,
    /// In the VM's TSC divided by the timer's rate.
    pub preemption_deadline: Option<u64>,
    pub aborted: bool,
}

/// A saved VMX state that no processor can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidVmxState {
    #[error("{0:?} operation without a VMXON pointer, or the pointer outside VMX operation")]
    VmxonPointer(VmxMode),
    #[error("non-root operation without a current VMCS")]
    NoCurrentVmcs,
    #[error("VMXON or VMCS pointer {0:#x} is not page-aligned or beyond the physical-address width")]
    Pointer(u64),
}

impl Cpu {
    pub(crate) fn save_vmx(&self) -> VmxState {
        let v = &self.vmx;
        VmxState {
            mode: self.vmx_mode,
            vmxon_gpa: v.vmxon_gpa(),
            current_vmcs_gpa: v.current_vmcs_gpa(),
            vmcs: (*v.vmcs).clone(),
            init: v.init,
            nmi: v.nmi,
            virtual_nmi_blocked: v.virtual_nmi_blocked,
            mtf_pending: v.mtf_pending,
            preemption_deadline: v.preemption_deadline,
            aborted: v.aborted,
        }
    }

    pub(crate) fn check_vmx_state(s: &VmxState) -> Result<(), InvalidVmxState> {
        if (s.mode == VmxMode::Off) != s.vmxon_gpa.is_none() || s.mode == VmxMode::Off && s.current_vmcs_gpa.is_some() {
            return Err(InvalidVmxState::VmxonPointer(s.mode));
        }
        if s.mode == VmxMode::NonRoot && s.current_vmcs_gpa.is_none() {
            return Err(InvalidVmxState::NoCurrentVmcs);
        }
        let bad = |gpa: &u64| gpa & 0xfff != 0 || gpa >> PHYSICAL_ADDRESS_BITS != 0;
        match s.vmxon_gpa.into_iter().chain(s.current_vmcs_gpa).find(bad) {
            Some(gpa) => Err(InvalidVmxState::Pointer(gpa)),
            None => Ok(()),
        }
    }

    /// The state has passed [`Cpu::check_vmx_state`]; the other registers are restored.
    pub(crate) fn restore_vmx(&mut self, s: &VmxState) {
        *self.vmx = Vmx {
            vmxon_gpa: s.vmxon_gpa.unwrap_or(NO_POINTER),
            current_gpa: s.current_vmcs_gpa.unwrap_or(NO_POINTER),
            vmcs: Box::new(s.vmcs.clone()),
            controls: Controls::of(&s.vmcs),
            init: s.init,
            nmi: s.nmi,
            virtual_nmi_blocked: s.virtual_nmi_blocked,
            mtf_pending: s.mtf_pending,
            preemption_deadline: s.preemption_deadline,
            aborted: s.aborted,
            ..Vmx::default()
        };
        self.vmx_mode = s.mode;
        let (guest, controls) = (self.in_non_root(), self.vmx.controls);
        self.eptp = (guest && controls.proc2.enable_ept()).then(|| self.vmx.get(Field::Eptp));
        self.special &= !special::MTF;
        if guest && controls.proc.monitor_trap_flag() {
            self.special |= special::MTF;
        }
        self.delivering = None;
        self.context_changed();
    }
}

impl Vmx {
    #[inline(always)]
    pub(crate) fn get(&self, field: Field) -> u64 {
        self.vmcs.get(field)
    }

    #[inline(always)]
    pub(crate) fn set(&mut self, field: Field, value: u64) {
        self.vmcs.set(field, value);
    }

    pub fn vmxon_gpa(&self) -> Option<u64> {
        Some(self.vmxon_gpa).filter(|gpa| *gpa != NO_POINTER)
    }

    pub fn current_vmcs_gpa(&self) -> Option<u64> {
        Some(self.current_gpa).filter(|gpa| *gpa != NO_POINTER)
    }

    /// The fields of the current VMCS that exist on this processor.
    pub fn fields(&self) -> impl Iterator<Item = (Field, u64)> + '_ {
        let current = self.current_vmcs_gpa().is_some();
        self.vmcs.iter().filter(move |(field, _)| current && (field.info().exists)(&self.caps.offer))
    }

    /// An INIT is latched (R4).
    pub fn init_latched(&self) -> bool {
        self.init.is_some()
    }
}
