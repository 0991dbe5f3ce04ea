//! What the processor's VMX offers, described once ([`Offer`]); the capability MSRs, the fields that exist and the
//! reserved-bit checks of VM entry all follow from it (SDM 3, appendix "VMX Capability Reporting Facility").

use bitfield_struct::bitfield;

use super::vmcs12::{Field, REVISION_ID};
use crate::arch::cr::{Cr0, Cr4};
use crate::arch::msr::{IA32_VMX_BASIC, IA32_VMX_VMFUNC};
use crate::arch::vmx::{EntryControls, ExitControls, PinControls, Proc2Controls, ProcControls};

/// IA32_VMX_EPT_VPID_CAP.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct EptVpidCaps {
    pub execute_only: bool,
    #[bits(5)]
    _1: u8,
    pub walk_length_4: bool,
    pub walk_length_5: bool,
    pub memory_type_uc: bool,
    #[bits(5)]
    _9: u8,
    pub memory_type_wb: bool,
    _15: bool,
    pub pages_2m: bool,
    pub pages_1g: bool,
    #[bits(2)]
    _18: u8,
    pub invept: bool,
    pub accessed_dirty: bool,
    pub advanced_exit_info: bool,
    pub supervisor_shadow_stack: bool,
    _24: bool,
    pub invept_single: bool,
    pub invept_all: bool,
    #[bits(5)]
    _27: u8,
    pub invvpid: bool,
    #[bits(7)]
    _33: u8,
    pub invvpid_address: bool,
    pub invvpid_single: bool,
    pub invvpid_all: bool,
    pub invvpid_single_globals: bool,
    #[bits(20)]
    _44: u32,
}

/// IA32_VMX_MISC.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct Misc {
    /// The preemption timer counts down when this bit of the TSC changes.
    #[bits(5)]
    pub preemption_timer_rate: u8,
    /// VM exits store EFER.LMA into the "IA-32e mode guest" control.
    pub exit_stores_lma: bool,
    pub activity_hlt: bool,
    pub activity_shutdown: bool,
    pub activity_wait_for_sipi: bool,
    #[bits(5)]
    _9: u8,
    pub pt_in_vmx: bool,
    pub smbase_msr: bool,
    #[bits(9)]
    pub cr3_targets: u16,
    /// MSR lists should not exceed 512 * (N + 1) entries.
    #[bits(3)]
    pub msr_list_size: u8,
    pub smi_blocking: bool,
    /// VMWRITE reaches VM-exit information fields too.
    pub vmwrite_exit_info: bool,
    /// Injection of software events with instruction length 0.
    pub zero_length_injection: bool,
    _31: bool,
    #[bits(32)]
    _mseg: u32,
}

/// The switch board: every optional part of VMX, on or off. A control that is not set here has its allowed-1 bit
/// clear; set it here and it is advertised, accepted by VM entry, and its fields exist.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offer {
    pub pin: PinControls,
    pub proc: ProcControls,
    pub proc2: Proc2Controls,
    pub exit: ExitControls,
    pub entry: EntryControls,
    pub ept_vpid: EptVpidCaps,
    pub misc: Misc,
    /// IA32_VMX_VMFUNC.
    pub vm_functions: u64,
}

/// What the emulated processor does today. Nothing is advertised that does not work.
pub const OFFER: Offer = Offer {
    pin: PinControls::new()
        .with_external_interrupt_exiting(true)
        .with_nmi_exiting(true)
        .with_virtual_nmis(true)
        .with_preemption_timer(true),
    proc: ProcControls::new()
        .with_interrupt_window_exiting(true)
        .with_use_tsc_offsetting(true)
        .with_hlt_exiting(true)
        .with_invlpg_exiting(true)
        // The CPU model has neither MWAIT nor MONITOR: they are #UD, but hypervisors insist on these two controls.
        .with_mwait_exiting(true)
        .with_monitor_exiting(true)
        .with_rdpmc_exiting(true)
        .with_rdtsc_exiting(true)
        .with_cr3_load_exiting(true)
        .with_cr3_store_exiting(true)
        .with_cr8_load_exiting(true)
        .with_cr8_store_exiting(true)
        .with_nmi_window_exiting(true)
        .with_mov_dr_exiting(true)
        .with_unconditional_io_exiting(true)
        .with_use_io_bitmaps(true)
        .with_monitor_trap_flag(true)
        .with_use_msr_bitmaps(true)
        .with_pause_exiting(true)
        .with_secondary_controls(true),
    proc2: Proc2Controls::new()
        .with_enable_ept(true)
        .with_descriptor_table_exiting(true)
        .with_enable_rdtscp(true)
        .with_enable_vpid(true)
        .with_wbinvd_exiting(true)
        .with_unrestricted_guest(true)
        .with_rdrand_exiting(true)
        .with_enable_invpcid(true)
        .with_rdseed_exiting(true),
    exit: ExitControls::new()
        .with_save_debug_controls(true)
        .with_host_address_space_size(true)
        .with_acknowledge_interrupt(true)
        .with_save_pat(true)
        .with_load_pat(true)
        .with_save_efer(true)
        .with_load_efer(true)
        .with_save_preemption_timer(true),
    entry: EntryControls::new()
        .with_load_debug_controls(true)
        .with_ia32e_mode_guest(true)
        .with_load_pat(true)
        .with_load_efer(true),
    ept_vpid: EptVpidCaps::new()
        .with_execute_only(true)
        .with_walk_length_4(true)
        .with_memory_type_uc(true)
        .with_memory_type_wb(true)
        .with_pages_2m(true)
        .with_pages_1g(true)
        .with_invept(true)
        .with_accessed_dirty(true)
        .with_advanced_exit_info(true)
        .with_invept_single(true)
        .with_invept_all(true)
        .with_invvpid(true)
        .with_invvpid_address(true)
        .with_invvpid_single(true)
        .with_invvpid_all(true)
        .with_invvpid_single_globals(true),
    misc: Misc::new()
        .with_preemption_timer_rate(5)
        .with_exit_stores_lma(true)
        .with_activity_hlt(true)
        .with_activity_shutdown(true)
        .with_activity_wait_for_sipi(true)
        .with_cr3_targets(4)
        .with_vmwrite_exit_info(true)
        .with_zero_length_injection(true),
    vm_functions: 0,
};

/// Which bits of a control field must and may be 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Allowed {
    pub must: u32,
    pub may: u32,
}

impl Allowed {
    const fn new(must: u32, offered: u32) -> Self {
        Self { must, may: must | offered }
    }

    pub const fn permits(self, value: u32) -> bool {
        value & self.must == self.must && value & !self.may == 0
    }

    /// As the capability MSRs have it: allowed 0-settings below, allowed 1-settings above.
    const fn msr(self, default1: u32) -> u64 {
        (self.must | default1) as u64 | ((self.may | default1) as u64) << 32
    }
}

/// Bits that read 1 in every processor unless the TRUE MSRs say otherwise ("default1").
mod default1 {
    pub const PIN: u32 = 0x16;
    pub const PROC: u32 = 0x0401_e172;
    pub const EXIT: u32 = 0x0003_6dff;
    pub const ENTRY: u32 = 0x11ff;
    /// What the TRUE MSRs leave of them: CR3 load and store exiting, and the debug controls, may be 0.
    pub const TRUE_PROC: u32 = PROC & !(1 << 15 | 1 << 16);
    pub const TRUE_EXIT: u32 = EXIT & !(1 << 2);
    pub const TRUE_ENTRY: u32 = ENTRY & !(1 << 2);
}

/// What the rest of the processor brings: a CPU model's limits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// MAXPHYADDR.
    pub physical_bits: u8,
    /// CR4 bits that may be 1, without VMXE.
    pub cr4: Cr4,
    /// IA32_DEBUGCTL bits that may be 1.
    pub debugctl: u64,
}

/// IA32_VMX_BASIC bits 63:32.
const BASIC_HIGH: u64 = {
    const REGION_SIZE: u64 = 4096;
    const WRITE_BACK: u64 = 6 << 18;
    /// INS and OUTS exits give the instruction information.
    const IO_INFO: u64 = 1 << 22;
    const TRUE_CONTROLS: u64 = 1 << 23;
    REGION_SIZE | WRITE_BACK | IO_INFO | TRUE_CONTROLS
};

/// An offer, made on a CPU model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caps {
    pub offer: Offer,
    pub limits: Limits,
    pub pin: Allowed,
    pub proc: Allowed,
    pub proc2: Allowed,
    pub exit: Allowed,
    pub entry: Allowed,
    msrs: [u64; Self::MSR_COUNT],
}

impl Caps {
    const MSR_COUNT: usize = (IA32_VMX_VMFUNC - IA32_VMX_BASIC + 1) as usize;

    pub fn new(offer: Offer, limits: Limits) -> Self {
        let pin = Allowed::new(default1::PIN, offer.pin.into_bits());
        let proc = Allowed::new(default1::TRUE_PROC, offer.proc.into_bits());
        let proc2 = Allowed::new(0, offer.proc2.into_bits());
        let exit = Allowed::new(default1::TRUE_EXIT, offer.exit.into_bits());
        let entry = Allowed::new(default1::TRUE_ENTRY, offer.entry.into_bits());
        let mut caps = Self { offer, limits, pin, proc, proc2, exit, entry, msrs: [0; Self::MSR_COUNT] };
        caps.msrs = [
            u64::from(REVISION_ID) | BASIC_HIGH << 32,
            pin.msr(default1::PIN),
            proc.msr(default1::PROC),
            exit.msr(default1::EXIT),
            entry.msr(default1::ENTRY),
            offer.misc.into_bits(),
            caps.cr0_fixed0().into_bits(),
            caps.cr0_fixed1(),
            caps.cr4_fixed0().into_bits(),
            caps.cr4_fixed1(),
            caps.vmcs_enum(),
            proc2.msr(0),
            offer.ept_vpid.into_bits(),
            pin.msr(0),
            proc.msr(0),
            exit.msr(0),
            entry.msr(0),
            offer.vm_functions,
        ];
        caps
    }

    /// A capability MSR (0x480 to 0x491); `None`: the processor does not have it.
    pub fn msr(&self, address: u32) -> Option<u64> {
        let exists = match address.checked_sub(IA32_VMX_BASIC)? {
            11 => self.offer.proc.secondary_controls(),
            12 => self.offer.proc2.enable_ept() || self.offer.proc2.enable_vpid(),
            17 => self.offer.proc2.enable_vm_functions(),
            _ => true,
        };
        let value = *self.msrs.get((address - IA32_VMX_BASIC) as usize)?;
        exists.then_some(value)
    }

    /// CR0 bits that are 1 in VMX operation.
    pub const fn cr0_fixed0(&self) -> Cr0 {
        Cr0::new().with_pe(true).with_ne(true).with_pg(true)
    }

    /// CR0 bits that may be 1 in VMX operation: no check falls on the low half.
    pub const fn cr0_fixed1(&self) -> u64 {
        0xffff_ffff
    }

    pub const fn cr4_fixed0(&self) -> Cr4 {
        Cr4::new().with_vmxe(true)
    }

    pub const fn cr4_fixed1(&self) -> u64 {
        self.limits.cr4.into_bits() | self.cr4_fixed0().into_bits()
    }

    /// Whether CR0 may hold `value` in VMX operation; `unrestricted` lifts PE and PG.
    pub const fn cr0_permitted(&self, value: u64, unrestricted: bool) -> bool {
        let lifted = if unrestricted { Cr0::new().with_pe(true).with_pg(true).into_bits() } else { 0 };
        let must = self.cr0_fixed0().into_bits() & !lifted;
        value & must == must && value & !self.cr0_fixed1() == 0
    }

    pub const fn cr4_permitted(&self, value: u64) -> bool {
        let must = self.cr4_fixed0().into_bits();
        value & must == must && value & !self.cr4_fixed1() == 0
    }

    /// Bits of a physical address that are beyond the processor's width.
    pub const fn beyond_physical(&self, address: u64) -> bool {
        address >> self.limits.physical_bits != 0
    }

    /// IA32_VMX_VMCS_ENUM: the highest index of any field that exists, in bits 9:1.
    fn vmcs_enum(&self) -> u64 {
        let indexes =
            Field::ALL.iter().filter(|f| (f.info().exists)(&self.offer)).map(|f| u64::from(f.encoding() & 0x3fe));
        indexes.max().unwrap_or(0)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn limits() -> Limits {
        Limits { physical_bits: 39, cr4: Cr4::from_bits(0x0037_07ff), debugctl: 3 }
    }

    fn caps() -> Caps {
        Caps::new(OFFER, limits())
    }

    #[test]
    fn basic_names_the_revision_a_4k_region_and_true_controls() {
        let basic = caps().msr(0x480).unwrap_or_default();
        assert_eq!(basic as u32, REVISION_ID);
        assert_eq!(basic >> 32 & 0x1fff, 4096);
        assert_eq!(basic >> 50 & 0xf, 6);
        assert_eq!(basic >> 54, 0b11);
    }

    #[test]
    fn default1_bits_are_set_in_the_old_msrs_and_three_controls_lose_them_in_the_true_ones() {
        let caps = caps();
        let msr = |a| caps.msr(a).unwrap_or_default();
        for (old, new, freed) in [(0x481, 0x48d, 0), (0x482, 0x48e, 0x18000), (0x483, 0x48f, 4), (0x484, 0x490, 4)] {
            assert_eq!(msr(old) as u32 & !(msr(new) as u32), freed, "{old:#x}");
            assert_eq!(msr(old) >> 32, msr(new) >> 32, "{old:#x}");
            assert_eq!(msr(old) as u32 as u64 & !(msr(old) >> 32), 0, "what must be 1 may be 1");
        }
    }

    #[test]
    fn r15_misc_offers_hlt_shutdown_and_wait_for_sipi() {
        assert_eq!(caps().msr(0x485).unwrap_or_default() >> 6 & 7, 7);
        assert_eq!(caps().msr(0x485).unwrap_or_default() & 0x1f, 5);
    }

    #[test]
    fn an_absent_feature_has_no_msr_no_field_and_a_refused_control() {
        let caps = caps();
        assert_eq!(caps.msr(0x491), None);
        assert_eq!(caps.msr(0x492), None);
        assert_eq!(caps.msr(0x47f), None);
        assert!(Field::lookup_offered(0x2018, &caps.offer).is_none());
        assert!(!caps.proc2.permits(Proc2Controls::new().with_enable_vm_functions(true).into_bits()));
        let on = Offer { proc2: OFFER.proc2.with_enable_vm_functions(true), ..OFFER };
        let caps = Caps::new(on, limits());
        assert!(caps.msr(0x491).is_some() && Field::lookup_offered(0x2018, &caps.offer).is_some());
    }

    #[test]
    fn vmcs_enum_is_the_highest_index_that_vmread_reaches() {
        let caps = caps();
        let reachable = (0..0x8000u64).filter(|&e| Field::lookup_offered(e, &caps.offer).is_some());
        assert_eq!(caps.msr(0x48a), reachable.map(|e| e & 0x3fe).max());
    }
}
