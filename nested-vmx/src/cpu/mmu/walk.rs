//! The page walk: 32-bit, PAE and 4-level paging (SDM 3, "Paging").

use super::Wanted;
use super::tlb::{Access, Fill};
use crate::arch::exception::{self, pf};
use crate::arch::is_canonical;
use crate::cpu::{Cpu, Stop};
use crate::mem::Word;

const P: u64 = 1 << 0;
const RW: u64 = 1 << 1;
const US: u64 = 1 << 2;
const A: u64 = 1 << 5;
const D: u64 = 1 << 6;
const PS: u64 = 1 << 7;
const G: u64 = 1 << 8;
const XD: u64 = 1 << 63;

/// How often a walk begins again because others change what it reads.
const WALKS: usize = 64;

/// The end of a walk, before EPT.
#[derive(Clone, Copy, Debug)]
struct Leaf {
    gpa: u64,
    /// The page's size minus 1.
    page_mask: u64,
    writable: bool,
    user: bool,
    no_execute: bool,
    global: bool,
}

/// Where a linear address leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Translation {
    /// The final physical address, after EPT.
    pub gpa: u64,
    /// RAM, if it is.
    pub ram_offset: Option<u64>,
}

impl Cpu {
    pub(crate) fn physical_mask(&self) -> u64 {
        (1 << crate::cpu::PHYSICAL_ADDRESS_BITS) - 1
    }

    /// Translates with all checks, sets accessed and dirty flags, and fills the TLB when the page is plain RAM.
    pub(crate) fn translate(&mut self, lin: u64, wanted: Wanted) -> Result<Translation, Stop> {
        let leaf = if self.cr0.pg() {
            self.walk(lin, wanted)?
        } else {
            let gpa = lin & 0xffff_ffff;
            Leaf { gpa, page_mask: u64::MAX >> 1, writable: true, user: true, no_execute: false, global: false }
        };
        self.check_rights(lin, &leaf, wanted)?;
        let (hpa, ept) = self.second_level(leaf.gpa, Some(lin), wanted, leaf_rights(&leaf))?;
        let ram_offset = self.ram.offset_of(hpa).filter(|_| !self.is_special_page(hpa));
        if let Some(offset) = ram_offset {
            let fill = Fill {
                lin: lin & !0xfff,
                ram_offset: offset & !0xfff,
                read: ept.read,
                // A clean page must be walked again when it is first written.
                write: wanted.write && !self.has_data_breakpoint(lin) && self.ram.map_for_write(offset),
                global: leaf.global && self.cr4.pge(),
                page_mask: leaf.page_mask,
            };
            if wanted.fetch {
                self.tlb.fill_fetch(wanted.user(), &fill);
            } else if !self.has_data_breakpoint(lin) {
                self.tlb.fill(wanted.access, &fill);
            }
        }
        Ok(Translation { gpa: hpa, ram_offset })
    }

    /// Raises #PF at the end; records the address, which CR2 gets on delivery.
    pub(crate) fn page_fault(&mut self, lin: u64, wanted: Wanted, cause: u32) -> Stop {
        self.fault_address = lin;
        let mut code = cause;
        if wanted.write {
            code |= pf::W;
        }
        if wanted.user() {
            code |= pf::U;
        }
        if wanted.fetch && (self.efer.nxe() && self.cr4.pae() || self.cr4.smep()) {
            code |= pf::I;
        }
        Stop::error(exception::PF, code)
    }

    /// SDM 3, "Determination of Access Rights".
    fn check_rights(&mut self, lin: u64, leaf: &Leaf, wanted: Wanted) -> Result<(), Stop> {
        if !self.cr0.pg() {
            return Ok(());
        }
        let user = wanted.user();
        let forbidden = if user && !leaf.user {
            true
        } else if wanted.fetch {
            leaf.no_execute || (!user && leaf.user && self.cr4.smep())
        } else {
            let smap = !user && leaf.user && self.cr4.smap() && wanted.access != Access::SupervisorAc;
            smap || (wanted.write && !leaf.writable && (user || self.cr0.wp()))
        };
        if forbidden { Err(self.page_fault(lin, wanted, pf::P)) } else { Ok(()) }
    }

    fn walk(&mut self, lin: u64, wanted: Wanted) -> Result<Leaf, Stop> {
        for _ in 0..WALKS {
            if let Some(leaf) = self.walk_once(lin, wanted)? {
                return Ok(leaf);
            }
        }
        // Others change the entries as fast as they are read: a spurious fault lets the guest look for itself.
        Err(self.page_fault(lin, wanted, 0))
    }

    /// None: an entry changed between its reading and the setting of its flags.
    fn walk_once(&mut self, lin: u64, wanted: Wanted) -> Result<Option<Leaf>, Stop> {
        if self.efer.lma() {
            if !is_canonical(lin) {
                return Err(Stop::GP0);
            }
            let root = self.cr3 & self.physical_mask() & !0xfff;
            self.walk_64(lin, root, 39, wanted)
        } else if self.cr4.pae() {
            let lin = lin & 0xffff_ffff;
            let pdpte = self.pdpte[(lin >> 30) as usize];
            if pdpte & P == 0 {
                return Err(self.page_fault(lin, wanted, 0));
            }
            self.walk_64(lin, pdpte & self.physical_mask() & !0xfff, 21, wanted)
        } else {
            self.walk_32(lin & 0xffff_ffff, wanted)
        }
    }

    fn walk_64(&mut self, lin: u64, root: u64, top: u32, wanted: Wanted) -> Result<Option<Leaf>, Stop> {
        let mut table = root;
        let (mut writable, mut user, mut no_execute) = (true, true, false);
        let mut shift = top;
        loop {
            let entry_gpa = table + ((lin >> shift) & 0x1ff) * 8;
            let entry_lin = Some(lin);
            let entry: u64 = self.load_table(entry_gpa, entry_lin)?;
            if entry & P == 0 {
                return Err(self.page_fault(lin, wanted, 0));
            }
            let leaf = shift == 12 || (entry & PS != 0 && shift <= 30 && (shift == 21 || self.long_mode()));
            let page_mask = (1u64 << shift) - 1;
            let mut reserved = !self.physical_mask() & 0x000f_ffff_ffff_f000;
            if !self.efer.nxe() {
                reserved |= XD;
            }
            if !self.efer.lma() {
                // PAE: bits 62:52 are reserved too.
                reserved |= 0x7ff0_0000_0000_0000;
            }
            if leaf && shift > 12 {
                // Bit 12 is PAT.
                reserved |= page_mask & !0x1fff;
            }
            if !leaf && (shift == 39 || shift == 30) {
                reserved |= PS;
            }
            if entry & reserved != 0 {
                return Err(self.page_fault(lin, wanted, pf::P | pf::RSVD));
            }
            writable &= entry & RW != 0;
            user &= entry & US != 0;
            no_execute |= entry & XD != 0;
            let mut want = A;
            let mut found = None;
            if leaf {
                let l = Leaf {
                    gpa: entry & self.physical_mask() & !page_mask & !0xfff | lin & page_mask,
                    page_mask,
                    writable,
                    user,
                    no_execute,
                    global: entry & G != 0,
                };
                // Rights first: a fault sets no flag of the leaf.
                self.check_rights(lin, &l, wanted)?;
                if wanted.write {
                    want |= D;
                }
                found = Some(l);
            }
            let set = self.set_table_flags(entry_gpa, entry, want, entry_lin)?;
            match found {
                _ if !set => return Ok(None),
                Some(_) => return Ok(found),
                None => {}
            }
            table = entry & self.physical_mask() & 0x000f_ffff_ffff_f000;
            shift -= 9;
        }
    }

    fn walk_32(&mut self, lin: u64, wanted: Wanted) -> Result<Option<Leaf>, Stop> {
        let pde_gpa = (self.cr3 & 0xffff_f000) + (lin >> 22) * 4;
        let pde: u32 = self.load_table(pde_gpa, Some(lin))?;
        let (p, rw, us) = (P as u32, RW as u32, US as u32);
        if pde & p == 0 {
            return Err(self.page_fault(lin, wanted, 0));
        }
        let large = pde & PS as u32 != 0 && self.cr4.pse();
        if large && pde & 1 << 21 != 0 {
            return Err(self.page_fault(lin, wanted, pf::P | pf::RSVD));
        }
        let (gpa, entry_gpa, entry, page_mask, both) = if large {
            // PSE-36: bits 20:13 are physical address bits 39:32.
            let base = u64::from(pde & 0xffc0_0000) | u64::from(pde >> 13 & 0xff) << 32;
            (base | lin & 0x3f_ffff, pde_gpa, pde, 0x3f_ffff, pde)
        } else {
            if !self.set_table_flags(pde_gpa, pde, A as u32, Some(lin))? {
                return Ok(None);
            }
            let pte_gpa = u64::from(pde & 0xffff_f000) + (lin >> 12 & 0x3ff) * 4;
            let pte: u32 = self.load_table(pte_gpa, Some(lin))?;
            if pte & p == 0 {
                return Err(self.page_fault(lin, wanted, 0));
            }
            (u64::from(pte & 0xffff_f000) | lin & 0xfff, pte_gpa, pte, 0xfff, pde & pte)
        };
        let leaf = Leaf {
            gpa: gpa & self.physical_mask(),
            page_mask,
            writable: both & rw != 0,
            user: both & us != 0,
            no_execute: false,
            global: entry & G as u32 != 0,
        };
        self.check_rights(lin, &leaf, wanted)?;
        let want = if wanted.write { A | D } else { A } as u32;
        let set = self.set_table_flags(entry_gpa, entry, want, Some(lin))?;
        Ok(set.then_some(leaf))
    }

    /// The PDPTEs that CR3 points to, for PAE paging; reserved bits are #GP (SDM 3, "PDPTE Registers").
    pub(crate) fn read_pdptes(&mut self, cr3: u64) -> Result<[u64; 4], Stop> {
        let wanted = Wanted { write: false, fetch: false, access: Access::Supervisor };
        let mut pdptes = [0; 4];
        for (i, pdpte) in pdptes.iter_mut().enumerate() {
            let gpa = (cr3 & 0xffff_ffe0) + 8 * i as u64;
            let (hpa, _) = self.second_level(gpa, None, wanted, super::ept::Origin::Physical)?;
            *pdpte = self.load_physical(hpa);
            if *pdpte & P != 0 && *pdpte & (!self.physical_mask() | 0x1e6) != 0 {
                return Err(Stop::GP0);
            }
        }
        Ok(pdptes)
    }

    /// Reads a paging-structure entry of the guest, through EPT where it is on.
    fn load_table<W: Word>(&mut self, gpa: u64, lin: Option<u64>) -> Result<W, Stop> {
        let write = self.ept_accessed_dirty();
        let wanted = Wanted { write, fetch: false, access: Access::Supervisor };
        let (hpa, _) = self.second_level(gpa, lin, wanted, super::ept::Origin::Table)?;
        Ok(self.load_physical(hpa))
    }

    /// Sets accessed or dirty flags atomically. False: another processor changed more of the entry than these flags
    /// since it was read, so the walk begins again.
    fn set_table_flags<W: Word>(
        &mut self,
        gpa: u64,
        entry: W,
        flags: impl Into<u64>,
        lin: Option<u64>,
    ) -> Result<bool, Stop> {
        let flags = W::from_u64(flags.into());
        if entry | flags == entry {
            return Ok(true);
        }
        let wanted = Wanted { write: true, fetch: false, access: Access::Supervisor };
        let (hpa, _) = self.second_level(gpa, lin, wanted, super::ept::Origin::Table)?;
        let Some(offset) = self.ram.offset_of(hpa) else { return Ok(true) };
        let both = W::from_u64(A | D);
        let mut old = entry;
        while let Err(seen) = self.ram.cas(offset, old, old | flags) {
            if seen | both != entry | both {
                return Ok(false);
            }
            old = seen;
        }
        self.ram.code_changed(offset, W::BYTES);
        Ok(true)
    }
}

fn leaf_rights(l: &Leaf) -> super::ept::Origin {
    super::ept::Origin::Data { user: l.user, writable: l.writable, no_execute: l.no_execute }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{DATA, Rig};

    #[test]
    fn an_entry_that_another_processor_changed_keeps_its_value_and_the_walk_begins_again() {
        let mut rig = Rig::long();
        let read = 0x5000 | P | RW;
        rig.write_u64(DATA, read & !P);
        assert_eq!(rig.cpu.set_table_flags(DATA, read, A | D, None), Ok(false));
        assert_eq!(rig.read_u64(DATA), read & !P);
        // Another processor's accessed flag is no such change.
        rig.write_u64(DATA, read | A);
        assert_eq!(rig.cpu.set_table_flags(DATA, read, A | D, None), Ok(true));
        assert_eq!(rig.read_u64(DATA), read | A | D);
    }
}
