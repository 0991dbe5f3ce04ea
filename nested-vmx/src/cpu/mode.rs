//! The operating mode, and what is derived from control registers when they change.

use super::flags;
use super::mmu::tlb::Access;
use super::seg::reg;
use super::state::{Cpu, special};

/// What decoding and address computation depend on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mode {
    /// The default operand and address size of code: 16, 32 or 64.
    pub code_bits: u8,
    /// The stack pointer's width: 16, 32 or 64.
    pub stack_bits: u8,
    /// Protected mode without virtual-8086.
    pub protected: bool,
    /// EFER.LMA.
    pub long: bool,
    /// All ones in the width of RIP.
    pub rip_mask: u64,
    pub cs_base: u64,
}

impl Default for Mode {
    fn default() -> Self {
        Self { code_bits: 16, stack_bits: 16, protected: false, long: false, rip_mask: 0xffff, cs_base: 0 }
    }
}

impl Mode {
    /// Part of a block's key.
    pub fn code(&self) -> u8 {
        self.code_bits >> 5
    }

    pub fn stack_mask(&self) -> u64 {
        match self.stack_bits {
            16 => 0xffff,
            32 => 0xffff_ffff,
            _ => u64::MAX,
        }
    }
}

impl Cpu {
    #[inline(always)]
    pub(crate) fn long_mode(&self) -> bool {
        self.mode.long
    }

    /// CS.L in long mode.
    #[inline(always)]
    pub(crate) fn code64(&self) -> bool {
        self.mode.code_bits == 64
    }

    pub(crate) fn protected(&self) -> bool {
        self.mode.protected
    }

    pub(crate) fn virtual_8086(&self) -> bool {
        self.flags.has(flags::VM)
    }

    /// Call after any change of CR0, CR4, EFER, RFLAGS (TF, RF, VM, AC), CS, SS, CPL or DR7: recomputes what is derived.
    /// Does not touch the TLB: paging changes flush it where they happen.
    pub(crate) fn mode_changed(&mut self) {
        let cs = self.seg[usize::from(reg::CS)];
        let ss = self.seg[usize::from(reg::SS)];
        let pe = self.cr0.pe();
        let v86 = pe && self.flags.has(flags::VM);
        let long = self.efer.lma();
        let code_bits = match () {
            _ if long && cs.ar.l() => 64,
            _ if v86 => 16,
            _ if cs.ar.db() => 32,
            _ => 16,
        };
        let stack_bits = match () {
            _ if code_bits == 64 => 64,
            _ if v86 => 16,
            _ if ss.ar.db() => 32,
            _ => 16,
        };
        self.mode = Mode {
            code_bits,
            stack_bits,
            protected: pe && !v86,
            long,
            rip_mask: if code_bits == 64 { u64::MAX } else { 0xffff_ffff },
            cs_base: if code_bits == 64 { 0 } else { cs.base },
        };
        self.data_access = match () {
            _ if self.cpl == 3 && self.cr0.am() && self.flags.has(flags::AC) => Access::UserAligned,
            _ if self.cpl == 3 => Access::User,
            _ if self.flags.has(flags::AC) => Access::SupervisorAc,
            _ => Access::Supervisor,
        };
        self.special = self.special & special::MTF
            | if self.flags.has(flags::TF | flags::RF) { special::TRAP } else { 0 }
            | if self.shadow != 0 { special::SHADOW } else { 0 }
            | if self.dr7 & 0xff != 0 { special::BREAKPOINTS } else { 0 };
    }
}
