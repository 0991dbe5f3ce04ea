//! General registers, as the operations address them.

use crate::mem::Word;

/// Register file indices beyond the sixteen general registers. Address computation reads them as it reads any base or
/// index register, so that absent ones and RIP need no branch.
pub mod slot {
    pub const RAX: u8 = 0;
    pub const RCX: u8 = 1;
    pub const RDX: u8 = 2;
    pub const RBX: u8 = 3;
    pub const RSP: u8 = 4;
    pub const RBP: u8 = 5;
    pub const RSI: u8 = 6;
    pub const RDI: u8 = 7;
    /// Always 0: no base, no index.
    pub const ZERO: u8 = 16;
    /// The RIP of the running block's first instruction; between blocks, RIP.
    pub const RIP: u8 = 17;
    /// Always 0x1000: carries RIP-relative displacements that no longer fit 32 bits once they are block-relative.
    pub const PAGE: u8 = 18;
}

/// In an operand's register number: AH, CH, DH or BH.
pub const HIGH_BYTE: u8 = 0x20;

#[derive(Clone, Debug)]
pub struct Regs([u64; 32]);

impl Default for Regs {
    fn default() -> Self {
        let mut r = [0; 32];
        r[slot::PAGE as usize] = 0x1000;
        Self(r)
    }
}

impl Regs {
    /// The whole register.
    #[inline(always)]
    pub fn r(&self, n: u8) -> u64 {
        self.0[usize::from(n & 31)]
    }

    #[inline(always)]
    pub fn set_r(&mut self, n: u8, v: u64) {
        self.0[usize::from(n & 31)] = v;
    }

    #[inline(always)]
    pub fn get<W: Word>(&self, n: u8) -> W {
        let v = self.r(n);
        if W::BYTES == 1 { W::from_u64(v >> ((n >> 5) * 8)) } else { W::from_u64(v) }
    }

    /// 32-bit writes clear the upper half, narrower ones keep the rest (SDM 1, "General-Purpose Registers in 64-Bit Mode").
    #[inline(always)]
    pub fn put<W: Word>(&mut self, n: u8, v: W) {
        let slot = &mut self.0[usize::from(n & 31)];
        match W::BYTES {
            1 => {
                let shift = (n >> 5) * 8;
                *slot = *slot & !(0xff << shift) | v.to_u64() << shift;
            }
            2 => *slot = *slot & !0xffff | v.to_u64(),
            _ => *slot = v.to_u64(),
        }
    }

    #[inline(always)]
    pub fn rip(&self) -> u64 {
        self.r(slot::RIP)
    }

    #[inline(always)]
    pub fn set_rip(&mut self, v: u64) {
        self.set_r(slot::RIP, v);
    }

    /// The sixteen general registers.
    pub fn general(&self) -> [u64; 16] {
        std::array::from_fn(|i| self.0[i])
    }

    pub fn set_general(&mut self, values: &[u64; 16]) {
        self.0[..16].copy_from_slice(values);
    }
}
