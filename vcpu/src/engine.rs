//! What both engines implement, so that one thread, one API and one event vocabulary serve them.
//!
//! An engine is one [`Engine`], shared by everybody who holds the VM, and one [`Vcpu`] for each processor,
//! which its thread owns. A vCPU waits in one of two ways, and both end by [`Engine::kick`]: inside
//! [`Vcpu::run`] (KVM: `KVM_RUN` blocks, and a signal with `immediate_exit` ends it), or by returning
//! [`RunOutcome::Park`], after which the thread sleeps on its [`crate::thread::Wake`].

use std::sync::Arc;
use std::time::Instant;

use nested_vmx::event::{ActivityState, Fate, MpState, Rule, VmxMode};
use serde::{Deserialize, Serialize};

use crate::boot::BootError;
use crate::console::Console;
use crate::counters::VcpuCounters;
use crate::event::{EventWriter, Events};
use crate::thread::Wake;
use crate::vm::GuestExit;

/// What an engine is built from and reports to.
pub struct EngineContext {
    pub console: Arc<Console>,
    pub events: Arc<Events>,
    pub ports: Vec<VcpuPort>,
}

/// One vCPU's connections, handed to its [`Vcpu`].
pub struct VcpuPort {
    pub index: u32,
    pub wake: Arc<Wake>,
    pub counters: Arc<VcpuCounters>,
    pub events: EventWriter,
}

/// A built engine.
pub struct Built {
    pub engine: Arc<dyn Engine>,
    /// In vCPU order; each moves to its thread.
    pub vcpus: Vec<Box<dyn Vcpu>>,
}

#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    #[error("{what}: {source}")]
    Host { what: &'static str, source: std::io::Error },
    #[error(transparent)]
    Boot(#[from] BootError),
    #[error("{0}")]
    Unsupported(String),
}

/// The VM's side of an engine: callable from any thread, never waiting for the guest.
pub trait Engine: Send + Sync {
    /// Makes [`Vcpu::run`] of `vcpu` return [`RunOutcome::Kicked`] soon, or its next call at once, until
    /// [`Vcpu::clear_kick`]. The thread's wake is the caller's business.
    fn kick(&self, vcpu: u32);

    /// Posts an injection whose id is `id`, and wakes its receiver if it is parked and has to see it. The answer is what the sender can know: [`Disposition::Latched`]
    /// where the receiver decides (its event then carries the same id as cause).
    fn inject(&self, vcpu: u32, injection: Injection, id: u64) -> Disposition;

    /// Console input was queued: raise the serial device's interrupt if the guest wants it.
    fn console_input(&self);

    /// All vCPU threads stopped running guest code; the VM's time stands still until [`Engine::unfreeze`].
    fn freeze(&self);
    fn unfreeze(&self);

    /// Puts memory and devices back to what they were at creation. No vCPU runs, and each has gone through
    /// [`Vcpu::reset`].
    fn reset(&self) -> Result<(), EngineError>;

    /// The VM's time now, in nanoseconds since it was started: stamps what is recorded from outside.
    fn now_ns(&self) -> u64;
}

/// One processor. Only its own thread calls it, after [`Vcpu::attach`].
pub trait Vcpu: Send {
    /// First call on the vCPU's own thread.
    fn attach(&mut self) -> Result<(), EngineError>;
    /// Runs guest code until something that its thread must know of.
    fn run(&mut self) -> RunOutcome;
    /// Takes back [`Engine::kick`], before the thread looks at its commands.
    fn clear_kick(&mut self);
    /// RESET, with the boot protocol's state loaded again.
    fn reset(&mut self) -> Result<(), EngineError>;

    /// Pure reads at an instruction boundary.
    fn state(&mut self) -> VcpuState;
    fn registers(&mut self) -> Registers;
    fn nested(&mut self) -> NestedReport;
}

/// Why [`Vcpu::run`] returned.
#[derive(Debug)]
pub enum RunOutcome {
    /// [`Engine::kick`] asked for it.
    Kicked,
    /// Returned at an instruction boundary to have a fresh state published; to be called again.
    Publish,
    /// Nothing to do before a wake, or `until`.
    Park {
        halted: bool,
        until: Option<Instant>,
    },
    /// The guest ended the VM through the debug-exit port.
    GuestExit(GuestExit),
    PowerOff,
    /// The guest asked for a reset of the machine.
    GuestReset,
    /// The VM cannot go on.
    Failed(String),
}

/// A vCPU's state at an instruction boundary.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VcpuState {
    pub mp_state: MpState,
    pub activity: ActivityState,
    pub vmx_mode: VmxMode,
    pub vmxon_gpa: Option<u64>,
    pub current_vmcs_gpa: Option<u64>,
    pub init_latched: bool,
    /// The vector of a SIPI that is pending and not yet classified.
    pub pending_sipi: Option<u8>,
    pub rip: u64,
    pub cr0: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub efer: u64,
    pub instructions: u64,
    pub tsc: u64,
    /// The VM's time of this vCPU.
    pub time_ns: u64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Segment {
    pub selector: u16,
    pub base: u64,
    pub limit: u32,
    /// As the VMCS encodes access rights, with bit 16 for "unusable".
    pub access_rights: u32,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DescriptorTable {
    pub base: u64,
    pub limit: u16,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Registers {
    /// RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8 to R15: the order of the encoding.
    pub gprs: [u64; 16],
    pub rip: u64,
    pub rflags: u64,
    /// ES, CS, SS, DS, FS, GS, LDTR, TR.
    pub segments: [Segment; 8],
    pub gdtr: DescriptorTable,
    pub idtr: DescriptorTable,
    pub cr0: u64,
    pub cr2: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub cr8: u64,
    pub efer: u64,
    pub dr: [u64; 8],
    pub apic_base: u64,
}

/// The VMX side of a vCPU.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NestedReport {
    pub mode: VmxMode,
    pub vmxon_gpa: Option<u64>,
    pub current_vmcs_gpa: Option<u64>,
    pub revision_id: u32,
    /// The current VMCS12 as (SDM field encoding, value); empty without a current VMCS.
    pub fields: Vec<(u32, u64)>,
}

/// What a client may inject.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Injection {
    Init,
    Sipi { vector: u8 },
    Nmi,
}

/// What became of an injection, as far as it is known when answered (design.md).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Disposition {
    Latched,
    Delivered,
    Started,
    VmExit(u16),
    Reset,
    Coalesced,
    Overwrote {
        previous_cause: u64,
    },
    Dropped(Rule),
    /// KVM took it and does not say more.
    AcceptedFateNotObservable,
}

impl From<Fate> for Disposition {
    fn from(fate: Fate) -> Self {
        match fate {
            Fate::Latched => Self::Latched,
            Fate::Delivered => Self::Delivered,
            Fate::Started => Self::Started,
            Fate::VmExit(reason) => Self::VmExit(reason),
            Fate::Reset => Self::Reset,
            Fate::Coalesced => Self::Coalesced,
            Fate::Overwrote { previous_cause } => Self::Overwrote { previous_cause },
            Fate::Dropped(rule) => Self::Dropped(rule),
        }
    }
}
