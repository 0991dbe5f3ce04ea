//! The VMCS's control fields and other VMX formats (SDM 3, "Virtual Machine Control Structures").

use bitfield_struct::bitfield;

/// Pin-based VM-execution controls. Reserved bits are in `default1`'s sense: see `vmx::caps`.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct PinControls {
    pub external_interrupt_exiting: bool,
    #[bits(2)]
    _1: u8,
    pub nmi_exiting: bool,
    _4: bool,
    pub virtual_nmis: bool,
    pub preemption_timer: bool,
    pub process_posted_interrupts: bool,
    #[bits(24)]
    _8: u32,
}

/// Primary processor-based VM-execution controls.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct ProcControls {
    #[bits(2)]
    _0: u8,
    pub interrupt_window_exiting: bool,
    pub use_tsc_offsetting: bool,
    #[bits(3)]
    _4: u8,
    pub hlt_exiting: bool,
    _8: bool,
    pub invlpg_exiting: bool,
    pub mwait_exiting: bool,
    pub rdpmc_exiting: bool,
    pub rdtsc_exiting: bool,
    #[bits(2)]
    _13: u8,
    pub cr3_load_exiting: bool,
    pub cr3_store_exiting: bool,
    pub tertiary_controls: bool,
    _18: bool,
    pub cr8_load_exiting: bool,
    pub cr8_store_exiting: bool,
    pub use_tpr_shadow: bool,
    pub nmi_window_exiting: bool,
    pub mov_dr_exiting: bool,
    pub unconditional_io_exiting: bool,
    pub use_io_bitmaps: bool,
    _26: bool,
    pub monitor_trap_flag: bool,
    pub use_msr_bitmaps: bool,
    pub monitor_exiting: bool,
    pub pause_exiting: bool,
    pub secondary_controls: bool,
}

/// Secondary processor-based VM-execution controls.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct Proc2Controls {
    pub virtualize_apic_accesses: bool,
    pub enable_ept: bool,
    pub descriptor_table_exiting: bool,
    pub enable_rdtscp: bool,
    pub virtualize_x2apic_mode: bool,
    pub enable_vpid: bool,
    pub wbinvd_exiting: bool,
    pub unrestricted_guest: bool,
    pub apic_register_virtualization: bool,
    pub virtual_interrupt_delivery: bool,
    pub pause_loop_exiting: bool,
    pub rdrand_exiting: bool,
    pub enable_invpcid: bool,
    pub enable_vm_functions: bool,
    pub vmcs_shadowing: bool,
    pub enable_encls_exiting: bool,
    pub rdseed_exiting: bool,
    pub enable_pml: bool,
    pub ept_violation_ve: bool,
    pub conceal_vmx_from_pt: bool,
    pub enable_xsaves: bool,
    pub pasid_translation: bool,
    pub mode_based_execute: bool,
    pub sub_page_write: bool,
    pub pt_uses_guest_physical: bool,
    pub use_tsc_scaling: bool,
    pub enable_user_wait_and_pause: bool,
    pub enable_pconfig: bool,
    pub enable_enclv_exiting: bool,
    _29: bool,
    pub bus_lock_detection: bool,
    pub instruction_timeout: bool,
}

/// Primary VM-exit controls.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct ExitControls {
    #[bits(2)]
    _0: u8,
    pub save_debug_controls: bool,
    #[bits(6)]
    _3: u8,
    pub host_address_space_size: bool,
    #[bits(2)]
    _10: u8,
    pub load_perf_global_ctrl: bool,
    #[bits(2)]
    _13: u8,
    pub acknowledge_interrupt: bool,
    #[bits(2)]
    _16: u8,
    pub save_pat: bool,
    pub load_pat: bool,
    pub save_efer: bool,
    pub load_efer: bool,
    pub save_preemption_timer: bool,
    pub clear_bndcfgs: bool,
    pub conceal_vmx_from_pt: bool,
    pub clear_rtit_ctl: bool,
    pub clear_lbr_ctl: bool,
    pub clear_uinv: bool,
    pub load_cet_state: bool,
    pub load_pkrs: bool,
    pub save_perf_global_ctrl: bool,
    pub secondary_controls: bool,
}

/// VM-entry controls.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct EntryControls {
    #[bits(2)]
    _0: u8,
    pub load_debug_controls: bool,
    #[bits(6)]
    _3: u8,
    pub ia32e_mode_guest: bool,
    pub entry_to_smm: bool,
    pub deactivate_dual_monitor: bool,
    _12: bool,
    pub load_perf_global_ctrl: bool,
    pub load_pat: bool,
    pub load_efer: bool,
    pub load_bndcfgs: bool,
    pub conceal_vmx_from_pt: bool,
    pub load_rtit_ctl: bool,
    pub load_uinv: bool,
    pub load_cet_state: bool,
    pub load_lbr_ctl: bool,
    pub load_pkrs: bool,
    #[bits(9)]
    _23: u16,
}

/// The type of an event in an interruption-information field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum EventType {
    External = 0,
    Reserved = 1,
    Nmi = 2,
    HardwareException = 3,
    SoftwareInterrupt = 4,
    /// INT1.
    PrivilegedSoftwareException = 5,
    /// INT3, INTO.
    SoftwareException = 6,
    /// VM entry only: pending MTF VM exit.
    Other = 7,
}

impl EventType {
    pub const fn into_bits(self) -> u8 {
        self as u8
    }

    pub const fn from_bits(bits: u8) -> Self {
        match bits & 7 {
            0 => Self::External,
            1 => Self::Reserved,
            2 => Self::Nmi,
            3 => Self::HardwareException,
            4 => Self::SoftwareInterrupt,
            5 => Self::PrivilegedSoftwareException,
            6 => Self::SoftwareException,
            _ => Self::Other,
        }
    }

    /// Raised by an instruction that counts as executed: its length travels with the event.
    pub const fn is_software(self) -> bool {
        matches!(self, Self::SoftwareInterrupt | Self::PrivilegedSoftwareException | Self::SoftwareException)
    }
}

/// VM-entry and VM-exit interruption information, and IDT-vectoring information.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct InterruptionInfo {
    pub vector: u8,
    #[bits(3)]
    pub event_type: EventType,
    /// Deliver error code (entry), error code valid (exit).
    pub error_code: bool,
    /// Exit only: NMI unblocking due to IRET.
    pub nmi_unblocking: bool,
    #[bits(18)]
    _13: u32,
    pub valid: bool,
}

/// Guest interruptibility state.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct Interruptibility {
    pub sti: bool,
    pub mov_ss: bool,
    pub smi: bool,
    pub nmi: bool,
    pub enclave: bool,
    #[bits(27)]
    _5: u32,
}

/// Guest pending debug exceptions; the low bits and BS are where DR6 has them.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct PendingDebug {
    #[bits(4)]
    pub breakpoints: u8,
    #[bits(8)]
    _4: u8,
    /// At least one data or I/O breakpoint was met and enabled in DR7.
    pub enabled: bool,
    _13: bool,
    pub bs: bool,
    _15: bool,
    pub rtm: bool,
    #[bits(47)]
    _17: u64,
}

/// The EPT pointer.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct Eptp {
    #[bits(3)]
    pub memory_type: u8,
    /// Page-walk length minus 1.
    #[bits(3)]
    pub walk_length: u8,
    pub accessed_dirty: bool,
    pub supervisor_shadow_stack: bool,
    #[bits(4)]
    _8: u8,
    #[bits(52)]
    pub pml4_pfn: u64,
}
