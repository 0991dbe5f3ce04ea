//! A stack that is written to before it becomes the current one, if it ever does: far calls and event delivery.

use super::mmu::tlb::Access;
use super::seg::{Segment, reg};
use super::{Cpu, Stop, flags, slot};
use crate::arch::is_canonical;

#[derive(Clone, Copy, Debug)]
pub(crate) struct Frame {
    pub ss: Segment,
    pub rsp: u64,
    /// The stack pointer's width.
    bits: u8,
    access: Access,
    /// The error code of #SS when a push leaves the segment: the selector of a new stack, 0 for the current one.
    error: u32,
}

impl Cpu {
    /// How code of privilege `cpl` accesses its stack.
    fn stack_access(&self, cpl: u8) -> Access {
        match cpl {
            3 => Access::User,
            _ if self.flags.has(flags::AC) => Access::SupervisorAc,
            _ => Access::Supervisor,
        }
    }

    pub(crate) fn current_frame(&self) -> Frame {
        Frame {
            ss: *self.segment(reg::SS),
            rsp: self.regs.r(slot::RSP),
            bits: self.mode.stack_bits,
            access: self.data_access,
            error: 0,
        }
    }

    /// The stack of an inner privilege level outside 64-bit mode.
    pub(crate) fn inner_frame(&self, ss: Segment, esp: u64, cpl: u8) -> Frame {
        let bits = if ss.ar.db() { 32 } else { 16 };
        Frame { ss, rsp: esp, bits, access: self.stack_access(cpl), error: u32::from(ss.selector & !3) }
    }

    /// A stack of 64-bit code; it has no segment.
    pub(crate) fn long_frame(&self, ss: Segment, rsp: u64, cpl: u8) -> Frame {
        Frame { ss, rsp, bits: 64, access: self.stack_access(cpl), error: 0 }
    }

    /// Pushes `bits` (16, 32 or 64) of `v`.
    pub(crate) fn push_to(&mut self, f: &mut Frame, bits: u32, v: u64) -> Result<(), Stop> {
        let size = u64::from(bits / 8);
        let mask = match f.bits {
            16 => 0xffff,
            32 => 0xffff_ffff,
            _ => u64::MAX,
        };
        let new = f.rsp.wrapping_sub(size) & mask;
        let fault = Stop::ss(f.error);
        let lin = if f.bits == 64 {
            if !is_canonical(new) || !is_canonical(new.wrapping_add(size - 1)) {
                return Err(fault);
            }
            new
        } else {
            let usable = !self.cr0.pe() || self.virtual_8086() || (f.ss.ar.usable() && f.ss.ar.is_writable());
            if !usable || !f.ss.contains(new, size) {
                return Err(fault);
            }
            f.ss.base.wrapping_add(new) & 0xffff_ffff
        };
        match bits {
            16 => self.store_as(f.access, lin, v as u16)?,
            32 => self.store_as(f.access, lin, v as u32)?,
            _ => self.store_as(f.access, lin, v)?,
        }
        f.rsp = f.rsp & !mask | new;
        Ok(())
    }

    /// Makes it the current stack. The caller calls [`Cpu::mode_changed`].
    pub(crate) fn use_frame(&mut self, f: &Frame) {
        self.set_segment(reg::SS, f.ss);
        self.regs.set_r(slot::RSP, f.rsp);
    }
}
