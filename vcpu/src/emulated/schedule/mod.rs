//! Whose turn it is, and what time it is: the VM's clock and its two schedulers.
//!
//! VM time is in TSC ticks, one a nanosecond ([`nested_vmx::cpu::TSC_HZ`]). Under the virtual clock a vCPU's time
//! is what it has retired plus what it was moved forward by: over idle time, and to where others already are.
//! A schedule never waits. It says so, and the vCPU's thread sleeps on its [`Wake`] until its turn comes.

mod deterministic;
mod parallel;
mod realtime;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::Instant;

pub use deterministic::Deterministic;
pub use parallel::Parallel;
pub use realtime::Realtime;

use crate::thread::Wake;

/// How far a running vCPU may be ahead of the slowest running one.
const WINDOW: u64 = 50_000;
/// For some time after an INIT or SIPI. Linux repeats a SIPI after 10 to 20 microseconds, and one that finds its
/// target in VMX root is dropped (R4): the target must get its share of those microseconds.
const TIGHT_WINDOW: u64 = 2_000;
/// For how long.
const TIGHT_SPAN: u64 = 1_000_000;
/// No deadline.
const NEVER: u64 = u64::MAX;

/// What a vCPU may do now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// Run at most `budget` instructions, from VM time `now` on (never before the time it was asked with).
    Run { now: u64, budget: u64 },
    /// Others come first: sleep until woken.
    Wait,
    /// Nothing to run: sleep until woken, or until then.
    Sleep { until: Option<Instant> },
}

pub trait Schedule: Send + Sync {
    /// vCPU `i` stands at an instruction boundary at time `now`, has run `ran` instructions since it was last
    /// told to, and has more to run.
    fn turn(&self, i: usize, now: u64, ran: u64) -> Turn;

    /// As [`Schedule::turn`], but it has nothing to run before `deadline`.
    fn idle(&self, i: usize, now: u64, ran: u64, deadline: Option<u64>) -> Turn;

    /// As [`Schedule::turn`], but it does not ask for more now: its thread has something else to do.
    fn rest(&self, i: usize, now: u64, ran: u64);

    /// Something was left for vCPU `i`, by a vCPU whose time is `at` or, without one, from outside.
    fn wake(&self, i: usize, at: Option<u64>);

    /// vCPU `i` sent an INIT or SIPI: for a while the vCPUs go closely together, starting from one time. All
    /// running ones, `i` too, must come to a boundary soon.
    fn tighten(&self, i: usize, now: u64);

    /// Does something that vCPUs see, at a moment that fits the schedule.
    fn outside(&self, action: Box<dyn FnOnce() + Send>);

    /// The VM's time.
    fn now(&self) -> u64;

    /// No vCPU runs until [`Schedule::unfreeze`].
    fn freeze(&self) {}
    fn unfreeze(&self) {}

    /// The machine is reset while no vCPU runs: all are at the VM's time, and none is idle.
    fn reset(&self);
}

type Wakes = Vec<Arc<Wake>>;
