//! What other threads leave for a processor: INIT, SIPI and NMI in one atomic word, interrupts in an
//! atomic IRR, and the attention word that chained blocks poll.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

/// Causes travel with INIT, SIPI and NMI in the event word; it has room for their low bits, and the receiver
/// gets the whole id back from [`crate::bus::Bus::expand_cause`].
pub const CAUSE_BITS: u32 = 17;
const CAUSE_MASK: u64 = (1 << CAUSE_BITS) - 1;

const INIT: u64 = 1 << 0;
const SIPI: u64 = 1 << 1;
const NMI: u64 = 1 << 2;
/// The pending INIT arrived after the pending SIPI (R12 needs the order).
const INIT_AFTER_SIPI: u64 = 1 << 3;
const VECTOR_SHIFT: u32 = 4;
const INIT_CAUSE_SHIFT: u32 = 12;
const SIPI_CAUSE_SHIFT: u32 = INIT_CAUSE_SHIFT + CAUSE_BITS;
const NMI_CAUSE_SHIFT: u32 = SIPI_CAUSE_SHIFT + CAUSE_BITS;

/// Reasons to leave the chain of blocks, in [`Mailbox::attention`].
pub mod attention {
    /// The event word is not empty.
    pub const EVENTS: u32 = 1 << 0;
    /// Interrupts were posted, or the ExtINT line changed.
    pub const INTERRUPTS: u32 = 1 << 1;
    /// Leave `run` at the next instruction boundary.
    pub const STOP: u32 = 1 << 2;
    /// Another processor wants to be alone (`Bus::exclusive`).
    pub const EXCLUSIVE: u32 = 1 << 3;
}

#[derive(Debug, Default)]
pub struct Mailbox {
    attention: AtomicU32,
    events: AtomicU64,
    /// Posted interrupts, by vector; bit set in `level` too when it was level-triggered.
    irr: [AtomicU64; 4],
    level: [AtomicU64; 4],
    extint: AtomicBool,
}

/// What posting did, as the sender sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Posted {
    Latched,
    /// One was pending already; this one is gone.
    Coalesced,
    /// A pending SIPI was replaced (R12); the low bits of its cause.
    Overwrote {
        previous_cause_low: u32,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct PostedSipi {
    pub vector: u8,
    pub cause_low: u32,
}

/// The event word's contents.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Events {
    /// The low bits of the cause of a pending INIT.
    pub init: Option<u32>,
    pub sipi: Option<PostedSipi>,
    pub nmi: Option<u32>,
    pub init_after_sipi: bool,
}

impl Events {
    fn unpack(word: u64) -> Self {
        let cause = |shift: u32| ((word >> shift) & CAUSE_MASK) as u32;
        Self {
            init: (word & INIT != 0).then(|| cause(INIT_CAUSE_SHIFT)),
            sipi: (word & SIPI != 0)
                .then(|| PostedSipi { vector: (word >> VECTOR_SHIFT) as u8, cause_low: cause(SIPI_CAUSE_SHIFT) }),
            nmi: (word & NMI != 0).then(|| cause(NMI_CAUSE_SHIFT)),
            init_after_sipi: word & INIT_AFTER_SIPI != 0,
        }
    }

    fn pack(&self) -> u64 {
        let mut w = 0;
        if let Some(cause) = self.init {
            w = put_cause(w | INIT, INIT_CAUSE_SHIFT, cause.into());
        }
        if let Some(sipi) = self.sipi {
            w = put_cause(w | SIPI, SIPI_CAUSE_SHIFT, sipi.cause_low.into()) | u64::from(sipi.vector) << VECTOR_SHIFT;
        }
        if let Some(cause) = self.nmi {
            w = put_cause(w | NMI, NMI_CAUSE_SHIFT, cause.into());
        }
        w | if self.init_after_sipi { INIT_AFTER_SIPI } else { 0 }
    }

    pub fn is_empty(&self) -> bool {
        self.init.is_none() && self.sipi.is_none() && self.nmi.is_none()
    }
}

impl Mailbox {
    pub fn post_init(&self, cause: u64) -> Posted {
        self.post(|w| {
            // R12: an INIT overwrites the SIPI before it, also where it joins an INIT that is pending already.
            let w = if w & SIPI != 0 { w | INIT_AFTER_SIPI } else { w };
            if w & INIT != 0 {
                return (w, Posted::Coalesced);
            }
            (put_cause(w | INIT, INIT_CAUSE_SHIFT, cause), Posted::Latched)
        })
    }

    pub fn post_sipi(&self, vector: u8, cause: u64) -> Posted {
        self.post(|w| {
            let posted = if w & SIPI != 0 {
                Posted::Overwrote { previous_cause_low: ((w >> SIPI_CAUSE_SHIFT) & CAUSE_MASK) as u32 }
            } else {
                Posted::Latched
            };
            let w = w & !(0xff << VECTOR_SHIFT) & !INIT_AFTER_SIPI | u64::from(vector) << VECTOR_SHIFT;
            (put_cause(w | SIPI, SIPI_CAUSE_SHIFT, cause), posted)
        })
    }

    pub fn post_nmi(&self, cause: u64) -> Posted {
        self.post(|w| {
            if w & NMI != 0 {
                return (w, Posted::Coalesced);
            }
            (put_cause(w | NMI, NMI_CAUSE_SHIFT, cause), Posted::Latched)
        })
    }

    fn post(&self, change: impl Fn(u64) -> (u64, Posted)) -> Posted {
        let mut posted = Posted::Latched;
        let _ = self.events.fetch_update(Ordering::AcqRel, Ordering::Acquire, |w| {
            let (new, p) = change(w);
            posted = p;
            Some(new)
        });
        self.call(attention::EVENTS);
        posted
    }

    /// Takes what was posted. Only the processor's own thread calls this, at an instruction boundary.
    pub fn take_events(&self) -> Events {
        Events::unpack(self.events.swap(0, Ordering::AcqRel))
    }

    /// Looks without taking: reads are pure.
    pub fn peek_events(&self) -> Events {
        Events::unpack(self.events.load(Ordering::Acquire))
    }

    pub fn post_interrupt(&self, vector: u8, level: bool) {
        let (word, bit) = (usize::from(vector >> 6), 1u64 << (vector & 63));
        if level {
            self.level[word].fetch_or(bit, Ordering::AcqRel);
        } else {
            self.level[word].fetch_and(!bit, Ordering::AcqRel);
        }
        self.irr[word].fetch_or(bit, Ordering::AcqRel);
        self.call(attention::INTERRUPTS);
    }

    /// Takes the posted interrupts: (IRR bits, those that are level-triggered).
    pub fn take_interrupts(&self) -> ([u64; 4], [u64; 4]) {
        let irr = std::array::from_fn(|i| self.irr[i].swap(0, Ordering::AcqRel));
        (irr, std::array::from_fn(|i| self.level[i].load(Ordering::Acquire) & irr[i]))
    }

    /// As [`Self::take_interrupts`], without taking them.
    pub fn peek_interrupts(&self) -> ([u64; 4], [u64; 4]) {
        let irr = std::array::from_fn(|i| self.irr[i].load(Ordering::Acquire));
        (irr, std::array::from_fn(|i| self.level[i].load(Ordering::Acquire) & irr[i]))
    }

    /// Replaces what is posted, when a processor's state is restored.
    pub fn restore(&self, events: &Events, (irr, level): &([u64; 4], [u64; 4])) {
        self.events.store(events.pack(), Ordering::Release);
        for i in 0..4 {
            self.irr[i].store(irr[i], Ordering::Release);
            self.level[i].store(level[i], Ordering::Release);
        }
        self.call(attention::EVENTS | attention::INTERRUPTS);
    }

    /// The external interrupt controller's INTR line.
    pub fn set_extint(&self, asserted: bool) {
        self.extint.store(asserted, Ordering::Release);
        if asserted {
            self.call(attention::INTERRUPTS);
        }
    }

    pub fn extint(&self) -> bool {
        self.extint.load(Ordering::Acquire)
    }

    /// Asks the processor to look up from its blocks.
    pub fn call(&self, reason: u32) {
        self.attention.fetch_or(reason, Ordering::AcqRel);
    }

    /// Polled at each block: no ordering needed, the taking operations order what follows.
    #[inline(always)]
    pub fn attention(&self) -> u32 {
        self.attention.load(Ordering::Relaxed)
    }

    /// Takes back `reasons`; returns those that were set.
    pub fn answer(&self, reasons: u32) -> u32 {
        self.attention.fetch_and(!reasons, Ordering::AcqRel) & reasons
    }
}

fn put_cause(word: u64, shift: u32, cause: u64) -> u64 {
    word & !(CAUSE_MASK << shift) | (cause & CAUSE_MASK) << shift
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn r12_latest_sipi_vector_wins_and_names_the_one_it_replaced() {
        let m = Mailbox::default();
        assert_eq!(m.post_sipi(0x10, 7), Posted::Latched);
        assert_eq!(m.post_sipi(0x20, 8), Posted::Overwrote { previous_cause_low: 7 });
        assert_eq!(m.take_events().sipi, Some(PostedSipi { vector: 0x20, cause_low: 8 }));
        assert!(m.take_events().is_empty());
    }

    #[test]
    fn r12_order_of_init_and_sipi_is_kept() {
        let m = Mailbox::default();
        m.post_sipi(1, 1);
        m.post_init(2);
        assert!(m.peek_events().init_after_sipi);
        m.post_sipi(2, 3);
        assert!(!m.take_events().init_after_sipi);
        m.post_init(4);
        m.post_sipi(3, 5);
        let e = m.peek_events();
        assert!(!e.init_after_sipi && e.init == Some(4) && e.sipi.is_some());
        assert_eq!(m.post_init(6), Posted::Coalesced);
        assert!(m.take_events().init_after_sipi);
    }

    #[test]
    fn a_second_init_or_nmi_coalesces_and_keeps_the_first_cause() {
        let m = Mailbox::default();
        m.post_init(1);
        assert_eq!(m.post_init(2), Posted::Coalesced);
        m.post_nmi(3);
        assert_eq!(m.post_nmi(4), Posted::Coalesced);
        let e = m.take_events();
        assert_eq!((e.init, e.nmi), (Some(1), Some(3)));
    }

    #[test]
    fn causes_keep_their_low_bits_side_by_side() {
        let m = Mailbox::default();
        let max = CAUSE_MASK;
        m.post_init(max);
        m.post_sipi(0xff, 0);
        m.post_nmi(max);
        let e = m.take_events();
        assert_eq!(e.init, Some(max as u32));
        assert_eq!(e.sipi, Some(PostedSipi { vector: 0xff, cause_low: 0 }));
        assert_eq!(e.nmi, Some(max as u32));
    }
}
