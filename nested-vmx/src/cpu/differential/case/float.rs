//! Cases for x87, MMX and SSE: operands that floating point cares about, and the FXSAVE image compared.

use super::*;

const ENCODINGS: usize = 24;
const OPERANDS: usize = 40;
/// Of the FXSAVE image: control, status and tags; FIP, FDP and FOP are the code's own.
const POINTERS: std::ops::Range<usize> = 6..24;
const MXCSR: usize = 24;
const ST: usize = 32;
const XMM: usize = 160;

fn float32(r: &mut Rng) -> u32 {
    let sign = (r.next() as u32 & 1) << 31;
    let magnitude = match r.below(12) {
        0 => 0,
        1 => 0x7f80_0000,
        2 => 0x7fc0_0000 | r.next() as u32 & 0x3f_ffff,
        3 => 0x7f80_0001 | r.next() as u32 & 0x3f_ffff,
        4 => r.next() as u32 & 0x7f_ffff,
        5 => 0x0080_0000 | r.next() as u32 & 3,
        6 => 0x7f7f_ffff - (r.next() as u32 & 3),
        7 => (r.below(5) as f32).to_bits(),
        8 => (r.below(1 << 33) as f32 / 4.0).to_bits(),
        9 => r.next() as u32 & 0x7fff_ffff,
        _ => 0x3e00_0000 + (r.next() as u32 & 0x03ff_ffff),
    };
    sign | magnitude
}

fn float64(r: &mut Rng) -> u64 {
    let sign = (r.next() & 1) << 63;
    let magnitude = match r.below(13) {
        0 => 0,
        1 => 0x7ff << 52,
        2 => 0xfff << 51 | r.next() >> 14,
        3 => 0x7ff << 52 | 1 | r.next() >> 14,
        4 => r.next() & ((1 << 52) - 1),
        5 => 1 << 52 | r.next() & 3,
        6 => (0x7ff << 52) - 1 - (r.next() & 3),
        7 => (r.below(5) as f64).to_bits(),
        8 => (r.next() as f64 / 4.0).to_bits(),
        // About where conversions to 32 bits overflow and underflow.
        9 => (0x47e + r.below(4)) << 52 | r.next() >> 12,
        10 => (0x37e + r.below(6)) << 52 | r.next() >> 12,
        11 => r.next() >> 1,
        _ => 0x3f8 << 52 | r.next() >> 5,
    };
    sign | magnitude & (u64::MAX >> 1)
}

fn float80(r: &mut Rng) -> u128 {
    let sign = u128::from(r.next() & 1) << 79;
    let (exponent, mantissa) = match r.below(14) {
        0 => (0, 0),
        1 => (0x7fff, 1 << 63),
        2 => (0x7fff, 3 << 62 | r.next() >> 2),
        3 => (0x7fff, 1 << 63 | 1 | r.next() >> 2),
        4 => (0, r.next() >> 1),
        // Pseudo-denormal, unnormal, pseudo-infinity.
        5 => (0, 1 << 63 | r.next()),
        6 => (r.below(0x7fff), r.next() >> 1),
        7 => (0x7fff, r.next() >> 1),
        8 => (0x3fff + r.below(4), 1 << 63),
        9 => (0x7ffe - r.below(3), 1 << 63 | r.next()),
        10 => (1 + r.below(3), 1 << 63 | r.next()),
        // About the limits of the shorter formats.
        11 => (
            [0x3f80, 0x407e, 0x3c00, 0x43fe, 0x400d, 0x401d, 0x403d][r.below(7) as usize] + r.below(3),
            1 << 63 | r.next(),
        ),
        12 => (0x3fff + r.below(80), 1 << 63 | r.next()),
        _ => (0x3fe0 + r.below(0x40), 1 << 63 | r.next() << r.below(64)),
    };
    sign | u128::from(exponent) << 64 | u128::from(mantissa)
}

/// 16 bytes that some format understands.
fn vector(r: &mut Rng) -> [u8; 16] {
    let mut b = [0; 16];
    match r.below(8) {
        0..=2 => b.as_chunks_mut::<4>().0.iter_mut().for_each(|e| *e = float32(r).to_le_bytes()),
        3 | 4 => b.as_chunks_mut::<8>().0.iter_mut().for_each(|e| *e = float64(r).to_le_bytes()),
        5 => b = float80(r).to_le_bytes(),
        // Text: few different characters, with zeros.
        6 => b.iter_mut().for_each(|e| *e = b"abc\0abcdef\x80\xff"[r.below(12) as usize]),
        _ => b.as_chunks_mut::<8>().0.iter_mut().for_each(|e| *e = r.operand().to_le_bytes()),
    }
    b
}

/// A random state. Exceptions are mostly masked; summary bits are as the flags and masks demand.
fn image(r: &mut Rng) -> [u8; 512] {
    let mut fx = fx_image();
    let masks = if r.one_in(3) { r.next() as u16 & 0x3f } else { 0x3f };
    let control = 0x40 | masks | r.next() as u16 & 0xf00;
    let flags = if r.one_in(4) { r.next() as u16 & 0x7f } else { 0 };
    let summary = if flags & !masks & 0x3f != 0 { 0x8080 } else { 0 };
    let status = flags | summary | r.next() as u16 & 0x7f00;
    let full = [0xff, 0xff, r.next() as u8, 0][r.below(4) as usize];
    fx[..2].copy_from_slice(&control.to_le_bytes());
    fx[2..4].copy_from_slice(&status.to_le_bytes());
    fx[4] = full;
    let masks = if r.one_in(3) { r.next() as u32 & 0x1f80 } else { 0x1f80 };
    let mxcsr = masks | r.next() as u32 & 0xe040 | if r.one_in(2) { r.next() as u32 & 0x3f } else { 0 };
    fx[MXCSR..MXCSR + 4].copy_from_slice(&mxcsr.to_le_bytes());
    for n in 0..8 {
        let v = if r.one_in(6) { 0xffff << 64 | u128::from(r.next()) } else { float80(r) };
        fx[ST + 16 * n..ST + 16 * n + 10].copy_from_slice(&v.to_le_bytes()[..10]);
    }
    for n in 0..16 {
        fx[XMM + 16 * n..XMM + 16 * n + 16].copy_from_slice(&vector(r));
    }
    fx
}

/// What of an image must agree.
fn comparable(fx: &[u8], bits: u32) -> Vec<u8> {
    let mut v = fx[..if bits == 64 { 416 } else { 288 }].to_vec();
    v[POINTERS].fill(0);
    v[MXCSR + 4..MXCSR + 8].fill(0);
    for n in 0..8 {
        v[ST + 16 * n + 10..ST + 16 * n + 16].fill(0);
    }
    v
}

/// Where an instruction stores FIP, FDP and FOP, which are the code's own.
fn stored_pointers(i: &Instruction) -> Option<std::ops::Range<usize>> {
    match (i.mnemonic(), i.memory_size().size()) {
        (Mnemonic::Fnstenv | Mnemonic::Fnsave, 14 | 94) => Some(6..14),
        (Mnemonic::Fnstenv | Mnemonic::Fnsave, _) => Some(12..28),
        (Mnemonic::Fxsave | Mnemonic::Fxsave64, _) => Some(POINTERS),
        _ => None,
    }
}

fn uses_mmx(i: &Instruction) -> bool {
    (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Register && i.op_register(n).is_mm())
}

impl Harness {
    pub fn compare_floats(&mut self, form: Form, templates: &[Template], r: &mut Rng) -> Verdict {
        let mut cases = 0;
        for _ in 0..ENCODINGS {
            let Some(bytes) = encode(form, self.bits, templates, r).and_then(|b| self.aim(b, r)) else { continue };
            let (i, _) = decode(&bytes, self.bits, INSN);
            self.host.place(self.bits, &bytes);
            self.rig.ram.write(CODE_GPA, self.host.code()).unwrap();
            let Some(&op) = self.rig.cpu.decode_for_test(&bytes).first() else { continue };
            for _ in 0..OPERANDS {
                let Some(mut before) = self.operands(&i, r) else { continue };
                before.fx = image(r);
                if let Some(a) = address(&i, &before.regs).filter(|a| (MIDDLE..MIDDLE + MIDDLE_LEN).contains(a)) {
                    let at = (a - SCRATCH) as usize;
                    before.memory[at..at + 16].copy_from_slice(&vector(r));
                }
                cases += 1;
                if let Err(text) = self.run_floats(&i, &op, &before) {
                    return Verdict::Differs(format!("{form:?} {bytes:02x?} {text}"));
                }
            }
        }
        if cases == 0 { Verdict::NotEncodable } else { Verdict::Agrees { undefined_flags_differ: 0 } }
    }

    fn run_floats(&mut self, i: &Instruction, op: &Op, before: &State) -> Result<(), String> {
        let mut expected = before.clone();
        let host_end = self.host.run(self.bits, &mut expected).map_or_else(End::from, |()| End::Done);
        let mut seen = before.clone();
        self.rig.cpu.set_fx(&before.fx);
        let end = self.run_guest(op, &mut seen, false);
        seen.fx[..416].copy_from_slice(&self.rig.cpu.fx());
        let flags_differ = (seen.flags ^ expected.flags) & (ARITHMETIC | DF) & !undefined_flags(i, before);
        let mut states = [&expected.fx, &seen.fx].map(|fx| comparable(fx, self.bits));
        if end != End::Done && uses_mmx(i) {
            // The host turns to MMX before it faults; here a fault leaves the state of the instruction's start.
            states.iter_mut().for_each(|fx| [0..6, ST..XMM].into_iter().for_each(|range| fx[range].fill(0)));
        }
        let [host_fx, guest_fx] = states;
        if let (Some(range), Some(a)) = (stored_pointers(i), address(i, &before.regs)) {
            let at = a.wrapping_sub(SCRATCH) as usize;
            for s in [&mut expected, &mut seen] {
                if let Some(bytes) = s.memory.get_mut(at.wrapping_add(range.start)..at.wrapping_add(range.end)) {
                    bytes.fill(0);
                }
            }
        }
        if end == host_end
            && seen.regs == expected.regs
            && flags_differ == 0
            && seen.memory == expected.memory
            && host_fx == guest_fx
        {
            return Ok(());
        }
        let mut text = explain(i, before, &expected, &seen, (host_end, end));
        let was = comparable(&before.fx, self.bits);
        for at in (0..was.len()).step_by(2).filter(|&at| host_fx[at..at + 2] != guest_fx[at..at + 2]).take(8) {
            let word = |v: &[u8]| u16::from_le_bytes([v[at], v[at + 1]]);
            let _ = write!(
                text,
                "; fx[{at}] was {:#06x}: host {:#06x}, guest {:#06x}",
                word(&was),
                word(&host_fx),
                word(&guest_fx)
            );
        }
        let hex = |at: usize, n: usize| was[at..at + n].iter().rev().map(|b| format!("{b:02x}")).collect::<String>();
        let _ = write!(text, "; control {} status {} full {} mxcsr {}", hex(0, 2), hex(2, 2), hex(4, 1), hex(MXCSR, 4));
        if let Some(a) = address(i, &before.regs).filter(|a| (MIDDLE..MIDDLE + MIDDLE_LEN).contains(a)) {
            let at = (a - SCRATCH) as usize;
            let _ = write!(text, "; at {a:#x}: {:02x?}", &before.memory[at..at + 16]);
        }
        for n in 0..i.op_count().min(2) {
            if i.op_kind(n) == OpKind::Register {
                let (register, number) = (i.op_register(n), i.op_register(n).number());
                if register.is_xmm() {
                    let _ = write!(text, "; {register:?} {}", hex(XMM + 16 * number, 16));
                } else if register.is_st() || register.is_mm() {
                    let _ = write!(text, "; {register:?} {}", hex(ST + 16 * number, 10));
                }
            }
        }
        Err(text)
    }
}
