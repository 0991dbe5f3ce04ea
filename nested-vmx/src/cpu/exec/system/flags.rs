//! CLI, STI, PUSHF, POPF, and CLAC and STAC.

use super::segment::stack_bits;
use crate::cpu::decode::{Decoded, Selected};
use crate::cpu::flags::{self, ARITHMETIC};
use crate::cpu::op::Op;
use crate::cpu::state::shadow;
use crate::cpu::{Cpu, Flow, Stop};
use crate::mem::Word;
use iced_x86::Mnemonic;

impl Cpu {
    /// CLI, STI and the ports need CPL <= IOPL; virtual-8086 mode runs at 3.
    #[inline(always)]
    pub(super) fn io_privileged(&self) -> bool {
        self.cpl <= self.iopl()
    }
}

fn cli(cpu: &mut Cpu, _: &Op) -> Flow {
    if !cpu.io_privileged() {
        return Err(Stop::GP0);
    }
    cpu.flags.set(flags::IF, false);
    Ok(())
}

fn sti(cpu: &mut Cpu, _: &Op) -> Flow {
    if !cpu.io_privileged() {
        return Err(Stop::GP0);
    }
    if cpu.flags.has(flags::IF) {
        return Ok(());
    }
    cpu.flags.set(flags::IF, true);
    cpu.new_shadow = shadow::STI;
    Err(Stop::COMPLETED)
}

fn pushf<W: Word>(cpu: &mut Cpu, _: &Op) -> Flow {
    if cpu.virtual_8086() && cpu.iopl() < 3 {
        return Err(Stop::GP0);
    }
    let v = cpu.flags.bits() & !(flags::RF | flags::VM);
    cpu.push(W::from_u64(v))
}

fn popf<W: Word>(cpu: &mut Cpu, _: &Op) -> Flow {
    if cpu.virtual_8086() && cpu.iopl() < 3 {
        return Err(Stop::GP0);
    }
    let value = cpu.peek_stack::<W>(0)?.to_u64();
    let mut mask = ARITHMETIC | flags::TF | flags::DF | flags::NT;
    if W::BYTES > 2 {
        mask |= flags::AC | flags::ID;
    }
    if cpu.io_privileged() {
        mask |= flags::IF;
    }
    if cpu.cpl == 0 {
        mask |= flags::IOPL;
    }
    cpu.add_rsp(W::BYTES);
    let before = cpu.flags.bits();
    cpu.write_flags(value, mask);
    let changed = before ^ cpu.flags.bits();
    if changed & (flags::TF | flags::AC | flags::IF) == 0 {
        return Ok(());
    }
    cpu.mode_changed();
    Err(Stop::COMPLETED)
}

fn ac<const ON: bool>(cpu: &mut Cpu, _: &Op) -> Flow {
    if cpu.cpl != 0 {
        return Err(Stop::UD);
    }
    cpu.flags.set(flags::AC, ON);
    cpu.mode_changed();
    Ok(())
}

pub(super) fn select(d: &mut Decoded) -> Selected {
    match d.i.mnemonic() {
        Mnemonic::Cli => Some(cli),
        Mnemonic::Sti => {
            d.ends = true;
            Some(sti)
        }
        Mnemonic::Pushf | Mnemonic::Pushfd | Mnemonic::Pushfq => sized!(stack_bits(d), pushf),
        Mnemonic::Popf | Mnemonic::Popfd | Mnemonic::Popfq => {
            d.ends = true;
            sized!(stack_bits(d), popf)
        }
        Mnemonic::Clac => Some(ac::<false>),
        Mnemonic::Stac => Some(ac::<true>),
        _ => None,
    }
}
