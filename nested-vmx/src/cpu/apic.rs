//! The local APIC at its processor: MMIO and MSR accesses, what they ask for, and the timer.

use super::{Cpu, PHYSICAL_ADDRESS_BITS, Stop};
use crate::apic::{GeneralProtection, Now, Work};
use crate::arch::msr;
use crate::event::Detail;
use crate::mailbox::attention;

/// [`Cpu::apic_page_gpa`] of an APIC that is disabled or in x2APIC mode.
pub(super) const NO_APIC_PAGE: u64 = u64::MAX;

impl From<GeneralProtection> for Stop {
    fn from(_: GeneralProtection) -> Self {
        Stop::GP0
    }
}

impl Cpu {
    /// The present, for timers. Between boundaries it is that of the running block's start.
    pub(crate) fn now(&mut self) -> Now {
        Now { tsc: self.bus.tsc(self.retired), guest_offset: self.msrs.tsc_offset }
    }

    /// Does what an access to the APIC asks for.
    pub(crate) fn apic_work(&mut self, work: Work) {
        if work.window_changed {
            self.apic_page_gpa = self.apic.mmio_window().unwrap_or(NO_APIC_PAGE);
            // Translations to where the page was, and to where it is now, have changed their meaning.
            self.tlb.flush();
        }
        if work.identity_changed {
            self.bus.apic_changed(self.apic.identity());
        }
        if let Some(vector) = work.eoi_broadcast {
            self.bus.eoi_broadcast(vector);
        }
        if let Some(mut message) = work.ipi {
            let id = self.bus.new_cause();
            message.cause = id;
            self.report(id, Detail::IcrWrite { id, message });
            self.bus.send_ipi(message);
        }
        // Priorities, the timer or a self-IPI may have changed what is pending.
        self.stop_after = true;
    }

    /// A read from the APIC page.
    pub(crate) fn apic_mmio_read(&mut self, gpa: u64, size: u8) -> u64 {
        let now = self.now();
        self.apic.mmio_read((gpa & 0xfff) as u16, size, now)
    }

    pub(crate) fn apic_mmio_write(&mut self, gpa: u64, size: u8, value: u64) {
        let now = self.now();
        let work = self.apic.mmio_write((gpa & 0xfff) as u16, size, value, now);
        self.apic_work(work);
    }

    /// IA32_APIC_BASE, IA32_TSC_DEADLINE and the x2APIC range.
    pub(super) fn write_apic_msr(&mut self, address: u32, value: u64) -> Result<(), Stop> {
        let now = self.now();
        let work = match address {
            msr::IA32_APIC_BASE => self.apic.write_base(value, PHYSICAL_ADDRESS_BITS)?,
            msr::IA32_TSC_DEADLINE => self.apic.write_tsc_deadline(value, now),
            _ => self.apic.write_msr(address, value, now)?,
        };
        self.apic_work(work);
        Ok(())
    }

    /// Lets the timer expire, and moves what others posted into the IRR.
    pub(crate) fn update_apic(&mut self) {
        if self.mailbox.answer(attention::INTERRUPTS) != 0 {
            let (irr, level) = self.mailbox.take_interrupts();
            self.apic.post(irr, level);
        }
        let now = self.now();
        self.apic.advance(now);
    }

    /// The VM's TSC when the APIC timer is due.
    pub(crate) fn apic_deadline(&mut self) -> Option<u64> {
        let now = self.now();
        self.apic.next_deadline(now)
    }
}
