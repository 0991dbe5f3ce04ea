//! What every guest stands on: entry into long mode, console, time, the local APIC.
//!
//! Guests are freestanding: no interrupt is expected, every address is identity-mapped, and whatever goes wrong ends in
//! [`exit`] with a line that says why.

#![no_std]

pub mod apic;
pub mod boot;
pub mod console;
pub mod cpu;
mod exception;
#[path = "../../src/exit_code.rs"]
pub mod exit_code;
mod memory;
pub mod time;

use core::panic::PanicInfo;

/// Ends the VM with a code of [`exit_code`]. Where there is no debug-exit device the processor halts.
pub fn exit(code: u8) -> ! {
    cpu::out8(exit_code::DEBUG_EXIT_PORT, code);
    loop {
        cpu::halt();
    }
}

/// Prints a line and ends the VM.
#[macro_export]
macro_rules! fail {
    ($code:expr, $($part:expr),+) => {{
        $crate::say!($($part),+);
        $crate::exit($code)
    }};
}

#[panic_handler]
fn panic(_: &PanicInfo) -> ! {
    fail!(exit_code::PANIC, "panic")
}
