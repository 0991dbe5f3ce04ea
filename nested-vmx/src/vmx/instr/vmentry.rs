//! VMLAUNCH and VMRESUME: their own checks; what follows is [`crate::vmx::entry`].

use super::{Operand, completed};
use crate::cpu::op::Op;
use crate::cpu::{Cpu, Flow, shadow};
use crate::vmx::exit::reasons::{ExitReason, InstructionError};
use crate::vmx::state::NO_POINTER;

pub(super) fn vmlaunch(cpu: &mut Cpu, op: &Op) -> Flow {
    enter(cpu, op, ExitReason::Vmlaunch)
}

pub(super) fn vmresume(cpu: &mut Cpu, op: &Op) -> Flow {
    enter(cpu, op, ExitReason::Vmresume)
}

fn enter(cpu: &mut Cpu, op: &Op, instruction: ExitReason) -> Flow {
    cpu.vmx_prologue(instruction, op, Operand::None)?;
    let launch = instruction == ExitReason::Vmlaunch;
    if cpu.vmx.current_gpa == NO_POINTER {
        return completed(cpu.vm_fail_invalid());
    }
    let refused = if cpu.shadow & shadow::MOV_SS != 0 {
        Some(InstructionError::EntryMovSs)
    } else if launch && cpu.vmx.vmcs.launched {
        Some(InstructionError::VmlaunchNotClear)
    } else if !launch && !cpu.vmx.vmcs.launched {
        Some(InstructionError::VmresumeNotLaunched)
    } else {
        None
    };
    match refused {
        Some(error) => completed(cpu.vm_fail_valid(error)),
        None => completed(cpu.vm_entry(launch)),
    }
}
