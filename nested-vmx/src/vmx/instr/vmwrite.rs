//! VMWRITE: operand 0 is the register with the field's encoding, operand 1 the value.

use super::Operand;
use crate::cpu::op::Op;
use crate::cpu::{Cpu, Flow};
use crate::vmx::exit::reasons::{ExitReason, InstructionError};
use crate::vmx::state::NO_POINTER;
use crate::vmx::vmcs12::{Field, Role};

fn write(cpu: &mut Cpu, encoding: u64, value: u64) -> Flow {
    let Some((field, part)) = Field::lookup_offered(encoding, &cpu.vmx.caps.offer) else {
        return cpu.vm_fail_valid(InstructionError::UnsupportedField);
    };
    if field.role() == Role::ExitInfo && !cpu.vmx.caps.offer.misc.vmwrite_exit_info() {
        return cpu.vm_fail_valid(InstructionError::ReadOnlyField);
    }
    cpu.vmx.vmcs.write_part(field, part, value);
    cpu.vm_succeed()
}

pub(super) fn from_register(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.vmx_prologue(ExitReason::Vmwrite, op, Operand::Registers { operand: op.src, encoding: op.dst })?;
    if cpu.vmx.current_gpa == NO_POINTER {
        return cpu.vm_fail_invalid();
    }
    write(cpu, cpu.vmx_register(op.dst), cpu.vmx_register(op.src))
}

pub(super) fn from_memory(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.vmx_prologue(ExitReason::Vmwrite, op, Operand::MemoryAndRegister(op.dst))?;
    if cpu.vmx.current_gpa == NO_POINTER {
        return cpu.vm_fail_invalid();
    }
    let value = if cpu.code64() { cpu.load_operand::<u64>(op)? } else { cpu.load_operand::<u32>(op)?.into() };
    write(cpu, cpu.vmx_register(op.dst), value)
}
