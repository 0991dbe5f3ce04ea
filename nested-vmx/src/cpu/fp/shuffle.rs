//! Instructions with an immediate or an implicit operand that say which elements go where, and the tests and products
//! among them.

use super::moves::{to_mm, to_xmm};
use crate::cpu::decode::{Decoded, Selected};
use crate::cpu::flags::{CF, ZF};
use crate::cpu::op::Op;
use crate::cpu::{Cpu, Flow};
use iced_x86::Mnemonic as M;

fn lane(v: u128, n: u8, bits: u32) -> u128 {
    v >> (u32::from(n) * bits) & (u128::MAX >> (128 - bits))
}

/// Four elements of `v` chosen by two bits each.
fn four(v: u128, imm: u8, bits: u32) -> u128 {
    (0..4u8).fold(0, |r, n| r | lane(v, imm >> (2 * n) & 3, bits) << (u32::from(n) * bits))
}

/// Elements of `b` where the immediate's bit is set, else of `a`.
fn blend(a: u128, b: u128, imm: u8, bits: u32) -> u128 {
    let mask =
        (0..128 / bits).filter(|n| imm >> n & 1 != 0).fold(0, |m, n| m | (u128::MAX >> (128 - bits)) << (n * bits));
    a & !mask | b & mask
}

fn shift_left(v: u128, bytes: u8) -> u128 {
    if bytes > 15 { 0 } else { v << (8 * bytes) }
}

fn shift_right(v: u128, bytes: u8) -> u128 {
    if bytes > 15 { 0 } else { v >> (8 * bytes) }
}

fn palignr_value(a: u128, b: u128, n: u8) -> u128 {
    match n {
        0 => b,
        1..=15 => b >> (8 * n) | a << (128 - 8 * u32::from(n)),
        _ => shift_right(a, n - 16),
    }
}

/// SDM 2, "INSERTPS". From memory there is one element, whatever the immediate's bits 7:6.
fn insertps_value(a: u128, b: u128, imm: u8, from_memory: bool) -> u128 {
    let v = lane(b, if from_memory { 0 } else { imm >> 6 }, 32);
    let at = 32 * u32::from(imm >> 4 & 3);
    blend(a & !(0xffff_ffff << at) | v << at, 0, imm & 15, 32)
}

/// SDM 2, "MPSADBW": eight sums of four absolute differences.
fn mpsadbw_value(a: u128, b: u128, imm: u8) -> u128 {
    let (a, b) = (a.to_le_bytes(), b.to_le_bytes());
    let (from, block) = (usize::from(imm >> 2 & 1) * 4, usize::from(imm & 3) * 4);
    (0..8).fold(0, |r, n| {
        let sum: u16 = (0..4).map(|k| u16::from(a[from + n + k].abs_diff(b[block + k]))).sum();
        r | u128::from(sum) << (16 * n)
    })
}

fn shufps_value(a: u128, b: u128, imm: u8) -> u128 {
    const LOW: u128 = u64::MAX as u128;
    four(a, imm, 32) & LOW | four(b, imm, 32) & !LOW
}

/// The round constant is XORed into elements 1 and 3 (SDM 2, "AESKEYGENASSIST").
fn keygen(b: u128, imm: u8) -> u128 {
    let v = assist(b);
    v ^ u128::from(imm) << 32 ^ u128::from(imm) << 96
}

fn assist(b: u128) -> u128 {
    let mut v = super::vector::to_host(b);
    // SAFETY: the instruction works on one register; select() checked that the host has it.
    unsafe {
        std::arch::asm!("aeskeygenassist {0}, {0}, 0", inout(xmm_reg) v, options(nostack, nomem, pure, preserves_flags));
    }
    super::vector::from_host(v)
}

fn carryless(a: u128, b: u128) -> u128 {
    let (mut v, b) = (super::vector::to_host(a), super::vector::to_host(b));
    // SAFETY: the instruction works on two registers; select() checked that the host has it.
    unsafe {
        std::arch::asm!("pclmulqdq {0}, {1}, 0", inout(xmm_reg) v, in(xmm_reg) b,
            options(nostack, nomem, pure, preserves_flags));
    }
    super::vector::from_host(v)
}

to_xmm! {
    pshufd(_a, b, i) => four(b, i, 32);
    pshuflw(_a, b, i) => b >> 64 << 64 | four(b, i, 16);
    pshufhw(_a, b, i) => u128::from(b as u64) | four(b >> 64, i, 16) << 64;
    shufps(a, b, i) => shufps_value(a, b, i);
    shufpd(a, b, i) => lane(a, i & 1, 64) | lane(b, i >> 1 & 1, 64) << 64;
    palignr(a, b, i) => palignr_value(a, b, i);
    pblendw(a, b, i) => blend(a, b, i, 16);
    blendps(a, b, i) => blend(a, b, i & 15, 32);
    blendpd(a, b, i) => blend(a, b, i & 3, 64);
    insertps_m(a, b, i) => insertps_value(a, b, i, true);
    insertps_r(a, b, i) => insertps_value(a, b, i, false);
    mpsadbw(a, b, i) => mpsadbw_value(a, b, i);
    pclmulqdq(a, b, i) => carryless(lane(a, i & 1, 64), lane(b, i >> 4 & 1, 64));
    aeskeygenassist(_a, b, i) => keygen(b, i);
}

to_mm! {
    pshufw(_a, b, i) => four(b.into(), i, 16) as u64;
    palignr_mm(a, b, i) => {
        let both = u128::from(a) << 64 | u128::from(b);
        shift_right(both, i) as u64
    };
}

fn pslldq(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.sse_ready()?;
    let d = &mut cpu.fp.xmm[usize::from(op.dst & 15)];
    *d = shift_left(*d, op.imm8());
    Ok(())
}

fn psrldq(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.sse_ready()?;
    let d = &mut cpu.fp.xmm[usize::from(op.dst & 15)];
    *d = shift_right(*d, op.imm8());
    Ok(())
}

/// PBLENDVB, BLENDVPS, BLENDVPD: the sign bits of XMM0's elements choose.
fn blendv<const BITS: u32>(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.sse_ready()?;
    let b = cpu.vector_source(op)?;
    let chooser = cpu.fp.xmm[0];
    let element = u128::MAX >> (128 - BITS);
    let mask =
        (0..128 / BITS).filter(|n| chooser >> (n * BITS + BITS - 1) & 1 != 0).fold(0, |m, n| m | element << (n * BITS));
    let d = &mut cpu.fp.xmm[usize::from(op.dst & 15)];
    *d = *d & !mask | b & mask;
    Ok(())
}

fn ptest(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.sse_ready()?;
    let b = cpu.vector_source(op)?;
    let a = cpu.fp.xmm[usize::from(op.dst & 15)];
    let flags = if a & b == 0 { ZF } else { 0 } | if !a & b == 0 { CF } else { 0 };
    cpu.flags.set_status(flags);
    Ok(())
}

pub(super) fn select_xmm(d: &mut Decoded) -> Selected {
    let from_memory = d.i.op_count() > 1 && d.i.op1_kind() == iced_x86::OpKind::Memory;
    Some(match d.i.mnemonic() {
        M::Pshufd => pshufd,
        M::Pshuflw => pshuflw,
        M::Pshufhw => pshufhw,
        M::Shufps => shufps,
        M::Shufpd => shufpd,
        M::Palignr => palignr,
        M::Pblendw => pblendw,
        M::Blendps => blendps,
        M::Blendpd => blendpd,
        M::Insertps if from_memory => insertps_m,
        M::Insertps => insertps_r,
        M::Mpsadbw => mpsadbw,
        M::Pclmulqdq => pclmulqdq,
        M::Aeskeygenassist => aeskeygenassist,
        M::Pslldq => pslldq,
        M::Psrldq => psrldq,
        M::Pblendvb => blendv::<8>,
        M::Blendvps => blendv::<32>,
        M::Blendvpd => blendv::<64>,
        M::Ptest => ptest,
        _ => return None,
    })
}

pub(super) fn select_mmx(d: &mut Decoded) -> Selected {
    Some(match d.i.mnemonic() {
        M::Pshufw => pshufw,
        M::Palignr => palignr_mm,
        _ => return None,
    })
}
