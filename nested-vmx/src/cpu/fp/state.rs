//! The registers of x87, MMX and SSE.

use serde::{Deserialize, Serialize};

/// MXCSR after RESET and in the XSAVE family's initial state: all exceptions masked.
pub(super) const MXCSR_DEFAULT: u32 = 0x1f80;
/// MXCSR bits that exist (MXCSR_MASK).
pub(super) const MXCSR_MASK: u32 = 0xffff;

/// The x87 control word after FNINIT.
pub(super) const CONTROL_DEFAULT: u16 = 0x037f;
/// Bits of the control word that can be changed; bit 6 reads 1.
const CONTROL_MASK: u16 = 0x1f3f;
const CONTROL_FIXED1: u16 = 0x0040;

/// Bits of the x87 status word (SDM 1, "x87 FPU Status Register").
pub(super) mod status {
    /// IE DE ZE OE UE PE.
    pub const EXCEPTIONS: u16 = 0x3f;
    /// The exception flags with the stack fault.
    pub const FLAGS: u16 = 0x7f;
    /// Error summary, and B, which is its copy.
    pub const SUMMARY: u16 = 0x8080;
    pub const C1: u16 = 1 << 9;
    pub const TOP_SHIFT: u32 = 11;
    pub const TOP: u16 = 7 << TOP_SHIFT;
}

/// 80-bit registers are kept in the low bits of 128.
pub(super) const F80: u128 = (1 << 80) - 1;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FpState {
    #[serde(with = "halves")]
    pub(super) xmm: [u128; 16],
    pub(super) mxcsr: u32,
    /// R0 to R7, not ST(0) to ST(7). MMn is the low 64 bits of Rn.
    #[serde(with = "halves")]
    pub(super) r: [u128; 8],
    pub(super) control: u16,
    pub(super) status: u16,
    /// Bit n: Rn is not empty. This is FXSAVE's abridged tag word.
    pub(super) full: u8,
    /// The last instruction's opcode, its address, and its memory operand's. FCS and FDS are always 0 (CPUID.7:EBX[13]).
    pub(super) opcode: u16,
    pub(super) instruction: u64,
    pub(super) data: u64,
}

impl Default for FpState {
    /// As RESET leaves it (SDM 3, "Processor State After Reset").
    fn default() -> Self {
        Self {
            xmm: [0; 16],
            mxcsr: MXCSR_DEFAULT,
            r: [0; 8],
            control: CONTROL_FIXED1,
            status: 0,
            full: 0xff,
            opcode: 0,
            instruction: 0,
            data: 0,
        }
    }
}

impl FpState {
    /// Whether a processor can have this state.
    pub(crate) fn valid(&self) -> bool {
        self.mxcsr & !MXCSR_MASK == 0 && self.r.iter().all(|r| r & !F80 == 0)
    }

    pub(super) fn mm(&self, n: u8) -> u64 {
        self.r[usize::from(n & 7)] as u64
    }

    /// An MMX instruction other than EMMS: TOP becomes 0, all registers valid (SDM 1, "MMX Instructions and the x87 FPU
    /// Tag Word").
    pub(super) fn enter_mmx(&mut self) {
        self.status &= !status::TOP;
        self.full = 0xff;
    }

    /// An MMX instruction's result; the exponent and sign become all ones.
    pub(super) fn set_mm(&mut self, n: u8, v: u64) {
        self.enter_mmx();
        self.r[usize::from(n & 7)] = 0xffff << 64 | u128::from(v);
    }

    pub(super) fn top(&self) -> usize {
        usize::from(self.status >> status::TOP_SHIFT & 7)
    }

    pub(super) fn set_top(&mut self, top: usize) {
        self.status = self.status & !status::TOP | (top as u16 & 7) << status::TOP_SHIFT;
    }

    /// An unmasked exception waits for the next waiting instruction.
    pub(super) fn pending(&self) -> bool {
        self.status & !self.control & status::EXCEPTIONS != 0
    }

    /// ES and B follow the flags and masks.
    pub(super) fn summarize(&mut self) {
        if self.pending() {
            self.status |= status::SUMMARY;
        } else {
            self.status &= !status::SUMMARY;
        }
    }

    pub(super) fn set_control(&mut self, v: u16) {
        self.control = v & CONTROL_MASK | CONTROL_FIXED1;
        self.summarize();
    }

    pub(super) fn set_status(&mut self, v: u16) {
        self.status = v;
        self.summarize();
    }

    /// FNINIT; the registers keep their values.
    pub(super) fn init_x87(&mut self) {
        self.control = CONTROL_DEFAULT;
        self.status = 0;
        self.full = 0;
        (self.opcode, self.instruction, self.data) = (0, 0, 0);
    }

    /// The full tag word (SDM 1, "x87 FPU Tag Word").
    pub(super) fn tags(&self) -> u16 {
        (0..8).fold(0, |word, n| {
            let v = self.r[n];
            let (exponent, integer_bit) = (v >> 64 & 0x7fff, v >> 63 & 1 != 0);
            let tag = match () {
                _ if self.full >> n & 1 == 0 => 3,
                _ if exponent == 0 && v as u64 == 0 => 1,
                _ if exponent == 0 || exponent == 0x7fff || !integer_bit => 2,
                _ => 0,
            };
            word | tag << (2 * n)
        })
    }

    /// Of a full tag word only "empty" matters.
    pub(super) fn set_tags(&mut self, word: u16) {
        self.full = (0..8).fold(0, |full, n| full | u8::from(word >> (2 * n) & 3 != 3) << n);
    }

    pub(super) fn st(&self, n: usize) -> u128 {
        self.r[(self.top() + n) & 7]
    }

    pub(super) fn set_st(&mut self, n: usize, v: u128) {
        let at = (self.top() + n) & 7;
        self.r[at] = v & F80;
    }
}

/// 128-bit registers as pairs of 64-bit numbers (low, high), which every serialization format has.
mod halves {
    use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};

    pub fn serialize<S: Serializer, const N: usize>(v: &[u128; N], s: S) -> Result<S::Ok, S::Error> {
        v.map(|r| [r as u64, (r >> 64) as u64]).to_vec().serialize(s)
    }

    pub fn deserialize<'de, D: Deserializer<'de>, const N: usize>(d: D) -> Result<[u128; N], D::Error> {
        let v = Vec::<[u64; 2]>::deserialize(d)?;
        let n = v.len();
        let v: [[u64; 2]; N] = v.try_into().map_err(|_| D::Error::invalid_length(n, &"one pair per register"))?;
        Ok(v.map(|[low, high]| u128::from(low) | u128::from(high) << 64))
    }
}
