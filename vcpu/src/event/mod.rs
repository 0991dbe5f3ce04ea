//! What happened, in order.
//!
//! Each vCPU records into a ring of its own with a local sequence number; [`Events`] merges the rings into one
//! log per VM. An event takes its place in the VM's order when it is recorded, and a cause (an ICR write, an
//! injection) is recorded before it is sent, so causes always come first. The log keeps classes apart,
//! so that frequent events never push out an INIT or a SIPI; what a bound pushed out is an explicit gap.

mod log;
mod writer;

use std::collections::BTreeSet;

use nested_vmx::bus::{Delivery, IpiMessage};
use nested_vmx::event::{ActivityState, Detail, EventKind, MpState, VmxMode};
use serde::{Deserialize, Serialize};

use crate::engine::Injection;

pub use log::{EventBatch, Events, Gap, Subscription};
pub use writer::EventWriter;

/// The vCPU number of events that belong to the whole VM.
pub const WHOLE_VM: u32 = u32::MAX;

/// Who acted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Level {
    /// nestd: classifies INIT and SIPI, emulates VM exits, injects.
    L0,
    /// The guest outside VMX operation or in VMX root operation.
    L1,
    /// The guest in VMX non-root operation.
    L2,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum What {
    Processor(Detail),
    /// A client injected; `id` is the cause of what follows.
    Injected {
        id: u64,
        injection: Injection,
    },
    /// KVM's mp_state is not what it was when last looked at. KVM hides when it changed, and what it was between.
    MpState {
        from: MpState,
        to: MpState,
    },
    /// The VM's state changed.
    Vm(VmChange),
}

/// The state that a record carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct At {
    pub mp_state: MpState,
    pub activity: ActivityState,
}

impl At {
    fn pack(self) -> u16 {
        u16::from(self.mp_state as u8) << 8 | u16::from(self.activity as u8)
    }

    fn unpack(word: u16) -> Self {
        let mp_state = match word >> 8 {
            1 => MpState::Uninitialized,
            2 => MpState::InitReceived,
            3 => MpState::Halted,
            4 => MpState::SipiReceived,
            _ => MpState::Runnable,
        };
        Self { mp_state, activity: ActivityState::from_u64((word & 0xff).into()).unwrap_or_default() }
    }
}

impl From<ActivityState> for At {
    fn from(activity: ActivityState) -> Self {
        Self { mp_state: activity.mp_state(), activity }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum VmChange {
    Started,
    Paused,
    Resumed,
    Reset,
    Stopped,
    Failed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EventRecord {
    /// The place in the VM's order, from 1 on without holes.
    pub seq: u64,
    /// [`WHOLE_VM`] for what concerns no single vCPU.
    pub vcpu: u32,
    /// The place among this vCPU's events, from 1 on.
    pub local_seq: u64,
    /// The VM's time at this vCPU.
    pub time_ns: u64,
    pub level: Level,
    pub what: What,
    /// The id of the ICR write or injection that caused this; 0 when nothing outside did.
    pub cause: u64,
    /// After the event.
    pub mp_state: MpState,
    pub activity: ActivityState,
}

/// How long an event is kept, and what it may push out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Class {
    /// The INIT and SIPI story.
    Signal = 0,
    /// HLT and waking from it.
    State = 1,
    /// Recorded only while someone subscribes.
    Frequent = 2,
    /// Changes of the VM's state: a client that pauses and resumes in a loop pushes out only these.
    Vm = 3,
}

const CLASSES: usize = 4;

const EXIT_TRIPLE_FAULT: u32 = 2;
const EXIT_INIT: u32 = 3;
const EXIT_SIPI: u32 = 4;
/// Bit 31: the exit is a failed VM entry (SDM 3, "Basic VM-Exit Information").
const EXIT_ENTRY_FAILURE: u32 = 1 << 31;

fn is_signal(message: &IpiMessage) -> bool {
    matches!(message.delivery, Delivery::Init | Delivery::InitDeassert | Delivery::StartUp | Delivery::Nmi)
}

/// Frequent VM exits and entries are counted only. Those around INIT and SIPI are part of their story: an exit that
/// has a cause outside, and the first entry after an exit that is kept (`after_kept_exit`), or the first of all.
fn class_of(detail: &Detail, cause: u64, after_kept_exit: bool) -> Class {
    let told = match detail {
        Detail::IcrWrite { message, .. } => is_signal(message),
        Detail::VmEntry { activity, .. } => *activity == ActivityState::WaitForSipi || after_kept_exit,
        Detail::VmExit { reason, .. } => {
            cause != 0
                || matches!(*reason, EXIT_TRIPLE_FAULT | EXIT_INIT | EXIT_SIPI)
                || reason & EXIT_ENTRY_FAILURE != 0
        }
        Detail::Activity { from, to } => {
            let idles = |a: &ActivityState| matches!(a, ActivityState::Active | ActivityState::Hlt);
            return if idles(from) && idles(to) { Class::State } else { Class::Signal };
        }
        _ => true,
    };
    if told { Class::Signal } else { Class::Frequent }
}

fn level_of(detail: &Detail, mode: VmxMode) -> Level {
    match detail {
        Detail::Init(_)
        | Detail::Sipi { .. }
        | Detail::Nmi(_)
        | Detail::VmExit { .. }
        | Detail::VmEntryFailed { .. }
        | Detail::VmxAbort { .. }
        | Detail::Reset => Level::L0,
        Detail::VmEntry { .. } | Detail::VmxOn { .. } | Detail::VmxOff => Level::L1,
        Detail::IcrWrite { .. } | Detail::Activity { .. } | Detail::TripleFault => match mode {
            VmxMode::NonRoot => Level::L2,
            VmxMode::Off | VmxMode::Root => Level::L1,
        },
    }
}

/// The kinds of frequent events that a subscriber may ask for.
pub fn frequent_kinds() -> BTreeSet<EventKind> {
    BTreeSet::from([EventKind::VmEntry, EventKind::VmExit, EventKind::IcrWrite])
}
