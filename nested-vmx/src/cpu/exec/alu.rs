//! ADD, OR, ADC, SBB, AND, SUB, XOR, CMP, TEST, INC, DEC, NEG, NOT.

use crate::cpu::access::Use;
use crate::cpu::decode::{Decoded, Selected, Shape, hot_by_width};
use crate::cpu::flags::Flags;
use crate::cpu::op::{Op, op_flags};
use crate::cpu::{Cpu, Flow};
use crate::mem::Word;
use iced_x86::Mnemonic;

/// A two-operand operation: value and flags.
trait Binary {
    /// CMP and TEST write no result.
    const WRITES: bool;
    const CARRY_IN: bool;
    fn value<W: Word>(a: W, b: W, carry: bool) -> W;
    fn flags<W: Word>(f: &mut Flags, a: W, b: W, r: W);
}

macro_rules! binary {
    ($name:ident, $writes:literal, $carry:literal, |$a:ident, $b:ident, $c:ident| $value:expr,
     |$f:ident, $x:ident, $y:ident, $r:ident| $flags:expr) => {
        struct $name;
        impl Binary for $name {
            const WRITES: bool = $writes;
            const CARRY_IN: bool = $carry;
            #[inline(always)]
            fn value<W: Word>(a: W, b: W, c: bool) -> W {
                let ($a, $b, $c) = (a.to_u64(), b.to_u64(), u64::from(c));
                W::from_u64($value)
            }
            #[inline(always)]
            fn flags<W: Word>($f: &mut Flags, $x: W, $y: W, $r: W) {
                $flags
            }
        }
    };
}

binary!(Add, true, false, |a, b, _c| a.wrapping_add(b), |f, a, b, r| f.add(a, b, r));
binary!(Adc, true, true, |a, b, c| a.wrapping_add(b).wrapping_add(c), |f, a, b, r| f.add(a, b, r));
binary!(Sub, true, false, |a, b, _c| a.wrapping_sub(b), |f, a, b, r| f.sub(a, b, r));
binary!(Sbb, true, true, |a, b, c| a.wrapping_sub(b).wrapping_sub(c), |f, a, b, r| f.sub(a, b, r));
binary!(Cmp, false, false, |a, b, _c| a.wrapping_sub(b), |f, a, b, r| f.sub(a, b, r));
binary!(And, true, false, |a, b, _c| a & b, |f, _a, _b, r| f.logic(r));
binary!(Test, false, false, |a, b, _c| a & b, |f, _a, _b, r| f.logic(r));
binary!(Or, true, false, |a, b, _c| a | b, |f, _a, _b, r| f.logic(r));
binary!(Xor, true, false, |a, b, _c| a ^ b, |f, _a, _b, r| f.logic(r));

#[inline(always)]
fn carry<O: Binary>(cpu: &Cpu) -> bool {
    O::CARRY_IN && cpu.flags.cf()
}

#[inline(always)]
fn to_register<W: Word, O: Binary>(cpu: &mut Cpu, op: &Op, b: W) -> Flow {
    let a: W = cpu.regs.get(op.dst);
    let r = O::value(a, b, carry::<O>(cpu));
    O::flags(&mut cpu.flags, a, b, r);
    if O::WRITES {
        cpu.regs.put(op.dst, r);
    }
    Ok(())
}

#[inline(always)]
fn to_memory<W: Word, O: Binary>(cpu: &mut Cpu, op: &Op, b: W) -> Flow {
    if !O::WRITES {
        let a: W = cpu.load_operand(op)?;
        O::flags(&mut cpu.flags, a, b, O::value(a, b, false));
        return Ok(());
    }
    let c = carry::<O>(cpu);
    let lin = cpu.linear(op, W::BYTES, Use::Write)?;
    let a = cpu.modify(op, lin, op.has(op_flags::LOCK), |a| O::value(a, b, c))?;
    O::flags(&mut cpu.flags, a, b, O::value(a, b, c));
    Ok(())
}

fn rr<W: Word, O: Binary>(cpu: &mut Cpu, op: &Op) -> Flow {
    let b: W = cpu.regs.get(op.src);
    to_register::<W, O>(cpu, op, b)
}

fn ri<W: Word, O: Binary>(cpu: &mut Cpu, op: &Op) -> Flow {
    to_register::<W, O>(cpu, op, W::from_u64(op.imm))
}

fn rm<W: Word, O: Binary>(cpu: &mut Cpu, op: &Op) -> Flow {
    let b: W = cpu.load_operand(op)?;
    to_register::<W, O>(cpu, op, b)
}

fn mr<W: Word, O: Binary>(cpu: &mut Cpu, op: &Op) -> Flow {
    let b: W = cpu.regs.get(op.src);
    to_memory::<W, O>(cpu, op, b)
}

fn mi<W: Word, O: Binary>(cpu: &mut Cpu, op: &Op) -> Flow {
    to_memory::<W, O>(cpu, op, W::from_u64(op.imm))
}

/// The fast paths of these (see [`crate::cpu::op::chain_fast`]).
#[inline(always)]
fn fast_rr<W: Word, O: Binary>(cpu: &mut Cpu, op: &Op) -> bool {
    let b: W = cpu.regs.get(op.src);
    to_register::<W, O>(cpu, op, b).is_ok()
}

#[inline(always)]
fn fast_ri<W: Word, O: Binary>(cpu: &mut Cpu, op: &Op) -> bool {
    to_register::<W, O>(cpu, op, W::from_u64(op.imm)).is_ok()
}

#[inline(always)]
fn fast_rm<W: Word, O: Binary>(cpu: &mut Cpu, op: &Op) -> bool {
    let Some(b) = cpu.fast_load::<W>(op) else { return false };
    to_register::<W, O>(cpu, op, b).is_ok()
}

#[inline(always)]
fn fast_to_memory<W: Word, O: Binary>(cpu: &mut Cpu, op: &Op, b: W) -> bool {
    if !O::WRITES {
        let Some(a) = cpu.fast_load::<W>(op) else { return false };
        O::flags(&mut cpu.flags, a, b, O::value(a, b, false));
        return true;
    }
    let Some(offset) = cpu.fast_place::<W>(op).filter(|_| !op.has(op_flags::LOCK)) else { return false };
    let a: W = cpu.ram.load(offset);
    let r = O::value(a, b, carry::<O>(cpu));
    cpu.ram.store(offset, r);
    O::flags(&mut cpu.flags, a, b, r);
    true
}

#[inline(always)]
fn fast_mr<W: Word, O: Binary>(cpu: &mut Cpu, op: &Op) -> bool {
    let b: W = cpu.regs.get(op.src);
    fast_to_memory::<W, O>(cpu, op, b)
}

#[inline(always)]
fn fast_mi<W: Word, O: Binary>(cpu: &mut Cpu, op: &Op) -> bool {
    fast_to_memory::<W, O>(cpu, op, W::from_u64(op.imm))
}

/// A one-operand operation.
trait Unary {
    fn value<W: Word>(a: W) -> W;
    fn flags<W: Word>(f: &mut Flags, a: W, r: W);
}

macro_rules! unary {
    ($name:ident, |$a:ident| $value:expr, |$f:ident, $x:ident, $r:ident| $flags:expr) => {
        struct $name;
        impl Unary for $name {
            #[inline(always)]
            fn value<W: Word>(a: W) -> W {
                let $a = a.to_u64();
                W::from_u64($value)
            }
            #[inline(always)]
            fn flags<W: Word>($f: &mut Flags, $x: W, $r: W) {
                $flags
            }
        }
    };
}

unary!(Inc, |a| a.wrapping_add(1), |f, a, r| f.inc(a, r));
unary!(Dec, |a| a.wrapping_sub(1), |f, a, r| f.dec(a, r));
unary!(Neg, |a| a.wrapping_neg(), |f, a, r| f.sub(W::default(), a, r));
unary!(Not, |a| !a, |_f, _a, _r| ());

#[inline(always)]
fn r<W: Word, O: Unary>(cpu: &mut Cpu, op: &Op) -> Flow {
    let a: W = cpu.regs.get(op.dst);
    let v = O::value(a);
    O::flags(&mut cpu.flags, a, v);
    cpu.regs.put(op.dst, v);
    Ok(())
}

fn m<W: Word, O: Unary>(cpu: &mut Cpu, op: &Op) -> Flow {
    let lin = cpu.linear(op, W::BYTES, Use::Write)?;
    let a = cpu.modify(op, lin, op.has(op_flags::LOCK), O::value::<W>)?;
    O::flags(&mut cpu.flags, a, O::value(a));
    Ok(())
}

#[inline(always)]
fn fast_r<W: Word, O: Unary>(cpu: &mut Cpu, op: &Op) -> bool {
    r::<W, O>(cpu, op).is_ok()
}

#[inline(always)]
fn fast_m<W: Word, O: Unary>(cpu: &mut Cpu, op: &Op) -> bool {
    let Some(offset) = cpu.fast_place::<W>(op).filter(|_| !op.has(op_flags::LOCK)) else { return false };
    let a: W = cpu.ram.load(offset);
    let v = O::value(a);
    cpu.ram.store(offset, v);
    O::flags(&mut cpu.flags, a, v);
    true
}

fn binary<O: Binary>(d: &mut Decoded) -> Selected {
    let bits = d.width(0);
    match d.shape {
        Shape::RR => hot_by_width!(d, bits, rr, fast_rr, O),
        Shape::RI => hot_by_width!(d, bits, ri, fast_ri, O),
        Shape::RM => hot_by_width!(d, bits, rm, fast_rm, O),
        Shape::MR => hot_by_width!(d, bits, mr, fast_mr, O),
        Shape::MI => hot_by_width!(d, bits, mi, fast_mi, O),
        _ => None,
    }
}

fn unary<O: Unary>(d: &mut Decoded) -> Selected {
    let bits = d.width(0);
    match d.shape {
        Shape::R => hot_by_width!(d, bits, r, fast_r, O),
        Shape::M => hot_by_width!(d, bits, m, fast_m, O),
        _ => None,
    }
}

pub(in crate::cpu) fn select(d: &mut Decoded) -> Selected {
    match d.i.mnemonic() {
        Mnemonic::Add => binary::<Add>(d),
        Mnemonic::Or => binary::<Or>(d),
        Mnemonic::Adc => binary::<Adc>(d),
        Mnemonic::Sbb => binary::<Sbb>(d),
        Mnemonic::And => binary::<And>(d),
        Mnemonic::Sub => binary::<Sub>(d),
        Mnemonic::Xor => binary::<Xor>(d),
        Mnemonic::Cmp => binary::<Cmp>(d),
        Mnemonic::Test => binary::<Test>(d),
        Mnemonic::Inc => unary::<Inc>(d),
        Mnemonic::Dec => unary::<Dec>(d),
        Mnemonic::Neg => unary::<Neg>(d),
        Mnemonic::Not => unary::<Not>(d),
        _ => None,
    }
}
