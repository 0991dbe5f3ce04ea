//! What happens at the boundary before an instruction: the one home of rules R1 to R12, R19 and R20 of
//! `semantics.md`. INIT and SIPI are classified here, by their receiver, and nowhere else; every one gets a fate.

use super::exit::reasons::ExitReason;
use super::exit::{ExitInfo, interruption_info};
use crate::arch::exception;
use crate::arch::vmx::InterruptionInfo;
use crate::cpu::flags;
use crate::cpu::seg::{Segment, reg};
use crate::cpu::{Boundary, Cpu, Vectored, shadow};
use crate::event::{ActivityState, Detail, Fate, Rule, VmxMode};
use crate::mailbox::{PostedSipi, attention};

/// What came of looking for an event.
enum Taken {
    Nothing,
    /// A VM exit, or a change of activity: look again.
    More,
    /// An event was delivered through the IDT: look again, but deliver no other before an instruction has run, so that
    /// no storm of interrupts keeps the processor from it.
    Delivered,
}

/// Events that one boundary takes at most; the rest waits for the next.
const EVENTS_PER_BOUNDARY: usize = 8;

impl Cpu {
    /// Looks for events at the boundary before the next instruction.
    pub(crate) fn check_events(&mut self) -> Boundary {
        self.check_events_at_most(EVENTS_PER_BOUNDARY)
    }

    pub(super) fn check_events_at_most(&mut self, events: usize) -> Boundary {
        let pending_nmi = self.vmx.nmi;
        if self.mailbox.answer(attention::EVENTS) != 0 {
            self.take_posted();
        }
        self.update_apic();
        let mut may_deliver = true;
        for _ in 0..events {
            match self.take_event(may_deliver) {
                Taken::Nothing => break,
                Taken::More => {}
                Taken::Delivered => {
                    may_deliver = false;
                    // "Monitor Trap Flag": due behind the delivery of a pending event, before the handler's first
                    // instruction.
                    self.vmx.mtf_pending |= self.in_non_root() && self.vmx.controls.proc.monitor_trap_flag();
                }
            }
        }
        if let Some(cause) = self.vmx.nmi
            && pending_nmi.is_none()
        {
            self.report(cause, Detail::Nmi(Fate::Latched));
        }
        if self.activity == ActivityState::Active { Boundary::Run } else { Boundary::Idle }
    }

    /// When a timer of this processor is due.
    pub(crate) fn next_deadline(&mut self) -> Option<u64> {
        let apic = self.apic_deadline();
        match (apic, self.preemption_deadline_tsc()) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        }
    }

    pub(crate) fn set_activity(&mut self, to: ActivityState) {
        self.set_activity_by(to, 0);
    }

    fn set_activity_by(&mut self, to: ActivityState, cause: u64) {
        let from = std::mem::replace(&mut self.activity, to);
        if from != to {
            self.report(cause, Detail::Activity { from, to });
        }
    }

    /// Takes what others posted (R11, R12): INIT before SIPI, also when it came later.
    fn take_posted(&mut self) {
        let posted = self.mailbox.take_events();
        let mut sipi = posted.sipi;
        if let Some(low) = posted.init {
            let cause = self.bus.expand_cause(low);
            let counts = self.init_arrives(cause);
            if let Some(s) = sipi
                && posted.init_after_sipi
                && counts
            {
                self.drop_sipi(s, Rule::R12);
                sipi = None;
            }
        }
        if let Some(s) = sipi {
            self.sipi_arrives(s);
        }
        if let Some(low) = posted.nmi {
            let cause = self.bus.expand_cause(low);
            if self.vmx.nmi.is_some() {
                self.report(cause, Detail::Nmi(Fate::Coalesced));
            } else {
                self.vmx.nmi = Some(cause);
            }
        }
    }

    /// True if the INIT is taken or latched.
    fn init_arrives(&mut self, cause: u64) -> bool {
        if self.vmx.aborted {
            self.report(cause, Detail::Init(Fate::Dropped(Rule::R4)));
            return false;
        }
        if self.vmx.init.is_some() {
            self.report(cause, Detail::Init(Fate::Coalesced));
            return false;
        }
        self.vmx.init = Some(cause);
        match self.resolve_init() {
            Some(Fate::Dropped(_)) => false,
            Some(_) => true,
            None => {
                self.report(cause, Detail::Init(Fate::Latched));
                true
            }
        }
    }

    /// What becomes of a pending INIT now; `None` while VMX root operation blocks it (R4), or if there is none.
    fn resolve_init(&mut self) -> Option<Fate> {
        let cause = self.vmx.init?;
        let waits = self.activity == ActivityState::WaitForSipi;
        let fate = match self.vmx_mode {
            VmxMode::Root => return None,
            VmxMode::Off if waits => Fate::Dropped(Rule::R2),
            VmxMode::NonRoot if waits => Fate::Dropped(Rule::R8),
            VmxMode::NonRoot => Fate::VmExit(ExitReason::InitSignal.number()),
            VmxMode::Off if self.apic.bsp() || self.activity == ActivityState::Shutdown => Fate::Reset,
            VmxMode::Off => Fate::Delivered,
        };
        self.vmx.init = None;
        self.report(cause, Detail::Init(fate));
        match fate {
            Fate::VmExit(_) => {
                self.exit = ExitInfo { reason: ExitReason::InitSignal.number(), ..ExitInfo::default() };
                self.vm_exit_caused_by(cause);
            }
            Fate::Reset | Fate::Delivered => {
                self.init_state();
                let state = if self.apic.bsp() { ActivityState::Active } else { ActivityState::WaitForSipi };
                self.set_activity_by(state, cause);
            }
            _ => {}
        }
        Some(fate)
    }

    fn drop_sipi(&mut self, sipi: PostedSipi, rule: Rule) {
        let cause = self.bus.expand_cause(sipi.cause_low);
        self.report(cause, Detail::Sipi { vector: sipi.vector, fate: Fate::Dropped(rule) });
    }

    fn sipi_arrives(&mut self, sipi: PostedSipi) {
        let rule = match (self.vmx_mode, self.activity) {
            (VmxMode::Off, ActivityState::WaitForSipi) => return self.start_by_sipi(sipi),
            (VmxMode::NonRoot, ActivityState::WaitForSipi) => return self.exit_by_sipi(sipi),
            (VmxMode::Off, _) => Rule::R1,
            (VmxMode::Root, _) => Rule::R4,
            (VmxMode::NonRoot, ActivityState::Active) => Rule::R5,
            (VmxMode::NonRoot, ActivityState::Hlt) => Rule::R6,
            (VmxMode::NonRoot, ActivityState::Shutdown) => Rule::R7,
        };
        self.drop_sipi(sipi, rule);
    }

    /// R2.
    fn start_by_sipi(&mut self, sipi: PostedSipi) {
        let cause = self.bus.expand_cause(sipi.cause_low);
        self.report(cause, Detail::Sipi { vector: sipi.vector, fate: Fate::Started });
        self.seg[usize::from(reg::CS)] = Segment::real(u16::from(sipi.vector) << 8, true);
        self.regs.set_rip(0);
        self.mode_changed();
        self.set_activity_by(ActivityState::Active, cause);
    }

    /// R8, R17.
    fn exit_by_sipi(&mut self, sipi: PostedSipi) {
        let cause = self.bus.expand_cause(sipi.cause_low);
        let reason = ExitReason::Sipi.number();
        self.report(cause, Detail::Sipi { vector: sipi.vector, fate: Fate::VmExit(reason) });
        self.exit = ExitInfo { reason, qualification: sipi.vector.into(), ..ExitInfo::default() };
        self.vm_exit_caused_by(cause);
    }

    /// The highest-priority event that can be taken (R19).
    fn take_event(&mut self, may_deliver: bool) -> Taken {
        if self.resolve_init().is_some() {
            return Taken::More;
        }
        // R2, R8: waiting for a SIPI holds everything else; a VMX abort holds it for good.
        if self.activity == ActivityState::WaitForSipi || self.vmx.aborted {
            return Taken::Nothing;
        }
        let non_root = self.in_non_root();
        let controls = self.vmx.controls;
        let shut_down = self.activity == ActivityState::Shutdown;
        let mov_ss = self.shadow & shadow::MOV_SS != 0;
        if non_root && self.vmx.mtf_pending && !shut_down {
            self.vmx.mtf_pending = false;
            return self.exit_for_event(ExitReason::MonitorTrapFlag);
        }
        if self.pending_debug != 0 && !mov_ss && !shut_down && may_deliver {
            self.set_activity(ActivityState::Active);
            self.raise_exception(exception::DB, None);
            return Taken::Delivered;
        }
        if non_root && self.preemption_expired() {
            return self.exit_for_event(ExitReason::PreemptionTimer);
        }
        if non_root && controls.proc.nmi_window_exiting() && !self.vmx.virtual_nmi_blocked && !mov_ss {
            return self.exit_for_event(ExitReason::NmiWindow);
        }
        if let Some(cause) = self.vmx.nmi
            && !self.nmi_blocked
            // STI may hold NMIs back as well (SDM 3, "Format of Interruptibility State"): `sti; hlt` stays together.
            && self.shadow == 0
            && (may_deliver || non_root && controls.pin.nmi_exiting())
        {
            return self.take_nmi(cause);
        }
        if shut_down {
            return Taken::Nothing;
        }
        let open = self.flags.has(flags::IF) && self.shadow == 0;
        if non_root && controls.proc.interrupt_window_exiting() && open {
            return self.exit_for_event(ExitReason::InterruptWindow);
        }
        if self.shadow == 0 && self.interrupt_pending() {
            if non_root && controls.pin.external_interrupt_exiting() {
                return self.exit_for_interrupt();
            }
            if open && may_deliver {
                return self.take_interrupt();
            }
        }
        Taken::Nothing
    }

    fn exit_for_event(&mut self, reason: ExitReason) -> Taken {
        self.exit = ExitInfo { reason: reason.number(), ..ExitInfo::default() };
        self.vm_exit();
        Taken::More
    }

    fn take_nmi(&mut self, cause: u64) -> Taken {
        self.vmx.nmi = None;
        if self.in_non_root() && self.vmx.controls.pin.nmi_exiting() {
            let reason = ExitReason::ExceptionOrNmi.number();
            self.report(cause, Detail::Nmi(Fate::VmExit(reason)));
            self.exit =
                ExitInfo { reason, interruption: interruption_info(&Vectored::NMI).into_bits(), ..ExitInfo::default() };
            self.vm_exit_caused_by(cause);
            return Taken::More;
        }
        self.report(cause, Detail::Nmi(Fate::Delivered));
        self.set_activity_by(ActivityState::Active, cause);
        self.nmi_blocked = true;
        self.deliver_event(Vectored::NMI);
        Taken::Delivered
    }

    /// Whether the local APIC or the external interrupt controller asks for an interrupt.
    fn interrupt_pending(&self) -> bool {
        self.apic.pending().is_some() || self.extint_pending()
    }

    fn extint_pending(&self) -> bool {
        self.mailbox.extint() && self.apic.accepts_extint()
    }

    fn acknowledge_interrupt(&mut self) -> Option<u8> {
        if self.extint_pending()
            && let Some(vector) = self.bus.acknowledge_extint()
        {
            return Some(vector);
        }
        self.apic.acknowledge()
    }

    /// Exit 1; with "acknowledge interrupt on exit" the vector travels along, else it stays pending.
    fn exit_for_interrupt(&mut self) -> Taken {
        let mut info = InterruptionInfo::new();
        if self.vmx.controls.exit.acknowledge_interrupt() {
            let Some(vector) = self.acknowledge_interrupt() else { return Taken::Nothing };
            info = interruption_info(&Vectored::external(vector));
        }
        let reason = ExitReason::ExternalInterrupt.number();
        self.exit = ExitInfo { reason, interruption: info.into_bits(), ..ExitInfo::default() };
        self.vm_exit();
        Taken::More
    }

    fn take_interrupt(&mut self) -> Taken {
        let Some(vector) = self.acknowledge_interrupt() else { return Taken::Nothing };
        self.set_activity(ActivityState::Active);
        self.deliver_event(Vectored::external(vector));
        Taken::Delivered
    }

    /// Whether NMIs, or virtual NMIs where there are such, are blocked.
    pub(crate) fn nmi_blocking(&self) -> bool {
        if self.in_non_root() && self.vmx.controls.pin.virtual_nmis() {
            self.vmx.virtual_nmi_blocked
        } else {
            self.nmi_blocked
        }
    }

    /// IRET ends blocking of NMIs, or of virtual NMIs (SDM 3, "Changes to Instruction Behavior in VMX Non-Root
    /// Operation").
    pub(crate) fn unblock_nmi_by_iret(&mut self) {
        if !self.in_non_root() || !self.vmx.controls.pin.nmi_exiting() {
            self.nmi_blocked = false;
        } else if self.vmx.controls.pin.virtual_nmis() {
            self.vmx.virtual_nmi_blocked = false;
        }
    }
}
