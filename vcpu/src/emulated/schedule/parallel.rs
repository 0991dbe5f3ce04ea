//! The virtual clock with all vCPUs running at once: each counts its own time, and none runs far ahead.
//!
//! The hot path reads the others' times and writes its own; a lock is taken only where a vCPU becomes idle or
//! stops being so. Idle vCPUs hold nobody back. When all are idle, time skips to the next deadline.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};

use super::{NEVER, Schedule, TIGHT_SPAN, TIGHT_WINDOW, Turn, WINDOW, Wakes};
use crate::thread::lock;

/// A vCPU ahead of its window looks again this often before it sleeps: on CPUs of their own, vCPUs are apart by
/// less than a sleep costs.
const SPINS: u32 = 200;

#[repr(align(128))]
struct Slot {
    now: AtomicU64,
    idle: AtomicBool,
    /// Something was left since it last began to run.
    poked: AtomicBool,
    /// When an idle one has to run again.
    deadline: AtomicU64,
    /// The last [`Parallel::epoch`] whose beginning it has seen at a boundary.
    seen: AtomicU64,
    /// The epoch that all others must have seen before this one goes on; 0: none.
    meet: AtomicU64,
}

pub struct Parallel {
    wakes: Wakes,
    slots: Vec<Slot>,
    /// The vCPUs, one bit each, that sleep until others have come closer.
    waiting: AtomicU64,
    /// The earliest deadline of an idle vCPU.
    next_deadline: AtomicU64,
    /// Counts INITs and SIPIs sent.
    epoch: AtomicU64,
    tight_until: AtomicU64,
    /// Held while a vCPU becomes idle or stops being so.
    idling: Mutex<()>,
}

impl Parallel {
    pub fn new(wakes: Wakes) -> Self {
        let slot = |_| Slot {
            now: AtomicU64::new(0),
            idle: AtomicBool::new(false),
            poked: AtomicBool::new(false),
            deadline: AtomicU64::new(NEVER),
            seen: AtomicU64::new(0),
            meet: AtomicU64::new(0),
        };
        Self {
            slots: wakes.iter().map(slot).collect(),
            wakes,
            waiting: AtomicU64::new(0),
            next_deadline: AtomicU64::new(NEVER),
            epoch: AtomicU64::new(0),
            tight_until: AtomicU64::new(0),
            idling: Mutex::default(),
        }
    }

    fn running(&self, but: usize) -> impl Iterator<Item = (usize, &Slot)> {
        self.slots.iter().enumerate().filter(move |(j, s)| *j != but && !s.idle.load(SeqCst))
    }

    /// It stands at a boundary until others come closer.
    fn is_waiting(&self, j: usize) -> bool {
        self.waiting.load(SeqCst) & 1 << j != 0
    }

    fn slowest(&self, but: usize) -> u64 {
        self.running(but).map(|(_, s)| s.now.load(SeqCst)).min().unwrap_or(NEVER)
    }

    fn fastest(&self, but: usize) -> u64 {
        self.running(but).map(|(_, s)| s.now.load(SeqCst)).max().unwrap_or(0)
    }

    /// How far `i`, at `now`, may run; `now` or less when it has to wait. `slack`: how much it needs to go on.
    fn limit(&self, i: usize, now: u64, slack: u64) -> u64 {
        let meet = self.slots[i].meet.load(SeqCst);
        if meet != 0 && self.running(i).any(|(j, s)| s.seen.load(SeqCst) < meet && !self.is_waiting(j)) {
            return 0;
        }
        let window = self.window(now);
        let limit = self.slowest(i).saturating_add(window);
        if limit.saturating_sub(now) > window / 2 * slack { limit } else { 0 }
    }

    fn window(&self, now: u64) -> u64 {
        if now < self.tight_until.load(SeqCst) { TIGHT_WINDOW } else { WINDOW }
    }

    /// Wakes those that waited for what has just changed. One that slept is let go only when it can run for a
    /// while.
    fn release(&self, me: usize) {
        let mut waiting = self.waiting.load(SeqCst);
        while waiting != 0 {
            let j = waiting.trailing_zeros() as usize;
            waiting &= waiting - 1;
            if j != me && self.limit(j, self.slots[j].now.load(SeqCst), 1) != 0 {
                self.waiting.fetch_and(!(1 << j), SeqCst);
                self.wakes[j].notify();
            }
        }
    }

    /// With `idling` held: vCPU `i` runs again, not before `at`.
    fn unidle(&self, i: usize, at: u64) {
        self.slots[i].deadline.store(NEVER, SeqCst);
        self.slots[i].now.fetch_max(at, SeqCst);
        self.slots[i].idle.store(false, SeqCst);
        self.find_deadline();
    }

    fn find_deadline(&self) {
        let next = self.slots.iter().map(|s| s.deadline.load(SeqCst)).min().unwrap_or(NEVER);
        self.next_deadline.store(next, SeqCst);
    }

    /// Wakes the idle vCPUs whose deadline is not after `now`.
    fn expire(&self, now: u64) {
        let _guard = lock(&self.idling);
        for (i, slot) in self.slots.iter().enumerate() {
            let deadline = slot.deadline.load(SeqCst);
            if deadline <= now {
                self.unidle(i, deadline);
                self.wakes[i].notify();
            }
        }
    }
}

impl Schedule for Parallel {
    fn turn(&self, i: usize, now: u64, _ran: u64) -> Turn {
        let slot = &self.slots[i];
        // Before the processor looks into its mailbox: what is left later is seen by `idle`.
        slot.poked.store(false, SeqCst);
        if slot.idle.load(SeqCst) {
            // Its thread woke up for something else. It may find something to run that it was not woken for yet,
            // and must not run in a past that the others have left.
            let _guard = lock(&self.idling);
            if slot.idle.load(SeqCst) {
                self.unidle(i, self.fastest(i));
            }
        }
        let mut now = now.max(slot.now.load(SeqCst));
        slot.now.store(now, SeqCst);
        slot.seen.store(self.epoch.load(SeqCst), SeqCst);
        self.waiting.fetch_and(!(1 << i), SeqCst);
        if self.next_deadline.load(SeqCst) <= now {
            self.expire(now);
        }
        self.release(i);

        let mut limit = self.limit(i, now, 0);
        for _ in 0..SPINS {
            if limit != 0 {
                break;
            }
            std::hint::spin_loop();
            limit = self.limit(i, now, 0);
        }
        if limit == 0 {
            self.waiting.fetch_or(1 << i, SeqCst);
            limit = self.limit(i, now, 1);
            if limit == 0 {
                // One that waits for all to stand still may have waited for this one.
                self.release(i);
                return Turn::Wait;
            }
            self.waiting.fetch_and(!(1 << i), SeqCst);
        }
        if slot.meet.swap(0, SeqCst) != 0 {
            // All have stood still since its INIT or SIPI: from here they go together.
            now = now.max(self.fastest(i));
            slot.now.store(now, SeqCst);
            limit = limit.max(now.saturating_add(1));
        }
        let quantum = self.window(now) / 4;
        let deadline = self.next_deadline.load(SeqCst);
        let budget = quantum.min(limit.saturating_sub(now)).min(deadline.saturating_sub(now)).max(1);
        Turn::Run { now, budget }
    }

    fn idle(&self, i: usize, now: u64, ran: u64, deadline: Option<u64>) -> Turn {
        let slot = &self.slots[i];
        {
            let _guard = lock(&self.idling);
            if !slot.poked.load(SeqCst) {
                slot.now.fetch_max(now, SeqCst);
                slot.deadline.store(deadline.unwrap_or(NEVER), SeqCst);
                slot.meet.store(0, SeqCst);
                slot.idle.store(true, SeqCst);
                self.find_deadline();
                if self.slots.iter().all(|s| s.idle.load(SeqCst)) {
                    // Nobody runs: skip to the next deadline, if there is one.
                    let next = self.slots.iter().enumerate().min_by_key(|(_, s)| s.deadline.load(SeqCst));
                    if let Some((j, deadline)) = next.map(|(j, s)| (j, s.deadline.load(SeqCst)))
                        && deadline != NEVER
                    {
                        self.unidle(j, deadline);
                        self.wakes[j].notify();
                    }
                }
            }
        }
        if slot.idle.load(SeqCst) {
            self.release(i);
            return Turn::Sleep { until: None };
        }
        self.turn(i, now, ran)
    }

    fn rest(&self, i: usize, now: u64, _ran: u64) {
        let slot = &self.slots[i];
        slot.now.fetch_max(now, SeqCst);
        slot.seen.store(self.epoch.load(SeqCst), SeqCst);
        self.release(i);
    }

    fn wake(&self, i: usize, at: Option<u64>) {
        let slot = &self.slots[i];
        {
            let _guard = lock(&self.idling);
            slot.poked.store(true, SeqCst);
            if !slot.idle.load(SeqCst) {
                return;
            }
            self.unidle(i, at.unwrap_or_else(|| self.now()));
        }
        self.wakes[i].notify();
    }

    fn tighten(&self, i: usize, now: u64) {
        if self.slots.len() > 1 {
            self.tight_until.fetch_max(now.saturating_add(TIGHT_SPAN), SeqCst);
            let epoch = self.epoch.fetch_add(1, SeqCst) + 1;
            self.slots[i].meet.store(epoch, SeqCst);
        }
    }

    fn outside(&self, action: Box<dyn FnOnce() + Send>) {
        action();
    }

    fn now(&self) -> u64 {
        self.slots.iter().map(|s| s.now.load(SeqCst)).max().unwrap_or(0)
    }

    fn reset(&self) {
        let now = self.now();
        let _guard = lock(&self.idling);
        for (i, slot) in self.slots.iter().enumerate() {
            slot.poked.store(false, SeqCst);
            slot.meet.store(0, SeqCst);
            self.unidle(i, now);
        }
        self.waiting.store(0, SeqCst);
    }
}
