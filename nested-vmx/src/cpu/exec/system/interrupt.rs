//! INT n, INT1, INT3, INTO, HLT.

use crate::arch::exception;
use crate::arch::vmx::EventType;
use crate::cpu::decode::{Decoded, Selected};
use crate::cpu::deliver::Vectored;
use crate::cpu::op::Op;
use crate::cpu::{Cpu, Flow, Stop};
use crate::event::ActivityState;
use iced_x86::Mnemonic;

/// `imm` is the vector. INT n alone is sensitive to IOPL in virtual-8086 mode.
fn int_n(cpu: &mut Cpu, op: &Op) -> Flow {
    if cpu.virtual_8086() && cpu.iopl() < 3 {
        return Err(Stop::GP0);
    }
    cpu.rewind(op);
    let vector = op.imm as u8;
    cpu.deliver_event(Vectored { kind: EventType::SoftwareInterrupt, vector, error: None, length: op.len });
    Err(Stop::DELIVERED)
}

fn software(cpu: &mut Cpu, op: &Op, kind: EventType, vector: u8) -> Flow {
    cpu.rewind(op);
    cpu.raise(Vectored { kind, vector, error: None, length: op.len });
    Err(Stop::DELIVERED)
}

fn int1(cpu: &mut Cpu, op: &Op) -> Flow {
    software(cpu, op, EventType::PrivilegedSoftwareException, exception::DB)
}

fn int3(cpu: &mut Cpu, op: &Op) -> Flow {
    software(cpu, op, EventType::SoftwareException, exception::BP)
}

fn into(cpu: &mut Cpu, op: &Op) -> Flow {
    if !cpu.flags.of() {
        cpu.advance(op);
        return Ok(());
    }
    software(cpu, op, EventType::SoftwareException, exception::OF)
}

fn hlt(cpu: &mut Cpu, _: &Op) -> Flow {
    cpu.require_cpl0()?;
    cpu.intercept_hlt()?;
    cpu.set_activity(ActivityState::Hlt);
    Err(Stop::COMPLETED)
}

pub(super) fn select(d: &mut Decoded) -> Selected {
    d.ends = true;
    let handler: crate::cpu::op::Handler = match d.i.mnemonic() {
        Mnemonic::Int => int_n,
        Mnemonic::Int1 => int1,
        Mnemonic::Int3 => int3,
        Mnemonic::Into => into,
        Mnemonic::Hlt => hlt,
        _ => {
            d.ends = false;
            return None;
        }
    };
    Some(handler)
}
