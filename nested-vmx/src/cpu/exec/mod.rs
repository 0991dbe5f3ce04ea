//! The instructions, one file per family.
//!
//! A family has a `select(&mut Decoded) -> Selected`, called when code is decoded; None means "not mine", and an
//! instruction that no family knows raises #UD. A handler
//! - returns `Ok(())` when it is complete; RIP is not its business, except for instructions that iced-x86 gives a flow
//!   control other than `Next`: those always set RIP (`Cpu::advance` to fall through);
//! - changes no state before its last possible fault;
//! - returns `Err(Stop::COMPLETED)` (or sets `stop_after`) when events or decoding may have changed.

mod alu;
mod bcd;
mod bits;
mod bmi;
mod branch;
mod exchange;
mod misc;
mod mov;
mod muldiv;
mod random;
mod shift;
mod stack;
mod string;
mod system;
#[cfg(test)]
mod table_tests;

use super::decode::{Decoded, Selected};

pub(super) fn select(d: &mut Decoded) -> Selected {
    const FAMILIES: &[fn(&mut Decoded) -> Selected] = &[
        mov::select,
        alu::select,
        branch::select,
        stack::select,
        shift::select,
        bits::select,
        muldiv::select,
        string::select,
        exchange::select,
        misc::select,
        bmi::select,
        bcd::select,
        random::select,
        system::select,
        crate::vmx::select,
        super::fp::select,
    ];
    FAMILIES.iter().find_map(|select| select(d))
}
