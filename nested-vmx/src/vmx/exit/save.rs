//! Saving guest state (SDM 3, "Saving Guest State").

use super::ExitInfo;
use super::reasons::ExitReason;
use crate::arch::cr::{dr, rflags};
use crate::arch::exception;
use crate::arch::vmx::{EventType, Interruptibility, InterruptionInfo, PendingDebug};
use crate::cpu::Cpu;
use crate::cpu::seg::Segment;
use crate::cpu::{shadow, slot};
use crate::vmx::vmcs12::{Field, GuestSegment};

impl Cpu {
    pub(super) fn save_guest(&mut self, exit: &ExitInfo) {
        self.save_guest_registers(exit);
        self.save_guest_activity(exit);
        self.save_preemption_timer();
    }

    fn save_guest_registers(&mut self, exit: &ExitInfo) {
        let controls = self.vmx.controls;
        let vmcs = &mut self.vmx.vmcs;
        vmcs.set(Field::GuestCr0, self.cr0.into_bits());
        vmcs.set(Field::GuestCr3, self.cr3);
        vmcs.set(Field::GuestCr4, self.cr4.into_bits());
        vmcs.set(Field::GuestSysenterCs, self.msrs.sysenter_cs);
        vmcs.set(Field::GuestSysenterEsp, self.msrs.sysenter_esp);
        vmcs.set(Field::GuestSysenterEip, self.msrs.sysenter_eip);
        if controls.exit.save_debug_controls() {
            vmcs.set(Field::GuestDr7, self.dr7);
            vmcs.set(Field::GuestDebugctl, self.msrs.debugctl);
        }
        if controls.exit.save_pat() {
            vmcs.set(Field::GuestPat, self.msrs.pat);
        }
        if controls.exit.save_efer() {
            vmcs.set(Field::GuestEfer, self.efer.into_bits());
        }
        // IA32_VMX_MISC[5].
        let entry = controls.entry.with_ia32e_mode_guest(self.efer.lma());
        vmcs.set(Field::EntryControls, entry.into_bits().into());
        for (i, s) in self.seg.iter().enumerate() {
            vmcs.set_guest_segment(i, saved_segment(s));
        }
        vmcs.set(Field::GuestGdtrBase, self.gdtr.base);
        vmcs.set(Field::GuestGdtrLimit, self.gdtr.limit.into());
        vmcs.set(Field::GuestIdtrBase, self.idtr.base);
        vmcs.set(Field::GuestIdtrLimit, self.idtr.limit.into());
        vmcs.set(Field::GuestRip, self.regs.rip());
        vmcs.set(Field::GuestRsp, self.regs.r(slot::RSP));
        vmcs.set(Field::GuestRflags, with_resume_flag(self.flags.bits(), exit));
        if controls.proc2.enable_ept() && self.cr0.pg() && self.cr4.pae() && !self.efer.lma() {
            for (field, value) in Field::GUEST_PDPTES.into_iter().zip(self.pdpte) {
                vmcs.set(field, value);
            }
        }
    }

    /// SDM 3, "Saving Non-Register State".
    fn save_guest_activity(&mut self, exit: &ExitInfo) {
        let virtual_nmis = self.vmx.controls.pin.virtual_nmis();
        let blocking = Interruptibility::new()
            .with_sti(self.shadow & shadow::STI != 0)
            .with_mov_ss(self.shadow & shadow::MOV_SS != 0)
            .with_nmi(if virtual_nmis { self.vmx.virtual_nmi_blocked } else { self.nmi_blocked });
        self.vmx.set(Field::GuestActivityState, self.activity as u64);
        self.vmx.set(Field::GuestInterruptibility, blocking.into_bits().into());
        let pending = if keeps_pending_debug(exit, self.shadow) { self.pending_debug_field() } else { 0 };
        self.vmx.set(Field::GuestPendingDebug, pending);
    }

    fn pending_debug_field(&self) -> u64 {
        let breakpoints = (self.pending_debug & 0xf) as u8;
        PendingDebug::new()
            .with_breakpoints(breakpoints)
            .with_enabled(breakpoints != 0)
            .with_bs(self.pending_debug & dr::DR6_BS != 0)
            .into_bits()
    }
}

/// Which exits leave pending debug exceptions to the next VM entry (R16, R17).
fn keeps_pending_debug(exit: &ExitInfo, blocked: u8) -> bool {
    let always = [ExitReason::InitSignal, ExitReason::MonitorTrapFlag, ExitReason::TprBelowThreshold];
    let debug_exception = exit.reason == ExitReason::ExceptionOrNmi.number()
        && InterruptionInfo::from_bits(exit.interruption).vector() == exception::DB;
    always.iter().any(|r| r.number() == exit.reason) || blocked & shadow::MOV_SS != 0 && !debug_exception
}

/// RFLAGS with RF as the exit saves it: set by faults, clear where an instruction caused the exit, else as it was (SDM 3,
/// "Saving RIP, RSP, RFLAGS, and SSP").
fn with_resume_flag(flags: u64, exit: &ExitInfo) -> u64 {
    use ExitReason::*;
    let info = InterruptionInfo::from_bits(exit.interruption);
    match ExitReason::from_number(exit.reason) {
        Some(ExceptionOrNmi) if info.event_type() == EventType::HardwareException && info.vector() != exception::DB => {
            flags | rflags::RF
        }
        Some(EptViolation | EptMisconfiguration) => flags | rflags::RF,
        Some(
            ExceptionOrNmi | ExternalInterrupt | TripleFault | InitSignal | Sipi | InterruptWindow | NmiWindow
            | MonitorTrapFlag | TprBelowThreshold | PreemptionTimer,
        ) => flags,
        _ => flags & !rflags::RF,
    }
}

fn saved_segment(s: &Segment) -> GuestSegment {
    GuestSegment { selector: s.selector, base: s.base, limit: s.limit, rights: s.ar }
}
