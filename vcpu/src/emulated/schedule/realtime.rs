//! The host's clock: guest time passes whether vCPUs run or not, except while the VM is frozen.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};

use super::{NEVER, Schedule, Turn, Wakes};

/// Instructions between looks at the clock and at commands.
const BUDGET: u64 = 50_000;

pub struct Realtime {
    wakes: Wakes,
    started: Instant,
    /// Host nanoseconds since `started` that are not the VM's.
    lost_ns: AtomicU64,
    /// The VM's time while it is frozen, else [`NEVER`].
    frozen_at: AtomicU64,
    /// Something was left since the vCPU last began to run.
    poked: Vec<AtomicBool>,
}

impl Realtime {
    pub fn new(wakes: Wakes) -> Self {
        let poked = wakes.iter().map(|_| AtomicBool::new(false)).collect();
        Self { wakes, started: Instant::now(), lost_ns: AtomicU64::new(0), frozen_at: AtomicU64::new(0), poked }
    }

    fn host_ns(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_nanos()).unwrap_or(NEVER)
    }
}

impl Schedule for Realtime {
    fn turn(&self, i: usize, _now: u64, _ran: u64) -> Turn {
        self.poked[i].store(false, SeqCst);
        Turn::Run { now: self.now(), budget: BUDGET }
    }

    fn idle(&self, i: usize, now: u64, ran: u64, deadline: Option<u64>) -> Turn {
        let left = deadline.map(|d| d.saturating_sub(self.now()));
        if self.poked[i].load(SeqCst) || left == Some(0) {
            return self.turn(i, now, ran);
        }
        Turn::Sleep { until: left.and_then(|ns| Instant::now().checked_add(Duration::from_nanos(ns))) }
    }

    fn rest(&self, _i: usize, _now: u64, _ran: u64) {}

    fn wake(&self, i: usize, _at: Option<u64>) {
        self.poked[i].store(true, SeqCst);
        self.wakes[i].notify();
    }

    /// The host's clock is one already.
    fn tighten(&self, _i: usize, _now: u64) {}

    fn outside(&self, action: Box<dyn FnOnce() + Send>) {
        action();
    }

    fn now(&self) -> u64 {
        match self.frozen_at.load(SeqCst) {
            NEVER => self.host_ns().saturating_sub(self.lost_ns.load(SeqCst)),
            at => at,
        }
    }

    fn freeze(&self) {
        self.frozen_at.store(self.now(), SeqCst);
    }

    fn unfreeze(&self) {
        let at = self.now();
        self.lost_ns.store(self.host_ns().saturating_sub(at), SeqCst);
        self.frozen_at.store(NEVER, SeqCst);
    }

    fn reset(&self) {}
}
