//! L2: starts its second processor as an operating system does, and checks that it came up.
//!
//! Nothing here knows of a hypervisor: the same image is a guest of `l1` or runs on the machine itself.

#![no_std]
#![no_main]

use core::arch::global_asm;
use rt::apic::{LocalApic, Mode};
use rt::boot::Info;
use rt::time::{deadline_tsc, wait_until};
use rt::{exit, exit_code, fail, say};

rt::guest!("L2", first, second);

const SECOND_APIC_ID: u32 = 1;
const SIPI_VECTOR: u8 = 0x10;
const START_PAGE_GPA: usize = (SIPI_VECTOR as usize) << 12;
/// How long the second processor may take after the second SIPI.
const PATIENCE_US: u64 = 50_000;
/// What the second processor writes.
const MARK: u16 = 0x2a2a;

// The second processor's code: real mode, CS:IP = START_PAGE:0. It shows itself on the serial port and in memory.
global_asm!(
    ".section .boot16, \"ax\", @progbits",
    ".code16",
    "l2_second_start:",
    "cli",
    "movw $0x3f8, %dx",
    "movb $'*', %al",
    "outb %al, %dx",
    "movb $'\\n', %al",
    "outb %al, %dx",
    "movw $0x2a2a, %cs:(l2_second_mark - l2_second_start)",
    "1: hlt",
    "jmp 1b",
    "l2_second_mark: .word 0",
    "l2_second_end:",
    ".code64",
    ".section .text",
    options(att_syntax)
);

unsafe extern "C" {
    safe static l2_second_start: u8;
    safe static l2_second_mark: u8;
    safe static l2_second_end: u8;
}

fn first(info: &'static Info) -> ! {
    let mode = Mode::from_command_line(info.command_line());
    let apic = LocalApic::open(mode);
    say!("first processor runs: APIC ID ", u64::from(apic.id()), ", ", mode.name(), " mode");

    let start = &raw const l2_second_start;
    let length = &raw const l2_second_end as usize - start as usize;
    // SAFETY: the start page is free memory of this guest (the crate's memory map).
    unsafe { core::ptr::copy_nonoverlapping(start, START_PAGE_GPA as *mut u8, length) };
    let mark = (START_PAGE_GPA + &raw const l2_second_mark as usize - start as usize) as *const u16;

    say!("sending INIT, SIPI, SIPI to APIC ID ", u64::from(SECOND_APIC_ID));
    apic.start_processor(SECOND_APIC_ID, SIPI_VECTOR);
    // SAFETY: inside the start page.
    if wait_until(deadline_tsc(PATIENCE_US), || unsafe { mark.read_volatile() } == MARK) {
        say!("second processor is up");
        exit(exit_code::SUCCESS)
    }
    fail!(exit_code::SECOND_PROCESSOR_MISSING, "second processor did not come up");
}

/// The second processor stays in real mode.
fn second() -> ! {
    exit(exit_code::PANIC)
}
