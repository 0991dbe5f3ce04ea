//! x87, MMX, SSE to SSE4.2, AES, PCLMULQDQ and the XSAVE family, computed by the host's own units.
//!
//! A handler checks that its unit may be used, fetches the source (which may fault), computes, and then writes. The
//! host's MXCSR and x87 state are loaded and put back inside one asm block, so nothing else ever sees the guest's.
#![allow(unsafe_code)]

mod area;
mod convert;
mod float;
mod integer;
mod moves;
mod shuffle;
mod state;
mod strings;
#[cfg(test)]
mod tests;
mod vector;
mod x87;
mod x87_control;
mod xsave;

pub use state::FpState;
pub(super) use xsave::{XCR0_MASK, XSAVE_AREA_SIZE};

use super::access::Use;
use super::decode::{Decoded, Selected};
use super::mmu::Wanted;
use super::mmu::tlb::Access;
use super::op::Op;
use super::{Cpu, Flow, Stop};
use crate::arch::exception;
use crate::mem::PAGE_SIZE;
use iced_x86::{CpuidFeature, Instruction, Mnemonic, OpKind, Register};

/// Whether the host can run an instruction of `feature`; the model advertises nothing else.
pub(super) fn host_has(feature: CpuidFeature) -> bool {
    match feature {
        CpuidFeature::SSE3 => std::is_x86_feature_detected!("sse3"),
        CpuidFeature::SSSE3 => std::is_x86_feature_detected!("ssse3"),
        CpuidFeature::SSE4_1 => std::is_x86_feature_detected!("sse4.1"),
        CpuidFeature::SSE4_2 => std::is_x86_feature_detected!("sse4.2"),
        CpuidFeature::AES => std::is_x86_feature_detected!("aes"),
        CpuidFeature::PCLMULQDQ => std::is_x86_feature_detected!("pclmulqdq"),
        // What every x86-64 processor has, and what needs nothing of the host.
        _ => true,
    }
}

pub(super) fn select(d: &mut Decoded) -> Selected {
    if !d.i.code().cpuid_features().iter().all(|&f| host_has(f)) {
        return None;
    }
    let (mut xmm, mut mm) = (false, false);
    for n in 0..d.i.op_count() {
        if d.i.op_kind(n) == OpKind::Register {
            xmm |= d.i.op_register(n).is_xmm();
            mm |= d.i.op_register(n).is_mm();
        }
    }
    if let Some(handler) = x87::select(d).or_else(|| x87_control::select(d)) {
        return Some(handler);
    }
    let handler = match (xmm, mm) {
        (false, false) => area::select(d).or_else(|| convert::select(d)).or_else(|| moves::select_other(d)),
        (true, true) => moves::select_mixed(d).or_else(|| convert::select(d)),
        (false, true) => integer::select_mmx(d)
            .or_else(|| shuffle::select_mmx(d))
            .or_else(|| moves::select_mmx(d))
            .or_else(|| convert::select(d)),
        (true, false) => integer::select_xmm(d)
            .or_else(|| moves::select_xmm(d))
            .or_else(|| float::select(d))
            .or_else(|| convert::select(d))
            .or_else(|| shuffle::select_xmm(d))
            .or_else(|| strings::select(d)),
    };
    if handler.is_some() {
        operands(d);
    }
    handler
}

/// What [`Op::imm`] says beside an immediate byte: where the source comes from.
mod form {
    /// The class of the source.
    pub const KIND: u64 = 7 << 8;
    pub const XMM: u64 = 0 << 8;
    pub const MM: u64 = 1 << 8;
    pub const GENERAL: u64 = 2 << 8;
    pub const MEMORY: u64 = 3 << 8;
    /// log2 of the bytes in memory.
    pub const SIZE_SHIFT: u32 = 12;
    /// A misaligned operand raises #GP(0).
    pub const ALIGNED: u64 = 1 << 16;
    /// The general register is 64 bits wide.
    pub const WIDE: u64 = 1 << 17;
}

fn class(r: Register) -> u64 {
    match r {
        r if r.is_xmm() => form::XMM,
        r if r.is_mm() => form::MM,
        r if r.is_gpr64() => form::GENERAL | form::WIDE,
        _ => form::GENERAL,
    }
}

/// Fills in register numbers and the source's form.
fn operands(d: &mut Decoded) {
    let i = d.i;
    // The first operand of MASKMOVQ and MASKMOVDQU is implicit memory.
    let first = u32::from(matches!(i.mnemonic(), Mnemonic::Maskmovq | Mnemonic::Maskmovdqu));
    let register = |n: u32| {
        let n = n + first;
        (n < i.op_count() && i.op_kind(n) == OpKind::Register).then(|| i.op_register(n))
    };
    let mut f = 0;
    if let Some(r) = register(0) {
        d.op.dst = r.number() as u8;
    }
    if let Some(r) = register(1) {
        d.op.src = r.number() as u8;
        f = class(r);
    }
    if (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Memory) {
        let size = i.memory_size().size().max(1) as u64;
        f = form::MEMORY | u64::from(size.trailing_zeros()) << form::SIZE_SHIFT;
        if size == 16 && !may_be_misaligned(i) {
            f |= form::ALIGNED;
        }
    }
    if register(0).is_some_and(|r| r.is_gpr64()) {
        f |= form::WIDE;
    }
    d.op.imm = d.op.imm & 0xff | f;
}

/// SDM 1, "Memory Alignment": 16-byte operands that may lie anywhere.
fn may_be_misaligned(i: &Instruction) -> bool {
    use Mnemonic as M;
    matches!(
        i.mnemonic(),
        M::Movups
            | M::Movupd
            | M::Movdqu
            | M::Lddqu
            | M::Pcmpestri
            | M::Pcmpestri64
            | M::Pcmpestrm
            | M::Pcmpestrm64
            | M::Pcmpistri
            | M::Pcmpistrm
    )
}

impl Op {
    fn kind(&self) -> u64 {
        self.imm & form::KIND
    }

    fn wide(&self) -> bool {
        self.imm & form::WIDE != 0
    }

    fn imm8(&self) -> u8 {
        self.imm as u8
    }
}

impl Cpu {
    /// SDM 3, "Exceptions of SSE": CR0.EM and CR4.OSFXSR before CR0.TS.
    #[inline(always)]
    fn sse_ready(&self) -> Flow {
        if self.cr0.em() || !self.cr4.osfxsr() {
            return Err(Stop::UD);
        }
        if self.cr0.ts() {
            return Err(Stop::NM);
        }
        Ok(())
    }

    /// SDM 3, "Emulation of the MMX Instruction Set": #UD by EM; then #NM; then a pending x87 exception.
    fn mmx_ready(&self) -> Flow {
        if self.cr0.em() {
            return Err(Stop::UD);
        }
        self.x87_ready()
    }

    /// For waiting x87 instructions (SDM 3, "#NM" and "#MF"). Without CR0.NE the error goes to FERR#, which nothing is
    /// wired to: as with IGNNE# asserted, the program goes on.
    fn x87_ready(&self) -> Flow {
        self.x87_available()?;
        if self.fp.pending() && self.cr0.ne() { Err(Stop::MF) } else { Ok(()) }
    }

    fn x87_available(&self) -> Flow {
        if self.cr0.em() || self.cr0.ts() { Err(Stop::NM) } else { Ok(()) }
    }

    /// The source operand, zero-extended.
    #[inline(always)]
    fn vector_source(&mut self, op: &Op) -> Result<u128, Stop> {
        if op.kind() == form::XMM { Ok(self.fp.xmm[usize::from(op.src & 15)]) } else { self.other_source(op) }
    }

    fn other_source(&mut self, op: &Op) -> Result<u128, Stop> {
        match op.kind() {
            form::MM => Ok(self.fp.mm(op.src).into()),
            form::GENERAL if op.wide() => Ok(self.regs.r(op.src).into()),
            form::GENERAL => Ok((self.regs.r(op.src) as u32).into()),
            form::MEMORY => match op.imm >> form::SIZE_SHIFT & 15 {
                0 => Ok(self.load_operand::<u8>(op)?.into()),
                1 => Ok(self.load_operand::<u16>(op)?.into()),
                2 => Ok(self.load_operand::<u32>(op)?.into()),
                3 => Ok(self.load_operand::<u64>(op)?.into()),
                _ => {
                    let lin = self.linear(op, 16, Use::Read)?;
                    if lin & 15 != 0 && op.imm & form::ALIGNED != 0 {
                        return Err(Stop::GP0);
                    }
                    self.load(lin).map_err(|stop| stop.of_operand(op))
                }
            },
            _ => Ok(self.fp.xmm[usize::from(op.src & 15)]),
        }
    }

    /// Stores 16 bytes, which must be aligned if the form says so.
    fn store_vector(&mut self, op: &Op, v: u128) -> Flow {
        let lin = self.linear(op, 16, Use::Write)?;
        if lin & 15 != 0 && op.imm & form::ALIGNED != 0 {
            return Err(Stop::GP0);
        }
        self.store(lin, v).map_err(|stop| stop.of_operand(op))
    }

    /// Raises what accessing `len` bytes (less than a page) would raise, so that all of a long operand is written or
    /// nothing. #AC wants no more alignment than 4 here.
    fn probe(&mut self, op: &Op, lin: u64, len: u64, how: Use) -> Flow {
        let wanted = Wanted { write: how == Use::Write, fetch: false, access: self.data_access };
        if self.data_access == Access::UserAligned && lin & (len.min(4) - 1) & 3 != 0 {
            return Err(Stop::error(exception::AC, 0));
        }
        self.translate(lin, wanted).map_err(|stop| stop.of_operand(op))?;
        let last = lin.wrapping_add(len - 1) & self.linear_mask();
        if (lin ^ last) & !(PAGE_SIZE - 1) != 0 {
            self.translate(last, wanted).map_err(|stop| stop.of_operand(op))?;
        }
        Ok(())
    }

    fn linear_mask(&self) -> u64 {
        if self.code64() { u64::MAX } else { 0xffff_ffff }
    }

    /// Loads a long operand, from `lin` up.
    fn load_bytes(&mut self, op: &Op, lin: u64, bytes: &mut [u8]) -> Flow {
        let mask = self.linear_mask();
        self.probe(op, lin, bytes.len() as u64, Use::Read)?;
        let (mut at, mut rest) = (lin, bytes);
        while !rest.is_empty() {
            let n = piece(at, rest.len());
            let (now, later) = rest.split_at_mut(n);
            match n {
                8 => now.copy_from_slice(&self.load::<u64>(at & mask)?.to_le_bytes()),
                4 => now.copy_from_slice(&self.load::<u32>(at & mask)?.to_le_bytes()),
                2 => now.copy_from_slice(&self.load::<u16>(at & mask)?.to_le_bytes()),
                _ => now.copy_from_slice(&self.load::<u8>(at & mask)?.to_le_bytes()),
            }
            (at, rest) = (at.wrapping_add(n as u64), later);
        }
        Ok(())
    }

    /// Stores a long operand; the caller has probed it if it has to be all or nothing.
    fn store_bytes(&mut self, lin: u64, bytes: &[u8]) -> Flow {
        let mask = self.linear_mask();
        let (mut at, mut rest) = (lin, bytes);
        while !rest.is_empty() {
            let n = piece(at, rest.len());
            let (now, later) = rest.split_at(n);
            let v = now.iter().rev().fold(0, |v, &b| v << 8 | u64::from(b));
            match n {
                8 => self.store(at & mask, v)?,
                4 => self.store(at & mask, v as u32)?,
                2 => self.store(at & mask, v as u16)?,
                _ => self.store(at & mask, v as u8)?,
            }
            (at, rest) = (at.wrapping_add(n as u64), later);
        }
        Ok(())
    }
}

/// How many of `left` bytes at `at` are accessed at once: an aligned 8, 4, 2 or 1.
fn piece(at: u64, left: usize) -> usize {
    let aligned = 1 << at.trailing_zeros().min(3);
    aligned.min(1 << left.ilog2().min(3))
}
