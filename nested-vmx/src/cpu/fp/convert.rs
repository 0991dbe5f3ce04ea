//! Conversions between XMM and general or MMX registers, ROUNDxx, DPPS and DPPD.

use super::float::{Lanes, Operation, mxcsr};
use super::form;
use super::vector::{with_mxcsr, with_mxcsr_general};
use crate::cpu::decode::{Decoded, Selected};
use crate::cpu::op::Op;
use crate::cpu::{Cpu, Flow};
use iced_x86::Mnemonic as M;

/// To a general register of either width.
macro_rules! to_general {
    ($($name:ident,)*) => {
        $(fn $name(cpu: &mut Cpu, op: &Op) -> Flow {
            cpu.sse_ready()?;
            let b = cpu.vector_source(op)?;
            let mut csr = cpu.host_mxcsr();
            let v = if op.wide() {
                with_mxcsr_general!(csr, stringify!($name), to "r", b)
            } else {
                with_mxcsr_general!(csr, stringify!($name), to "e", b) & 0xffff_ffff
            };
            cpu.simd_done(csr)?;
            cpu.regs.set_r(op.dst, v);
            Ok(())
        })*
    };
}

to_general! { cvtss2si, cvttss2si, cvtsd2si, cvttsd2si, }

macro_rules! from_general {
    ($($name:ident,)*) => {
        $(fn $name(cpu: &mut Cpu, op: &Op) -> Flow {
            cpu.sse_ready()?;
            let g = cpu.other_source(op)? as u64;
            let d = usize::from(op.dst & 15);
            let a = cpu.fp.xmm[d];
            let mut csr = cpu.host_mxcsr();
            let eight_bytes = op.kind() == form::MEMORY && op.imm >> form::SIZE_SHIFT & 15 == 3;
            let v = if op.wide() || eight_bytes {
                with_mxcsr_general!(csr, stringify!($name), from "r", a, g)
            } else {
                with_mxcsr_general!(csr, stringify!($name), from "e", a, g)
            };
            cpu.simd_done(csr)?;
            cpu.fp.xmm[d] = v;
            Ok(())
        })*
    };
}

from_general! { cvtsi2ss, cvtsi2sd, }

/// To an MMX register: the XMM form, whose result's low half it is. `$source` is what of the operand counts.
macro_rules! to_mm {
    ($($name:ident $as:literal $source:expr,)*) => {
        $(fn $name(cpu: &mut Cpu, op: &Op) -> Flow {
            cpu.mixed_ready()?;
            let b = cpu.vector_source(op)? & $source;
            let mut csr = cpu.host_mxcsr();
            let v = with_mxcsr!(csr, $as, 0, b);
            cpu.simd_done(csr)?;
            cpu.fp.set_mm(op.dst, v as u64);
            Ok(())
        })*
    };
}

const LOW64: u128 = u64::MAX as u128;

to_mm! {
    cvtps2pi "cvtps2dq" LOW64, cvttps2pi "cvttps2dq" LOW64, cvtpd2pi "cvtpd2dq" u128::MAX,
    cvttpd2pi "cvttpd2dq" u128::MAX,
}

/// From memory these have nothing to do with MMX.
macro_rules! from_mm {
    ($($name:ident $as:literal $keep:expr,)*) => {
        $(fn $name(cpu: &mut Cpu, op: &Op) -> Flow {
            let from_memory = op.kind() == form::MEMORY;
            if from_memory { cpu.sse_ready()? } else { cpu.mixed_ready()? }
            let b = cpu.other_source(op)?;
            let d = usize::from(op.dst & 15);
            let mut csr = cpu.host_mxcsr();
            let v = with_mxcsr!(csr, $as, 0, b);
            cpu.simd_done(csr)?;
            if !from_memory {
                cpu.fp.enter_mmx();
            }
            cpu.fp.xmm[d] = cpu.fp.xmm[d] & $keep | v & !$keep;
            Ok(())
        })*
    };
}

from_mm! { cvtpi2ps "cvtdq2ps" !LOW64, cvtpi2pd "cvtdq2pd" 0u128, }

/// The immediate's bit 2 takes the rounding mode from MXCSR, else bits 1:0 are it; bit 3 hides inexactness.
macro_rules! round {
    ($($name:ident,)*) => {
        $(fn $name(cpu: &mut Cpu, op: &Op) -> Flow {
            cpu.sse_ready()?;
            let b = cpu.vector_source(op)?;
            let d = usize::from(op.dst & 15);
            let imm = u32::from(op.imm8());
            let mut csr = cpu.host_mxcsr();
            if imm & 4 == 0 {
                csr = csr & !mxcsr::RC | (imm & 3) << mxcsr::RC_SHIFT;
            }
            let v = with_mxcsr!(csr, stringify!($name), ", 4", cpu.fp.xmm[d], b);
            if imm & 8 != 0 {
                csr &= !mxcsr::PE;
            }
            cpu.simd_done(csr)?;
            cpu.fp.xmm[d] = v;
            Ok(())
        })*
    };
}

round! { roundps, roundpd, roundss, roundsd, }

/// Elements that the mask leaves out are +0, which adds and multiplies without exceptions.
fn only(v: u128, mask: u8, bits: u32) -> u128 {
    (0..128 / bits).filter(|n| mask >> n & 1 != 0).fold(0, |r, n| r | v & (u128::MAX >> (128 - bits)) << (n * bits))
}

/// SDM 2, "DPPS" and "DPPD": each step's exceptions come before the next step. The value is the host's own, as which of
/// two NaNs survives is its affair.
macro_rules! dot_product {
    ($($name:ident $bits:literal $multiply:literal $add:literal $steps:literal $all:literal,)*) => {
        $(fn $name(cpu: &mut Cpu, op: &Op) -> Flow {
            cpu.sse_ready()?;
            let b = cpu.vector_source(op)?;
            let d = usize::from(op.dst & 15);
            let (factors, results) = (op.imm8() >> 4, op.imm8() & 15);
            let (a, b) = (only(cpu.fp.xmm[d], factors, $bits), only(b, factors, $bits));
            let mut csr = cpu.host_mxcsr();
            let mut v = with_mxcsr!(csr, $multiply, a, b);
            cpu.arithmetic_done(csr, $bits, Lanes::Each(Operation::Multiply), a, b, v)?;
            for _ in 0..$steps {
                let mut csr = cpu.host_mxcsr();
                let sum = with_mxcsr!(csr, $add, v, v);
                cpu.arithmetic_done(csr, $bits, Lanes::Pairs(Operation::Add), v, v, sum)?;
                v = sum;
            }
            let mut csr = cpu.host_mxcsr();
            let v = with_mxcsr!(csr, stringify!($name), $all, a, b);
            cpu.fp.xmm[d] = only(v, results, $bits);
            Ok(())
        })*
    };
}

dot_product! { dpps 32 "mulps" "haddps" 2 ", 0xff", dppd 64 "mulpd" "haddpd" 1 ", 0x33", }

pub(super) fn select(d: &mut Decoded) -> Selected {
    Some(match d.i.mnemonic() {
        M::Cvtss2si => cvtss2si,
        M::Cvttss2si => cvttss2si,
        M::Cvtsd2si => cvtsd2si,
        M::Cvttsd2si => cvttsd2si,
        M::Cvtsi2ss => cvtsi2ss,
        M::Cvtsi2sd => cvtsi2sd,
        M::Cvtps2pi => cvtps2pi,
        M::Cvttps2pi => cvttps2pi,
        M::Cvtpd2pi => cvtpd2pi,
        M::Cvttpd2pi => cvttpd2pi,
        M::Cvtpi2ps => cvtpi2ps,
        M::Cvtpi2pd => cvtpi2pd,
        M::Roundps => roundps,
        M::Roundpd => roundpd,
        M::Roundss => roundss,
        M::Roundsd => roundsd,
        M::Dpps => dpps,
        M::Dppd => dppd,
        _ => return None,
    })
}
