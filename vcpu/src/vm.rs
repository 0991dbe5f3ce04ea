//! A virtual machine: commands go in, published state and events come out.

use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::console::{Console, ConsoleRead};
use crate::counters::{VcpuCounters, VmCounters};
use crate::emulated;
use crate::engine::{
    Built, Disposition, EngineContext, EngineError, Injection, NestedReport, Registers, VcpuPort, VcpuState,
};
use crate::event::{EventRecord, Events, VmChange};
use crate::host::{Choice, EngineKind, HostReport, PreflightError, choose_engine, preflight};
use crate::spec::{Nested, SpecError, VmSpec, check_pin};
use crate::thread::{
    Changes, Inspection, Placement, Run, Shared, ThreadState, VcpuReport, VcpuShared, Wake, lock, pin, spawn,
    thread_cpu_ns,
};

/// A vCPU that runs guest code comes to an instruction boundary well within this.
const BOUNDARY_TIMEOUT: Duration = Duration::from_secs(10);
/// How long an injection's answer waits for its receiver to classify it.
const FATE_TIMEOUT: Duration = Duration::from_millis(250);

/// The guest wrote to the debug-exit port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestExit {
    /// The value written; a process exit status is `(code << 1) | 1` by QEMU's convention.
    pub code: u32,
}

/// What is known of the vCPU because of which a VM failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dump {
    pub vcpu: u32,
    /// Taken at the failure; else the last state published before it.
    pub exact: bool,
    pub state: VcpuState,
    pub registers: Registers,
    pub nested: NestedReport,
    /// The last events of this vCPU.
    pub events: Vec<EventRecord>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum VmState {
    Created,
    Running,
    Paused,
    /// By a client, or by the guest (then with its exit).
    Stopped {
        exit: Option<GuestExit>,
    },
    Failed {
        reason: String,
        dump: Box<Dump>,
    },
}

impl VmState {
    pub fn name(&self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped { .. } => "stopped",
            Self::Failed { .. } => "failed",
        }
    }

    pub fn ended(&self) -> bool {
        matches!(self, Self::Stopped { .. } | Self::Failed { .. })
    }
}

#[derive(Debug, thiserror::Error)]
pub enum VmError {
    #[error(transparent)]
    Spec(#[from] SpecError),
    #[error(transparent)]
    Preflight(#[from] PreflightError),
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error("{wanted} needs a VM that is {legal}; this one is {state}")]
    WrongState { state: &'static str, wanted: &'static str, legal: &'static str },
    #[error("no vCPU {vcpu}: the VM has {cpus}")]
    NoSuchVcpu { vcpu: u32, cpus: u32 },
    #[error("{what} did not happen within {after:?}")]
    Timeout { what: &'static str, after: Duration },
    #[error("starting a vCPU thread: {0}")]
    Thread(std::io::Error),
    #[error("pinning vCPU {vcpu}: {source}")]
    Pin { vcpu: u32, source: std::io::Error },
}

/// What the host's side adds to a spec.
#[derive(Clone, Debug, Default)]
pub struct VmOptions {
    /// A report taken earlier; without one, creation looks at the host.
    pub host: Option<HostReport>,
}

/// The answer to an injection. `id` is the cause of every event that follows from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Injected {
    pub id: u64,
    pub disposition: Disposition,
}

/// A virtual machine. Dropping it stops its threads and waits for them.
pub struct Vm {
    spec: VmSpec,
    choice: Choice,
    allowed_cpus: Vec<usize>,
    shared: Arc<Shared>,
    /// One command at a time.
    command: Mutex<()>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Vm {
    pub fn create(spec: VmSpec, options: VmOptions) -> Result<Arc<Self>, VmError> {
        let host = options.host.unwrap_or_else(preflight);
        let choice = choose_engine(spec.nested, spec.scheduler, &host)?;
        let (engine, nested) = (choice.engine, choice.nested);
        Self::with_engine(spec, choice, host.cpus, |spec, context| match engine {
            EngineKind::Kvm => crate::kvm::build(spec, nested == Nested::Kernel, context),
            EngineKind::Emulated => emulated::build(spec, context),
        })
    }

    pub(crate) fn with_engine(
        spec: VmSpec,
        choice: Choice,
        allowed_cpus: Vec<usize>,
        build: impl FnOnce(&VmSpec, EngineContext) -> Result<Built, EngineError>,
    ) -> Result<Arc<Self>, VmError> {
        let changes = Arc::new(Changes::default());
        let console = Arc::new(Console::new(changes.clone()));
        let counters: Vec<Arc<VcpuCounters>> = (0..spec.cpus).map(|_| Arc::default()).collect();
        let wakes: Vec<Arc<Wake>> = (0..spec.cpus).map(|_| Arc::default()).collect();
        let events = Events::new(counters.clone(), changes.clone());
        let ports = (0..spec.cpus)
            .map(|index| VcpuPort {
                index,
                wake: wakes[index as usize].clone(),
                counters: counters[index as usize].clone(),
                events: events.writer(index),
            })
            .collect();
        let context = EngineContext { console: console.clone(), events: events.clone(), ports };
        let Built { engine, vcpus } = build(&spec, context)?;

        let parts = wakes.into_iter().zip(counters).enumerate().map(|(i, (wake, counters))| {
            let wanted = spec.pin.get(i).map_or(&[][..], Vec::as_slice);
            VcpuShared::new(wake, counters, Placement::new(wanted, &allowed_cpus))
        });
        let shared = Arc::new(Shared::new(parts.collect(), engine, events, console, changes));
        let vm =
            Arc::new(Self { spec, choice, allowed_cpus, shared, command: Mutex::default(), threads: Mutex::default() });
        for (i, vcpu) in vcpus.into_iter().enumerate() {
            let thread = spawn(&vm.spec.name, i, vcpu, vm.shared.clone()).map_err(VmError::Thread)?;
            lock(&vm.threads).push(thread);
        }
        // What is published is true from the first read on: an AP does not start out running.
        for i in 0..vm.shared.vcpus.len() {
            let what = "the first publication";
            let ready = vm.shared.fresh(i, BOUNDARY_TIMEOUT);
            ready.ok_or(VmError::Timeout { what, after: BOUNDARY_TIMEOUT })?;
        }
        Ok(vm)
    }

    pub fn spec(&self) -> &VmSpec {
        &self.spec
    }

    /// The engine, and why this one.
    pub fn choice(&self) -> &Choice {
        &self.choice
    }

    pub fn state(&self) -> VmState {
        self.shared.changes.seen();
        lock(&self.shared.state).clone()
    }

    /// Lets a created VM run.
    pub fn start(&self) -> Result<(), VmError> {
        let _one = lock(&self.command);
        self.go("start", "created", |s| *s == VmState::Created, VmChange::Started)
    }

    /// Lets a paused VM run on.
    pub fn resume(&self) -> Result<(), VmError> {
        let _one = lock(&self.command);
        self.go("resume", "paused", |s| *s == VmState::Paused, VmChange::Resumed)
    }

    fn go(
        &self,
        wanted: &'static str,
        legal: &'static str,
        from: impl Fn(&VmState) -> bool,
        change: VmChange,
    ) -> Result<(), VmError> {
        {
            let mut state = lock(&self.shared.state);
            if !from(&state) {
                return Err(VmError::WrongState { state: state.name(), wanted, legal });
            }
            *state = VmState::Running;
        }
        self.shared.note(change);
        self.shared.engine.unfreeze();
        self.shared.goal.set(Run::Go);
        self.shared.call_all();
        self.shared.changes.tell();
        Ok(())
    }

    /// Stops a running VM's vCPUs at an instruction boundary each, and its time; returns when they stand.
    pub fn pause(&self) -> Result<(), VmError> {
        let _one = lock(&self.command);
        self.expect("pause", "running", |s| *s == VmState::Running)?;
        self.shared.goal.set(Run::Pause);
        self.shared.call_all();
        self.wait("pause", || {
            self.shared.vcpus.iter().all(|v| {
                let thread = lock(&v.status).thread;
                thread == ThreadState::Paused || thread.ended()
            })
        })?;
        self.shared.engine.freeze();
        {
            // It may have ended on its way.
            let mut state = lock(&self.shared.state);
            if *state != VmState::Running {
                return Err(VmError::WrongState { state: state.name(), wanted: "pause", legal: "running" });
            }
            *state = VmState::Paused;
        }
        self.shared.note(VmChange::Paused);
        Ok(())
    }

    /// Puts a running or paused VM through RESET and boots it again; it goes on running or stays paused.
    pub fn reset(&self) -> Result<(), VmError> {
        let _one = lock(&self.command);
        let legal = |s: &VmState| matches!(s, VmState::Running | VmState::Paused);
        self.expect("reset", "running or paused", legal)?;
        let epoch = self.shared.goal.ask_reset();
        self.shared.call_all();
        self.wait("reset", || self.shared.reset_done(epoch) || lock(&self.shared.state).ended())?;
        self.expect("reset", "running or paused", legal)
    }

    /// Ends a VM for good; returns when its threads are gone. What was published stays readable.
    pub fn stop(&self) -> Result<(), VmError> {
        let _one = lock(&self.command);
        if !self.shared.end(VmState::Stopped { exit: None }) {
            let state = lock(&self.shared.state).name();
            return Err(VmError::WrongState { state, wanted: "stop", legal: "created, running or paused" });
        }
        self.join();
        Ok(())
    }

    fn expect(&self, wanted: &'static str, legal: &'static str, is: impl Fn(&VmState) -> bool) -> Result<(), VmError> {
        let state = lock(&self.shared.state);
        if is(&state) { Ok(()) } else { Err(VmError::WrongState { state: state.name(), wanted, legal }) }
    }

    fn wait(&self, what: &'static str, done: impl Fn() -> bool) -> Result<(), VmError> {
        self.shared
            .changes
            .wait_for(BOUNDARY_TIMEOUT, || done().then_some(()))
            .ok_or(VmError::Timeout { what, after: BOUNDARY_TIMEOUT })
    }

    fn join(&self) {
        let me = std::thread::current().id();
        for thread in std::mem::take(&mut *lock(&self.threads)) {
            // A watcher called on a vCPU thread may hold the last handle: a thread cannot wait for itself.
            if thread.thread().id() != me {
                // It caught its own panics; there is nothing more to learn from it.
                let _ = thread.join();
            }
        }
    }

    fn index(&self, vcpu: u32) -> Result<usize, VmError> {
        let cpus = self.spec.cpus;
        if vcpu < cpus { Ok(vcpu as usize) } else { Err(VmError::NoSuchVcpu { vcpu, cpus }) }
    }

    /// What the vCPU published last, with its age. Never touches the guest.
    pub fn vcpu_published(&self, vcpu: u32) -> Result<VcpuReport, VmError> {
        self.shared.changes.seen();
        Ok(self.shared.vcpus[self.index(vcpu)?].report(vcpu))
    }

    /// The vCPU's state at an instruction boundary after this call; of a VM that has ended, the last one.
    pub fn inspect(&self, vcpu: u32, timeout: Duration) -> Result<Inspection, VmError> {
        let what = "a fresh read";
        self.shared.fresh(self.index(vcpu)?, timeout).ok_or(VmError::Timeout { what, after: timeout })
    }

    pub fn vcpu_fresh(&self, vcpu: u32, timeout: Duration) -> Result<VcpuReport, VmError> {
        Ok(self.inspect(vcpu, timeout)?.report)
    }

    pub fn registers(&self, vcpu: u32) -> Result<Registers, VmError> {
        Ok(self.inspect(vcpu, BOUNDARY_TIMEOUT)?.registers)
    }

    pub fn nested_state(&self, vcpu: u32) -> Result<NestedReport, VmError> {
        Ok(self.inspect(vcpu, BOUNDARY_TIMEOUT)?.nested)
    }

    /// Injects INIT, SIPI or NMI. The answer says what is known when the receiver has seen it, or `latched` if
    /// it has not: a paused vCPU, or one that does not come to a boundary in time. Events with the answer's id
    /// as cause tell the rest.
    pub fn inject(&self, vcpu: u32, injection: Injection) -> Result<Injected, VmError> {
        let i = self.index(vcpu)?;
        self.expect("inject", "created, running or paused", |s| !s.ended())?;
        let (events, engine) = (&self.shared.events, &self.shared.engine);
        let id = events.new_cause();
        events.expect_fate(id);
        let at = lock(&self.shared.vcpus[i].status).at();
        events.record_injection(vcpu, engine.now_ns(), id, injection, at);
        let posted = engine.inject(vcpu, injection, id);
        let running = *lock(&self.shared.state) == VmState::Running;
        let timeout = if posted == Disposition::Latched && running { FATE_TIMEOUT } else { Duration::ZERO };
        let disposition = events.fate_of(id, timeout).unwrap_or(posted);
        Ok(Injected { id, disposition })
    }

    /// Pins a vCPU's thread to other host CPUs, at any time before the VM ends.
    pub fn set_affinity(&self, vcpu: u32, cpus: &[usize]) -> Result<(), VmError> {
        let i = self.index(vcpu)?;
        check_pin(i, cpus, &self.allowed_cpus)?;
        let mut status = lock(&self.shared.vcpus[i].status);
        let placement = Placement::new(cpus, &self.allowed_cpus);
        if status.thread.ended() {
            let state = lock(&self.shared.state).name();
            return Err(VmError::WrongState { state, wanted: "set_affinity", legal: "created, running or paused" });
        }
        // The thread takes its id back under this lock before it ends. One that has not begun pins itself.
        if let Some(tid) = status.tid {
            pin(Some(tid), placement.cpus()).map_err(|source| VmError::Pin { vcpu, source })?;
        }
        status.placement = placement;
        Ok(())
    }

    pub fn events(&self) -> &Arc<Events> {
        &self.shared.events
    }

    pub fn console(&self) -> &Console {
        &self.shared.console
    }

    pub fn read_console(&self, offset: u64, max: usize) -> ConsoleRead {
        self.shared.console.read(offset, max)
    }

    /// Queues serial input; returns how many bytes found room.
    pub fn write_console(&self, bytes: &[u8]) -> usize {
        let taken = self.shared.console.queue_input(bytes);
        self.shared.engine.console_input();
        taken
    }

    /// Has `waker` called after something changed: events, console output, published or VM state. It is called
    /// once until somebody looks again, on any thread, and must not block.
    pub fn on_change(&self, waker: Box<dyn Fn() + Send + Sync>) {
        self.shared.changes.on_change(waker);
    }

    /// Waits until `look` finds something, looking again after each change.
    pub fn wait_for<T>(&self, timeout: Duration, look: impl FnMut() -> Option<T>) -> Option<T> {
        self.shared.changes.wait_for(timeout, look)
    }

    pub fn counters(&self) -> VmCounters {
        let (events, events_lost) = self.shared.events.totals();
        let vcpus = self.shared.vcpus.iter().map(|v| {
            let tid = lock(&v.status).tid;
            if let Some(ns) = tid.and_then(thread_cpu_ns) {
                v.counters.set_thread_cpu_ns(ns);
            }
            let mut counts = v.counters.snapshot();
            // A vCPU that has been in one state since it last published has not counted that yet.
            let status = lock(&v.status);
            if let Some((activity, ns)) = status.uncounted() {
                counts.activity_ns[activity as usize] += ns;
            }
            counts
        });
        VmCounters { vcpus: vcpus.collect(), events, events_lost }
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        self.shared.end(VmState::Stopped { exit: None });
        self.join();
    }
}
