//! Whose translations are current, and which VM entries and VM exits invalidate them (SDM 3, "Caching Translation
//! Information").

use super::vmcs12::Field;
use crate::cpu::{ContextKey, Cpu};
use crate::mem::Word;

/// What stands for an EPTP in a context: its bits 51:12, and a bit that tells a root at 0 from no EPT.
pub(super) fn ept_root(eptp: u64) -> u64 {
    eptp & !0xfff | 1
}

impl Cpu {
    /// The context that the TLB tags translations with. Call when VPID, PCID (CR3, CR4.PCIDE, EFER.LMA) or EPTP change.
    pub(crate) fn context_changed(&mut self) {
        let pcid = if self.cr4.pcide() && self.efer.lma() { (self.cr3 & 0xfff) as u16 } else { 0 };
        let key = ContextKey { vpid: self.vpid(), pcid, eptp: self.eptp.map_or(0, ept_root) };
        self.tlb.switch(key);
    }

    /// The current VPID; 0 outside non-root operation and without "enable VPID".
    pub(crate) fn vpid(&self) -> u16 {
        if self.in_non_root() && self.vmx.controls.proc2.enable_vpid() { self.vmx.vmcs.get16(Field::Vpid) } else { 0 }
    }

    /// What rights of cached translations depend on besides the context: L1 may change it between VM exit and entry.
    fn paging_mode(&self) -> u64 {
        let cr0 = self.cr0.into_bits() & (1 << 31 | 1 << 16);
        let cr4 = self.cr4.into_bits() & (1 << 4 | 1 << 5 | 1 << 7 | 1 << 20 | 1 << 21);
        cr0 | cr4 << 32 | self.efer.into_bits() & 0xd00
    }

    /// VM entry: L1's registers are still loaded.
    pub(super) fn remember_host_translations(&mut self) {
        self.vmx.host_translations = Some((self.cr3, self.paging_mode()));
    }

    /// VM exit and failed VM entry: L1's registers are loaded. Translations of before VM entry stay only if they mean the
    /// same under the host-state fields.
    pub(super) fn enter_host_translations(&mut self) {
        if self.vmx.host_translations != Some((self.cr3, self.paging_mode())) {
            self.tlb.flush_contexts(true, |k| k.vpid == 0);
        }
        self.context_changed();
    }

    /// VM entry: guest registers, controls and the EPTP are loaded.
    pub(super) fn enter_guest_translations(&mut self) {
        let vpid = self.vpid();
        if vpid == 0 {
            self.tlb.flush_contexts(true, |k| k.vpid == 0);
        } else if self.vmx.translations != Some((vpid, self.eptp.unwrap_or(0), self.paging_mode())) {
            self.tlb.flush_contexts(true, |k| k.vpid == vpid);
        }
        self.context_changed();
    }

    /// VM exit, or a VM entry that fails and loads host state: guest registers are still loaded.
    pub(super) fn leave_guest_translations(&mut self) {
        let vpid = self.vpid();
        if vpid == 0 {
            self.tlb.flush_contexts(true, |k| k.vpid == 0);
        } else {
            self.vmx.translations = Some((vpid, self.eptp.unwrap_or(0), self.paging_mode()));
        }
        self.eptp = None;
    }

    /// Loads the PDPTEs that CR3 points to, from physical memory as VM entries and VM exits do; false if one is invalid.
    pub(super) fn load_pdptes_from_memory(&mut self) -> bool {
        let table_gpa = self.cr3 & 0xffff_ffe0;
        let mut entries = [0u64; 4];
        for (i, e) in entries.iter_mut().enumerate() {
            *e = self.load_physical(table_gpa + i as u64 * u64::BYTES);
        }
        let reserved = 0x1e6 | !((1 << self.vmx.caps.limits.physical_bits) - 1);
        if entries.iter().any(|e| e & 1 != 0 && e & reserved != 0) {
            return false;
        }
        self.pdpte = entries;
        true
    }
}
