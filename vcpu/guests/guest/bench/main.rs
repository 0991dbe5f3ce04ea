//! Loops to measure a processor with. Each has an exact number of instructions an iteration, so that the time between
//! its two lines, taken outside, gives instructions a second.

#![no_std]
#![no_main]

use core::arch::asm;
use core::cell::UnsafeCell;
use rt::boot::{Info, option};
use rt::cpu::rdtsc;
use rt::{exit, exit_code, fail, say};

rt::guest!("bench", first, second);

struct Loop {
    name: &'static str,
    iterations: u64,
    instructions: u64,
    run: fn(u64),
}

/// `vmcall` is last: without an L1 it is #UD.
const LOOPS: [Loop; 6] = [
    Loop { name: "alu", iterations: 10_000_000, instructions: 10, run: alu },
    Loop { name: "copy", iterations: 10_000_000, instructions: 8, run: copy },
    Loop { name: "mix", iterations: 5_000_000, instructions: 20, run: mix },
    Loop { name: "movsq", iterations: 100_000, instructions: 6, run: movsq },
    Loop { name: "cpuid", iterations: 100_000, instructions: 4, run: cpuid },
    Loop { name: "vmcall", iterations: 100_000, instructions: 3, run: vmcall },
];

fn first(info: &'static Info) -> ! {
    let command_line = info.command_line();
    let only = option(command_line, "loop");
    let iterations = option(command_line, "n").map(decimal);
    let mut ran = false;
    for work in &LOOPS {
        if only.map_or(work.name == "vmcall", |name| name != work.name.as_bytes()) {
            continue;
        }
        ran = true;
        let iterations = iterations.unwrap_or(work.iterations).max(1);
        say!(work.name, " begins");
        let start_tsc = rdtsc();
        (work.run)(iterations);
        let ticks = rdtsc() - start_tsc;
        say!(work.name, " iterations=", iterations, " instructions=", iterations * work.instructions, " tsc=", ticks);
    }
    if !ran {
        fail!(exit_code::UNSUPPORTED, "no such loop");
    }
    exit(exit_code::SUCCESS)
}

/// The second processor is not used.
fn second() -> ! {
    exit(exit_code::PANIC)
}

fn decimal(digits: &[u8]) -> u64 {
    digits.iter().fold(0, |value, digit| match digit {
        b'0'..=b'9' => value * 10 + u64::from(digit - b'0'),
        _ => fail!(exit_code::UNSUPPORTED, "n= is a decimal number"),
    })
}

#[repr(C, align(4096))]
struct Buffer(UnsafeCell<[u64; 4096]>);

// SAFETY: only the first processor runs.
unsafe impl Sync for Buffer {}

static SOURCE: Buffer = Buffer(UnsafeCell::new([0; 4096]));
static TARGET: Buffer = Buffer(UnsafeCell::new([0; 4096]));

/// 64-bit arithmetic in registers.
fn alu(iterations: u64) {
    // SAFETY: registers only.
    unsafe {
        asm!(
            ".balign 16",
            "2: add rax, rdx",
            "xor rdx, rcx",
            "lea rsi, [rax + rdx*2 + 1]",
            "sub rcx, rsi",
            "and rsi, rax",
            "rol rdx, 7",
            "or rax, rsi",
            "shr rsi, 3",
            "dec {n}",
            "jnz 2b",
            n = inout(reg) iterations => _,
            inout("rax") 1_u64 => _,
            inout("rcx") 2_u64 => _,
            inout("rdx") 3_u64 => _,
            out("rsi") _,
            options(nomem, nostack)
        );
    }
}

/// Loads and stores over 32 KiB.
fn copy(iterations: u64) {
    // SAFETY: indexes stay below 4096.
    unsafe {
        asm!(
            ".balign 16",
            "2: mov rax, [rsi + rcx*8]",
            "mov [rdi + rcx*8], rax",
            "mov rdx, [rsi + rcx*8 + 8]",
            "mov [rdi + rcx*8 + 8], rdx",
            "add ecx, 2",
            "and ecx, 4095",
            "dec {n}",
            "jnz 2b",
            n = inout(reg) iterations => _,
            in("rsi") SOURCE.0.get(),
            in("rdi") TARGET.0.get(),
            inout("rcx") 0_u64 => _,
            out("rax") _,
            out("rdx") _,
            options(nostack)
        );
    }
}

/// Calls, branches on random data, loads, stores and arithmetic. Both ways of the branch are 5 instructions.
fn mix(iterations: u64) {
    // SAFETY: offsets stay below 4096 bytes.
    unsafe {
        asm!(
            "jmp 2f",
            ".balign 16",
            "5: add r9, [rsi + rcx]",
            "mov [rdi + rcx], r9",
            "ret",
            ".balign 16",
            "2: mov rdx, rax",
            "shl rdx, 13",
            "xor rax, rdx",
            "mov rdx, rax",
            "shr rdx, 7",
            "xor rax, rdx",
            "mov rdx, rax",
            "shl rdx, 17",
            "xor rax, rdx",
            "mov ecx, eax",
            "and ecx, 0xff8",
            "test eax, 0x1000",
            "jz 3f",
            "call 5b",
            "jmp 4f",
            "3: mov r9, [rdi + rcx]",
            "xor [rsi + rcx], r9",
            "lea r10, [r9 + rcx]",
            "add r9, r10",
            "rol r9, 3",
            "4: dec {n}",
            "jnz 2b",
            n = inout(reg) iterations => _,
            in("rsi") SOURCE.0.get(),
            in("rdi") TARGET.0.get(),
            inout("rax") 0x9e37_79b9_7f4a_7c15_u64 => _,
            out("rcx") _,
            out("rdx") _,
            out("r9") _,
            out("r10") _,
        );
    }
}

/// 4 KiB copied by one instruction.
fn movsq(iterations: u64) {
    // SAFETY: 512 quadwords of 4096.
    unsafe {
        asm!(
            ".balign 16",
            "2: mov rsi, {source}",
            "mov rdi, {target}",
            "mov ecx, 512",
            "rep movsq",
            "dec {n}",
            "jnz 2b",
            n = inout(reg) iterations => _,
            source = in(reg) SOURCE.0.get(),
            target = in(reg) TARGET.0.get(),
            out("rsi") _,
            out("rdi") _,
            out("rcx") _,
            options(nostack)
        );
    }
}

/// Under an L1 each CPUID is an exit.
fn cpuid(iterations: u64) {
    // SAFETY: RBX, which the compiler keeps for itself, is put back.
    unsafe {
        asm!(
            "mov r10, rbx",
            ".balign 16",
            "2: xor eax, eax",
            "cpuid",
            "dec {n}",
            "jnz 2b",
            "mov rbx, r10",
            n = inout(reg) iterations => _,
            out("rax") _,
            out("rcx") _,
            out("rdx") _,
            out("r10") _,
            options(nomem, nostack)
        );
    }
}

/// To L1 and back.
fn vmcall(iterations: u64) {
    // SAFETY: L1 changes no register.
    unsafe {
        asm!(".balign 16", "2: vmcall", "dec {n}", "jnz 2b", n = inout(reg) iterations => _, options(nomem, nostack));
    }
}
