//! Guest images, compiled by this crate's build script and carried as bytes.
//!
//! * [`l1`]: a small hypervisor that does not monitor its guest's local APIC. It learns that L2 starts a processor
//!   from exit 3 (INIT signal) and exit 4 (SIPI) alone. Its source is `guest/l1`, to be read as an example.
//! * [`l2`]: a guest that starts its second processor with INIT, SIPI, SIPI. Its source is `guest/l2`.
//! * [`bench`]: loops to measure a processor with, on the machine or under [`l1`]. Its source is `guest/bench`.
//!
//! Each is a multiboot1 kernel: an ELF64 file whose multiboot header also carries load addresses (flag bit 16), so
//! that a loader needs no ELF parser and QEMU's `-kernel` takes it too. [`l1`] takes another image as its first
//! module and starts it as a multiboot loader would; [`l2`] and [`bench`] do not know whether they run under it.
//! All are baseline integer code: no x87, MMX, SSE or later instruction (a test disassembles them).
//!
//! # Command lines
//!
//! | option | image | meaning |
//! |---|---|---|
//! | `apic=xapic`, `apic=x2apic` | l1, l2 | how the local APIC is reached; `xapic` unless given. L1 passes its command line on to L2 |
//! | `cpus=1`, `cpus=2` | l1 | processors to bring up, for itself and for L2; 2 unless given |
//! | `interrupts=on` | all | run with RFLAGS.IF set, though nothing may raise an interrupt: KVM inside Bochs cannot take its own timer interrupt from a guest that waits with IF clear |
//! | `loop=NAME` | bench | one of `alu`, `copy`, `mix`, `movsq`, `cpuid`, `vmcall`; all but `vmcall` unless given (VMCALL needs an L1) |
//! | `n=COUNT` | bench | iterations, instead of each loop's own number |
//!
//! # Memory
//!
//! The machine needs 64 MiB and one or two processors with APIC IDs 0 and 1.
//!
//! | machine address | what |
//! |---|---|
//! | `0x0000_8000` | L1's start page for its second processor (SIPI vector 0x08) |
//! | `0x0010_0000` | the multiboot kernel: L1, or L2 or bench without an L1 |
//! | `0x0100_0000` to `0x0200_0000` | all of L2's memory; the module must not lie here |
//! | `0xfee0_0000` | the local APIC's page, mapped into L2 (xAPIC mode only) |
//!
//! | L2 address | what |
//! |---|---|
//! | `0x0000_6000` | `hlt; jmp`: where L2's second processor is parked until INIT, written by L1 |
//! | `0x0000_7000` | multiboot information and command line, written by L1 |
//! | `0x0001_0000` | L2's start page for its second processor (SIPI vector 0x10) |
//! | `0x0010_0000` | the image |
//!
//! # Output
//!
//! Lines on COM1 (0x3f8), each prefixed `L1: `, `L2: ` or `bench: `; L2's second processor writes `*`. The run ends with
//! one of [`exit_code`]'s values written to [`exit_code::DEBUG_EXIT_PORT`].

pub mod exit_code;

/// What the L1 hypervisor does with its guest's INIT and SIPI.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum L1 {
    /// Exit 3: wait-for-SIPI. Exit 4: start at the vector.
    Demo,
    /// Mutant: answers exit 3 by resuming active, so that no SIPI is ever taken.
    StaysActive,
    /// Mutant: answers exit 4 by resuming without starting the processor.
    IgnoresSipi,
}

/// The L1 hypervisor.
pub fn l1(variant: L1) -> &'static [u8] {
    match variant {
        L1::Demo => include_bytes!(concat!(env!("OUT_DIR"), "/l1-demo.elf")),
        L1::StaysActive => include_bytes!(concat!(env!("OUT_DIR"), "/l1-stays-active.elf")),
        L1::IgnoresSipi => include_bytes!(concat!(env!("OUT_DIR"), "/l1-ignores-sipi.elf")),
    }
}

/// The guest that starts its second processor.
pub fn l2() -> &'static [u8] {
    include_bytes!(concat!(env!("OUT_DIR"), "/l2.elf"))
}

/// The benchmark loops.
pub fn bench() -> &'static [u8] {
    include_bytes!(concat!(env!("OUT_DIR"), "/bench.elf"))
}
