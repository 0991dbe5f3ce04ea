//! SHL, SHR, SAR, ROL, ROR, RCL, RCR, SHLD, SHRD.
//!
//! Undefined flags are as Intel's processors have them (the differential tests compare): OF is that of a shift by one
//! whatever the count, ROL and ROR of a register by a constant other than one keep it, AF is 0.

use crate::cpu::access::Use;
use crate::cpu::decode::{Decoded, Selected, Shape, by_width, sure_by_width};
use crate::cpu::flags::Flags;
use crate::cpu::op::Op;
use crate::cpu::{Cpu, Flow, slot};
use crate::mem::Word;
use iced_x86::{Mnemonic, OpKind, Register};

/// Bit `n` of `v`.
#[inline(always)]
fn bit(v: u64, n: u32) -> bool {
    v >> (n & 63) & 1 != 0
}

/// OF of shifts and rotates to the left, by the operand: the two top bits differ.
#[inline(always)]
fn top_bits_differ<W: Word>(a: W) -> bool {
    bit(a.to_u64() ^ a.to_u64() << 1, W::BITS - 1)
}

#[inline(always)]
fn sign<W: Word>(v: W) -> bool {
    v.to_i64() < 0
}

trait Shift {
    /// `n` is the masked count and not 0.
    fn apply<W: Word, C: Count>(f: Flags, a: W, n: u32) -> (W, Flags);
}

struct Shl;
impl Shift for Shl {
    #[inline(always)]
    fn apply<W: Word, C: Count>(mut f: Flags, a: W, n: u32) -> (W, Flags) {
        let v = a.to_u64();
        let r = W::from_u64(v << n);
        let cf = if W::BITS == 64 { bit(v, 64 - n) } else { bit(v << n, W::BITS) };
        f.result_cf_of(r, cf, top_bits_differ(a));
        (r, f)
    }
}

struct Shr;
impl Shift for Shr {
    #[inline(always)]
    fn apply<W: Word, C: Count>(mut f: Flags, a: W, n: u32) -> (W, Flags) {
        let r = W::from_u64(a.to_u64() >> n);
        f.result_cf_of(r, bit(a.to_u64(), n - 1), sign(a));
        (r, f)
    }
}

struct Sar;
impl Shift for Sar {
    #[inline(always)]
    fn apply<W: Word, C: Count>(mut f: Flags, a: W, n: u32) -> (W, Flags) {
        let a = a.to_i64();
        let r = W::from_u64((a >> n) as u64);
        f.result_cf_of(r, bit(a as u64, n - 1), false);
        (r, f)
    }
}

/// Rotates leave all flags but CF and OF.
#[inline(always)]
fn rotated<W: Word>(mut f: Flags, r: W, cf: bool, of: bool) -> (W, Flags) {
    f.set_cf(cf);
    f.set_of(of);
    (r, f)
}

#[inline(always)]
fn rotate_left<W: Word>(a: W, n: u32) -> W {
    let a = a.to_u64();
    let n = n & (W::BITS - 1);
    W::from_u64(a << n | a >> ((W::BITS - n) & 63) & (if n == 0 { 0 } else { u64::MAX }))
}

struct Rol;
impl Shift for Rol {
    #[inline(always)]
    fn apply<W: Word, C: Count>(f: Flags, a: W, n: u32) -> (W, Flags) {
        let r = rotate_left(a, n);
        let of = if C::KEEPS_OF && n != 1 { f.of() } else { top_bits_differ(a) };
        rotated(f, r, bit(r.to_u64(), 0), of)
    }
}

struct Ror;
impl Shift for Ror {
    #[inline(always)]
    fn apply<W: Word, C: Count>(f: Flags, a: W, n: u32) -> (W, Flags) {
        let r = rotate_left(a, n.wrapping_neg() & (W::BITS - 1));
        let of = if C::KEEPS_OF && n != 1 { f.of() } else { bit(a.to_u64(), 0) != sign(a) };
        rotated(f, r, sign(r), of)
    }
}

/// Rotates (CF, a) left by `n`, 1 to the operand's width. A count of 0 modulo its number of bits changes no flag.
#[inline(always)]
fn rotate_through_carry<W: Word>(cf: bool, a: W, n: u32) -> (W, bool) {
    let width = W::BITS + 1;
    let x = u128::from(cf) << W::BITS | u128::from(a.to_u64());
    let r = x << n | x >> (width - n);
    (W::from_u64(r as u64), r >> W::BITS & 1 != 0)
}

struct Rcl;
impl Shift for Rcl {
    #[inline(always)]
    fn apply<W: Word, C: Count>(f: Flags, a: W, n: u32) -> (W, Flags) {
        let n = n % (W::BITS + 1);
        if n == 0 {
            return (a, f);
        }
        let (r, cf) = rotate_through_carry(f.cf(), a, n);
        rotated(f, r, cf, top_bits_differ(a))
    }
}

struct Rcr;
impl Shift for Rcr {
    #[inline(always)]
    fn apply<W: Word, C: Count>(f: Flags, a: W, n: u32) -> (W, Flags) {
        let n = n % (W::BITS + 1);
        if n == 0 {
            return (a, f);
        }
        let (r, cf) = rotate_through_carry(f.cf(), a, W::BITS + 1 - n);
        rotated(f, r, cf, f.cf() != sign(a))
    }
}

/// Where the count comes from.
trait Count {
    /// ROL and ROR by more than one keep OF.
    const KEEPS_OF: bool = false;
    fn count(cpu: &Cpu, op: &Op) -> u64;
}

struct Imm;
impl Count for Imm {
    const KEEPS_OF: bool = true;
    #[inline(always)]
    fn count(_: &Cpu, op: &Op) -> u64 {
        op.imm
    }
}

/// A constant, of a shift in memory.
struct MemoryImm;
impl Count for MemoryImm {
    #[inline(always)]
    fn count(_: &Cpu, op: &Op) -> u64 {
        op.imm
    }
}

struct Cl;
impl Count for Cl {
    #[inline(always)]
    fn count(cpu: &Cpu, _: &Op) -> u64 {
        cpu.regs.r(slot::RCX)
    }
}

#[inline(always)]
fn masked<W: Word, C: Count>(cpu: &Cpu, op: &Op) -> u32 {
    C::count(cpu, op) as u32 & if W::BITS == 64 { 63 } else { 31 }
}

#[inline(always)]
fn r<W: Word, S: Shift, C: Count>(cpu: &mut Cpu, op: &Op) -> Flow {
    let n = masked::<W, C>(cpu, op);
    let a: W = cpu.regs.get(op.dst);
    if n == 0 {
        // A 32-bit destination is zero-extended all the same.
        cpu.regs.put(op.dst, a);
        return Ok(());
    }
    let (v, f) = S::apply::<W, C>(cpu.flags, a, n);
    cpu.flags = f;
    cpu.regs.put(op.dst, v);
    Ok(())
}

fn m<W: Word, S: Shift, C: Count>(cpu: &mut Cpu, op: &Op) -> Flow {
    let n = masked::<W, C>(cpu, op);
    let lin = cpu.linear(op, W::BYTES, Use::Write)?;
    let f = cpu.flags;
    let a = cpu.modify(op, lin, false, |a: W| if n == 0 { a } else { S::apply::<W, C>(f, a, n).0 })?;
    if n != 0 {
        cpu.flags = S::apply::<W, C>(f, a, n).1;
    }
    Ok(())
}

trait Double {
    /// `n` is the masked count and not 0. 16-bit operands by more than 16 are undefined; Intel's shift through a:b:a.
    fn apply<W: Word>(f: Flags, a: W, b: W, n: u32) -> (W, Flags);
}

/// a:b:a for 16 bits, else a:b with a on the side that is shifted into the result.
struct Shld;
impl Double for Shld {
    #[inline(always)]
    fn apply<W: Word>(mut f: Flags, a: W, b: W, n: u32) -> (W, Flags) {
        let (wide, width) = match W::BITS {
            16 => (u128::from(a.to_u64() << 32 | b.to_u64() << 16 | a.to_u64()), 48),
            bits => (u128::from(a.to_u64()) << bits | u128::from(b.to_u64()), 2 * bits),
        };
        let r = W::from_u64((wide << n >> (width - W::BITS)) as u64);
        f.result_cf_of(r, wide >> (width - n) & 1 != 0, top_bits_differ(a));
        (r, f)
    }
}

struct Shrd;
impl Double for Shrd {
    #[inline(always)]
    fn apply<W: Word>(mut f: Flags, a: W, b: W, n: u32) -> (W, Flags) {
        let wide = match W::BITS {
            16 => u128::from(a.to_u64() << 32 | b.to_u64() << 16 | a.to_u64()),
            bits => u128::from(b.to_u64()) << bits | u128::from(a.to_u64()),
        };
        let r = W::from_u64((wide >> n) as u64);
        f.result_cf_of(r, wide >> (n - 1) & 1 != 0, bit(b.to_u64(), 0) != sign(a));
        (r, f)
    }
}

#[inline(always)]
fn double_r<W: Word, D: Double, C: Count>(cpu: &mut Cpu, op: &Op) -> Flow {
    let n = masked::<W, C>(cpu, op);
    let a: W = cpu.regs.get(op.dst);
    if n == 0 {
        cpu.regs.put(op.dst, a);
        return Ok(());
    }
    let (v, f) = D::apply(cpu.flags, a, cpu.regs.get(op.src), n);
    cpu.flags = f;
    cpu.regs.put(op.dst, v);
    Ok(())
}

fn double_m<W: Word, D: Double, C: Count>(cpu: &mut Cpu, op: &Op) -> Flow {
    let n = masked::<W, C>(cpu, op);
    let b: W = cpu.regs.get(op.src);
    let lin = cpu.linear(op, W::BYTES, Use::Write)?;
    let f = cpu.flags;
    let a = cpu.modify(op, lin, false, |a: W| if n == 0 { a } else { D::apply(f, a, b, n).0 })?;
    if n != 0 {
        cpu.flags = D::apply(f, a, b, n).1;
    }
    Ok(())
}

fn shift<S: Shift>(d: &mut Decoded) -> Selected {
    let bits = d.width(0);
    match (d.shape, d.i.op_kind(1), d.i.op_register(1)) {
        (Shape::RR, _, Register::CL) => sure_by_width!(d, bits, r, S, Cl),
        (Shape::MR, _, Register::CL) => by_width!(bits, m, S, Cl),
        (Shape::RI, ..) => sure_by_width!(d, bits, r, S, Imm),
        (Shape::MI, ..) => by_width!(bits, m, S, MemoryImm),
        _ => None,
    }
}

fn double<D: Double>(d: &mut Decoded) -> Selected {
    let bits = d.width(0);
    match (d.shape, d.i.op_kind(2)) {
        (Shape::RR, OpKind::Register) => sure_by_width!(d, bits, double_r, D, Cl),
        (Shape::MR, OpKind::Register) => by_width!(bits, double_m, D, Cl),
        (Shape::RR, _) => sure_by_width!(d, bits, double_r, D, Imm),
        (Shape::MR, _) => by_width!(bits, double_m, D, Imm),
        _ => None,
    }
}

pub(in crate::cpu) fn select(d: &mut Decoded) -> Selected {
    match d.i.mnemonic() {
        Mnemonic::Shl | Mnemonic::Sal => shift::<Shl>(d),
        Mnemonic::Shr => shift::<Shr>(d),
        Mnemonic::Sar => shift::<Sar>(d),
        Mnemonic::Rol => shift::<Rol>(d),
        Mnemonic::Ror => shift::<Ror>(d),
        Mnemonic::Rcl => shift::<Rcl>(d),
        Mnemonic::Rcr => shift::<Rcr>(d),
        Mnemonic::Shld => double::<Shld>(d),
        Mnemonic::Shrd => double::<Shrd>(d),
        _ => None,
    }
}
