//! VMPTRLD.

use super::Operand;
use crate::cpu::op::Op;
use crate::cpu::{Cpu, Flow};
use crate::vmx::exit::reasons::{ExitReason, InstructionError};
use crate::vmx::vmcs12::{REGION_BYTES, REVISION_ID, SHADOW_INDICATOR, Vmcs12};

pub(super) fn vmptrld(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.vmx_prologue(ExitReason::Vmptrld, op, Operand::Memory)?;
    let gpa: u64 = cpu.load_operand(op)?;
    if !cpu.vmx_pointer_ok(gpa) {
        return cpu.vm_fail_valid(InstructionError::VmptrldAddress);
    }
    if gpa == cpu.vmx.vmxon_gpa {
        return cpu.vm_fail_valid(InstructionError::VmptrldVmxonPointer);
    }
    let mut region = Box::new([0xff; REGION_BYTES]);
    // Nothing there reads all ones, which is no revision.
    let _ = cpu.ram.read(gpa, &mut region[..]);
    let header = u32::from_le_bytes([region[0], region[1], region[2], region[3]]);
    let shadow = header & SHADOW_INDICATOR != 0;
    if header & !SHADOW_INDICATOR != REVISION_ID || shadow && !cpu.vmx.caps.offer.proc2.vmcs_shadowing() {
        return cpu.vm_fail_valid(InstructionError::VmptrldRevision);
    }
    if gpa != cpu.vmx.current_gpa {
        cpu.write_back_vmcs();
        *cpu.vmx.vmcs = Vmcs12::load(&region);
        cpu.vmx.current_gpa = gpa;
    }
    cpu.vm_succeed()
}
