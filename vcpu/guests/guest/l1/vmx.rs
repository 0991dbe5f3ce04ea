//! VMX operation: what the processor must offer, how it is entered, and the VMCS's fields.

use core::arch::asm;
use rt::console::Hex;
use rt::cpu::{cpuid, rdmsr, wrmsr};
use rt::{exit_code, fail};

use crate::memory::Page;

pub const IA32_FEATURE_CONTROL: u32 = 0x3a;
pub const IA32_VMX_BASIC: u32 = 0x480;
pub const IA32_VMX_MISC: u32 = 0x485;
pub const IA32_VMX_CR0_FIXED0: u32 = 0x486;
pub const IA32_VMX_CR4_FIXED0: u32 = 0x488;
pub const IA32_VMX_PROCBASED_CTLS2: u32 = 0x48b;
pub const IA32_VMX_EPT_VPID_CAP: u32 = 0x48c;
pub const IA32_VMX_TRUE_PINBASED_CTLS: u32 = 0x48d;
pub const IA32_VMX_TRUE_PROCBASED_CTLS: u32 = 0x48e;
pub const IA32_VMX_TRUE_EXIT_CTLS: u32 = 0x48f;
pub const IA32_VMX_TRUE_ENTRY_CTLS: u32 = 0x490;

const FEATURE_CONTROL_LOCK: u64 = 1 << 0;
const FEATURE_CONTROL_VMX: u64 = 1 << 2;
const BASIC_TRUE_CONTROLS: u64 = 1 << 55;
const MISC_HLT_AND_WAIT_FOR_SIPI: u64 = 1 << 6 | 1 << 8;
/// 4-level walk, write-back tables, 2 MiB pages.
const EPT_NEEDED: u64 = 1 << 6 | 1 << 14 | 1 << 16;

pub const CR0_PE: u64 = 1 << 0;
pub const CR0_ET: u64 = 1 << 4;
pub const CR0_NE: u64 = 1 << 5;
pub const CR4_VMXE: u64 = 1 << 13;

/// Guest activity states (SDM volume 3, "Guest Non-Register State").
pub const ACTIVITY_ACTIVE: u64 = 0;
pub const ACTIVITY_HLT: u64 = 1;
pub const ACTIVITY_WAIT_FOR_SIPI: u64 = 3;

/// VMCS field encodings (SDM volume 3, appendix B).
pub mod field {
    pub const VPID: u32 = 0x0000;
    pub const GUEST_ES_SELECTOR: u32 = 0x0800;
    pub const GUEST_CS_SELECTOR: u32 = 0x0802;
    pub const HOST_ES_SELECTOR: u32 = 0x0c00;
    pub const HOST_CS_SELECTOR: u32 = 0x0c02;
    pub const HOST_SS_SELECTOR: u32 = 0x0c04;
    pub const HOST_DS_SELECTOR: u32 = 0x0c06;
    pub const HOST_FS_SELECTOR: u32 = 0x0c08;
    pub const HOST_GS_SELECTOR: u32 = 0x0c0a;
    pub const HOST_TR_SELECTOR: u32 = 0x0c0c;
    pub const IO_BITMAP_A: u32 = 0x2000;
    pub const IO_BITMAP_B: u32 = 0x2002;
    pub const MSR_BITMAP: u32 = 0x2004;
    pub const EPT_POINTER: u32 = 0x201a;
    pub const VMCS_LINK_POINTER: u32 = 0x2800;
    pub const GUEST_DEBUGCTL: u32 = 0x2802;
    pub const GUEST_EFER: u32 = 0x2806;
    pub const HOST_EFER: u32 = 0x2c02;
    pub const PIN_CONTROLS: u32 = 0x4000;
    pub const PRIMARY_CONTROLS: u32 = 0x4002;
    pub const EXCEPTION_BITMAP: u32 = 0x4004;
    pub const PAGE_FAULT_MASK: u32 = 0x4006;
    pub const PAGE_FAULT_MATCH: u32 = 0x4008;
    pub const CR3_TARGET_COUNT: u32 = 0x400a;
    pub const EXIT_CONTROLS: u32 = 0x400c;
    pub const EXIT_MSR_STORE_COUNT: u32 = 0x400e;
    pub const EXIT_MSR_LOAD_COUNT: u32 = 0x4010;
    pub const ENTRY_CONTROLS: u32 = 0x4012;
    pub const ENTRY_MSR_LOAD_COUNT: u32 = 0x4014;
    pub const ENTRY_INTERRUPTION_INFORMATION: u32 = 0x4016;
    pub const SECONDARY_CONTROLS: u32 = 0x401e;
    pub const VM_INSTRUCTION_ERROR: u32 = 0x4400;
    pub const EXIT_REASON: u32 = 0x4402;
    pub const EXIT_INSTRUCTION_LENGTH: u32 = 0x440c;
    pub const GUEST_ES_LIMIT: u32 = 0x4800;
    pub const GUEST_GDTR_LIMIT: u32 = 0x4810;
    pub const GUEST_IDTR_LIMIT: u32 = 0x4812;
    pub const GUEST_ES_RIGHTS: u32 = 0x4814;
    pub const GUEST_INTERRUPTIBILITY: u32 = 0x4824;
    pub const GUEST_ACTIVITY: u32 = 0x4826;
    pub const GUEST_SYSENTER_CS: u32 = 0x482a;
    pub const HOST_SYSENTER_CS: u32 = 0x4c00;
    pub const CR0_MASK: u32 = 0x6000;
    pub const CR4_MASK: u32 = 0x6002;
    pub const CR0_SHADOW: u32 = 0x6004;
    pub const CR4_SHADOW: u32 = 0x6006;
    pub const EXIT_QUALIFICATION: u32 = 0x6400;
    pub const GUEST_CR0: u32 = 0x6800;
    pub const GUEST_CR3: u32 = 0x6802;
    pub const GUEST_CR4: u32 = 0x6804;
    pub const GUEST_ES_BASE: u32 = 0x6806;
    pub const GUEST_CS_BASE: u32 = 0x6808;
    pub const GUEST_GDTR_BASE: u32 = 0x6816;
    pub const GUEST_IDTR_BASE: u32 = 0x6818;
    pub const GUEST_DR7: u32 = 0x681a;
    pub const GUEST_RSP: u32 = 0x681c;
    pub const GUEST_RIP: u32 = 0x681e;
    pub const GUEST_RFLAGS: u32 = 0x6820;
    pub const GUEST_PENDING_DEBUG: u32 = 0x6822;
    pub const GUEST_SYSENTER_ESP: u32 = 0x6824;
    pub const GUEST_SYSENTER_EIP: u32 = 0x6826;
    pub const HOST_CR0: u32 = 0x6c00;
    pub const HOST_CR3: u32 = 0x6c02;
    pub const HOST_CR4: u32 = 0x6c04;
    pub const HOST_FS_BASE: u32 = 0x6c06;
    pub const HOST_GS_BASE: u32 = 0x6c08;
    pub const HOST_TR_BASE: u32 = 0x6c0a;
    pub const HOST_GDTR_BASE: u32 = 0x6c0c;
    pub const HOST_IDTR_BASE: u32 = 0x6c0e;
    pub const HOST_SYSENTER_ESP: u32 = 0x6c10;
    pub const HOST_SYSENTER_EIP: u32 = 0x6c12;
    pub const HOST_RSP: u32 = 0x6c14;
    pub const HOST_RIP: u32 = 0x6c16;
}

/// Ends the run, with the reason, unless the processor offers what this hypervisor uses.
pub fn check_support() {
    if cpuid(1, 0).ecx & 1 << 5 == 0 {
        fail!(exit_code::UNSUPPORTED, "the processor has no VMX");
    }
    if rdmsr(IA32_VMX_BASIC) & BASIC_TRUE_CONTROLS == 0 {
        fail!(exit_code::UNSUPPORTED, "VMX without the TRUE control MSRs");
    }
    let misc = rdmsr(IA32_VMX_MISC);
    if misc & MISC_HLT_AND_WAIT_FOR_SIPI != MISC_HLT_AND_WAIT_FOR_SIPI {
        fail!(
            exit_code::UNSUPPORTED,
            "VMX without the HLT and wait-for-SIPI activity states: IA32_VMX_MISC ",
            Hex(misc)
        );
    }
    // The secondary controls first: they say whether the EPT capability exists.
    controls("secondary", IA32_VMX_PROCBASED_CTLS2, crate::vcpu::SECONDARY_CONTROLS);
    let ept = rdmsr(IA32_VMX_EPT_VPID_CAP);
    if ept & EPT_NEEDED != EPT_NEEDED {
        fail!(exit_code::UNSUPPORTED, "EPT without 4 levels, write-back or 2 MiB pages: ", Hex(ept));
    }
}

/// A control field: what is wanted and what the processor insists on (SDM volume 3, appendix A.3: the low half has
/// the bits that must be 1, the high half those that may be).
pub fn controls(name: &str, msr: u32, wanted: u32) -> u64 {
    let allowed = rdmsr(msr);
    let value = wanted | allowed as u32;
    if value & !(allowed >> 32) as u32 != 0 {
        fail!(
            exit_code::UNSUPPORTED,
            "VMX lacks ",
            name,
            " controls: wanted ",
            Hex(wanted.into()),
            ", MSR ",
            Hex(allowed)
        );
    }
    value.into()
}

/// Enters VMX operation and makes the VMCS current and clear.
pub fn enter_operation(vmxon: &Page, vmcs: &Page) {
    let feature_control = rdmsr(IA32_FEATURE_CONTROL);
    if feature_control & FEATURE_CONTROL_LOCK == 0 {
        // SAFETY: only allows VMXON.
        unsafe { wrmsr(IA32_FEATURE_CONTROL, feature_control | FEATURE_CONTROL_LOCK | FEATURE_CONTROL_VMX) }
    } else if feature_control & FEATURE_CONTROL_VMX == 0 {
        fail!(exit_code::UNSUPPORTED, "VMX is locked off in IA32_FEATURE_CONTROL");
    }

    // Bits that are 1 in FIXED0 must be 1; all bits in use here may be 1 (FIXED1).
    // SAFETY: adds NE and VMXE to the running values.
    unsafe {
        asm!("mov cr0, {}", in(reg) read_cr0() | rdmsr(IA32_VMX_CR0_FIXED0), options(nostack));
        asm!("mov cr4, {}", in(reg) read_cr4() | rdmsr(IA32_VMX_CR4_FIXED0), options(nostack));
    }

    let revision = rdmsr(IA32_VMX_BASIC) & 0x7fff_ffff;
    vmxon.set(0, revision);
    vmcs.set(0, revision);
    // SAFETY: both regions are pages of this processor alone, with the revision identifier set.
    let results = unsafe { [vmxon_instruction(vmxon.hpa()), vmclear(vmcs.hpa()), vmptrld(vmcs.hpa())] };
    for (name, succeeded) in ["VMXON", "VMCLEAR", "VMPTRLD"].into_iter().zip(results) {
        if !succeeded {
            fail!(exit_code::UNSUPPORTED, name, " failed");
        }
    }
}

macro_rules! region_instruction {
    ($function:ident, $mnemonic:literal) => {
        /// Says whether it succeeded.
        unsafe fn $function(region_hpa: u64) -> bool {
            let above: u8;
            // SAFETY: the caller's.
            unsafe {
                asm!(concat!($mnemonic, " [{}]"), "seta {}", in(reg) &raw const region_hpa, out(reg_byte) above,
                     options(nostack));
            }
            above != 0
        }
    };
}

region_instruction!(vmxon_instruction, "vmxon");
region_instruction!(vmclear, "vmclear");
region_instruction!(vmptrld, "vmptrld");

pub fn write(field: u32, value: u64) {
    let above: u8;
    // SAFETY: the VMCS is this processor's; nothing runs by it before a VM entry, which checks it.
    unsafe {
        asm!("vmwrite {}, {}", "seta {}", in(reg) u64::from(field), in(reg) value, out(reg_byte) above,
             options(nostack));
    }
    if above == 0 {
        fail!(exit_code::UNSUPPORTED, "VMWRITE failed, field ", Hex(field.into()));
    }
}

pub fn read(field: u32) -> u64 {
    let value: u64;
    let above: u8;
    // SAFETY: reads.
    unsafe {
        asm!("vmread {}, {}", "seta {}", out(reg) value, in(reg) u64::from(field), lateout(reg_byte) above,
             options(nostack));
    }
    if above == 0 {
        fail!(exit_code::UNSUPPORTED, "VMREAD failed, field ", Hex(field.into()));
    }
    value
}

macro_rules! read_control_register {
    ($function:ident, $register:literal) => {
        pub fn $function() -> u64 {
            let value: u64;
            // SAFETY: reads.
            unsafe { asm!(concat!("mov {}, ", $register), out(reg) value, options(nomem, nostack, preserves_flags)) }
            value
        }
    };
}

read_control_register!(read_cr0, "cr0");
read_control_register!(read_cr3, "cr3");
read_control_register!(read_cr4, "cr4");
