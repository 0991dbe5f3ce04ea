//! From bytes to operations: iced-x86 decodes, the families of [`super::exec`] choose the handlers.

use super::exec;
use super::mode::Mode;
use super::op::{Handler, Op, chain_any, chain_fast, op_flags};
use super::regs::{HIGH_BYTE, slot};
use super::seg::reg;
use super::{Cpu, Flow, Stop};
use iced_x86::{Decoder, DecoderError, DecoderOptions, FlowControl, Instruction, OpKind, Register};

/// An instruction while its operation is made. A family's `select` reads `i`, may change `op` and `ends`, and returns
/// the handler.
pub(crate) struct Decoded<'a> {
    pub i: &'a Instruction,
    pub bytes: &'a [u8],
    /// Operands filled in: `dst` and `src` are the general registers of operands 0 and 1 (where they are), `imm` the last
    /// immediate or branch target, and the memory operand's parts.
    pub op: Op,
    pub mode: Mode,
    /// The effective operand-size attribute: 16, 32 or 64.
    pub operand_bits: u32,
    /// The effective address-size attribute: 16, 32 or 64.
    pub address_bits: u32,
    /// The operation's place in its block.
    pub index: u16,
    /// The block ends behind this operation, without a branch: it may unmask an event, or change what later
    /// instructions decode to.
    pub ends: bool,
    pub shape: Shape,
}

/// Kinds of operands 0 and 1, as the integer families see them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shape {
    None,
    R,
    M,
    I,
    RR,
    RM,
    MR,
    RI,
    MI,
    Other,
}

/// The operations of a basic block.
pub(super) struct BlockCode {
    pub ops: Vec<Op>,
    pub count: u16,
    pub bytes: u16,
}

/// What decoding from some bytes led to.
pub(super) enum DecodeResult {
    Block(BlockCode),
    /// Not even the first instruction is complete: more bytes (of the next page) are needed.
    NeedsMore,
}

/// Decodes from `bytes`, which end at a page boundary (or behind 15 bytes that cross it).
pub(super) fn decode(bytes: &[u8], mode: Mode, max_ops: usize) -> DecodeResult {
    let mut decoder = Decoder::with_ip(mode.code_bits.into(), bytes, 0, DecoderOptions::NONE);
    let mut i = Instruction::default();
    let mut ops: Vec<Op> = Vec::with_capacity(16);
    let mut end = 0u16;
    while ops.len() < max_ops {
        let start = decoder.position();
        decoder.decode_out(&mut i);
        if i.is_invalid() && decoder.last_error() == DecoderError::NoMoreBytes {
            break;
        }
        end = decoder.position() as u16;
        let (op, ends) = lower(&i, &bytes[start..usize::from(end)], mode, end, ops.len() as u16);
        ops.push(op);
        if ends {
            let count = ops.len() as u16;
            if i.flow_control() == FlowControl::Next || i.is_invalid() {
                ops.push(advance(end));
            }
            return DecodeResult::Block(BlockCode { ops, count, bytes: end });
        }
    }
    if ops.is_empty() {
        return DecodeResult::NeedsMore;
    }
    let count = ops.len() as u16;
    ops.push(advance(end));
    DecodeResult::Block(BlockCode { ops, count, bytes: end })
}

/// The pseudo-operation at the end of a block without a branch.
fn advance(end: u16) -> Op {
    fn handler(cpu: &mut Cpu, op: &Op) -> Flow {
        cpu.advance(op);
        Ok(())
    }
    Op { chain: |cpu, op, rest| chain_fast(cpu, op, rest, infallible(handler)), handler, end, len: 0, ..EMPTY }
}

const EMPTY: Op = Op {
    chain: chain_any,
    handler: undefined,
    imm: 0,
    disp: 0,
    end: 0,
    code: 0,
    dst: slot::ZERO,
    src: slot::ZERO,
    base: slot::ZERO,
    index: slot::ZERO,
    scale: 0,
    seg: reg::DS,
    len: 0,
    flags: 0,
};

fn undefined(_: &mut Cpu, _: &Op) -> Flow {
    Err(Stop::UD)
}

/// The register-file number of a general register, [`slot::ZERO`] for others.
pub(super) fn gpr(r: Register) -> u8 {
    match r {
        Register::None => slot::ZERO,
        Register::AH | Register::CH | Register::DH | Register::BH => (r as u32 - Register::AH as u32) as u8 | HIGH_BYTE,
        Register::RIP | Register::EIP => slot::RIP,
        r if r.is_gpr() => r.full_register().number() as u8,
        _ => slot::ZERO,
    }
}

/// The number in [`super::seg::reg`] of a segment register.
pub(super) fn segment(r: Register) -> u8 {
    match r {
        Register::ES => reg::ES,
        Register::CS => reg::CS,
        Register::SS => reg::SS,
        Register::FS => reg::FS,
        Register::GS => reg::GS,
        _ => reg::DS,
    }
}

fn kind(i: &Instruction, n: u32) -> char {
    if n >= i.op_count() {
        return '-';
    }
    match i.op_kind(n) {
        OpKind::Register if i.op_register(n).is_gpr() => 'R',
        OpKind::Register => 'o',
        OpKind::Memory => 'M',
        OpKind::Immediate8
        | OpKind::Immediate16
        | OpKind::Immediate32
        | OpKind::Immediate64
        | OpKind::Immediate8to16
        | OpKind::Immediate8to32
        | OpKind::Immediate8to64
        | OpKind::Immediate32to64 => 'I',
        _ => 'o',
    }
}

fn shape(i: &Instruction) -> Shape {
    match (kind(i, 0), kind(i, 1)) {
        ('-', '-') => Shape::None,
        ('R', '-') => Shape::R,
        ('M', '-') => Shape::M,
        ('I', '-') => Shape::I,
        ('R', 'R') => Shape::RR,
        ('R', 'M') => Shape::RM,
        ('M', 'R') => Shape::MR,
        ('R', 'I') => Shape::RI,
        ('M', 'I') => Shape::MI,
        _ => Shape::Other,
    }
}

/// (operand size, address size) attributes by the prefixes (SDM 1, "Operand-Size and Address-Size Attributes").
fn sizes(bytes: &[u8], bits: u8) -> (u32, u32) {
    let (mut operand, mut address, mut rex_w) = (false, false, false);
    for &b in bytes {
        match b {
            0x66 => operand = true,
            0x67 => address = true,
            0x26 | 0x2e | 0x36 | 0x3e | 0x64 | 0x65 | 0xf0 | 0xf2 | 0xf3 => {}
            0x40..=0x4f if bits == 64 => {
                rex_w = b & 8 != 0;
                break;
            }
            _ => break,
        }
    }
    let operand = match (bits, operand) {
        (64, _) if rex_w => 64,
        (16, false) | (32 | 64, true) => 16,
        _ => 32,
    };
    let address = match (bits, address) {
        (64, false) => 64,
        (16, false) | (32, true) => 16,
        _ => 32,
    };
    (operand, address)
}

fn lower(i: &Instruction, bytes: &[u8], mode: Mode, end: u16, index: u16) -> (Op, bool) {
    let (operand_bits, address_bits) = sizes(bytes, mode.code_bits);
    let mut op = Op { end, len: bytes.len() as u8, code: i.code() as u16, ..EMPTY };
    op.flags |= (operand_bits.trailing_zeros() as u8 - 4) << op_flags::OPERAND_SHIFT;
    op.flags |= (6 - address_bits.trailing_zeros() as u8) << op_flags::ADDRESS_SHIFT;
    if i.has_lock_prefix() {
        op.flags |= op_flags::LOCK;
    }
    if i.has_rep_prefix() {
        op.flags |= op_flags::REP;
    }
    if i.has_repne_prefix() {
        op.flags |= op_flags::REPNE;
    }
    for n in 0..i.op_count() {
        match i.op_kind(n) {
            OpKind::Register if n == 0 => op.dst = gpr(i.op0_register()),
            OpKind::Register if n == 1 => op.src = gpr(i.op1_register()),
            OpKind::Memory => memory(i, &mut op, mode, address_bits),
            OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64 => op.imm = i.near_branch_target(),
            _ if kind(i, n) == 'I' => op.imm = i.immediate(n),
            _ => {}
        }
    }
    let mut d = Decoded { i, bytes, op, mode, operand_bits, address_bits, index, ends: false, shape: shape(i) };
    d.op.handler = if i.is_invalid() { undefined } else { exec::select(&mut d).unwrap_or(undefined) };
    let ends = d.ends
        || i.is_invalid()
        || i.flow_control() != FlowControl::Next
        || std::ptr::fn_addr_eq(d.op.handler, undefined as Handler);
    (d.op, ends)
}

fn memory(i: &Instruction, op: &mut Op, mode: Mode, address_bits: u32) {
    op.base = gpr(i.memory_base());
    op.index = gpr(i.memory_index());
    op.scale = i.memory_index_scale().trailing_zeros() as u8;
    op.seg = segment(i.memory_segment());
    let disp = i.memory_displacement64() as i64;
    if op.base == slot::RIP {
        // iced gives the target for a block at 0; a displacement close to 2 GiB may no longer fit.
        op.disp = disp as i32;
        if i64::from(op.disp) != disp && address_bits == 64 {
            op.index = slot::PAGE;
            op.disp = (disp - 0x1000) as i32;
        }
    } else {
        op.disp = disp as i32;
        if address_bits == 64 && i64::from(op.disp) != disp {
            // Only MOV with a 64-bit offset; its handler takes the address from here.
            op.imm = disp as u64;
        }
    }
    if mode.code_bits == 64 && address_bits == 64 && op.seg < reg::FS {
        op.flags |= op_flags::FLAT;
    }
}

/// Chooses by operand width; the handlers are generic over [`crate::mem::Word`].
macro_rules! by_width {
    ($bits:expr, $($handler:ident)::+ $(, $t:ty)*) => {
        Some(match $bits {
            8 => $($handler)::+::<u8 $(, $t)*> as $crate::cpu::op::Handler,
            16 => $($handler)::+::<u16 $(, $t)*>,
            32 => $($handler)::+::<u32 $(, $t)*>,
            64 => $($handler)::+::<u64 $(, $t)*>,
            _ => return None,
        })
    };
}
pub(super) use by_width;

/// As [`by_width`], for frequent operations: also gives them a chain ([`super::op::chain_fast`]).
macro_rules! hot_by_width {
    ($d:expr, $bits:expr, $handler:ident, $fast:ident $(, $t:ty)*) => {
        Some(match $bits {
            8 => $crate::cpu::decode::hot!($d, $handler::<u8 $(, $t)*>, $fast::<u8 $(, $t)*>),
            16 => $crate::cpu::decode::hot!($d, $handler::<u16 $(, $t)*>, $fast::<u16 $(, $t)*>),
            32 => $crate::cpu::decode::hot!($d, $handler::<u32 $(, $t)*>, $fast::<u32 $(, $t)*>),
            64 => $crate::cpu::decode::hot!($d, $handler::<u64 $(, $t)*>, $fast::<u64 $(, $t)*>),
            _ => return None,
        })
    };
}
pub(super) use hot_by_width;

/// As [`hot_by_width`], for handlers that cannot fail and ask for no attention.
macro_rules! sure_by_width {
    ($d:expr, $bits:expr, $handler:ident $(, $t:ty)*) => {{
        use $crate::cpu::decode::{hot, infallible};
        Some(match $bits {
            8 => hot!($d, $handler::<u8 $(, $t)*>, infallible($handler::<u8 $(, $t)*>)),
            16 => hot!($d, $handler::<u16 $(, $t)*>, infallible($handler::<u16 $(, $t)*>)),
            32 => hot!($d, $handler::<u32 $(, $t)*>, infallible($handler::<u32 $(, $t)*>)),
            64 => hot!($d, $handler::<u64 $(, $t)*>, infallible($handler::<u64 $(, $t)*>)),
            _ => return None,
        })
    }};
}
pub(super) use sure_by_width;

/// Gives the operation a chain by its fast path; evaluates to the handler.
macro_rules! hot {
    ($d:expr, $handler:expr, $fast:expr) => {{
        $d.op.chain = |cpu, op, rest| $crate::cpu::op::chain_fast(cpu, op, rest, $fast);
        $handler as $crate::cpu::op::Handler
    }};
}
pub(super) use hot;

/// The fast path of a handler that cannot fail and asks for no attention.
#[inline(always)]
pub(super) fn infallible(handler: impl FnOnce(&mut Cpu, &Op) -> Flow) -> impl FnOnce(&mut Cpu, &Op) -> bool {
    move |cpu, op| handler(cpu, op).is_ok()
}

impl Decoded<'_> {
    /// The width of operand `n` in bits.
    pub fn width(&self, n: u32) -> u32 {
        match self.i.op_kind(n) {
            OpKind::Register => self.i.op_register(n).size() as u32 * 8,
            OpKind::Memory => self.i.memory_size().size() as u32 * 8,
            _ => self.operand_bits,
        }
    }

    /// Sets the operand size that [`Op::operand_bits`] tells.
    pub fn set_operand_bits(&mut self, bits: u32) {
        self.operand_bits = bits;
        self.op.flags &= !(3 << op_flags::OPERAND_SHIFT);
        self.op.flags |= (bits.trailing_zeros() as u8 - 4) << op_flags::OPERAND_SHIFT;
    }
}

#[cfg(test)]
impl Op {
    pub(crate) fn is_undefined(&self) -> bool {
        std::ptr::fn_addr_eq(self.handler, undefined as Handler)
    }
}

#[cfg(test)]
impl Cpu {
    /// The operations of a block, as the running mode decodes it.
    pub(crate) fn decode_for_test(&self, bytes: &[u8]) -> Vec<Op> {
        match decode(bytes, self.mode, super::block::MAX_OPS) {
            DecodeResult::Block(code) => code.ops,
            DecodeResult::NeedsMore => Vec::new(),
        }
    }
}

pub(crate) type Selected = Option<Handler>;
