//! The 8259A pair (Intel 8259A data sheet), with the edge/level registers of PC chipsets at 0x4d0.

use serde::{Deserialize, Serialize};

const CASCADE: u8 = 2;
/// IRQs 0, 1, 2, 8 and 13 are always edge-triggered.
const ELCR_WRITABLE: [u8; 2] = [0xf8, 0xde];

/// What the next write to the data port is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
enum Expect {
    #[default]
    Mask,
    Icw2,
    Icw3,
    Icw4,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Pic {
    irr: u8,
    isr: u8,
    imr: u8,
    /// Levels of the lines: edges are seen against them.
    lines: u8,
    elcr: u8,
    base: u8,
    /// The IRQ of the highest priority.
    top: u8,
    expect: Expect,
    /// ICW1 asked for ICW4, and said that there is no cascade.
    icw4: bool,
    single: bool,
    read_isr: bool,
    poll: bool,
    auto_eoi: bool,
    rotate_on_auto_eoi: bool,
    special_mask: bool,
    special_fully_nested: bool,
}

impl Pic {
    fn set_line(&mut self, irq: u8, high: bool) {
        let bit = 1 << irq;
        let rising = high && self.lines & bit == 0;
        self.lines = if high { self.lines | bit } else { self.lines & !bit };
        if self.elcr & bit != 0 {
            self.irr = if high { self.irr | bit } else { self.irr & !bit };
        } else if rising {
            self.irr |= bit;
        }
    }

    /// 0 is the highest priority.
    fn first(&self, bits: u8) -> Option<u8> {
        let n = bits.rotate_right(u32::from(self.top)).trailing_zeros() as u8;
        (bits != 0).then_some(n)
    }

    fn irq_of(&self, priority: u8) -> u8 {
        (priority + self.top) & 7
    }

    /// The IRQ to ask the processor for.
    fn pending(&self) -> Option<u8> {
        let request = self.first(self.irr & !self.imr)?;
        let mut in_service = self.isr;
        if self.special_mask {
            in_service &= !self.imr;
        }
        // In the special fully nested mode further requests of a slave in service get through.
        if self.special_fully_nested {
            in_service &= !(1 << CASCADE);
        }
        match self.first(in_service) {
            Some(service) if service <= request => None,
            _ => Some(self.irq_of(request)),
        }
    }

    fn acknowledge(&mut self, irq: u8) {
        let bit = 1 << irq;
        if self.auto_eoi {
            if self.rotate_on_auto_eoi {
                self.top = (irq + 1) & 7;
            }
        } else {
            self.isr |= bit;
        }
        if self.elcr & bit == 0 {
            self.irr &= !bit;
        }
    }

    fn write_command(&mut self, value: u8) {
        if value & 0x10 != 0 {
            *self = Self {
                // Level-triggered requests are there as long as their lines are.
                irr: self.lines & self.elcr,
                lines: self.lines,
                elcr: self.elcr,
                base: self.base,
                expect: Expect::Icw2,
                icw4: value & 1 != 0,
                single: value & 2 != 0,
                ..Self::default()
            };
        } else if value & 0x08 != 0 {
            self.poll = value & 4 != 0;
            if value & 2 != 0 {
                self.read_isr = value & 1 != 0;
            }
            if value & 0x40 != 0 {
                self.special_mask = value & 0x20 != 0;
            }
        } else {
            self.write_ocw2(value >> 5, value & 7);
        }
    }

    fn write_ocw2(&mut self, operation: u8, irq: u8) {
        let first_in_service = self.first(self.isr).map(|p| self.irq_of(p));
        let (end, rotate) = match operation {
            0 | 4 => {
                self.rotate_on_auto_eoi = operation == 4;
                return;
            }
            1 => (first_in_service, false),
            3 => (Some(irq), false),
            5 => (first_in_service, true),
            7 => (Some(irq), true),
            6 => {
                self.top = (irq + 1) & 7;
                return;
            }
            _ => return,
        };
        if let Some(irq) = end {
            self.isr &= !(1 << irq);
            if rotate {
                self.top = (irq + 1) & 7;
            }
        }
    }

    fn write_data(&mut self, value: u8) {
        self.expect = match self.expect {
            Expect::Mask => {
                self.imr = value;
                return;
            }
            Expect::Icw2 => {
                self.base = value & 0xf8;
                match (self.single, self.icw4) {
                    (false, _) => Expect::Icw3,
                    (true, true) => Expect::Icw4,
                    (true, false) => Expect::Mask,
                }
            }
            // How the two are wired does not depend on what ICW3 says of it.
            Expect::Icw3 if self.icw4 => Expect::Icw4,
            Expect::Icw3 => Expect::Mask,
            Expect::Icw4 => {
                self.special_fully_nested = value & 0x10 != 0;
                self.auto_eoi = value & 2 != 0;
                Expect::Mask
            }
        };
    }

    /// A read in the poll mode acknowledges.
    fn read(&mut self, data: bool) -> u8 {
        if std::mem::take(&mut self.poll) {
            return match self.pending() {
                Some(irq) => {
                    self.acknowledge(irq);
                    0x80 | irq
                }
                None => 0,
            };
        }
        match (data, self.read_isr) {
            (true, _) => self.imr,
            (false, true) => self.isr,
            (false, false) => self.irr,
        }
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PicPairState {
    master: Pic,
    slave: Pic,
}

impl PicPairState {
    pub(super) fn set_irq(&mut self, irq: u8, high: bool) {
        match irq {
            // The slave drives it.
            CASCADE => {}
            0..8 => self.master.set_line(irq, high),
            _ => self.slave.set_line(irq & 7, high),
        }
        self.cascade();
    }

    /// The slave's INTR is the master's IRQ 2.
    fn cascade(&mut self) {
        let bit = 1 << CASCADE;
        if self.slave.pending().is_some() {
            self.master.irr |= bit;
        } else {
            self.master.irr &= !bit;
        }
    }

    pub(super) fn intr(&self) -> bool {
        self.master.pending().is_some()
    }

    pub(super) fn acknowledge(&mut self) -> Option<u8> {
        let irq = self.master.pending()?;
        self.master.acknowledge(irq);
        let vector = if irq == CASCADE {
            // IRQ 7 where the request went away: the spurious interrupt.
            let slave_irq = self.slave.pending().inspect(|&irq| self.slave.acknowledge(irq));
            self.slave.base + slave_irq.unwrap_or(7)
        } else {
            self.master.base + irq
        };
        self.cascade();
        Some(vector)
    }

    pub(super) fn read(&mut self, port: u16) -> u8 {
        let value = match port {
            0x20 => self.master.read(false),
            0x21 => self.master.read(true),
            0xa0 => self.slave.read(false),
            0xa1 => self.slave.read(true),
            0x4d0 => self.master.elcr,
            _ => self.slave.elcr,
        };
        self.cascade();
        value
    }

    pub(super) fn write(&mut self, port: u16, value: u8) {
        match port {
            0x20 => self.master.write_command(value),
            0x21 => self.master.write_data(value),
            0xa0 => self.slave.write_command(value),
            0xa1 => self.slave.write_data(value),
            0x4d0 => self.master.elcr = value & ELCR_WRITABLE[0],
            _ => self.slave.elcr = value & ELCR_WRITABLE[1],
        }
        self.cascade();
    }
}
