//! The registers: also what a snapshot holds.

use serde::{Deserialize, Serialize};

use super::identity::x2apic_ldr;
use super::timer::Countdown;
use crate::arch::apic::{DEFAULT_BASE_GPA, Icr, Lvt, base, svr};

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApicState {
    /// The x2APIC ID; xAPIC mode shows its low 8 bits.
    pub id: u32,
    /// IA32_APIC_BASE.
    pub base: u64,
    pub tpr: u32,
    /// xAPIC mode only: in x2APIC mode it follows from the ID.
    pub xapic_ldr: u32,
    pub dfr: u32,
    pub svr: u32,
    pub isr: [u64; 4],
    pub tmr: [u64; 4],
    pub irr: [u64; 4],
    /// As the guest reads it.
    pub esr: u32,
    /// Errors since the ESR was written.
    pub esr_pending: u32,
    pub icr: Icr,
    pub lvt_timer: Lvt,
    pub lvt_thermal: Lvt,
    pub lvt_performance: Lvt,
    pub lvt_lint0: Lvt,
    pub lvt_lint1: Lvt,
    pub lvt_error: Lvt,
    pub initial_count: u32,
    pub divide: u32,
    /// The count-down while it runs.
    pub countdown: Option<Countdown>,
    /// IA32_TSC_DEADLINE in the processor's own TSC; 0 is disarmed.
    pub tsc_deadline: u64,
}

/// A saved state that no local APIC can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidApicState {
    #[error("IA32_APIC_BASE {0:#x} selects x2APIC mode without enabling the APIC")]
    Mode(u64),
    #[error("IRR or ISR has a vector below 16")]
    Vector,
    #[error("the timer counts down from 0")]
    Countdown,
}

impl ApicState {
    /// SDM 3, "Local APIC State After Power-Up or Reset".
    pub(super) fn reset(id: u32, bsp: bool) -> Self {
        let masked = Lvt::new().with_masked(true);
        Self {
            id,
            base: DEFAULT_BASE_GPA | base::EN | if bsp { base::BSP } else { 0 },
            tpr: 0,
            xapic_ldr: 0,
            dfr: 0xffff_ffff,
            svr: 0xff,
            isr: [0; 4],
            tmr: [0; 4],
            irr: [0; 4],
            esr: 0,
            esr_pending: 0,
            icr: Icr::new(),
            lvt_timer: masked,
            lvt_thermal: masked,
            lvt_performance: masked,
            lvt_lint0: masked,
            lvt_lint1: masked,
            lvt_error: masked,
            initial_count: 0,
            divide: 0,
            countdown: None,
            tsc_deadline: 0,
        }
    }

    pub(super) fn validate(&self) -> Result<(), InvalidApicState> {
        if self.base & base::EXTD != 0 && self.base & base::EN == 0 {
            return Err(InvalidApicState::Mode(self.base));
        }
        if (self.irr[0] | self.isr[0]) & 0xffff != 0 {
            return Err(InvalidApicState::Vector);
        }
        if self.countdown.is_some() && self.initial_count == 0 {
            return Err(InvalidApicState::Countdown);
        }
        Ok(())
    }

    pub(super) fn x2apic(&self) -> bool {
        self.base & (base::EN | base::EXTD) == base::EN | base::EXTD
    }

    pub(super) fn software_enabled(&self) -> bool {
        self.svr & svr::ENABLED != 0
    }

    pub(super) fn ldr(&self) -> u32 {
        if self.x2apic() { x2apic_ldr(self.id) } else { self.xapic_ldr }
    }

    pub(super) fn lvts_mut(&mut self) -> [&mut Lvt; 6] {
        [
            &mut self.lvt_timer,
            &mut self.lvt_thermal,
            &mut self.lvt_performance,
            &mut self.lvt_lint0,
            &mut self.lvt_lint1,
            &mut self.lvt_error,
        ]
    }
}
