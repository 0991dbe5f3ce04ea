//! Register access by MMIO (xAPIC) and by MSR (x2APIC).

use super::{GeneralProtection, LocalApic, Now, Work, icr};
use crate::arch::apic::timer_mode::TSC_DEADLINE;
use crate::arch::apic::{Icr, Lvt, esr, offset, svr};
use crate::arch::msr::{IA32_X2APIC_FIRST, IA32_X2APIC_ICR};
use crate::bus::{Delivery, Destination, IpiMessage};

/// Version 14H, six LVT entries, no EOI-broadcast suppression.
const VERSION: u32 = 0x0005_0014;

/// No register is at this offset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unimplemented;

const LVT_VECTOR: u32 = 0xff;
const LVT_DELIVERY: u32 = 0x700;
const LVT_STATUS: u32 = 1 << 12;
const LVT_LINT: u32 = 0xe000;
const LVT_REMOTE_IRR: u32 = 1 << 14;
const LVT_MASK: u32 = 1 << 16;
const LVT_TIMER_MODE: u32 = 3 << 17;

/// The bits of a register that exist; others are #GP in x2APIC mode, and ignored in xAPIC mode.
fn defined_bits(at: u16) -> u32 {
    match at {
        offset::TPR | offset::SELF_IPI => 0xff,
        offset::EOI | offset::ESR => 0,
        offset::SVR => 0xff | svr::ENABLED | svr::FOCUS_DISABLED,
        offset::LVT_TIMER => LVT_VECTOR | LVT_STATUS | LVT_MASK | LVT_TIMER_MODE,
        offset::LVT_THERMAL | offset::LVT_PERFORMANCE => LVT_VECTOR | LVT_DELIVERY | LVT_STATUS | LVT_MASK,
        offset::LVT_LINT0 | offset::LVT_LINT1 => LVT_VECTOR | LVT_DELIVERY | LVT_STATUS | LVT_LINT | LVT_MASK,
        offset::LVT_ERROR => LVT_VECTOR | LVT_STATUS | LVT_MASK,
        offset::DIVIDE => 0b1011,
        _ => u32::MAX,
    }
}

fn quarter(bits: &[u64; 4], at: u16, first: u16) -> u32 {
    let i = usize::from((at - first) >> 4 & 7);
    (bits[i / 2] >> (32 * (i % 2))) as u32
}

impl LocalApic {
    /// A load of `size` bytes at `at` in the APIC page. Loads that no 32-bit register holds read 0: the SDM leaves
    /// them undefined ("The Local APIC Block Diagram").
    pub fn mmio_read(&mut self, at: u16, size: u8, now: Now) -> u64 {
        let byte = u32::from(at & 0xf);
        if byte + u32::from(size) > 4 {
            return 0;
        }
        match self.read_register(at & 0xff0, now) {
            Ok(value) => u64::from(value >> (8 * byte)) & ((1u64 << (8 * u32::from(size))) - 1),
            Err(Unimplemented) => {
                self.error(esr::ILLEGAL_REGISTER);
                0
            }
        }
    }

    /// A store in the APIC page; only aligned 32-bit ones do anything.
    pub fn mmio_write(&mut self, at: u16, size: u8, value: u64, now: Now) -> Work {
        if at & 0xf != 0 || size != 4 {
            return Work::default();
        }
        let (at, value) = (at & 0xff0, value as u32);
        match at {
            offset::LDR => {
                self.state.xapic_ldr = value & 0xff00_0000;
                Work { identity_changed: true, ..Work::default() }
            }
            offset::DFR => {
                self.state.dfr = value | 0x0fff_ffff;
                Work { identity_changed: true, ..Work::default() }
            }
            offset::ICR_HIGH => {
                self.state.icr.set_destination(value & 0xff00_0000);
                Work::default()
            }
            offset::ICR_LOW => {
                let icr = u64::from(value) & !(Icr::X2APIC_RESERVED | Icr::DELIVERY_STATUS);
                self.send(Icr::from(u64::from(self.state.icr.destination()) << 32 | icr))
            }
            // The ID is the processor's ("Local APIC ID": whether software can change it is model specific).
            offset::ID | offset::VERSION | offset::APR | offset::PPR | offset::RRD | offset::CURRENT_COUNT => {
                Work::default()
            }
            offset::ISR_FIRST..=offset::IRR_LAST => Work::default(),
            _ => self.write_register(at, value & defined_bits(at), now).unwrap_or_else(|Unimplemented| {
                self.error(esr::ILLEGAL_REGISTER);
                Work::default()
            }),
        }
    }

    /// RDMSR of 0x800..=0x8ff; #GP outside x2APIC mode ("x2APIC Register Address Space").
    pub fn read_msr(&self, msr: u32, now: Now) -> Result<u64, GeneralProtection> {
        if !self.x2apic() {
            return Err(GeneralProtection);
        }
        if msr == IA32_X2APIC_ICR {
            return Ok(self.state.icr.into());
        }
        match x2apic_offset(msr)? {
            offset::DFR | offset::ICR_HIGH | offset::EOI | offset::SELF_IPI | offset::APR | offset::RRD => {
                Err(GeneralProtection)
            }
            at => self.read_register(at, now).map(u64::from).map_err(|Unimplemented| GeneralProtection),
        }
    }

    /// WRMSR of 0x800..=0x8ff.
    pub fn write_msr(&mut self, msr: u32, value: u64, now: Now) -> Result<Work, GeneralProtection> {
        if !self.x2apic() {
            return Err(GeneralProtection);
        }
        if msr == IA32_X2APIC_ICR {
            if value & Icr::X2APIC_RESERVED != 0 {
                return Err(GeneralProtection);
            }
            return Ok(self.send(Icr::from(value & !Icr::DELIVERY_STATUS)));
        }
        let at = x2apic_offset(msr)?;
        let low = u32::try_from(value).map_err(|_| GeneralProtection)?;
        let writable = matches!(
            at,
            offset::TPR | offset::EOI | offset::SVR | offset::ESR | offset::LVT_TIMER
                ..=offset::INITIAL_COUNT | offset::DIVIDE | offset::SELF_IPI
        );
        if !writable || low & !defined_bits(at) != 0 {
            return Err(GeneralProtection);
        }
        if at == offset::SELF_IPI {
            let message = IpiMessage {
                delivery: Delivery::Fixed,
                vector: low as u8,
                destination: Destination::SelfOnly,
                level: false,
                cause: 0,
            };
            return Ok(if message.vector < 16 {
                self.error(esr::SEND_ILLEGAL_VECTOR);
                Work::default()
            } else {
                self.dispatch(message)
            });
        }
        self.write_register(at, low, now).map_err(|Unimplemented| GeneralProtection)
    }

    /// IA32_TSC_DEADLINE, which is there in every mode ("TSC-Deadline Mode").
    pub fn tsc_deadline(&self, now: Now) -> u64 {
        self.state.read_tsc_deadline(now)
    }

    pub fn write_tsc_deadline(&mut self, deadline_guest_tsc: u64, now: Now) -> Work {
        self.advance(now);
        self.state.set_tsc_deadline(deadline_guest_tsc);
        Work { deadline_changed: true, ..Work::default() }
    }

    /// Registers that both modes read alike.
    fn read_register(&self, at: u16, now: Now) -> Result<u32, Unimplemented> {
        let s = &self.state;
        Ok(match at {
            offset::ID if self.x2apic() => s.id,
            offset::ID => s.id << 24,
            offset::VERSION => VERSION,
            offset::TPR => s.tpr,
            offset::PPR => u32::from(self.ppr()),
            // Not supported any more, and write-only: nothing to see, but no error either.
            offset::APR | offset::RRD | offset::EOI => 0,
            offset::LDR => s.ldr(),
            offset::DFR => s.dfr,
            offset::SVR => s.svr,
            offset::ISR_FIRST..=offset::ISR_LAST => quarter(&s.isr, at, offset::ISR_FIRST),
            offset::TMR_FIRST..=offset::TMR_LAST => quarter(&s.tmr, at, offset::TMR_FIRST),
            offset::IRR_FIRST..=offset::IRR_LAST => quarter(&s.irr, at, offset::IRR_FIRST),
            offset::ESR => s.esr,
            offset::ICR_LOW => u64::from(s.icr) as u32,
            offset::ICR_HIGH => s.icr.destination(),
            offset::LVT_TIMER => s.lvt_timer.into(),
            offset::LVT_THERMAL => s.lvt_thermal.into(),
            offset::LVT_PERFORMANCE => s.lvt_performance.into(),
            offset::LVT_LINT0 => s.lvt_lint0.into(),
            offset::LVT_LINT1 => s.lvt_lint1.into(),
            offset::LVT_ERROR => s.lvt_error.into(),
            offset::INITIAL_COUNT => s.initial_count,
            offset::CURRENT_COUNT => s.current_count(now),
            offset::DIVIDE => s.divide,
            _ => return Err(Unimplemented),
        })
    }

    /// Registers that both modes write alike; reserved bits are dealt with.
    fn write_register(&mut self, at: u16, value: u32, now: Now) -> Result<Work, Unimplemented> {
        let mut work = Work::default();
        match at {
            offset::TPR => self.set_tpr(value),
            offset::EOI => return Ok(self.eoi()),
            offset::SVR => {
                // Timer interrupts up to now are not lost to a mask that comes after them.
                self.advance(now);
                let identity = self.identity();
                self.state.svr = value;
                if !self.state.software_enabled() {
                    self.state.lvts_mut().into_iter().for_each(|lvt| lvt.set_masked(true));
                }
                work.identity_changed = identity != self.identity();
                work.deadline_changed = true;
            }
            // A write latches the errors since the last one, and arms the error interrupt again.
            offset::ESR => self.state.esr = std::mem::take(&mut self.state.esr_pending),
            offset::LVT_TIMER => {
                self.advance(now);
                let lvt = self.lvt(value);
                // A change to or from TSC-deadline mode disarms the timer ("TSC-Deadline Mode").
                if self.state.deadline_mode() != (lvt.timer_mode() == TSC_DEADLINE) {
                    self.state.initial_count = 0;
                    self.state.countdown = None;
                    self.state.tsc_deadline = 0;
                }
                self.state.lvt_timer = lvt;
                work.deadline_changed = true;
            }
            offset::LVT_THERMAL => self.state.lvt_thermal = self.lvt(value),
            offset::LVT_PERFORMANCE => self.state.lvt_performance = self.lvt(value),
            offset::LVT_LINT0 => self.state.lvt_lint0 = self.lvt(value),
            offset::LVT_LINT1 => self.state.lvt_lint1 = self.lvt(value),
            offset::LVT_ERROR => self.state.lvt_error = self.lvt(value),
            offset::INITIAL_COUNT => {
                self.advance(now);
                self.state.set_initial_count(value, now);
                work.deadline_changed = true;
            }
            offset::DIVIDE => {
                self.advance(now);
                self.state.set_divide(value, now);
                work.deadline_changed = true;
            }
            _ => return Err(Unimplemented),
        }
        Ok(work)
    }

    /// While the APIC is software-disabled the mask bits stay set.
    fn lvt(&self, value: u32) -> Lvt {
        let lvt = Lvt::from(value & !(LVT_STATUS | LVT_REMOTE_IRR));
        if self.state.software_enabled() { lvt } else { lvt.with_masked(true) }
    }

    fn send(&mut self, icr: Icr) -> Work {
        self.state.icr = icr;
        match icr::decode(icr, self.x2apic()) {
            icr::Sent::Message(message) => self.dispatch(message),
            icr::Sent::IllegalVector => {
                self.error(esr::SEND_ILLEGAL_VECTOR);
                Work::default()
            }
            icr::Sent::Nothing => Work::default(),
        }
    }

    fn dispatch(&mut self, message: IpiMessage) -> Work {
        if message.destination == Destination::SelfOnly && message.delivery == Delivery::Fixed {
            self.accept(message.vector, false);
            return Work::default();
        }
        Work { ipi: Some(message), ..Work::default() }
    }
}

fn x2apic_offset(msr: u32) -> Result<u16, GeneralProtection> {
    match msr.checked_sub(IA32_X2APIC_FIRST) {
        Some(i @ 0..=0x3f) => Ok((i as u16) << 4),
        _ => Err(GeneralProtection),
    }
}
