//! `run`: chained blocks until the budget, an event or the world says stop.

use super::block::{Block, BlockCache, BlockKey, CROSSES, Front, MAX_OPS, NO_PAGE};
use super::decode::{DecodeResult, decode};
use super::mmu::Wanted;
use super::mmu::tlb::Access;
use super::op::{Op, next};
use super::seg::reg;
use super::state::special;
use super::{Cpu, Stop, StopKind};
use crate::mailbox::attention;
use crate::mem::PAGE_SIZE;
use std::sync::Arc;

/// Why [`Cpu::run`] returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunExit {
    /// The budget is used up, to the instruction.
    Budget,
    /// HLT, shutdown or wait-for-SIPI with nothing to do before `deadline_tsc`, or before something is posted.
    Idle { deadline_tsc: Option<u64> },
    /// Someone asked for it ([`attention::STOP`]), or a device did.
    Stopped,
    /// Another processor wants to be alone: park, then run again.
    Exclusive,
}

/// What the boundary before an instruction says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Boundary {
    Run,
    Idle,
}

/// Bytes that an instruction has at most.
const MAX_LENGTH: u64 = 15;

impl Cpu {
    /// Runs at most `budget` instructions.
    pub fn run(&mut self, budget: u64) -> RunExit {
        let end = self.retired.saturating_add(budget);
        // Another processor may have decoded pages meanwhile.
        let epoch = self.ram.write_epoch();
        if epoch != self.write_epoch {
            self.write_epoch = epoch;
            self.tlb.revoke_all_writes();
        }
        let mut cache = self.cache.take().unwrap_or_default();
        let exit = self.run_until(&mut cache, end);
        self.cache = Some(cache);
        exit
    }

    fn run_until(&mut self, cache: &mut BlockCache, end: u64) -> RunExit {
        loop {
            let asked = self.mailbox.attention();
            if asked & attention::EXCLUSIVE != 0 {
                self.mailbox.answer(attention::EXCLUSIVE);
                return RunExit::Exclusive;
            }
            if asked & attention::STOP != 0 || self.bus_stop {
                self.mailbox.answer(attention::STOP);
                self.bus_stop = false;
                return RunExit::Stopped;
            }
            if self.retired >= end {
                return RunExit::Budget;
            }
            if self.check_events() == Boundary::Idle {
                return RunExit::Idle { deadline_tsc: self.next_deadline() };
            }
            let limit = match self.next_deadline() {
                Some(deadline) => {
                    let n = self.bus.instructions_until(self.retired, deadline).max(1);
                    end.min(self.retired.saturating_add(n))
                }
                None => end,
            };
            if self.special != 0 {
                let trapped = self.special & special::MTF != 0;
                self.step(cache);
                if trapped && self.in_non_root() {
                    self.vmx.mtf_pending = true;
                }
            } else {
                self.run_blocks(cache, limit);
            }
        }
    }

    /// Chained blocks, until one stops or something wants attention.
    fn run_blocks(&mut self, cache: &mut BlockCache, limit: u64) {
        loop {
            let Some(run) = self.next_block(cache) else { return };
            let ops = cache.ops(run.first, run.ops);
            let count = u64::from(run.count);
            if self.retired + count > limit {
                return self.run_part(ops, limit);
            }
            if let Err(stop) = next(self, ops) {
                let end = self.stopped_end;
                let n = ops.iter().position(|o| o.end == end).unwrap_or(0);
                return self.stopped(n, &ops[n], stop);
            }
            self.retired += count;
            if self.mailbox.attention() != 0 || self.retired >= limit {
                return;
            }
        }
    }

    /// The first instructions of a block, up to the limit. The last one, which may be a branch, is not among them.
    #[cold]
    fn run_part(&mut self, ops: &[Op], limit: u64) {
        let part = &ops[..(limit - self.retired) as usize];
        for (n, op) in part.iter().enumerate() {
            let result = (op.handler)(self, op);
            if let Err(stop) = result {
                return self.stopped(n, op, stop);
            }
            if self.stop_after {
                return self.stopped(n, op, Stop::COMPLETED);
            }
        }
        if let Some(last) = part.last() {
            self.advance(last);
        }
        self.retired = limit;
    }

    /// One instruction, with everything that single-stepping looks for.
    fn step(&mut self, cache: &mut BlockCache) {
        if self.instruction_breakpoint() {
            self.retired += 1;
            return;
        }
        let Some(run) = self.next_block(cache) else { return };
        let ops = cache.ops(run.first, run.ops);
        let op = &ops[0];
        let before = self.step_state();
        // An only operation is a branch, which has set RIP itself.
        let done = if ops.len() == 1 { Stop::JUMPED } else { Stop::COMPLETED };
        let stop = (op.handler)(self, op).err().unwrap_or(done);
        self.stopped(0, op, stop);
        if stop.kind() == StopKind::Again {
            self.iterated(before);
        }
        if matches!(stop.kind(), StopKind::Completed | StopKind::Jumped) {
            self.stepped(before);
        }
    }

    /// RIP to the instruction behind `op`, in its width.
    #[inline(always)]
    pub(super) fn advance(&mut self, op: &Op) {
        let rip = self.regs.rip().wrapping_add(op.end.into());
        self.regs.set_rip(rip & self.mode.rip_mask);
    }

    /// Operation `op`, the `n`th of its block, is the last that ran.
    fn stopped(&mut self, n: usize, op: &Op, stop: Stop) {
        self.stop_after = false;
        self.retired += n as u64;
        match stop.kind() {
            StopKind::Completed => {
                self.advance(op);
                self.retired += 1;
                self.end_shadow();
            }
            StopKind::Jumped => {
                self.retired += 1;
                self.end_shadow();
            }
            StopKind::Delivered => self.retired += 1,
            StopKind::Again => self.rewind(op),
            StopKind::Exception { vector, error } => {
                self.rewind(op);
                self.raise_exception(vector, error);
                // Counts as an instruction: a handler that faults at once must use up its budget too.
                self.retired += 1;
            }
            StopKind::VmExit => {
                self.rewind(op);
                self.vm_exit_of_instruction(op.len);
            }
        }
    }

    /// RIP to the start of `op`.
    pub(super) fn rewind(&mut self, op: &Op) {
        let rip = self.regs.rip().wrapping_add(op.start());
        self.regs.set_rip(rip & self.mode.rip_mask);
    }

    /// Blocking by STI or MOV SS lasts for one instruction.
    fn end_shadow(&mut self) {
        if self.shadow | self.new_shadow != 0 {
            self.shadow = std::mem::take(&mut self.new_shadow);
            self.mode_changed();
        }
    }

    /// The block at RIP; None when fetching it raised something.
    #[inline(always)]
    fn next_block(&mut self, cache: &mut BlockCache) -> Option<Front> {
        let rip = self.regs.rip();
        let lin = self.mode.cs_base.wrapping_add(rip);
        let tag = self.tlb.lookup_tag() << 3 | u64::from(self.mode.code()) << 1 | u64::from(self.cpl == 3);
        if let Some(&f) = cache.find(lin, tag)
            && self.ram.generation(f.page) == f.generation
            && (self.code64() || rip + u64::from(f.bytes) - 1 <= u64::from(self.seg[usize::from(reg::CS)].limit))
        {
            return Some(f);
        }
        match self.find_block(cache, lin, tag) {
            Ok(front) => Some(front),
            Err(stop) => {
                self.fetch_stopped(stop);
                None
            }
        }
    }

    #[inline(always)]
    fn fresh(&self, b: &Block) -> bool {
        self.ram.generation(b.pages[0]) == b.generations[0]
            && (b.pages[1] == NO_PAGE || self.ram.generation(b.pages[1]) == b.generations[1])
    }

    #[cold]
    #[inline(never)]
    fn find_block(&mut self, cache: &mut BlockCache, lin: u64, tag: u64) -> Result<Front, Stop> {
        // SDM 3, "Limit Checking": an instruction beyond the limit is #GP; how much of it is fetched decides decoding.
        let rip = self.regs.rip();
        let room = if self.code64() { u64::MAX } else { self.fetch_room(rip)? };
        let offset = self.fetch(lin)?;
        let page_end = (offset | (PAGE_SIZE - 1)) + 1;
        let available = (page_end - offset).min(room);
        let mut key = BlockKey { offset, second_page: NO_PAGE, mode: self.mode.code() };
        if room > PAGE_SIZE
            && let Some(index) = cache.get(&key).filter(|&i| self.fresh(cache.block(i)))
        {
            return Ok(cache.remember(lin, tag, index));
        }
        if room > PAGE_SIZE
            && let Some(index) = cache.get(&BlockKey { second_page: CROSSES, ..key })
            && self.fresh(cache.block(index))
        {
            let next = self.fetch(lin.wrapping_add(available))?;
            if cache.block(index).pages[1] == (next / PAGE_SIZE) as u32 {
                return Ok(cache.remember(lin, tag, index));
            }
        }
        self.claim_code_page(offset);
        let mut generations = [self.ram.generation((offset / PAGE_SIZE) as u32), 0];
        let mut bytes = vec![0; available as usize];
        self.ram.read_offset(offset, &mut bytes);
        let code = match decode(&bytes, self.mode, MAX_OPS) {
            DecodeResult::Block(code) => code,
            DecodeResult::NeedsMore if available >= MAX_LENGTH || available == room => return Err(Stop::GP0),
            DecodeResult::NeedsMore => {
                // The first instruction crosses into the next page.
                let next = self.fetch(lin.wrapping_add(available))?;
                self.claim_code_page(next);
                key.second_page = (next / PAGE_SIZE) as u32;
                generations[1] = self.ram.generation(key.second_page);
                let more = (MAX_LENGTH - available).min(room - available);
                let old = bytes.len();
                bytes.resize(old + more as usize, 0);
                self.ram.read_offset(next, &mut bytes[old..]);
                // The ones behind it belong to the other page's blocks.
                match decode(&bytes, self.mode, 1) {
                    DecodeResult::Block(code) => code,
                    DecodeResult::NeedsMore => return Err(Stop::GP0),
                }
            }
        };
        let block = Block {
            first: 0,
            count: code.count,
            ops: code.ops.len() as u16,
            bytes: code.bytes,
            pages: [(offset / PAGE_SIZE) as u32, key.second_page],
            generations,
        };
        let index = cache.insert(key, &code.ops, block);
        Ok(cache.remember(lin, tag, index))
    }

    /// The RAM offset of code. Code outside RAM reads as all ones, which is no instruction.
    fn fetch(&mut self, lin: u64) -> Result<u64, Stop> {
        let user = self.cpl == 3;
        let lin = if self.code64() { lin } else { lin & 0xffff_ffff };
        if let Some(offset) = self.tlb.fetch(user, lin) {
            return Ok(offset);
        }
        let access = if user { Access::User } else { Access::Supervisor };
        let t = self.translate(lin, Wanted { write: false, fetch: true, access })?;
        t.ram_offset.ok_or(Stop::UD)
    }

    /// Bytes between RIP and the code segment's limit.
    fn fetch_room(&self, rip: u64) -> Result<u64, Stop> {
        let limit = u64::from(self.seg[usize::from(reg::CS)].limit);
        if rip > limit { Err(Stop::GP0) } else { Ok(limit - rip + 1) }
    }

    /// From now on stores to the page are noticed. Processors that may store to it unnoticed are stopped first.
    fn claim_code_page(&mut self, offset: u64) {
        if self.ram.mark_code(offset) {
            let ram = Arc::clone(&self.ram);
            self.bus.exclusive(&mut || ram.revoke_fast_writes());
            // While this one waited to be alone, others may have claimed other pages.
            let epoch = self.ram.write_epoch();
            if epoch == self.write_epoch + 1 {
                self.tlb.revoke_writes(offset & !(PAGE_SIZE - 1));
            } else {
                self.tlb.revoke_all_writes();
            }
            self.write_epoch = epoch;
            // A third processor found the page marked and may have decoded it before the writes to it were noticed.
            self.ram.code_changed(offset, 1);
        }
    }

    fn fetch_stopped(&mut self, stop: Stop) {
        match stop.kind() {
            StopKind::Exception { vector, error } => {
                self.raise_exception(vector, error);
                self.retired += 1;
            }
            _ => self.vm_exit_of_instruction(0),
        }
    }
}
