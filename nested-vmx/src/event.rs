//! What a processor reports: the event vocabulary that both engines share.

use serde::{Deserialize, Serialize};

/// Activity state, as the VMCS encodes it (SDM 3, "Guest Non-Register State").
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[repr(u8)]
pub enum ActivityState {
    #[default]
    Active = 0,
    Hlt = 1,
    Shutdown = 2,
    WaitForSipi = 3,
}

impl ActivityState {
    pub fn from_u64(v: u64) -> Option<Self> {
        Some(match v {
            0 => Self::Active,
            1 => Self::Hlt,
            2 => Self::Shutdown,
            3 => Self::WaitForSipi,
            _ => return None,
        })
    }

    /// semantics.md section 4.
    pub fn mp_state(self) -> MpState {
        match self {
            Self::Active | Self::Shutdown => MpState::Runnable,
            Self::Hlt => MpState::Halted,
            Self::WaitForSipi => MpState::InitReceived,
        }
    }
}

/// KVM's mp_state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[repr(u8)]
pub enum MpState {
    #[default]
    Runnable = 0,
    Uninitialized = 1,
    InitReceived = 2,
    Halted = 3,
    SipiReceived = 4,
}

/// Where the processor runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum VmxMode {
    #[default]
    Off,
    Root,
    NonRoot,
}

/// Why an INIT or SIPI was not taken: the rule of semantics.md that says so.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Rule {
    R1,
    R2,
    R4,
    R5,
    R6,
    R7,
    R8,
    R9,
    R12,
    R22,
}

/// What became of an INIT, SIPI or NMI at its receiver.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Fate {
    /// Stays pending until it can be taken.
    Latched,
    /// Taken: an NMI was delivered, or an INIT put an application processor into wait-for-SIPI.
    Delivered,
    /// A SIPI started the processor.
    Started,
    /// Became VM exit 3 or 4 (or 0 for an NMI).
    VmExit(u16),
    /// An INIT outside VMX put the bootstrap processor at its reset vector, or left shutdown.
    Reset,
    /// One of the same kind was pending already.
    Coalesced,
    /// Replaced a pending SIPI that had another cause (R12).
    Overwrote {
        previous_cause: u64,
    },
    Dropped(Rule),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// The retired instructions of this processor when it happened.
    pub retired: u64,
    /// What caused it: an ICR write's or an injection's id; 0 when nothing outside did.
    pub cause: u64,
    pub mode: VmxMode,
    pub detail: Detail,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Detail {
    /// The guest wrote an ICR that sends something; `id` is the cause of what follows.
    IcrWrite {
        id: u64,
        message: crate::bus::IpiMessage,
    },
    Init(Fate),
    Sipi {
        vector: u8,
        fate: Fate,
    },
    Nmi(Fate),
    /// The activity state changed.
    Activity {
        from: ActivityState,
        to: ActivityState,
    },
    VmxOn {
        region_gpa: u64,
    },
    VmxOff,
    VmEntry {
        vmcs_gpa: u64,
        activity: ActivityState,
        rip: u64,
        injected: u32,
    },
    /// `check` is the stable id of the failed check (see `vmx::entry`).
    VmEntryFailed {
        vmcs_gpa: u64,
        check: u16,
        exit_reason: u32,
        instruction_error: u32,
    },
    VmExit {
        vmcs_gpa: u64,
        reason: u32,
        qualification: u64,
        rip: u64,
        activity: ActivityState,
    },
    VmxAbort {
        indicator: u32,
    },
    TripleFault,
    Reset,
}

/// The kinds of [`Detail`], for filters and counters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[repr(u8)]
pub enum EventKind {
    IcrWrite,
    InitLatched,
    InitTaken,
    InitDropped,
    SipiLatched,
    SipiTaken,
    SipiDropped,
    Nmi,
    MpState,
    VmxOn,
    VmxOff,
    VmEntry,
    VmEntryFailed,
    VmExit,
    VmxAbort,
    TripleFault,
    Reset,
}

impl Detail {
    pub fn kind(&self) -> EventKind {
        match self {
            Self::IcrWrite { .. } => EventKind::IcrWrite,
            Self::Init(Fate::Latched) => EventKind::InitLatched,
            Self::Init(Fate::Dropped(_) | Fate::Coalesced) => EventKind::InitDropped,
            Self::Init(_) => EventKind::InitTaken,
            Self::Sipi { fate: Fate::Latched | Fate::Overwrote { .. }, .. } => EventKind::SipiLatched,
            Self::Sipi { fate: Fate::Dropped(_) | Fate::Coalesced, .. } => EventKind::SipiDropped,
            Self::Sipi { .. } => EventKind::SipiTaken,
            Self::Nmi(_) => EventKind::Nmi,
            Self::Activity { .. } => EventKind::MpState,
            Self::VmxOn { .. } => EventKind::VmxOn,
            Self::VmxOff => EventKind::VmxOff,
            Self::VmEntry { .. } => EventKind::VmEntry,
            Self::VmEntryFailed { .. } => EventKind::VmEntryFailed,
            Self::VmExit { .. } => EventKind::VmExit,
            Self::VmxAbort { .. } => EventKind::VmxAbort,
            Self::TripleFault => EventKind::TripleFault,
            Self::Reset => EventKind::Reset,
        }
    }
}
