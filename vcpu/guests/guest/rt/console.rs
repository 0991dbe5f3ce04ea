//! Lines on COM1, each whole: one processor prints at a time.

use core::sync::atomic::{AtomicBool, Ordering};

use crate::cpu::{in8, out8};

const COM1: u16 = 0x3f8;
const LINE_STATUS: u16 = COM1 + 5;
const TRANSMITTER_EMPTY: u8 = 1 << 5;

static BUSY: AtomicBool = AtomicBool::new(false);

/// What a line is made of.
#[derive(Clone, Copy)]
pub enum Part<'a> {
    Text(&'a str),
    Hex(u64),
    Decimal(u64),
}

impl<'a> From<&'a str> for Part<'a> {
    fn from(text: &'a str) -> Self {
        Part::Text(text)
    }
}

/// A number printed in hexadecimal.
pub use Part::Hex;

impl From<u64> for Part<'_> {
    fn from(value: u64) -> Self {
        Part::Decimal(value)
    }
}

/// Prints one line: `say!("cpu ", 1, " at ", Hex(rip))`.
#[macro_export]
macro_rules! say {
    ($($part:expr),+) => {
        $crate::console::line(&[$($crate::console::Part::from($part)),+])
    };
}

/// 115200 baud, 8N1, polled.
pub fn init() {
    for (register, value) in [(1, 0x00), (3, 0x80), (0, 0x01), (1, 0x00), (3, 0x03), (2, 0x07), (4, 0x03)] {
        out8(COM1 + register, value);
    }
}

pub fn line(parts: &[Part]) {
    while BUSY.swap(true, Ordering::Acquire) {
        core::hint::spin_loop();
    }
    text(crate::boot::name());
    text(": ");
    for part in parts {
        match *part {
            Part::Text(value) => text(value),
            Part::Hex(value) => {
                text("0x");
                digits(value, 16);
            }
            Part::Decimal(value) => digits(value, 10),
        }
    }
    byte(b'\n');
    BUSY.store(false, Ordering::Release);
}

fn text(value: &str) {
    value.bytes().for_each(byte);
}

fn digits(mut value: u64, base: u64) {
    let mut reversed = [0_u8; 20];
    let mut count = 0;
    for digit in &mut reversed {
        *digit = b"0123456789abcdef"[(value % base) as usize & 15];
        value /= base;
        count += 1;
        if value == 0 {
            break;
        }
    }
    reversed.iter().take(count).rev().for_each(|digit| byte(*digit));
}

/// One byte, outside any line.
pub fn byte(value: u8) {
    while in8(LINE_STATUS) & TRANSMITTER_EMPTY == 0 {
        core::hint::spin_loop();
    }
    out8(COM1, value);
}
