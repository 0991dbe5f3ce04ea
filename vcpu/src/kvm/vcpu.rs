//! One vCPU of KVM: its run loop, and its state as its own thread reads it.

use std::sync::Arc;
use std::time::Duration;

use kvm_bindings::{
    KVM_EXIT_INTERNAL_ERROR, KVM_INTERNAL_ERROR_EMULATION, KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES,
    KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_SIPI_RECEIVED, KVM_MP_STATE_UNINITIALIZED, Msrs,
    kvm_msr_entry,
};
use kvm_ioctls::{VcpuExit, VcpuFd};
use nested_vmx::event::{ActivityState, MpState};

use super::boot;
use super::failure::{InstructionBytes, KvmFailure};
use super::kick::{Adopted, Kicker};
use super::nested::{self, VmxState};
use super::reset::IA32_TSC;
use super::vm::KvmVm;
use crate::counters::VcpuCounters;
use crate::engine::Registers;
use crate::machine::Outcome;

const IA32_VMX_BASIC: u32 = 0x480;

/// How long a vCPU that KVM sends back with EAGAIN for nothing waits before it asks again.
const EAGAIN_PAUSE: Duration = Duration::from_millis(1);

/// The devices outside KVM, reached by the exits of all vCPU threads.
pub trait Devices: Send + Sync {
    fn io_read(&self, port: u16, size: u8) -> u32;
    fn io_write(&self, port: u16, size: u8, value: u32) -> Outcome;
    fn mmio_read(&self, gpa: u64, size: u8) -> u64;
    fn mmio_write(&self, gpa: u64, size: u8, value: u64);
}

/// Why [`KvmVcpu::run`] returned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RunOutcome {
    /// Somebody kicked: look at commands.
    Kicked,
    /// `mp_state` is not what [`KvmVcpu::observe`] last saw: publish it.
    MpStateChanged,
    /// A device asks something of the VM; never [`Outcome::Continue`].
    Asked(Outcome),
    /// KVM_EXIT_SHUTDOWN: a triple fault. The vCPU is in the shutdown state.
    TripleFault,
    Failed(KvmFailure),
}

/// A consistent copy of what observers ask for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Observed {
    pub mp_state: MpState,
    pub activity: ActivityState,
    /// An INIT is pending that KVM has not accepted (VMX root on a host that nests).
    pub init_latched: bool,
    pub nmi_pending: bool,
    pub vmx: VmxState,
    pub rip: u64,
    pub rflags: u64,
    pub cr0: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub efer: u64,
    pub tsc: u64,
}

/// A vCPU; owned by the one thread that runs it, which is also the only one to do ioctls on it.
pub struct KvmVcpu {
    index: u32,
    fd: VcpuFd,
    /// The guest has VMX.
    vmx: bool,
    kicker: Arc<Kicker>,
    counters: Arc<VcpuCounters>,
    /// `KVM_RUN` left an access open that only the next one completes. State is not to be read before.
    completion_open: bool,
    last_mp_state: MpState,
    shutdown: bool,
    /// What a device asked for while [`KvmVcpu::settle`] served it: `run` still has to say so.
    asked: Option<Outcome>,
    // KVM reaches guest memory for as long as a vCPU's descriptor is open: the VM, which keeps it mapped, goes last.
    _vm: Arc<KvmVm>,
}

enum Step {
    Again,
    Out(RunOutcome),
}

impl KvmVcpu {
    pub(super) fn new(
        index: u32,
        fd: VcpuFd,
        vmx: bool,
        kicker: Arc<Kicker>,
        counters: Arc<VcpuCounters>,
        vm: Arc<KvmVm>,
    ) -> Self {
        Self {
            index,
            fd,
            vmx,
            kicker,
            counters,
            completion_open: false,
            last_mp_state: initial_mp_state(index),
            shutdown: false,
            asked: None,
            _vm: vm,
        }
    }

    pub fn index(&self) -> u32 {
        self.index
    }

    /// Tells the kicker which thread to interrupt. Call it on the thread that will run the vCPU, and keep the
    /// guard for as long as it does.
    pub fn adopt_thread(&self) -> Adopted {
        self.kicker.adopt_thread()
    }

    /// Runs until there is something that the caller has to know.
    pub fn run(&mut self, devices: &dyn Devices) -> RunOutcome {
        if let Some(asked) = self.asked.take() {
            return RunOutcome::Asked(asked);
        }
        loop {
            if let Step::Out(outcome) = self.enter(devices) {
                return outcome;
            }
        }
    }

    /// Takes back kicks. To be called before looking at what the kicks were for.
    pub fn clear_kick(&self) {
        self.kicker.answer();
    }

    /// One `KVM_RUN` and what its exit asks for.
    fn enter(&mut self, devices: &dyn Devices) -> Step {
        let exit = match self.fd.run() {
            Ok(exit) => exit,
            Err(error) => return self.refused(error.errno()),
        };
        self.completion_open = false;
        let flow = match exit {
            VcpuExit::IoOut(port, data) => {
                self.counters.add_kvm_exit(kvm_bindings::KVM_EXIT_IO);
                self.completion_open = true;
                let size = self.kicker.io_item_bytes();
                let mut flow = Outcome::Continue;
                for item in data.chunks(usize::from(size.max(1))) {
                    match devices.io_write(port, size, little_endian(item) as u32) {
                        Outcome::Continue => {}
                        asked => flow = asked,
                    }
                }
                flow
            }
            VcpuExit::IoIn(port, data) => {
                self.counters.add_kvm_exit(kvm_bindings::KVM_EXIT_IO);
                self.completion_open = true;
                let size = self.kicker.io_item_bytes();
                for item in data.chunks_mut(usize::from(size.max(1))) {
                    let value = devices.io_read(port, size).to_le_bytes();
                    let len = item.len().min(value.len());
                    item[..len].copy_from_slice(&value[..len]);
                }
                Outcome::Continue
            }
            VcpuExit::MmioRead(gpa, data) => {
                self.counters.add_kvm_exit(kvm_bindings::KVM_EXIT_MMIO);
                self.completion_open = true;
                let len = data.len().min(8);
                data[..len].copy_from_slice(&devices.mmio_read(gpa, len as u8).to_le_bytes()[..len]);
                Outcome::Continue
            }
            VcpuExit::MmioWrite(gpa, data) => {
                self.counters.add_kvm_exit(kvm_bindings::KVM_EXIT_MMIO);
                self.completion_open = true;
                devices.mmio_write(gpa, data.len() as u8, little_endian(data));
                Outcome::Continue
            }
            exit => match Refusal::of(exit) {
                Refusal::Spurious(reason) => {
                    self.counters.add_kvm_exit(reason);
                    return Step::Again;
                }
                Refusal::Shutdown => {
                    self.counters.add_kvm_exit(kvm_bindings::KVM_EXIT_SHUTDOWN);
                    self.shutdown = true;
                    return Step::Out(RunOutcome::TripleFault);
                }
                Refusal::InternalError => {
                    self.counters.add_kvm_exit(KVM_EXIT_INTERNAL_ERROR);
                    return Step::Out(RunOutcome::Failed(self.internal_error()));
                }
                Refusal::UnknownHardwareExit => {
                    self.counters.add_kvm_exit(kvm_bindings::KVM_EXIT_UNKNOWN);
                    // SAFETY: exit reason KVM_EXIT_UNKNOWN says that `hw` is the live member; it is a plain number.
                    let reason = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.hw.hardware_exit_reason };
                    return Step::Out(RunOutcome::Failed(KvmFailure::UnknownHardwareExit { reason }));
                }
                Refusal::Failure(reason, failure) => {
                    self.counters.add_kvm_exit(reason);
                    return Step::Out(RunOutcome::Failed(failure));
                }
            },
        };
        if flow != Outcome::Continue {
            return Step::Out(RunOutcome::Asked(flow));
        }
        // An instruction ran, so the vCPU is running, whatever was last seen (a SIPI sent by the guest itself ends
        // no KVM_RUN).
        if self.last_mp_state != MpState::Runnable {
            return Step::Out(RunOutcome::MpStateChanged);
        }
        Step::Again
    }

    /// `KVM_RUN` returned an error.
    fn refused(&mut self, errno: i32) -> Step {
        match errno {
            libc::EINTR => {
                // KVM completes an open access before it looks at immediate_exit and signals.
                self.completion_open = false;
                Step::Out(RunOutcome::Kicked)
            }
            libc::EAGAIN => match self.fd.get_mp_state() {
                // INIT took the vCPU out of UNINITIALIZED: KVM says so once by EAGAIN.
                Ok(state) if state.mp_state != KVM_MP_STATE_UNINITIALIZED => Step::Out(RunOutcome::MpStateChanged),
                // With an NMI pending in UNINITIALIZED KVM returns EAGAIN again and again. Only INIT ends that, and
                // one that the guest sends does not kick: look again after a pause.
                Ok(_) => {
                    self.kicker.sleep(EAGAIN_PAUSE);
                    Step::Again
                }
                Err(e) => Step::Out(failed("KVM_GET_MP_STATE", e.errno())),
            },
            errno => Step::Out(failed("KVM_RUN", errno)),
        }
    }

    /// kvm-ioctls drops the data of an internal error: it is read from the kvm_run page.
    fn internal_error(&mut self) -> KvmFailure {
        let (rip, cs_base, cpl) = match (self.fd.get_regs(), self.fd.get_sregs()) {
            (Ok(r), Ok(s)) => (r.rip, s.cs.base, s.ss.dpl),
            _ => (0, 0, 0),
        };
        let run = self.fd.get_kvm_run();
        // SAFETY: exit reason KVM_EXIT_INTERNAL_ERROR says that `internal` is the live member; all its bit patterns
        // are valid.
        let internal = unsafe { run.__bindgen_anon_1.internal };
        let words = (internal.ndata as usize).min(internal.data.len());
        if internal.suberror != KVM_INTERNAL_ERROR_EMULATION {
            return KvmFailure::Internal { suberror: internal.suberror, data: internal.data[..words].to_vec(), rip };
        }
        // SAFETY: suberror 1 says that `emulation_failure`, which overlays `internal`, is the live member; its parts
        // behind ndata words are not used.
        let failure = unsafe { run.__bindgen_anon_1.emulation_failure };
        let supplied =
            words >= 3 && failure.flags & u64::from(KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES) != 0;
        let bytes = if supplied {
            // SAFETY: the flag says that size and bytes are filled in.
            let instruction = unsafe { failure.__bindgen_anon_1.__bindgen_anon_1 };
            let len = usize::from(instruction.insn_size).min(instruction.insn_bytes.len());
            instruction.insn_bytes[..len].to_vec()
        } else {
            Vec::new()
        };
        KvmFailure::Emulation { rip, cs_base, cpl, bytes: InstructionBytes(bytes) }
    }

    /// Completes what the last exit left open, so that the state is that of an instruction boundary. Runs no
    /// guest instruction.
    pub fn settle(&mut self, devices: &dyn Devices) -> Result<(), KvmFailure> {
        while self.completion_open {
            self.kicker.arm();
            let step = self.enter(devices);
            self.kicker.disarm();
            match step {
                // One access of an instruction can follow another (MMIO fragments, REP OUTS).
                Step::Again | Step::Out(RunOutcome::MpStateChanged | RunOutcome::Kicked) => {}
                Step::Out(RunOutcome::Asked(asked)) => self.asked = Some(asked),
                Step::Out(RunOutcome::TripleFault) => return Ok(()),
                Step::Out(RunOutcome::Failed(failure)) => return Err(failure),
            }
        }
        Ok(())
    }

    /// What the vCPU is now. Only brings forward what the next `KVM_RUN` would do first: complete an access,
    /// accept a pending INIT or SIPI (KVM_GET_MP_STATE does so).
    pub fn observe(&mut self, devices: &dyn Devices) -> Result<Observed, KvmFailure> {
        self.settle(devices)?;
        let failure = |what| move |e: kvm_ioctls::Error| KvmFailure::Ioctl { what, errno: e.errno() };
        // First of all: it may change what the others say.
        let mp = self.fd.get_mp_state().map_err(failure("KVM_GET_MP_STATE"))?;
        let events = self.fd.get_vcpu_events().map_err(failure("KVM_GET_VCPU_EVENTS"))?;
        let vmx = match self.vmx {
            true => nested::read(&self.fd).map_err(failure("KVM_GET_NESTED_STATE"))?,
            false => VmxState::default(),
        };
        let regs = self.fd.get_regs().map_err(failure("KVM_GET_REGS"))?;
        let sregs = self.fd.get_sregs().map_err(failure("KVM_GET_SREGS"))?;
        let mp_state = mp_state(mp.mp_state);
        self.last_mp_state = mp_state;
        Ok(Observed {
            mp_state,
            activity: activity(mp_state, self.shutdown),
            init_latched: events.smi.latched_init != 0,
            nmi_pending: events.nmi.pending != 0,
            vmx,
            rip: regs.rip,
            rflags: regs.rflags,
            cr0: sregs.cr0,
            cr3: sregs.cr3,
            cr4: sregs.cr4,
            efer: sregs.efer,
            tsc: self.read_msr(IA32_TSC)?,
        })
    }

    /// The VMCS revision identifier: bits 30:0 of IA32_VMX_BASIC (SDM 3, "Basic VMX Information"); 0 without VMX.
    pub fn vmcs_revision_id(&self) -> Result<u32, KvmFailure> {
        match self.vmx {
            true => Ok(self.read_msr(IA32_VMX_BASIC)? as u32 & 0x7fff_ffff),
            false => Ok(0),
        }
    }

    fn read_msr(&self, index: u32) -> Result<u64, KvmFailure> {
        let entry = kvm_msr_entry { index, ..Default::default() };
        let Ok(mut msrs) = Msrs::from_entries(&[entry]) else { return Ok(0) };
        match self.fd.get_msrs(&mut msrs) {
            Ok(_) => Ok(msrs.as_slice().first().map_or(0, |m| m.data)),
            Err(e) => Err(KvmFailure::Ioctl { what: "KVM_GET_MSRS", errno: e.errno() }),
        }
    }

    /// All registers, at an instruction boundary.
    pub fn registers(&mut self, devices: &dyn Devices) -> Result<Registers, KvmFailure> {
        self.settle(devices)?;
        let failure = |what| move |e: kvm_ioctls::Error| KvmFailure::Ioctl { what, errno: e.errno() };
        let regs = self.fd.get_regs().map_err(failure("KVM_GET_REGS"))?;
        let sregs = self.fd.get_sregs().map_err(failure("KVM_GET_SREGS"))?;
        let debug = self.fd.get_debug_regs().map_err(failure("KVM_GET_DEBUGREGS"))?;
        Ok(boot::registers(&regs, &sregs, &debug))
    }

    /// Gets ready for [`KvmVm::reset`]: completes an open access, whose effects the reset wipes out.
    pub fn stand(&mut self) {
        if self.completion_open {
            self.kicker.arm();
            // What it returns belongs to the time before the reset.
            let _ = self.fd.run();
            self.kicker.disarm();
            self.completion_open = false;
        }
        self.shutdown = false;
        self.asked = None;
        self.last_mp_state = initial_mp_state(self.index);
    }
}

/// After creation and reset.
pub(super) fn initial_mp_state(index: u32) -> MpState {
    if index == 0 { MpState::Runnable } else { MpState::Uninitialized }
}

fn failed(what: &'static str, errno: i32) -> RunOutcome {
    RunOutcome::Failed(KvmFailure::Ioctl { what, errno })
}

/// An exit that is no device access, free of the borrow of the kvm_run page.
enum Refusal {
    /// Nothing to do: KVM looked up and may go on.
    Spurious(u32),
    Shutdown,
    InternalError,
    UnknownHardwareExit,
    Failure(u32, KvmFailure),
}

impl Refusal {
    fn of(exit: VcpuExit<'_>) -> Self {
        use kvm_bindings as k;
        let unexpected = |reason, name| Self::Failure(reason, KvmFailure::UnexpectedExit { reason, name });
        match exit {
            VcpuExit::Intr => Self::Spurious(k::KVM_EXIT_INTR),
            VcpuExit::IrqWindowOpen => Self::Spurious(k::KVM_EXIT_IRQ_WINDOW_OPEN),
            VcpuExit::SetTpr => Self::Spurious(k::KVM_EXIT_SET_TPR),
            VcpuExit::Shutdown => Self::Shutdown,
            VcpuExit::InternalError => Self::InternalError,
            VcpuExit::Unknown => Self::UnknownHardwareExit,
            VcpuExit::FailEntry(reason, host_cpu) => {
                Self::Failure(k::KVM_EXIT_FAIL_ENTRY, KvmFailure::FailEntry { reason, host_cpu })
            }
            VcpuExit::MemoryFault { gpa, size, .. } => {
                Self::Failure(k::KVM_EXIT_MEMORY_FAULT, KvmFailure::MemoryFault { gpa, size })
            }
            // None of these can come from a VM with an in-kernel local APIC and none of the capabilities that ask
            // for them.
            VcpuExit::Exception => unexpected(k::KVM_EXIT_EXCEPTION, "exception"),
            VcpuExit::Hypercall(_) => unexpected(k::KVM_EXIT_HYPERCALL, "hypercall"),
            VcpuExit::Debug(_) => unexpected(k::KVM_EXIT_DEBUG, "debug"),
            VcpuExit::Hlt => unexpected(k::KVM_EXIT_HLT, "HLT"),
            VcpuExit::TprAccess => unexpected(k::KVM_EXIT_TPR_ACCESS, "TPR access"),
            VcpuExit::Nmi => unexpected(k::KVM_EXIT_NMI, "NMI"),
            VcpuExit::SystemEvent(..) => unexpected(k::KVM_EXIT_SYSTEM_EVENT, "system event"),
            VcpuExit::IoapicEoi(_) => unexpected(k::KVM_EXIT_IOAPIC_EOI, "I/O APIC EOI"),
            VcpuExit::Hyperv => unexpected(k::KVM_EXIT_HYPERV, "Hyper-V"),
            VcpuExit::X86Rdmsr(_) => unexpected(k::KVM_EXIT_X86_RDMSR, "RDMSR"),
            VcpuExit::X86Wrmsr(_) => unexpected(k::KVM_EXIT_X86_WRMSR, "WRMSR"),
            VcpuExit::Unsupported(reason) => unexpected(reason, "unknown to kvm-ioctls"),
            // Port and MMIO accesses never get here; what remains are exits of other architectures.
            _ => unexpected(u32::MAX, "not of this architecture"),
        }
    }
}

fn little_endian(data: &[u8]) -> u64 {
    data.iter().take(8).rev().fold(0, |value, &byte| value << 8 | u64::from(byte))
}

pub(super) fn mp_state(raw: u32) -> MpState {
    match raw {
        KVM_MP_STATE_UNINITIALIZED => MpState::Uninitialized,
        KVM_MP_STATE_INIT_RECEIVED => MpState::InitReceived,
        KVM_MP_STATE_HALTED => MpState::Halted,
        KVM_MP_STATE_SIPI_RECEIVED => MpState::SipiReceived,
        _ => MpState::Runnable,
    }
}

/// semantics.md section 4, read backwards.
pub fn activity(mp_state: MpState, shutdown: bool) -> ActivityState {
    match mp_state {
        _ if shutdown => ActivityState::Shutdown,
        MpState::Runnable => ActivityState::Active,
        MpState::Halted => ActivityState::Hlt,
        MpState::Uninitialized | MpState::InitReceived | MpState::SipiReceived => ActivityState::WaitForSipi,
    }
}
