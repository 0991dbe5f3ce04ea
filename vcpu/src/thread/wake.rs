//! Where a vCPU thread sleeps. Not `std::thread::park`: its token is shared with everything else that parks.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Instant;

use super::lock;

/// Remembers one call: a notification before the wait is not lost.
#[derive(Debug, Default)]
pub struct Wake {
    called: AtomicBool,
    sleeping: Mutex<()>,
    wakes: Condvar,
}

impl Wake {
    /// Wakes the thread, or keeps it from falling asleep. Cheap when it was called already.
    pub fn notify(&self) {
        if !self.called.swap(true, Ordering::AcqRel) {
            // The sleeper checks `called` under this lock: taken once, it is either asleep or has seen it.
            drop(lock(&self.sleeping));
            self.wakes.notify_one();
        }
    }

    /// Sleeps until notified or `until`; takes the notification. Returns whether it was notified.
    pub fn wait(&self, until: Option<Instant>) -> bool {
        let mut guard = lock(&self.sleeping);
        loop {
            if self.called.swap(false, Ordering::AcqRel) {
                return true;
            }
            guard = match until {
                None => self.wakes.wait(guard).unwrap_or_else(PoisonError::into_inner),
                Some(until) => {
                    let left = until.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return false;
                    }
                    self.wakes.wait_timeout(guard, left).unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
    }
}
