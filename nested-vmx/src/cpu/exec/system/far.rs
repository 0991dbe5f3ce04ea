//! Far JMP, CALL and RET (SDM 2; SDM 3, "Protection").

use crate::arch::descriptor::{Descriptor, Selector};
use crate::arch::is_canonical;
use crate::cpu::decode::{Decoded, Selected};
use crate::cpu::op::Op;
use crate::cpu::seg::{Segment, reg};
use crate::cpu::segload::Found;
use crate::cpu::{Cpu, Flow, Stop, slot};
use crate::mem::Word;
use iced_x86::Mnemonic;

impl Cpu {
    /// RIP in the code segment that is about to be loaded.
    pub(super) fn check_new_rip(&self, d: &Descriptor, rip: u64) -> Flow {
        let inside = if self.long_mode() && d.ar().l() { is_canonical(rip) } else { rip <= u64::from(d.limit()) };
        if inside { Ok(()) } else { Err(Stop::GP0) }
    }

    /// CS.L and CS.D both set is no mode.
    pub(super) fn impossible_code(&self, d: &Descriptor) -> bool {
        self.long_mode() && d.ar().l() && d.ar().db()
    }

    /// The code segment that a far JMP or CALL names directly, without change of privilege.
    fn direct_target(&self, selector: Selector, d: &Descriptor) -> Flow {
        let error = selector.error();
        let allowed = if d.is_conforming_code() {
            d.dpl() <= self.cpl
        } else {
            selector.rpl() <= self.cpl && d.dpl() == self.cpl
        };
        if !allowed || self.impossible_code(d) {
            return Err(Stop::gp(error));
        }
        if !d.p() {
            return Err(Stop::np(error));
        }
        Ok(())
    }

    fn far_transfer<W: Word>(&mut self, op: &Op, selector: u16, offset: u64, call: bool) -> Flow {
        let next = self.next_rip(op);
        let old_cs = u64::from(self.segment(reg::CS).selector);
        let mut frame = self.current_frame();
        if !self.protected() {
            let cs = self.real_segment(reg::CS, selector);
            if offset > u64::from(cs.limit) {
                return Err(Stop::GP0);
            }
            if call {
                self.push_to(&mut frame, W::BITS, old_cs)?;
                self.push_to(&mut frame, W::BITS, next)?;
                self.use_frame(&frame);
            }
            return self.jump_far(cs, offset);
        }
        let selector = Selector(selector);
        if selector.is_null() {
            return Err(Stop::GP0);
        }
        let mut target = self.find_descriptor(selector, Stop::gp)?;
        if !target.descriptor.s() {
            return self.far_system(op, selector, target, call);
        }
        if !target.descriptor.is_code() {
            return Err(Stop::gp(selector.error()));
        }
        self.direct_target(selector, &target.descriptor)?;
        if call {
            self.push_to(&mut frame, W::BITS, old_cs)?;
            self.push_to(&mut frame, W::BITS, next)?;
        }
        self.check_new_rip(&target.descriptor, offset)?;
        let cs = self.code_segment(selector, &mut target, self.cpl)?;
        self.use_frame(&frame);
        self.jump_far(cs, offset)
    }

    /// The last step: nothing can fault any more.
    pub(super) fn jump_far(&mut self, cs: Segment, rip: u64) -> Flow {
        self.set_segment(reg::CS, cs);
        self.regs.set_rip(rip);
        self.mode_changed();
        Err(Stop::JUMPED)
    }

    /// Reads `bits` (16, 32 or 64) from the stack, `above` bytes above its top.
    pub(super) fn peek_wide(&mut self, bits: u32, above: u64) -> Result<u64, Stop> {
        match bits {
            16 => self.peek_stack::<u16>(above).map(u64::from),
            32 => self.peek_stack::<u32>(above).map(u64::from),
            _ => self.peek_stack::<u64>(above),
        }
    }

    /// The code segment that a far RET or IRET goes back to.
    pub(super) fn return_target(&mut self, selector: Selector) -> Result<Found, Stop> {
        if selector.is_null() {
            return Err(Stop::GP0);
        }
        let target = self.find_descriptor(selector, Stop::gp)?;
        let (d, rpl) = (&target.descriptor, selector.rpl());
        let privilege = if d.is_conforming_code() { d.dpl() <= rpl } else { d.dpl() == rpl };
        if !d.is_code() || rpl < self.cpl || !privilege || self.impossible_code(d) {
            return Err(Stop::gp(selector.error()));
        }
        if !d.p() {
            return Err(Stop::np(selector.error()));
        }
        Ok(target)
    }

    /// The stack segment that goes with it.
    pub(super) fn return_stack(&mut self, selector: Selector, target: &Descriptor, rpl: u8) -> Result<Segment, Stop> {
        if selector.is_null() && self.long_mode() && target.ar().l() && rpl != 3 && selector.rpl() == rpl {
            return Ok(Segment::null(selector.0, rpl));
        }
        if selector.is_null() {
            return Err(Stop::GP0);
        }
        self.checked_stack_segment(selector, rpl, Stop::gp)
    }

    /// Loads RSP in the width that the new code and stack segment give it.
    pub(super) fn load_stack_pointer(&mut self, ss: &Segment, cs: &Segment, rsp: u64) {
        let old = self.regs.r(slot::RSP);
        let rsp = match () {
            _ if self.long_mode() && cs.ar.l() => rsp,
            _ if ss.ar.db() => rsp & 0xffff_ffff,
            _ => old & !0xffff | rsp & 0xffff,
        };
        self.regs.set_r(slot::RSP, rsp);
    }
}

/// `imm` is the offset, `disp` the selector.
fn direct<W: Word, const CALL: bool>(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.far_transfer::<W>(op, op.disp as u16, op.imm, CALL)
}

fn indirect<W: Word, const CALL: bool>(cpu: &mut Cpu, op: &Op) -> Flow {
    let (offset, selector) = cpu.far_pointer::<W>(op)?;
    cpu.far_transfer::<W>(op, selector, offset, CALL)
}

/// `imm` is what is popped besides the return address.
fn ret<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let rip = cpu.peek_wide(W::BITS, 0)?;
    let selector = cpu.peek_wide(W::BITS, W::BYTES)? as u16;
    let popped = 2 * W::BYTES + op.imm;
    if !cpu.protected() {
        let cs = cpu.real_segment(reg::CS, selector);
        if rip > u64::from(cs.limit) {
            return Err(Stop::GP0);
        }
        cpu.add_rsp(popped);
        return cpu.jump_far(cs, rip);
    }
    let selector = Selector(selector);
    let mut target = cpu.return_target(selector)?;
    if selector.rpl() == cpu.cpl {
        cpu.check_new_rip(&target.descriptor, rip)?;
        let cs = cpu.code_segment(selector, &mut target, cpu.cpl)?;
        cpu.add_rsp(popped);
        return cpu.jump_far(cs, rip);
    }
    let rsp = cpu.peek_wide(W::BITS, popped)?;
    let ss = Selector(cpu.peek_wide(W::BITS, popped + W::BYTES)? as u16);
    let ss = cpu.return_stack(ss, &target.descriptor, selector.rpl())?;
    cpu.check_new_rip(&target.descriptor, rip)?;
    let cs = cpu.code_segment(selector, &mut target, selector.rpl())?;
    cpu.cpl = selector.rpl();
    cpu.load_stack_pointer(&ss, &cs, rsp.wrapping_add(op.imm));
    cpu.set_segment(reg::SS, ss);
    cpu.drop_privileged_segments();
    cpu.jump_far(cs, rip)
}

macro_rules! far {
    ($bits:expr, $f:ident, $call:literal) => {
        Some(match $bits {
            16 => $f::<u16, $call> as $crate::cpu::op::Handler,
            32 => $f::<u32, $call>,
            _ => $f::<u64, $call>,
        })
    };
}

pub(super) fn select(d: &mut Decoded) -> Selected {
    let (i, bits) = (d.i, d.operand_bits);
    if i.is_jmp_far() || i.is_call_far() {
        d.op.disp = i.far_branch_selector().into();
        d.op.imm = if bits == 16 { i.far_branch16().into() } else { i.far_branch32().into() };
    }
    match i.mnemonic() {
        Mnemonic::Jmp if i.is_jmp_far() => far!(bits, direct, false),
        Mnemonic::Call if i.is_call_far() => far!(bits, direct, true),
        Mnemonic::Jmp if i.is_jmp_far_indirect() => far!(bits, indirect, false),
        Mnemonic::Call if i.is_call_far_indirect() => far!(bits, indirect, true),
        Mnemonic::Retf => sized!(bits, ret),
        _ => None,
    }
}
