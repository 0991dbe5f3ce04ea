//! Guest RAM: the one place that touches guest memory.
//!
//! Guests race with each other on it, so every access is one machine instruction in `asm!` (never a plain Rust
//! load or store) and follows the host's memory order, which is the guest's (SDM 3, "Memory Ordering").
#![allow(unsafe_code)]

mod ram;
mod word;

pub use ram::{OutOfRange, PAGE_SIZE, Ram};
pub use word::Word;
