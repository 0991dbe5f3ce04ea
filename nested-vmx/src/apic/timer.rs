//! The APIC timer (SDM 3, "APIC Timer"): it counts at the core crystal clock that CPUID.15H reports, divided.

use super::{ApicState, LocalApic};
use crate::arch::apic::timer_mode;

/// CPUID.15H: TSC ticks in one tick of the core crystal clock (25 MHz).
pub const TSC_TICKS_PER_CRYSTAL_TICK: u64 = 40;
pub const CRYSTAL_HZ: u64 = crate::cpu::TSC_HZ / TSC_TICKS_PER_CRYSTAL_TICK;

/// The present, in the VM's TSC ([`crate::bus::Bus::tsc`]).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Now {
    pub tsc: u64,
    /// What this processor's TSC adds to the VM's (wrapping): deadlines are in the processor's own TSC.
    pub guest_offset: u64,
}

impl Now {
    pub(super) fn guest_tsc(self) -> u64 {
        self.tsc.wrapping_add(self.guest_offset)
    }
}

/// The count-down timer while it runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Countdown {
    /// The VM's TSC when the initial count was loaded, last.
    pub start_tsc: u64,
}

impl ApicState {
    fn tick_tsc(&self) -> u64 {
        // Divide configuration: bits 3,1,0 are 0..=7 for 2, 4, .. 128, 1.
        let code = (self.divide & 0b11) | (self.divide >> 1 & 0b100);
        TSC_TICKS_PER_CRYSTAL_TICK << ((code + 1) & 7)
    }

    fn period_tsc(&self) -> u64 {
        u64::from(self.initial_count) * self.tick_tsc()
    }

    pub(super) fn deadline_mode(&self) -> bool {
        self.lvt_timer.timer_mode() == timer_mode::TSC_DEADLINE
    }

    fn periodic(&self) -> bool {
        self.lvt_timer.timer_mode() == timer_mode::PERIODIC
    }

    pub(super) fn current_count(&self, now: Now) -> u32 {
        let Some(Countdown { start_tsc }) = self.countdown else { return 0 };
        let ticks = now.tsc.saturating_sub(start_tsc) / self.tick_tsc();
        let initial = u64::from(self.initial_count);
        let ticks = if self.periodic() { ticks % initial.max(1) } else { ticks.min(initial) };
        (initial - ticks) as u32
    }

    /// IA32_TSC_DEADLINE reads 0 in the other modes and when it has passed.
    pub(super) fn read_tsc_deadline(&self, now: Now) -> u64 {
        if self.deadline_mode() && self.tsc_deadline > now.guest_tsc() { self.tsc_deadline } else { 0 }
    }

    /// The VM's TSC when the timer expires next, masked or not.
    fn expiry(&self, now: Now) -> Option<u64> {
        if self.tsc_deadline != 0 {
            return Some(now.tsc.saturating_add(self.tsc_deadline.saturating_sub(now.guest_tsc())));
        }
        self.countdown.map(|c| c.start_tsc.saturating_add(self.period_tsc()))
    }

    pub(super) fn set_initial_count(&mut self, count: u32, now: Now) {
        if self.deadline_mode() {
            return;
        }
        self.initial_count = count;
        self.countdown = (count != 0).then_some(Countdown { start_tsc: now.tsc });
    }

    pub(super) fn set_tsc_deadline(&mut self, deadline_guest_tsc: u64) {
        if self.deadline_mode() {
            self.tsc_deadline = deadline_guest_tsc;
        }
    }

    /// A running count goes on from where it is, at the new rate.
    pub(super) fn set_divide(&mut self, divide: u32, now: Now) {
        let ticks = self.countdown.map_or(0, |c| now.tsc.saturating_sub(c.start_tsc) / self.tick_tsc());
        self.divide = divide & 0b1011;
        let elapsed = ticks.saturating_mul(self.tick_tsc());
        if let Some(c) = &mut self.countdown {
            c.start_tsc = now.tsc.saturating_sub(elapsed);
        }
    }
}

impl LocalApic {
    /// Takes what expired up to `now`. Expirations that the guest had no chance to see between coalesce, as in
    /// an IRR.
    pub fn advance(&mut self, now: Now) {
        let Some(expiry) = self.state.expiry(now).filter(|&e| e <= now.tsc) else { return };
        let s = &mut self.state;
        if s.tsc_deadline != 0 {
            s.tsc_deadline = 0;
        } else if s.periodic() {
            // The period is not 0: a count of 0 does not run.
            let period = s.period_tsc().max(1);
            s.countdown = Some(Countdown { start_tsc: expiry + (now.tsc - expiry) / period * period });
        } else {
            s.countdown = None;
        }
        let lvt = s.lvt_timer;
        if !lvt.masked() {
            self.accept(lvt.vector(), false);
        }
    }

    /// The VM's TSC when [`Self::advance`] has to be called; `None` when the timer cannot interrupt.
    pub fn next_deadline(&self, now: Now) -> Option<u64> {
        if self.state.lvt_timer.masked() { None } else { self.state.expiry(now) }
    }
}
