//! Operands: random, with a liking for edges.

pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// SplitMix64.
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    /// An integer operand.
    pub fn operand(&mut self) -> u64 {
        const EDGES: [u64; 12] = [0, 1, 2, 0x7f, 0x80, 0xff, 0x7fff, 0x8000, 0x7fff_ffff, 0x8000_0000, 1 << 63, !0];
        let edge = EDGES[self.below(12) as usize];
        match self.below(8) {
            0 | 1 => edge,
            2 => edge ^ self.next() << 32,
            3 => self.below(70),
            4 => self.below(70).wrapping_neg(),
            5 => 1 << self.below(64),
            _ => self.next(),
        }
    }
}
