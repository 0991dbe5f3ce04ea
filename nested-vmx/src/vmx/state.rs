//! What a processor holds for VMX.

use super::caps::Caps;
use super::vmcs12::{Field, Vmcs12};
use crate::arch::vmx::{EntryControls, ExitControls, PinControls, Proc2Controls, ProcControls};

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
            aborted: false,
        }
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
