//! LAR, LSL, VERR, VERW, ARPL.

use crate::arch::descriptor::{Descriptor, Selector};
use crate::arch::segment::system;
use crate::cpu::access::Use;
use crate::cpu::decode::{Decoded, Selected};
use crate::cpu::op::Op;
use crate::cpu::{Cpu, Flow, Stop};
use crate::mem::Word;
use iced_x86::{Mnemonic, OpKind};

impl Cpu {
    /// The descriptor of a selector if code of this privilege may know of it. Only page faults are faults.
    fn visible_descriptor(&mut self, selector: Selector, allowed: fn(&Cpu, &Descriptor) -> bool) -> Looked {
        if selector.is_null() {
            return Ok(None);
        }
        let d = match self.find_descriptor(selector, Stop::gp) {
            Ok(found) => found.descriptor,
            Err(stop) if stop == Stop::gp(selector.error()) => return Ok(None),
            Err(stop) => return Err(stop),
        };
        let privileged = d.is_conforming_code() || selector.rpl().max(self.cpl) <= d.dpl();
        Ok((privileged && allowed(self, &d)).then_some(d))
    }
}

type Looked = Result<Option<Descriptor>, Stop>;

fn lar_allows(cpu: &Cpu, d: &Descriptor) -> bool {
    let wide = matches!(d.kind(), system::LDT | system::TSS_AVAILABLE | system::TSS_BUSY | system::CALL_GATE);
    let narrow =
        matches!(d.kind(), system::TSS16_AVAILABLE | system::TSS16_BUSY | system::CALL_GATE16 | system::TASK_GATE);
    d.s() || wide || narrow && !cpu.long_mode()
}

fn lsl_allows(cpu: &Cpu, d: &Descriptor) -> bool {
    let gate = matches!(d.kind(), system::CALL_GATE | system::CALL_GATE16 | system::TASK_GATE);
    d.s() || lar_allows(cpu, d) && !gate
}

/// `imm` tells whether the selector is in memory.
fn selector(cpu: &mut Cpu, op: &Op, n: u8) -> Result<Selector, Stop> {
    if !cpu.protected() {
        return Err(Stop::UD);
    }
    Ok(Selector(if op.imm != 0 { cpu.load_operand(op)? } else { cpu.regs.get(n) }))
}

fn lar<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let selector = selector(cpu, op, op.src)?;
    let found = cpu.visible_descriptor(selector, lar_allows)?;
    if let Some(d) = found {
        cpu.regs.put(op.dst, W::from_u64(d.lower >> 32 & 0x00ff_ff00));
    }
    cpu.flags.set_zf(found.is_some());
    Ok(())
}

fn lsl<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let selector = selector(cpu, op, op.src)?;
    let found = cpu.visible_descriptor(selector, lsl_allows)?;
    if let Some(d) = found {
        cpu.regs.put(op.dst, W::from_u64(d.limit().into()));
    }
    cpu.flags.set_zf(found.is_some());
    Ok(())
}

fn verr(cpu: &mut Cpu, op: &Op) -> Flow {
    let selector = selector(cpu, op, op.dst)?;
    let found = cpu.visible_descriptor(selector, |_, d| d.s() && d.ar().is_readable())?;
    cpu.flags.set_zf(found.is_some());
    Ok(())
}

fn verw(cpu: &mut Cpu, op: &Op) -> Flow {
    let selector = selector(cpu, op, op.dst)?;
    let found = cpu.visible_descriptor(selector, |_, d| d.is_writable_data())?;
    cpu.flags.set_zf(found.is_some());
    Ok(())
}

/// Raises the RPL of a selector to that of another.
fn adjusted(value: u16, source: u16) -> Option<u16> {
    (value & 3 < source & 3).then_some(value & !3 | source & 3)
}

fn arpl_r(cpu: &mut Cpu, op: &Op) -> Flow {
    if !cpu.protected() {
        return Err(Stop::UD);
    }
    let new = adjusted(cpu.regs.get(op.dst), cpu.regs.get(op.src));
    if let Some(new) = new {
        cpu.regs.put(op.dst, new);
    }
    cpu.flags.set_zf(new.is_some());
    Ok(())
}

fn arpl_m(cpu: &mut Cpu, op: &Op) -> Flow {
    if !cpu.protected() {
        return Err(Stop::UD);
    }
    let source = cpu.regs.get(op.src);
    let lin = cpu.linear(op, 2, Use::Write)?;
    let old = cpu.modify(op, lin, false, |v| adjusted(v, source).unwrap_or(v))?;
    cpu.flags.set_zf(adjusted(old, source).is_some());
    Ok(())
}

pub(super) fn select(d: &mut Decoded) -> Selected {
    let memory = |n: u32| d.i.op_kind(n) == OpKind::Memory;
    match d.i.mnemonic() {
        Mnemonic::Lar => {
            d.op.imm = memory(1).into();
            sized!(d.operand_bits, lar)
        }
        Mnemonic::Lsl => {
            d.op.imm = memory(1).into();
            sized!(d.operand_bits, lsl)
        }
        Mnemonic::Verr => {
            d.op.imm = memory(0).into();
            Some(verr)
        }
        Mnemonic::Verw => {
            d.op.imm = memory(0).into();
            Some(verw)
        }
        Mnemonic::Arpl if memory(0) => Some(arpl_m),
        Mnemonic::Arpl => Some(arpl_r),
        _ => None,
    }
}
