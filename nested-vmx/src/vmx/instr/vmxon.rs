//! VMXON.

use super::{Operand, completed};
use crate::arch::msr::feature_control;
use crate::cpu::op::Op;
use crate::cpu::{Cpu, Flow, Stop};
use crate::event::{Detail, VmxMode};
use crate::vmx::exit::reasons::{ExitReason, InstructionError};
use crate::vmx::state::NO_POINTER;
use crate::vmx::vmcs12::REVISION_ID;

pub(super) fn vmxon(cpu: &mut Cpu, op: &Op) -> Flow {
    if !cpu.vmx_mode_ok() || !cpu.cr4.vmxe() {
        return Err(Stop::UD);
    }
    if cpu.vmx_mode != VmxMode::Off {
        cpu.vmx_exit_or_privilege(ExitReason::Vmxon, op, Operand::Memory)?;
        return completed(cpu.vm_fail_valid(InstructionError::VmxonInRoot));
    }
    let enabled = feature_control::LOCK | feature_control::VMXON_OUTSIDE_SMX;
    let permitted = cpu.vmx.caps.cr0_permitted(cpu.cr0.into_bits(), false)
        && cpu.vmx.caps.cr4_permitted(cpu.cr4.into_bits())
        && cpu.msrs.feature_control & enabled == enabled;
    if cpu.cpl > 0 || !permitted {
        return Err(Stop::GP0);
    }
    let region_gpa: u64 = cpu.load_operand(op)?;
    if !cpu.vmx_pointer_ok(region_gpa) || cpu.load_physical::<u32>(region_gpa) != REVISION_ID {
        return completed(cpu.vm_fail_invalid());
    }
    cpu.vmx.vmxon_gpa = region_gpa;
    cpu.vmx.current_gpa = NO_POINTER;
    // R10: from here on INIT is blocked.
    cpu.vmx_mode = VmxMode::Root;
    cpu.report(0, Detail::VmxOn { region_gpa });
    completed(cpu.vm_succeed())
}
