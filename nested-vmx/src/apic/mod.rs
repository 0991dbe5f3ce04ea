//! The local APIC (xAPIC and x2APIC): a pure state machine. It never acts on anything else: what an access asks
//! of the rest of the machine comes back as [`Work`].
//!
//! Only the processor's own thread touches it. What other threads send arrives in the mailbox, and the processor
//! hands it over with [`LocalApic::post`].

mod access;
mod base;
mod icr;
mod identity;
mod state;
mod timer;

#[cfg(test)]
mod tests;

pub use access::Unimplemented;
pub use identity::{ApicIdentity, Sender, arbitrate_lowest_priority};
pub use state::{ApicState, InvalidApicState};
pub use timer::{CRYSTAL_HZ, Countdown, Now, TSC_TICKS_PER_CRYSTAL_TICK};

use crate::arch::apic::{delivery, esr, svr};
use crate::bus::IpiMessage;

/// What an access asks for. The cause of a message is left 0: the processor gives it one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[must_use]
pub struct Work {
    /// To send to other processors, or to this one by its ID. What a SELF IPI or the self shorthand sends is in the
    /// IRR already.
    pub ipi: Option<IpiMessage>,
    /// A level-triggered vector reached EOI.
    pub eoi_broadcast: Option<u8>,
    /// Publish [`LocalApic::identity`].
    pub identity_changed: bool,
    /// The page at [`LocalApic::mmio_window`] moved, came or went.
    pub window_changed: bool,
    /// Ask for [`LocalApic::next_deadline`] again.
    pub deadline_changed: bool,
}

/// The access raises #GP(0) and changes nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GeneralProtection;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocalApic {
    state: ApicState,
    /// The vector that [`Self::pending`] answers, 0 for none: asked at each instruction boundary that looks for
    /// events, so it is worked out when something changes instead.
    deliverable: u8,
}

/// The highest vector set.
fn highest(bits: &[u64; 4]) -> u8 {
    for (i, word) in bits.iter().enumerate().rev() {
        if *word != 0 {
            return (i as u32 * 64 + 63 - word.leading_zeros()) as u8;
        }
    }
    0
}

fn word_and_bit(vector: u8) -> (usize, u64) {
    (usize::from(vector >> 6), 1 << (vector & 63))
}

impl LocalApic {
    /// In the state that RESET leaves. The ID stays for the life of the processor.
    pub fn new(id: u32, bsp: bool) -> Self {
        Self { state: ApicState::reset(id, bsp), deliverable: 0 }
    }

    pub fn reset(&mut self, bsp: bool) {
        *self = Self::new(self.state.id, bsp);
    }

    /// INIT keeps IA32_APIC_BASE, so the mode and BSP, and the ID; all else is as after RESET (R21; SDM 3, "Local
    /// APIC State After It Receives an INIT-Deassert IPI", "x2APIC States").
    pub fn init(&mut self) {
        self.clear_registers();
    }

    fn clear_registers(&mut self) {
        let base = self.state.base;
        self.state = ApicState { base, ..ApicState::reset(self.state.id, false) };
        self.refresh();
    }

    /// What firmware leaves on the bootstrap processor, for boot protocols that start after it: software-enabled,
    /// external interrupts on LINT0, NMI on LINT1 (MP specification, "Virtual Wire Mode").
    pub fn set_virtual_wire(&mut self) {
        self.state.svr |= svr::ENABLED;
        self.state.lvt_lint0 = self.state.lvt_lint0.with_masked(false).with_delivery(delivery::EXT_INT);
        self.state.lvt_lint1 = self.state.lvt_lint1.with_masked(false).with_delivery(delivery::NMI);
    }

    pub fn state(&self) -> &ApicState {
        &self.state
    }

    pub fn restore(state: &ApicState) -> Result<Self, InvalidApicState> {
        state.validate()?;
        let mut apic = Self { state: state.clone(), deliverable: 0 };
        apic.refresh();
        Ok(apic)
    }

    pub fn identity(&self) -> ApicIdentity {
        ApicIdentity {
            id: self.state.id,
            ldr: self.state.ldr(),
            flat: self.state.dfr >> 28 == 0xf,
            x2apic: self.x2apic(),
            enabled: self.enabled(),
            software_enabled: self.enabled() && self.state.software_enabled(),
        }
    }

    /// The highest-priority interrupt that the processor priority lets through. RFLAGS.IF and blocking are the
    /// processor's business.
    #[inline(always)]
    pub fn pending(&self) -> Option<u8> {
        (self.deliverable != 0).then_some(self.deliverable)
    }

    /// Moves the pending interrupt into service and returns its vector.
    pub fn acknowledge(&mut self) -> Option<u8> {
        let vector = self.pending()?;
        let (word, bit) = word_and_bit(vector);
        self.state.irr[word] &= !bit;
        self.state.isr[word] |= bit;
        self.refresh();
        Some(vector)
    }

    /// Whether the external interrupt controller's INTR reaches the processor: through LINT0, or directly when the
    /// APIC is globally disabled (SDM 3, "Enabling or Disabling the Local APIC").
    pub fn accepts_extint(&self) -> bool {
        let lint0 = self.state.lvt_lint0;
        !self.enabled() || !lint0.masked() && lint0.delivery() == delivery::EXT_INT
    }

    /// Takes over what [`crate::mailbox::Mailbox::take_interrupts`] returned.
    pub fn post(&mut self, irr: [u64; 4], level: [u64; 4]) {
        if irr[0] & 0xffff != 0 {
            self.error(esr::RECEIVED_ILLEGAL_VECTOR);
        }
        if !self.takes_interrupts() {
            return;
        }
        for i in 0..4 {
            let new = if i == 0 { irr[0] & !0xffff } else { irr[i] };
            self.state.irr[i] |= new;
            self.state.tmr[i] = self.state.tmr[i] & !new | level[i] & new;
        }
        self.refresh();
    }

    /// Accepts one interrupt (SDM 3, "Interrupt Acceptance for Fixed Interrupts").
    pub fn accept(&mut self, vector: u8, level: bool) {
        if vector < 16 {
            self.error(esr::RECEIVED_ILLEGAL_VECTOR);
            return;
        }
        if !self.takes_interrupts() {
            return;
        }
        let (word, bit) = word_and_bit(vector);
        self.state.irr[word] |= bit;
        if level {
            self.state.tmr[word] |= bit;
        } else {
            self.state.tmr[word] &= !bit;
        }
        self.refresh();
    }

    /// A software-disabled APIC takes no new interrupts, but keeps those it has (SDM 3, "Local APIC State After It
    /// Has Been Software Disabled").
    fn takes_interrupts(&self) -> bool {
        self.enabled() && self.state.software_enabled()
    }

    /// Task priority, as CR8 sees it.
    #[inline(always)]
    pub fn cr8(&self) -> u8 {
        (self.state.tpr >> 4) as u8
    }

    /// MOV to CR8; the value is 0..=15, checked by the processor.
    pub fn set_cr8(&mut self, priority: u8) {
        self.set_tpr(u32::from(priority & 0xf) << 4);
    }

    pub fn tpr(&self) -> u8 {
        self.state.tpr as u8
    }

    pub fn set_tpr(&mut self, tpr: u32) {
        self.state.tpr = tpr & 0xff;
        self.refresh();
    }

    /// Processor priority (SDM 3, "Task and Processor Priorities").
    pub fn ppr(&self) -> u8 {
        let (tpr, isrv) = (self.state.tpr as u8, highest(&self.state.isr));
        if tpr >> 4 >= isrv >> 4 { tpr } else { isrv & 0xf0 }
    }

    /// The vector in service with the highest priority.
    pub fn in_service(&self) -> Option<u8> {
        Some(highest(&self.state.isr)).filter(|&v| v != 0)
    }

    pub(crate) fn eoi(&mut self) -> Work {
        let mut work = Work::default();
        if let Some(vector) = self.in_service() {
            let (word, bit) = word_and_bit(vector);
            self.state.isr[word] &= !bit;
            work.eoi_broadcast = (self.state.tmr[word] & bit != 0).then_some(vector);
            self.refresh();
        }
        work
    }

    /// Records errors; the first since the ESR was written interrupts (SDM 3, "Error Handling").
    fn error(&mut self, bits: u32) {
        let armed = self.state.esr_pending == 0;
        self.state.esr_pending |= bits;
        let lvt = self.state.lvt_error;
        if !armed || lvt.masked() {
            return;
        }
        if lvt.vector() < 16 {
            self.state.esr_pending |= esr::RECEIVED_ILLEGAL_VECTOR;
        } else {
            self.accept(lvt.vector(), false);
        }
    }

    fn refresh(&mut self) {
        let vector = highest(&self.state.irr);
        self.deliverable = if vector >> 4 > self.ppr() >> 4 { vector } else { 0 };
    }
}
