//! INVEPT and INVVPID: operand 0 is the register with the type, operand 1 the descriptor.

use super::Operand;
use crate::arch::is_canonical;
use crate::cpu::op::Op;
use crate::cpu::{Cpu, Flow, Stop};
use crate::vmx::entry::eptp_valid;
use crate::vmx::exit::reasons::{ExitReason, InstructionError};
use crate::vmx::translations::ept_root;

/// The two halves of the descriptor.
fn descriptor(cpu: &mut Cpu, op: &Op) -> Result<(u64, u64), Stop> {
    let both: u128 = cpu.load_operand(op)?;
    Ok((both as u64, (both >> 64) as u64))
}

pub(super) fn invept(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.vmx_prologue(ExitReason::Invept, op, Operand::MemoryAndRegister(op.dst))?;
    let offered = cpu.vmx.caps.offer.ept_vpid;
    let kind = cpu.vmx_register(op.dst);
    let (eptp, _) = descriptor(cpu, op)?;
    match kind {
        1 if offered.invept_single() && eptp_valid(cpu.vmx.caps, eptp) => {
            let root = ept_root(eptp);
            cpu.tlb.flush_contexts(true, |k| k.eptp == root);
        }
        2 if offered.invept_all() => cpu.tlb.flush_contexts(true, |k| k.eptp != 0),
        _ => return cpu.vm_fail_valid(InstructionError::InveptInvvpidOperand),
    }
    cpu.vm_succeed()
}

pub(super) fn invvpid(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.vmx_prologue(ExitReason::Invvpid, op, Operand::MemoryAndRegister(op.dst))?;
    let offered = cpu.vmx.caps.offer.ept_vpid;
    let kind = cpu.vmx_register(op.dst);
    let (low, lin) = descriptor(cpu, op)?;
    let vpid = low as u16;
    let named = vpid != 0;
    if low >> 16 != 0 {
        return cpu.vm_fail_valid(InstructionError::InveptInvvpidOperand);
    }
    match kind {
        // One address: the pages of all VPIDs at that address go, which is allowed.
        0 if offered.invvpid_address() && named && is_canonical(lin) => cpu.tlb.flush_page(lin),
        1 if offered.invvpid_single() && named => cpu.tlb.flush_contexts(true, |k| k.vpid == vpid),
        2 if offered.invvpid_all() => cpu.tlb.flush_contexts(true, |k| k.vpid != 0),
        3 if offered.invvpid_single_globals() && named => cpu.tlb.flush_contexts(false, |k| k.vpid == vpid),
        _ => return cpu.vm_fail_valid(InstructionError::InveptInvvpidOperand),
    }
    cpu.vm_succeed()
}
