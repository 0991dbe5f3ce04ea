//! Exceptions and interrupts on their way to their handlers.

use super::Cpu;
use super::run::Boundary;
use crate::event::ActivityState;
use crate::mailbox::attention;

impl Cpu {
    /// Raises an exception at RIP (SDM 3, "Interrupt and Exception Handling").
    pub(crate) fn raise_exception(&mut self, _vector: u8, _error: Option<u32>, _length: u8) {
        self.activity = ActivityState::Shutdown;
    }

    /// Completes the VM exit that an instruction causes, described in `self.exit`.
    pub(crate) fn vm_exit_of_instruction(&mut self, length: u8) {
        self.exit.instruction_length = length.into();
    }

    /// What the boundary before the next instruction says (R19).
    pub(crate) fn check_events(&mut self) -> Boundary {
        self.mailbox.answer(attention::EVENTS | attention::INTERRUPTS);
        if self.activity == ActivityState::Active { Boundary::Run } else { Boundary::Idle }
    }

    /// When a timer of this processor is due.
    pub(crate) fn next_deadline(&mut self) -> Option<u64> {
        self.apic_deadline()
    }
}
