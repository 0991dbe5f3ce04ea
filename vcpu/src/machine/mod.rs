//! The PC around the processors: port and MMIO devices as far as kernels touch them.
//!
//! Devices are pure state: they take guest time as an argument, say when they want to be looked at again, and
//! reach the rest of the machine through what is passed in. [`Platform`] has what both engines need; [`Devices`]
//! adds the interrupt controllers and the timer, which on KVM are the kernel's.

mod cmos;
mod fw_cfg;
mod ioapic;
mod pic;
mod pit;
mod platform;
mod serial;

#[cfg(test)]
mod tests;

use nested_vmx::bus::IpiMessage;
use serde::{Deserialize, Serialize};

pub use ioapic::{IOAPIC_GPA, IoApicState};
pub use pic::PicPairState;
pub use pit::{PIT_HZ, PitState};
pub use platform::{Platform, PlatformState};
pub use serial::{InvalidSerialState, SERIAL_IRQ, SerialState};

/// RAM below the hole that ends at 4 GiB; the rest of it lies from 4 GiB up.
pub const LOW_RAM_END_GPA: u64 = 3 << 30;

/// What the devices know of the VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineConfig {
    pub cpus: u32,
    pub memory_bytes: u64,
    /// Debug exit, interrupt-line test ports, firmware configuration.
    pub testdev: bool,
    /// What the RTC shows at guest time 0, in seconds since 1970.
    pub epoch_s: u64,
}

/// What an access asks of the VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Outcome {
    Continue,
    /// The debug-exit port was written: the guest ends the VM with this code.
    Exit(u32),
    PowerOff,
    Reset,
}

/// Where the platform's interrupt lines and console output go.
pub trait Lines {
    /// Drives an ISA interrupt line.
    fn set_irq(&mut self, irq: u8, high: bool);
    fn console(&mut self, bytes: &[u8]);

    /// One edge.
    fn pulse_irq(&mut self, irq: u8) {
        self.set_irq(irq, true);
        self.set_irq(irq, false);
    }
}

/// Where what leaves the whole machine goes.
pub trait Outputs {
    fn console(&mut self, bytes: &[u8]);
    /// The I/O APIC sends a message to local APICs.
    fn message(&mut self, message: IpiMessage);
    /// The 8259 pair's INTR line changed.
    fn extint(&mut self, asserted: bool);
}

/// All devices of a VM on the emulated processor.
#[derive(Debug)]
pub struct Devices {
    platform: Platform,
    chips: Chips,
}

/// Interrupt controllers and timer.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Chips {
    pit: PitState,
    pics: PicPairState,
    ioapic: IoApicState,
}

/// A snapshot of [`Devices`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DevicesState {
    pub platform: PlatformState,
    pub pit: PitState,
    pub pics: PicPairState,
    pub ioapic: IoApicState,
}

struct Wires<'a, O> {
    pics: &'a mut PicPairState,
    ioapic: &'a mut IoApicState,
    out: &'a mut O,
}

impl<O: Outputs> Lines for Wires<'_, O> {
    fn set_irq(&mut self, irq: u8, high: bool) {
        if irq < 16 {
            let before = self.pics.intr();
            self.pics.set_irq(irq, high);
            let after = self.pics.intr();
            if before != after {
                self.out.extint(after);
            }
        }
        // The PIT is on pin 2, and the 8259's cascade on none: as PCs have it and MP tables say.
        let pin = match irq {
            0 => 2,
            2 => return,
            n => n,
        };
        let message = self.ioapic.set_line(pin, high);
        if let Some(message) = message {
            self.out.message(message);
        }
    }

    fn console(&mut self, bytes: &[u8]) {
        self.out.console(bytes);
    }
}

impl Devices {
    pub fn new(config: MachineConfig) -> Self {
        Self { platform: Platform::new(config), chips: Chips::default() }
    }

    /// As at creation; the console's input stays with its owner.
    pub fn reset(&mut self, out: &mut impl Outputs) {
        *self = Self::new(*self.platform.config());
        out.extint(false);
    }

    /// A read of 1, 2 or 4 bytes. Nothing there reads all ones.
    pub fn io_read(&mut self, port: u16, size: u8, now_ns: u64, out: &mut impl Outputs) -> u32 {
        if Platform::is_wide(port) {
            return self.platform.io_read(port, size, now_ns);
        }
        platform::read_bytes(port, size, |port| match port {
            0x20 | 0x21 | 0xa0 | 0xa1 | 0x4d0 | 0x4d1 => self.with_intr(out, |pics| pics.read(port)),
            0x40..=0x43 | 0x61 => self.chips.pit.read(port, now_ns),
            _ => self.platform.read_byte(port, now_ns),
        })
    }

    pub fn io_write(&mut self, port: u16, size: u8, value: u32, now_ns: u64, out: &mut impl Outputs) -> Outcome {
        if Platform::is_wide(port) {
            let (platform, mut wires) = self.split(out);
            return platform.io_write(port, size, value, &mut wires);
        }
        platform::write_bytes(port, size, value, |port, byte| {
            match port {
                0x20 | 0x21 | 0xa0 | 0xa1 | 0x4d0 | 0x4d1 => self.with_intr(out, |pics| pics.write(port, byte)),
                0x40..=0x43 | 0x61 => {
                    // What expired before the write counts.
                    self.advance(now_ns, out);
                    self.chips.pit.write(port, byte, now_ns);
                }
                _ => {
                    let (platform, mut wires) = self.split(out);
                    return platform.write_byte(port, byte, &mut wires);
                }
            }
            Outcome::Continue
        })
    }

    pub fn mmio_read(&mut self, gpa: u64, size: u8) -> u64 {
        match gpa.checked_sub(IOAPIC_GPA) {
            Some(at @ 0..=0xfff) => self.chips.ioapic.read(at as u16).into(),
            _ => u64::MAX >> (64 - 8 * u32::from(size.clamp(1, 8))),
        }
    }

    pub fn mmio_write(&mut self, gpa: u64, value: u64, out: &mut impl Outputs) {
        if let Some(at @ 0..=0xfff) = gpa.checked_sub(IOAPIC_GPA)
            && let Some(message) = self.chips.ioapic.write(at as u16, value as u32)
        {
            out.message(message);
        }
    }

    /// Takes what expired up to `now_ns`.
    pub fn advance(&mut self, now_ns: u64, out: &mut impl Outputs) {
        if self.chips.pit.advance(now_ns) {
            self.split(out).1.pulse_irq(pit::PIT_IRQ);
        }
    }

    /// When [`Self::advance`] has to be called.
    pub fn next_deadline_ns(&self) -> Option<u64> {
        self.chips.pit.next_deadline_ns()
    }

    /// The INTA cycle: the vector of the interrupt that the 8259 pair asked for.
    pub fn acknowledge_extint(&mut self, out: &mut impl Outputs) -> Option<u8> {
        self.with_intr(out, PicPairState::acknowledge)
    }

    /// Whether the 8259 pair asserts INTR.
    pub fn intr(&self) -> bool {
        self.chips.pics.intr()
    }

    pub fn eoi_broadcast(&mut self, vector: u8, out: &mut impl Outputs) {
        self.chips.ioapic.eoi(vector, |message| out.message(message));
    }

    /// How many bytes of console input the serial device has room for.
    pub fn console_room(&self) -> usize {
        self.platform.console_room()
    }

    /// Console input for the guest; returns how many bytes were taken.
    pub fn console_input(&mut self, bytes: &[u8], out: &mut impl Outputs) -> usize {
        let (platform, mut wires) = self.split(out);
        platform.console_input(bytes, &mut wires)
    }

    pub fn state(&self) -> DevicesState {
        DevicesState {
            platform: self.platform.state(),
            pit: self.chips.pit.clone(),
            pics: self.chips.pics.clone(),
            ioapic: self.chips.ioapic.clone(),
        }
    }

    /// INTR is as [`Self::intr`] says afterwards.
    pub fn restore(state: &DevicesState) -> Result<Self, InvalidSerialState> {
        let platform = Platform::restore(&state.platform)?;
        let chips = Chips { pit: state.pit.clone(), pics: state.pics.clone(), ioapic: state.ioapic.clone() };
        Ok(Self { platform, chips })
    }

    fn split<'a, O: Outputs>(&'a mut self, out: &'a mut O) -> (&'a mut Platform, Wires<'a, O>) {
        let Chips { pics, ioapic, .. } = &mut self.chips;
        (&mut self.platform, Wires { pics, ioapic, out })
    }

    fn with_intr<R>(&mut self, out: &mut impl Outputs, f: impl FnOnce(&mut PicPairState) -> R) -> R {
        let before = self.chips.pics.intr();
        let result = f(&mut self.chips.pics);
        let after = self.chips.pics.intr();
        if before != after {
            out.extint(after);
        }
        result
    }
}

impl Default for Chips {
    fn default() -> Self {
        Self { pit: PitState::new(), pics: PicPairState::default(), ioapic: IoApicState::new() }
    }
}
