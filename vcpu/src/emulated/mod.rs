//! The emulated engine: the adapter between nested-vmx's processors, vCPU threads and the machine's devices.

mod bus;
mod gate;
mod schedule;
#[cfg(test)]
mod smp_tests;
#[cfg(test)]
mod tests;
mod vcpu;
mod wiring;

use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
use std::time::{SystemTime, UNIX_EPOCH};

use nested_vmx::apic::ApicIdentity;
use nested_vmx::mailbox::Mailbox;
use nested_vmx::mem::Ram;

use crate::boot;
use crate::engine::{Built, Disposition, Engine, EngineContext, EngineError, Injection, Vcpu};
use crate::machine::{Devices, MachineConfig};
use crate::spec::{Boot, Clock, Scheduler, VmSpec};
use crate::thread::lock;
use schedule::{Deterministic, Parallel, Realtime, Schedule};
use vcpu::EmulatedVcpu;
use wiring::{KEEPER, Routes, Wiring};

/// What the RTC shows at guest time 0 where a run has to be repeatable: 2020-01-01.
const FIXED_EPOCH_S: u64 = 1_577_836_800;

/// Where the processors' RDRAND starts.
#[derive(Clone, Copy)]
enum RandomSeeds {
    Host,
    /// Of a run that can be repeated.
    Fixed(u64),
}

impl RandomSeeds {
    fn of(self, vcpu: usize) -> u64 {
        match self {
            // The standard library keys each of its hashers from the host's generator.
            Self::Host => RandomState::new().build_hasher().finish(),
            Self::Fixed(seed) => seed.wrapping_add((vcpu as u64) << 48),
        }
    }
}

struct EmulatedEngine {
    wiring: Arc<Wiring>,
    kicked: Vec<Arc<AtomicBool>>,
    boot: Boot,
}

/// Builds the engine of a VM, with its boot image loaded.
pub fn build(spec: &VmSpec, context: EngineContext) -> Result<Built, EngineError> {
    let (engine, vcpus) = engine(spec, context)?;
    Ok(Built { engine, vcpus })
}

type Parts = (Arc<EmulatedEngine>, Vec<Box<dyn Vcpu>>);

fn engine(spec: &VmSpec, context: EngineContext) -> Result<Parts, EngineError> {
    let host = |what| move |source| EngineError::Host { what, source };
    let ram = Arc::new(Ram::new(spec.memory_bytes).map_err(host("guest memory"))?);
    let start = boot::load(&spec.boot, &ram)?.map(Arc::new);
    let realtime = spec.clock == Clock::Realtime;
    let epoch_s = match SystemTime::now().duration_since(UNIX_EPOCH) {
        Ok(now) if realtime => now.as_secs(),
        _ => FIXED_EPOCH_S,
    };
    let config = MachineConfig { cpus: spec.cpus, memory_bytes: spec.memory_bytes, testdev: spec.testdev, epoch_s };
    let wakes: Vec<_> = context.ports.iter().map(|p| p.wake.clone()).collect();
    let schedule: Arc<dyn Schedule> = match (spec.clock, spec.scheduler) {
        (Clock::Realtime, _) => Arc::new(Realtime::new(wakes)),
        (Clock::Virtual, Scheduler::Parallel) => Arc::new(Parallel::new(wakes)),
        (Clock::Virtual, Scheduler::Deterministic { seed }) => Arc::new(Deterministic::new(wakes, seed)),
    };
    let mailboxes: Vec<Arc<Mailbox>> = (0..spec.cpus).map(|_| Arc::default()).collect();
    let routes = Routes::new(vec![ApicIdentity::default(); spec.cpus as usize]);
    let devices = Devices::new(config);
    let EngineContext { console, events, ports } = context;
    let wiring = Arc::new(Wiring::new(ram, mailboxes, schedule, routes, events, console, devices));
    let kicked: Vec<Arc<AtomicBool>> = (0..spec.cpus).map(|_| Arc::default()).collect();
    let seeds = match spec.scheduler {
        Scheduler::Parallel => RandomSeeds::Host,
        Scheduler::Deterministic { seed } => RandomSeeds::Fixed(seed),
    };
    let vcpus = ports.into_iter().zip(&kicked).map(|(port, kicked)| {
        let boot = start.clone().filter(|_| port.index as usize == KEEPER);
        let vcpu = EmulatedVcpu::new(port, wiring.clone(), kicked.clone(), boot, realtime, seeds)?;
        Ok(Box::new(vcpu) as Box<dyn Vcpu>)
    });
    let vcpus = vcpus.collect::<Result<_, EngineError>>()?;
    let engine = Arc::new(EmulatedEngine { wiring, kicked, boot: spec.boot.clone() });
    Ok((engine, vcpus))
}

impl Engine for EmulatedEngine {
    fn kick(&self, vcpu: u32) {
        if let Some(kicked) = self.kicked.get(vcpu as usize) {
            vcpu::kick(kicked, &self.wiring, vcpu as usize);
        }
    }

    fn inject(&self, vcpu: u32, injection: Injection, id: u64) -> Disposition {
        let answer = Arc::new(Mutex::new(None));
        let (wiring, slot) = (self.wiring.clone(), answer.clone());
        self.wiring.schedule.outside(Box::new(move || {
            *lock(&slot) = Some(wiring.inject(vcpu as usize, injection, id));
        }));
        // Not done yet: the deterministic scheduler takes it at the next boundary.
        lock(&answer).unwrap_or(Disposition::Latched)
    }

    fn console_input(&self) {
        let wiring = self.wiring.clone();
        self.wiring.schedule.outside(Box::new(move || wiring.input_queued()));
    }

    fn freeze(&self) {
        self.wiring.schedule.freeze();
    }

    fn unfreeze(&self) {
        self.wiring.schedule.unfreeze();
    }

    fn reset(&self) -> Result<(), EngineError> {
        boot::clear(&self.wiring.ram).map_err(|source| EngineError::Host { what: "clearing guest memory", source })?;
        boot::load(&self.boot, &self.wiring.ram)?;
        self.wiring.reset();
        Ok(())
    }

    fn now_ns(&self) -> u64 {
        self.wiring.schedule.now()
    }
}
