//! What L1 wants to be told of. Instruction handlers call these functions where the SDM puts the VM exit (3, "Relative
//! Priority of Faults and VM Exits": after #UD and the CPL check, before most others) and pass `Err(Stop::VM_EXIT)` on
//! with `?`. Outside non-root operation each costs one test.
//!
//! | what | function |
//! |---|---|
//! | CPUID, INVD, GETSEC, XSETBV | [`Cpu::intercept_always`] |
//! | HLT, INVLPG, RDTSC, RDTSCP, RDPMC, PAUSE, WBINVD, RDRAND, RDSEED, INVPCID | [`instructions`] |
//! | SGDT, SIDT, LGDT, LIDT, SLDT, STR, LLDT, LTR | [`instructions`] |
//! | RDTSCP, INVPCID without their enabling control | the same: #UD |
//! | MOV CR, CLTS, LMSW, SMSW, MOV DR | [`registers`] |
//! | RDMSR, WRMSR, IN, OUT, INS, OUTS | [`bitmaps`] |
//! | exceptions, task switches | [`events`] |

mod bitmaps;
mod events;
mod instructions;
mod registers;

pub(crate) use bitmaps::IoAccess;
pub(crate) use events::TaskSwitchSource;
pub(crate) use instructions::{DescriptorTable, SystemSegment, memory_information};

use super::exit::ExitInfo;
use super::exit::reasons::ExitReason;
use crate::cpu::{Cpu, Flow, Stop};

impl Cpu {
    /// The VM exit that the running instruction causes; its length is filled in later.
    pub(crate) fn exit_for(&mut self, reason: ExitReason, qualification: u64, instruction_information: u32) -> Stop {
        self.exit = ExitInfo { reason: reason.number(), qualification, instruction_information, ..ExitInfo::default() };
        Stop::VM_EXIT
    }

    /// Instructions that always exit in non-root operation.
    #[inline(always)]
    pub(crate) fn intercept_always(&mut self, reason: ExitReason) -> Flow {
        if self.in_non_root() { Err(self.exit_for(reason, 0, 0)) } else { Ok(()) }
    }

    #[inline(always)]
    fn intercept_if(&mut self, wanted: bool, reason: ExitReason) -> Flow {
        if self.in_non_root() && wanted { Err(self.exit_for(reason, 0, 0)) } else { Ok(()) }
    }

    /// #UD in non-root operation unless L1 enabled the instruction.
    #[inline(always)]
    fn require(&self, enabled: bool) -> Flow {
        if self.in_non_root() && !enabled { Err(Stop::UD) } else { Ok(()) }
    }
}
