//! What can be read of a processor, saved and restored. Reads are pure.

use super::Cpu;
use super::fp::FpState;
use super::msr::Msrs;
use super::seg::{Segment, TableRegister};
use crate::apic::{ApicIdentity, ApicState, InvalidApicState, LocalApic};
use crate::arch::cr::{Cr0, Cr4};
use crate::arch::efer::Efer;
use crate::event::{ActivityState, VmxMode};
use crate::mailbox::Events;
use crate::vmx::{InvalidVmxState, Vmx, VmxState};
use serde::{Deserialize, Serialize};

/// The registers that a debugger would show.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Registers {
    /// RAX RCX RDX RBX RSP RBP RSI RDI R8..R15.
    pub general: [u64; 16],
    pub rip: u64,
    pub rflags: u64,
    /// ES CS SS DS FS GS LDTR TR.
    pub segments: [Segment; 8],
    pub gdtr: TableRegister,
    pub idtr: TableRegister,
    pub cr0: u64,
    pub cr2: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub cr8: u64,
    pub efer: u64,
    pub xcr0: u64,
    pub dr: [u64; 4],
    pub dr6: u64,
    pub dr7: u64,
}

/// A whole processor, at an instruction boundary.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuState {
    pub registers: Registers,
    pub cpl: u8,
    pub pdpte: [u64; 4],
    pub msrs: Msrs,
    pub fp: FpState,
    /// Of RDRAND's generator.
    pub random: u64,
    pub apic: ApicState,
    pub activity: ActivityState,
    /// Blocking by STI (1) or MOV SS (2).
    pub shadow: u8,
    pub nmi_blocked: bool,
    pub pending_debug: u64,
    pub vmx: VmxState,
    pub retired: u64,
    /// Posted and not yet looked at.
    pub posted: Events,
    pub posted_interrupts: ([u64; 4], [u64; 4]),
}

/// A saved state that no processor can have.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidState {
    #[error("local APIC")]
    Apic(#[from] InvalidApicState),
    #[error("VMX")]
    Vmx(#[from] InvalidVmxState),
    #[error("floating-point state: reserved bits of MXCSR or of a register are set")]
    FloatingPoint,
    #[error("privilege level {0} does not exist")]
    Cpl(u8),
    #[error("control registers contradict each other: CR0 {cr0:#x}, CR4 {cr4:#x}, IA32_EFER {efer:#x}")]
    Mode { cr0: u64, cr4: u64, efer: u64 },
}

impl Cpu {
    pub fn registers(&self) -> Registers {
        Registers {
            general: self.regs.general(),
            rip: self.regs.rip(),
            rflags: self.flags.bits(),
            segments: self.seg,
            gdtr: self.gdtr,
            idtr: self.idtr,
            cr0: self.cr0.into(),
            cr2: self.cr2,
            cr3: self.cr3,
            cr4: self.cr4.into(),
            cr8: self.apic.cr8().into(),
            efer: self.efer.into(),
            xcr0: self.xcr0,
            dr: self.dr,
            dr6: self.dr6,
            dr7: self.dr7,
        }
    }

    pub fn activity(&self) -> ActivityState {
        self.activity
    }

    pub fn vmx_mode(&self) -> VmxMode {
        self.vmx_mode
    }

    pub fn vmx(&self) -> &Vmx {
        &self.vmx
    }

    pub fn apic_identity(&self) -> ApicIdentity {
        self.apic.identity()
    }

    pub fn save(&self) -> CpuState {
        CpuState {
            registers: self.registers(),
            cpl: self.cpl,
            pdpte: self.pdpte,
            msrs: self.msrs.clone(),
            fp: self.fp.clone(),
            random: self.random,
            apic: self.apic.state().clone(),
            activity: self.activity,
            shadow: self.shadow,
            nmi_blocked: self.nmi_blocked,
            pending_debug: self.pending_debug,
            vmx: self.save_vmx(),
            retired: self.retired,
            posted: self.mailbox.peek_events(),
            posted_interrupts: self.mailbox.peek_interrupts(),
        }
    }

    /// Replaces everything; on an error nothing changed. RAM is restored apart.
    pub fn restore(&mut self, s: &CpuState) -> Result<(), InvalidState> {
        let apic = LocalApic::restore(&s.apic)?;
        Self::check_vmx_state(&s.vmx)?;
        let r = &s.registers;
        let (cr0, cr4, efer) = (Cr0::from_bits(r.cr0), Cr4::from_bits(r.cr4), Efer::from_bits(r.efer));
        let long = efer.lme() && cr0.pg();
        if cr0.pg() && !cr0.pe() || efer.lma() != long || long && !cr4.pae() {
            return Err(InvalidState::Mode { cr0: r.cr0, cr4: r.cr4, efer: r.efer });
        }
        if !s.fp.valid() {
            return Err(InvalidState::FloatingPoint);
        }
        if s.cpl > 3 {
            return Err(InvalidState::Cpl(s.cpl));
        }
        self.regs.set_general(&r.general);
        self.regs.set_rip(r.rip);
        self.flags.set_bits(r.rflags);
        self.seg = r.segments;
        self.gdtr = r.gdtr;
        self.idtr = r.idtr;
        (self.cr0, self.cr4, self.efer) = (cr0, cr4, efer);
        (self.cr2, self.cr3, self.xcr0) = (r.cr2, r.cr3, r.xcr0);
        (self.dr, self.dr6, self.dr7) = (r.dr, r.dr6, r.dr7);
        self.cpl = s.cpl;
        self.pdpte = s.pdpte;
        self.msrs = s.msrs.clone();
        self.fp = s.fp.clone();
        self.random = s.random;
        self.apic = apic;
        self.apic_page_gpa = self.apic.mmio_window().unwrap_or(super::apic::NO_APIC_PAGE);
        self.activity = s.activity;
        self.shadow = s.shadow;
        self.new_shadow = 0;
        self.nmi_blocked = s.nmi_blocked;
        self.pending_debug = s.pending_debug;
        self.retired = s.retired;
        self.mailbox.restore(&s.posted, &s.posted_interrupts);
        self.tlb.flush();
        self.restore_vmx(&s.vmx);
        self.mode_changed();
        self.bus.apic_changed(self.apic.identity());
        Ok(())
    }
}
