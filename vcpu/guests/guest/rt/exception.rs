//! No guest expects an exception: one is reported and ends the VM.

use core::arch::asm;
use core::cell::UnsafeCell;

use crate::console::Hex;
use crate::{exit_code, fail};

/// What the stubs in boot.s leave on the stack.
#[repr(C)]
pub struct Frame {
    vector: u64,
    error_code: u64,
    rip: u64,
}

#[repr(C, align(16))]
struct Idt(UnsafeCell<[[u64; 2]; 32]>);

// SAFETY: written by the first processor before it starts the second.
unsafe impl Sync for Idt {}

static IDT: Idt = Idt(UnsafeCell::new([[0; 2]; 32]));

unsafe extern "C" {
    safe static exception_stubs: [[u8; 16]; 32];
}

/// First processor, before the others run.
pub fn init() {
    for (vector, stub) in exception_stubs.iter().enumerate() {
        let address = stub.as_ptr() as u64;
        let interrupt_gate = address & 0xffff | 0x18 << 16 | 0x8e00 << 32 | (address >> 16 & 0xffff) << 48;
        // SAFETY: `IDT` has 32 entries, and nothing else reads or writes it yet.
        unsafe { (*IDT.0.get())[vector & 31] = [interrupt_gate, address >> 32] };
    }
}

/// Each processor.
pub fn load() {
    #[repr(C, packed)]
    struct Pointer {
        limit: u16,
        base: u64,
    }
    let pointer = Pointer { limit: size_of::<Idt>() as u16 - 1, base: IDT.0.get() as u64 };
    // SAFETY: the table lives for ever.
    unsafe { asm!("lidt [{}]", in(reg) &raw const pointer, options(readonly, nostack, preserves_flags)) }
}

#[unsafe(no_mangle)]
extern "C" fn rt_exception(frame: &Frame) -> ! {
    let cr2: u64;
    // SAFETY: reads a register.
    unsafe { asm!("mov {}, cr2", out(reg) cr2, options(nomem, nostack, preserves_flags)) }
    fail!(
        exit_code::EXCEPTION,
        "exception ",
        frame.vector,
        ", error code ",
        Hex(frame.error_code),
        ", rip ",
        Hex(frame.rip),
        ", cr2 ",
        Hex(cr2)
    )
}
