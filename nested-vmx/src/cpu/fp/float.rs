//! SSE arithmetic and comparisons: everything that MXCSR governs, except conversions.

use super::vector::{compare_with_mxcsr, on_x87, with_mxcsr};
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
    pub const OE: u32 = 1 << 3;
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
use mxcsr::{DE, FLAGS, FTZ, IE, MASK_SHIFT, MASKS, OE, PE, UE, UM, ZE};

impl Cpu {
    /// The guest's MXCSR with all exceptions masked and no flags. FTZ works only while underflow is masked.
    #[inline(always)]
    pub(super) fn host_mxcsr(&self) -> u32 {
        let guest = self.fp.mxcsr;
        let v = guest & !FLAGS | MASKS;
        if guest & UM == 0 { v & !FTZ } else { v }
    }

    /// Takes the flags of a masked run whose result cannot overflow or underflow. With an unmasked exception among them
    /// raises it; the caller then leaves the destination alone.
    #[inline(always)]
    pub(super) fn simd_done(&mut self, host: u32) -> Flow {
        let flags = host & FLAGS;
        if flags & !(self.fp.mxcsr >> MASK_SHIFT) == 0 {
            self.fp.mxcsr |= flags;
            return Ok(());
        }
        self.simd_unmasked(flags)
    }

    /// As [`Cpu::simd_done`], for arithmetic: `v` is what came of `a` and `b`.
    #[inline(always)]
    pub(super) fn arithmetic_done(&mut self, host: u32, bits: u32, lanes: Lanes, a: u128, b: u128, v: u128) -> Flow {
        let flags = host & FLAGS;
        if (flags | UE) & !(self.fp.mxcsr >> MASK_SHIFT) == 0 {
            self.fp.mxcsr |= flags;
            return Ok(());
        }
        self.arithmetic_unmasked(flags, bits, lanes, a, b, v)
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

    /// Overflow and underflow are other things when they are not masked (SDM 1, "Numeric Overflow Exception", "Numeric
    /// Underflow Exception"): a tiny result is enough for underflow, and inexactness is that of the result with an
    /// unbounded exponent. The masked run's flags do not tell; each element's are found again.
    #[cold]
    fn arithmetic_unmasked(&mut self, masked: u32, bits: u32, lanes: Lanes, a: u128, b: u128, v: u128) -> Flow {
        let unmasked = !(self.fp.mxcsr >> MASK_SHIFT);
        if masked & unmasked & (IE | DE | ZE) != 0 || lanes == Lanes::None {
            return self.simd_unmasked(masked);
        }
        let mut flags = 0;
        for n in 0..128 / bits {
            let Some((operation, x, y)) = lanes.operands(n, bits, a, b) else { continue };
            let mut element = operation.flags(self.host_mxcsr(), bits, x, y);
            if unmasked & UE != 0 && is_denormal(v >> (n * bits), bits) {
                element |= UE;
            }
            if element & unmasked & (OE | UE) != 0 {
                element &= !PE;
                if operation.is_inexact(self.fp.mxcsr, bits, x, y) {
                    element |= PE;
                }
            }
            flags |= element;
        }
        self.simd_unmasked(flags)
    }
}

fn element(v: u128, n: u32, bits: u32) -> u64 {
    (v >> (n * bits)) as u64 & (u64::MAX >> (64 - bits))
}

fn is_denormal(v: u128, bits: u32) -> bool {
    let magnitude = element(v, 0, bits) & (u64::MAX >> (65 - bits));
    magnitude != 0 && magnitude < if bits == 32 { 1 << 23 } else { 1 << 52 }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operation {
    Add,
    Subtract,
    Multiply,
    Divide,
    /// From 64 to 32 bits; one operand.
    Narrow,
}

/// Which elements make a result's element, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lanes {
    /// No overflow and no underflow.
    None,
    First(Operation),
    Each(Operation),
    /// Subtract the even, add the odd elements.
    Alternating,
    /// Neighbours, first those of `a`, then those of `b`.
    Pairs(Operation),
}

impl Lanes {
    fn operands(self, n: u32, bits: u32, a: u128, b: u128) -> Option<(Operation, u64, u64)> {
        let pair = |o, x, y| Some((o, element(x, n, bits), element(y, n, bits)));
        match self {
            Self::First(Narrow) | Self::Each(Narrow) => {
                let count = if matches!(self, Self::First(_)) { 1 } else { 2 };
                (n < count).then(|| (Narrow, element(b, n, 64), 0))
            }
            Self::None => None,
            Self::First(o) if n == 0 => pair(o, a, b),
            Self::First(_) => None,
            Self::Each(o) => pair(o, a, b),
            Self::Alternating => pair(if n.is_multiple_of(2) { Subtract } else { Add }, a, b),
            Self::Pairs(o) => {
                let half = 64 / bits;
                let (v, at) = if n < half { (a, 2 * n) } else { (b, 2 * (n - half)) };
                Some((o, element(v, at, bits), element(v, at + 1, bits)))
            }
        }
    }
}

impl Operation {
    /// The flags of one element's masked run.
    fn flags(self, mut csr: u32, bits: u32, x: u64, y: u64) -> u32 {
        let (x, y) = (u128::from(x), u128::from(y));
        match (self, bits) {
            (Self::Add, 32) => with_mxcsr!(csr, "addss", x, y),
            (Self::Add, _) => with_mxcsr!(csr, "addsd", x, y),
            (Self::Subtract, 32) => with_mxcsr!(csr, "subss", x, y),
            (Self::Subtract, _) => with_mxcsr!(csr, "subsd", x, y),
            (Self::Multiply, 32) => with_mxcsr!(csr, "mulss", x, y),
            (Self::Multiply, _) => with_mxcsr!(csr, "mulsd", x, y),
            (Self::Divide, 32) => with_mxcsr!(csr, "divss", x, y),
            (Self::Divide, _) => with_mxcsr!(csr, "divsd", x, y),
            (Self::Narrow, _) => with_mxcsr!(csr, "cvtsd2ss", 0, x),
        };
        csr & FLAGS
    }

    /// Whether the result is inexact when rounded to the format's precision with an unbounded exponent: x87 has the
    /// precisions, and exponents enough.
    fn is_inexact(self, guest: u32, bits: u32, x: u64, y: u64) -> bool {
        const DAZ: u32 = 1 << 6;
        let single = bits == 32 || self == Self::Narrow;
        let control = 0x7f | if single { 0 } else { 0x200 } | (guest & mxcsr::RC) >> (mxcsr::RC_SHIFT - 10);
        let from = if self == Self::Narrow { 64 } else { bits };
        let operand = |v: u64| match () {
            _ if guest & DAZ != 0 && is_denormal(v.into(), from) => 0.0,
            _ if from == 32 => f64::from(f32::from_bits(v as u32)),
            _ => f64::from_bits(v),
        };
        let (x, y) = (operand(x), operand(y));
        let control = control as u16;
        let status = match self {
            Self::Add => on_x87!("fadd qword ptr [{y}]", control, x, y),
            Self::Subtract => on_x87!("fsub qword ptr [{y}]", control, x, y),
            Self::Multiply => on_x87!("fmul qword ptr [{y}]", control, x, y),
            Self::Divide => on_x87!("fdiv qword ptr [{y}]", control, x, y),
            Self::Narrow => on_x87!("fmul qword ptr [{y}]", control, x, 1.0f64),
        };
        u32::from(status) & PE != 0
    }
}

use Operation::{Add, Divide, Multiply, Narrow, Subtract};

macro_rules! arithmetic {
    ($($mnemonic:ident $name:ident $bits:literal $lanes:expr,)*) => {
        $(pub(super) fn $name(cpu: &mut Cpu, op: &Op) -> Flow {
            cpu.sse_ready()?;
            let b = cpu.vector_source(op)?;
            let d = usize::from(op.dst & 15);
            let a = cpu.fp.xmm[d];
            let mut csr = cpu.host_mxcsr();
            let v = with_mxcsr!(csr, stringify!($name), a, b);
            cpu.arithmetic_done(csr, $bits, $lanes, a, b, v)?;
            cpu.fp.xmm[d] = v;
            Ok(())
        })*

        fn arithmetic(m: M) -> Selected {
            Some(match m {
                $(M::$mnemonic => $name,)*
                _ => return simple(m),
            })
        }
    };
}

arithmetic! {
    Addps addps 32 Lanes::Each(Add), Addpd addpd 64 Lanes::Each(Add), Addss addss 32 Lanes::First(Add),
    Addsd addsd 64 Lanes::First(Add), Subps subps 32 Lanes::Each(Subtract), Subpd subpd 64 Lanes::Each(Subtract),
    Subss subss 32 Lanes::First(Subtract), Subsd subsd 64 Lanes::First(Subtract),
    Mulps mulps 32 Lanes::Each(Multiply), Mulpd mulpd 64 Lanes::Each(Multiply),
    Mulss mulss 32 Lanes::First(Multiply), Mulsd mulsd 64 Lanes::First(Multiply),
    Divps divps 32 Lanes::Each(Divide), Divpd divpd 64 Lanes::Each(Divide), Divss divss 32 Lanes::First(Divide),
    Divsd divsd 64 Lanes::First(Divide), Addsubps addsubps 32 Lanes::Alternating,
    Addsubpd addsubpd 64 Lanes::Alternating, Haddps haddps 32 Lanes::Pairs(Add), Haddpd haddpd 64 Lanes::Pairs(Add),
    Hsubps hsubps 32 Lanes::Pairs(Subtract), Hsubpd hsubpd 64 Lanes::Pairs(Subtract),
    Cvtpd2ps cvtpd2ps 32 Lanes::Each(Narrow), Cvtsd2ss cvtsd2ss 32 Lanes::First(Narrow),
}

/// Neither overflows nor underflows.
macro_rules! simple {
    ($($mnemonic:ident $name:ident,)*) => {
        $(fn $name(cpu: &mut Cpu, op: &Op) -> Flow {
            cpu.sse_ready()?;
            let b = cpu.vector_source(op)?;
            let d = usize::from(op.dst & 15);
            let mut csr = cpu.host_mxcsr();
            let v = with_mxcsr!(csr, stringify!($name), cpu.fp.xmm[d], b);
            cpu.simd_done(csr)?;
            cpu.fp.xmm[d] = v;
            Ok(())
        })*

        fn simple(m: M) -> Selected {
            Some(match m {
                $(M::$mnemonic => $name,)*
                _ => return None,
            })
        }
    };
}

simple! {
    Minps minps, Minpd minpd, Minss minss, Minsd minsd, Maxps maxps, Maxpd maxpd, Maxss maxss, Maxsd maxsd,
    Sqrtps sqrtps, Sqrtpd sqrtpd, Sqrtss sqrtss, Sqrtsd sqrtsd, Cvtdq2ps cvtdq2ps, Cvtdq2pd cvtdq2pd,
    Cvtps2dq cvtps2dq, Cvttps2dq cvttps2dq, Cvtpd2dq cvtpd2dq, Cvttpd2dq cvttpd2dq, Cvtps2pd cvtps2pd,
    Cvtss2sd cvtss2sd,
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
            cpu.simd_done(csr)?;
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
            cpu.simd_done(csr)?;
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
