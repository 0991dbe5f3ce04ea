//! VM entry: checks, then guest state, MSRs, the injected event (SDM 3, "VM Entries").

use super::{Check, Context, Failure, PhysicalRead};
use crate::arch::cr::{Cr0, Cr4, dr};
use crate::arch::efer::Efer;
use crate::arch::vmx::{EventType, Interruptibility, PendingDebug};
use crate::cpu::seg::{Segment, TableRegister, reg};
use crate::cpu::{Cpu, Flow, Stop, Vectored, shadow, slot, special};
use crate::event::{ActivityState, Detail, EventKind, VmxMode};
use crate::mem::Ram;
use crate::vmx::exit::CR0_KEPT;
use crate::vmx::exit::reasons::{ExitReason, InstructionError};
use crate::vmx::state::Controls;
use crate::vmx::vmcs12::Field;

struct RamReader<'a>(&'a Ram);

impl PhysicalRead for RamReader<'_> {
    fn read_u64(&self, gpa: u64) -> u64 {
        let mut bytes = [0xff; 8];
        // Nothing there reads all ones.
        let _ = self.0.read(gpa, &mut bytes);
        u64::from_le_bytes(bytes)
    }
}

impl Cpu {
    /// VMLAUNCH (`launch`) or VMRESUME behind their own checks. Once state is loaded, nothing of L1's instruction is left
    /// to complete: neither its single-step trap nor the blocking that would end with it.
    pub(in crate::vmx) fn vm_entry(&mut self, launch: bool) -> Flow {
        if let Err(failed) = self.check_entry(|c| c.check_controls_and_host()) {
            let error = match failed.failure {
                Failure::Instruction(error) => error,
                Failure::GuestState { .. } => InstructionError::EntryControls,
            };
            let detail = Detail::VmEntryFailed {
                vmcs_gpa: self.vmx.current_gpa,
                check: failed.id,
                exit_reason: 0,
                instruction_error: error.number().into(),
            };
            self.report(0, detail);
            return self.vm_fail_valid(error);
        }
        self.remember_host_translations();
        if let Err(failed) = self.check_entry(|c| c.check_guest()) {
            let qualification = match failed.failure {
                Failure::GuestState { qualification } => qualification,
                Failure::Instruction(_) => 0,
            };
            self.vm_entry_failed(ExitReason::EntryGuestState, qualification, failed.id);
            return Err(Stop::DELIVERED);
        }
        self.vmx.controls = Controls::of(&self.vmx.vmcs);
        self.load_guest_registers();
        self.load_guest_segments();
        if let Err(e) = self.load_msr_list(Field::EntryMsrLoadCount, Field::EntryMsrLoadGpa) {
            self.vm_entry_failed(ExitReason::EntryMsrLoading, e.entry, 0);
            return Err(Stop::DELIVERED);
        }
        if launch {
            self.vmx.vmcs.launched = true;
        }
        self.vmx_mode = VmxMode::NonRoot;
        let proc2 = self.vmx.controls.proc2;
        self.eptp = proc2.enable_ept().then(|| self.vmx.get(Field::Eptp));
        self.load_guest_pdptes();
        let injection = self.vmx.vmcs.injection();
        let activity = self.entry_activity();
        if self.bus.wants(EventKind::VmEntry) {
            let detail = Detail::VmEntry {
                vmcs_gpa: self.vmx.current_gpa,
                activity,
                rip: self.regs.rip(),
                injected: if injection.valid() { injection.into_bits() } else { 0 },
            };
            self.report(0, detail);
        }
        self.load_guest_activity(activity);
        self.mode_changed();
        if self.dr7 & 0xff != 0 {
            // The TLB holds no page with a data breakpoint; a VPID's translations may be from before.
            self.tlb.flush();
        }
        self.enter_guest_translations();
        self.start_preemption_timer();
        if injection.valid() {
            self.inject();
        }
        // L1's TF and RF are gone with its other flags: they neither trap in L2 nor clear L2's RF.
        Err(Stop::DELIVERED)
    }

    fn check_entry(&self, evaluate: fn(&Context) -> Result<(), &'static Check>) -> Result<(), &'static Check> {
        let memory = RamReader(&self.ram);
        let vmx = &self.vmx;
        evaluate(&Context::new(&vmx.vmcs, vmx.caps, &memory, self.efer.lma(), vmx.current_gpa))
    }

    /// SDM 3, "Loading Guest Control Registers, Debug Registers, and MSRs", "Loading Guest RIP, RSP, RFLAGS".
    fn load_guest_registers(&mut self) {
        let entry = self.vmx.controls.entry;
        let vmcs = &self.vmx.vmcs;
        self.cr0 = Cr0::from_bits(self.cr0.into_bits() & CR0_KEPT | vmcs.get(Field::GuestCr0) & !CR0_KEPT);
        self.cr3 = vmcs.get(Field::GuestCr3);
        self.cr4 = Cr4::from_bits(vmcs.get(Field::GuestCr4));
        if entry.load_debug_controls() {
            self.dr7 = vmcs.get(Field::GuestDr7) & 0xffff_2fff | dr::DR7_RESET;
            self.msrs.debugctl = vmcs.get(Field::GuestDebugctl);
        }
        self.msrs.sysenter_cs = vmcs.get(Field::GuestSysenterCs);
        self.msrs.sysenter_esp = vmcs.get(Field::GuestSysenterEsp);
        self.msrs.sysenter_eip = vmcs.get(Field::GuestSysenterEip);
        self.efer = if entry.load_efer() {
            Efer::from_bits(vmcs.get(Field::GuestEfer))
        } else {
            let long = entry.ia32e_mode_guest();
            let lme = if self.cr0.pg() { long } else { self.efer.lme() };
            self.efer.with_lma(long).with_lme(lme)
        };
        if entry.load_pat() {
            self.msrs.pat = vmcs.get(Field::GuestPat);
        }
        self.gdtr = TableRegister { base: vmcs.get(Field::GuestGdtrBase), limit: vmcs.get16(Field::GuestGdtrLimit) };
        self.idtr = TableRegister { base: vmcs.get(Field::GuestIdtrBase), limit: vmcs.get16(Field::GuestIdtrLimit) };
        self.regs.set_rip(vmcs.get(Field::GuestRip));
        self.regs.set_r(slot::RSP, vmcs.get(Field::GuestRsp));
        self.flags.set_bits(vmcs.get(Field::GuestRflags));
    }

    fn load_guest_segments(&mut self) {
        for (i, s) in self.seg.iter_mut().enumerate() {
            let g = self.vmx.vmcs.guest_segment(i);
            *s = Segment { selector: g.selector, base: g.base, limit: g.limit, ar: g.rights };
        }
        self.cpl = self.seg[usize::from(reg::SS)].ar.dpl();
    }

    /// The checks have seen that they are valid.
    fn load_guest_pdptes(&mut self) {
        if !self.cr0.pg() || !self.cr4.pae() || self.efer.lma() {
            return;
        }
        if self.vmx.controls.proc2.enable_ept() {
            self.pdpte = Field::GUEST_PDPTES.map(|f| self.vmx.get(f));
        } else {
            self.load_pdptes_from_memory();
        }
    }

    /// Whether the entry delivers an event through the guest's IDT.
    fn entry_is_vectoring(&self) -> bool {
        let injection = self.vmx.vmcs.injection();
        injection.valid() && injection.event_type() != EventType::Other
    }

    /// R14: a vectoring entry ends active, any other in the field's state.
    fn entry_activity(&self) -> ActivityState {
        if self.entry_is_vectoring() {
            return ActivityState::Active;
        }
        ActivityState::from_u64(self.vmx.get(Field::GuestActivityState)).unwrap_or_default()
    }

    /// SDM 3, "Interruptibility State", "Activity State", "Pending Debug Exceptions after VM Entry" (R14).
    fn load_guest_activity(&mut self, state: ActivityState) {
        let pin = self.vmx.controls.pin;
        let blocking = Interruptibility::from_bits(self.vmx.vmcs.get32(Field::GuestInterruptibility));
        self.vmx.virtual_nmi_blocked = pin.virtual_nmis() && blocking.nmi();
        self.nmi_blocked = !pin.virtual_nmis() && blocking.nmi();
        self.shadow = 0;
        self.new_shadow = 0;
        self.pending_debug = 0;
        self.vmx.mtf_pending = false;
        if self.vmx.controls.proc.monitor_trap_flag() {
            self.special |= special::MTF;
        }
        if self.entry_is_vectoring() {
            // The delivery ends blocking by STI and MOV SS, and pending debug exceptions are lost.
            return;
        }
        self.shadow = if blocking.sti() { shadow::STI } else { 0 } | if blocking.mov_ss() { shadow::MOV_SS } else { 0 };
        if !matches!(state, ActivityState::Shutdown | ActivityState::WaitForSipi) {
            let pending = PendingDebug::from_bits(self.vmx.get(Field::GuestPendingDebug));
            // Breakpoints that DR7 did not enable only tell more of an exception that is pending for another reason.
            if pending.enabled() || pending.bs() {
                self.pending_debug = u64::from(pending.breakpoints()) | if pending.bs() { dr::DR6_BS } else { 0 };
            }
        }
        self.set_activity(state);
    }

    /// Event injection (SDM 3, "Event Injection"): before the guest's first instruction and before any other event
    /// (R9, R20).
    fn inject(&mut self) {
        let info = self.vmx.vmcs.injection();
        if info.event_type() == EventType::Other {
            self.vmx.mtf_pending = true;
            return;
        }
        let virtual_nmis = self.vmx.controls.pin.virtual_nmis();
        if info.event_type() == EventType::Nmi {
            self.vmx.virtual_nmi_blocked = virtual_nmis;
            self.nmi_blocked = !virtual_nmis;
        }
        let length =
            if info.event_type().is_software() { self.vmx.get(Field::EntryInstructionLength) as u8 } else { 0 };
        self.deliver_event(Vectored {
            kind: info.event_type(),
            vector: info.vector(),
            error: info.error_code().then(|| self.vmx.vmcs.get32(Field::EntryErrorCode)),
            length,
        });
        if self.in_non_root() && virtual_nmis {
            // Delivering an NMI blocks physical ones; this one was virtual.
            self.nmi_blocked = false;
        }
        // "Monitor Trap Flag": after a vectoring entry, it is due before the handler's first instruction.
        if self.in_non_root() && self.vmx.controls.proc.monitor_trap_flag() {
            self.vmx.mtf_pending = true;
        }
    }
}
