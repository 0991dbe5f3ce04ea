//! Exceptions and task switches (SDM 3, "Exceptions", "Task Switches").

use crate::arch::cr::dr;
use crate::arch::exception;
use crate::arch::vmx::{EventType, InterruptionInfo};
use crate::cpu::{Cpu, Flow};
use crate::vmx::exit::ExitInfo;
use crate::vmx::exit::reasons::ExitReason;
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
    /// Before an exception is delivered: makes the VM exit if the exception bitmap asks for one, and says so. `length`
    /// is the instruction's, of INT3, INTO and INT1. For #PF the address is in `fault_address`, for #DB the hits are in
    /// `pending_debug`.
    pub(crate) fn intercept_exception(
        &mut self,
        vector: u8,
        error: Option<u32>,
        event: EventType,
        length: u32,
    ) -> bool {
        if !self.in_non_root() || !self.exception_exits(vector, error) {
            return false;
        }
        let info = InterruptionInfo::new()
            .with_valid(true)
            .with_vector(vector)
            .with_event_type(event)
            .with_error_code(error.is_some());
        let qualification = match vector {
            exception::PF => self.fault_address,
            exception::DB => self.pending_debug & (0xf | dr::DR6_BD | dr::DR6_BS),
            _ => 0,
        };
        self.exit = ExitInfo {
            reason: ExitReason::ExceptionOrNmi.number(),
            qualification,
            instruction_length: length,
            interruption: info.into_bits(),
            interruption_error_code: error.unwrap_or(0),
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
        let matches = u64::from(error.unwrap_or(0)) & self.vmx.get(Field::PageFaultMask)
            == self.vmx.get(Field::PageFaultMatch);
        bit == matches
    }

    /// A third exception while a double fault is delivered: exit 2 in non-root operation, and true; else false, and
    /// the caller enters the shutdown state.
    pub(crate) fn intercept_triple_fault(&mut self) -> bool {
        if !self.in_non_root() {
            return false;
        }
        self.exit = ExitInfo { reason: ExitReason::TripleFault.number(), ..ExitInfo::default() };
        self.vm_exit();
        true
    }

    /// Task switches always exit in non-root operation.
    pub(crate) fn intercept_task_switch(&mut self, selector: u16, source: TaskSwitchSource) -> Flow {
        if !self.in_non_root() {
            return Ok(());
        }
        Err(self.exit_for(ExitReason::TaskSwitch, u64::from(selector) | (source as u64) << 30, 0))
    }
}
