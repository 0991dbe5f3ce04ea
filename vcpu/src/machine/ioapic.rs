//! The I/O APIC (Intel 82093AA data sheet): 24 pins, each with a redirection entry.

use bitfield_struct::bitfield;
use nested_vmx::arch::apic::delivery;
use nested_vmx::bus::{Delivery, Destination, IpiMessage};
use serde::{Deserialize, Serialize};

pub const IOAPIC_GPA: u64 = 0xfec0_0000;
const PINS: usize = 24;
/// Version 11H.
const VERSION: u32 = 0x11 | (PINS as u32 - 1) << 16;

const SELECT: u16 = 0x00;
const WINDOW: u16 = 0x10;

#[bitfield(u64)]
#[derive(PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
struct Redirection {
    vector: u8,
    #[bits(3)]
    delivery: u8,
    logical: bool,
    delivery_status: bool,
    active_low: bool,
    remote_irr: bool,
    level: bool,
    masked: bool,
    #[bits(39)]
    __: u64,
    destination: u8,
}

impl Redirection {
    /// Delivery status and remote IRR.
    const READ_ONLY: u64 = 1 << 12 | 1 << 14;
    const DEFINED: u64 = 0xff00_0000_0001_ffff;

    fn message(self) -> Option<IpiMessage> {
        let delivery = match self.delivery() {
            delivery::FIXED => Delivery::Fixed,
            delivery::LOWEST_PRIORITY => Delivery::LowestPriority,
            delivery::SMI => Delivery::Smi,
            delivery::NMI => Delivery::Nmi,
            delivery::INIT => Delivery::Init,
            delivery::EXT_INT => Delivery::ExtInt,
            _ => return None,
        };
        let id = u32::from(self.destination());
        let destination = if self.logical() { Destination::Logical(id) } else { Destination::Physical(id) };
        Some(IpiMessage { delivery, vector: self.vector(), destination, level: self.is_level(), cause: 0 })
    }

    /// Only interrupts with a vector can be level-triggered ("Trigger Mode").
    fn is_level(self) -> bool {
        self.level() && matches!(self.delivery(), delivery::FIXED | delivery::LOWEST_PRIORITY)
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IoApicState {
    id: u8,
    select: u8,
    pins: [Redirection; PINS],
    /// The pins that are asserted, whatever polarity says that is: devices assert, they do not drive voltages.
    asserted: u32,
}

impl IoApicState {
    pub(super) fn new() -> Self {
        Self { id: 0, select: 0, pins: [Redirection::new().with_masked(true); PINS], asserted: 0 }
    }

    /// An edge on a masked pin is lost ("Interrupt Mask"); a level is seen when the pin is unmasked.
    pub(super) fn set_line(&mut self, pin: u8, high: bool) -> Option<IpiMessage> {
        let pin = usize::from(pin);
        let entry = self.pins.get(pin)?;
        let bit = 1u32 << pin;
        let rising = high && self.asserted & bit == 0;
        self.asserted = if high { self.asserted | bit } else { self.asserted & !bit };
        if entry.is_level() {
            return self.service_level(pin);
        }
        if rising && !entry.masked() { entry.message() } else { None }
    }

    /// Sends an asserted level once, until its EOI.
    fn service_level(&mut self, pin: usize) -> Option<IpiMessage> {
        let entry = &mut self.pins[pin];
        if !entry.is_level() || entry.masked() || entry.remote_irr() || self.asserted & 1 << pin == 0 {
            return None;
        }
        entry.set_remote_irr(true);
        entry.message()
    }

    /// A local APIC ended a level-triggered interrupt with this vector.
    pub(super) fn eoi(&mut self, vector: u8, mut send: impl FnMut(IpiMessage)) {
        for pin in 0..PINS {
            let entry = &mut self.pins[pin];
            if entry.vector() == vector && entry.is_level() {
                entry.set_remote_irr(false);
                if let Some(message) = self.service_level(pin) {
                    send(message);
                }
            }
        }
    }

    pub(super) fn read(&self, at: u16) -> u32 {
        match at {
            SELECT => self.select.into(),
            WINDOW => self.read_register(),
            _ => 0,
        }
    }

    fn read_register(&self) -> u32 {
        match self.select {
            // Identification, and arbitration, which has the same ID.
            0 | 2 => u32::from(self.id) << 24,
            1 => VERSION,
            n => match self.entry_of(n) {
                Some((pin, high)) => (self.pins[pin].into_bits() >> (32 * u32::from(high))) as u32,
                None => 0,
            },
        }
    }

    pub(super) fn write(&mut self, at: u16, value: u32) -> Option<IpiMessage> {
        match at {
            SELECT => self.select = value as u8,
            WINDOW if self.select == 0 => self.id = (value >> 24) as u8 & 0xf,
            WINDOW => {
                let (pin, high) = self.entry_of(self.select)?;
                let shift = 32 * u32::from(high);
                let old = self.pins[pin].into_bits();
                let writable = Redirection::DEFINED & !Redirection::READ_ONLY & 0xffff_ffff << shift;
                let mut entry = Redirection::from_bits(old & !writable | u64::from(value) << shift & writable);
                // Software clears a stuck remote IRR by making the pin edge-triggered for a moment.
                if !entry.is_level() {
                    entry.set_remote_irr(false);
                }
                self.pins[pin] = entry;
                return self.service_level(pin);
            }
            _ => {}
        }
        None
    }

    /// The pin and half that a register index selects.
    fn entry_of(&self, select: u8) -> Option<(usize, bool)> {
        let i = usize::from(select.checked_sub(0x10)?);
        (i / 2 < PINS).then_some((i / 2, i % 2 == 1))
    }
}
