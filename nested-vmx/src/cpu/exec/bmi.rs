//! BMI1, BMI2 and ADX: the VEX-encoded instructions on general registers, and ADCX, ADOX. PF and AF, undefined, are 0 as
//! Intel's processors have them.

use crate::cpu::decode::{Decoded, Selected, Shape, by_width, gpr};
use crate::cpu::flags::{Flags, ZF};
use crate::cpu::op::Op;
use crate::cpu::{Cpu, Flow, Stop, slot};
use crate::mem::Word;
use iced_x86::{EncodingKind, Mnemonic, OpKind};

/// VEX is #UD in real-address and virtual-8086 mode (SDM 2, "VEX Prefix").
#[inline(always)]
fn vex_allowed(cpu: &Cpu) -> Flow {
    if cpu.protected() { Ok(()) } else { Err(Stop::UD) }
}

/// A destination and two sources, in the order of the operands.
trait Ternary {
    fn apply<W: Word>(f: &mut Flags, a: W, b: W) -> W;
}

/// A destination and one source.
trait Binary {
    fn apply<W: Word>(f: &mut Flags, a: W) -> W;
}

macro_rules! ternary {
    ($name:ident, $w:ident, |$f:ident, $a:ident, $b:ident| $value:expr) => {
        struct $name;
        impl Ternary for $name {
            #[inline(always)]
            fn apply<$w: Word>($f: &mut Flags, $a: $w, $b: $w) -> $w {
                $value
            }
        }
    };
}

ternary!(Andn, W, |f, a, b| {
    let r = !a & b;
    f.logic(r);
    f.clear_pf();
    r
});
ternary!(Bextr, W, |f, a, b| {
    let (start, len) = (b.to_u64() as u32 & 0xff, (b.to_u64() >> 8) as u32 & 0xff);
    let v = a.to_u64().checked_shr(start).unwrap_or(0);
    let r = W::from_u64(v & 1u64.checked_shl(len).map_or(u64::MAX, |m| m - 1));
    f.set_status(if r == W::default() { ZF } else { 0 });
    r
});
ternary!(Bzhi, W, |f, a, b| {
    let n = b.to_u64() as u32 & 0xff;
    let r = W::from_u64(a.to_u64() & 1u64.checked_shl(n).map_or(u64::MAX, |m| m - 1));
    f.result_cf_of(r, n > W::BITS - 1, false);
    f.clear_pf();
    r
});
ternary!(Pdep, W, |_f, a, b| {
    let (mut mask, mut source, mut r) = (b.to_u64(), a.to_u64(), 0);
    while mask != 0 {
        if source & 1 != 0 {
            r |= mask & mask.wrapping_neg();
        }
        source >>= 1;
        mask &= mask - 1;
    }
    W::from_u64(r)
});
ternary!(Pext, W, |_f, a, b| {
    let (mut mask, source, mut r, mut n) = (b.to_u64(), a.to_u64(), 0, 0);
    while mask != 0 {
        if source & mask & mask.wrapping_neg() != 0 {
            r |= 1 << n;
        }
        n += 1;
        mask &= mask - 1;
    }
    W::from_u64(r)
});
ternary!(Shlx, W, |_f, a, b| W::from_u64(a.to_u64() << (b.to_u64() & u64::from(W::BITS - 1))));
ternary!(Shrx, W, |_f, a, b| W::from_u64(a.to_u64() >> (b.to_u64() & u64::from(W::BITS - 1))));
ternary!(Sarx, W, |_f, a, b| W::from_u64((a.to_i64() >> (b.to_u64() & u64::from(W::BITS - 1))) as u64));
ternary!(Rorx, W, |_f, a, b| {
    let (a, n) = (a.to_u64(), b.to_u64() as u32 & (W::BITS - 1));
    W::from_u64(a >> n | if n == 0 { 0 } else { a << (W::BITS - n) })
});

struct Blsi;
impl Binary for Blsi {
    #[inline(always)]
    fn apply<W: Word>(f: &mut Flags, a: W) -> W {
        let r = W::from_u64(a.to_u64() & a.to_u64().wrapping_neg());
        f.result_cf_of(r, a != W::default(), false);
        f.clear_pf();
        r
    }
}

struct Blsr;
impl Binary for Blsr {
    #[inline(always)]
    fn apply<W: Word>(f: &mut Flags, a: W) -> W {
        let r = W::from_u64(a.to_u64() & a.to_u64().wrapping_sub(1));
        f.result_cf_of(r, a == W::default(), false);
        f.clear_pf();
        r
    }
}

struct Blsmsk;
impl Binary for Blsmsk {
    #[inline(always)]
    fn apply<W: Word>(f: &mut Flags, a: W) -> W {
        let r = W::from_u64(a.to_u64() ^ a.to_u64().wrapping_sub(1));
        f.result_cf_of(r, a == W::default(), false);
        f.clear_pf();
        r
    }
}

/// `imm` has the register number of the third operand.
fn rrr<W: Word, O: Ternary>(cpu: &mut Cpu, op: &Op) -> Flow {
    vex_allowed(cpu)?;
    let (a, b): (W, W) = (cpu.regs.get(op.src), cpu.regs.get(op.imm as u8));
    let r = O::apply(&mut cpu.flags, a, b);
    cpu.regs.put(op.dst, r);
    Ok(())
}

fn rrm<W: Word, O: Ternary>(cpu: &mut Cpu, op: &Op) -> Flow {
    vex_allowed(cpu)?;
    let b: W = cpu.load_operand(op)?;
    let r = O::apply(&mut cpu.flags, cpu.regs.get(op.src), b);
    cpu.regs.put(op.dst, r);
    Ok(())
}

fn rmr<W: Word, O: Ternary>(cpu: &mut Cpu, op: &Op) -> Flow {
    vex_allowed(cpu)?;
    let a: W = cpu.load_operand(op)?;
    let r = O::apply(&mut cpu.flags, a, cpu.regs.get(op.imm as u8));
    cpu.regs.put(op.dst, r);
    Ok(())
}

fn rri<W: Word, O: Ternary>(cpu: &mut Cpu, op: &Op) -> Flow {
    vex_allowed(cpu)?;
    let a: W = cpu.regs.get(op.src);
    let r = O::apply(&mut cpu.flags, a, W::from_u64(op.imm));
    cpu.regs.put(op.dst, r);
    Ok(())
}

fn rmi<W: Word, O: Ternary>(cpu: &mut Cpu, op: &Op) -> Flow {
    vex_allowed(cpu)?;
    let a: W = cpu.load_operand(op)?;
    let r = O::apply(&mut cpu.flags, a, W::from_u64(op.imm));
    cpu.regs.put(op.dst, r);
    Ok(())
}

fn rr<W: Word, O: Binary>(cpu: &mut Cpu, op: &Op) -> Flow {
    vex_allowed(cpu)?;
    let a: W = cpu.regs.get(op.src);
    let r = O::apply(&mut cpu.flags, a);
    cpu.regs.put(op.dst, r);
    Ok(())
}

fn rm<W: Word, O: Binary>(cpu: &mut Cpu, op: &Op) -> Flow {
    vex_allowed(cpu)?;
    let a: W = cpu.load_operand(op)?;
    let r = O::apply(&mut cpu.flags, a);
    cpu.regs.put(op.dst, r);
    Ok(())
}

/// The low half is written first: with equal destinations the high half stays.
#[inline(always)]
fn multiply<W: Word>(cpu: &mut Cpu, op: &Op, b: W) {
    let a: W = cpu.regs.get(slot::RDX);
    let product = u128::from(a.to_u64()) * u128::from(b.to_u64());
    cpu.regs.put(op.src, W::from_u64(product as u64));
    cpu.regs.put(op.dst, W::from_u64((product >> W::BITS) as u64));
}

fn mulx_rrr<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    vex_allowed(cpu)?;
    let b: W = cpu.regs.get(op.imm as u8);
    multiply(cpu, op, b);
    Ok(())
}

fn mulx_rrm<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    vex_allowed(cpu)?;
    let b: W = cpu.load_operand(op)?;
    multiply(cpu, op, b);
    Ok(())
}

/// Which flag carries.
trait Carry {
    fn get(f: &Flags) -> bool;
    fn set(f: &mut Flags, on: bool);
}

struct Cf;
impl Carry for Cf {
    #[inline(always)]
    fn get(f: &Flags) -> bool {
        f.cf()
    }
    #[inline(always)]
    fn set(f: &mut Flags, on: bool) {
        f.set_cf(on);
    }
}

struct Of;
impl Carry for Of {
    #[inline(always)]
    fn get(f: &Flags) -> bool {
        f.of()
    }
    #[inline(always)]
    fn set(f: &mut Flags, on: bool) {
        f.set_of(on);
    }
}

#[inline(always)]
fn add<W: Word, C: Carry>(cpu: &mut Cpu, op: &Op, b: W) {
    let a: W = cpu.regs.get(op.dst);
    let sum = u128::from(a.to_u64()) + u128::from(b.to_u64()) + u128::from(C::get(&cpu.flags));
    C::set(&mut cpu.flags, sum >> W::BITS != 0);
    cpu.regs.put(op.dst, W::from_u64(sum as u64));
}

fn adx_rr<W: Word, C: Carry>(cpu: &mut Cpu, op: &Op) -> Flow {
    let b: W = cpu.regs.get(op.src);
    add::<W, C>(cpu, op, b);
    Ok(())
}

fn adx_rm<W: Word, C: Carry>(cpu: &mut Cpu, op: &Op) -> Flow {
    let b: W = cpu.load_operand(op)?;
    add::<W, C>(cpu, op, b);
    Ok(())
}

fn ternary<O: Ternary>(d: &mut Decoded) -> Selected {
    let bits = d.width(0);
    if d.i.op_kind(2) == OpKind::Register {
        d.op.imm = gpr(d.i.op_register(2)).into();
    }
    match (d.shape, d.i.op_kind(2)) {
        (Shape::RR, OpKind::Register) => by_width!(bits, rrr, O),
        (Shape::RM, OpKind::Register) => by_width!(bits, rmr, O),
        (Shape::RR, OpKind::Memory) => by_width!(bits, rrm, O),
        (Shape::RR, _) => by_width!(bits, rri, O),
        (Shape::RM, _) => by_width!(bits, rmi, O),
        _ => None,
    }
}

fn binary<O: Binary>(d: &Decoded) -> Selected {
    let bits = d.width(0);
    match d.shape {
        Shape::RR => by_width!(bits, rr, O),
        Shape::RM => by_width!(bits, rm, O),
        _ => None,
    }
}

fn adx<C: Carry>(d: &Decoded) -> Selected {
    let bits = d.width(0);
    match d.shape {
        Shape::RR => by_width!(bits, adx_rr, C),
        Shape::RM => by_width!(bits, adx_rm, C),
        _ => None,
    }
}

pub(in crate::cpu) fn select(d: &mut Decoded) -> Selected {
    match d.i.mnemonic() {
        Mnemonic::Adcx => return adx::<Cf>(d),
        Mnemonic::Adox => return adx::<Of>(d),
        _ if d.i.code().encoding() != EncodingKind::VEX => return None,
        _ => {}
    }
    let bits = d.width(0);
    match d.i.mnemonic() {
        Mnemonic::Andn => ternary::<Andn>(d),
        Mnemonic::Bextr => ternary::<Bextr>(d),
        Mnemonic::Bzhi => ternary::<Bzhi>(d),
        Mnemonic::Pdep => ternary::<Pdep>(d),
        Mnemonic::Pext => ternary::<Pext>(d),
        Mnemonic::Shlx => ternary::<Shlx>(d),
        Mnemonic::Shrx => ternary::<Shrx>(d),
        Mnemonic::Sarx => ternary::<Sarx>(d),
        Mnemonic::Rorx => ternary::<Rorx>(d),
        Mnemonic::Blsi => binary::<Blsi>(d),
        Mnemonic::Blsr => binary::<Blsr>(d),
        Mnemonic::Blsmsk => binary::<Blsmsk>(d),
        Mnemonic::Mulx if d.i.op_kind(2) == OpKind::Register => {
            d.op.imm = gpr(d.i.op_register(2)).into();
            by_width!(bits, mulx_rrr)
        }
        Mnemonic::Mulx => by_width!(bits, mulx_rrm),
        _ => None,
    }
}
