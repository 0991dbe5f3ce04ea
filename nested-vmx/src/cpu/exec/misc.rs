//! Sign extension of the accumulator, single flags, XLAT, BOUND, fences, cache and other hints.

use crate::arch::exception::BR;
use crate::cpu::access::Use;
use crate::cpu::decode::{Decoded, Selected, by_width, hot, infallible, segment};
use crate::cpu::flags::{ARITHMETIC, CF, DF, OF};
use crate::cpu::mmu::Wanted;
use crate::cpu::op::{Handler, Op};
use crate::cpu::{Cpu, Flow, Stop, slot};
use crate::mem::Word;
use iced_x86::Mnemonic;

/// CBW, CWDE, CDQE: from the lower half of the accumulator to the whole.
#[inline(always)]
fn extend<D: Word, S: Word>(cpu: &mut Cpu, _: &Op) -> Flow {
    let v: S = cpu.regs.get(slot::RAX);
    cpu.regs.put(slot::RAX, D::from_u64(v.to_i64() as u64));
    Ok(())
}

/// CWD, CDQ, CQO: the accumulator's sign to all of RDX.
#[inline(always)]
fn sign<W: Word>(cpu: &mut Cpu, _: &Op) -> Flow {
    let v: W = cpu.regs.get(slot::RAX);
    cpu.regs.put(slot::RDX, W::from_u64((v.to_i64() >> 63) as u64));
    Ok(())
}

/// AH has SF, ZF, AF, PF, CF and the fixed bit 1, as RFLAGS has them.
fn lahf(cpu: &mut Cpu, _: &Op) -> Flow {
    let v = (cpu.flags.status() & !OF) as u8 | 2;
    cpu.regs.put(slot::RAX | crate::cpu::regs::HIGH_BYTE, v);
    Ok(())
}

fn sahf(cpu: &mut Cpu, _: &Op) -> Flow {
    let v: u8 = cpu.regs.get(slot::RAX | crate::cpu::regs::HIGH_BYTE);
    let keep = cpu.flags.status() & OF;
    cpu.flags.set_status(u64::from(v) & (ARITHMETIC & !OF) | keep);
    Ok(())
}

fn clc(cpu: &mut Cpu, _: &Op) -> Flow {
    cpu.flags.set_cf(false);
    Ok(())
}

fn stc(cpu: &mut Cpu, _: &Op) -> Flow {
    cpu.flags.set_cf(true);
    Ok(())
}

fn cmc(cpu: &mut Cpu, _: &Op) -> Flow {
    let cf = cpu.flags.cf();
    cpu.flags.set_cf(!cf);
    Ok(())
}

fn cld(cpu: &mut Cpu, _: &Op) -> Flow {
    cpu.flags.set(DF, false);
    Ok(())
}

fn std(cpu: &mut Cpu, _: &Op) -> Flow {
    cpu.flags.set(DF, true);
    Ok(())
}

fn salc(cpu: &mut Cpu, _: &Op) -> Flow {
    let v = if cpu.flags.status() & CF != 0 { 0xff } else { 0 };
    cpu.regs.put::<u8>(slot::RAX, v);
    Ok(())
}

fn xlat(cpu: &mut Cpu, op: &Op) -> Flow {
    let al: u8 = cpu.regs.get(slot::RAX);
    let ea = cpu.regs.r(slot::RBX).wrapping_add(al.into()) & op.address_mask();
    let lin = cpu.segmented(op.seg, ea, 1, Use::Read)?;
    let v: u8 = cpu.load(lin)?;
    cpu.regs.put(slot::RAX, v);
    Ok(())
}

/// The bounds are two signed words in memory.
fn bound<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let ea = cpu.effective_address(op);
    let lin = cpu.segmented(op.seg, ea, 2 * W::BYTES, Use::Read)?;
    let (lower, upper): (W, W) = (cpu.load(lin)?, cpu.load(lin.wrapping_add(W::BYTES))?);
    let index = cpu.regs.get::<W>(op.dst).to_i64();
    if index < lower.to_i64() || index > upper.to_i64() { Err(Stop::fault(BR)) } else { Ok(()) }
}

fn nop(_: &mut Cpu, _: &Op) -> Flow {
    Ok(())
}

/// Guest loads and stores are the host's, so a guest fence is a host fence.
fn fence(_: &mut Cpu, _: &Op) -> Flow {
    std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
    Ok(())
}

/// CLFLUSH and its kin: the rights of a load of one byte (SDM 2, "CLFLUSH"), and no effect, as RAM is coherent.
fn flush_line(cpu: &mut Cpu, op: &Op) -> Flow {
    let lin = cpu.linear(op, 1, Use::Read)?;
    if cpu.tlb.read(cpu.data_access, lin, 1).is_none() {
        let wanted = Wanted { write: false, fetch: false, access: cpu.data_access };
        cpu.translate(lin, wanted).map_err(|stop| stop.of_operand(op))?;
    }
    Ok(())
}

fn movnti<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let v: W = cpu.regs.get(op.src);
    cpu.store_operand(op, v)
}

pub(in crate::cpu) fn select(d: &mut Decoded) -> Selected {
    let handler: Handler = match d.i.mnemonic() {
        Mnemonic::Cbw => hot!(d, extend::<u16, u8>, infallible(extend::<u16, u8>)),
        Mnemonic::Cwde => hot!(d, extend::<u32, u16>, infallible(extend::<u32, u16>)),
        Mnemonic::Cdqe => hot!(d, extend::<u64, u32>, infallible(extend::<u64, u32>)),
        Mnemonic::Cwd => sign::<u16>,
        Mnemonic::Cdq => hot!(d, sign::<u32>, infallible(sign::<u32>)),
        Mnemonic::Cqo => hot!(d, sign::<u64>, infallible(sign::<u64>)),
        Mnemonic::Lahf => lahf,
        Mnemonic::Sahf => sahf,
        Mnemonic::Clc => clc,
        Mnemonic::Stc => stc,
        Mnemonic::Cmc => cmc,
        Mnemonic::Cld => cld,
        Mnemonic::Std => std,
        Mnemonic::Salc => salc,
        Mnemonic::Xlatb => {
            d.op.seg = segment(d.i.memory_segment());
            xlat
        }
        Mnemonic::Bound => return by_width!(d.width(0), bound),
        // x86 orders loads with loads and stores with stores already.
        Mnemonic::Lfence | Mnemonic::Sfence => nop,
        Mnemonic::Mfence => fence,
        Mnemonic::Prefetch
        | Mnemonic::Prefetchnta
        | Mnemonic::Prefetcht0
        | Mnemonic::Prefetcht1
        | Mnemonic::Prefetcht2
        | Mnemonic::Prefetchw
        | Mnemonic::Prefetchwt1 => nop,
        // Hint-space NOPs of a processor without CET or MPX (SDM 2, "NOP", "ENDBR64").
        Mnemonic::Reservednop
        | Mnemonic::Endbr32
        | Mnemonic::Endbr64
        | Mnemonic::Rdsspd
        | Mnemonic::Rdsspq
        | Mnemonic::Cldemote => nop,
        Mnemonic::Clflush | Mnemonic::Clflushopt | Mnemonic::Clwb => flush_line,
        Mnemonic::Movnti => return by_width!(d.width(1), movnti),
        _ => return None,
    };
    Some(handler)
}
