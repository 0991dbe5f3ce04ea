//! Memory accesses of instructions: segmentation, then the TLB, then the slow path in [`super::mmu`].

use super::mmu::tlb::Access;
use super::op::{Op, op_flags};
use super::seg::reg;
use super::{Cpu, Stop};
use crate::mem::Word;

/// How an instruction uses memory, for the checks of segmentation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    Read,
    Write,
}

impl Cpu {
    /// The effective address of the memory operand, in the address size's width.
    #[inline(always)]
    pub(crate) fn effective_address(&self, op: &Op) -> u64 {
        let r = &self.regs;
        r.r(op.base).wrapping_add(r.r(op.index) << (op.scale & 3)).wrapping_add(op.disp as i64 as u64)
            & op.address_mask()
    }

    /// The linear address of the memory operand, checked for `size` bytes.
    #[inline(always)]
    pub(crate) fn linear(&self, op: &Op, size: u64, how: Use) -> Result<u64, Stop> {
        if op.has(op_flags::FLAT) {
            let r = &self.regs;
            // Canonicity is checked where the TLB misses: it never holds another address.
            return Ok(r.r(op.base).wrapping_add(r.r(op.index) << (op.scale & 3)).wrapping_add(op.disp as i64 as u64));
        }
        self.segmented(op.seg, self.effective_address(op), size, how)
    }

    /// The linear address of `offset` in a segment, checked (SDM 3, "Limit Checking", "Type Checking").
    pub(crate) fn segmented(&self, seg: u8, offset: u64, size: u64, how: Use) -> Result<u64, Stop> {
        let s = &self.seg[usize::from(seg & 7)];
        if self.code64() {
            // FS and GS only have a base; the others have neither base nor limit.
            return Ok(if seg >= reg::FS { s.base.wrapping_add(offset) } else { offset });
        }
        let fault = if seg == reg::SS { Stop::SS0 } else { Stop::GP0 };
        if self.protected() {
            let allowed = if how == Use::Read { s.ar.is_readable() } else { s.ar.is_writable() };
            if s.ar.unusable() || !s.ar.p() || !allowed {
                return Err(fault);
            }
        }
        if !s.contains(offset, size) {
            return Err(fault);
        }
        Ok(s.base.wrapping_add(offset) & 0xffff_ffff)
    }

    /// Loads from a linear address with the rights of the running code.
    #[inline(always)]
    pub(crate) fn load<W: Word>(&mut self, lin: u64) -> Result<W, Stop> {
        match self.tlb.read(self.data_access, lin, W::BYTES) {
            Some(offset) => Ok(self.ram.load(offset)),
            None => self.load_slow(lin, self.data_access),
        }
    }

    #[inline(always)]
    pub(crate) fn store<W: Word>(&mut self, lin: u64, v: W) -> Result<(), Stop> {
        match self.tlb.write(self.data_access, lin, W::BYTES) {
            Some(offset) => {
                self.ram.store(offset, v);
                Ok(())
            }
            None => self.store_slow(lin, self.data_access, v),
        }
    }

    /// Reads, computes, writes; a fault of the write comes before anything else happens. With `locked` the whole is
    /// atomic to all processors. Returns what was read; `f` may run more than once. `lin` is that of `op`'s memory operand.
    #[inline(always)]
    pub(crate) fn modify<W: Word>(&mut self, op: &Op, lin: u64, locked: bool, f: impl Fn(W) -> W) -> Result<W, Stop> {
        match self.tlb.write(self.data_access, lin, W::BYTES) {
            Some(offset) if !locked => {
                let old = self.ram.load(offset);
                self.ram.store(offset, f(old));
                Ok(old)
            }
            Some(offset) => Ok(self.modify_locked(offset, &f)),
            None => self.modify_slow(lin, self.data_access, locked, &f).map_err(|stop| stop.of_operand(op)),
        }
    }

    /// The memory operand's value.
    #[inline(always)]
    pub(crate) fn load_operand<W: Word>(&mut self, op: &Op) -> Result<W, Stop> {
        let lin = self.linear(op, W::BYTES, Use::Read)?;
        self.load(lin).map_err(|stop| stop.of_operand(op))
    }

    #[inline(always)]
    pub(crate) fn store_operand<W: Word>(&mut self, op: &Op, v: W) -> Result<(), Stop> {
        let lin = self.linear(op, W::BYTES, Use::Write)?;
        self.store(lin, v).map_err(|stop| stop.of_operand(op))
    }

    /// The memory operand's linear address where it is a plain sum: 64-bit mode, a segment without base.
    #[inline(always)]
    fn flat(&self, op: &Op) -> Option<u64> {
        let r = &self.regs;
        op.has(op_flags::FLAT)
            .then(|| r.r(op.base).wrapping_add(r.r(op.index) << (op.scale & 3)).wrapping_add(op.disp as i64 as u64))
    }

    /// The memory operand, if that takes no more than a TLB hit.
    #[inline(always)]
    pub(crate) fn fast_load<W: Word>(&self, op: &Op) -> Option<W> {
        let offset = self.tlb.read(self.data_access, self.flat(op)?, W::BYTES)?;
        Some(self.ram.load(offset))
    }

    /// Where the memory operand is in RAM, to read and write it, if that takes no more than a TLB hit.
    #[inline(always)]
    pub(crate) fn fast_place<W: Word>(&self, op: &Op) -> Option<u64> {
        self.tlb.write(self.data_access, self.flat(op)?, W::BYTES)
    }

    /// Pushes in 64-bit mode, if that takes no more than a TLB hit.
    #[inline(always)]
    pub(crate) fn fast_push<W: Word>(&mut self, v: W) -> bool {
        let rsp = self.regs.r(super::slot::RSP).wrapping_sub(W::BYTES);
        if !self.code64() {
            return false;
        }
        let Some(offset) = self.tlb.write(self.data_access, rsp, W::BYTES) else { return false };
        self.ram.store(offset, v);
        self.regs.set_r(super::slot::RSP, rsp);
        true
    }

    /// The top of the stack in 64-bit mode, if that takes no more than a TLB hit.
    #[inline(always)]
    pub(crate) fn fast_top<W: Word>(&self) -> Option<W> {
        let rsp = self.regs.r(super::slot::RSP);
        let offset = if self.code64() { self.tlb.read(self.data_access, rsp, W::BYTES)? } else { return None };
        Some(self.ram.load(offset))
    }

    /// Loads with the rights of `access` instead of the running code's.
    pub(crate) fn load_as<W: Word>(&mut self, access: Access, lin: u64) -> Result<W, Stop> {
        match self.tlb.read(access, lin, W::BYTES) {
            Some(offset) => Ok(self.ram.load(offset)),
            None => self.load_slow(lin, access),
        }
    }

    pub(crate) fn store_as<W: Word>(&mut self, access: Access, lin: u64, v: W) -> Result<(), Stop> {
        match self.tlb.write(access, lin, W::BYTES) {
            Some(offset) => {
                self.ram.store(offset, v);
                Ok(())
            }
            None => self.store_slow(lin, access, v),
        }
    }

    /// Implicit supervisor accesses: descriptor tables, TSS (SDM 3, "Access Rights").
    pub(crate) fn load_system<W: Word>(&mut self, lin: u64) -> Result<W, Stop> {
        self.load_as(Access::Supervisor, lin)
    }

    pub(crate) fn store_system<W: Word>(&mut self, lin: u64, v: W) -> Result<(), Stop> {
        self.store_as(Access::Supervisor, lin, v)
    }

    /// Sets bits with a locked access: accessed and busy flags of descriptors.
    pub(crate) fn set_bits_system(&mut self, lin: u64, bits: u64) -> Result<(), Stop> {
        self.modify_slow(lin, Access::Supervisor, true, &|v: u64| v | bits).map(|_| ())
    }

    pub(crate) fn clear_bits_system(&mut self, lin: u64, bits: u64) -> Result<(), Stop> {
        self.modify_slow(lin, Access::Supervisor, true, &|v: u64| v & !bits).map(|_| ())
    }

    /// Pushes with the stack's width of address; RSP changes only when the store succeeded.
    #[inline(always)]
    pub(crate) fn push<W: Word>(&mut self, v: W) -> Result<(), Stop> {
        let mask = self.mode.stack_mask();
        let rsp = self.regs.r(super::slot::RSP);
        let new = rsp.wrapping_sub(W::BYTES) & mask;
        let lin = self.stack_linear(new, W::BYTES, Use::Write)?;
        self.store(lin, v).map_err(Stop::on_stack)?;
        self.regs.set_r(super::slot::RSP, rsp & !mask | new);
        Ok(())
    }

    /// Reads the top of the stack; the caller advances RSP by [`Cpu::add_rsp`] when nothing can fault any more.
    #[inline(always)]
    pub(crate) fn peek_stack<W: Word>(&mut self, above: u64) -> Result<W, Stop> {
        let rsp = self.regs.r(super::slot::RSP).wrapping_add(above) & self.mode.stack_mask();
        let lin = self.stack_linear(rsp, W::BYTES, Use::Read)?;
        self.load(lin).map_err(Stop::on_stack)
    }

    #[inline(always)]
    pub(crate) fn add_rsp(&mut self, bytes: u64) {
        let mask = self.mode.stack_mask();
        let rsp = self.regs.r(super::slot::RSP);
        self.regs.set_r(super::slot::RSP, rsp & !mask | rsp.wrapping_add(bytes) & mask);
    }

    #[inline(always)]
    pub(crate) fn stack_linear(&self, offset: u64, size: u64, how: Use) -> Result<u64, Stop> {
        if self.code64() { Ok(offset) } else { self.segmented(reg::SS, offset, size, how) }
    }
}
