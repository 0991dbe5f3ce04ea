//! VMREAD: operand 0 receives, operand 1 is the register with the field's encoding.

use super::Operand;
use crate::cpu::op::Op;
use crate::cpu::{Cpu, Flow};
use crate::vmx::exit::reasons::{ExitReason, InstructionError};
use crate::vmx::state::NO_POINTER;
use crate::vmx::vmcs12::Field;

/// The field's value; `None` after VMfail.
fn read(cpu: &mut Cpu, encoding: u64) -> Option<u64> {
    if cpu.vmx.current_gpa == NO_POINTER {
        let _ = cpu.vm_fail_invalid();
        return None;
    }
    let Some((field, part)) = Field::lookup_offered(encoding, &cpu.vmx.caps.offer) else {
        let _ = cpu.vm_fail_valid(InstructionError::UnsupportedField);
        return None;
    };
    Some(cpu.vmx.vmcs.read_part(field, part))
}

pub(super) fn to_register(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.vmx_prologue(ExitReason::Vmread, op, Operand::Registers { operand: op.dst, encoding: op.src })?;
    let encoding = cpu.vmx_register(op.src);
    let Some(value) = read(cpu, encoding) else { return Ok(()) };
    if cpu.code64() {
        cpu.regs.put::<u64>(op.dst, value);
    } else {
        cpu.regs.put::<u32>(op.dst, value as u32);
    }
    cpu.vm_succeed()
}

pub(super) fn to_memory(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.vmx_prologue(ExitReason::Vmread, op, Operand::MemoryAndRegister(op.src))?;
    let encoding = cpu.vmx_register(op.src);
    let Some(value) = read(cpu, encoding) else { return Ok(()) };
    if cpu.code64() {
        cpu.store_operand::<u64>(op, value)?;
    } else {
        cpu.store_operand::<u32>(op, value as u32)?;
    }
    cpu.vm_succeed()
}
