//! The states that RESET and INIT leave (R21; SDM 3, "Processor State After Reset").

use super::seg::{Segment, TableRegister, reg};
use super::{Cpu, model, slot};
use crate::arch::cr::{Cr0, Cr4, dr, rflags};
use crate::arch::efer::Efer;
use crate::arch::segment::{AccessRights, system};

const RESET_RIP: u64 = 0xfff0;
const RESET_CS: Segment = Segment { base: 0xffff_0000, ..Segment::real(0xf000, true) };

impl Cpu {
    /// Registers that RESET and INIT set alike.
    pub(super) fn reset_registers(&mut self) {
        let mut general = [0; 16];
        general[usize::from(slot::RDX)] = model::SIGNATURE.into();
        self.regs.set_general(&general);
        self.regs.set_rip(RESET_RIP);
        self.flags.set_bits(rflags::FIXED1);
        for (i, s) in self.seg.iter_mut().enumerate() {
            *s = match i as u8 {
                reg::CS => RESET_CS,
                reg::LDTR => Segment { ar: system_segment(system::LDT), ..Segment::real(0, false) },
                reg::TR => Segment { ar: system_segment(system::TSS_BUSY), ..Segment::real(0, false) },
                _ => Segment::real(0, false),
            };
        }
        self.cpl = 0;
        self.gdtr = TableRegister { base: 0, limit: 0xffff };
        self.idtr = TableRegister { base: 0, limit: 0xffff };
        self.cr2 = 0;
        self.cr3 = 0;
        self.cr4 = Cr4::new();
        self.efer = Efer::new();
        self.dr = [0; 4];
        self.dr6 = dr::DR6_RESET;
        self.dr7 = dr::DR7_RESET;
        self.shadow = 0;
        self.new_shadow = 0;
        self.nmi_blocked = false;
        self.pending_debug = 0;
        self.tlb.flush();
    }

    /// The INIT state: caches, TSC, MTRRs, PAT, floating point, XCR0 and the APIC's mode stay (R21).
    pub(crate) fn init_state(&mut self) {
        let kept = self.cr0;
        self.reset_registers();
        self.cr0 = Cr0::new().with_et(true).with_cd(kept.cd()).with_nw(kept.nw());
        self.msrs.init();
        self.apic.init();
        self.bus.apic_changed(self.apic.identity());
        self.mode_changed();
        self.context_changed();
    }
}

const fn system_segment(kind: u8) -> AccessRights {
    AccessRights::new().with_kind(kind).with_p(true)
}
