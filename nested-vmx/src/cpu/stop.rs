//! Why the running block stops before its end.

use super::op::Op;
use super::seg::reg;
use crate::arch::exception as vector;
use std::num::NonZeroU64;

/// One machine word, so that `Result<(), Stop>` and `Result<u64, Stop>` travel in registers. Bits 0..8 the kind, 8..16
/// the vector, bit 16 "has an error code", 32..64 the error code.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Stop(NonZeroU64);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopKind {
    /// A fault: state is that of the instruction's start. For #PF, [`crate::cpu::Cpu::fault_address`] is set.
    Exception { vector: u8, error: Option<u32> },
    /// The instruction is complete and may have unmasked or requested something: look up before the next one.
    Completed,
    /// Complete, and the handler has set RIP (and perhaps everything else).
    Jumped,
    /// Complete by delivering an event (INT n, SYSCALL): as Jumped, but what single-stepping saw before is void.
    Delivered,
    /// Begin the same instruction again after looking up (REP between iterations).
    Again,
    /// The instruction causes the VM exit described in `Cpu::vmx`; state is that of its start.
    VmExit,
}

const EXCEPTION: u64 = 1;
const COMPLETED: u64 = 2;
const JUMPED: u64 = 3;
const AGAIN: u64 = 4;
const VM_EXIT: u64 = 5;
const DELIVERED: u64 = 6;
const HAS_ERROR: u64 = 1 << 16;

impl Stop {
    pub const COMPLETED: Self = Self::new(COMPLETED);
    pub const JUMPED: Self = Self::new(JUMPED);
    pub const DELIVERED: Self = Self::new(DELIVERED);
    pub const AGAIN: Self = Self::new(AGAIN);
    pub const VM_EXIT: Self = Self::new(VM_EXIT);
    pub const DE: Self = Self::fault(vector::DE);
    pub const UD: Self = Self::fault(vector::UD);
    pub const NM: Self = Self::fault(vector::NM);
    pub const MF: Self = Self::fault(vector::MF);
    pub const XM: Self = Self::fault(vector::XM);
    pub const GP0: Self = Self::error(vector::GP, 0);
    pub const SS0: Self = Self::error(vector::SS, 0);

    const fn new(v: u64) -> Self {
        match NonZeroU64::new(v) {
            Some(v) => Self(v),
            None => unreachable!(),
        }
    }

    /// A fault without error code.
    pub const fn fault(vector: u8) -> Self {
        Self::new(EXCEPTION | (vector as u64) << 8)
    }

    pub const fn error(vector: u8, code: u32) -> Self {
        Self::new(EXCEPTION | (vector as u64) << 8 | HAS_ERROR | (code as u64) << 32)
    }

    pub const fn gp(code: u32) -> Self {
        Self::error(vector::GP, code)
    }

    pub const fn ts(code: u32) -> Self {
        Self::error(vector::TS, code)
    }

    pub const fn np(code: u32) -> Self {
        Self::error(vector::NP, code)
    }

    pub const fn ss(code: u32) -> Self {
        Self::error(vector::SS, code)
    }

    /// A non-canonical address is #SS(0) instead of #GP(0) when the stack segment is used.
    pub fn on_stack(self) -> Self {
        if self == Self::GP0 { Self::SS0 } else { self }
    }

    /// The fault of an access to `op`'s memory operand.
    pub fn of_operand(self, op: &Op) -> Self {
        if op.seg == reg::SS { self.on_stack() } else { self }
    }

    pub fn kind(self) -> StopKind {
        let v = self.0.get();
        match v & 0xff {
            EXCEPTION => {
                StopKind::Exception { vector: (v >> 8) as u8, error: (v & HAS_ERROR != 0).then_some((v >> 32) as u32) }
            }
            COMPLETED => StopKind::Completed,
            JUMPED => StopKind::Jumped,
            DELIVERED => StopKind::Delivered,
            AGAIN => StopKind::Again,
            _ => StopKind::VmExit,
        }
    }
}

impl std::fmt::Debug for Stop {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.kind().fmt(f)
    }
}

/// What an instruction's handler returns: the next one may run, or why not.
pub type Flow = Result<(), Stop>;
