//! Near branches: Jcc, JMP, CALL, RET, LOOPcc, JCXZ.

use super::mov::condition;
use crate::arch::is_canonical;
use crate::cpu::decode::{Decoded, Selected, Shape, hot};
use crate::cpu::op::{Handler, Op};
use crate::cpu::seg::reg;
use crate::cpu::{Cpu, Flow, Stop, slot};
use crate::mem::Word;
use iced_x86::Mnemonic;

impl Cpu {
    /// RIP of the instruction behind `op`.
    #[inline(always)]
    pub(in crate::cpu) fn next_rip(&self, op: &Op) -> u64 {
        self.regs.rip().wrapping_add(op.end.into()) & self.mode.rip_mask
    }

    /// A near branch target must be canonical, or inside the code segment's limit.
    #[inline(always)]
    pub(in crate::cpu) fn check_target(&self, rip: u64) -> Flow {
        let ok = if self.code64() { is_canonical(rip) } else { rip <= u64::from(self.seg[usize::from(reg::CS)].limit) };
        if ok { Ok(()) } else { Err(Stop::GP0) }
    }

    /// A relative target: `imm` counts from the block's start. `W` is the width of RIP that the branch leaves.
    #[inline(always)]
    fn target<W: Word>(&self, op: &Op) -> u64 {
        W::from_u64(self.regs.rip().wrapping_add(op.imm)).to_u64()
    }

    #[inline(always)]
    fn jump(&mut self, target: u64) -> Flow {
        self.check_target(target)?;
        self.regs.set_rip(target);
        Ok(())
    }

    #[inline(always)]
    fn call<W: Word>(&mut self, op: &Op, target: u64) -> Flow {
        self.check_target(target)?;
        let next = self.next_rip(op);
        self.push(W::from_u64(next))?;
        self.regs.set_rip(target);
        Ok(())
    }
}

fn jcc<W: Word, const CC: u8>(cpu: &mut Cpu, op: &Op) -> Flow {
    if cpu.flags.condition(CC) {
        cpu.jump(cpu.target::<W>(op))
    } else {
        cpu.advance(op);
        Ok(())
    }
}

fn jmp<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.jump(cpu.target::<W>(op))
}

fn jmp_r<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.jump(cpu.regs.get::<W>(op.dst).to_u64())
}

fn jmp_m<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let target = cpu.load_operand::<W>(op)?.to_u64();
    cpu.jump(target)
}

fn call<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.call::<W>(op, cpu.target::<W>(op))
}

fn call_r<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.call::<W>(op, cpu.regs.get::<W>(op.dst).to_u64())
}

fn call_m<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let target = cpu.load_operand::<W>(op)?.to_u64();
    cpu.call::<W>(op, target)
}

/// `imm` is what RET pops besides the return address.
fn ret<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let target = cpu.peek_stack::<W>(0)?.to_u64();
    cpu.check_target(target)?;
    cpu.add_rsp(W::BYTES + op.imm);
    cpu.regs.set_rip(target);
    Ok(())
}

/// The fast paths of these (see [`crate::cpu::op::chain_fast`]); those without a width are for 64-bit mode.
#[inline(always)]
fn fast_jump(cpu: &mut Cpu, target: u64) -> bool {
    let ok = cpu.check_target(target).is_ok();
    if ok {
        cpu.regs.set_rip(target);
    }
    ok
}

#[inline(always)]
fn fast_jcc<W: Word, const CC: u8>(cpu: &mut Cpu, op: &Op) -> bool {
    if cpu.flags.condition(CC) {
        fast_jump(cpu, cpu.target::<W>(op))
    } else {
        cpu.advance(op);
        true
    }
}

#[inline(always)]
fn fast_jmp(cpu: &mut Cpu, op: &Op) -> bool {
    fast_jump(cpu, cpu.target::<u64>(op))
}

#[inline(always)]
fn fast_call(cpu: &mut Cpu, op: &Op) -> bool {
    let (target, next) = (cpu.target::<u64>(op), cpu.next_rip(op));
    if cpu.check_target(target).is_err() || !cpu.fast_push(next) {
        return false;
    }
    cpu.regs.set_rip(target);
    true
}

#[inline(always)]
fn fast_ret(cpu: &mut Cpu, op: &Op) -> bool {
    let Some(target) = cpu.fast_top::<u64>() else { return false };
    if cpu.check_target(target).is_err() {
        return false;
    }
    let rsp = cpu.regs.r(slot::RSP).wrapping_add(8 + op.imm);
    cpu.regs.set_r(slot::RSP, rsp);
    cpu.regs.set_rip(target);
    true
}

/// What `Op::src` says of [`looping`].
mod kind {
    pub const LOOPNE: u8 = 0;
    pub const LOOPE: u8 = 1;
    pub const LOOP: u8 = 2;
    pub const JCXZ: u8 = 3;
}

/// The count register is as wide as addresses.
fn looping<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let mask = op.address_mask();
    let rcx = cpu.regs.r(slot::RCX);
    let count = if op.src == kind::JCXZ { rcx & mask } else { rcx.wrapping_sub(1) & mask };
    let taken = match op.src {
        kind::LOOPNE => count != 0 && !cpu.flags.zf(),
        kind::LOOPE => count != 0 && cpu.flags.zf(),
        kind::LOOP => count != 0,
        _ => count == 0,
    };
    let next = if taken { cpu.target::<W>(op) } else { cpu.next_rip(op) };
    cpu.check_target(next)?;
    if op.src != kind::JCXZ {
        // With 32-bit addressing in 64-bit mode the upper half is cleared, with 16-bit the rest is kept.
        let keep = if mask == 0xffff { !mask } else { 0 };
        cpu.regs.set_r(slot::RCX, rcx & keep | count);
    }
    cpu.regs.set_rip(next);
    Ok(())
}

macro_rules! near {
    ($d:expr, $f:ident) => {
        Some(match target_bits($d) {
            16 => $f::<u16> as Handler,
            32 => $f::<u32>,
            _ => $f::<u64>,
        })
    };
    ($d:expr, $f:ident, $fast:ident) => {
        Some(match target_bits($d) {
            16 => $f::<u16> as Handler,
            32 => $f::<u32>,
            _ => hot!($d, $f::<u64>, $fast),
        })
    };
}

macro_rules! jcc_table {
    ($d:expr, $cc:expr, $w:ty; $($n:literal)*) => {
        match $cc {
            $($n => Some(hot!($d, jcc::<$w, $n>, fast_jcc::<$w, $n>)),)*
            _ => None,
        }
    };
}

/// The width of RIP that a near branch leaves: 64 in 64-bit mode whatever the prefixes (as Intel's), else the operand
/// size.
fn target_bits(d: &mut Decoded) -> u32 {
    if d.mode.code_bits == 64 {
        d.set_operand_bits(64);
    }
    d.operand_bits
}

pub(in crate::cpu) fn select(d: &mut Decoded) -> Selected {
    if d.i.is_jcc_short_or_near() {
        let cc = condition(d.i.condition_code())?;
        return match target_bits(d) {
            16 => jcc_table!(d, cc, u16; 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15),
            32 => jcc_table!(d, cc, u32; 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15),
            _ => jcc_table!(d, cc, u64; 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15),
        };
    }
    match d.i.mnemonic() {
        Mnemonic::Jmp if d.i.is_jmp_short_or_near() => near!(d, jmp, fast_jmp),
        Mnemonic::Jmp if d.i.is_jmp_near_indirect() && d.shape == Shape::R => near!(d, jmp_r),
        Mnemonic::Jmp if d.i.is_jmp_near_indirect() => near!(d, jmp_m),
        Mnemonic::Call if d.i.is_call_near() => near!(d, call, fast_call),
        Mnemonic::Call if d.i.is_call_near_indirect() && d.shape == Shape::R => near!(d, call_r),
        Mnemonic::Call if d.i.is_call_near_indirect() => near!(d, call_m),
        Mnemonic::Ret => near!(d, ret, fast_ret),
        m => {
            d.op.src = match m {
                Mnemonic::Loopne => kind::LOOPNE,
                Mnemonic::Loope => kind::LOOPE,
                Mnemonic::Loop => kind::LOOP,
                Mnemonic::Jcxz | Mnemonic::Jecxz | Mnemonic::Jrcxz => kind::JCXZ,
                _ => return None,
            };
            near!(d, looping)
        }
    }
}
