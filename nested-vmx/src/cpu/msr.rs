//! Model-specific registers: RDMSR and WRMSR as the processor does them (SDM 4).

use super::seg::reg;
use super::{Cpu, PHYSICAL_ADDRESS_BITS, Stop, model};
use crate::arch::efer::Efer;
use crate::arch::is_canonical;
use crate::arch::msr::*;
use serde::{Deserialize, Serialize};

/// Variable MTRRs.
const MTRR_PAIRS: usize = 8;
/// IA32_MTRRCAP: fixed ranges, write-combining, the number of variable ranges.
const MTRR_CAP: u64 = MTRR_PAIRS as u64 | 1 << 8 | 1 << 10;
const FIXED_MTRRS: [u32; 11] = [0x250, 0x258, 0x259, 0x268, 0x269, 0x26a, 0x26b, 0x26c, 0x26d, 0x26e, 0x26f];
/// PAT after RESET: WB, WT, UC-, UC, twice.
const PAT_RESET: u64 = 0x0007_0406_0007_0406;
/// IA32_MISC_ENABLE: fast strings; BTS and PEBS unavailable.
const MISC_ENABLE: u64 = 1 << 0 | 1 << 11 | 1 << 12;
const MISC_ENABLE_WRITABLE: u64 = 1 << 0 | 1 << 3 | 1 << 16 | 1 << 18 | 1 << 22 | 1 << 23 | 1 << 34;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Msrs {
    /// What this processor's TSC adds to the VM's (wrapping).
    pub tsc_offset: u64,
    pub tsc_adjust: u64,
    pub tsc_aux: u64,
    pub feature_control: u64,
    pub sysenter_cs: u64,
    pub sysenter_esp: u64,
    pub sysenter_eip: u64,
    pub star: u64,
    pub lstar: u64,
    pub cstar: u64,
    pub fmask: u64,
    pub kernel_gs_base: u64,
    pub pat: u64,
    pub misc_enable: u64,
    pub debugctl: u64,
    pub bios_sign_id: u64,
    pub mtrr_def_type: u64,
    pub mtrr_fixed: [u64; 11],
    pub mtrr_variable: [u64; 2 * MTRR_PAIRS],
}

impl Default for Msrs {
    fn default() -> Self {
        Self {
            tsc_offset: 0,
            tsc_adjust: 0,
            tsc_aux: 0,
            feature_control: 0,
            sysenter_cs: 0,
            sysenter_esp: 0,
            sysenter_eip: 0,
            star: 0,
            lstar: 0,
            cstar: 0,
            fmask: 0,
            kernel_gs_base: 0,
            pat: PAT_RESET,
            misc_enable: MISC_ENABLE,
            debugctl: 0,
            bios_sign_id: 0,
            mtrr_def_type: 0,
            mtrr_fixed: [0; 11],
            mtrr_variable: [0; 2 * MTRR_PAIRS],
        }
    }
}

impl Msrs {
    /// INIT keeps the TSC, IA32_FEATURE_CONTROL, MTRRs and PAT, and clears the rest (R21).
    pub(super) fn init(&mut self) {
        *self = Self {
            tsc_offset: self.tsc_offset,
            tsc_adjust: self.tsc_adjust,
            feature_control: self.feature_control,
            pat: self.pat,
            bios_sign_id: self.bios_sign_id,
            misc_enable: self.misc_enable,
            mtrr_def_type: self.mtrr_def_type,
            mtrr_fixed: self.mtrr_fixed,
            mtrr_variable: self.mtrr_variable,
            ..Self::default()
        };
    }
}

/// A memory type that MTRRs may have.
fn mtrr_type(v: u64) -> bool {
    matches!(v & 0xff, 0 | 1 | 4 | 5 | 6)
}

/// IA32_PAT: each byte a memory type (SDM 3, "IA32_PAT MSR").
pub(crate) fn valid_pat(v: u64) -> bool {
    v.to_le_bytes().iter().all(|b| matches!(b, 0 | 1 | 4..=7))
}

fn check(ok: bool) -> Result<(), Stop> {
    if ok { Ok(()) } else { Err(Stop::GP0) }
}

impl Cpu {
    /// The processor's TSC now, as code outside VMX non-root operation reads it.
    pub(crate) fn tsc(&mut self) -> u64 {
        self.bus.read_tsc(self.retired).wrapping_add(self.msrs.tsc_offset)
    }

    /// #GP(0) for what does not exist. Privilege and VM exits are the caller's business.
    pub(crate) fn read_msr(&mut self, address: u32) -> Result<u64, Stop> {
        let m = &self.msrs;
        Ok(match address {
            IA32_TIME_STAMP_COUNTER => self.tsc(),
            IA32_TSC_ADJUST => m.tsc_adjust,
            IA32_TSC_AUX => m.tsc_aux,
            IA32_APIC_BASE => self.apic.base(),
            IA32_FEATURE_CONTROL => m.feature_control,
            IA32_PLATFORM_ID => 0,
            IA32_BIOS_SIGN_ID => m.bios_sign_id,
            IA32_MTRRCAP => MTRR_CAP,
            IA32_SYSENTER_CS => m.sysenter_cs,
            IA32_SYSENTER_ESP => m.sysenter_esp,
            IA32_SYSENTER_EIP => m.sysenter_eip,
            IA32_MISC_ENABLE => m.misc_enable,
            IA32_DEBUGCTL => m.debugctl,
            IA32_PAT => m.pat,
            IA32_MTRR_DEF_TYPE => m.mtrr_def_type,
            IA32_EFER => self.efer.into(),
            IA32_STAR => m.star,
            IA32_LSTAR => m.lstar,
            IA32_CSTAR => m.cstar,
            IA32_FMASK => m.fmask,
            IA32_FS_BASE => self.seg[usize::from(reg::FS)].base,
            IA32_GS_BASE => self.seg[usize::from(reg::GS)].base,
            IA32_KERNEL_GS_BASE => m.kernel_gs_base,
            IA32_TSC_DEADLINE => {
                let now = self.now();
                self.apic.tsc_deadline(now)
            }
            IA32_X2APIC_FIRST..=IA32_X2APIC_LAST => {
                let now = self.now();
                self.apic.read_msr(address, now)?
            }
            IA32_VMX_BASIC..=IA32_VMX_VMFUNC => model::vmx_caps().msr(address).ok_or(Stop::GP0)?,
            _ => {
                if let Some(n) = FIXED_MTRRS.iter().position(|&a| a == address) {
                    m.mtrr_fixed[n]
                } else if let Some(n) = variable_mtrr(address) {
                    m.mtrr_variable[n]
                } else {
                    return Err(Stop::GP0);
                }
            }
        })
    }

    pub(crate) fn write_msr(&mut self, address: u32, value: u64) -> Result<(), Stop> {
        match address {
            IA32_TIME_STAMP_COUNTER => {
                // A write moves IA32_TSC_ADJUST by the same amount (SDM 3, "IA32_TSC_ADJUST MSR").
                let delta = value.wrapping_sub(self.tsc());
                self.adjust_tsc(delta);
            }
            IA32_TSC_ADJUST => self.adjust_tsc(value.wrapping_sub(self.msrs.tsc_adjust)),
            IA32_TSC_AUX => {
                check(value >> 32 == 0)?;
                self.msrs.tsc_aux = value;
            }
            IA32_APIC_BASE | IA32_TSC_DEADLINE | IA32_X2APIC_FIRST..=IA32_X2APIC_LAST => {
                self.write_apic_msr(address, value)?;
            }
            IA32_FEATURE_CONTROL => {
                let writable = feature_control::LOCK | feature_control::VMXON_OUTSIDE_SMX;
                check(self.msrs.feature_control & feature_control::LOCK == 0 && value & !writable == 0)?;
                self.msrs.feature_control = value;
            }
            // Microcode: there is none to load; the signature reads back 0.
            IA32_BIOS_UPDT_TRIG => {}
            IA32_BIOS_SIGN_ID => self.msrs.bios_sign_id = value,
            IA32_SYSENTER_CS => self.msrs.sysenter_cs = value & 0xffff_ffff,
            IA32_SYSENTER_ESP => {
                check(is_canonical(value))?;
                self.msrs.sysenter_esp = value;
            }
            IA32_SYSENTER_EIP => {
                check(is_canonical(value))?;
                self.msrs.sysenter_eip = value;
            }
            IA32_MISC_ENABLE => {
                check((value ^ self.msrs.misc_enable) & !MISC_ENABLE_WRITABLE == 0)?;
                self.msrs.misc_enable = value;
            }
            // LBR and BTF are not implemented: the bits do not exist.
            IA32_DEBUGCTL => check(value == 0)?,
            IA32_PAT => {
                check(valid_pat(value))?;
                self.msrs.pat = value;
            }
            IA32_MTRR_DEF_TYPE => {
                check(value & !0xcff == 0 && mtrr_type(value))?;
                self.msrs.mtrr_def_type = value;
            }
            IA32_EFER => self.write_efer(value)?,
            IA32_STAR => self.msrs.star = value,
            IA32_LSTAR => {
                check(is_canonical(value))?;
                self.msrs.lstar = value;
            }
            IA32_CSTAR => {
                check(is_canonical(value))?;
                self.msrs.cstar = value;
            }
            IA32_FMASK => {
                check(value >> 32 == 0)?;
                self.msrs.fmask = value;
            }
            IA32_FS_BASE | IA32_GS_BASE => {
                check(is_canonical(value))?;
                let s = if address == IA32_FS_BASE { reg::FS } else { reg::GS };
                self.seg[usize::from(s)].base = value;
            }
            IA32_KERNEL_GS_BASE => {
                check(is_canonical(value))?;
                self.msrs.kernel_gs_base = value;
            }
            _ => {
                if let Some(n) = FIXED_MTRRS.iter().position(|&a| a == address) {
                    check(value.to_le_bytes().iter().all(|&b| mtrr_type(b.into())))?;
                    self.msrs.mtrr_fixed[n] = value;
                } else if let Some(n) = variable_mtrr(address) {
                    let low = if n % 2 == 0 { 0xfff & !0xff } else { 0x7ff };
                    let reserved = !((1 << PHYSICAL_ADDRESS_BITS) - 1) | low;
                    check(value & reserved == 0 && (n % 2 == 1 || mtrr_type(value)))?;
                    self.msrs.mtrr_variable[n] = value;
                } else {
                    return Err(Stop::GP0);
                }
            }
        }
        Ok(())
    }

    fn adjust_tsc(&mut self, delta: u64) {
        self.msrs.tsc_offset = self.msrs.tsc_offset.wrapping_add(delta);
        self.msrs.tsc_adjust = self.msrs.tsc_adjust.wrapping_add(delta);
        self.stop_after = true;
    }

    /// WRMSR to IA32_EFER: LME cannot change while paging is on; LMA is read-only (SDM 3, "IA32_EFER").
    fn write_efer(&mut self, value: u64) -> Result<(), Stop> {
        check(value & !Efer::DEFINED == 0)?;
        let new = Efer::from_bits(value);
        check(!self.cr0.pg() || new.lme() == self.efer.lme())?;
        let flush = new.nxe() != self.efer.nxe();
        self.efer = new.with_lma(self.efer.lma());
        if flush {
            self.flush_own(true);
        }
        Ok(())
    }
}

fn variable_mtrr(address: u32) -> Option<usize> {
    let n = address.checked_sub(IA32_MTRR_PHYSBASE0)? as usize;
    (n < 2 * MTRR_PAIRS).then_some(n)
}
