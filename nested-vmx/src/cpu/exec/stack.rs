//! PUSH and POP of general registers, memory and immediates; LEAVE.

use crate::cpu::access::Use;
use crate::cpu::decode::{Decoded, Selected, Shape};
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

macro_rules! stack {
    ($bits:expr, $f:ident) => {
        Some(match $bits {
            16 => $f::<u16> as Handler,
            32 => $f::<u32>,
            _ => $f::<u64>,
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
        (Mnemonic::Push, Shape::R) => stack!(stack_bits(d), push_r),
        (Mnemonic::Push, Shape::M) => stack!(stack_bits(d), push_m),
        (Mnemonic::Push, Shape::I) => stack!(stack_bits(d), push_i),
        (Mnemonic::Pop, Shape::R) => stack!(stack_bits(d), pop_r),
        (Mnemonic::Pop, Shape::M) => stack!(stack_bits(d), pop_m),
        (Mnemonic::Leave, _) => stack!(stack_bits(d), leave),
        _ => None,
    }
}
