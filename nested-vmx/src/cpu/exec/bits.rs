//! BT, BTS, BTR, BTC, BSF, BSR, TZCNT, LZCNT, POPCNT, BSWAP, MOVBE, CRC32.

use crate::cpu::access::Use;
use crate::cpu::decode::{Decoded, Selected, Shape, by_width, sure_by_width};
use crate::cpu::flags::{Flags, ZF};
use crate::cpu::op::{Op, op_flags};
use crate::cpu::{Cpu, Flow};
use crate::mem::Word;
use iced_x86::Mnemonic;

/// What becomes of the tested bit.
trait BitOp {
    const WRITES: bool;
    fn value<W: Word>(v: W, mask: W) -> W;
}

macro_rules! bit_op {
    ($name:ident, $writes:literal, |$v:ident, $mask:ident| $value:expr) => {
        struct $name;
        impl BitOp for $name {
            const WRITES: bool = $writes;
            #[inline(always)]
            fn value<W: Word>($v: W, $mask: W) -> W {
                $value
            }
        }
    };
}

bit_op!(Bt, false, |v, _m| v);
bit_op!(Bts, true, |v, m| v | m);
bit_op!(Btr, true, |v, m| v & !m);
bit_op!(Btc, true, |v, m| v ^ m);

/// Only CF changes; the others, undefined except ZF, stay.
#[inline(always)]
fn bt_register<W: Word, O: BitOp>(cpu: &mut Cpu, op: &Op, index: u64) -> Flow {
    let mask = W::from_u64(1 << (index as u32 & (W::BITS - 1)));
    let v: W = cpu.regs.get(op.dst);
    cpu.flags.set_cf(v & mask != W::default());
    if O::WRITES {
        cpu.regs.put(op.dst, O::value(v, mask));
    }
    Ok(())
}

#[inline(always)]
fn bt_memory<W: Word, O: BitOp>(cpu: &mut Cpu, op: &Op, lin: u64, index: u64) -> Flow {
    let mask = W::from_u64(1 << (index as u32 & (W::BITS - 1)));
    let v = if O::WRITES {
        cpu.modify(op, lin, op.has(op_flags::LOCK), |v| O::value(v, mask))?
    } else {
        cpu.load(lin).map_err(|stop| stop.of_operand(op))?
    };
    cpu.flags.set_cf(v & mask != W::default());
    Ok(())
}

#[inline(always)]
fn bt_rr<W: Word, O: BitOp>(cpu: &mut Cpu, op: &Op) -> Flow {
    let index = cpu.regs.r(op.src);
    bt_register::<W, O>(cpu, op, index)
}

#[inline(always)]
fn bt_ri<W: Word, O: BitOp>(cpu: &mut Cpu, op: &Op) -> Flow {
    bt_register::<W, O>(cpu, op, op.imm)
}

fn bt_mi<W: Word, O: BitOp>(cpu: &mut Cpu, op: &Op) -> Flow {
    let how = if O::WRITES { Use::Write } else { Use::Read };
    let lin = cpu.linear(op, W::BYTES, how)?;
    bt_memory::<W, O>(cpu, op, lin, op.imm)
}

/// The signed bit index reaches beyond the operand (SDM 2, "BT"): whole operands are added to the address.
fn bt_mr<W: Word, O: BitOp>(cpu: &mut Cpu, op: &Op) -> Flow {
    let index = cpu.regs.get::<W>(op.src).to_i64();
    let delta = (index >> W::BITS.trailing_zeros()) * W::BYTES as i64;
    let ea = cpu.effective_address(op).wrapping_add(delta as u64) & op.address_mask();
    let how = if O::WRITES { Use::Write } else { Use::Read };
    let lin = cpu.segmented(op.seg, ea, W::BYTES, how)?;
    bt_memory::<W, O>(cpu, op, lin, index as u64)
}

/// From a source to a destination of the same width. None leaves the destination.
trait Count {
    fn apply<W: Word>(f: &mut Flags, a: W) -> Option<u64>;
}

#[inline(always)]
fn leading_zeros<W: Word>(a: W) -> u64 {
    u64::from(a.to_u64().leading_zeros() - (64 - W::BITS))
}

#[inline(always)]
fn trailing_zeros<W: Word>(a: W) -> u64 {
    u64::from(a.to_u64().trailing_zeros().min(W::BITS))
}

/// ZF by the source; of the other flags, which are undefined, PF is by the result and the rest 0, as Intel's have them. A
/// zero source leaves the destination.
struct Bsf;
impl Count for Bsf {
    #[inline(always)]
    fn apply<W: Word>(f: &mut Flags, a: W) -> Option<u64> {
        scanned(f, a, trailing_zeros(a))
    }
}

#[inline(always)]
fn scanned<W: Word>(f: &mut Flags, a: W, index: u64) -> Option<u64> {
    if a == W::default() {
        f.logic(a);
        return None;
    }
    // Bit 8 keeps ZF clear without a part in PF.
    f.logic(index as u16 | 0x100);
    Some(index)
}

struct Bsr;
impl Count for Bsr {
    #[inline(always)]
    fn apply<W: Word>(f: &mut Flags, a: W) -> Option<u64> {
        scanned(f, a, u64::from(W::BITS - 1).wrapping_sub(leading_zeros(a)))
    }
}

struct Tzcnt;
impl Count for Tzcnt {
    #[inline(always)]
    fn apply<W: Word>(f: &mut Flags, a: W) -> Option<u64> {
        let n = trailing_zeros(a);
        f.result_cf_of(n as u8, a == W::default(), false);
        f.clear_pf();
        Some(n)
    }
}

struct Lzcnt;
impl Count for Lzcnt {
    #[inline(always)]
    fn apply<W: Word>(f: &mut Flags, a: W) -> Option<u64> {
        let n = leading_zeros(a);
        f.result_cf_of(n as u8, a == W::default(), false);
        f.clear_pf();
        Some(n)
    }
}

struct Popcnt;
impl Count for Popcnt {
    #[inline(always)]
    fn apply<W: Word>(f: &mut Flags, a: W) -> Option<u64> {
        f.set_status(if a == W::default() { ZF } else { 0 });
        Some(a.to_u64().count_ones().into())
    }
}

#[inline(always)]
fn count<W: Word, C: Count>(cpu: &mut Cpu, op: &Op, a: W) -> Flow {
    if let Some(n) = C::apply(&mut cpu.flags, a) {
        cpu.regs.put(op.dst, W::from_u64(n));
    }
    Ok(())
}

#[inline(always)]
fn count_rr<W: Word, C: Count>(cpu: &mut Cpu, op: &Op) -> Flow {
    let a: W = cpu.regs.get(op.src);
    count::<W, C>(cpu, op, a)
}

fn count_rm<W: Word, C: Count>(cpu: &mut Cpu, op: &Op) -> Flow {
    let a: W = cpu.load_operand(op)?;
    count::<W, C>(cpu, op, a)
}

#[inline(always)]
fn swapped<W: Word>(v: W) -> W {
    W::from_u64(v.to_u64().swap_bytes() >> (64 - W::BITS))
}

/// BSWAP of 16 bits is undefined; Intel's give 0.
#[inline(always)]
fn bswap<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let v = if W::BITS == 16 { W::default() } else { swapped(cpu.regs.get::<W>(op.dst)) };
    cpu.regs.put(op.dst, v);
    Ok(())
}

fn movbe_rm<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let v: W = cpu.load_operand(op)?;
    cpu.regs.put(op.dst, swapped(v));
    Ok(())
}

fn movbe_mr<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let v: W = cpu.regs.get(op.src);
    cpu.store_operand(op, swapped(v))
}

/// CRC-32C, polynomial 0x11EDC6F41, bit-reversed (SDM 2, "CRC32").
const CRC32C: [u32; 256] = {
    let mut table = [0; 256];
    let mut n = 0;
    while n < 256 {
        let (mut c, mut k) = (n as u32, 0);
        while k < 8 {
            c = c >> 1 ^ if c & 1 != 0 { 0x82f6_3b78 } else { 0 };
            k += 1;
        }
        table[n] = c;
        n += 1;
    }
    table
};

fn crc32c<W: Word>(mut crc: u32, data: W) -> u32 {
    for b in &data.to_u64().to_le_bytes()[..W::BYTES as usize] {
        crc = crc >> 8 ^ CRC32C[usize::from(crc as u8 ^ b)];
    }
    crc
}

/// The destination is zero-extended to 64 bits, whatever its size.
fn crc32_rr<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let crc = crc32c::<W>(cpu.regs.get(op.dst), cpu.regs.get(op.src));
    cpu.regs.put(op.dst, crc);
    Ok(())
}

fn crc32_rm<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let data: W = cpu.load_operand(op)?;
    let crc = crc32c(cpu.regs.get(op.dst), data);
    cpu.regs.put(op.dst, crc);
    Ok(())
}

fn bit_test<O: BitOp>(d: &mut Decoded) -> Selected {
    let bits = d.width(0);
    match d.shape {
        Shape::RR => sure_by_width!(d, bits, bt_rr, O),
        Shape::RI => sure_by_width!(d, bits, bt_ri, O),
        Shape::MR => by_width!(bits, bt_mr, O),
        Shape::MI => by_width!(bits, bt_mi, O),
        _ => None,
    }
}

fn counting<C: Count>(d: &mut Decoded) -> Selected {
    let bits = d.width(0);
    match d.shape {
        Shape::RR => sure_by_width!(d, bits, count_rr, C),
        Shape::RM => by_width!(bits, count_rm, C),
        _ => None,
    }
}

pub(in crate::cpu) fn select(d: &mut Decoded) -> Selected {
    match (d.i.mnemonic(), d.shape) {
        (Mnemonic::Bt, _) => bit_test::<Bt>(d),
        (Mnemonic::Bts, _) => bit_test::<Bts>(d),
        (Mnemonic::Btr, _) => bit_test::<Btr>(d),
        (Mnemonic::Btc, _) => bit_test::<Btc>(d),
        (Mnemonic::Bsf, _) => counting::<Bsf>(d),
        (Mnemonic::Bsr, _) => counting::<Bsr>(d),
        (Mnemonic::Tzcnt, _) => counting::<Tzcnt>(d),
        (Mnemonic::Lzcnt, _) => counting::<Lzcnt>(d),
        (Mnemonic::Popcnt, _) => counting::<Popcnt>(d),
        (Mnemonic::Bswap, _) => sure_by_width!(d, d.width(0), bswap),
        (Mnemonic::Movbe, Shape::RM) => by_width!(d.width(0), movbe_rm),
        (Mnemonic::Movbe, Shape::MR) => by_width!(d.width(1), movbe_mr),
        (Mnemonic::Crc32, Shape::RR) => by_width!(d.width(1), crc32_rr),
        (Mnemonic::Crc32, Shape::RM) => by_width!(d.width(1), crc32_rm),
        _ => None,
    }
}
