//! MOV (general registers), MOVZX, MOVSX, MOVSXD, LEA, CMOVcc, SETcc, NOP.

use crate::cpu::access::Use;
use crate::cpu::decode::{Decoded, Selected, Shape, by_width, hot, hot_by_width, infallible};
use crate::cpu::op::Op;
use crate::cpu::{Cpu, Flow};
use crate::mem::Word;
use iced_x86::{Code, ConditionCode, Mnemonic};

#[inline(always)]
fn rr<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let v: W = cpu.regs.get(op.src);
    cpu.regs.put(op.dst, v);
    Ok(())
}

#[inline(always)]
fn ri<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.regs.put(op.dst, W::from_u64(op.imm));
    Ok(())
}

fn rm<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let v: W = cpu.load_operand(op)?;
    cpu.regs.put(op.dst, v);
    Ok(())
}

fn mr<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let v: W = cpu.regs.get(op.src);
    cpu.store_operand(op, v)
}

fn mi<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.store_operand(op, W::from_u64(op.imm))
}

/// MOV with an absolute offset, which is in `imm` because it may have 64 bits.
fn from_offset<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let lin = cpu.segmented(op.seg, op.imm, W::BYTES, Use::Read)?;
    let v: W = cpu.load(lin)?;
    cpu.regs.put(op.dst, v);
    Ok(())
}

fn to_offset<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let lin = cpu.segmented(op.seg, op.imm, W::BYTES, Use::Write)?;
    let v: W = cpu.regs.get(op.src);
    cpu.store(lin, v)
}

/// From `S` to `D`, zero-extended.
#[inline(always)]
fn zx_rr<D: Word, S: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let v: S = cpu.regs.get(op.src);
    cpu.regs.put(op.dst, D::from_u64(v.to_u64()));
    Ok(())
}

fn zx_rm<D: Word, S: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let v: S = cpu.load_operand(op)?;
    cpu.regs.put(op.dst, D::from_u64(v.to_u64()));
    Ok(())
}

/// From `S` to `D`, sign-extended.
#[inline(always)]
fn sx_rr<D: Word, S: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let v: S = cpu.regs.get(op.src);
    cpu.regs.put(op.dst, D::from_u64(v.to_i64() as u64));
    Ok(())
}

fn sx_rm<D: Word, S: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let v: S = cpu.load_operand(op)?;
    cpu.regs.put(op.dst, D::from_u64(v.to_i64() as u64));
    Ok(())
}

#[inline(always)]
fn lea<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let ea = cpu.effective_address(op);
    cpu.regs.put(op.dst, W::from_u64(ea));
    Ok(())
}

/// CMOVcc and SETcc carry the condition in `imm`.
#[inline(always)]
fn cmov_rr<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let n = if cpu.flags.condition(op.imm as u8) { op.src } else { op.dst };
    // A 32-bit destination is zero-extended even if the condition is false.
    let v: W = cpu.regs.get(n);
    cpu.regs.put(op.dst, v);
    Ok(())
}

fn cmov_rm<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    // The load happens, and may fault, whatever the condition.
    let loaded: W = cpu.load_operand(op)?;
    let v = if cpu.flags.condition(op.imm as u8) { loaded } else { cpu.regs.get(op.dst) };
    cpu.regs.put(op.dst, v);
    Ok(())
}

#[inline(always)]
fn set_r(cpu: &mut Cpu, op: &Op) -> Flow {
    let v = u8::from(cpu.flags.condition(op.imm as u8));
    cpu.regs.put(op.dst, v);
    Ok(())
}

fn set_m(cpu: &mut Cpu, op: &Op) -> Flow {
    let v = u8::from(cpu.flags.condition(op.imm as u8));
    cpu.store_operand(op, v)
}

#[inline(always)]
fn nop(_: &mut Cpu, _: &Op) -> Flow {
    Ok(())
}

/// The fast paths of these (see [`crate::cpu::op::chain_fast`]).
#[inline(always)]
fn fast_rr<W: Word>(cpu: &mut Cpu, op: &Op) -> bool {
    rr::<W>(cpu, op).is_ok()
}

#[inline(always)]
fn fast_ri<W: Word>(cpu: &mut Cpu, op: &Op) -> bool {
    ri::<W>(cpu, op).is_ok()
}

#[inline(always)]
fn fast_lea<W: Word>(cpu: &mut Cpu, op: &Op) -> bool {
    lea::<W>(cpu, op).is_ok()
}

#[inline(always)]
fn fast_cmov_rr<W: Word>(cpu: &mut Cpu, op: &Op) -> bool {
    cmov_rr::<W>(cpu, op).is_ok()
}

#[inline(always)]
fn fast_rm<W: Word>(cpu: &mut Cpu, op: &Op) -> bool {
    let Some(v) = cpu.fast_load::<W>(op) else { return false };
    cpu.regs.put(op.dst, v);
    true
}

#[inline(always)]
fn fast_store<W: Word>(cpu: &mut Cpu, op: &Op, v: W) -> bool {
    let Some(offset) = cpu.fast_place::<W>(op) else { return false };
    cpu.ram.store(offset, v);
    true
}

#[inline(always)]
fn fast_mr<W: Word>(cpu: &mut Cpu, op: &Op) -> bool {
    let v: W = cpu.regs.get(op.src);
    fast_store(cpu, op, v)
}

#[inline(always)]
fn fast_mi<W: Word>(cpu: &mut Cpu, op: &Op) -> bool {
    fast_store(cpu, op, W::from_u64(op.imm))
}

#[inline(always)]
fn fast_zx<D: Word, S: Word>(cpu: &mut Cpu, op: &Op) -> bool {
    let Some(v) = cpu.fast_load::<S>(op) else { return false };
    cpu.regs.put(op.dst, D::from_u64(v.to_u64()));
    true
}

#[inline(always)]
fn fast_sx<D: Word, S: Word>(cpu: &mut Cpu, op: &Op) -> bool {
    let Some(v) = cpu.fast_load::<S>(op) else { return false };
    cpu.regs.put(op.dst, D::from_u64(v.to_i64() as u64));
    true
}

/// A condition as the low four bits of the opcode.
pub(in crate::cpu) fn condition(c: ConditionCode) -> Option<u64> {
    Some(match c {
        ConditionCode::None => return None,
        ConditionCode::o => 0,
        ConditionCode::no => 1,
        ConditionCode::b => 2,
        ConditionCode::ae => 3,
        ConditionCode::e => 4,
        ConditionCode::ne => 5,
        ConditionCode::be => 6,
        ConditionCode::a => 7,
        ConditionCode::s => 8,
        ConditionCode::ns => 9,
        ConditionCode::p => 10,
        ConditionCode::np => 11,
        ConditionCode::l => 12,
        ConditionCode::ge => 13,
        ConditionCode::le => 14,
        ConditionCode::g => 15,
    })
}

/// Chooses by both widths and by where the source is.
macro_rules! extend {
    ($d:expr, $rr:ident, $rm:ident, $fast:ident; $($to:literal $t:ty, $from:literal $f:ty;)*) => {
        match ($d.width(0), $d.width(1), $d.shape) {
            $(
                ($to, $from, Shape::RR) => Some(hot!($d, $rr::<$t, $f>, infallible($rr::<$t, $f>))),
                ($to, $from, Shape::RM) => Some(hot!($d, $rm::<$t, $f>, $fast::<$t, $f>)),
            )*
            _ => None,
        }
    };
    ($d:expr, $rr:ident, $rm:ident, $fast:ident) => {
        extend!($d, $rr, $rm, $fast; 16 u16, 8 u8; 32 u32, 8 u8; 64 u64, 8 u8; 16 u16, 16 u16; 32 u32, 16 u16; 64 u64, 16 u16;
            16 u16, 32 u32; 32 u32, 32 u32; 64 u64, 32 u32;)
    };
}

pub(in crate::cpu) fn select(d: &mut Decoded) -> Selected {
    let bits = d.width(0);
    if let Some(cc) = condition(d.i.condition_code()) {
        // Branches have conditions, too, and their target in `imm`.
        if !matches!(d.shape, Shape::R | Shape::M | Shape::RR | Shape::RM) {
            return None;
        }
        d.op.imm = cc;
        return match d.shape {
            Shape::R if bits == 8 => Some(hot!(d, set_r, infallible(set_r))),
            Shape::M if bits == 8 => Some(set_m),
            Shape::RR => hot_by_width!(d, bits, cmov_rr, fast_cmov_rr),
            Shape::RM => by_width!(bits, cmov_rm),
            _ => None,
        };
    }
    match d.i.mnemonic() {
        Mnemonic::Mov => match (d.i.code(), d.shape) {
            (Code::Mov_AL_moffs8 | Code::Mov_AX_moffs16 | Code::Mov_EAX_moffs32 | Code::Mov_RAX_moffs64, _) => {
                d.op.imm = d.i.memory_displacement64();
                by_width!(bits, from_offset)
            }
            (Code::Mov_moffs8_AL | Code::Mov_moffs16_AX | Code::Mov_moffs32_EAX | Code::Mov_moffs64_RAX, _) => {
                d.op.imm = d.i.memory_displacement64();
                by_width!(bits, to_offset)
            }
            (_, Shape::RR) => hot_by_width!(d, bits, rr, fast_rr),
            (_, Shape::RI) => hot_by_width!(d, bits, ri, fast_ri),
            (_, Shape::RM) => hot_by_width!(d, bits, rm, fast_rm),
            (_, Shape::MR) => hot_by_width!(d, bits, mr, fast_mr),
            (_, Shape::MI) => hot_by_width!(d, bits, mi, fast_mi),
            _ => None,
        },
        Mnemonic::Movzx => extend!(d, zx_rr, zx_rm, fast_zx),
        Mnemonic::Movsx | Mnemonic::Movsxd => extend!(d, sx_rr, sx_rm, fast_sx),
        Mnemonic::Lea => hot_by_width!(d, bits, lea, fast_lea),
        Mnemonic::Nop => Some(hot!(d, nop, infallible(nop))),
        _ => None,
    }
}
