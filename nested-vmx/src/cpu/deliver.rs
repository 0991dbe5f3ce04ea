//! Exceptions and interrupts on their way to their handlers (SDM 3, "Interrupt and Exception Handling").

mod long;
mod protected;
mod real;

use super::{Cpu, Stop, StopKind, flags};
use crate::arch::cr::dr;
use crate::arch::exception as vector;
use crate::arch::vmx::EventType;
use crate::event::{ActivityState, Detail};

/// An event on its way through the IDT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Vectored {
    pub kind: EventType,
    pub vector: u8,
    pub error: Option<u32>,
    /// Of INT n, INT1, INT3 and INTO: how far behind RIP their handlers return.
    pub length: u8,
}

impl Vectored {
    pub const fn exception(vector: u8, error: Option<u32>) -> Self {
        Self { kind: EventType::HardwareException, vector, error, length: 0 }
    }

    pub const fn external(vector: u8) -> Self {
        Self { kind: EventType::External, vector, error: None, length: 0 }
    }

    pub const NMI: Self = Self { kind: EventType::Nmi, vector: vector::NMI, error: None, length: 0 };

    /// INT n, INT3 or INTO: the gate's DPL is checked, and faults do not count as external to the program.
    fn by_program(&self) -> bool {
        matches!(self.kind, EventType::SoftwareInterrupt | EventType::SoftwareException)
    }

    /// A fault: what is pushed resumes the instruction, with RF set (SDM 3, "Instruction-Breakpoint Exception
    /// Condition").
    fn is_fault(&self) -> bool {
        self.kind == EventType::HardwareException && !matches!(self.vector, vector::DB | vector::MC)
    }

    fn class(&self) -> Class {
        match (self.kind, self.vector) {
            (EventType::HardwareException, vector::DF) => Class::DoubleFault,
            (EventType::HardwareException, vector::PF | vector::VE) => Class::PageFault,
            (
                EventType::HardwareException,
                vector::DE | vector::TS | vector::NP | vector::SS | vector::GP | vector::CP,
            ) => Class::Contributory,
            _ => Class::Benign,
        }
    }

    /// What is raised when `fault` occurs on the way; None is a triple fault (SDM 3, "Conditions for Generating a
    /// Double Fault").
    fn joined_by(&self, fault: Self) -> Option<Self> {
        match (self.class(), fault.class()) {
            (Class::DoubleFault, Class::Contributory | Class::PageFault | Class::DoubleFault) => None,
            (Class::Contributory, Class::Contributory) | (Class::PageFault, Class::Contributory | Class::PageFault) => {
                Some(Self::exception(vector::DF, Some(0)))
            }
            _ => Some(fault),
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Class {
    Benign,
    Contributory,
    PageFault,
    DoubleFault,
}

/// Faults that the delivery of one event may raise in a row. Only benign ones can go on and on (an #AC whose handler, at
/// CPL 3, has a misaligned stack): a processor never gets out of that. Here the interrupted instruction begins again.
const MAX_FAULTS_OF_DELIVERY: usize = 16;

impl Cpu {
    /// Raises an exception at RIP; for #PF, `fault_address` is set, for #DB, `pending_debug` holds the DR6 bits.
    pub(crate) fn raise_exception(&mut self, vector: u8, error: Option<u32>) {
        self.raise(Vectored::exception(vector, error));
    }

    /// An exception or software exception that a hypervisor may intercept; then its delivery.
    pub(crate) fn raise(&mut self, event: Vectored) {
        if self.take_before_delivery(&event) {
            self.deliver_event(event);
        }
    }

    /// What happens when an exception is recognised: interception, else CR2 and the debug registers. False when a VM
    /// exit took it.
    fn take_before_delivery(&mut self, event: &Vectored) -> bool {
        let hardware = event.kind == EventType::HardwareException;
        let qualification = match event.vector {
            vector::PF if hardware => self.fault_address,
            vector::DB if hardware => self.pending_debug,
            _ => 0,
        };
        if self.in_non_root() && self.intercept_exception(event, qualification) {
            return false;
        }
        self.nmi_unblocked_by_iret = false;
        match event.vector {
            vector::PF if hardware => self.cr2 = self.fault_address,
            vector::DB if hardware => {
                // SDM 3, "Debug Status Register (DR6)": the breakpoint bits are of this exception, others stay.
                self.dr6 = self.dr6 & !0xf | std::mem::take(&mut self.pending_debug);
                self.dr7 &= !dr::DR7_GD;
            }
            _ => {}
        }
        true
    }

    /// Delivers an event through the IDT, and the faults that its delivery raises, which a hypervisor may intercept.
    /// Also what a VM entry with event injection does. `delivering` tells VM exits on the way what was being delivered.
    pub(crate) fn deliver_event(&mut self, event: Vectored) {
        let mut event = event;
        if self.activity != ActivityState::Active {
            self.set_activity(ActivityState::Active);
        }
        for _ in 0..MAX_FAULTS_OF_DELIVERY {
            self.delivering = Some(event);
            let Err(stop) = self.deliver_once(&event) else { break };
            let StopKind::Exception { vector, error } = stop.kind() else {
                self.vm_exit_of_instruction(event.length);
                break;
            };
            // EXT: the exception was raised by something outside the program (SDM 3, "Error Code").
            let external = matches!(vector, vector::TS | vector::NP | vector::SS | vector::GP) && !event.by_program();
            let fault = Vectored::exception(vector, error.map(|e| e | u32::from(external)));
            let Some(next) = event.joined_by(fault) else {
                self.delivering = None;
                self.triple_fault();
                break;
            };
            if next != fault {
                // A VM exit due to the double fault itself is not one during delivery (SDM 3, "Information for VM
                // Exits During Event Delivery").
                self.delivering = None;
            }
            if !self.take_before_delivery(&next) {
                break;
            }
            event = next;
        }
        self.delivering = None;
    }

    fn deliver_once(&mut self, event: &Vectored) -> Result<(), Stop> {
        let held_back = self.pending_debug;
        if !self.cr0.pe() {
            self.deliver_real(event)?;
        } else if self.long_mode() {
            self.deliver_long(event)?;
        } else {
            self.deliver_protected(event)?;
        }
        if event.kind == EventType::Nmi {
            self.nmi_blocked = true;
        }
        self.shadow = 0;
        self.new_shadow = 0;
        // The handler runs with TF clear: a single-step trap that MOV SS held back until here is lost. Breakpoints are
        // lost too, but wait for the handler of INT n, INT3 and INTO (as SDM 3 has it for the injection of these, "Pending
        // Debug Exceptions after VM Entry").
        self.pending_debug &= !if event.by_program() { dr::DR6_BS } else { held_back };
        self.mode_changed();
        Ok(())
    }

    /// Where the handler returns to.
    fn return_rip(&self, event: &Vectored) -> u64 {
        let rip = self.regs.rip().wrapping_add(event.length.into());
        if self.code64() { rip } else { rip & 0xffff_ffff }
    }

    /// RFLAGS as pushed.
    fn pushed_flags(&self, event: &Vectored) -> u64 {
        self.flags.bits() | if event.is_fault() { flags::RF } else { 0 }
    }

    /// RFLAGS as the handler finds them.
    fn enter_handler_flags(&mut self, interrupt_gate: bool) {
        for bit in [flags::TF, flags::VM, flags::RF, flags::NT] {
            self.flags.set(bit, false);
        }
        if interrupt_gate {
            self.flags.set(flags::IF, false);
        }
    }

    /// Outside VMX non-root operation, shutdown; inside, VM exit 2.
    fn triple_fault(&mut self) {
        self.report(0, Detail::TripleFault);
        if self.in_non_root() {
            self.exit_triple_fault();
        } else {
            self.set_activity(ActivityState::Shutdown);
        }
    }
}
