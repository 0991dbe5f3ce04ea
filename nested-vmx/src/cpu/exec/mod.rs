//! The instructions, one file per family.
//!
//! A family has a `select(&mut Decoded) -> Selected`, called when code is decoded; None means "not mine", and an
//! instruction that no family knows raises #UD. A handler
//! - returns `Ok(())` when it is complete; RIP is not its business, except for instructions that iced-x86 gives a flow
//!   control other than `Next`: those always set RIP (`Cpu::advance` to fall through);
//! - changes no state before its last possible fault;
//! - returns `Err(Stop::COMPLETED)` (or sets `stop_after`) when events or decoding may have changed.

mod alu;
mod branch;
mod mov;
mod stack;

use super::decode::{Decoded, Selected};

pub(super) fn select(d: &mut Decoded) -> Selected {
    alu::select(d)
        .or_else(|| mov::select(d))
        .or_else(|| branch::select(d))
        .or_else(|| stack::select(d))
        .or_else(|| crate::vmx::select(d))
}
