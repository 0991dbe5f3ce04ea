//! Instructions that Rust has no words for.

use core::arch::asm;
use core::arch::x86_64::{__cpuid_count, CpuidResult};

pub const IA32_APIC_BASE: u32 = 0x1b;

pub fn out8(port: u16, value: u8) {
    // SAFETY: the guests' ports (serial, debug exit) do not touch memory.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack, preserves_flags)) }
}

pub fn in8(port: u16) -> u8 {
    let value: u8;
    // SAFETY: as for `out8`.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack, preserves_flags)) }
    value
}

pub fn rdmsr(msr: u32) -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: reading an MSR changes no memory; one that does not exist ends in the exception handler.
    unsafe { asm!("rdmsr", in("ecx") msr, out("eax") low, out("edx") high, options(nomem, nostack, preserves_flags)) }
    u64::from(high) << 32 | u64::from(low)
}

/// # Safety
/// Some MSRs change how memory is reached.
pub unsafe fn wrmsr(msr: u32, value: u64) {
    let (low, high) = (value as u32, (value >> 32) as u32);
    // SAFETY: the caller's. Not `nomem`: what was written before must be seen before (an ICR write starts others).
    unsafe { asm!("wrmsr", in("ecx") msr, in("eax") low, in("edx") high, options(nostack, preserves_flags)) }
}

pub fn cpuid(leaf: u32, subleaf: u32) -> CpuidResult {
    __cpuid_count(leaf, subleaf)
}

pub fn rdtsc() -> u64 {
    // SAFETY: no guest sets CR4.TSD.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// Stops until an NMI, INIT or reset: interrupts are off.
pub fn halt() {
    // SAFETY: halts, and changes nothing.
    unsafe { asm!("cli", "hlt", options(nomem, nostack)) }
}

/// No guest has a handler: nothing may raise one.
pub fn enable_interrupts() {
    // SAFETY: an interrupt would end in the exception handler, or in a fault that does.
    unsafe { asm!("sti", options(nomem, nostack)) }
}
