//! MUL, IMUL, DIV, IDIV.

use crate::cpu::decode::{Decoded, Selected, Shape, by_width, hot_by_width, sure_by_width};
use crate::cpu::op::Op;
use crate::cpu::{Cpu, Flow, Stop, slot};
use crate::mem::Word;
use iced_x86::Mnemonic;

/// AX, DX:AX, EDX:EAX or RDX:RAX.
#[inline(always)]
fn accumulator<W: Word>(cpu: &Cpu) -> u128 {
    if W::BITS == 8 {
        return cpu.regs.get::<u16>(slot::RAX).into();
    }
    let (hi, lo): (W, W) = (cpu.regs.get(slot::RDX), cpu.regs.get(slot::RAX));
    u128::from(hi.to_u64()) << W::BITS | u128::from(lo.to_u64())
}

#[inline(always)]
fn set_accumulator<W: Word>(cpu: &mut Cpu, lo: W, hi: W) {
    if W::BITS == 8 {
        cpu.regs.put(slot::RAX, (hi.to_u64() << 8 | lo.to_u64()) as u16);
    } else {
        cpu.regs.put(slot::RAX, lo);
        cpu.regs.put(slot::RDX, hi);
    }
}

/// One operand against the accumulator.
trait Wide {
    fn apply<W: Word>(cpu: &mut Cpu, b: W) -> Flow;
}

struct Mul;
impl Wide for Mul {
    #[inline(always)]
    fn apply<W: Word>(cpu: &mut Cpu, b: W) -> Flow {
        let a: W = cpu.regs.get(slot::RAX);
        let product = u128::from(a.to_u64()) * u128::from(b.to_u64());
        let (lo, hi) = (W::from_u64(product as u64), W::from_u64((product >> W::BITS) as u64));
        set_accumulator(cpu, lo, hi);
        let over = hi != W::default();
        cpu.flags.product(lo, over);
        Ok(())
    }
}

struct Imul;
impl Wide for Imul {
    #[inline(always)]
    fn apply<W: Word>(cpu: &mut Cpu, b: W) -> Flow {
        let a: W = cpu.regs.get(slot::RAX);
        let product = i128::from(a.to_i64()) * i128::from(b.to_i64());
        let (lo, hi) = (W::from_u64(product as u64), W::from_u64((product >> W::BITS) as u64));
        set_accumulator(cpu, lo, hi);
        let over = i128::from(lo.to_i64()) != product;
        cpu.flags.product(lo, over);
        Ok(())
    }
}

/// DIV and IDIV leave the flags, which are undefined.
struct Div;
impl Wide for Div {
    #[inline(always)]
    fn apply<W: Word>(cpu: &mut Cpu, b: W) -> Flow {
        let (a, b) = (accumulator::<W>(cpu), b.to_u64());
        if b == 0 {
            return Err(Stop::DE);
        }
        let (q, r) = match u64::try_from(a) {
            Ok(a) => (a / b, a % b),
            Err(_) => {
                let q = u64::try_from(a / u128::from(b)).map_err(|_| Stop::DE)?;
                (q, (a % u128::from(b)) as u64)
            }
        };
        if W::from_u64(q).to_u64() != q {
            return Err(Stop::DE);
        }
        set_accumulator(cpu, W::from_u64(q), W::from_u64(r));
        Ok(())
    }
}

struct Idiv;
impl Wide for Idiv {
    #[inline(always)]
    fn apply<W: Word>(cpu: &mut Cpu, b: W) -> Flow {
        let unused = 128 - 2 * W::BITS;
        let a = (accumulator::<W>(cpu) << unused) as i128 >> unused;
        let b = b.to_i64();
        if b == 0 {
            return Err(Stop::DE);
        }
        let (q, r) = match i64::try_from(a) {
            // i64::MIN / -1 goes the wide way.
            Ok(a) if b != -1 => (a / b, a % b),
            _ => {
                let b = i128::from(b);
                let q = i64::try_from(a.checked_div(b).ok_or(Stop::DE)?).map_err(|_| Stop::DE)?;
                (q, (a % b) as i64)
            }
        };
        if W::from_u64(q as u64).to_i64() != q {
            return Err(Stop::DE);
        }
        set_accumulator(cpu, W::from_u64(q as u64), W::from_u64(r as u64));
        Ok(())
    }
}

fn wide_r<W: Word, O: Wide>(cpu: &mut Cpu, op: &Op) -> Flow {
    let b: W = cpu.regs.get(op.dst);
    O::apply(cpu, b)
}

fn wide_m<W: Word, O: Wide>(cpu: &mut Cpu, op: &Op) -> Flow {
    let b: W = cpu.load_operand(op)?;
    O::apply(cpu, b)
}

/// IMUL with a destination register.
#[inline(always)]
fn multiply<W: Word>(cpu: &mut Cpu, dst: u8, a: W, b: W) {
    let (r, over) = if W::BITS == 64 {
        let (r, over) = a.to_i64().overflowing_mul(b.to_i64());
        (W::from_u64(r as u64), over)
    } else {
        let product = a.to_i64() * b.to_i64();
        let r = W::from_u64(product as u64);
        (r, r.to_i64() != product)
    };
    cpu.flags.product(r, over);
    cpu.regs.put(dst, r);
}

#[inline(always)]
fn imul_rr<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let (a, b): (W, W) = (cpu.regs.get(op.dst), cpu.regs.get(op.src));
    multiply(cpu, op.dst, a, b);
    Ok(())
}

fn imul_rm<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let b: W = cpu.load_operand(op)?;
    let a: W = cpu.regs.get(op.dst);
    multiply(cpu, op.dst, a, b);
    Ok(())
}

#[inline(always)]
fn imul_rri<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let a: W = cpu.regs.get(op.src);
    multiply(cpu, op.dst, a, W::from_u64(op.imm));
    Ok(())
}

#[inline(always)]
fn fast_imul_rm<W: Word>(cpu: &mut Cpu, op: &Op) -> bool {
    let Some(b) = cpu.fast_load::<W>(op) else { return false };
    let a: W = cpu.regs.get(op.dst);
    multiply(cpu, op.dst, a, b);
    true
}

fn imul_rmi<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let a: W = cpu.load_operand(op)?;
    multiply(cpu, op.dst, a, W::from_u64(op.imm));
    Ok(())
}

fn wide<O: Wide>(d: &Decoded) -> Selected {
    let bits = d.width(0);
    match d.shape {
        Shape::R => by_width!(bits, wide_r, O),
        Shape::M => by_width!(bits, wide_m, O),
        _ => None,
    }
}

pub(in crate::cpu) fn select(d: &mut Decoded) -> Selected {
    let bits = d.width(0);
    match (d.i.mnemonic(), d.i.op_count(), d.shape) {
        (Mnemonic::Mul, ..) => wide::<Mul>(d),
        (Mnemonic::Imul, 1, _) => wide::<Imul>(d),
        (Mnemonic::Imul, 2, Shape::RR) => sure_by_width!(d, bits, imul_rr),
        (Mnemonic::Imul, 2, Shape::RM) => hot_by_width!(d, bits, imul_rm, fast_imul_rm),
        (Mnemonic::Imul, 3, Shape::RR) => sure_by_width!(d, bits, imul_rri),
        (Mnemonic::Imul, 3, Shape::RM) => by_width!(bits, imul_rmi),
        (Mnemonic::Div, ..) => wide::<Div>(d),
        (Mnemonic::Idiv, ..) => wide::<Idiv>(d),
        _ => None,
    }
}
