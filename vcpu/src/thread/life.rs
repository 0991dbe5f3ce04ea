//! A vCPU thread's life: a state machine in which each state returns the next.
//!
//! What the VM wants of all its threads is one word, [`Goal`]; a thread looks at it whenever its engine's run
//! returns, and reports what it reached in its [`Status`].

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nested_vmx::event::ActivityState;
use rustix::process::Pid;
use serde::{Deserialize, Serialize};

use super::{Changes, Placement, Wake, lock, pin};
use crate::console::Console;
use crate::counters::VcpuCounters;
use crate::engine::{Engine, NestedReport, Registers, RunOutcome, Vcpu, VcpuState};
use crate::event::{At, Events, VmChange, WHOLE_VM, What};
use crate::vm::{Dump, VmState};

/// How many of a vCPU's last events a dump shows.
const DUMP_EVENTS: usize = 32;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum ThreadState {
    #[default]
    Created,
    Running,
    /// Asleep: the guest has nothing to do.
    Idle,
    Paused,
    Resetting,
    Stopped,
    Failed,
}

impl ThreadState {
    pub fn ended(self) -> bool {
        matches!(self, Self::Stopped | Self::Failed)
    }
}

/// What all threads of a VM shall do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Run {
    Hold,
    Go,
    Pause,
    Stop,
}

/// The VM's goal in one word: what to do, and how many resets were asked for.
#[derive(Debug, Default)]
pub(crate) struct Goal(AtomicU64);

impl Goal {
    fn get(&self) -> (Run, u64) {
        let word = self.0.load(Ordering::Acquire);
        let run = match word & 3 {
            0 => Run::Hold,
            1 => Run::Go,
            2 => Run::Pause,
            _ => Run::Stop,
        };
        (run, word >> 2)
    }

    /// Stop is final.
    pub fn set(&self, run: Run) {
        let _ = self.0.fetch_update(Ordering::AcqRel, Ordering::Acquire, |word| {
            (word & 3 != Run::Stop as u64).then_some(word & !3 | run as u64)
        });
    }

    pub fn ask_reset(&self) -> u64 {
        (self.0.fetch_add(4, Ordering::AcqRel) >> 2) + 1
    }
}

/// What outlives the vCPU threads and is reached from both sides.
pub(crate) struct Shared {
    pub goal: Goal,
    pub state: Mutex<VmState>,
    pub vcpus: Vec<VcpuShared>,
    pub engine: Arc<dyn Engine>,
    pub events: Arc<Events>,
    pub console: Arc<Console>,
    pub changes: Arc<Changes>,
    barrier: Mutex<Barrier>,
}

#[derive(Debug, Default)]
struct Barrier {
    arrived: usize,
    done_epoch: u64,
}

pub(crate) struct VcpuShared {
    pub wake: Arc<Wake>,
    pub counters: Arc<VcpuCounters>,
    /// How many full publications were asked for.
    asked: AtomicU64,
    pub status: Mutex<Status>,
}

pub(crate) struct Status {
    pub thread: ThreadState,
    /// While the thread lives.
    pub tid: Option<Pid>,
    pub placement: Placement,
    state: VcpuState,
    at: Instant,
    /// Taken less often than `state`.
    registers: Registers,
    nested: NestedReport,
    /// Which request the full publication answered.
    served: u64,
}

/// A vCPU as it was published.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VcpuReport {
    pub index: u32,
    pub thread: ThreadState,
    pub tid: Option<u32>,
    pub host_cpus: Vec<usize>,
    /// One consistent copy, taken at an instruction boundary.
    pub state: VcpuState,
    pub age_ns: u64,
}

/// A full publication.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inspection {
    pub report: VcpuReport,
    pub registers: Registers,
    pub nested: NestedReport,
}

impl Status {
    /// The activity state since the last publication, and for how long, while the vCPU is not held.
    pub fn uncounted(&self) -> Option<(ActivityState, u64)> {
        let goes = matches!(self.thread, ThreadState::Running | ThreadState::Idle);
        goes.then(|| (self.state.activity, u64::try_from(self.at.elapsed().as_nanos()).unwrap_or(0)))
    }

    pub fn at(&self) -> At {
        At { mp_state: self.state.mp_state, activity: self.state.activity }
    }
}

impl VcpuShared {
    pub fn new(wake: Arc<Wake>, counters: Arc<VcpuCounters>, placement: Placement) -> Self {
        let status = Status {
            thread: ThreadState::Created,
            tid: None,
            placement,
            state: VcpuState::default(),
            at: Instant::now(),
            registers: Registers::default(),
            nested: NestedReport::default(),
            served: 0,
        };
        Self { wake, counters, asked: AtomicU64::new(0), status: Mutex::new(status) }
    }

    pub fn report(&self, index: u32) -> VcpuReport {
        let status = lock(&self.status);
        VcpuReport {
            index,
            thread: status.thread,
            tid: status.tid.map(|t| t.as_raw_nonzero().get().unsigned_abs()),
            host_cpus: status.placement.cpus().to_vec(),
            state: status.state.clone(),
            age_ns: u64::try_from(status.at.elapsed().as_nanos()).unwrap_or(u64::MAX),
        }
    }
}

impl Shared {
    pub fn new(
        vcpus: Vec<VcpuShared>,
        engine: Arc<dyn Engine>,
        events: Arc<Events>,
        console: Arc<Console>,
        changes: Arc<Changes>,
    ) -> Self {
        Self {
            goal: Goal::default(),
            state: Mutex::new(VmState::Created),
            vcpus,
            engine,
            events,
            console,
            changes,
            barrier: Mutex::default(),
        }
    }

    /// Makes every thread look at the goal.
    pub fn call_all(&self) {
        for i in 0..self.vcpus.len() {
            self.call(i);
        }
    }

    fn call(&self, i: usize) {
        self.engine.kick(i as u32);
        self.vcpus[i].wake.notify();
    }

    /// Has vCPU `i` publish everything at its next instruction boundary.
    pub fn fresh(&self, i: usize, timeout: Duration) -> Option<Inspection> {
        let vcpu = &self.vcpus[i];
        let ticket = vcpu.asked.fetch_add(1, Ordering::AcqRel) + 1;
        self.call(i);
        self.changes.wait_for(timeout, || {
            let status = lock(&vcpu.status);
            (status.served >= ticket || status.thread.ended()).then_some(())
        })?;
        Some(self.inspection(i))
    }

    pub fn inspection(&self, i: usize) -> Inspection {
        let report = self.vcpus[i].report(i as u32);
        let status = lock(&self.vcpus[i].status);
        Inspection { report, registers: status.registers.clone(), nested: status.nested.clone() }
    }

    pub fn reset_done(&self, epoch: u64) -> bool {
        lock(&self.barrier).done_epoch >= epoch
    }

    pub fn note(&self, change: VmChange) {
        let at = ActivityState::Active.into();
        self.events.record_outside(WHOLE_VM, self.engine.now_ns(), 0, at, What::Vm(change));
    }

    /// Ends the VM, unless it has ended; returns whether this call did.
    pub fn end(&self, end: VmState) -> bool {
        let change = match &end {
            VmState::Failed { .. } => VmChange::Failed,
            _ => VmChange::Stopped,
        };
        {
            let mut state = lock(&self.state);
            if state.ended() {
                return false;
            }
            *state = end;
        }
        // Before the threads are told: once they are all gone, nothing more is recorded.
        self.note(change);
        self.goal.set(Run::Stop);
        self.changes.tell();
        self.call_all();
        true
    }
}

/// Starts the thread of vCPU `i`; it holds the guest until the goal says go.
pub(crate) fn spawn(
    vm_name: &str,
    i: usize,
    vcpu: Box<dyn Vcpu>,
    shared: Arc<Shared>,
) -> std::io::Result<JoinHandle<()>> {
    std::thread::Builder::new().name(thread_name(vm_name, i)).spawn(move || {
        let activity = ActivityState::Active;
        Life { shared, i, vcpu, epoch: 0, served: 0, thread: ThreadState::Created, activity, since: Instant::now() }
            .live();
    })
}

/// Linux keeps 15 bytes of a thread's name: the VM's part gives way.
fn thread_name(vm_name: &str, i: usize) -> String {
    let tail = format!("/vcpu{i}");
    let head: String = vm_name.chars().take(15usize.saturating_sub(tail.len())).collect();
    head + &tail
}

enum State {
    Created,
    Running,
    Parked { halted: bool, until: Option<Instant> },
    Paused,
    Resetting,
    Stopped,
    Failed(String),
}

struct Life {
    shared: Arc<Shared>,
    i: usize,
    vcpu: Box<dyn Vcpu>,
    /// How many resets this vCPU has taken part in.
    epoch: u64,
    served: u64,
    thread: ThreadState,
    /// Which activity state host time is counted for, and since when.
    activity: ActivityState,
    since: Instant,
}

impl Life {
    fn live(mut self) {
        let lived = catch_unwind(AssertUnwindSafe(|| self.live_on()));
        let reason = match lived {
            Ok(reason) => reason,
            Err(panic) => Some(format!("vCPU {} panicked: {}", self.i, panic_text(&*panic))),
        };
        match reason {
            None => self.leave(ThreadState::Stopped),
            Some(reason) => self.fail(reason),
        }
    }

    /// Returns why the VM failed, if it did.
    fn live_on(&mut self) -> Option<String> {
        let mut state = match self.begin() {
            Ok(()) => State::Created,
            Err(e) => State::Failed(e),
        };
        loop {
            state = match state {
                State::Created => self.hold(ThreadState::Created),
                State::Paused => self.hold(ThreadState::Paused),
                State::Running => self.run(),
                State::Parked { halted, until } => self.park(halted, until),
                State::Resetting => self.reset(),
                State::Stopped => {
                    self.publish_full();
                    return None;
                }
                State::Failed(reason) => return Some(reason),
            };
        }
    }

    fn me(&self) -> &VcpuShared {
        &self.shared.vcpus[self.i]
    }

    fn begin(&mut self) -> Result<(), String> {
        {
            let mut status = lock(&self.me().status);
            status.tid = Some(rustix::thread::gettid());
            pin(None, status.placement.cpus()).map_err(|e| format!("vCPU {}: pinning: {e}", self.i))?;
        }
        self.vcpu.attach().map_err(|e| format!("vCPU {}: {e}", self.i))
    }

    /// Looks at what is asked of this thread, and says which state follows.
    fn duty(&mut self) -> State {
        // Before looking: a kick that comes later is for something that is not seen here.
        self.vcpu.clear_kick();
        let asked = self.me().asked.load(Ordering::Acquire);
        if asked != self.served {
            self.served = asked;
            self.publish_full();
        }
        match self.shared.goal.get() {
            (Run::Stop, _) => State::Stopped,
            (_, epoch) if epoch != self.epoch => State::Resetting,
            (Run::Hold, _) => State::Created,
            (Run::Go, _) => State::Running,
            (Run::Pause, _) => State::Paused,
        }
    }

    fn hold(&mut self, as_what: ThreadState) -> State {
        self.publish_full();
        self.enter(as_what);
        loop {
            match (self.duty(), as_what) {
                (State::Created, ThreadState::Created) | (State::Paused, ThreadState::Paused) => {}
                (next, _) => {
                    // Time spent here is not the guest's.
                    self.since = Instant::now();
                    self.publish();
                    return next;
                }
            }
            self.me().wake.wait(None);
        }
    }

    fn run(&mut self) -> State {
        self.enter(ThreadState::Running);
        loop {
            match self.duty() {
                State::Running => {}
                next => return next,
            }
            let outcome = self.vcpu.run();
            self.me().counters.add_host_exit();
            self.publish();
            match outcome {
                RunOutcome::Kicked | RunOutcome::Publish => {}
                RunOutcome::Park { halted, until } => return State::Parked { halted, until },
                RunOutcome::GuestExit(exit) => {
                    self.publish_full();
                    self.shared.end(VmState::Stopped { exit: Some(exit) });
                }
                RunOutcome::PowerOff => {
                    self.publish_full();
                    self.shared.end(VmState::Stopped { exit: None });
                }
                RunOutcome::GuestReset => {
                    self.shared.goal.ask_reset();
                    self.shared.call_all();
                }
                RunOutcome::Failed(reason) => return State::Failed(reason),
            }
        }
    }

    fn park(&mut self, halted: bool, until: Option<Instant>) -> State {
        if halted {
            self.enter(ThreadState::Idle);
            self.count_cpu_time();
        }
        self.me().wake.wait(until);
        self.me().counters.add_wakeup();
        match self.duty() {
            State::Running => State::Running,
            next => next,
        }
    }

    /// Every vCPU resets itself; the last one to arrive, when no guest code runs any more, resets the machine.
    fn reset(&mut self) -> State {
        self.enter(ThreadState::Resetting);
        if let Err(e) = self.vcpu.reset() {
            return State::Failed(format!("vCPU {}: reset: {e}", self.i));
        }
        let shared = self.shared.clone();
        {
            let mut barrier = lock(&shared.barrier);
            barrier.arrived += 1;
            if barrier.arrived == shared.vcpus.len() {
                barrier.arrived = 0;
                if let Err(e) = shared.engine.reset() {
                    return State::Failed(format!("reset: {e}"));
                }
                barrier.done_epoch = shared.goal.get().1;
                shared.note(VmChange::Reset);
                for vcpu in &shared.vcpus {
                    vcpu.wake.notify();
                }
            }
        }
        let (_, wanted) = shared.goal.get();
        let target = wanted.min(self.epoch + 1);
        loop {
            let done = lock(&shared.barrier).done_epoch;
            if done >= target {
                self.epoch = done;
                self.publish_full();
                return self.duty();
            }
            match self.duty() {
                State::Stopped => return State::Stopped,
                _ => self.me().wake.wait(None),
            };
        }
    }

    fn enter(&mut self, thread: ThreadState) {
        if self.thread != thread {
            self.thread = thread;
            lock(&self.me().status).thread = thread;
            self.shared.changes.tell();
        }
    }

    /// Publishes a consistent copy of the state, at the instruction boundary where the engine stands.
    fn publish(&mut self) {
        let state = self.vcpu.state();
        let now = Instant::now();
        let me = &self.shared.vcpus[self.i];
        me.counters.set_instructions(state.instructions);
        let ns = u64::try_from(now.duration_since(self.since).as_nanos()).unwrap_or(0);
        me.counters.add_activity_ns(self.activity, ns);
        (self.activity, self.since) = (state.activity, now);
        let news = {
            let mut status = lock(&me.status);
            let key = |s: &VcpuState| (s.mp_state, s.activity, s.vmx_mode, s.init_latched, s.pending_sipi);
            let news = key(&status.state) != key(&state);
            status.state = state;
            status.at = now;
            news
        };
        if news {
            self.shared.changes.tell();
        }
    }

    fn publish_full(&mut self) {
        self.publish();
        let (registers, nested) = (self.vcpu.registers(), self.vcpu.nested());
        {
            let mut status = lock(&self.me().status);
            status.registers = registers;
            status.nested = nested;
            status.served = self.served;
        }
        self.shared.changes.tell();
    }

    /// The thread's own clock, which a reader from outside cannot name.
    fn count_cpu_time(&self) {
        let t = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
        let ns = (t.tv_sec as u64).saturating_mul(1_000_000_000).saturating_add(t.tv_nsec as u64);
        self.me().counters.set_thread_cpu_ns(ns);
    }

    /// The VM fails with what is known here; its other threads stop.
    fn fail(&mut self, reason: String) {
        // The processor may be in any state after a panic: reading it may panic again.
        let read = catch_unwind(AssertUnwindSafe(|| self.publish_full()));
        let dump = {
            let status = lock(&self.me().status);
            Dump {
                vcpu: self.i as u32,
                exact: read.is_ok(),
                state: status.state.clone(),
                registers: status.registers.clone(),
                nested: status.nested.clone(),
                events: self.shared.events.last_of(self.i as u32, DUMP_EVENTS),
            }
        };
        tracing::error!(reason, vcpu = self.i, "VM failed");
        self.shared.end(VmState::Failed { reason, dump: Box::new(dump) });
        self.leave(ThreadState::Failed);
    }

    fn leave(&mut self, thread: ThreadState) {
        self.count_cpu_time();
        lock(&self.me().status).tid = None;
        self.enter(thread);
    }
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    match (panic.downcast_ref::<&str>(), panic.downcast_ref::<String>()) {
        (Some(s), _) => (*s).into(),
        (_, Some(s)) => s.clone(),
        _ => "without a message".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thread_names_keep_the_vcpu_number_within_15_bytes() {
        assert_eq!(thread_name("vm", 0), "vm/vcpu0");
        assert_eq!(thread_name("a-rather-long-name", 12), "a-rather/vcpu12");
    }

    #[test]
    fn stop_is_final() {
        let goal = Goal::default();
        goal.set(Run::Stop);
        goal.set(Run::Go);
        assert_eq!(goal.get(), (Run::Stop, 0));
        assert_eq!(goal.ask_reset(), 1);
        assert_eq!(goal.get(), (Run::Stop, 1));
    }
}
