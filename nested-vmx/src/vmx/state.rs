//! What a processor holds for VMX.

use super::caps::{Caps, Limits, OFFER};
use super::vmcs12::{Field, Vmcs12};
use crate::arch::cr::Cr4;
use crate::arch::vmx::{EntryControls, ExitControls, InterruptionInfo, PinControls, Proc2Controls, ProcControls};

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

/// An event on its way through the guest's IDT: what IDT-vectoring information tells if a VM exit comes between.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vectoring {
    pub info: InterruptionInfo,
    pub error_code: u32,
    /// Of software events.
    pub instruction_length: u32,
}

/// VMX state of one processor, and the events that it holds back.
#[derive(Clone, Debug)]
pub struct Vmx {
    pub(crate) caps: Caps,
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
    /// The event being delivered in non-root operation.
    pub(crate) vectoring: Option<Vectoring>,
    /// A VMX abort happened: only RESET ends the shutdown.
    pub(crate) aborted: bool,
}

/// CR4 bits of the CPU model.
const CR4: Cr4 = Cr4::new()
    .with_vme(true)
    .with_pvi(true)
    .with_tsd(true)
    .with_de(true)
    .with_pse(true)
    .with_pae(true)
    .with_mce(true)
    .with_pge(true)
    .with_pce(true)
    .with_osfxsr(true)
    .with_osxmmexcpt(true)
    .with_umip(true)
    .with_fsgsbase(true)
    .with_pcide(true)
    .with_osxsave(true)
    .with_smep(true)
    .with_smap(true);

impl Default for Vmx {
    fn default() -> Self {
        let limits = Limits { physical_bits: crate::cpu::PHYSICAL_ADDRESS_BITS as u8, cr4: CR4, debugctl: 3 };
        Self {
            caps: Caps::new(OFFER, limits),
            vmxon_gpa: NO_POINTER,
            current_gpa: NO_POINTER,
            vmcs: Box::default(),
            controls: Controls::default(),
            init: None,
            nmi: None,
            virtual_nmi_blocked: false,
            mtf_pending: false,
            preemption_deadline: None,
            vectoring: None,
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

    /// Capability MSRs 0x480 to 0x491; `None`: #GP.
    pub(crate) fn capability_msr(&self, address: u32) -> Option<u64> {
        self.caps.msr(address)
    }
}
