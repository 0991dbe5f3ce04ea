//! MOV, PUSH and POP of segment registers; LDS, LES, LFS, LGS, LSS.

use crate::cpu::access::Use;
use crate::cpu::decode::{Decoded, Selected, Shape, gpr, segment};
use crate::cpu::op::Op;
use crate::cpu::seg::reg;
use crate::cpu::state::shadow;
use crate::cpu::{Cpu, Flow, Stop};
use crate::mem::Word;
use iced_x86::{Mnemonic, OpKind};

impl Cpu {
    /// Ends an instruction that loaded segment register `n`. SS blocks interrupts and debug traps for the next one (SDM 3,
    /// "Masking Exceptions and Interrupts When Switching Stacks").
    fn segment_loaded(&mut self, n: u8) -> Flow {
        if n != reg::SS {
            return Ok(());
        }
        // Only the first of several counts (SDM 2, "MOV").
        if self.shadow & shadow::MOV_SS == 0 {
            self.new_shadow = shadow::MOV_SS;
        }
        Err(Stop::COMPLETED)
    }
}

/// `src` is the segment register.
fn to_r<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let selector = cpu.segment(op.src).selector;
    cpu.regs.put(op.dst, W::from_u64(selector.into()));
    Ok(())
}

fn to_m(cpu: &mut Cpu, op: &Op) -> Flow {
    let selector = cpu.segment(op.src).selector;
    cpu.store_operand(op, selector)
}

/// `dst` is the segment register.
fn from_r(cpu: &mut Cpu, op: &Op) -> Flow {
    let selector = cpu.regs.get(op.src);
    cpu.load_segment(op.dst, selector)?;
    cpu.segment_loaded(op.dst)
}

fn from_m(cpu: &mut Cpu, op: &Op) -> Flow {
    let selector = cpu.load_operand(op)?;
    cpu.load_segment(op.dst, selector)?;
    cpu.segment_loaded(op.dst)
}

/// A 32-bit push of a selector writes its 16 bits only, as processors since the P6 do (SDM 2, "PUSH").
fn push<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let selector = cpu.segment(op.dst).selector;
    if W::BYTES != 4 {
        return cpu.push(W::from_u64(selector.into()));
    }
    let mask = cpu.mode.stack_mask();
    let rsp = cpu.regs.r(crate::cpu::slot::RSP).wrapping_sub(W::BYTES) & mask;
    let lin = cpu.stack_linear(rsp, 2, Use::Write)?;
    cpu.store(lin, selector).map_err(Stop::on_stack)?;
    cpu.add_rsp(W::BYTES.wrapping_neg());
    Ok(())
}

fn pop<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let selector = cpu.peek_stack::<W>(0)?.to_u64() as u16;
    // The pop is as wide as the old stack.
    let mask = cpu.mode.stack_mask();
    cpu.load_segment(op.dst, selector)?;
    let rsp = cpu.regs.r(crate::cpu::slot::RSP);
    cpu.regs.set_r(crate::cpu::slot::RSP, rsp & !mask | rsp.wrapping_add(W::BYTES) & mask);
    cpu.segment_loaded(op.dst)
}

/// LDS and its like: `src` is the segment register.
fn load_far<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let (offset, selector) = cpu.far_pointer::<W>(op)?;
    cpu.load_segment(op.src, selector)?;
    cpu.regs.put(op.dst, W::from_u64(offset));
    // LSS does not block: it loads both halves of the stack pointer at once.
    if op.src == reg::SS { Err(Stop::COMPLETED) } else { Ok(()) }
}

impl Cpu {
    /// The far pointer that is the memory operand: offset, then selector.
    pub(super) fn far_pointer<W: Word>(&mut self, op: &Op) -> Result<(u64, u16), Stop> {
        let lin = self.linear(op, W::BYTES + 2, Use::Read)?;
        let offset: W = self.load(lin)?;
        let at = lin.wrapping_add(W::BYTES);
        let selector = self.load(if self.code64() { at } else { at & 0xffff_ffff })?;
        Ok((offset.to_u64(), selector))
    }
}

pub(super) fn select(d: &mut Decoded) -> Selected {
    let is_segment = |n: u32| d.i.op_kind(n) == OpKind::Register && d.i.op_register(n).is_segment_register();
    let bits = d.operand_bits;
    match d.i.mnemonic() {
        Mnemonic::Mov if d.shape == Shape::Other && is_segment(1) => {
            d.op.src = segment(d.i.op1_register());
            if d.i.op0_kind() == OpKind::Memory {
                return Some(to_m);
            }
            sized!(bits, to_r)
        }
        Mnemonic::Mov if d.shape == Shape::Other && is_segment(0) => {
            d.op.dst = segment(d.i.op0_register());
            if d.op.dst == reg::CS {
                return None;
            }
            d.ends = d.op.dst == reg::SS;
            if d.i.op1_kind() == OpKind::Memory {
                return Some(from_m);
            }
            d.op.src = gpr(d.i.op1_register());
            Some(from_r)
        }
        Mnemonic::Push if is_segment(0) => {
            d.op.dst = segment(d.i.op0_register());
            sized!(stack_bits(d), push)
        }
        Mnemonic::Pop if is_segment(0) => {
            d.op.dst = segment(d.i.op0_register());
            d.ends = d.op.dst == reg::SS;
            sized!(stack_bits(d), pop)
        }
        m => {
            d.op.src = match m {
                Mnemonic::Lds => reg::DS,
                Mnemonic::Les => reg::ES,
                Mnemonic::Lfs => reg::FS,
                Mnemonic::Lgs => reg::GS,
                Mnemonic::Lss => reg::SS,
                _ => return None,
            };
            d.ends = d.op.src == reg::SS;
            sized!(bits, load_far)
        }
    }
}

/// Stack operands are 64 bits wide in 64-bit mode unless a prefix makes them 16.
pub(super) fn stack_bits(d: &mut Decoded) -> u32 {
    if d.mode.code_bits == 64 && d.operand_bits == 32 {
        d.set_operand_bits(64);
    }
    d.operand_bits
}
