//! Instructions that exit when a control says so (SDM 3, "Instructions That Cause VM Exits Conditionally").

use crate::cpu::op::{Op, op_flags};
use crate::cpu::{Cpu, Flow, slot};
use crate::vmx::exit::reasons::ExitReason;

/// Which of the GDTR and IDTR instructions runs; the numbers are those of the instruction information.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DescriptorTable {
    Sgdt = 0,
    Sidt = 1,
    Lgdt = 2,
    Lidt = 3,
}

/// Which of the LDTR and TR instructions runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SystemSegment {
    Sldt = 0,
    Str = 1,
    Lldt = 2,
    Ltr = 3,
}

/// In the instruction information: the operand is a register.
const REGISTER_OPERAND: u32 = 1 << 10;
const NO_INDEX: u32 = 1 << 22;
const NO_BASE: u32 = 1 << 27;

/// 0, 1, 2 for 16, 32, 64 bits.
fn address_size(op: &Op) -> u32 {
    2 - u32::from((op.flags & op_flags::ADDRESS_MASK) >> op_flags::ADDRESS_SHIFT).min(2)
}

/// The memory operand's part of the instruction information (SDM 3, "Format of the VM-Exit Instruction-Information
/// Field").
pub(crate) fn memory_information(op: &Op) -> u32 {
    let mut information = address_size(op) << 7 | u32::from(op.seg & 7) << 15;
    if op.index < slot::ZERO {
        information |= u32::from(op.scale & 3) | u32::from(op.index) << 18;
    } else {
        information |= NO_INDEX;
    }
    if op.base < slot::ZERO { information | u32::from(op.base) << 23 } else { information | NO_BASE }
}

impl Cpu {
    /// The exit qualification of an instruction with a memory operand: its displacement; with RIP-relative addressing,
    /// the address.
    pub(crate) fn displacement_qualification(&self, op: &Op) -> u64 {
        let displacement = i64::from(op.disp) as u64;
        if op.base == slot::RIP {
            let page = if op.index == slot::PAGE { self.regs.r(slot::PAGE) } else { 0 };
            return self.regs.rip().wrapping_add(displacement).wrapping_add(page) & op.address_mask();
        }
        displacement
    }

    pub(crate) fn intercept_hlt(&mut self) -> Flow {
        self.intercept_if(self.vmx.controls.proc.hlt_exiting(), ExitReason::Hlt)
    }

    pub(crate) fn intercept_invlpg(&mut self, lin: u64) -> Flow {
        if self.in_non_root() && self.vmx.controls.proc.invlpg_exiting() {
            return Err(self.exit_for(ExitReason::Invlpg, lin, 0));
        }
        Ok(())
    }

    pub(crate) fn intercept_rdtsc(&mut self) -> Flow {
        self.intercept_if(self.vmx.controls.proc.rdtsc_exiting(), ExitReason::Rdtsc)
    }

    pub(crate) fn intercept_rdtscp(&mut self) -> Flow {
        self.require(self.vmx.controls.proc2.enable_rdtscp())?;
        self.intercept_if(self.vmx.controls.proc.rdtsc_exiting(), ExitReason::Rdtscp)
    }

    /// What RDTSC, RDTSCP and RDMSR of the TSC add to what they would read outside non-root operation.
    #[inline(always)]
    pub(crate) fn tsc_offset(&self) -> u64 {
        if self.in_non_root() && self.vmx.controls.proc.use_tsc_offsetting() {
            self.vmx.get(crate::vmx::vmcs12::Field::TscOffset)
        } else {
            0
        }
    }

    pub(crate) fn intercept_rdpmc(&mut self) -> Flow {
        self.intercept_if(self.vmx.controls.proc.rdpmc_exiting(), ExitReason::Rdpmc)
    }

    pub(crate) fn intercept_pause(&mut self) -> Flow {
        self.intercept_if(self.vmx.controls.proc.pause_exiting(), ExitReason::Pause)
    }

    /// Unconditional; #UD without CR4.OSXSAVE and #GP by CPL come first (SDM 3, "Relative Priority of Faults and VM
    /// Exits").
    pub(crate) fn intercept_xsetbv(&mut self) -> Flow {
        self.intercept_if(true, ExitReason::Xsetbv)
    }

    /// WBINVD and WBNOINVD.
    pub(crate) fn intercept_wbinvd(&mut self) -> Flow {
        self.intercept_if(self.vmx.controls.proc2.wbinvd_exiting(), ExitReason::Wbinvd)
    }

    /// `op.dst` is the destination.
    pub(crate) fn intercept_rdrand(&mut self, op: &Op) -> Flow {
        self.intercept_random(op, self.vmx.controls.proc2.rdrand_exiting(), ExitReason::Rdrand)
    }

    pub(crate) fn intercept_rdseed(&mut self, op: &Op) -> Flow {
        self.intercept_random(op, self.vmx.controls.proc2.rdseed_exiting(), ExitReason::Rdseed)
    }

    fn intercept_random(&mut self, op: &Op, wanted: bool, reason: ExitReason) -> Flow {
        if !self.in_non_root() || !wanted {
            return Ok(());
        }
        let size = op.operand_bits().trailing_zeros() - 4;
        Err(self.exit_for(reason, 0, u32::from(op.dst & 15) << 3 | size << 11))
    }

    /// `op.dst` is the register operand, the other is in memory.
    pub(crate) fn intercept_invpcid(&mut self, op: &Op) -> Flow {
        self.require(self.vmx.controls.proc2.enable_invpcid())?;
        if !self.in_non_root() || !self.vmx.controls.proc.invlpg_exiting() {
            return Ok(());
        }
        Err(self.exit_for_memory(ExitReason::Invpcid, op, u32::from(op.dst & 15) << 28))
    }

    /// An exit of an instruction with a memory operand; `more` are the other bits of the instruction information.
    pub(crate) fn exit_for_memory(&mut self, reason: ExitReason, op: &Op, more: u32) -> crate::cpu::Stop {
        let qualification = self.displacement_qualification(op);
        self.exit_for(reason, qualification, memory_information(op) | more)
    }

    /// SGDT, SIDT, LGDT, LIDT.
    pub(crate) fn intercept_descriptor_table(&mut self, op: &Op, which: DescriptorTable) -> Flow {
        if !self.in_non_root() || !self.vmx.controls.proc2.descriptor_table_exiting() {
            return Ok(());
        }
        let operand_32 = u32::from(op.operand_bits() != 16) << 11;
        Err(self.exit_for_memory(ExitReason::GdtrIdtr, op, operand_32 | (which as u32) << 28))
    }

    /// SLDT, STR, LLDT, LTR; `register`: the operand is a register, `op.dst`.
    pub(crate) fn intercept_system_segment(&mut self, op: &Op, which: SystemSegment, register: bool) -> Flow {
        if !self.in_non_root() || !self.vmx.controls.proc2.descriptor_table_exiting() {
            return Ok(());
        }
        let identity = (which as u32) << 28;
        Err(if register {
            let information = u32::from(op.dst & 15) << 3 | REGISTER_OPERAND | identity;
            self.exit_for(ExitReason::LdtrTr, 0, information)
        } else {
            self.exit_for_memory(ExitReason::LdtrTr, op, identity)
        })
    }
}
