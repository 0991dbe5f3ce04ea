//! Tells those who watch a VM that there is something new, without telling them twice before they looked.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

use super::lock;

type Waker = Arc<dyn Fn() + Send + Sync>;

#[derive(Default)]
pub struct Changes {
    /// Set by the first change after someone looked: those that follow cost one atomic.
    told: AtomicBool,
    generation: Mutex<u64>,
    changed: Condvar,
    wakers: RwLock<Vec<Waker>>,
}

impl Changes {
    /// Something changed. The state must be readable before this is called.
    pub fn tell(&self) {
        if self.told.swap(true, Ordering::AcqRel) {
            return;
        }
        *lock(&self.generation) += 1;
        self.changed.notify_all();
        let wakers = self.wakers.read().unwrap_or_else(PoisonError::into_inner).clone();
        for waker in wakers {
            waker();
        }
    }

    /// Someone is about to look: the next change is told again.
    pub fn seen(&self) {
        // A swap: either it comes after a teller's and sees what that one changed, or the teller tells.
        self.told.swap(false, Ordering::AcqRel);
    }

    pub fn on_change(&self, waker: Box<dyn Fn() + Send + Sync>) {
        self.wakers.write().unwrap_or_else(PoisonError::into_inner).push(Arc::from(waker));
    }

    /// Waits until `look` finds something, looking again after each change.
    pub fn wait_for<T>(&self, timeout: Duration, mut look: impl FnMut() -> Option<T>) -> Option<T> {
        let deadline = Instant::now() + timeout;
        loop {
            let before = *lock(&self.generation);
            self.seen();
            if let Some(found) = look() {
                return Some(found);
            }
            let mut generation = lock(&self.generation);
            // At least once: where changes never cease, the deadline still counts.
            loop {
                let left = deadline.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    return None;
                }
                if *generation != before {
                    break;
                }
                generation = self.changed.wait_timeout(generation, left).unwrap_or_else(PoisonError::into_inner).0;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waiting_ends_at_its_deadline_though_something_changes_at_every_look() {
        let changes = Changes::default();
        let found = changes.wait_for(Duration::from_millis(5), || {
            changes.tell();
            None::<()>
        });
        assert_eq!(found, None);
    }
}
