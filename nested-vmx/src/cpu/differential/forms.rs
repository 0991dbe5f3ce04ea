//! The forms of instructions: found by decoding all opcodes, not by a list.

use super::random::Rng;
use iced_x86::{Code, CpuidFeature, Decoder, DecoderOptions, EncodingKind, Instruction, OpKind};
use std::collections::BTreeMap;

/// A way to encode an instruction that its tests must cover.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Form {
    pub code: Code,
    /// It has a ModR/M memory operand.
    pub memory: bool,
    pub prefix: Prefix,
}

/// A prefix that makes another form: LOCK, and the repeats of string instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Prefix {
    None,
    Lock,
    Rep,
    Repne,
}

/// An opcode with what of its ModR/M byte may matter.
#[derive(Clone, Debug)]
pub struct Template {
    head: Head,
    opcode: u8,
    /// ModR/M.reg, and for register forms ModR/M.rm.
    reg: u8,
    rm: u8,
    memory: bool,
}

#[derive(Clone, Copy, Debug)]
enum Head {
    /// Legacy prefixes (0 is none), REX.W, and the opcode's map.
    Legacy {
        prefix: u8,
        operand_size: bool,
        w: bool,
        map: &'static [u8],
    },
    Vex {
        map: u8,
        pp: u8,
        w: bool,
    },
}

const MAPS: [&[u8]; 4] = [&[], &[0x0f], &[0x0f, 0x38], &[0x0f, 0x3a]];

pub fn is_memory(i: &Instruction) -> bool {
    (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Memory)
}

impl Form {
    pub fn of(i: &Instruction) -> Self {
        let prefix = if i.has_lock_prefix() {
            Prefix::Lock
        } else if i.is_string_instruction() && i.has_rep_prefix() {
            Prefix::Rep
        } else if i.is_string_instruction() && i.has_repne_prefix() {
            Prefix::Repne
        } else {
            Prefix::None
        };
        Self { code: i.code(), memory: is_memory(i), prefix }
    }
}

impl Template {
    /// One encoding, the bytes behind it random; `r` also chooses registers and addressing where they do not matter.
    fn bytes(&self, bits: u32, r: &mut Rng, plain: bool) -> Vec<u8> {
        let mut b = Vec::with_capacity(32);
        let high = if plain || bits != 64 { 0 } else { r.next() as u8 & 7 };
        // A 67 prefix changes nothing but the address's size. No memory of the host is at 16-bit addresses.
        if bits == 64 && !plain && r.one_in(8) {
            b.push(0x67);
        }
        match self.head {
            Head::Legacy { prefix, operand_size, w, map } => {
                if operand_size {
                    b.push(0x66);
                }
                if prefix != 0 {
                    b.push(prefix);
                }
                if bits == 64 && (w || high != 0 || !plain && r.one_in(4)) {
                    b.push(0x40 | u8::from(w) << 3 | high);
                }
                b.extend_from_slice(map);
            }
            Head::Vex { map, pp, w } => {
                let vvvv = if plain { 0xf } else { r.next() as u8 & 0xf };
                // R, X and B are inverted; outside 64-bit mode only ones keep it from being LES.
                b.extend([0xc4, !(high << 5) & 0xe0 | map, u8::from(w) << 7 | vvvv << 3 | pp]);
            }
        }
        b.push(self.opcode);
        let modrm = match (self.memory, plain) {
            (true, true) => 0,
            (true, false) => ((r.next() as u8) % 3) << 6 | r.next() as u8 & 7,
            (false, _) => 0xc0 | self.rm,
        };
        b.push(modrm | self.reg << 3);
        b.extend((0..16).map(|_| if plain { 0 } else { r.next() as u8 }));
        b
    }

    /// The plainest encoding.
    pub fn example_bytes(&self, bits: u32) -> Option<Vec<u8>> {
        let bytes = self.bytes(bits, &mut Rng::new(0), true);
        let (i, _) = decode(&bytes, bits, 0);
        (!i.is_invalid()).then(|| bytes[..i.len()].to_vec())
    }

    /// A random encoding of the form, if the dice are lucky.
    pub fn encode(&self, form: Form, bits: u32, ip: u64, r: &mut Rng) -> Option<Vec<u8>> {
        let bytes = self.bytes(bits, r, false);
        let (i, _) = decode(&bytes, bits, ip);
        (Form::of(&i) == form).then(|| bytes[..i.len()].to_vec())
    }
}

/// The instruction, and where its displacement and immediate are.
pub fn decode(bytes: &[u8], bits: u32, ip: u64) -> (Instruction, iced_x86::ConstantOffsets) {
    let mut decoder = Decoder::with_ip(bits, bytes, ip, DecoderOptions::NONE);
    let i = decoder.decode();
    let offsets = decoder.get_constant_offsets(&i);
    (i, offsets)
}

/// Every form that exists in 16, 32 or 64-bit code.
pub fn all(bits: u32) -> BTreeMap<Form, Vec<Template>> {
    let mut heads = Vec::new();
    for map in MAPS {
        for prefix in [0, 0xf0, 0xf2, 0xf3] {
            for operand_size in [false, true] {
                for w in [false, true] {
                    heads.push(Head::Legacy { prefix, operand_size, w: w && bits == 64, map });
                }
            }
        }
    }
    for map in 1..=3 {
        for pp in 0..4 {
            heads.extend([false, true].map(|w| Head::Vex { map, pp, w }));
        }
    }
    let mut forms: BTreeMap<Form, Vec<Template>> = BTreeMap::new();
    let mut r = Rng::new(1);
    for head in heads {
        for opcode in 0..=255 {
            for reg in 0..8 {
                // All of ModR/M.rm: some opcodes have instructions there.
                for (memory, rm) in [(true, 0)].into_iter().chain((0..8).map(|rm| (false, rm))) {
                    let t = Template { head, opcode, reg, rm, memory };
                    let bytes = t.bytes(bits, &mut r, true);
                    let (i, _) = decode(&bytes, bits, 0);
                    // Templates that begin with a prefix or an escape belong to another head.
                    let misread = i.len() == 0 || is_prefix(opcode, head, bits);
                    if !i.is_invalid() && !misread {
                        forms.entry(Form::of(&i)).or_default().push(t);
                    }
                }
            }
        }
    }
    forms
}

fn is_prefix(opcode: u8, head: Head, bits: u32) -> bool {
    let Head::Legacy { map, .. } = head else { return false };
    match (map.len(), opcode) {
        (0, 0x0f | 0x26 | 0x2e | 0x36 | 0x3e | 0x64..=0x67 | 0xf0 | 0xf2 | 0xf3) => true,
        (0, 0x40..=0x4f) => bits == 64,
        // VEX, EVEX and XOP.
        (0, 0xc4 | 0xc5 | 0x62 | 0x8f) => bits == 64 && opcode != 0x8f,
        (1, 0x38 | 0x3a) => true,
        _ => false,
    }
}

/// Where CPUID tells of a feature: leaf, subleaf, register, bit. None: all processors of x86-64 have it.
type Place = Option<(u32, u32, usize, u32)>;

fn place(f: CpuidFeature) -> Option<Place> {
    use CpuidFeature::*;
    Some(Some(match f {
        INTEL8086 | INTEL186 | INTEL286 | INTEL386 | INTEL486 | X64 | CPUID | MULTIBYTENOP | PAUSE => {
            return Some(None);
        }
        FPU | FPU287 | FPU387 => (1, 0, 3, 0),
        TSC => (1, 0, 3, 4),
        MSR => (1, 0, 3, 5),
        CX8 => (1, 0, 3, 8),
        SEP => (1, 0, 3, 11),
        CMOV => (1, 0, 3, 15),
        CLFSH => (1, 0, 3, 19),
        MMX => (1, 0, 3, 23),
        FXSR => (1, 0, 3, 24),
        SSE => (1, 0, 3, 25),
        SSE2 => (1, 0, 3, 26),
        SSE3 => (1, 0, 2, 0),
        PCLMULQDQ => (1, 0, 2, 1),
        MONITOR => (1, 0, 2, 3),
        VMX | INVEPT | INVVPID => (1, 0, 2, 5),
        SSSE3 => (1, 0, 2, 9),
        CMPXCHG16B => (1, 0, 2, 13),
        SSE4_1 => (1, 0, 2, 19),
        SSE4_2 => (1, 0, 2, 20),
        MOVBE => (1, 0, 2, 22),
        POPCNT => (1, 0, 2, 23),
        AES => (1, 0, 2, 25),
        XSAVE => (1, 0, 2, 26),
        AVX => (1, 0, 2, 28),
        RDRAND => (1, 0, 2, 30),
        FSGSBASE => (7, 0, 1, 0),
        BMI1 => (7, 0, 1, 3),
        AVX2 => (7, 0, 1, 5),
        BMI2 => (7, 0, 1, 8),
        INVPCID => (7, 0, 1, 10),
        RDSEED => (7, 0, 1, 18),
        ADX => (7, 0, 1, 19),
        SMAP => (7, 0, 1, 20),
        CLFLUSHOPT => (7, 0, 1, 23),
        CLWB => (7, 0, 1, 24),
        SHA => (7, 0, 1, 29),
        RDPID => (7, 0, 2, 22),
        XSAVEOPT => (0xd, 1, 0, 0),
        XSAVEC => (0xd, 1, 0, 1),
        XSAVES => (0xd, 1, 0, 3),
        LZCNT => (0x8000_0001, 0, 2, 5),
        PREFETCHW => (0x8000_0001, 0, 2, 8),
        SYSCALL => (0x8000_0001, 0, 3, 11),
        RDTSCP => (0x8000_0001, 0, 3, 27),
        _ => return None,
    }))
}

/// Whether a processor with this CPUID has the instruction.
pub fn has_features(code: Code, cpuid: impl Fn(u32, u32) -> [u32; 4]) -> bool {
    code.cpuid_features().iter().all(|&f| has_feature(f, &cpuid))
}

pub fn has_feature(f: CpuidFeature, cpuid: impl Fn(u32, u32) -> [u32; 4]) -> bool {
    match place(f) {
        Some(Some((leaf, subleaf, register, bit))) => cpuid(leaf, subleaf)[register] >> bit & 1 != 0,
        Some(None) => true,
        None => false,
    }
}

/// Brings x87, MMX or XMM instructions, or their state.
fn vector(f: &CpuidFeature) -> bool {
    use CpuidFeature::*;
    matches!(
        f,
        FPU | FPU287
            | FPU387
            | MMX
            | SSE
            | SSE2
            | SSE3
            | SSSE3
            | SSE4_1
            | SSE4_2
            | AES
            | PCLMULQDQ
            | SHA
            | AVX
            | AVX2
            | FXSR
            | XSAVE
            | XSAVEOPT
            | XSAVEC
            | XSAVES
    )
}

/// Works on x87, MMX or XMM registers, or on their state.
pub fn is_vector(code: Code) -> bool {
    // XSAVES and XRSTORS are not offered.
    code.cpuid_features().iter().any(|f| vector(f) && *f != CpuidFeature::XSAVES)
}

/// Works on general registers and memory only.
pub fn is_integer(i: &Instruction) -> bool {
    let general = (0..i.op_count()).all(|n| i.op_kind(n) != OpKind::Register || i.op_register(n).is_gpr());
    let mut vectors = i.code().cpuid_features().iter().filter(|f| vector(f));
    match i.code().encoding() {
        EncodingKind::Legacy | EncodingKind::VEX => {}
        _ => return false,
    }
    use iced_x86::Mnemonic as M;
    let small = matches!(
        i.mnemonic(),
        M::Crc32
            | M::Movnti
            | M::Lfence
            | M::Mfence
            | M::Sfence
            | M::Prefetchnta
            | M::Prefetcht0
            | M::Prefetcht1
            | M::Prefetcht2
            | M::Pause
    );
    // WAIT has no operands, and is the x87's all the same.
    general && i.mnemonic() != M::Wait && (small || vectors.next().is_none())
}
