//! Stopping the world: one vCPU does something while no other executes an instruction.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use nested_vmx::mailbox::{Mailbox, attention};

use crate::thread::lock;

const NOBODY: usize = usize::MAX;

/// A vCPU enters before it runs guest code and leaves after; all others are parked by definition, wherever their
/// threads sleep. One that waits to be alone itself counts as parked too, so two cannot wait for each other.
pub struct Gate {
    mailboxes: Vec<Arc<Mailbox>>,
    inside: Vec<AtomicBool>,
    /// Who is alone, or about to be.
    alone: AtomicUsize,
    turn: Mutex<()>,
    changed: Condvar,
}

/// Inside the gate until dropped, also by a panic.
pub struct Inside<'a> {
    gate: &'a Gate,
    i: usize,
}

impl Gate {
    pub fn new(mailboxes: Vec<Arc<Mailbox>>) -> Self {
        let inside = mailboxes.iter().map(|_| AtomicBool::new(false)).collect();
        Self { mailboxes, inside, alone: AtomicUsize::new(NOBODY), turn: Mutex::default(), changed: Condvar::new() }
    }

    /// Waits while another vCPU is alone.
    pub fn enter(&self, i: usize) -> Inside<'_> {
        self.pass(i);
        Inside { gate: self, i }
    }

    fn pass(&self, i: usize) {
        loop {
            // Either the one that wants to be alone sees this, or this sees that one.
            self.inside[i].store(true, SeqCst);
            let alone = self.alone.load(SeqCst);
            if alone == NOBODY || alone == i {
                return;
            }
            self.step_out(i);
            let mut guard = lock(&self.turn);
            while !matches!(self.alone.load(SeqCst), NOBODY) {
                guard = self.changed.wait(guard).unwrap_or_else(PoisonError::into_inner);
            }
        }
    }

    fn step_out(&self, i: usize) {
        self.inside[i].store(false, SeqCst);
        if self.alone.load(SeqCst) != NOBODY {
            drop(lock(&self.turn));
            self.changed.notify_all();
        }
    }

    /// From inside the gate: runs `f` while nobody else is.
    pub fn alone(&self, i: usize, f: &mut dyn FnMut()) {
        // Meanwhile another may be alone first.
        let mut waited = false;
        let mut guard = loop {
            let guard = lock(&self.turn);
            if self.alone.load(SeqCst) == NOBODY {
                self.alone.store(i, SeqCst);
                break guard;
            }
            waited = true;
            self.inside[i].store(false, SeqCst);
            self.changed.notify_all();
            let mut guard = guard;
            while self.alone.load(SeqCst) != NOBODY {
                guard = self.changed.wait(guard).unwrap_or_else(PoisonError::into_inner);
            }
            drop(guard);
        };
        self.inside[i].store(true, SeqCst);
        let others = || (0..self.inside.len()).filter(|j| *j != i);
        for j in others().filter(|j| self.inside[*j].load(SeqCst)) {
            self.mailboxes[j].call(attention::EXCLUSIVE);
        }
        while others().any(|j| self.inside[j].load(SeqCst)) {
            guard = self.changed.wait(guard).unwrap_or_else(PoisonError::into_inner);
        }
        // Those that pass the gate now see who is alone, and wait; the lock is not needed for that.
        drop(guard);
        let release = Release(self);
        f();
        drop(release);
        if waited {
            // What the other did may concern what this one keeps between runs: it leaves its run too.
            self.mailboxes[i].call(attention::EXCLUSIVE);
        }
    }
}

/// Ends being alone, also when `f` panics.
struct Release<'a>(&'a Gate);

impl Drop for Release<'_> {
    fn drop(&mut self) {
        let _guard = lock(&self.0.turn);
        self.0.alone.store(NOBODY, SeqCst);
        self.0.changed.notify_all();
    }
}

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        self.gate.step_out(self.i);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU64;

    #[test]
    fn while_one_is_alone_nobody_else_runs_and_two_that_want_it_do_not_wait_for_each_other() {
        const VCPUS: usize = 3;
        const ROUNDS: u64 = 2_000;
        let mailboxes: Vec<Arc<Mailbox>> = (0..VCPUS).map(|_| Arc::default()).collect();
        let gate = Gate::new(mailboxes.clone());
        let (counter, torn) = (AtomicU64::new(0), AtomicU64::new(0));
        std::thread::scope(|scope| {
            for i in 0..VCPUS {
                let (gate, mailboxes, counter, torn) = (&gate, &mailboxes, &counter, &torn);
                scope.spawn(move || {
                    for _ in 0..ROUNDS {
                        let inside = gate.enter(i);
                        // "Instructions", until asked to leave.
                        for _ in 0..10 {
                            if mailboxes[i].answer(attention::EXCLUSIVE) != 0 {
                                break;
                            }
                            let seen = counter.load(SeqCst);
                            torn.fetch_add(seen & 1, SeqCst);
                        }
                        gate.alone(i, &mut || {
                            // Odd while somebody is alone.
                            counter.fetch_add(1, SeqCst);
                            std::hint::spin_loop();
                            counter.fetch_add(1, SeqCst);
                        });
                        drop(inside);
                    }
                });
            }
        });
        assert_eq!(counter.load(SeqCst), 2 * ROUNDS * VCPUS as u64);
        assert_eq!(torn.load(SeqCst), 0, "somebody ran while another was alone");
    }
}
