//! The extended page tables (SDM 3, "The Extended Page Table Mechanism").

use super::Wanted;
use crate::cpu::{Cpu, Stop};
use crate::vmx::ExitInfo;

const READ: u64 = 1 << 0;
const WRITE: u64 = 1 << 1;
const EXECUTE: u64 = 1 << 2;
const RIGHTS: u64 = READ | WRITE | EXECUTE;
const LARGE: u64 = 1 << 7;
const ACCESSED: u64 = 1 << 8;
const DIRTY: u64 = 1 << 9;

const EXIT_EPT_VIOLATION: u16 = 48;
const EXIT_EPT_MISCONFIGURATION: u16 = 49;

/// EPTP bit 6.
const EPTP_ACCESSED_DIRTY: u64 = 1 << 6;

/// What the guest-physical address is accessed for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// The translation of a linear address; the guest page's rights go into the qualification.
    Data { user: bool, writable: bool, no_execute: bool },
    /// A paging-structure entry.
    Table,
    /// Guest-physical by nature (PDPTE loads): no linear address.
    Physical,
}

#[derive(Clone, Copy, Debug)]
pub struct EptRights {
    pub read: bool,
}

impl Cpu {
    /// Guest paging-structure accesses count as writes when EPT's accessed and dirty flags are on.
    pub(crate) fn ept_accessed_dirty(&self) -> bool {
        self.eptp.is_some_and(|e| e & EPTP_ACCESSED_DIRTY != 0)
    }

    /// Guest-physical to physical.
    pub(crate) fn second_level(
        &mut self,
        gpa: u64,
        lin: Option<u64>,
        wanted: Wanted,
        origin: Origin,
    ) -> Result<(u64, EptRights), Stop> {
        let Some(eptp) = self.eptp else {
            return Ok((gpa, EptRights { read: true }));
        };
        let accessed_dirty = eptp & EPTP_ACCESSED_DIRTY != 0;
        let need = match (wanted.write, wanted.fetch) {
            (true, _) => WRITE,
            (_, true) => EXECUTE,
            _ => READ,
        };
        let mut table = eptp & self.physical_mask() & !0xfff;
        let mut rights = RIGHTS;
        let mut shift = 39;
        loop {
            let entry_hpa = table + ((gpa >> shift) & 0x1ff) * 8;
            let entry: u64 = self.load_physical(entry_hpa);
            let leaf = shift == 12 || (shift <= 30 && entry & LARGE != 0);
            if entry & RIGHTS != 0 && self.misconfigured(entry, shift, leaf) {
                return Err(self.ept_exit(EXIT_EPT_MISCONFIGURATION, 0, lin, gpa));
            }
            rights &= entry;
            // Rights are looked at when the walk is at its end: what is missing or misconfigured further down comes first
            // (SDM 3, "Prioritization of EPT Misconfigurations and EPT Violations").
            if entry & RIGHTS == 0 || leaf && rights & need == 0 {
                let qualification = self.violation(wanted, rights & RIGHTS, lin, origin);
                return Err(self.ept_exit(EXIT_EPT_VIOLATION, qualification, lin, gpa));
            }
            if accessed_dirty {
                let flags = ACCESSED | if leaf && wanted.write { DIRTY } else { 0 };
                if entry & flags != flags
                    && let Some(offset) = self.ram.offset_of(entry_hpa)
                {
                    let mut old = entry;
                    while let Err(seen) = self.ram.cas(offset, old, old | flags) {
                        old = seen;
                    }
                }
            }
            let page_mask = (1u64 << shift) - 1;
            if leaf {
                let base = entry & self.physical_mask() & !0xfff & !page_mask;
                return Ok((base | gpa & page_mask, EptRights { read: rights & READ != 0 }));
            }
            table = entry & self.physical_mask() & !0xfff;
            shift -= 9;
        }
    }

    /// SDM 3, "EPT Misconfigurations".
    fn misconfigured(&self, entry: u64, shift: u32, leaf: bool) -> bool {
        let writable_only = entry & (READ | WRITE) == WRITE;
        let mut reserved = !self.physical_mask() & 0x000f_ffff_ffff_f000;
        if leaf {
            if shift > 12 {
                reserved |= ((1u64 << shift) - 1) & !0xfff;
            }
        } else {
            // Bits 6:3; in the PML4E also bit 7.
            reserved |= 0x78 | if shift == 39 { LARGE } else { 0 };
        }
        let bad_type = leaf && matches!(entry >> 3 & 7, 2 | 3 | 7);
        writable_only || entry & reserved != 0 || bad_type
    }

    /// Exit qualification of an EPT violation (SDM 3, "Exit Qualification for EPT Violations").
    fn violation(&self, wanted: Wanted, rights: u64, lin: Option<u64>, origin: Origin) -> u64 {
        let mut q = rights << 3;
        q |= match (wanted.write, wanted.fetch) {
            // A paging-structure access with accessed and dirty flags is reported as a read and a write.
            (true, _) if origin == Origin::Table && self.ept_accessed_dirty() => 0b011,
            (true, _) => 0b010,
            (_, true) => 0b100,
            _ => 0b001,
        };
        if lin.is_some() {
            q |= 1 << 7;
        }
        if let Origin::Data { user, writable, no_execute } = origin {
            // Bits 11:9 are the advanced information that EPT_VPID_CAP bit 22 announces.
            q |= 1 << 8 | u64::from(user) << 9 | u64::from(writable) << 10 | u64::from(no_execute) << 11;
        }
        q
    }

    fn ept_exit(&mut self, reason: u16, qualification: u64, lin: Option<u64>, gpa: u64) -> Stop {
        self.exit = ExitInfo {
            reason,
            qualification,
            guest_linear: lin.unwrap_or(0),
            guest_physical: gpa,
            ..ExitInfo::default()
        };
        Stop::VM_EXIT
    }
}
