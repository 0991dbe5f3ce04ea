//! L1: a lightweight hypervisor that does not monitor its guest's local APIC.
//!
//! It gives each processor of the machine to one processor of L2. L2 owns the local APIC and sends its inter-processor
//! messages itself; all that L1 hears of a processor being started are two VM exits on that processor (SDM volume 3,
//! "VM exits", basic reasons 3 and 4):
//!
//! * INIT signal: put the processor into the state that INIT leaves, and enter it in wait-for-SIPI;
//! * SIPI: start it at the vector.
//!
//! Read `main.rs` (both processors' way in), `exit.rs` (the handshake), `vcpu.rs` (VMCS and the loop), then `vmx.rs`,
//! `ept.rs` and `memory.rs`.

#![no_std]
#![no_main]

mod ept;
mod exit;
mod memory;
mod vcpu;
mod vmx;

use core::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use rt::apic::{LocalApic, Mode};
use rt::boot::{self, Info};
use rt::time::{deadline_tsc, wait_until};
use rt::{exit_code, fail, say};
use vcpu::Vcpu;

rt::guest!("L1", first, second);

const SECOND_APIC_ID: u32 = 1;
const SIPI_VECTOR: u8 = 0x08;
const START_PAGE_GPA: usize = (SIPI_VECTOR as usize) << 12;
const PATIENCE_US: u64 = 100_000;

static X2APIC: AtomicBool = AtomicBool::new(false);

/// How far the second processor is; each step is made by one side and awaited by the other.
static SECOND: AtomicU32 = AtomicU32::new(ABSENT);
const ABSENT: u32 = 0;
const AWAKE: u32 = 1;
/// No SIPI of L1's own is on its way any more: one that arrived in wait-for-SIPI would be taken for L2's.
const MAY_ENTER_VMX: u32 = 2;
/// About to enter L2.
const READY: u32 = 3;

fn first(info: &'static Info) -> ! {
    let command_line = info.command_line();
    let mode = Mode::from_command_line(command_line);
    X2APIC.store(mode == Mode::X2Apic, Ordering::Relaxed);
    let apic = LocalApic::open(mode);
    let two = match boot::option(command_line, "cpus") {
        None | Some(b"2") => true,
        Some(b"1") => false,
        Some(_) => fail!(exit_code::UNSUPPORTED, "cpus= is 1 or 2"),
    };

    vmx::check_support();
    ept::build(mode);
    let Some(image) = info.first_module() else { fail!(exit_code::UNSUPPORTED, "no module: L2's image is missing") };
    let entry_gpa = memory::load_l2(image, command_line);

    let mut vcpu = Vcpu::new(0);
    if two {
        start_second(apic);
    }
    say!(if two { "both processors" } else { "processor" }, " in VMX operation, local APIC in ", mode.name(), " mode");
    vcpu.enter_as_boot_loader(entry_gpa);
    vcpu.run()
}

fn start_second(apic: LocalApic) {
    let code = boot::second_processor_code();
    // SAFETY: the start page is free memory (the crate's memory map).
    unsafe { core::ptr::copy_nonoverlapping(code.as_ptr(), START_PAGE_GPA as *mut u8, code.len()) };
    apic.start_processor(SECOND_APIC_ID, SIPI_VECTOR);
    await_second(AWAKE);
    SECOND.store(MAY_ENTER_VMX, Ordering::Release);
    await_second(READY);
}

fn await_second(step: u32) {
    if !wait_until(deadline_tsc(PATIENCE_US), || SECOND.load(Ordering::Acquire) == step) {
        fail!(exit_code::UNSUPPORTED, "no second processor");
    }
}

fn second() -> ! {
    SECOND.store(AWAKE, Ordering::Release);
    while SECOND.load(Ordering::Acquire) != MAY_ENTER_VMX {
        core::hint::spin_loop();
    }
    LocalApic::open(if X2APIC.load(Ordering::Relaxed) { Mode::X2Apic } else { Mode::XApic });
    let mut vcpu = Vcpu::new(1);
    vcpu.park();
    SECOND.store(READY, Ordering::Release);
    vcpu.run()
}
