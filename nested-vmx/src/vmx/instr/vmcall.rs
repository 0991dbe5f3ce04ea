//! VMCALL and VMFUNC.

use super::{Operand, completed};
use crate::cpu::op::Op;
use crate::cpu::{Cpu, Flow, Stop};
use crate::event::VmxMode;
use crate::vmx::exit::reasons::{ExitReason, InstructionError};

/// In non-root operation VMCALL exits in every mode and at every privilege level.
pub(super) fn vmcall(cpu: &mut Cpu, op: &Op) -> Flow {
    if cpu.vmx_mode == VmxMode::Off {
        return Err(Stop::UD);
    }
    cpu.intercept_always(ExitReason::Vmcall)?;
    cpu.vmx_prologue(ExitReason::Vmcall, op, Operand::None)?;
    // No dual-monitor treatment (R3).
    completed(cpu.vm_fail_valid(InstructionError::VmcallInRoot))
}

/// #UD where no VM function is enabled, and none is offered.
pub(super) fn vmfunc(_: &mut Cpu, _: &Op) -> Flow {
    Err(Stop::UD)
}
