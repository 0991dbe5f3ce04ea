//! Moves between XMM, MMX and general registers and memory.

use super::form;
use crate::arch::is_canonical;
use crate::cpu::access::Use;
use crate::cpu::decode::{Decoded, Selected};
use crate::cpu::op::{Op, op_flags};
use crate::cpu::seg::reg;
use crate::cpu::{Cpu, Flow, Stop, slot};
use iced_x86::{Mnemonic as M, OpKind};

const LOW32: u128 = 0xffff_ffff;
const LOW64: u128 = u64::MAX as u128;

/// Handlers whose destination is an XMM register: a function of its old value, the source and the immediate.
macro_rules! to_xmm {
    ($($name:ident($a:ident, $b:ident, $imm:ident) => $value:expr;)*) => {
        $(pub(super) fn $name(cpu: &mut Cpu, op: &Op) -> Flow {
            cpu.sse_ready()?;
            let ($b, $imm) = (cpu.vector_source(op)?, op.imm8());
            let d = &mut cpu.fp.xmm[usize::from(op.dst & 15)];
            let $a = *d;
            let _ = ($a, $imm);
            *d = $value;
            Ok(())
        })*
    };
}
pub(super) use to_xmm;

/// Handlers whose destination is a general register or memory: a function of the XMM source and the immediate.
macro_rules! from_xmm {
    ($($name:ident($v:ident, $imm:ident) => $value:expr;)*) => {
        $(fn $name(cpu: &mut Cpu, op: &Op) -> Flow {
            cpu.sse_ready()?;
            let ($v, $imm) = (cpu.fp.xmm[usize::from(op.src & 15)], op.imm8());
            let _ = $imm;
            cpu.put_general(op, $value)
        })*
    };
}

fn insert(a: u128, v: u128, lane: u8, bits: u32) -> u128 {
    let shift = u32::from(lane) % (128 / bits) * bits;
    let mask = u128::MAX >> (128 - bits) << shift;
    a & !mask | v << shift & mask
}

fn extract(v: u128, lane: u8, bits: u32) -> u64 {
    let shift = u32::from(lane) % (128 / bits) * bits;
    (v >> shift & (u128::MAX >> (128 - bits))) as u64
}

/// The sign bits of the elements.
fn signs(v: u128, bits: u32) -> u64 {
    (0..128 / bits).fold(0, |m, n| m | ((v >> (bits * n + bits - 1) & 1) as u64) << n)
}

fn byte_signs(v: u128) -> u64 {
    // SAFETY: SSE2 is part of x86-64.
    unsafe { std::arch::x86_64::_mm_movemask_epi8(super::vector::to_host(v)) as u32 as u64 }
}

to_xmm! {
    whole(_a, b, _i) => b;
    low64(_a, b, _i) => b & LOW64;
    merge32(a, b, _i) => a & !LOW32 | b & LOW32;
    merge64(a, b, _i) => a & !LOW64 | b & LOW64;
    to_high(a, b, _i) => a & LOW64 | b << 64;
    high_to_low(a, b, _i) => a & !LOW64 | b >> 64;
    twice(_a, b, _i) => b & LOW64 | b << 64;
    insert8(a, b, i) => insert(a, b, i, 8);
    insert16(a, b, i) => insert(a, b, i, 16);
    insert32(a, b, i) => insert(a, b, i, 32);
    insert64(a, b, i) => insert(a, b, i, 64);
}

from_xmm! {
    get32(v, _i) => v as u32 as u64;
    get64(v, _i) => v as u64;
    get_high(v, _i) => (v >> 64) as u64;
    mask_ps(v, _i) => signs(v, 32);
    mask_pd(v, _i) => signs(v, 64);
    mask_b(v, _i) => byte_signs(v);
    extract8(v, i) => extract(v, i, 8);
    extract16(v, i) => extract(v, i, 16);
    extract32(v, i) => extract(v, i, 32);
    extract64(v, i) => extract(v, i, 64);
}

fn store128(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.sse_ready()?;
    let v = cpu.fp.xmm[usize::from(op.src & 15)];
    cpu.store_vector(op, v)
}

impl Cpu {
    /// Writes a general register, zero-extended, or memory in its width.
    fn put_general(&mut self, op: &Op, v: u64) -> Flow {
        if op.kind() != form::MEMORY {
            self.regs.set_r(op.dst, v);
            return Ok(());
        }
        match op.imm >> form::SIZE_SHIFT & 15 {
            0 => self.store_operand(op, v as u8),
            1 => self.store_operand(op, v as u16),
            2 => self.store_operand(op, v as u32),
            _ => self.store_operand(op, v),
        }
    }

    /// What instructions on both MMX and XMM registers need.
    pub(super) fn mixed_ready(&self) -> Flow {
        self.sse_ready()?;
        self.mmx_ready()
    }

    /// MASKMOVQ and MASKMOVDQU: stores the bytes whose mask byte is negative, all or none.
    fn store_masked(&mut self, op: &Op, v: u128, mask: u128, len: u64) -> Flow {
        let at = |cpu: &Cpu, n: u64| {
            if op.has(op_flags::FLAT) {
                Ok(cpu.linear(op, 1, Use::Write)?.wrapping_add(n))
            } else {
                let ea = cpu.effective_address(op).wrapping_add(n) & op.address_mask();
                cpu.segmented(op.seg, ea, 1, Use::Write)
            }
        };
        // An empty mask still needs a canonical address, as on Intel's processors.
        let first = at(self, 0)?;
        if self.code64() && !is_canonical(first) {
            return Err(Stop::GP0.of_operand(op));
        }
        let chosen = |n: &u64| mask >> (8 * n + 7) & 1 != 0;
        for n in (0..len).filter(chosen) {
            let lin = at(self, n)?;
            self.probe(op, lin, 1, Use::Write)?;
        }
        for n in (0..len).filter(chosen) {
            let lin: u64 = at(self, n)?;
            self.store(lin, (v >> (8 * n)) as u8)?;
        }
        Ok(())
    }
}

fn maskmovdqu(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.sse_ready()?;
    let [v, mask] = [op.dst, op.src].map(|n| cpu.fp.xmm[usize::from(n & 15)]);
    cpu.store_masked(op, v, mask, 16)
}

fn maskmovq(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.mmx_ready()?;
    let [v, mask] = [op.dst, op.src].map(|n| u128::from(cpu.fp.mm(n)));
    cpu.store_masked(op, v, mask, 8)?;
    cpu.fp.enter_mmx();
    Ok(())
}

/// The implicit operand DS:rDI; the registers are operands 1 and 2.
fn masked(d: &mut Decoded) {
    d.op.base = slot::RDI;
    d.op.seg = crate::cpu::decode::segment(d.i.memory_segment());
    if d.mode.code_bits == 64 && d.address_bits == 64 && d.op.seg < reg::FS {
        d.op.flags |= op_flags::FLAT;
    }
}

pub(super) fn select_xmm(d: &mut Decoded) -> Selected {
    if d.i.op_kind(0) == OpKind::Memory {
        return Some(match d.i.mnemonic() {
            M::Movaps | M::Movapd | M::Movdqa | M::Movups | M::Movupd | M::Movdqu => store128,
            M::Movntps | M::Movntpd | M::Movntdq => store128,
            M::Movss | M::Movd => get32,
            M::Movsd | M::Movq | M::Movlps | M::Movlpd => get64,
            M::Movhps | M::Movhpd => get_high,
            M::Pextrb => extract8,
            M::Pextrw => extract16,
            M::Pextrd | M::Extractps => extract32,
            M::Pextrq => extract64,
            _ => return None,
        });
    }
    if d.i.mnemonic() == M::Maskmovdqu {
        masked(d);
        return Some(maskmovdqu);
    }
    if !d.i.op0_register().is_xmm() {
        return Some(match d.i.mnemonic() {
            M::Movd => get32,
            M::Movq => get64,
            M::Movmskps => mask_ps,
            M::Movmskpd => mask_pd,
            M::Pmovmskb => mask_b,
            M::Pextrb => extract8,
            M::Pextrw => extract16,
            M::Pextrd | M::Extractps => extract32,
            M::Pextrq => extract64,
            _ => return None,
        });
    }
    let from_memory = d.i.op1_kind() == OpKind::Memory;
    Some(match d.i.mnemonic() {
        M::Movaps | M::Movapd | M::Movdqa | M::Movups | M::Movupd | M::Movdqu => whole,
        M::Lddqu | M::Movntdqa | M::Movd => whole,
        M::Movss | M::Movsd if from_memory => whole,
        M::Movss => merge32,
        M::Movsd => merge64,
        M::Movq => low64,
        M::Movlps | M::Movlpd => merge64,
        M::Movhps | M::Movhpd | M::Movlhps => to_high,
        M::Movhlps => high_to_low,
        M::Movddup => twice,
        M::Pinsrb => insert8,
        M::Pinsrw => insert16,
        M::Pinsrd => insert32,
        M::Pinsrq => insert64,
        _ => return None,
    })
}

/// Handlers whose destination is an MMX register.
macro_rules! to_mm {
    ($($name:ident($a:ident, $b:ident, $imm:ident) => $value:expr;)*) => {
        $(pub(super) fn $name(cpu: &mut Cpu, op: &Op) -> Flow {
            cpu.mmx_ready()?;
            let ($b, $imm) = (cpu.other_source(op)? as u64, op.imm8());
            let $a = cpu.fp.mm(op.dst);
            let _ = ($a, $imm);
            cpu.fp.set_mm(op.dst, $value);
            Ok(())
        })*
    };
}
pub(super) use to_mm;

macro_rules! from_mm {
    ($($name:ident($v:ident, $imm:ident) => $value:expr;)*) => {
        $(fn $name(cpu: &mut Cpu, op: &Op) -> Flow {
            cpu.mmx_ready()?;
            let ($v, $imm) = (cpu.fp.mm(op.src), op.imm8());
            let _ = $imm;
            cpu.put_general(op, $value)?;
            cpu.fp.enter_mmx();
            Ok(())
        })*
    };
}

to_mm! {
    mm_whole(_a, b, _i) => b;
    mm_insert16(a, b, i) => insert(a.into(), b.into(), i & 3, 16) as u64;
}

from_mm! {
    mm_get32(v, _i) => v as u32 as u64;
    mm_get64(v, _i) => v;
    mm_mask_b(v, _i) => signs(v.into(), 8);
    mm_extract16(v, i) => extract(v.into(), i & 3, 16);
}

pub(super) fn select_mmx(d: &mut Decoded) -> Selected {
    let to_register = d.i.op_kind(0) == OpKind::Register && d.i.op0_register().is_mm();
    Some(match d.i.mnemonic() {
        M::Movd | M::Movq if to_register => mm_whole,
        M::Movd => mm_get32,
        M::Movq | M::Movntq => mm_get64,
        M::Pmovmskb => mm_mask_b,
        M::Pinsrw => mm_insert16,
        M::Pextrw => mm_extract16,
        M::Maskmovq => {
            masked(d);
            maskmovq
        }
        _ => return None,
    })
}

fn movq2dq(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.mixed_ready()?;
    cpu.fp.xmm[usize::from(op.dst & 15)] = cpu.fp.mm(op.src).into();
    cpu.fp.enter_mmx();
    Ok(())
}

fn movdq2q(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.mixed_ready()?;
    let v = cpu.fp.xmm[usize::from(op.src & 15)] as u64;
    cpu.fp.set_mm(op.dst, v);
    Ok(())
}

pub(super) fn select_mixed(d: &mut Decoded) -> Selected {
    match d.i.mnemonic() {
        M::Movq2dq => Some(movq2dq),
        M::Movdq2q => Some(movdq2q),
        _ => None,
    }
}

/// MOVNTI needs neither CR4.OSFXSR nor a clear CR0.TS.
fn movnti(cpu: &mut Cpu, op: &Op) -> Flow {
    let v = cpu.regs.r(op.src);
    cpu.put_general(op, v)
}

pub(super) fn select_other(d: &mut Decoded) -> Selected {
    (d.i.mnemonic() == M::Movnti).then_some(movnti as _)
}
