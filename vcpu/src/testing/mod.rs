//! A scripted engine: the test double for what threads, events and commands need of an engine.

mod life;

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::engine::*;
use crate::event::EventWriter;
use crate::host::{Choice, EngineKind, allowed_cpus};
use crate::spec::{Nested, VmConfig, VmSpec};
use crate::thread::{Wake, lock};
use crate::vm::Vm;

pub const PATIENCE: Duration = Duration::from_secs(20);

/// What a script sees of its vCPU at each run.
pub struct Stage {
    pub index: u32,
    pub state: VcpuState,
    pub events: EventWriter,
    pub engine: Arc<FakeEngine>,
}

impl Stage {
    /// Takes an injection, as a receiver does at its instruction boundary.
    pub fn take(&mut self) -> Option<(Injection, u64)> {
        lock(&self.engine.posted[self.index as usize]).pop_front()
    }
}

pub type Script = Box<dyn FnMut(&mut Stage) -> RunOutcome + Send>;

#[derive(Default)]
pub struct FakeEngine {
    kicked: Vec<AtomicBool>,
    pub posted: Vec<Mutex<VecDeque<(Injection, u64)>>>,
    wakes: Mutex<Vec<Arc<Wake>>>,
    pub vcpu_resets: AtomicU64,
    /// For each machine reset, how many vCPUs had been reset before it.
    pub machine_resets: Mutex<Vec<u64>>,
    pub frozen: AtomicBool,
}

impl FakeEngine {
    pub fn kicked(&self, vcpu: u32) -> bool {
        self.kicked[vcpu as usize].load(SeqCst)
    }
}

impl Engine for FakeEngine {
    fn kick(&self, vcpu: u32) {
        self.kicked[vcpu as usize].store(true, SeqCst);
    }
    fn inject(&self, vcpu: u32, injection: Injection, id: u64) -> Disposition {
        lock(&self.posted[vcpu as usize]).push_back((injection, id));
        lock(&self.wakes)[vcpu as usize].notify();
        Disposition::Latched
    }
    fn console_input(&self) {}
    fn freeze(&self) {
        self.frozen.store(true, SeqCst);
    }
    fn unfreeze(&self) {
        self.frozen.store(false, SeqCst);
    }
    fn reset(&self) -> Result<(), EngineError> {
        lock(&self.machine_resets).push(self.vcpu_resets.load(SeqCst));
        Ok(())
    }
    fn now_ns(&self) -> u64 {
        0
    }
}

struct FakeVcpu {
    stage: Stage,
    script: Script,
}

impl Vcpu for FakeVcpu {
    fn attach(&mut self) -> Result<(), EngineError> {
        Ok(())
    }
    fn run(&mut self) -> RunOutcome {
        self.stage.state.instructions += 1;
        (self.script)(&mut self.stage)
    }
    fn clear_kick(&mut self) {
        self.stage.engine.kicked[self.stage.index as usize].store(false, SeqCst);
    }
    fn reset(&mut self) -> Result<(), EngineError> {
        self.stage.engine.vcpu_resets.fetch_add(1, SeqCst);
        self.stage.state = VcpuState::default();
        Ok(())
    }
    fn state(&mut self) -> VcpuState {
        self.stage.state.clone()
    }
    fn registers(&mut self) -> Registers {
        Registers { rip: self.stage.state.instructions, ..Registers::default() }
    }
    fn nested(&mut self) -> NestedReport {
        NestedReport::default()
    }
}

pub fn spec(name: &str, cpus: u32) -> VmSpec {
    let config = VmConfig { name: name.into(), cpus, nested: Nested::Emulated, ..VmConfig::default() };
    VmSpec::new(config, &allowed_cpus()).unwrap()
}

/// A VM whose vCPUs do what their scripts say.
pub fn scripted(name: &str, scripts: Vec<Script>) -> (Arc<Vm>, Arc<FakeEngine>) {
    with_spec(spec(name, scripts.len() as u32), scripts)
}

pub fn with_spec(spec: VmSpec, scripts: Vec<Script>) -> (Arc<Vm>, Arc<FakeEngine>) {
    let choice = Choice { engine: EngineKind::Emulated, nested: Nested::Emulated, reason: "test".into() };
    let engine = Arc::new(FakeEngine {
        kicked: scripts.iter().map(|_| AtomicBool::default()).collect(),
        posted: scripts.iter().map(|_| Mutex::default()).collect(),
        ..FakeEngine::default()
    });
    let shared = engine.clone();
    let vm = Vm::with_engine(spec, choice, allowed_cpus(), move |_, context| {
        *lock(&shared.wakes) = context.ports.iter().map(|p| p.wake.clone()).collect();
        let vcpus = context.ports.into_iter().zip(scripts).map(|(port, script)| {
            let stage =
                Stage { index: port.index, state: VcpuState::default(), events: port.events, engine: shared.clone() };
            Box::new(FakeVcpu { stage, script }) as Box<dyn Vcpu>
        });
        let vcpus = vcpus.collect();
        Ok(Built { engine: shared, vcpus })
    });
    (vm.unwrap(), engine)
}

/// Runs guest code that never ends.
pub fn spin() -> Script {
    Box::new(|stage| {
        while !stage.engine.kicked(stage.index) {
            std::hint::spin_loop();
        }
        RunOutcome::Kicked
    })
}

/// Runs guest code that is always halted.
pub fn halted() -> Script {
    Box::new(|_| RunOutcome::Park { halted: true, until: None })
}
