//! What is counted while a vCPU runs: plain atomics that only its own thread writes, collected when asked for.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use nested_vmx::event::{ActivityState, Detail, Fate};
use serde::{Deserialize, Serialize};

/// VM-exit reasons are counted by number up to this one.
const EXIT_REASONS: usize = 80;
/// KVM's exit reasons are counted by number up to this one.
const KVM_EXIT_REASONS: usize = 48;

#[derive(Debug, Default)]
struct Fates {
    latched: AtomicU64,
    delivered: AtomicU64,
    dropped: AtomicU64,
}

/// One vCPU's counters. Aligned, so that two vCPUs never share a cache line.
#[derive(Debug)]
#[repr(align(128))]
pub struct VcpuCounters {
    instructions: AtomicU64,
    thread_cpu_ns: AtomicU64,
    exits: [AtomicU64; EXIT_REASONS],
    kvm_exits: [AtomicU64; KVM_EXIT_REASONS],
    vm_entries: AtomicU64,
    vm_entry_failures: AtomicU64,
    host_exits: AtomicU64,
    wakeups: AtomicU64,
    fates: [Fates; 3],
    activity_ns: [AtomicU64; 4],
}

impl Default for VcpuCounters {
    fn default() -> Self {
        Self {
            instructions: AtomicU64::new(0),
            thread_cpu_ns: AtomicU64::new(0),
            exits: std::array::from_fn(|_| AtomicU64::new(0)),
            kvm_exits: std::array::from_fn(|_| AtomicU64::new(0)),
            vm_entries: AtomicU64::new(0),
            vm_entry_failures: AtomicU64::new(0),
            host_exits: AtomicU64::new(0),
            wakeups: AtomicU64::new(0),
            fates: Default::default(),
            activity_ns: Default::default(),
        }
    }
}

/// Adds without a LOCK prefix: there is one writer.
fn add(counter: &AtomicU64, n: u64) {
    counter.store(counter.load(Relaxed).wrapping_add(n), Relaxed);
}

impl VcpuCounters {
    pub fn set_instructions(&self, retired: u64) {
        self.instructions.store(retired, Relaxed);
    }

    pub fn set_thread_cpu_ns(&self, ns: u64) {
        self.thread_cpu_ns.fetch_max(ns, Relaxed);
    }

    /// KVM: returns of KVM_RUN; emulated: returns of `Cpu::run`.
    pub fn add_host_exit(&self) {
        add(&self.host_exits, 1);
    }

    /// KVM_RUN returned with this exit reason.
    pub fn add_kvm_exit(&self, reason: u32) {
        add(&self.kvm_exits[(reason as usize).min(KVM_EXIT_REASONS - 1)], 1);
    }

    /// The thread woke up after parking.
    pub fn add_wakeup(&self) {
        add(&self.wakeups, 1);
    }

    pub fn add_activity_ns(&self, activity: ActivityState, ns: u64) {
        add(&self.activity_ns[activity as usize], ns);
    }

    /// Counts what an event says; called for every event, recorded or not.
    pub fn count(&self, detail: &Detail) {
        match detail {
            Detail::Init(fate) => self.count_fate(0, fate),
            Detail::Sipi { fate, .. } => self.count_fate(1, fate),
            Detail::Nmi(fate) => self.count_fate(2, fate),
            Detail::VmEntry { .. } => add(&self.vm_entries, 1),
            Detail::VmEntryFailed { .. } => add(&self.vm_entry_failures, 1),
            Detail::VmExit { reason, .. } => {
                let basic = usize::from(*reason as u16).min(EXIT_REASONS - 1);
                add(&self.exits[basic], 1);
            }
            _ => {}
        }
    }

    fn count_fate(&self, kind: usize, fate: &Fate) {
        let fates = &self.fates[kind];
        let counter = match fate {
            Fate::Latched | Fate::Overwrote { .. } => &fates.latched,
            Fate::Dropped(_) | Fate::Coalesced => &fates.dropped,
            Fate::Delivered | Fate::Started | Fate::VmExit(_) | Fate::Reset => &fates.delivered,
        };
        // What coalesces is counted by its sender, so there is more than one writer.
        counter.fetch_add(1, Relaxed);
    }

    pub fn snapshot(&self) -> VcpuCounts {
        let get = |c: &AtomicU64| c.load(Relaxed);
        let by_reason = |counters: &[AtomicU64]| {
            counters.iter().zip(0..).map(|(n, reason)| (reason, get(n))).filter(|(_, n)| *n > 0).collect()
        };
        let fates = |i: usize| {
            let f: &Fates = &self.fates[i];
            FateCounts { latched: get(&f.latched), delivered: get(&f.delivered), dropped: get(&f.dropped) }
        };
        VcpuCounts {
            instructions: get(&self.instructions),
            thread_cpu_ns: get(&self.thread_cpu_ns),
            exits: by_reason(&self.exits),
            kvm_exits: by_reason(&self.kvm_exits),
            vm_entries: get(&self.vm_entries),
            vm_entry_failures: get(&self.vm_entry_failures),
            host_exits: get(&self.host_exits),
            wakeups: get(&self.wakeups),
            init: fates(0),
            sipi: fates(1),
            nmi: fates(2),
            activity_ns: std::array::from_fn(|i| get(&self.activity_ns[i])),
        }
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FateCounts {
    /// Latched, or overwrote one that was.
    pub latched: u64,
    pub delivered: u64,
    /// Dropped or coalesced.
    pub dropped: u64,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VcpuCounts {
    pub instructions: u64,
    pub thread_cpu_ns: u64,
    /// VM exits to L1, by basic exit reason.
    pub exits: BTreeMap<u32, u64>,
    /// KVM: returns of KVM_RUN, by KVM's exit reason.
    pub kvm_exits: BTreeMap<u32, u64>,
    pub vm_entries: u64,
    pub vm_entry_failures: u64,
    /// How often the engine's run returned to its thread.
    pub host_exits: u64,
    /// How often the thread woke up after parking.
    pub wakeups: u64,
    pub init: FateCounts,
    pub sipi: FateCounts,
    pub nmi: FateCounts,
    /// Host time spent with the guest in each activity state, indexed by its VMCS encoding.
    pub activity_ns: [u64; 4],
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmCounters {
    pub vcpus: Vec<VcpuCounts>,
    /// Events recorded since creation, and how many of them are no longer kept.
    pub events: u64,
    pub events_lost: u64,
}
