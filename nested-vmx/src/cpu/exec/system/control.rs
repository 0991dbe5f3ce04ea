//! MOV to and from control and debug registers, CLTS, LMSW, SMSW.

use crate::arch::cr::dr;
use crate::arch::exception;
use crate::cpu::decode::{Decoded, Selected, gpr};
use crate::cpu::op::Op;
use crate::cpu::{Cpu, Flow, Stop};
use crate::mem::Word;
use iced_x86::{Mnemonic, OpKind};

impl Cpu {
    /// SMSW, SGDT, SIDT, SLDT and STR are not for user code when CR4.UMIP is set.
    pub(super) fn check_umip(&self) -> Flow {
        if self.cpl > 0 && self.cr4.umip() { Err(Stop::GP0) } else { Ok(()) }
    }

    /// Puts a control or debug register into a general one: 64 bits wide in 64-bit mode, else 32.
    fn put_wide(&mut self, gpr: u8, v: u64) {
        let v = if self.code64() { v } else { v & 0xffff_ffff };
        self.regs.set_r(gpr, v);
    }

    fn get_wide(&self, gpr: u8) -> u64 {
        let v = self.regs.r(gpr);
        if self.code64() { v } else { v & 0xffff_ffff }
    }
}

/// `src` is the control register.
fn from_cr(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.require_cpl0()?;
    let v = match op.src {
        0 => cpu.visible_cr0(),
        2 => cpu.cr2,
        3 => {
            cpu.intercept_cr3_store(op.dst)?;
            cpu.cr3
        }
        4 => cpu.visible_cr4(),
        _ => {
            cpu.intercept_cr8_store(op.dst)?;
            cpu.apic.cr8().into()
        }
    };
    cpu.put_wide(op.dst, v);
    Ok(())
}

/// `dst` is the control register.
fn to_cr(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.require_cpl0()?;
    let value = cpu.get_wide(op.src);
    match op.dst {
        0 => {
            let value = cpu.intercept_cr0_load(value, op.src)?;
            cpu.write_cr0(value)?;
        }
        2 => cpu.cr2 = value,
        3 => {
            cpu.intercept_cr3_load(value, op.src)?;
            cpu.write_cr3(value)?;
        }
        4 => {
            let value = cpu.intercept_cr4_load(value, op.src)?;
            cpu.write_cr4(value)?;
        }
        _ => {
            cpu.intercept_cr8_load(op.src)?;
            if value > 15 {
                return Err(Stop::GP0);
            }
            cpu.apic.set_cr8(value as u8);
        }
    }
    Err(Stop::COMPLETED)
}

fn clts(cpu: &mut Cpu, _: &Op) -> Flow {
    cpu.require_cpl0()?;
    if cpu.intercept_clts()? {
        cpu.write_cr0(cpu.cr0.with_ts(false).into_bits())?;
    }
    Err(Stop::COMPLETED)
}

/// PE, MP, EM and TS; PE can be set, not cleared.
fn load_machine_status(cpu: &mut Cpu, source: u16, lin: Option<u64>) -> Flow {
    let value = cpu.cr0.into_bits() & !0xe | u64::from(source) & 0xf;
    let value = cpu.intercept_lmsw(source, lin, value)?;
    cpu.write_cr0(value)?;
    Err(Stop::COMPLETED)
}

fn lmsw_r(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.require_cpl0()?;
    let value = cpu.regs.get(op.dst);
    load_machine_status(cpu, value, None)
}

fn lmsw_m(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.require_cpl0()?;
    let lin = cpu.linear(op, 2, crate::cpu::access::Use::Read)?;
    let value = cpu.load(lin)?;
    load_machine_status(cpu, value, Some(lin))
}

fn smsw_r<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.check_umip()?;
    cpu.regs.put(op.dst, W::from_u64(cpu.visible_cr0()));
    Ok(())
}

fn smsw_m(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.check_umip()?;
    cpu.store_operand(op, cpu.visible_cr0() as u16)
}

/// DR4 and DR5 are DR6 and DR7 unless CR4.DE makes them undefined.
fn debug_register(cpu: &Cpu, n: u8) -> Result<u8, Stop> {
    match n {
        4 | 5 if cpu.cr4.de() => Err(Stop::UD),
        4 | 5 => Ok(n + 2),
        n => Ok(n),
    }
}

/// The checks of both directions; VM exits come before general detect.
fn access_dr(cpu: &mut Cpu, n: u8, gpr: u8, write: bool) -> Result<u8, Stop> {
    let n = debug_register(cpu, n)?;
    cpu.require_cpl0()?;
    cpu.intercept_mov_dr(n, !write, gpr)?;
    if cpu.dr7 & dr::DR7_GD != 0 {
        // A fault: the single-step trap that a MOV SS before it held back is lost.
        cpu.pending_debug = cpu.pending_debug & !dr::DR6_BS | dr::DR6_BD;
        return Err(Stop::fault(exception::DB));
    }
    Ok(n)
}

fn from_dr(cpu: &mut Cpu, op: &Op) -> Flow {
    let n = access_dr(cpu, op.src, op.dst, false)?;
    let v = match n {
        6 => cpu.dr6,
        7 => cpu.dr7,
        n => cpu.dr[usize::from(n & 3)],
    };
    cpu.put_wide(op.dst, v);
    Ok(())
}

fn to_dr(cpu: &mut Cpu, op: &Op) -> Flow {
    let n = access_dr(cpu, op.dst, op.src, true)?;
    let value = cpu.get_wide(op.src);
    if n >= 6 && value >> 32 != 0 {
        return Err(Stop::GP0);
    }
    match n {
        6 => cpu.dr6 = value & 0xe00f | dr::DR6_RESET,
        7 => cpu.write_dr7(value),
        n => {
            cpu.dr[usize::from(n & 3)] = value;
            cpu.write_dr7(cpu.dr7);
        }
    }
    Err(Stop::COMPLETED)
}

pub(super) fn select(d: &mut Decoded) -> Selected {
    let register = |n: u32| {
        let r = d.i.op_register(n);
        (d.i.op_kind(n) == OpKind::Register && (r.is_cr() || r.is_dr())).then(|| (r.is_cr(), r.number() as u8))
    };
    let memory = d.i.op0_kind() == OpKind::Memory;
    match d.i.mnemonic() {
        Mnemonic::Mov => {
            if let Some((cr, n)) = register(1) {
                d.op.dst = gpr(d.i.op0_register());
                d.op.src = n;
                return choose(cr, n, from_cr, from_dr);
            }
            let (cr, n) = register(0)?;
            d.op.dst = n;
            d.op.src = gpr(d.i.op1_register());
            d.ends = true;
            choose(cr, n, to_cr, to_dr)
        }
        Mnemonic::Clts => {
            d.ends = true;
            Some(clts)
        }
        Mnemonic::Lmsw => {
            d.ends = true;
            Some(if memory { lmsw_m } else { lmsw_r })
        }
        Mnemonic::Smsw if memory => Some(smsw_m),
        Mnemonic::Smsw => sized!(d.operand_bits, smsw_r),
        _ => None,
    }
}

fn choose(cr: bool, n: u8, of_cr: crate::cpu::op::Handler, of_dr: crate::cpu::op::Handler) -> Selected {
    match (cr, n) {
        (true, 0 | 2 | 3 | 4 | 8) => Some(of_cr),
        (false, 0..=7) => Some(of_dr),
        _ => None,
    }
}
