//! x87 control: FINIT, FCLEX, the control and status words, environments and whole states, FFREE, WAIT; EMMS.

use super::state::status;
use crate::cpu::access::Use;
use crate::cpu::decode::{Decoded, Selected};
use crate::cpu::op::Op;
use crate::cpu::{Cpu, Flow, Stop, slot};
use iced_x86::Mnemonic as M;

/// The longest environment, and the longest state.
const ENVIRONMENT: usize = 28;
const STATE: usize = 108;

impl Cpu {
    /// FNSTENV's image of 14 or 28 bytes (SDM 1, "Saving the x87 FPU's State"). FCS and FDS are 0.
    fn environment(&self, len: usize) -> [u8; ENVIRONMENT] {
        let fp = &self.fp;
        let (ip, dp, fop) = (fp.instruction as u32, fp.data as u32, u32::from(fp.opcode));
        let words = [fp.control, fp.status, fp.tags()];
        let mut out = [0; ENVIRONMENT];
        if len == 14 {
            let (a, b) = if self.protected() { (0, 0) } else { (fop | ip >> 16 << 12, dp >> 16 << 12) };
            let rest = [ip as u16, a as u16, dp as u16, b as u16];
            for (n, w) in words.into_iter().chain(rest).enumerate() {
                out[2 * n..2 * n + 2].copy_from_slice(&w.to_le_bytes());
            }
        } else {
            let rest = if self.protected() {
                [ip, fop << 16, dp, 0xffff_0000]
            } else {
                [0xffff_0000 | ip & 0xffff, fop | ip >> 16 << 12, 0xffff_0000 | dp & 0xffff, dp >> 16 << 12]
            };
            // Reserved halves read all ones.
            for (n, w) in words.map(|w| 0xffff_0000 | u32::from(w)).into_iter().chain(rest).enumerate() {
                out[4 * n..4 * n + 4].copy_from_slice(&w.to_le_bytes());
            }
        }
        out
    }

    fn set_environment(&mut self, bytes: &[u8], len: usize) {
        let half = len / 7;
        let field = |n: usize| {
            let mut b = [0; 4];
            b[..half].copy_from_slice(&bytes[n * half..(n + 1) * half]);
            u32::from_le_bytes(b)
        };
        let real = !self.protected();
        let fp = &mut self.fp;
        let (mut ip, mut dp) = (field(3), field(5));
        let mut fop = if len == 14 { 0 } else { field(4) >> 16 };
        if real {
            fop = field(4);
            ip = ip & 0xffff | field(4) >> 12 << 16;
            dp = dp & 0xffff | field(6) >> 12 << 16;
        }
        fp.opcode = fop as u16 & 0x7ff;
        (fp.instruction, fp.data) = (ip.into(), dp.into());
        fp.set_tags(field(2) as u16);
        fp.status = field(1) as u16 & !status::SUMMARY;
        fp.set_control(field(0) as u16);
    }
}

fn fnstenv<const LEN: usize>(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.x87_available()?;
    let lin = cpu.linear(op, LEN as u64, Use::Write)?;
    cpu.probe(op, lin, LEN as u64, Use::Write)?;
    let bytes = cpu.environment(LEN);
    cpu.store_bytes(lin, &bytes[..LEN])?;
    // SDM 2: all exceptions are masked afterwards.
    let control = cpu.fp.control | status::EXCEPTIONS;
    cpu.fp.set_control(control);
    Ok(())
}

fn fldenv<const LEN: usize>(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.x87_ready()?;
    let lin = cpu.linear(op, LEN as u64, Use::Read)?;
    let mut bytes = [0; ENVIRONMENT];
    cpu.load_bytes(op, lin, &mut bytes[..LEN])?;
    cpu.set_environment(&bytes, LEN);
    Ok(())
}

/// `LEN` is that of the environment; eight registers of ten bytes follow.
fn fnsave<const LEN: usize>(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.x87_available()?;
    let all = LEN + 80;
    let lin = cpu.linear(op, all as u64, Use::Write)?;
    cpu.probe(op, lin, all as u64, Use::Write)?;
    let mut bytes = [0; STATE];
    bytes[..LEN].copy_from_slice(&cpu.environment(LEN)[..LEN]);
    for n in 0..8 {
        let at = LEN + 10 * n;
        bytes[at..at + 10].copy_from_slice(&cpu.fp.st(n).to_le_bytes()[..10]);
    }
    cpu.store_bytes(lin, &bytes[..all])?;
    cpu.fp.init_x87();
    Ok(())
}

fn frstor<const LEN: usize>(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.x87_ready()?;
    let all = LEN + 80;
    let lin = cpu.linear(op, all as u64, Use::Read)?;
    let mut bytes = [0; STATE];
    cpu.load_bytes(op, lin, &mut bytes[..all])?;
    cpu.set_environment(&bytes, LEN);
    for n in 0..8 {
        let mut register = [0; 16];
        register[..10].copy_from_slice(&bytes[LEN + 10 * n..LEN + 10 * n + 10]);
        cpu.fp.set_st(n, u128::from_le_bytes(register));
    }
    Ok(())
}

fn fninit(cpu: &mut Cpu, _: &Op) -> Flow {
    cpu.x87_available()?;
    cpu.fp.init_x87();
    Ok(())
}

fn fnclex(cpu: &mut Cpu, _: &Op) -> Flow {
    cpu.x87_available()?;
    let v = cpu.fp.status & !status::FLAGS;
    cpu.fp.set_status(v);
    Ok(())
}

fn fnstcw(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.x87_available()?;
    let v = cpu.fp.control;
    cpu.store_operand(op, v)
}

fn fldcw(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.x87_ready()?;
    let v: u16 = cpu.load_operand(op)?;
    cpu.fp.set_control(v);
    Ok(())
}

fn fnstsw(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.x87_available()?;
    let v = cpu.fp.status;
    cpu.store_operand(op, v)
}

fn fnstsw_ax(cpu: &mut Cpu, _: &Op) -> Flow {
    cpu.x87_available()?;
    let v = cpu.fp.status;
    cpu.regs.put(slot::RAX, v);
    Ok(())
}

/// FFREE; with `POP` FFREEP, which nobody documents and everybody has.
fn ffree<const POP: bool>(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.x87_ready()?;
    let fp = &mut cpu.fp;
    fp.status &= !status::C1;
    let top = fp.top();
    fp.full &= !(1 << ((top + usize::from(op.src)) & 7));
    if POP {
        fp.full &= !(1 << top);
        fp.set_top(top + 1);
    }
    cpu.fp.instruction = cpu.regs.rip().wrapping_add(op.start()) & cpu.mode.rip_mask;
    Ok(())
}

/// WAIT heeds CR0.TS only together with CR0.MP (SDM 3, "#NM"), and not CR0.EM.
fn wait(cpu: &mut Cpu, _: &Op) -> Flow {
    if cpu.cr0.mp() && cpu.cr0.ts() {
        return Err(Stop::NM);
    }
    if cpu.fp.pending() && cpu.cr0.ne() { Err(Stop::MF) } else { Ok(()) }
}

/// FENI, FDISI and FSETPM do nothing since the 80387.
fn nothing(cpu: &mut Cpu, _: &Op) -> Flow {
    cpu.x87_available()
}

fn emms(cpu: &mut Cpu, _: &Op) -> Flow {
    cpu.mmx_ready()?;
    cpu.fp.enter_mmx();
    cpu.fp.full = 0;
    Ok(())
}

pub(super) fn select(d: &mut Decoded) -> Selected {
    let to_register = d.i.op_count() == 1 && d.i.op0_register().is_gpr();
    let short = matches!(d.i.memory_size().size(), 14 | 94);
    let pick = |a, b| if short { a } else { b };
    Some(match d.i.mnemonic() {
        M::Wait => wait,
        M::Fninit => fninit,
        M::Fnclex => fnclex,
        M::Fnstcw => fnstcw,
        M::Fldcw => fldcw,
        M::Fnstsw if to_register => fnstsw_ax,
        M::Fnstsw => fnstsw,
        M::Fnstenv => pick(fnstenv::<14> as crate::cpu::op::Handler, fnstenv::<28>),
        M::Fldenv => pick(fldenv::<14>, fldenv::<28>),
        M::Fnsave => pick(fnsave::<14>, fnsave::<28>),
        M::Frstor => pick(frstor::<14>, frstor::<28>),
        M::Ffree | M::Ffreep => {
            d.op.src = d.i.op0_register().number() as u8;
            if d.i.mnemonic() == M::Ffree { ffree::<false> } else { ffree::<true> }
        }
        M::Fneni | M::Fndisi | M::Fnsetpm => nothing,
        M::Emms => emms,
        _ => return None,
    })
}
