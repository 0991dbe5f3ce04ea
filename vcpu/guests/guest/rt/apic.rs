//! The local APIC, as far as starting a processor needs it.

use crate::cpu::{IA32_APIC_BASE, cpuid, rdmsr, wrmsr};
use crate::time::delay;
use crate::{exit_code, fail};

/// Where the registers are in xAPIC mode; no guest moves them.
pub const XAPIC_PAGE_GPA: u64 = 0xfee0_0000;

const APIC_BASE_EXTD: u64 = 1 << 10;
const APIC_BASE_ENABLE: u64 = 1 << 11;
const APIC_BASE_ADDRESS: u64 = 0x000f_ffff_ffff_f000;

const REGISTER_ID: u32 = 0x20;
const REGISTER_ICR_LOW: u32 = 0x300;
const REGISTER_ICR_HIGH: u32 = 0x310;
const MSR_X2APIC_ID: u32 = 0x802;
const MSR_X2APIC_ICR: u32 = 0x830;

const ICR_BUSY: u32 = 1 << 12;
/// INIT, level-triggered, assert.
const ICR_INIT: u32 = 0xc500;
/// Start-up with the vector in bits 7:0.
const ICR_STARTUP: u32 = 0x0600;

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    XApic,
    X2Apic,
}

impl Mode {
    /// `apic=` of the command line.
    pub fn from_command_line(command_line: &[u8]) -> Self {
        match crate::boot::option(command_line, "apic") {
            None | Some(b"xapic") => Mode::XApic,
            Some(b"x2apic") => Mode::X2Apic,
            Some(_) => fail!(exit_code::UNSUPPORTED, "apic= is xapic or x2apic"),
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Mode::XApic => "xAPIC",
            Mode::X2Apic => "x2APIC",
        }
    }
}

/// The running processor's local APIC.
#[derive(Clone, Copy)]
pub struct LocalApic {
    mode: Mode,
}

impl LocalApic {
    /// Switches to the mode unless an outer level has done so.
    pub fn open(mode: Mode) -> Self {
        let base = rdmsr(IA32_APIC_BASE);
        if base & APIC_BASE_ENABLE == 0 || base & APIC_BASE_ADDRESS != XAPIC_PAGE_GPA {
            fail!(exit_code::UNSUPPORTED, "local APIC disabled or moved");
        }
        match (mode, base & APIC_BASE_EXTD != 0) {
            (Mode::XApic, false) | (Mode::X2Apic, true) => {}
            (Mode::X2Apic, false) if cpuid(1, 0).ecx & 1 << 21 != 0 => {
                // SAFETY: no reference into the APIC's page exists.
                unsafe { wrmsr(IA32_APIC_BASE, base | APIC_BASE_EXTD) }
            }
            (Mode::X2Apic, false) => fail!(exit_code::UNSUPPORTED, "the processor has no x2APIC"),
            (Mode::XApic, true) => fail!(exit_code::UNSUPPORTED, "the local APIC is in x2APIC mode"),
        }
        LocalApic { mode }
    }

    pub fn id(self) -> u32 {
        match self.mode {
            Mode::XApic => read(REGISTER_ID) >> 24,
            Mode::X2Apic => rdmsr(MSR_X2APIC_ID) as u32,
        }
    }

    /// INIT, SIPI, SIPI with the pauses that Linux makes for processors that need them (10 ms, 200 µs). Linux'
    /// level de-assert after INIT is left out: no processor with VMX heeds it.
    pub fn start_processor(self, apic_id: u32, vector: u8) {
        self.command(apic_id, ICR_INIT);
        delay(10_000);
        self.command(apic_id, ICR_STARTUP | u32::from(vector));
        delay(200);
        self.command(apic_id, ICR_STARTUP | u32::from(vector));
    }

    fn command(self, apic_id: u32, icr_low: u32) {
        match self.mode {
            Mode::XApic => {
                write(REGISTER_ICR_HIGH, apic_id << 24);
                write(REGISTER_ICR_LOW, icr_low);
                while read(REGISTER_ICR_LOW) & ICR_BUSY != 0 {
                    core::hint::spin_loop();
                }
            }
            // SAFETY: an ICR write touches no memory of the sender.
            Mode::X2Apic => unsafe { wrmsr(MSR_X2APIC_ICR, u64::from(apic_id) << 32 | u64::from(icr_low)) },
        }
    }
}

fn read(register: u32) -> u32 {
    // SAFETY: the page is identity-mapped and holds registers only.
    unsafe { ((XAPIC_PAGE_GPA as usize + register as usize) as *const u32).read_volatile() }
}

fn write(register: u32, value: u32) {
    // SAFETY: as for `read`.
    unsafe { ((XAPIC_PAGE_GPA as usize + register as usize) as *mut u32).write_volatile(value) }
}
