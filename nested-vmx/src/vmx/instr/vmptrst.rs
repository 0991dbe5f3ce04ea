//! VMPTRST.

use super::Operand;
use crate::cpu::op::Op;
use crate::cpu::{Cpu, Flow};
use crate::vmx::exit::reasons::ExitReason;

pub(super) fn vmptrst(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.vmx_prologue(ExitReason::Vmptrst, op, Operand::Memory)?;
    cpu.store_operand(op, cpu.vmx.current_gpa)?;
    cpu.vm_succeed()
}
