//! Where vCPU threads run.

use std::collections::BTreeMap;
use std::sync::Mutex;

use rustix::process::Pid;
use rustix::thread::{CpuSet, sched_setaffinity};

use super::lock;

/// How many vCPU threads of this process are placed on each host CPU.
static PLACED: Mutex<BTreeMap<usize, usize>> = Mutex::new(BTreeMap::new());

/// The host CPUs of one vCPU, counted for the `spread` policy while it lives.
#[derive(Debug)]
pub(crate) struct Placement {
    cpus: Vec<usize>,
}

impl Placement {
    /// The CPUs that the spec names or, without any, the allowed CPU with the fewest vCPUs (`spread`).
    pub fn new(wanted: &[usize], allowed: &[usize]) -> Self {
        let mut placed = lock(&PLACED);
        let cpus = if wanted.is_empty() {
            allowed.iter().copied().min_by_key(|c| placed.get(c).copied().unwrap_or(0)).into_iter().collect()
        } else {
            wanted.to_vec()
        };
        for cpu in &cpus {
            *placed.entry(*cpu).or_default() += 1;
        }
        Self { cpus }
    }

    pub fn cpus(&self) -> &[usize] {
        &self.cpus
    }
}

impl Drop for Placement {
    fn drop(&mut self) {
        let mut placed = lock(&PLACED);
        for cpu in &self.cpus {
            if let Some(n) = placed.get_mut(cpu) {
                *n = n.saturating_sub(1);
            }
        }
    }
}

/// Pins a thread of this process. The caller makes sure that `tid` is alive; CPUs are checked ones.
pub(crate) fn pin(tid: Option<Pid>, cpus: &[usize]) -> std::io::Result<()> {
    if cpus.is_empty() {
        return Ok(());
    }
    let mut set = CpuSet::new();
    for &cpu in cpus.iter().filter(|c| **c < CpuSet::MAX_CPU) {
        set.set(cpu);
    }
    Ok(sched_setaffinity(tid, &set)?)
}

/// CPU time of a living thread, as the kernel's scheduler counts it.
pub(crate) fn thread_cpu_ns(tid: Pid) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/self/task/{}/schedstat", tid.as_raw_nonzero())).ok()?;
    stat.split_whitespace().next()?.parse().ok()
}
