//! The VMX instructions, one file each (SDM 3, "VMX Instruction Reference"). In non-root operation each exits, with its
//! instruction information, before it looks at anything but #UD conditions.

mod invalidate;
mod vmcall;
mod vmclear;
mod vmentry;
mod vmptrld;
mod vmptrst;
mod vmread;
mod vmwrite;
mod vmxoff;
mod vmxon;

use super::exit::reasons::{ExitReason, InstructionError};
use super::state::NO_POINTER;
use super::vmcs12::Field;
use crate::arch::cr::rflags;
use crate::cpu::op::{Handler, Op};
use crate::cpu::{Cpu, Decoded, Flow, Selected, Shape, Stop};
use crate::event::VmxMode;
use iced_x86::Mnemonic;

/// The family of the VMX instructions.
pub(crate) fn select(d: &mut Decoded) -> Selected {
    // What ends the block: anything that may unmask an event or change the mode.
    let (handler, ends): (Handler, bool) = match (d.i.mnemonic(), d.shape) {
        (Mnemonic::Vmxon, Shape::M) => (vmxon::vmxon, true),
        (Mnemonic::Vmxoff, _) => (vmxoff::vmxoff, true),
        (Mnemonic::Vmclear, Shape::M) => (vmclear::vmclear, false),
        (Mnemonic::Vmptrld, Shape::M) => (vmptrld::vmptrld, false),
        (Mnemonic::Vmptrst, Shape::M) => (vmptrst::vmptrst, false),
        (Mnemonic::Vmread, Shape::RR) => (vmread::to_register, false),
        (Mnemonic::Vmread, Shape::MR) => (vmread::to_memory, false),
        (Mnemonic::Vmwrite, Shape::RR) => (vmwrite::from_register, false),
        (Mnemonic::Vmwrite, Shape::RM) => (vmwrite::from_memory, false),
        (Mnemonic::Vmlaunch, _) => (vmentry::vmlaunch, true),
        (Mnemonic::Vmresume, _) => (vmentry::vmresume, true),
        (Mnemonic::Vmcall, _) => (vmcall::vmcall, true),
        (Mnemonic::Vmfunc, _) => (vmcall::vmfunc, true),
        (Mnemonic::Invept, Shape::RM) => (invalidate::invept, false),
        (Mnemonic::Invvpid, Shape::RM) => (invalidate::invvpid, false),
        _ => return None,
    };
    d.ends |= ends;
    Some(handler)
}

impl Cpu {
    /// Protected mode outside virtual-8086 and compatibility mode; else VMX instructions are #UD.
    fn vmx_mode_ok(&self) -> bool {
        self.cr0.pe() && !self.virtual_8086() && (!self.long_mode() || self.code64())
    }

    /// What the VMX instructions other than VMXON check first, and their VM exit.
    fn vmx_prologue(&mut self, reason: ExitReason, op: &Op, operand: Operand) -> Flow {
        if self.vmx_mode == VmxMode::Off || !self.vmx_mode_ok() {
            return Err(Stop::UD);
        }
        self.vmx_exit_or_privilege(reason, op, operand)
    }

    /// In non-root operation the exit; else #GP(0) above CPL 0.
    fn vmx_exit_or_privilege(&mut self, reason: ExitReason, op: &Op, operand: Operand) -> Flow {
        if self.in_non_root() {
            return Err(match operand {
                Operand::None => self.exit_for(reason, 0, 0),
                Operand::Memory => self.exit_for_memory(reason, op, 0),
                Operand::MemoryAndRegister(r) => self.exit_for_memory(reason, op, u32::from(r & 15) << 28),
                Operand::Registers { operand, encoding } => {
                    let information = u32::from(operand & 15) << 3 | 1 << 10 | u32::from(encoding & 15) << 28;
                    self.exit_for(reason, 0, information)
                }
            });
        }
        if self.cpl > 0 { Err(Stop::GP0) } else { Ok(()) }
    }

    /// The width of VMREAD's, VMWRITE's, INVEPT's and INVVPID's register operands.
    fn vmx_register(&self, n: u8) -> u64 {
        let value = self.regs.r(n);
        if self.code64() { value } else { value & 0xffff_ffff }
    }

    /// Whether `gpa` can be a VMXON or VMCS pointer.
    fn vmx_pointer_ok(&self, gpa: u64) -> bool {
        gpa & 0xfff == 0 && !self.vmx.caps.beyond_physical(gpa)
    }

    fn vm_succeed(&mut self) -> Flow {
        self.flags.set_status(0);
        Ok(())
    }

    fn vm_fail_invalid(&mut self) -> Flow {
        self.flags.set_status(rflags::CF);
        Ok(())
    }

    /// VMfailValid; VMfailInvalid without a current VMCS (SDM 3, "Conventions").
    pub(super) fn vm_fail_valid(&mut self, error: InstructionError) -> Flow {
        if self.vmx.current_gpa == NO_POINTER {
            return self.vm_fail_invalid();
        }
        self.vmx.set(Field::InstructionError, error.number().into());
        self.flags.set_status(rflags::ZF);
        Ok(())
    }
}

/// An instruction's operands, for its instruction information.
enum Operand {
    None,
    Memory,
    /// The register is "Reg2".
    MemoryAndRegister(u8),
    /// VMREAD and VMWRITE with registers only.
    Registers {
        operand: u8,
        encoding: u8,
    },
}

/// For instructions that end a block: complete, look for events.
fn completed(flow: Flow) -> Flow {
    flow.and(Err(Stop::COMPLETED))
}
