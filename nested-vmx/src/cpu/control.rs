//! Control registers and EFER: what may be written, and what changes with them (SDM 3, "Control Registers").

use super::seg::reg;
use super::{Cpu, Flow, Stop};
use crate::arch::cr::{Cr0, Cr4};

/// CR3 bit 63 of the source operand: keep the PCID's translations.
const CR3_NO_FLUSH: u64 = 1 << 63;

const CR0_DEFINED: u64 = Cr0::new()
    .with_pe(true)
    .with_mp(true)
    .with_em(true)
    .with_ts(true)
    .with_et(true)
    .with_ne(true)
    .with_wp(true)
    .with_am(true)
    .with_nw(true)
    .with_cd(true)
    .with_pg(true)
    .into_bits();

impl Cpu {
    /// MOV to CR0, LMSW, CLTS: checks, then everything that follows from the change.
    pub(crate) fn write_cr0(&mut self, value: u64) -> Flow {
        if value >> 32 != 0 {
            return Err(Stop::GP0);
        }
        let old = self.cr0;
        let new = Cr0::from_bits(value & CR0_DEFINED).with_et(true);
        if new.pg() && !new.pe() || new.nw() && !new.cd() || !self.vmx_permits_cr0(new.into_bits()) {
            return Err(Stop::GP0);
        }
        if new.pg() && !old.pg() && self.efer.lme() {
            let cs = self.segment(reg::CS);
            if !self.cr4.pae() || cs.ar.l() || self.segment(reg::TR).ar.kind() & 8 == 0 && self.has_task() {
                return Err(Stop::GP0);
            }
        }
        if !new.pg() && old.pg() && (self.code64() || self.cr4.pcide()) {
            return Err(Stop::GP0);
        }
        let lma = new.pg() && self.efer.lme();
        let changed = old.into_bits() ^ new.into_bits();
        let paging_bits = Cr0::new().with_pg(true).with_cd(true).with_nw(true).into_bits();
        if new.pg() && self.cr4.pae() && !lma && changed & paging_bits != 0 {
            self.pdpte = self.read_pdptes(self.cr3)?;
        }
        self.cr0 = new;
        if lma != self.efer.lma() {
            self.efer.set_lma(lma);
            self.context_changed();
        }
        // Cached translations hold the rights that WP gave them.
        if changed & Cr0::new().with_pg(true).with_pe(true).with_wp(true).into_bits() != 0 {
            self.flush_own(true);
        }
        self.mode_changed();
        Ok(())
    }

    /// TR holds a TSS; after RESET it has a 16-bit one that nobody loaded.
    fn has_task(&self) -> bool {
        self.segment(reg::TR).selector & !3 != 0
    }

    pub(crate) fn write_cr3(&mut self, value: u64) -> Flow {
        let pcide = self.cr4.pcide();
        let keep = pcide && value & CR3_NO_FLUSH != 0;
        let cr3 = if pcide { value & !CR3_NO_FLUSH } else { value };
        if cr3 & !self.physical_mask() != 0 {
            return Err(Stop::GP0);
        }
        if self.cr0.pg() && self.cr4.pae() && !self.long_mode() {
            self.pdpte = self.read_pdptes(cr3)?;
        }
        self.cr3 = cr3;
        self.context_changed();
        if !keep {
            self.flush_pcid();
        }
        Ok(())
    }

    pub(crate) fn write_cr4(&mut self, value: u64) -> Flow {
        let old = self.cr4;
        let new = Cr4::from_bits(value);
        if value & !self.cr4_supported() != 0 || !self.vmx_permits_cr4(value) {
            return Err(Stop::GP0);
        }
        if self.long_mode() && !new.pae() {
            return Err(Stop::GP0);
        }
        if new.pcide() && !old.pcide() && (!self.long_mode() || self.cr3 & 0xfff != 0) {
            return Err(Stop::GP0);
        }
        let changed = Cr4::from_bits(old.into_bits() ^ new.into_bits());
        let paging = changed.pge() || changed.pae() || changed.pse() || changed.smep();
        if self.cr0.pg() && new.pae() && !self.long_mode() && paging {
            self.pdpte = self.read_pdptes(self.cr3)?;
        }
        self.cr4 = new;
        if paging || changed.smap() || changed.pcide() {
            self.context_changed();
            self.flush_own(true);
        }
        self.mode_changed();
        Ok(())
    }

    /// Translations of this PCID and VPID, but not global ones.
    pub(crate) fn flush_pcid(&mut self) {
        let key = self.tlb.key();
        self.tlb.flush_contexts(false, |k| k.vpid == key.vpid && k.pcid == key.pcid);
    }

    /// Translations of this VPID, of all PCIDs.
    pub(crate) fn flush_own(&mut self, globals: bool) {
        let vpid = self.tlb.key().vpid;
        self.tlb.flush_contexts(globals, |k| k.vpid == vpid);
    }
}
