//! PCMPESTRI, PCMPESTRM, PCMPISTRI, PCMPISTRM (SDM 1, "String Comparison"; SDM 2, "Imm8 Control Byte Operation").

use crate::cpu::decode::{Decoded, Selected};
use crate::cpu::flags::{CF, OF, SF, ZF};
use crate::cpu::op::Op;
use crate::cpu::{Cpu, Flow, slot};
use iced_x86::Mnemonic as M;

/// The elements of an operand, sign-extended if the control byte says so, and how many are valid.
struct Text {
    elements: [i32; 16],
    valid: usize,
}

/// 16 bytes or 8 words.
fn count(imm: u8) -> usize {
    if imm & 1 == 0 { 16 } else { 8 }
}

impl Text {
    fn new(v: u128, imm: u8, valid: usize) -> Self {
        let signed = imm & 2 != 0;
        let elements = std::array::from_fn(|n| match imm & 1 {
            0 if signed => i32::from((v >> (8 * n)) as i8),
            0 => i32::from((v >> (8 * n)) as u8),
            _ if n > 7 => 0,
            _ if signed => i32::from((v >> (16 * n)) as i16),
            _ => i32::from((v >> (16 * n)) as u16),
        });
        Self { elements, valid }
    }

    /// Up to the first zero element.
    fn implicit(v: u128, imm: u8) -> Self {
        let mut t = Self::new(v, imm, count(imm));
        t.valid = t.elements[..count(imm)].iter().position(|&e| e == 0).unwrap_or(count(imm));
        t
    }

    /// As long as the absolute value of a register says.
    fn explicit(v: u128, imm: u8, length: i64) -> Self {
        Self::new(v, imm, length.unsigned_abs().min(count(imm) as u64) as usize)
    }
}

/// IntRes2: a bit for each element of `b`.
fn compare(a: &Text, b: &Text, imm: u8) -> u16 {
    let n = count(imm);
    let all = ((1u32 << n) - 1) as u16;
    let bit = |on: bool, at: usize| u16::from(on) << at;
    let mut result = 0;
    for j in 0..n {
        let element = b.elements[j];
        let on = match imm >> 2 & 3 {
            // Equal any: a valid element of b is one of the set a.
            0 => j < b.valid && a.elements[..a.valid].contains(&element),
            // Ranges: within one of the pairs in a.
            1 => j < b.valid && a.elements[..a.valid & !1].chunks(2).any(|r| (r[0]..=r[1]).contains(&element)),
            // Equal each: both invalid counts as equal, one invalid as different.
            2 => match (j < a.valid, j < b.valid) {
                (true, true) => a.elements[j] == element,
                (valid_a, valid_b) => valid_a == valid_b,
            },
            // Equal ordered: a begins here, as far as b can tell.
            _ => (0..n - j).all(|k| k >= a.valid || j + k < b.valid && a.elements[k] == b.elements[j + k]),
        };
        result |= bit(on, j);
    }
    match imm >> 4 & 3 {
        1 => !result & all,
        3 => result ^ (((1u32 << b.valid) - 1) as u16 & all),
        _ => result,
    }
}

fn index(result: u16, imm: u8) -> u64 {
    match (result, imm & 0x40 != 0) {
        (0, _) => count(imm) as u64,
        (r, true) => 15 - u64::from(r.leading_zeros()),
        (r, false) => r.trailing_zeros().into(),
    }
}

fn mask(result: u16, imm: u8) -> u128 {
    if imm & 0x40 == 0 {
        return result.into();
    }
    let bits = 128 / count(imm) as u32;
    (0..count(imm) as u32)
        .filter(|n| result >> n & 1 != 0)
        .fold(0, |m, n| m | (u128::MAX >> (128 - bits)) << (n * bits))
}

/// `EXPLICIT`: lengths in EAX and EDX (RAX and RDX if `WIDE`); `MASK`: the result goes to XMM0, else to ECX.
fn pcmpstr<const EXPLICIT: bool, const WIDE: bool, const MASK: bool>(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.sse_ready()?;
    let source = cpu.vector_source(op)?;
    let (first, imm) = (cpu.fp.xmm[usize::from(op.dst & 15)], op.imm8());
    let (a, b) = if EXPLICIT {
        let length = |r: u8| if WIDE { cpu.regs.r(r) as i64 } else { i64::from(cpu.regs.r(r) as i32) };
        (Text::explicit(first, imm, length(slot::RAX)), Text::explicit(source, imm, length(slot::RDX)))
    } else {
        (Text::implicit(first, imm), Text::implicit(source, imm))
    };
    let result = compare(&a, &b, imm);
    let mut flags = 0;
    flags |= if result != 0 { CF } else { 0 };
    flags |= if b.valid < count(imm) { ZF } else { 0 };
    flags |= if a.valid < count(imm) { SF } else { 0 };
    flags |= if result & 1 != 0 { OF } else { 0 };
    if MASK {
        cpu.fp.xmm[0] = mask(result, imm);
    } else {
        cpu.regs.set_r(slot::RCX, index(result, imm));
    }
    cpu.flags.set_status(flags);
    Ok(())
}

pub(super) fn select(d: &mut Decoded) -> Selected {
    Some(match d.i.mnemonic() {
        M::Pcmpestri => pcmpstr::<true, false, false>,
        M::Pcmpestri64 => pcmpstr::<true, true, false>,
        M::Pcmpestrm => pcmpstr::<true, false, true>,
        M::Pcmpestrm64 => pcmpstr::<true, true, true>,
        M::Pcmpistri => pcmpstr::<false, false, false>,
        M::Pcmpistrm => pcmpstr::<false, false, true>,
        _ => return None,
    })
}
