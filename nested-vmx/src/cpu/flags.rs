//! RFLAGS. The six status flags are kept as the last result and its carries, and computed when asked for.

use crate::mem::Word;

pub use crate::arch::cr::rflags::*;
/// Bits that exist; bit 1 always reads 1.
pub const DEFINED: u64 = !RESERVED & !FIXED1;

/// `carries`: bit 63 the carry (borrow) out of the operand's most significant bit, bit 62 the one into it, bit 3 the one
/// out of bit 3. Two corrections let any combination of flags be set: bit 0 inverts SF, bits 8..16 are XORed to the
/// result's low byte before its parity is taken.
#[derive(Clone, Copy, Debug)]
pub struct Flags {
    /// Sign-extended from the operand's width.
    result: u64,
    carries: u64,
    /// All other bits of RFLAGS.
    other: u64,
}

const CARRY: u64 = 1 << 63;
const CARRY_IN: u64 = 1 << 62;
const HALF: u64 = 1 << 3;
const INVERT_SF: u64 = 1;
const PARITY_SHIFT: u32 = 8;

impl Default for Flags {
    fn default() -> Self {
        Self::from_bits(FIXED1)
    }
}

impl Flags {
    pub fn from_bits(bits: u64) -> Self {
        let mut f = Self { result: 0, carries: 0, other: FIXED1 };
        f.set_bits(bits);
        f
    }

    pub fn bits(&self) -> u64 {
        self.other | self.status()
    }

    pub fn set_bits(&mut self, bits: u64) {
        self.other = bits & (DEFINED & !ARITHMETIC) | FIXED1;
        self.set_status(bits);
    }

    pub fn status(&self) -> u64 {
        let mut s = 0;
        s |= if self.cf() { CF } else { 0 };
        s |= if self.pf() { PF } else { 0 };
        s |= if self.af() { AF } else { 0 };
        s |= if self.zf() { ZF } else { 0 };
        s |= if self.sf() { SF } else { 0 };
        s | if self.of() { OF } else { 0 }
    }

    pub fn set_status(&mut self, bits: u64) {
        let (cf, of) = (bits & CF != 0, bits & OF != 0);
        // A result with a zero low byte and a clear sign; the corrections do the rest.
        self.result = if bits & ZF != 0 { 0 } else { 0x100 };
        self.carries = u64::from(cf) << 63
            | u64::from(cf != of) << 62
            | if bits & AF != 0 { HALF } else { 0 }
            | u64::from(bits & PF == 0) << PARITY_SHIFT
            | u64::from(bits & SF != 0);
    }

    /// Bits other than the status flags.
    #[inline(always)]
    pub fn has(&self, bit: u64) -> bool {
        self.other & bit != 0
    }

    #[inline(always)]
    pub fn set(&mut self, bit: u64, on: bool) {
        if on {
            self.other |= bit;
        } else {
            self.other &= !bit;
        }
    }

    #[inline(always)]
    pub fn cf(&self) -> bool {
        self.carries & CARRY != 0
    }

    #[inline(always)]
    pub fn of(&self) -> bool {
        (self.carries ^ self.carries << 1) & CARRY != 0
    }

    #[inline(always)]
    pub fn af(&self) -> bool {
        self.carries & HALF != 0
    }

    #[inline(always)]
    pub fn zf(&self) -> bool {
        self.result == 0
    }

    #[inline(always)]
    pub fn sf(&self) -> bool {
        (self.result >> 63) ^ (self.carries & INVERT_SF) != 0
    }

    #[inline(always)]
    pub fn pf(&self) -> bool {
        ((self.result ^ self.carries >> PARITY_SHIFT) as u8).count_ones().is_multiple_of(2)
    }

    /// Keeps every other flag.
    #[inline(always)]
    pub fn set_cf(&mut self, cf: bool) {
        // OF is the XOR of both carry bits: flip both.
        if cf != self.cf() {
            self.carries ^= CARRY | CARRY_IN;
        }
    }

    #[inline(always)]
    pub fn set_zf(&mut self, zf: bool) {
        if zf != self.zf() {
            let s = self.status();
            self.set_status(if zf { s | ZF } else { s & !ZF });
        }
    }

    /// Keeps CF.
    #[inline(always)]
    pub fn set_of(&mut self, of: bool) {
        if of != self.of() {
            self.carries ^= CARRY_IN;
        }
    }

    #[inline(always)]
    fn put<W: Word>(&mut self, result: W, carries: u64) {
        self.result = result.to_i64() as u64;
        self.carries = (carries << (64 - W::BITS)) & (CARRY | CARRY_IN) | carries & HALF;
    }

    /// `result = a + b (+ carry)`.
    #[inline(always)]
    pub fn add<W: Word>(&mut self, a: W, b: W, result: W) {
        let carries = (a & b) | ((a | b) & !result);
        self.put(result, carries.to_u64());
    }

    /// `result = a - b (- borrow)`.
    #[inline(always)]
    pub fn sub<W: Word>(&mut self, a: W, b: W, result: W) {
        let borrows = (!a & b) | ((!a | b) & result);
        self.put(result, borrows.to_u64());
    }

    /// AND, OR, XOR, TEST: CF = OF = 0; AF, undefined, is 0.
    #[inline(always)]
    pub fn logic<W: Word>(&mut self, result: W) {
        self.result = result.to_i64() as u64;
        self.carries = 0;
    }

    /// SF, ZF, PF by the result, CF and OF as given; AF, undefined, is 0.
    #[inline(always)]
    pub fn result_cf_of<W: Word>(&mut self, result: W, cf: bool, of: bool) {
        self.result = result.to_i64() as u64;
        self.carries = u64::from(cf) << 63 | u64::from(cf != of) << 62;
    }

    /// MUL and IMUL: CF and OF as given; the undefined ones as Intel's have them: SF and PF by the low half, ZF and AF 0.
    #[inline(always)]
    pub fn product<W: Word>(&mut self, low: W, over: bool) {
        // A zero low byte with another bit set has the parity and sign of zero.
        self.result = low.to_i64() as u64 | u64::from(low == W::default()) << 8;
        self.carries = u64::from(over) << 63;
    }

    /// PF becomes 0.
    #[inline(always)]
    pub fn clear_pf(&mut self) {
        self.carries ^= u64::from(self.pf()) << PARITY_SHIFT;
    }

    /// INC and DEC: as add or sub by one, CF kept.
    #[inline(always)]
    pub fn inc<W: Word>(&mut self, a: W, result: W) {
        let cf = self.cf();
        self.add(a, W::from_u64(1), result);
        self.set_cf(cf);
    }

    #[inline(always)]
    pub fn dec<W: Word>(&mut self, a: W, result: W) {
        let cf = self.cf();
        self.sub(a, W::from_u64(1), result);
        self.set_cf(cf);
    }

    /// The condition of Jcc, SETcc and CMOVcc, by the low four bits of their opcode.
    #[inline(always)]
    pub fn condition(&self, cc: u8) -> bool {
        let c = match cc >> 1 & 7 {
            0 => self.of(),
            1 => self.cf(),
            2 => self.zf(),
            3 => self.cf() || self.zf(),
            4 => self.sf(),
            5 => self.pf(),
            6 => self.sf() != self.of(),
            _ => self.zf() || self.sf() != self.of(),
        };
        c != (cc & 1 != 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_combination_of_status_flags_reads_back() {
        for n in 0..64u64 {
            let bits = [CF, PF, AF, ZF, SF, OF].iter().enumerate().fold(0, |b, (i, f)| b | (((n >> i) & 1) * f));
            let mut f = Flags::from_bits(bits | IF);
            assert_eq!(f.bits(), bits | IF | FIXED1);
            f.set_cf(bits & CF == 0);
            assert_eq!(f.status(), bits ^ CF);
            f.set_cf(bits & CF != 0);
            f.set_zf(bits & ZF == 0);
            assert_eq!(f.status(), bits ^ ZF);
            f.set_zf(bits & ZF != 0);
            f.set_of(bits & OF == 0);
            assert_eq!(f.status(), bits ^ OF);
        }
    }

    #[test]
    fn eight_bit_sums_and_differences_have_the_flags_of_the_definition() {
        for a in 0..=255u8 {
            for b in 0..=255u8 {
                let mut f = Flags::default();
                let r = a.wrapping_add(b);
                f.add(a, b, r);
                assert_eq!((f.cf(), f.of()), (a.checked_add(b).is_none(), (a as i8).checked_add(b as i8).is_none()));
                assert_eq!(f.af(), (a & 15) + (b & 15) > 15);
                let r = a.wrapping_sub(b);
                f.sub(a, b, r);
                assert_eq!((f.cf(), f.of()), (b > a, (a as i8).checked_sub(b as i8).is_none()));
                assert_eq!(f.af(), (b & 15) > (a & 15));
                assert_eq!((f.zf(), f.sf(), f.pf()), (r == 0, r > 127, r.count_ones() % 2 == 0));
            }
        }
    }
}
