//! SYSCALL, SYSRET, SYSENTER, SYSEXIT, SWAPGS, RDFSBASE and its like.

use crate::arch::is_canonical;
use crate::arch::segment::AccessRights;
use crate::cpu::decode::{Decoded, Selected};
use crate::cpu::flags;
use crate::cpu::op::{Handler, Op};
use crate::cpu::seg::{Segment, reg};
use crate::cpu::{Cpu, Flow, Stop, slot};
use crate::mem::Word;
use iced_x86::Mnemonic;

/// RFLAGS bits that SYSRET takes from R11.
const SYSRET_FLAGS: u64 = 0x3c_7fd7;

/// The flat segments that these instructions load without a descriptor.
fn flat(selector: u16, code: bool, long: bool, dpl: u8) -> Segment {
    let ar = AccessRights::new()
        .with_kind(if code { 0xb } else { 0x3 })
        .with_s(true)
        .with_p(true)
        .with_g(true)
        .with_dpl(dpl)
        .with_l(code && long)
        .with_db(!(code && long));
    Segment { selector, base: 0, limit: u32::MAX, ar }
}

impl Cpu {
    /// CS and SS at privilege `cpl`; SS's selector is 8 above `code`, CS's is `code`.
    fn load_flat(&mut self, code: u16, stack: u16, long: bool, cpl: u8) {
        self.set_segment(reg::CS, flat(code | u16::from(cpl), true, long, cpl));
        self.set_segment(reg::SS, flat(stack | u16::from(cpl), false, long, cpl));
        self.cpl = cpl;
    }
}

fn syscall(cpu: &mut Cpu, op: &Op) -> Flow {
    if !cpu.code64() || !cpu.efer.sce() {
        return Err(Stop::UD);
    }
    let next = cpu.next_rip(op);
    cpu.regs.set_r(slot::RCX, next);
    let old = cpu.flags.bits() & !flags::RF;
    cpu.regs.set_r(11, old);
    cpu.flags.set_bits(old & !cpu.msrs.fmask);
    let code = (cpu.msrs.star >> 32) as u16 & !3;
    cpu.load_flat(code, code.wrapping_add(8), true, 0);
    cpu.regs.set_rip(cpu.msrs.lstar);
    // Blocking by STI or MOV SS was for this instruction.
    (cpu.shadow, cpu.new_shadow) = (0, 0);
    cpu.mode_changed();
    // TF as SYSCALL leaves it decides whether it traps.
    let trap = cpu.flags.has(flags::TF);
    Err(if trap { Stop::JUMPED } else { Stop::DELIVERED })
}

/// `imm` is 1 with a 64-bit operand.
fn sysret(cpu: &mut Cpu, op: &Op) -> Flow {
    if !cpu.code64() || !cpu.efer.sce() {
        return Err(Stop::UD);
    }
    cpu.require_cpl0()?;
    let long = op.imm != 0;
    let rcx = cpu.regs.r(slot::RCX);
    let rip = if long { rcx } else { rcx & 0xffff_ffff };
    if !is_canonical(rip) {
        return Err(Stop::GP0);
    }
    cpu.flags.set_bits(cpu.regs.r(11) & SYSRET_FLAGS);
    let base = (cpu.msrs.star >> 48) as u16;
    let code = if long { base.wrapping_add(16) } else { base };
    cpu.load_flat(code, base.wrapping_add(8), long, 3);
    cpu.regs.set_rip(rip);
    cpu.mode_changed();
    Err(Stop::JUMPED)
}

fn sysenter(cpu: &mut Cpu, _: &Op) -> Flow {
    let code = cpu.msrs.sysenter_cs as u16 & !3;
    if !cpu.cr0.pe() || code == 0 {
        return Err(Stop::GP0);
    }
    let long = cpu.long_mode();
    let mask = if long { u64::MAX } else { 0xffff_ffff };
    cpu.flags.set(flags::VM, false);
    cpu.flags.set(flags::IF, false);
    cpu.load_flat(code, code.wrapping_add(8), long, 0);
    cpu.regs.set_r(slot::RSP, cpu.msrs.sysenter_esp & mask);
    cpu.regs.set_rip(cpu.msrs.sysenter_eip & mask);
    cpu.mode_changed();
    Err(Stop::JUMPED)
}

/// `imm` is 1 with a 64-bit operand.
fn sysexit(cpu: &mut Cpu, op: &Op) -> Flow {
    let base = cpu.msrs.sysenter_cs as u16 & !3;
    if !cpu.cr0.pe() || cpu.cpl != 0 || base == 0 {
        return Err(Stop::GP0);
    }
    let long = op.imm != 0;
    let mask = if long { u64::MAX } else { 0xffff_ffff };
    let (rsp, rip) = (cpu.regs.r(slot::RCX) & mask, cpu.regs.r(slot::RDX) & mask);
    if !is_canonical(rsp) || !is_canonical(rip) {
        return Err(Stop::GP0);
    }
    let code = base.wrapping_add(if long { 32 } else { 16 });
    cpu.load_flat(code, code.wrapping_add(8), long, 3);
    cpu.regs.set_r(slot::RSP, rsp);
    cpu.regs.set_rip(rip);
    cpu.mode_changed();
    Err(Stop::JUMPED)
}

fn swapgs(cpu: &mut Cpu, _: &Op) -> Flow {
    if !cpu.code64() {
        return Err(Stop::UD);
    }
    cpu.require_cpl0()?;
    let base = &mut cpu.seg[usize::from(reg::GS)].base;
    std::mem::swap(base, &mut cpu.msrs.kernel_gs_base);
    Ok(())
}

/// `src` is the segment register.
fn read_base<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    if !cpu.cr4.fsgsbase() {
        return Err(Stop::UD);
    }
    let base = cpu.segment(op.src).base;
    cpu.regs.put(op.dst, W::from_u64(base));
    Ok(())
}

fn write_base<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    if !cpu.cr4.fsgsbase() {
        return Err(Stop::UD);
    }
    let base = cpu.regs.get::<W>(op.dst).to_u64();
    if !is_canonical(base) {
        return Err(Stop::GP0);
    }
    cpu.seg[usize::from(op.src & 7)].base = base;
    Ok(())
}

pub(super) fn select(d: &mut Decoded) -> Selected {
    let m = d.i.mnemonic();
    d.op.src = match m {
        Mnemonic::Rdfsbase | Mnemonic::Wrfsbase => reg::FS,
        Mnemonic::Rdgsbase | Mnemonic::Wrgsbase => reg::GS,
        _ => d.op.src,
    };
    let long = matches!(m, Mnemonic::Sysretq | Mnemonic::Sysexitq);
    let handler: Handler = match m {
        Mnemonic::Syscall => syscall,
        Mnemonic::Sysret | Mnemonic::Sysretq => sysret,
        Mnemonic::Sysenter => sysenter,
        Mnemonic::Sysexit | Mnemonic::Sysexitq => sysexit,
        Mnemonic::Swapgs => swapgs,
        Mnemonic::Rdfsbase | Mnemonic::Rdgsbase => return sized!(d.width(0), read_base),
        Mnemonic::Wrfsbase | Mnemonic::Wrgsbase => return sized!(d.width(0), write_base),
        _ => return None,
    };
    if m != Mnemonic::Swapgs {
        d.op.imm = long.into();
    }
    Some(handler)
}
