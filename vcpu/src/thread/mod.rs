//! One OS thread per vCPU: its life, where it runs, how it sleeps and is woken, and what it publishes.

mod changes;
mod life;
mod place;
mod wake;

use std::sync::{Mutex, MutexGuard, PoisonError};

pub use changes::Changes;
pub use life::{Inspection, ThreadState, VcpuReport};
pub(crate) use life::{Run, Shared, VcpuShared, spawn};
pub(crate) use place::{Placement, pin, thread_cpu_ns};
pub use wake::Wake;

/// A panic while the lock was held fails its VM by itself; the data behind our locks is whole at every step.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
