//! System instructions: segments, far transfers, interrupts, control registers, tables, ports.

/// The handler for a width of 16, 32 or 64.
macro_rules! sized {
    ($bits:expr, $f:ident) => {
        Some(match $bits {
            16 => $f::<u16> as $crate::cpu::op::Handler,
            32 => $f::<u32>,
            _ => $f::<u64>,
        })
    };
}

mod control;
mod far;
mod flags;
#[cfg(test)]
mod fuzz_tests;
mod gate;
mod interrupt;
mod io;
mod iret;
mod model;
mod paging;
mod segment;
mod syscall;
mod tables;
#[cfg(test)]
mod tests;
mod verify;

use crate::cpu::decode::{Decoded, Selected};
use crate::cpu::{Cpu, Flow, Stop};

pub(in crate::cpu) fn select(d: &mut Decoded) -> Selected {
    segment::select(d)
        .or_else(|| far::select(d))
        .or_else(|| iret::select(d))
        .or_else(|| interrupt::select(d))
        .or_else(|| flags::select(d))
        .or_else(|| control::select(d))
        .or_else(|| tables::select(d))
        .or_else(|| io::select(d))
        .or_else(|| model::select(d))
        .or_else(|| paging::select(d))
        .or_else(|| syscall::select(d))
        .or_else(|| verify::select(d))
}

impl Cpu {
    /// Privileged instructions.
    #[inline(always)]
    fn require_cpl0(&self) -> Flow {
        if self.cpl == 0 { Ok(()) } else { Err(Stop::GP0) }
    }
}
