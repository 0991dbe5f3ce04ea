//! PUSH and POP of general registers, memory and immediates; LEAVE.

use crate::cpu::access::Use;
use crate::cpu::decode::{Decoded, Selected, Shape, hot};
use crate::cpu::op::{Handler, Op};
use crate::cpu::{Cpu, Flow, slot};
use crate::mem::Word;
use iced_x86::Mnemonic;

fn push_r<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let v: W = cpu.regs.get(op.dst);
    cpu.push(v)
}

fn push_m<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let v: W = cpu.load_operand(op)?;
    cpu.push(v)
}

fn push_i<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.push(W::from_u64(op.imm))
}

fn pop_r<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let v: W = cpu.peek_stack(0)?;
    cpu.add_rsp(W::BYTES);
    cpu.regs.put(op.dst, v);
    Ok(())
}

fn pop_m<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let v: W = cpu.peek_stack(0)?;
    // An address by RSP is computed with the value after the pop.
    let rsp = cpu.regs.r(slot::RSP);
    cpu.add_rsp(W::BYTES);
    let stored = cpu.linear(op, W::BYTES, Use::Write).and_then(|lin| cpu.store(lin, v));
    if stored.is_err() {
        cpu.regs.set_r(slot::RSP, rsp);
    }
    stored
}

/// RSP takes RBP's value in the stack's width; then RBP is popped.
fn leave<W: Word>(cpu: &mut Cpu, _: &Op) -> Flow {
    let mask = cpu.mode.stack_mask();
    let rbp = cpu.regs.r(slot::RBP) & mask;
    let lin = cpu.stack_linear(rbp, W::BYTES, Use::Read)?;
    let v: W = cpu.load(lin)?;
    let rsp = cpu.regs.r(slot::RSP);
    cpu.regs.set_r(slot::RSP, rsp & !mask | rbp.wrapping_add(W::BYTES) & mask);
    cpu.regs.put(slot::RBP, v);
    Ok(())
}

#[inline(always)]
fn fast_push_r(cpu: &mut Cpu, op: &Op) -> bool {
    let v: u64 = cpu.regs.r(op.dst);
    cpu.fast_push(v)
}

#[inline(always)]
fn fast_pop_r(cpu: &mut Cpu, op: &Op) -> bool {
    let Some(v) = cpu.fast_top::<u64>() else { return false };
    let rsp = cpu.regs.r(slot::RSP).wrapping_add(8);
    cpu.regs.set_r(slot::RSP, rsp);
    cpu.regs.set_r(op.dst, v);
    true
}

macro_rules! stack {
    ($d:expr, $f:ident) => {
        Some(match stack_bits($d) {
            16 => $f::<u16> as Handler,
            32 => $f::<u32>,
            _ => $f::<u64>,
        })
    };
    ($d:expr, $f:ident, $fast:ident) => {
        Some(match stack_bits($d) {
            16 => $f::<u16> as Handler,
            32 => $f::<u32>,
            _ => hot!($d, $f::<u64>, $fast),
        })
    };
}

/// Stack operands are 64 bits wide in 64-bit mode unless a prefix makes them 16.
fn stack_bits(d: &mut Decoded) -> u32 {
    if d.mode.code_bits == 64 && d.operand_bits == 32 {
        d.set_operand_bits(64);
    }
    d.operand_bits
}

pub(in crate::cpu) fn select(d: &mut Decoded) -> Selected {
    match (d.i.mnemonic(), d.shape) {
        (Mnemonic::Push, Shape::R) => stack!(d, push_r, fast_push_r),
        (Mnemonic::Push, Shape::M) => stack!(d, push_m),
        (Mnemonic::Push, Shape::I) => stack!(d, push_i),
        (Mnemonic::Pop, Shape::R) => stack!(d, pop_r, fast_pop_r),
        (Mnemonic::Pop, Shape::M) => stack!(d, pop_m),
        (Mnemonic::Leave, _) => stack!(d, leave),
        _ => None,
    }
}
