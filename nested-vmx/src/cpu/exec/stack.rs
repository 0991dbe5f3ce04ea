//! PUSH and POP of general registers, memory and immediates; PUSHA, POPA; ENTER, LEAVE.

use crate::cpu::access::Use;
use crate::cpu::decode::{Decoded, Selected, Shape, hot};
use crate::cpu::mmu::Wanted;
use crate::cpu::op::{Handler, Op};
use crate::cpu::{Cpu, Flow, Stop, slot};
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
    let stored = cpu.store_operand(op, v);
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
    let v: W = cpu.load(lin).map_err(Stop::on_stack)?;
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

/// `imm` has the size of the frame, and from bit 16 on the nesting level.
fn enter<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let (rsp, rbp) = (cpu.regs.r(slot::RSP), cpu.regs.r(slot::RBP));
    let done = enter_frame::<W>(cpu, op.imm & 0xffff, op.imm >> 16 & 31);
    if done.is_err() {
        cpu.regs.set_r(slot::RSP, rsp);
        cpu.regs.set_r(slot::RBP, rbp);
    }
    done
}

fn enter_frame<W: Word>(cpu: &mut Cpu, size: u64, level: u64) -> Flow {
    let mask = cpu.mode.stack_mask();
    let mut rbp = cpu.regs.r(slot::RBP);
    cpu.push(W::from_u64(rbp))?;
    let frame = cpu.regs.r(slot::RSP);
    if level > 0 {
        for _ in 1..level {
            rbp = rbp.wrapping_sub(W::BYTES);
            let lin = cpu.stack_linear(rbp & mask, W::BYTES, Use::Read)?;
            let display: W = cpu.load(lin).map_err(Stop::on_stack)?;
            cpu.push(display)?;
        }
        cpu.push(W::from_u64(frame))?;
    }
    cpu.add_rsp(size.wrapping_neg());
    // SDM 2, "ENTER": a write at the new stack pointer would have to succeed.
    let lin = cpu.stack_linear(cpu.regs.r(slot::RSP) & mask, W::BYTES, Use::Write)?;
    if cpu.tlb.write(cpu.data_access, lin, W::BYTES).is_none() {
        let wanted = Wanted { write: true, fetch: false, access: cpu.data_access };
        cpu.translate(lin, wanted).map_err(Stop::on_stack)?;
    }
    cpu.regs.put(slot::RBP, W::from_u64(frame));
    Ok(())
}

fn pusha<W: Word>(cpu: &mut Cpu, _: &Op) -> Flow {
    let rsp = cpu.regs.r(slot::RSP);
    for n in slot::RAX..=slot::RDI {
        let v = if n == slot::RSP { rsp } else { cpu.regs.r(n) };
        if let Err(stop) = cpu.push(W::from_u64(v)) {
            cpu.regs.set_r(slot::RSP, rsp);
            return Err(stop);
        }
    }
    Ok(())
}

/// All values are read before any register changes; the one for RSP is skipped.
fn popa<W: Word>(cpu: &mut Cpu, _: &Op) -> Flow {
    let mut values = [W::default(); 8];
    for (i, v) in values.iter_mut().enumerate() {
        *v = cpu.peek_stack(i as u64 * W::BYTES)?;
    }
    for (n, v) in (slot::RAX..=slot::RDI).rev().zip(values) {
        if n != slot::RSP {
            cpu.regs.put(n, v);
        }
    }
    cpu.add_rsp(8 * W::BYTES);
    Ok(())
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
        (Mnemonic::Pusha, _) => Some(pusha::<u16>),
        (Mnemonic::Pushad, _) => Some(pusha::<u32>),
        (Mnemonic::Popa, _) => Some(popa::<u16>),
        (Mnemonic::Popad, _) => Some(popa::<u32>),
        (Mnemonic::Enter, _) => {
            d.op.imm = u64::from(d.i.immediate16()) | u64::from(d.i.immediate8_2nd()) << 16;
            stack!(d, enter)
        }
        (Mnemonic::Leave, _) => stack!(d, leave),
        _ => None,
    }
}
