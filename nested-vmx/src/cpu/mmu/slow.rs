//! Accesses that miss the TLB: page walks, page-crossing operands, MMIO, pages that hold code.

use super::Wanted;
use super::tlb::Access;
use crate::arch::exception;
use crate::bus::BusFlow;
use crate::cpu::{Cpu, Stop};
use crate::mem::{PAGE_SIZE, Word};
use std::sync::Arc;

/// One page's part of an access.
#[derive(Clone, Copy)]
struct Piece {
    gpa: u64,
    ram_offset: Option<u64>,
    len: u64,
}

impl Cpu {
    /// Splits an access at the page boundary and translates both parts before either is touched.
    fn pieces(&mut self, lin: u64, len: u64, wanted: Wanted) -> Result<(Piece, Option<Piece>), Stop> {
        // SDM 3, "Alignment Check Exception (#AC)"; 16-byte operands need no more than 8 here.
        if wanted.access == Access::UserAligned && lin & (len.min(8) - 1) != 0 {
            return Err(Stop::error(exception::AC, 0));
        }
        let first_len = len.min(PAGE_SIZE - (lin & (PAGE_SIZE - 1)));
        let t = self.translate(lin, wanted)?;
        let first = Piece { gpa: t.gpa, ram_offset: t.ram_offset, len: first_len };
        if first_len == len {
            return Ok((first, None));
        }
        let mut next = lin.wrapping_add(first_len);
        // Outside 64-bit mode addresses wrap at 4 GiB; system structures of long mode may lie higher.
        if !self.code64() && lin <= 0xffff_ffff {
            next &= 0xffff_ffff;
        }
        let t = self.translate(next, wanted)?;
        Ok((first, Some(Piece { gpa: t.gpa, ram_offset: t.ram_offset, len: len - first_len })))
    }

    #[cold]
    #[inline(never)]
    pub(crate) fn load_slow<W: Word>(&mut self, lin: u64, access: Access) -> Result<W, Stop> {
        let wanted = Wanted { write: false, fetch: false, access };
        let (first, second) = self.pieces(lin, W::BYTES, wanted)?;
        self.note_data_breakpoint(lin, W::BYTES, false);
        match (first.ram_offset, second) {
            (Some(offset), None) => Ok(self.ram.load(offset)),
            (None, None) => Ok(self.load_physical(first.gpa)),
            (_, Some(second)) => {
                let mut bytes = [0u8; 16];
                let (a, rest) = bytes.split_at_mut(first.len as usize);
                self.read_piece(first, a);
                self.read_piece(second, &mut rest[..second.len as usize]);
                Ok(from_bytes(&bytes))
            }
        }
    }

    #[cold]
    #[inline(never)]
    pub(crate) fn store_slow<W: Word>(&mut self, lin: u64, access: Access, v: W) -> Result<(), Stop> {
        let wanted = Wanted { write: true, fetch: false, access };
        let (first, second) = self.pieces(lin, W::BYTES, wanted)?;
        self.note_data_breakpoint(lin, W::BYTES, true);
        match (first.ram_offset, second) {
            (Some(offset), None) => {
                self.ram.store(offset, v);
                self.stored(offset, W::BYTES);
            }
            (None, None) => self.store_physical(first.gpa, v),
            (_, Some(second)) => {
                let bytes = to_bytes(v);
                let (a, rest) = bytes.split_at(first.len as usize);
                self.write_piece(first, a);
                self.write_piece(second, &rest[..second.len as usize]);
            }
        }
        Ok(())
    }

    #[cold]
    #[inline(never)]
    pub(crate) fn modify_slow<W: Word>(
        &mut self,
        lin: u64,
        access: Access,
        locked: bool,
        f: &dyn Fn(W) -> W,
    ) -> Result<W, Stop> {
        let wanted = Wanted { write: true, fetch: false, access };
        let (first, second) = self.pieces(lin, W::BYTES, wanted)?;
        self.note_data_breakpoint(lin, W::BYTES, true);
        if let (Some(offset), None) = (first.ram_offset, second) {
            let old = if locked {
                self.modify_locked(offset, &f)
            } else {
                let old = self.ram.load(offset);
                self.ram.store(offset, f(old));
                old
            };
            self.stored(offset, W::BYTES);
            return Ok(old);
        }
        let ram = |p: Piece| p.ram_offset;
        if let (true, Some(a), Some(b)) = (locked, ram(first), second.and_then(ram)) {
            // A LOCK that crosses a page: nobody else runs meanwhile.
            let (memory, split) = (Arc::clone(&self.ram), first.len as usize);
            let mut old = W::default();
            self.bus.exclusive(&mut || {
                let mut bytes = [0u8; 16];
                memory.read_offset(a, &mut bytes[..split]);
                memory.read_offset(b, &mut bytes[split..W::BYTES as usize]);
                old = from_bytes(&bytes);
                let new = to_bytes(f(old));
                memory.write_offset(a, &new[..split]);
                memory.write_offset(b, &new[split..W::BYTES as usize]);
            });
            self.stored(a, first.len);
            self.stored(b, W::BYTES - first.len);
            return Ok(old);
        }
        let mut bytes = [0u8; 16];
        let split = first.len as usize;
        self.read_piece(first, &mut bytes[..split]);
        if let Some(second) = second {
            self.read_piece(second, &mut bytes[split..W::BYTES as usize]);
        }
        let old: W = from_bytes(&bytes);
        let new = to_bytes(f(old));
        self.write_piece(first, &new[..split]);
        if let Some(second) = second {
            self.write_piece(second, &new[split..W::BYTES as usize]);
        }
        Ok(old)
    }

    /// The atomic update of RAM inside one page.
    pub(crate) fn modify_locked<W: Word>(&mut self, offset: u64, f: &impl Fn(W) -> W) -> W {
        if (offset & 63) + W::BYTES > 64 {
            // A host LOCK that splits a cache line may be trapped by the host; stopping the others is always exact.
            let ram = Arc::clone(&self.ram);
            let mut old = W::default();
            self.bus.exclusive(&mut || {
                old = ram.load(offset);
                ram.store(offset, f(old));
            });
            // While this one waited to be alone another may have decoded the page.
            self.stored(offset, W::BYTES);
            return old;
        }
        let mut old: W = self.ram.load(offset);
        while let Err(seen) = self.ram.cas(offset, old, f(old)) {
            old = seen;
        }
        old
    }

    /// After a store that did not go through the TLB: code that changed is decoded again, from the next instruction on.
    pub(crate) fn stored(&mut self, offset: u64, len: u64) {
        if self.ram.code_changed(offset, len) {
            self.stop_after = true;
        }
    }

    fn read_piece(&mut self, p: Piece, out: &mut [u8]) {
        match p.ram_offset {
            Some(offset) => self.ram.read_offset(offset, out),
            None => {
                for (i, b) in out.iter_mut().enumerate() {
                    *b = self.load_physical(p.gpa + i as u64);
                }
            }
        }
    }

    fn write_piece(&mut self, p: Piece, data: &[u8]) {
        match p.ram_offset {
            Some(offset) => {
                self.ram.write_offset(offset, data);
                self.stored(offset, data.len() as u64);
            }
            None => {
                for (i, b) in data.iter().enumerate() {
                    self.store_physical(p.gpa + i as u64, *b);
                }
            }
        }
    }

    /// Loads from a physical address inside one page: RAM, the APIC page, or the bus.
    pub(crate) fn load_physical<W: Word>(&mut self, gpa: u64) -> W {
        if !self.is_special_page(gpa)
            && let Some(offset) = self.ram.offset_of(gpa)
        {
            return self.ram.load(offset);
        }
        if W::BYTES == 16 {
            let mut bytes = [0; 16];
            bytes[..8].copy_from_slice(&self.load_mmio(gpa, 8).to_le_bytes());
            bytes[8..].copy_from_slice(&self.load_mmio(gpa + 8, 8).to_le_bytes());
            return from_bytes(&bytes);
        }
        W::from_u64(self.load_mmio(gpa, W::BYTES as u8))
    }

    pub(crate) fn store_physical<W: Word>(&mut self, gpa: u64, v: W) {
        if !self.is_special_page(gpa)
            && let Some(offset) = self.ram.offset_of(gpa)
        {
            self.ram.store(offset, v);
            self.stored(offset, W::BYTES);
            return;
        }
        let bytes = to_bytes(v);
        if W::BYTES == 16 {
            for half in 0..2 {
                let part: u64 = from_bytes(&bytes[half * 8..]);
                self.store_mmio(gpa + 8 * half as u64, 8, part);
            }
        } else {
            self.store_mmio(gpa, W::BYTES as u8, v.to_u64());
        }
    }

    fn load_mmio(&mut self, gpa: u64, size: u8) -> u64 {
        if self.is_special_page(gpa) {
            return self.apic_mmio_read(gpa, size);
        }
        self.bus.stand_at(self.retired);
        self.bus.mmio_read(gpa, size)
    }

    fn store_mmio(&mut self, gpa: u64, size: u8, v: u64) {
        if self.is_special_page(gpa) {
            return self.apic_mmio_write(gpa, size, v);
        }
        self.bus.stand_at(self.retired);
        if self.bus.mmio_write(gpa, size, v) == BusFlow::Stop {
            self.bus_stop = true;
        }
        // A device may have raised an interrupt, or asked to stop: look up after this instruction.
        self.stop_after = true;
    }

    /// A page of RAM addresses that is not RAM for this processor: its APIC page, moved there.
    pub(crate) fn is_special_page(&self, gpa: u64) -> bool {
        gpa & !0xfff == self.apic_page_gpa
    }

    /// Whether DR7 watches data on the page of `lin`.
    pub(crate) fn has_data_breakpoint(&self, lin: u64) -> bool {
        self.dr7 & 0xff != 0
            && (0..4).any(|n| {
                let enabled = self.dr7 >> (2 * n) & 3 != 0;
                let kind = self.dr7 >> (16 + 4 * n) & 3;
                enabled && kind != 0 && self.dr[n] & !0xfff == lin & !0xfff
            })
    }

    /// Records data breakpoints that an access hits; the trap comes after the instruction (SDM 3, "Data Breakpoints").
    fn note_data_breakpoint(&mut self, lin: u64, len: u64, write: bool) {
        if self.dr7 & 0xff == 0 {
            return;
        }
        for n in 0..4 {
            let kind = self.dr7 >> (16 + 4 * n) & 3;
            let watched = match self.dr7 >> (18 + 4 * n) & 3 {
                0 => 1u64,
                1 => 2,
                2 => 8,
                _ => 4,
            };
            let start = self.dr[n] & !(watched - 1);
            let overlaps = lin < start.wrapping_add(watched) && start < lin.wrapping_add(len);
            let matches = kind == 3 || kind == 1 && write;
            if self.dr7 >> (2 * n) & 3 != 0 && matches && overlaps {
                self.pending_debug |= 1 << n;
                self.stop_after = true;
            }
        }
    }
}

fn to_bytes<W: Word>(v: W) -> [u8; 16] {
    v.to_bytes16()
}

fn from_bytes<W: Word>(bytes: &[u8]) -> W {
    let mut all = [0u8; 16];
    let n = bytes.len().min(16);
    all[..n].copy_from_slice(&bytes[..n]);
    W::from_bytes16(all)
}
