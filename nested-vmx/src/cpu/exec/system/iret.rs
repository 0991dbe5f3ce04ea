//! IRET (SDM 2, "IRET/IRETD/IRETQ").

use crate::arch::descriptor::Selector;
use crate::cpu::decode::{Decoded, Selected};
use crate::cpu::flags::{self, ARITHMETIC};
use crate::cpu::op::Op;
use crate::cpu::seg::{Segment, reg};
use crate::cpu::{Cpu, Flow, Stop, slot};
use crate::mem::Word;
use iced_x86::Mnemonic;

impl Cpu {
    /// Takes the bits of `mask` from `value`. The caller calls [`Cpu::mode_changed`].
    pub(super) fn write_flags(&mut self, value: u64, mask: u64) {
        let old = self.flags.bits();
        self.flags.set_bits(old & !mask | value & mask);
    }

    /// Flags that IRET takes from the stack at the current privilege.
    fn iret_flags(&self, bits: u32) -> u64 {
        let mut mask = ARITHMETIC | flags::TF | flags::DF | flags::NT;
        if bits > 16 {
            mask |= flags::RF | flags::AC | flags::ID;
        }
        if self.cpl <= self.iopl() {
            mask |= flags::IF;
        }
        if self.cpl == 0 {
            mask |= flags::IOPL;
            if bits > 16 {
                mask |= flags::VIF | flags::VIP;
            }
        }
        mask
    }
}

fn iret<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    // Even an IRET that faults ends blocking by NMI (SDM 3, "Handling Multiple NMIs").
    let blocked = cpu.nmi_blocking();
    cpu.unblock_nmi_by_iret();
    cpu.nmi_unblocked_by_iret = blocked && !cpu.nmi_blocking();
    let flow = if cpu.protected() { protected::<W>(cpu, op) } else { real::<W>(cpu) };
    if matches!(flow, Err(Stop::JUMPED | Stop::DELIVERED)) {
        cpu.nmi_unblocked_by_iret = false;
    }
    flow
}

/// Real mode, and virtual-8086 mode with IOPL 3.
fn real<W: Word>(cpu: &mut Cpu) -> Flow {
    if cpu.virtual_8086() && cpu.iopl() < 3 {
        return Err(Stop::GP0);
    }
    let rip = cpu.peek_wide(W::BITS, 0)?;
    let selector = cpu.peek_wide(W::BITS, W::BYTES)? as u16;
    let value = cpu.peek_wide(W::BITS, 2 * W::BYTES)?;
    let cs = cpu.real_segment(reg::CS, selector);
    if rip > u64::from(cs.limit) {
        return Err(Stop::GP0);
    }
    let mut mask = ARITHMETIC | flags::TF | flags::IF | flags::DF | flags::NT;
    if !cpu.virtual_8086() {
        mask |= flags::IOPL;
    }
    if W::BYTES > 2 {
        mask |= flags::RF | flags::AC | flags::ID;
    }
    cpu.add_rsp(3 * W::BYTES);
    cpu.write_flags(value, mask);
    cpu.jump_far(cs, rip)
}

fn protected<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    if cpu.flags.has(flags::NT) {
        return cpu.return_to_task(op);
    }
    let rip = cpu.peek_wide(W::BITS, 0)?;
    let selector = Selector(cpu.peek_wide(W::BITS, W::BYTES)? as u16);
    let value = cpu.peek_wide(W::BITS, 2 * W::BYTES)?;
    if value & flags::VM != 0 && W::BYTES == 4 && cpu.cpl == 0 && !cpu.long_mode() {
        return to_virtual_8086(cpu, rip, selector.0, value);
    }
    let mut target = cpu.return_target(selector)?;
    let mask = cpu.iret_flags(W::BITS);
    // 64-bit code always pops a stack pointer.
    if selector.rpl() == cpu.cpl && !cpu.code64() {
        cpu.check_new_rip(&target.descriptor, rip)?;
        let cs = cpu.code_segment(selector, &mut target, cpu.cpl)?;
        cpu.add_rsp(3 * W::BYTES);
        cpu.write_flags(value, mask);
        return cpu.jump_far(cs, rip);
    }
    let rsp = cpu.peek_wide(W::BITS, 3 * W::BYTES)?;
    let ss = Selector(cpu.peek_wide(W::BITS, 4 * W::BYTES)? as u16);
    let ss = cpu.return_stack(ss, &target.descriptor, selector.rpl())?;
    cpu.check_new_rip(&target.descriptor, rip)?;
    let cs = cpu.code_segment(selector, &mut target, selector.rpl())?;
    let outer = selector.rpl() > cpu.cpl;
    cpu.write_flags(value, mask);
    cpu.cpl = selector.rpl();
    cpu.load_stack_pointer(&ss, &cs, rsp);
    cpu.set_segment(reg::SS, ss);
    if outer {
        cpu.drop_privileged_segments();
    }
    cpu.jump_far(cs, rip)
}

fn to_virtual_8086(cpu: &mut Cpu, eip: u64, cs: u16, value: u64) -> Flow {
    if eip > 0xffff {
        return Err(Stop::GP0);
    }
    let esp = cpu.peek_wide(32, 12)?;
    let mut selectors = [0u16; 5];
    for (i, selector) in selectors.iter_mut().enumerate() {
        *selector = cpu.peek_wide(32, 16 + 4 * i as u64)? as u16;
    }
    for (n, selector) in [reg::SS, reg::ES, reg::DS, reg::FS, reg::GS].into_iter().zip(selectors) {
        cpu.set_segment(n, Segment::v8086(selector));
    }
    cpu.write_flags(value, u64::MAX);
    cpu.cpl = 3;
    cpu.regs.set_r(slot::RSP, esp);
    cpu.jump_far(Segment::v8086(cs), eip)
}

pub(super) fn select(d: &mut Decoded) -> Selected {
    match d.i.mnemonic() {
        Mnemonic::Iret | Mnemonic::Iretd | Mnemonic::Iretq => sized!(d.operand_bits, iret),
        _ => None,
    }
}
