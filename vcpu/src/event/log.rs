//! The VM's log: merges the vCPUs' rings into one order and keeps it for readers, up to a bound per class.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use nested_vmx::event::{ActivityState, Detail, EventKind};
use nested_vmx::mailbox::CAUSE_BITS;
use serde::{Deserialize, Serialize};

use super::writer::{EventWriter, Ring, push};
use super::{At, CLASSES, Class, EventRecord, Level, What};
use crate::counters::VcpuCounters;
use crate::engine::{Disposition, Injection};
use crate::thread::{Changes, lock};

/// How many events of each class are kept, by [`Class`].
const BOUNDS: [usize; CLASSES] = [32 << 10, 16 << 10, 16 << 10, 1 << 10];
/// [`EventKind`] is an index below this.
const KINDS: usize = 32;

pub struct Events {
    /// The last place given out in the VM's order.
    last_seq: AtomicU64,
    last_cause: AtomicU64,
    /// One per vCPU, and one for what comes from outside.
    rings: Vec<Arc<Mutex<Ring>>>,
    counters: Vec<Arc<VcpuCounters>>,
    /// Where each vCPU was at its last event: [`At`], packed.
    last_at: Vec<AtomicU16>,
    log: Mutex<Log>,
    subscribers: [AtomicU32; KINDS],
    /// Injections whose first fate somebody waits for.
    waiting: Mutex<HashMap<u64, Option<Disposition>>>,
    anyone_waiting: AtomicBool,
    settled: Condvar,
    changes: Arc<Changes>,
}

#[derive(Debug)]
struct Log {
    /// The next place to be filled.
    next_seq: u64,
    /// Merged, but something before it is still being recorded.
    early: Vec<(Class, EventRecord)>,
    kept: [VecDeque<EventRecord>; CLASSES],
    /// The last event of each class that a bound pushed out.
    lost_seq: [u64; CLASSES],
    lost: u64,
}

/// Events that are no longer kept, between the asked place and the batch's end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gap {
    pub lost: u64,
    /// Whether the INIT and SIPI story itself may have a hole, not only HLT changes and frequent events.
    pub signals: bool,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EventBatch {
    pub events: Vec<EventRecord>,
    pub gap: Option<Gap>,
    /// Where to read on.
    pub next_seq: u64,
}

impl Events {
    pub(crate) fn new(counters: Vec<Arc<VcpuCounters>>, changes: Arc<Changes>) -> Arc<Self> {
        Arc::new(Self {
            last_seq: AtomicU64::new(0),
            last_cause: AtomicU64::new(0),
            rings: (0..=counters.len()).map(|_| Arc::default()).collect(),
            last_at: counters.iter().map(|_| AtomicU16::new(At::from(ActivityState::Active).pack())).collect(),
            counters,
            log: Mutex::new(Log {
                next_seq: 1,
                early: Vec::new(),
                kept: Default::default(),
                lost_seq: [0; CLASSES],
                lost: 0,
            }),
            subscribers: Default::default(),
            waiting: Mutex::default(),
            anyone_waiting: AtomicBool::new(false),
            settled: Condvar::new(),
            changes,
        })
    }

    /// The ring of `vcpu`, for its one owner.
    pub(crate) fn writer(self: &Arc<Self>, vcpu: u32) -> EventWriter {
        let i = vcpu as usize;
        EventWriter::new(vcpu, self.rings[i].clone(), self.clone(), self.counters[i].clone())
    }

    /// A new id for something that causes events; never 0.
    pub fn new_cause(&self) -> u64 {
        self.last_cause.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// The whole id of which a mailbox carried the low bits: the latest one that has them.
    pub fn expand_cause(&self, low: u32) -> u64 {
        let mask = (1u64 << CAUSE_BITS) - 1;
        let last = self.last_cause.load(Ordering::Relaxed);
        // None this young has these bits: only a sender's own mistake leads here, and 0 means "unknown".
        last.saturating_sub(last.wrapping_sub(u64::from(low)) & mask)
    }

    /// Records what did not happen on a vCPU's own thread.
    pub fn record_outside(&self, vcpu: u32, time_ns: u64, cause: u64, at: At, what: What) {
        if let (What::Processor(detail), Some(counters)) = (&what, self.counters.get(vcpu as usize)) {
            counters.count(detail);
        }
        let record = EventRecord {
            seq: 0,
            vcpu,
            local_seq: 0,
            time_ns,
            level: Level::L0,
            what,
            cause,
            mp_state: at.mp_state,
            activity: at.activity,
        };
        let class = if matches!(what, What::Vm(_)) { Class::Vm } else { Class::Signal };
        push(&self.rings[self.rings.len() - 1], self, class, record);
        if let What::Processor(detail) = &what {
            self.settle(cause, detail);
        }
    }

    /// Where `vcpu` was at its last event.
    pub fn last_at(&self, vcpu: u32) -> At {
        self.last_at
            .get(vcpu as usize)
            .map_or(ActivityState::Active.into(), |at| At::unpack(at.load(Ordering::Relaxed)))
    }

    pub(super) fn set_last_at(&self, vcpu: u32, at: At) {
        if let Some(last) = self.last_at.get(vcpu as usize) {
            last.store(at.pack(), Ordering::Relaxed);
        }
    }

    pub(super) fn next_seq(&self) -> u64 {
        self.last_seq.fetch_add(1, Ordering::AcqRel) + 1
    }

    pub(super) fn tell(&self) {
        self.changes.tell();
    }

    pub fn subscribed(&self, kind: EventKind) -> bool {
        self.subscribers[kind as usize % KINDS].load(Ordering::Relaxed) > 0
    }

    /// Has frequent events of these kinds recorded while the answer lives.
    pub fn subscribe(self: &Arc<Self>, kinds: impl IntoIterator<Item = EventKind>) -> Subscription {
        let kinds: Vec<EventKind> = kinds.into_iter().collect();
        for kind in &kinds {
            self.subscribers[*kind as usize % KINDS].fetch_add(1, Ordering::Relaxed);
        }
        Subscription { events: self.clone(), kinds }
    }

    /// Brings what the rings hold into the log.
    pub(super) fn merge(&self) {
        let mut log = lock(&self.log);
        // A writer takes its place under its ring's lock. A place still missing after the first pass was being
        // taken meanwhile, and the second pass waits for that lock; younger ones may stay for the next merge.
        for _ in 0..2 {
            for ring in &self.rings {
                log.early.append(&mut lock(ring).records);
            }
            log.settle_order();
            if log.early.is_empty() {
                break;
            }
        }
    }

    /// Reads at most `max` events from the place `from_seq` on (1 is the first).
    pub fn read(&self, from_seq: u64, max: usize) -> EventBatch {
        self.changes.seen();
        self.merge();
        lock(&self.log).read(from_seq.max(1), max)
    }

    /// The place after the last event so far.
    pub fn end_seq(&self) -> u64 {
        self.merge();
        lock(&self.log).next_seq
    }

    /// (recorded, no longer kept)
    pub fn totals(&self) -> (u64, u64) {
        (self.last_seq.load(Ordering::Acquire), lock(&self.log).lost)
    }

    /// The last `n` events of `vcpu`, for a dump.
    pub fn last_of(&self, vcpu: u32, n: usize) -> Vec<EventRecord> {
        let from = self.end_seq().saturating_sub(4096);
        let mut events = self.read(from, 4096).events;
        events.retain(|e| e.vcpu == vcpu);
        events.split_off(events.len().saturating_sub(n))
    }

    /// From now on the first fate of `id` is kept for [`Events::fate_of`].
    pub(crate) fn expect_fate(&self, id: u64) {
        lock(&self.waiting).insert(id, None);
        self.anyone_waiting.store(true, Ordering::Release);
    }

    /// Waits for what became of the injection `id`, and stops expecting it.
    pub(crate) fn fate_of(&self, id: u64, timeout: Duration) -> Option<Disposition> {
        let deadline = Instant::now() + timeout;
        let mut waiting = lock(&self.waiting);
        while let Some(None) = waiting.get(&id) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            waiting = match self.settled.wait_timeout(waiting, left) {
                Ok((guard, _)) => guard,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
        let fate = waiting.remove(&id).flatten();
        if waiting.is_empty() {
            self.anyone_waiting.store(false, Ordering::Release);
        }
        fate
    }

    /// An event that was recorded says what became of an injection.
    pub(super) fn settle(&self, cause: u64, detail: &Detail) {
        if cause == 0 || !self.anyone_waiting.load(Ordering::Acquire) {
            return;
        }
        let (Detail::Init(fate) | Detail::Nmi(fate) | Detail::Sipi { fate, .. }) = detail else { return };
        if let Some(slot @ None) = lock(&self.waiting).get_mut(&cause) {
            *slot = Some(Disposition::from(*fate));
            self.settled.notify_all();
        }
    }

    /// Records an injection before it is posted, so that it precedes what it causes.
    pub(crate) fn record_injection(&self, vcpu: u32, time_ns: u64, id: u64, injection: Injection, at: At) {
        self.record_outside(vcpu, time_ns, 0, at, What::Injected { id, injection });
    }
}

impl Log {
    fn settle_order(&mut self) {
        self.early.sort_unstable_by_key(|(_, r)| r.seq);
        let mut next_seq = self.next_seq;
        let ready = self
            .early
            .iter()
            .take_while(|(_, r)| {
                let fits = r.seq == next_seq;
                next_seq += u64::from(fits);
                fits
            })
            .count();
        self.next_seq = next_seq;
        for (class, record) in self.early.drain(..ready) {
            let class = class as usize;
            self.kept[class].push_back(record);
            if self.kept[class].len() > BOUNDS[class]
                && let Some(old) = self.kept[class].pop_front()
            {
                self.lost_seq[class] = old.seq;
                self.lost += 1;
            }
        }
    }

    fn read(&self, from_seq: u64, max: usize) -> EventBatch {
        let mut at: [usize; CLASSES] = std::array::from_fn(|c| self.kept[c].partition_point(|r| r.seq < from_seq));
        let mut events = Vec::new();
        while events.len() < max {
            let heads = (0..CLASSES).filter_map(|c| self.kept[c].get(at[c]).map(|r| (r.seq, c)));
            let Some((_, class)) = heads.min() else { break };
            events.push(self.kept[class][at[class]]);
            at[class] += 1;
        }
        let next_seq = match events.last() {
            Some(last) if events.len() == max => last.seq + 1,
            _ => self.next_seq,
        };
        // Places have no holes: what lies between and is not here was pushed out.
        let lost = next_seq.saturating_sub(from_seq).saturating_sub(events.len() as u64);
        let signals = self.lost_seq[Class::Signal as usize] >= from_seq;
        EventBatch { events, gap: (lost > 0).then_some(Gap { lost, signals }), next_seq }
    }
}

/// Keeps frequent events recorded until dropped.
pub struct Subscription {
    events: Arc<Events>,
    kinds: Vec<EventKind>,
}

impl Drop for Subscription {
    fn drop(&mut self) {
        for kind in &self.kinds {
            self.events.subscribers[*kind as usize % KINDS].fetch_sub(1, Ordering::Relaxed);
        }
    }
}
