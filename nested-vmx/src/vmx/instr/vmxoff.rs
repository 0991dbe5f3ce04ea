//! VMXOFF.

use super::{Operand, completed};
use crate::cpu::op::Op;
use crate::cpu::{Cpu, Flow};
use crate::event::{Detail, VmxMode};
use crate::vmx::exit::reasons::ExitReason;
use crate::vmx::state::NO_POINTER;

pub(super) fn vmxoff(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.vmx_prologue(ExitReason::Vmxoff, op, Operand::None)?;
    cpu.write_back_vmcs();
    cpu.vmx.current_gpa = NO_POINTER;
    cpu.vmx.vmxon_gpa = NO_POINTER;
    // R10: a latched INIT takes effect at the boundary behind this instruction.
    cpu.vmx_mode = VmxMode::Off;
    cpu.report(0, Detail::VmxOff);
    completed(cpu.vm_succeed())
}
