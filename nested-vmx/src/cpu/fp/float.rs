//! SSE arithmetic and comparisons: everything that MXCSR governs, except conversions.

use super::vector::{compare_with_mxcsr, with_mxcsr};
use crate::cpu::decode::{Decoded, Selected};
use crate::cpu::flags::ARITHMETIC;
use crate::cpu::op::Op;
use crate::cpu::{Cpu, Flow, Stop};
use iced_x86::{Mnemonic as M, OpKind};

/// MXCSR (SDM 1, "MXCSR Control and Status Register").
pub(super) mod mxcsr {
    pub const IE: u32 = 1 << 0;
    pub const DE: u32 = 1 << 1;
    pub const ZE: u32 = 1 << 2;
    pub const UE: u32 = 1 << 4;
    pub const PE: u32 = 1 << 5;
    pub const FLAGS: u32 = 0x3f;
    /// The mask bits are the flags, this far up.
    pub const MASK_SHIFT: u32 = 7;
    pub const MASKS: u32 = FLAGS << MASK_SHIFT;
    pub const UM: u32 = UE << MASK_SHIFT;
    pub const RC_SHIFT: u32 = 13;
    pub const RC: u32 = 3 << RC_SHIFT;
    pub const FTZ: u32 = 1 << 15;
}
use mxcsr::{DE, FLAGS, FTZ, IE, MASK_SHIFT, MASKS, UE, UM, ZE};

impl Cpu {
    /// The guest's MXCSR with all exceptions masked and no flags. FTZ works only while underflow is masked.
    #[inline(always)]
    pub(super) fn host_mxcsr(&self) -> u32 {
        let guest = self.fp.mxcsr;
        let v = guest & !FLAGS | MASKS;
        if guest & UM == 0 { v & !FTZ } else { v }
    }

    /// Takes the flags of a masked run. With an unmasked exception among them raises it; the caller then leaves the
    /// destination alone. `tiny`: the result has an element that underflow is about, perhaps without being inexact.
    #[inline(always)]
    pub(super) fn simd_done(&mut self, host: u32, tiny: impl FnOnce() -> bool) -> Flow {
        let flags = host & FLAGS;
        let guest = self.fp.mxcsr;
        if (flags | UE) & !(guest >> MASK_SHIFT) == 0 {
            self.fp.mxcsr |= flags;
            return Ok(());
        }
        // SDM 1, "Numeric Underflow Exception": unmasked, a tiny result is enough; masked, it must be inexact as well.
        let tiny = guest & UM == 0 && tiny();
        self.simd_unmasked(flags | if tiny { UE } else { 0 })
    }

    /// SDM 1, "SIMD Floating-Point Exceptions": an unmasked pre-computation exception of any element comes before all
    /// results, so that only flags of its kind are set.
    #[cold]
    fn simd_unmasked(&mut self, flags: u32) -> Flow {
        let unmasked = flags & !(self.fp.mxcsr >> MASK_SHIFT);
        let before = IE | DE | ZE;
        self.fp.mxcsr |= if unmasked & before != 0 { flags & before } else { flags };
        match unmasked {
            0 => Ok(()),
            _ if self.cr4.osxmmexcpt() => Err(Stop::XM),
            _ => Err(Stop::UD),
        }
    }
}

/// Whether one of the first `LANES` 32-bit elements is denormal.
pub(super) fn tiny32<const LANES: u32>(v: u128) -> bool {
    (0..LANES).any(|n| {
        let magnitude = (v >> (32 * n)) as u32 & 0x7fff_ffff;
        magnitude != 0 && magnitude < 1 << 23
    })
}

pub(super) fn tiny64<const LANES: u32>(v: u128) -> bool {
    (0..LANES).any(|n| {
        let magnitude = (v >> (64 * n)) as u64 & (u64::MAX >> 1);
        magnitude != 0 && magnitude < 1 << 52
    })
}

pub(super) fn never_tiny(_: u128) -> bool {
    false
}

macro_rules! arithmetic {
    ($($mnemonic:ident $name:ident $tiny:expr,)*) => {
        $(pub(super) fn $name(cpu: &mut Cpu, op: &Op) -> Flow {
            cpu.sse_ready()?;
            let b = cpu.vector_source(op)?;
            let d = usize::from(op.dst & 15);
            let mut csr = cpu.host_mxcsr();
            let v = with_mxcsr!(csr, stringify!($name), cpu.fp.xmm[d], b);
            cpu.simd_done(csr, || ($tiny)(v))?;
            cpu.fp.xmm[d] = v;
            Ok(())
        })*

        fn arithmetic(m: M) -> Selected {
            Some(match m {
                $(M::$mnemonic => $name,)*
                _ => return None,
            })
        }
    };
}

arithmetic! {
    Addps addps tiny32::<4>, Addpd addpd tiny64::<2>, Addss addss tiny32::<1>, Addsd addsd tiny64::<1>,
    Subps subps tiny32::<4>, Subpd subpd tiny64::<2>, Subss subss tiny32::<1>, Subsd subsd tiny64::<1>,
    Mulps mulps tiny32::<4>, Mulpd mulpd tiny64::<2>, Mulss mulss tiny32::<1>, Mulsd mulsd tiny64::<1>,
    Divps divps tiny32::<4>, Divpd divpd tiny64::<2>, Divss divss tiny32::<1>, Divsd divsd tiny64::<1>,
    Addsubps addsubps tiny32::<4>, Addsubpd addsubpd tiny64::<2>,
    Haddps haddps tiny32::<4>, Haddpd haddpd tiny64::<2>, Hsubps hsubps tiny32::<4>, Hsubpd hsubpd tiny64::<2>,
    Minps minps never_tiny, Minpd minpd never_tiny, Minss minss never_tiny, Minsd minsd never_tiny,
    Maxps maxps never_tiny, Maxpd maxpd never_tiny, Maxss maxss never_tiny, Maxsd maxsd never_tiny,
    Sqrtps sqrtps never_tiny, Sqrtpd sqrtpd never_tiny, Sqrtss sqrtss never_tiny, Sqrtsd sqrtsd never_tiny,
    Cvtdq2ps cvtdq2ps never_tiny, Cvtdq2pd cvtdq2pd never_tiny, Cvtps2dq cvtps2dq never_tiny,
    Cvttps2dq cvttps2dq never_tiny, Cvtpd2dq cvtpd2dq never_tiny, Cvttpd2dq cvttpd2dq never_tiny,
    Cvtps2pd cvtps2pd never_tiny, Cvtpd2ps cvtpd2ps tiny32::<2>, Cvtss2sd cvtss2sd never_tiny,
    Cvtsd2ss cvtsd2ss tiny32::<1>,
}

/// CMPPS and the like: the immediate's low three bits are the predicate.
macro_rules! compare {
    ($($name:ident $suffix:literal,)*) => {
        $(fn $name(cpu: &mut Cpu, op: &Op) -> Flow {
            cpu.sse_ready()?;
            let b = cpu.vector_source(op)?;
            let d = usize::from(op.dst & 15);
            let a = cpu.fp.xmm[d];
            let mut csr = cpu.host_mxcsr();
            let v = match op.imm8() & 7 {
                0 => with_mxcsr!(csr, concat!("cmpeq", $suffix), a, b),
                1 => with_mxcsr!(csr, concat!("cmplt", $suffix), a, b),
                2 => with_mxcsr!(csr, concat!("cmple", $suffix), a, b),
                3 => with_mxcsr!(csr, concat!("cmpunord", $suffix), a, b),
                4 => with_mxcsr!(csr, concat!("cmpneq", $suffix), a, b),
                5 => with_mxcsr!(csr, concat!("cmpnlt", $suffix), a, b),
                6 => with_mxcsr!(csr, concat!("cmpnle", $suffix), a, b),
                _ => with_mxcsr!(csr, concat!("cmpord", $suffix), a, b),
            };
            cpu.simd_done(csr, || false)?;
            cpu.fp.xmm[d] = v;
            Ok(())
        })*
    };
}

compare! { cmpps "ps", cmppd "pd", cmpss "ss", cmpsd "sd", }

/// COMISS and the like set ZF, PF and CF and clear the others.
macro_rules! compare_flags {
    ($($name:ident,)*) => {
        $(fn $name(cpu: &mut Cpu, op: &Op) -> Flow {
            cpu.sse_ready()?;
            let b = cpu.vector_source(op)?;
            let a = cpu.fp.xmm[usize::from(op.dst & 15)];
            let mut csr = cpu.host_mxcsr();
            let flags = compare_with_mxcsr!(csr, stringify!($name), a, b);
            cpu.simd_done(csr, || false)?;
            cpu.flags.set_status(flags & ARITHMETIC);
            Ok(())
        })*
    };
}

compare_flags! { comiss, comisd, ucomiss, ucomisd, }

pub(super) fn select(d: &mut Decoded) -> Selected {
    if d.i.op_kind(0) == OpKind::Memory || !d.i.op0_register().is_xmm() {
        return None;
    }
    Some(match d.i.mnemonic() {
        M::Cmpps => cmpps,
        M::Cmppd => cmppd,
        M::Cmpss => cmpss,
        M::Cmpsd => cmpsd,
        M::Comiss => comiss,
        M::Comisd => comisd,
        M::Ucomiss => ucomiss,
        M::Ucomisd => ucomisd,
        m => return arithmetic(m),
    })
}
