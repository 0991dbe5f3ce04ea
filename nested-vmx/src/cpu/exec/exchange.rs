//! XCHG, XADD, CMPXCHG, CMPXCHG8B, CMPXCHG16B.

use crate::cpu::access::Use;
use crate::cpu::decode::{Decoded, Selected, Shape, by_width, sure_by_width};
use crate::cpu::op::{Op, op_flags};
use crate::cpu::{Cpu, Flow, Stop, slot};
use crate::mem::Word;
use iced_x86::Mnemonic;

#[inline(always)]
fn xchg_rr<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let (a, b): (W, W) = (cpu.regs.get(op.dst), cpu.regs.get(op.src));
    cpu.regs.put(op.dst, b);
    cpu.regs.put(op.src, a);
    Ok(())
}

/// Locked with or without the prefix.
fn xchg_mr<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let b: W = cpu.regs.get(op.src);
    let lin = cpu.linear(op, W::BYTES, Use::Write)?;
    let a: W = cpu.modify(op, lin, true, |_| b)?;
    cpu.regs.put(op.src, a);
    Ok(())
}

#[inline(always)]
fn sum<W: Word>(a: W, b: W) -> W {
    W::from_u64(a.to_u64().wrapping_add(b.to_u64()))
}

fn xadd_rr<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let (a, b): (W, W) = (cpu.regs.get(op.dst), cpu.regs.get(op.src));
    let r = sum(a, b);
    cpu.flags.add(a, b, r);
    // The sum is written last: it stays when both operands are one register.
    cpu.regs.put(op.src, a);
    cpu.regs.put(op.dst, r);
    Ok(())
}

fn xadd_mr<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let b: W = cpu.regs.get(op.src);
    let lin = cpu.linear(op, W::BYTES, Use::Write)?;
    let a = cpu.modify(op, lin, op.has(op_flags::LOCK), |a| sum(a, b))?;
    cpu.flags.add(a, b, sum(a, b));
    cpu.regs.put(op.src, a);
    Ok(())
}

#[inline(always)]
fn compare<W: Word>(cpu: &mut Cpu, seen: W) -> bool {
    let acc: W = cpu.regs.get(slot::RAX);
    let r = W::from_u64(acc.to_u64().wrapping_sub(seen.to_u64()));
    cpu.flags.sub(acc, seen, r);
    if seen != acc {
        cpu.regs.put(slot::RAX, seen);
    }
    seen == acc
}

fn cmpxchg_rr<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let (seen, new): (W, W) = (cpu.regs.get(op.dst), cpu.regs.get(op.src));
    if compare(cpu, seen) {
        cpu.regs.put(op.dst, new);
    }
    Ok(())
}

/// The destination is written whatever the comparison says.
fn cmpxchg_mr<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let (acc, new): (W, W) = (cpu.regs.get(slot::RAX), cpu.regs.get(op.src));
    let lin = cpu.linear(op, W::BYTES, Use::Write)?;
    let seen = cpu.modify(op, lin, op.has(op_flags::LOCK), |m| if m == acc { new } else { m })?;
    compare(cpu, seen);
    Ok(())
}

fn cmpxchg8b(cpu: &mut Cpu, op: &Op) -> Flow {
    let pair = |hi, lo| u64::from(cpu.regs.get::<u32>(hi)) << 32 | u64::from(cpu.regs.get::<u32>(lo));
    let (acc, new) = (pair(slot::RDX, slot::RAX), pair(slot::RCX, slot::RBX));
    let lin = cpu.linear(op, 8, Use::Write)?;
    let seen: u64 = cpu.modify(op, lin, op.has(op_flags::LOCK), |m| if m == acc { new } else { m })?;
    cpu.flags.set_zf(seen == acc);
    if seen != acc {
        cpu.regs.put(slot::RAX, seen as u32);
        cpu.regs.put(slot::RDX, (seen >> 32) as u32);
    }
    Ok(())
}

/// The operand must be 16-byte aligned (SDM 2, "CMPXCHG16B").
fn cmpxchg16b(cpu: &mut Cpu, op: &Op) -> Flow {
    let pair = |hi, lo| u128::from(cpu.regs.r(hi)) << 64 | u128::from(cpu.regs.r(lo));
    let (acc, new) = (pair(slot::RDX, slot::RAX), pair(slot::RCX, slot::RBX));
    let lin = cpu.linear(op, 16, Use::Write)?;
    if lin & 15 != 0 {
        return Err(Stop::GP0);
    }
    let seen: u128 = cpu.modify(op, lin, op.has(op_flags::LOCK), |m| if m == acc { new } else { m })?;
    cpu.flags.set_zf(seen == acc);
    if seen != acc {
        cpu.regs.set_r(slot::RAX, seen as u64);
        cpu.regs.set_r(slot::RDX, (seen >> 64) as u64);
    }
    Ok(())
}

pub(in crate::cpu) fn select(d: &mut Decoded) -> Selected {
    let bits = d.width(0);
    match (d.i.mnemonic(), d.shape) {
        (Mnemonic::Xchg, Shape::RR) => sure_by_width!(d, bits, xchg_rr),
        (Mnemonic::Xchg, Shape::MR) => by_width!(bits, xchg_mr),
        (Mnemonic::Xadd, Shape::RR) => by_width!(bits, xadd_rr),
        (Mnemonic::Xadd, Shape::MR) => by_width!(bits, xadd_mr),
        (Mnemonic::Cmpxchg, Shape::RR) => by_width!(bits, cmpxchg_rr),
        (Mnemonic::Cmpxchg, Shape::MR) => by_width!(bits, cmpxchg_mr),
        (Mnemonic::Cmpxchg8b, Shape::M) => Some(cmpxchg8b),
        (Mnemonic::Cmpxchg16b, Shape::M) => Some(cmpxchg16b),
        _ => None,
    }
}
