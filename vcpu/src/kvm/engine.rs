//! The KVM engine behind the crate's engine traits: the machine around the vCPUs, and what is published of them.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use nested_vmx::event::{ActivityState, Detail, Fate, MpState, Rule};
use nested_vmx::mem::Ram;

use super::failure::{KvmError, KvmFailure};
use super::kick::{Adopted, Kicker};
use super::vcpu::{Devices, KvmVcpu, RunOutcome as KvmOutcome, initial_mp_state};
use super::vm::{Created, Delivery, KvmVm, Message};
use crate::boot;
use crate::console::Console;
use crate::engine::{
    Built, Disposition, Engine, EngineContext, EngineError, Injection, NestedReport, Registers, RunOutcome, Vcpu,
    VcpuPort, VcpuState,
};
use crate::event::{At, EventWriter, Events, What};
use crate::host::KvmKind;
use crate::machine::{Lines, MachineConfig, Outcome, Platform};
use crate::spec::{Boot, VmSpec};
use crate::thread::lock;
use crate::vm::GuestExit;

const SERIAL_FIRST: u16 = 0x3f8;
const SERIAL_LAST: u16 = 0x3ff;

/// Builds a VM; with `vmx`, one whose VMX the kernel runs.
pub(crate) fn build(spec: &VmSpec, vmx: bool, context: EngineContext) -> Result<Built, EngineError> {
    let ram = Ram::new(spec.memory_bytes).map_err(host("allocating guest memory"))?;
    let ram = Arc::new(ram);
    let bsp = boot::load(&spec.boot, &ram)?;
    let counters = context.ports.iter().map(|port| port.counters.clone()).collect();
    let Created { vm, vcpus, kickers } = KvmVm::create(ram, bsp.as_ref(), vmx, counters).map_err(kvm_error)?;
    let epoch_s = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let config = MachineConfig { cpus: spec.cpus, memory_bytes: spec.memory_bytes, testdev: spec.testdev, epoch_s };
    let board = Arc::new(Board {
        platform: Mutex::new(Platform::new(config)),
        vm: vm.clone(),
        console: context.console,
        started: OnceLock::new(),
    });
    let causes: Vec<Arc<Causes>> = vcpus.iter().map(|_| Arc::default()).collect();
    let vcpus = vcpus.into_iter().zip(context.ports).zip(&causes).map(|((vcpu, port), causes)| {
        Box::new(Processor::new(vcpu, board.clone(), causes.clone(), port)) as Box<dyn Vcpu>
    });
    let vcpus = vcpus.collect();
    let engine = Arc::new(KvmEngine { vm, kickers, board, causes, events: context.events, boot: spec.boot.clone() });
    Ok(Built { engine, vcpus })
}

fn host(what: &'static str) -> impl FnOnce(std::io::Error) -> EngineError {
    move |source| EngineError::Host { what, source }
}

fn kvm_error(error: KvmError) -> EngineError {
    match error {
        KvmError::Ioctl { what, source } => EngineError::Host { what, source },
        KvmError::Open(source) => EngineError::Host { what: "opening /dev/kvm", source },
        KvmError::Memory(source) => EngineError::Host { what: "mapping guest memory", source },
        error => EngineError::Unsupported(error.to_string()),
    }
}

/// The devices outside KVM.
struct Board {
    platform: Mutex<Platform>,
    vm: Arc<KvmVm>,
    console: Arc<Console>,
    started: OnceLock<Instant>,
}

impl Board {
    /// The VM's time: the host's, as the kernel's TSC and timers follow it, also while the VM is paused.
    fn now_ns(&self) -> u64 {
        self.started.get().map_or(0, |start| u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX))
    }

    fn wires(&self) -> Wires<'_> {
        Wires { vm: &self.vm, console: &self.console }
    }

    /// Hands queued input to the serial device as far as it has room.
    fn feed_serial(&self) {
        let mut platform = lock(&self.platform);
        let input = self.console.take_input(platform.console_room());
        if !input.is_empty() {
            platform.console_input(&input, &mut self.wires());
        }
    }
}

impl Devices for Board {
    fn io_read(&self, port: u16, size: u8) -> u32 {
        let value = lock(&self.platform).io_read(port, size, self.now_ns());
        if (SERIAL_FIRST..=SERIAL_LAST).contains(&port) {
            self.feed_serial();
        }
        value
    }

    fn io_write(&self, port: u16, size: u8, value: u32) -> Outcome {
        lock(&self.platform).io_write(port, size, value, &mut self.wires())
    }

    fn mmio_read(&self, _: u64, size: u8) -> u64 {
        u64::MAX >> (64 - 8 * u32::from(size.clamp(1, 8)))
    }

    fn mmio_write(&self, _: u64, _: u8, _: u64) {}
}

/// Interrupt lines to the kernel's interrupt controllers.
struct Wires<'a> {
    vm: &'a KvmVm,
    console: &'a Console,
}

impl Lines for Wires<'_> {
    fn set_irq(&mut self, irq: u8, high: bool) {
        if let Err(error) = self.vm.set_irq_line(irq.into(), high) {
            tracing::error!(irq, %error, "interrupt line");
        }
    }

    fn console(&mut self, bytes: &[u8]) {
        self.console.push_output(bytes);
    }
}

/// The last injection of each kind that KVM accepted and no change of mp_state has been put down to yet. KVM does
/// not say what caused a change; where the guest sends INIT or SIPI at the same time, the wrong one may be named.
#[derive(Default)]
struct Causes {
    init: AtomicU64,
    sipi: AtomicU64,
}

impl Causes {
    fn expect(&self, injection: Injection, id: u64) {
        match injection {
            Injection::Init => self.init.store(id, Ordering::SeqCst),
            Injection::Sipi { .. } => self.sipi.store(id, Ordering::SeqCst),
            // Changes nothing that is published.
            Injection::Nmi => {}
        }
    }

    fn of(&self, from: MpState, to: MpState) -> u64 {
        match (from, to) {
            (from, to) if from == to => 0,
            (_, MpState::InitReceived) => self.init.swap(0, Ordering::SeqCst),
            (MpState::InitReceived | MpState::Uninitialized, _) => {
                self.init.store(0, Ordering::SeqCst);
                self.sipi.swap(0, Ordering::SeqCst)
            }
            _ => 0,
        }
    }
}

struct KvmEngine {
    vm: Arc<KvmVm>,
    kickers: Vec<Arc<Kicker>>,
    board: Arc<Board>,
    causes: Vec<Arc<Causes>>,
    events: Arc<Events>,
    boot: Boot,
}

impl Engine for KvmEngine {
    fn kick(&self, vcpu: u32) {
        if let Some(kicker) = self.kickers.get(vcpu as usize) {
            kicker.kick();
        }
    }

    fn inject(&self, vcpu: u32, injection: Injection, id: u64) -> Disposition {
        let (message, dropped) = match injection {
            Injection::Init => (Message::Init, Detail::Init(Fate::Dropped(Rule::R22))),
            Injection::Sipi { vector } => {
                (Message::Sipi { vector }, Detail::Sipi { vector, fate: Fate::Dropped(Rule::R22) })
            }
            Injection::Nmi => (Message::Nmi, Detail::Nmi(Fate::Dropped(Rule::R22))),
        };
        // Before it is sent: the vCPU may show what it did before `send` returns.
        if let Some(causes) = self.causes.get(vcpu as usize) {
            causes.expect(injection, id);
        }
        match self.vm.send(vcpu, message) {
            Ok(Delivery::Accepted) => {
                // KVM tells nobody what the vCPU makes of it: have the vCPU look and publish.
                self.kick(vcpu);
                Disposition::AcceptedFateNotObservable
            }
            refused => {
                if let Err(error) = refused {
                    tracing::error!(vcpu, %error, "injection");
                }
                let at = ActivityState::Active.into();
                self.events.record_outside(vcpu, self.now_ns(), id, at, What::Processor(dropped));
                Disposition::Dropped(Rule::R22)
            }
        }
    }

    fn console_input(&self) {
        self.board.feed_serial();
    }

    fn freeze(&self) {}

    fn unfreeze(&self) {
        self.board.started.get_or_init(Instant::now);
    }

    fn reset(&self) -> Result<(), EngineError> {
        self.vm.reset().map_err(kvm_error)?;
        lock(&self.board.platform).reset();
        boot::clear(self.vm.ram()).map_err(host("clearing guest memory"))?;
        boot::load(&self.boot, self.vm.ram())?;
        Ok(())
    }

    fn now_ns(&self) -> u64 {
        self.board.now_ns()
    }
}

/// One vCPU on its thread.
struct Processor {
    vcpu: KvmVcpu,
    board: Arc<Board>,
    causes: Arc<Causes>,
    events: EventWriter,
    adopted: Option<Adopted>,
    state: VcpuState,
    registers: Registers,
    /// Reading the state failed; the next run says so.
    failure: Option<KvmFailure>,
}

impl Processor {
    fn new(vcpu: KvmVcpu, board: Arc<Board>, causes: Arc<Causes>, port: VcpuPort) -> Self {
        let mut events = port.events;
        let at = initial(vcpu.index());
        events.set_at(at);
        let state = VcpuState { mp_state: at.mp_state, activity: at.activity, ..VcpuState::default() };
        let registers = Registers::default();
        Self { vcpu, board, causes, events, adopted: None, state, registers, failure: None }
    }

    fn triple_fault(&mut self) -> RunOutcome {
        let at_fault = self.state();
        self.events.record(self.board.now_ns(), 0, at_fault.vmx_mode, Detail::TripleFault);
        const CR0_PE: u64 = 1 << 0;
        const EFER_LMA: u64 = 1 << 10;
        let protected_mode = at_fault.cr0 & CR0_PE != 0 && at_fault.efer & EFER_LMA == 0;
        let hint = if protected_mode && crate::host::kvm_kind() == KvmKind::Pvm {
            "; kvm_pvm has no 32-bit and no PAE paging: a guest that turns it on faults (nested = emulated has both)"
        } else {
            ""
        };
        let VcpuState { rip, cr0, cr3, cr4, .. } = at_fault;
        RunOutcome::Failed(format!(
            "vCPU {}: triple fault at rip {rip:#x} (cr0 {cr0:#x}, cr3 {cr3:#x}, cr4 {cr4:#x}){hint}",
            self.vcpu.index()
        ))
    }

    fn failed(&self, failure: &KvmFailure) -> RunOutcome {
        RunOutcome::Failed(format!("vCPU {}: {failure}", self.vcpu.index()))
    }
}

fn initial(index: u32) -> At {
    let mp_state = initial_mp_state(index);
    At { mp_state, activity: super::vcpu::activity(mp_state, false) }
}

impl Vcpu for Processor {
    fn attach(&mut self) -> Result<(), EngineError> {
        self.adopted = Some(self.vcpu.adopt_thread());
        Ok(())
    }

    fn run(&mut self) -> RunOutcome {
        if let Some(failure) = self.failure.take() {
            return self.failed(&failure);
        }
        match self.vcpu.run(&*self.board) {
            KvmOutcome::Kicked => RunOutcome::Kicked,
            KvmOutcome::MpStateChanged | KvmOutcome::Asked(Outcome::Continue) => RunOutcome::Publish,
            KvmOutcome::Asked(Outcome::Exit(code)) => RunOutcome::GuestExit(GuestExit { code }),
            KvmOutcome::Asked(Outcome::PowerOff) => RunOutcome::PowerOff,
            KvmOutcome::Asked(Outcome::Reset) => RunOutcome::GuestReset,
            KvmOutcome::TripleFault => self.triple_fault(),
            KvmOutcome::Failed(failure) => self.failed(&failure),
        }
    }

    fn clear_kick(&mut self) {
        self.vcpu.clear_kick();
    }

    fn reset(&mut self) -> Result<(), EngineError> {
        // The registers are put back by the engine's reset, when no vCPU is left that could send this one an INIT.
        self.vcpu.stand();
        self.failure = None;
        self.causes.init.store(0, Ordering::SeqCst);
        self.causes.sipi.store(0, Ordering::SeqCst);
        self.events.set_at(initial(self.vcpu.index()));
        Ok(())
    }

    fn state(&mut self) -> VcpuState {
        match self.vcpu.observe(&*self.board) {
            Ok(seen) => {
                let time_ns = self.board.now_ns();
                let cause = self.causes.of(self.state.mp_state, seen.mp_state);
                let at = At { mp_state: seen.mp_state, activity: seen.activity };
                self.events.record_mp_state(time_ns, cause, seen.vmx.mode, at);
                self.state = VcpuState {
                    mp_state: seen.mp_state,
                    activity: seen.activity,
                    vmx_mode: seen.vmx.mode,
                    vmxon_gpa: seen.vmx.vmxon_gpa,
                    current_vmcs_gpa: seen.vmx.current_vmcs_gpa,
                    init_latched: seen.init_latched,
                    rip: seen.rip,
                    cr0: seen.cr0,
                    cr3: seen.cr3,
                    cr4: seen.cr4,
                    efer: seen.efer,
                    tsc: seen.tsc,
                    time_ns,
                    ..VcpuState::default()
                };
            }
            Err(failure) => self.failure = Some(failure),
        }
        self.state.clone()
    }

    fn registers(&mut self) -> Registers {
        match self.vcpu.registers(&*self.board) {
            Ok(registers) => self.registers = registers,
            Err(failure) => self.failure = Some(failure),
        }
        self.registers.clone()
    }

    fn nested(&mut self) -> NestedReport {
        let revision_id = match self.vcpu.vmcs_revision_id() {
            Ok(id) => id,
            Err(failure) => {
                self.failure = Some(failure);
                0
            }
        };
        let VcpuState { vmx_mode: mode, vmxon_gpa, current_vmcs_gpa, .. } = self.state;
        // No fields: KVM keeps the VMCS12 in a layout of its own.
        NestedReport { mode, vmxon_gpa, current_vmcs_gpa, revision_id, fields: Vec::new() }
    }
}
