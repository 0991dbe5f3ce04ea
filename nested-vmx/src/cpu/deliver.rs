//! Exceptions and interrupts on their way to their handlers.

use super::Cpu;
use crate::arch::exception as vector;
use crate::arch::vmx::EventType;
use crate::event::ActivityState;

/// An event on its way through the IDT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Vectored {
    pub kind: EventType,
    pub vector: u8,
    pub error: Option<u32>,
    /// Of INT n, INT1, INT3 and INTO: how far behind RIP their handlers return.
    pub length: u8,
}

impl Vectored {
    pub const fn external(vector: u8) -> Self {
        Self { kind: EventType::External, vector, error: None, length: 0 }
    }

    pub const NMI: Self = Self { kind: EventType::Nmi, vector: vector::NMI, error: None, length: 0 };
}

impl Cpu {
    /// Raises an exception at RIP (SDM 3, "Interrupt and Exception Handling").
    pub(crate) fn raise_exception(&mut self, _vector: u8, _error: Option<u32>, _length: u8) {
        self.activity = ActivityState::Shutdown;
    }

    /// Delivers an event through the IDT, and the faults that its delivery raises, which a hypervisor may intercept.
    /// Also what a VM entry with event injection does. `delivering` tells VM exits on the way what was being delivered.
    pub(crate) fn deliver_event(&mut self, event: Vectored) {
        self.delivering = Some(event);
        self.activity = ActivityState::Shutdown;
        self.delivering = None;
    }
}
