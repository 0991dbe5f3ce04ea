//! A vCPU's own ring.

use std::sync::{Arc, Mutex};

use nested_vmx::event::{ActivityState, Detail, Fate, MpState, VmxMode};

use super::{At, Class, EventRecord, Events, Level, What, class_of, level_of};
use crate::counters::VcpuCounters;
use crate::thread::lock;

/// Events recorded and not merged yet; a full ring is merged by its writer, so it loses nothing.
pub(super) const RING_LEN: usize = 1024;

#[derive(Debug, Default)]
pub(super) struct Ring {
    pub records: Vec<(Class, EventRecord)>,
    local_seq: u64,
}

/// Records one vCPU's events. Its owner is the vCPU's thread.
pub struct EventWriter {
    vcpu: u32,
    ring: Arc<Mutex<Ring>>,
    log: Arc<Events>,
    counters: Arc<VcpuCounters>,
    at: At,
    after_kept_exit: bool,
}

impl EventWriter {
    pub(super) fn new(vcpu: u32, ring: Arc<Mutex<Ring>>, log: Arc<Events>, counters: Arc<VcpuCounters>) -> Self {
        Self { vcpu, ring, log, counters, at: ActivityState::Active.into(), after_kept_exit: true }
    }

    /// Says where the vCPU starts, so that records carry the right state before the first change.
    pub fn set_at(&mut self, at: impl Into<At>) {
        self.at = at.into();
        self.after_kept_exit = true;
        self.log.set_last_at(self.vcpu, self.at);
    }

    /// Counts the event, and records it unless it is frequent and nobody subscribed. Returns whether an
    /// observer may now ask for the state that it led to.
    pub fn record(&mut self, time_ns: u64, cause: u64, mode: VmxMode, detail: Detail) -> bool {
        self.counters.count(&detail);
        match detail {
            Detail::Activity { to, .. } => self.at = to.into(),
            Detail::VmEntry { activity, .. } => self.at = activity.into(),
            Detail::VmExit { .. } => self.at = ActivityState::Active.into(),
            Detail::Sipi { fate: Fate::Started, .. } => self.at = ActivityState::Active.into(),
            _ => {}
        }
        self.log.set_last_at(self.vcpu, self.at);
        let class = class_of(&detail, cause, self.after_kept_exit);
        match detail {
            Detail::VmEntry { .. } => self.after_kept_exit = false,
            Detail::VmExit { .. } => self.after_kept_exit = class != Class::Frequent,
            _ => {}
        }
        if class == Class::Frequent && !self.log.subscribed(detail.kind()) {
            return false;
        }
        let record = EventRecord {
            seq: 0,
            vcpu: self.vcpu,
            local_seq: 0,
            time_ns,
            level: level_of(&detail, mode),
            what: What::Processor(detail),
            cause,
            mp_state: self.at.mp_state,
            activity: self.at.activity,
        };
        push(&self.ring, &self.log, class, record);
        self.log.settle(cause, &detail);
        class != Class::Frequent
    }
}

impl EventWriter {
    /// KVM's mp_state was seen to differ from what it was. Nothing is recorded where it does not.
    /// Who changed it KVM does not say; that the vCPU is in VMX non-root operation (`mode`) tells L2's from L1's.
    pub fn record_mp_state(&mut self, time_ns: u64, cause: u64, mode: VmxMode, to: At) {
        let from = std::mem::replace(&mut self.at, to).mp_state;
        self.log.set_last_at(self.vcpu, to);
        if from == to.mp_state {
            return;
        }
        let idle = |s| matches!(s, MpState::Runnable | MpState::Halted);
        let class = if idle(from) && idle(to.mp_state) { Class::State } else { Class::Signal };
        let record = EventRecord {
            seq: 0,
            vcpu: self.vcpu,
            local_seq: 0,
            time_ns,
            level: if mode == VmxMode::NonRoot { Level::L2 } else { Level::L0 },
            what: What::MpState { from, to: to.mp_state },
            cause,
            mp_state: to.mp_state,
            activity: to.activity,
        };
        push(&self.ring, &self.log, class, record);
    }
}

/// The record takes its place in the VM's order under its ring's lock: the merger, which takes that lock too,
/// then sees each ring in order.
pub(super) fn push(ring: &Mutex<Ring>, log: &Events, class: Class, mut record: EventRecord) {
    let full = {
        let mut ring = lock(ring);
        ring.local_seq += 1;
        record.local_seq = ring.local_seq;
        record.seq = log.next_seq();
        ring.records.push((class, record));
        ring.records.len() >= RING_LEN
    };
    if full {
        log.merge();
    }
    log.tell();
}
