//! VMCLEAR.

use super::Operand;
use crate::cpu::op::Op;
use crate::cpu::{Cpu, Flow};
use crate::vmx::exit::reasons::{ExitReason, InstructionError};
use crate::vmx::state::NO_POINTER;
use crate::vmx::vmcs12::LAUNCH_STATE_OFFSET;

pub(super) fn vmclear(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.vmx_prologue(ExitReason::Vmclear, op, Operand::Memory)?;
    let gpa: u64 = cpu.load_operand(op)?;
    if !cpu.vmx_pointer_ok(gpa) {
        return cpu.vm_fail_valid(InstructionError::VmclearAddress);
    }
    if gpa == cpu.vmx.vmxon_gpa {
        return cpu.vm_fail_valid(InstructionError::VmclearVmxonPointer);
    }
    if gpa == cpu.vmx.current_gpa {
        cpu.vmx.vmcs.launched = false;
        cpu.write_back_vmcs();
        cpu.vmx.current_gpa = NO_POINTER;
    } else {
        cpu.store_physical(gpa + LAUNCH_STATE_OFFSET, 0u32);
    }
    cpu.vm_succeed()
}

impl Cpu {
    /// Writes the current VMCS to its region.
    pub(super) fn write_back_vmcs(&mut self) {
        let gpa = self.vmx.current_gpa;
        if gpa == NO_POINTER {
            return;
        }
        let mut region = Box::new([0; crate::vmx::vmcs12::REGION_BYTES]);
        // A region outside RAM holds nothing: what is written there is lost, as on a bus without a device.
        if self.ram.read(gpa, &mut region[..]).is_ok() {
            self.vmx.vmcs.store(&mut region);
            let _ = self.ram.write(gpa, &region[..]);
        }
    }
}
