//! Exceptions and task switches (SDM 3, "Exceptions", "Task Switches").

use crate::arch::exception;
use crate::cpu::{Cpu, Flow, Vectored};
use crate::vmx::exit::reasons::ExitReason;
use crate::vmx::exit::{ExitInfo, interruption_info};
use crate::vmx::vmcs12::Field;

/// What asks for a task switch; the numbers are those of the exit qualification.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TaskSwitchSource {
    Call = 0,
    Iret = 1,
    Jump = 2,
    IdtGate = 3,
}

impl Cpu {
    /// In non-root operation: makes the VM exit that the exception bitmap asks for, and says so. `qualification` is what
    /// the exit would report: the address of #PF, the DR6 bits of #DB.
    pub(crate) fn intercept_exception(&mut self, event: &Vectored, qualification: u64) -> bool {
        if !self.in_non_root() || !self.exception_exits(event.vector, event.error) {
            return false;
        }
        // Real mode has no error codes.
        let event = Vectored { error: event.error.filter(|_| self.cr0.pe()), ..*event };
        self.exit = ExitInfo {
            reason: ExitReason::ExceptionOrNmi.number(),
            qualification,
            instruction_length: event.length.into(),
            interruption: interruption_info(&event).into_bits(),
            interruption_error_code: event.error.unwrap_or(0),
            ..ExitInfo::default()
        };
        self.vm_exit();
        true
    }

    fn exception_exits(&self, vector: u8, error: Option<u32>) -> bool {
        let bit = self.vmx.get(Field::ExceptionBitmap) >> (vector & 31) & 1 != 0;
        if vector != exception::PF {
            return bit;
        }
        // SDM 3, "Exception Bitmap": the match inverts the bit's meaning.
        let matches =
            u64::from(error.unwrap_or(0)) & self.vmx.get(Field::PageFaultMask) == self.vmx.get(Field::PageFaultMatch);
        bit == matches
    }

    /// In non-root operation: VM exit 2, instead of the shutdown state.
    pub(crate) fn exit_triple_fault(&mut self) {
        self.exit = ExitInfo { reason: ExitReason::TripleFault.number(), ..ExitInfo::default() };
        self.vm_exit();
    }

    /// Task switches always exit in non-root operation.
    pub(crate) fn intercept_task_switch(&mut self, selector: u16, source: TaskSwitchSource) -> Flow {
        if !self.in_non_root() {
            return Ok(());
        }
        Err(self.exit_for(ExitReason::TaskSwitch, u64::from(selector) | (source as u64) << 30, 0))
    }
}
