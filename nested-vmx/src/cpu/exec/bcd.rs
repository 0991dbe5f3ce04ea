//! AAA, AAS, AAM, AAD, DAA, DAS: 16 and 32-bit code only. Flags that are undefined are as Intel's processors have them.

use crate::cpu::decode::{Decoded, Selected};
use crate::cpu::flags::{AF, CF};
use crate::cpu::op::{Handler, Op};
use crate::cpu::{Cpu, Flow, Stop, slot};
use iced_x86::Mnemonic;

impl Cpu {
    /// SF, ZF, PF by AL; AF and CF as given; OF 0.
    fn set_decimal_flags(&mut self, al: u8, af: bool, cf: bool) {
        self.flags.logic(al);
        let bits = self.flags.status() | if af { AF } else { 0 } | if cf { CF } else { 0 };
        self.flags.set_status(bits);
    }
}

/// AAA and AAS: `step` is what AX changes by when the low digit needs it.
fn adjust_ascii(cpu: &mut Cpu, step: impl Fn(u16) -> u16) -> Flow {
    let ax: u16 = cpu.regs.get(slot::RAX);
    let adjust = ax & 0xf > 9 || cpu.flags.af();
    let ax = if adjust { step(ax) } else { ax } & 0xff0f;
    cpu.regs.put(slot::RAX, ax);
    cpu.set_decimal_flags(ax as u8, adjust, adjust);
    Ok(())
}

fn aaa(cpu: &mut Cpu, _: &Op) -> Flow {
    adjust_ascii(cpu, |ax| ax.wrapping_add(0x106))
}

fn aas(cpu: &mut Cpu, _: &Op) -> Flow {
    adjust_ascii(cpu, |ax| ax.wrapping_sub(6).wrapping_sub(0x100))
}

/// DAA and DAS (SDM 2).
fn adjust_decimal(cpu: &mut Cpu, step: impl Fn(u8, u8) -> (u8, bool)) -> Flow {
    let (old, old_cf): (u8, bool) = (cpu.regs.get(slot::RAX), cpu.flags.cf());
    let (mut al, mut cf) = (old, false);
    let af = old & 0xf > 9 || cpu.flags.af();
    if af {
        let (v, carry) = step(al, 6);
        al = v;
        cf = old_cf || carry;
    }
    if old > 0x99 || old_cf {
        al = step(al, 0x60).0;
        cf = true;
    }
    cpu.regs.put(slot::RAX, al);
    cpu.set_decimal_flags(al, af, cf);
    Ok(())
}

fn daa(cpu: &mut Cpu, _: &Op) -> Flow {
    adjust_decimal(cpu, u8::overflowing_add)
}

fn das(cpu: &mut Cpu, _: &Op) -> Flow {
    adjust_decimal(cpu, u8::overflowing_sub)
}

fn aam(cpu: &mut Cpu, op: &Op) -> Flow {
    let (al, base): (u8, u8) = (cpu.regs.get(slot::RAX), op.imm as u8);
    if base == 0 {
        return Err(Stop::DE);
    }
    cpu.regs.put(slot::RAX, u16::from(al / base) << 8 | u16::from(al % base));
    cpu.set_decimal_flags(al % base, false, false);
    Ok(())
}

fn aad(cpu: &mut Cpu, op: &Op) -> Flow {
    let [al, ah] = cpu.regs.get::<u16>(slot::RAX).to_le_bytes();
    let tens = ah.wrapping_mul(op.imm as u8);
    let v = tens.wrapping_add(al);
    cpu.regs.put(slot::RAX, u16::from(v));
    cpu.flags.add(al, tens, v);
    Ok(())
}

pub(in crate::cpu) fn select(d: &mut Decoded) -> Selected {
    let handler: Handler = match d.i.mnemonic() {
        Mnemonic::Aaa => aaa,
        Mnemonic::Aas => aas,
        Mnemonic::Aam => aam,
        Mnemonic::Aad => aad,
        Mnemonic::Daa => daa,
        Mnemonic::Das => das,
        _ => return None,
    };
    Some(handler)
}
