//! A decoded instruction: data with its handler resolved.

use super::{Cpu, Flow, Stop};

/// Does one instruction.
pub type Handler = fn(&mut Cpu, &Op) -> Flow;

/// Does `op` and, if it may go on, calls the first operation of `rest` in tail position: so a block runs without
/// returning to a loop between its instructions. Should the compiler not make that a jump, the depth is still that of a
/// block.
pub type Chain = fn(&mut Cpu, &Op, &[Op]) -> Flow;

/// `dst` and `src` are register-file numbers ([`super::regs`]), or what the handler's family says.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Op {
    pub chain: Chain,
    pub handler: Handler,
    /// Immediate (sign-extended as the instruction says), branch target relative to the block's start, or moffs address.
    pub imm: u64,
    /// Displacement; of RIP-relative operands relative to the block's start.
    pub disp: i32,
    /// Where the next instruction starts, relative to the block's start.
    pub end: u16,
    /// `iced_x86::Code`.
    pub code: u16,
    pub dst: u8,
    pub src: u8,
    pub base: u8,
    pub index: u8,
    /// log2 of the index scale.
    pub scale: u8,
    /// [`super::seg::SegReg`] number of the memory operand.
    pub seg: u8,
    pub len: u8,
    pub flags: u8,
}

/// Bits of [`Op::flags`].
pub mod op_flags {
    /// The memory operand is in 64-bit mode with 64-bit addressing and a segment whose base is 0: linear = effective.
    pub const FLAT: u8 = 1 << 0;
    /// Address size: 0 is 64, 1 is 32, 2 is 16 bits.
    pub const ADDRESS_SHIFT: u8 = 1;
    pub const ADDRESS_MASK: u8 = 3 << ADDRESS_SHIFT;
    pub const LOCK: u8 = 1 << 3;
    /// F3: REP, REPE.
    pub const REP: u8 = 1 << 4;
    /// F2: REPNE.
    pub const REPNE: u8 = 1 << 5;
    /// Operand size: 0 is 16, 1 is 32, 2 is 64 bits (of instructions that have one).
    pub const OPERAND_SHIFT: u8 = 6;
}

impl Op {
    #[inline(always)]
    pub fn has(&self, flag: u8) -> bool {
        self.flags & flag != 0
    }

    /// 16, 32 or 64.
    #[inline(always)]
    pub fn operand_bits(&self) -> u32 {
        16 << (self.flags >> op_flags::OPERAND_SHIFT)
    }

    /// All ones in the width of the address.
    #[inline(always)]
    pub fn address_mask(&self) -> u64 {
        match (self.flags & op_flags::ADDRESS_MASK) >> op_flags::ADDRESS_SHIFT {
            0 => u64::MAX,
            1 => 0xffff_ffff,
            _ => 0xffff,
        }
    }

    /// The instruction's own RIP, given the block's.
    #[inline(always)]
    pub fn start(&self) -> u64 {
        u64::from(self.end) - u64::from(self.len)
    }
}

/// Runs the operations behind one that is complete.
#[inline(always)]
pub fn next(cpu: &mut Cpu, rest: &[Op]) -> Flow {
    match rest.split_first() {
        Some((op, rest)) => (op.chain)(cpu, op, rest),
        None => Ok(()),
    }
}

/// A [`Chain`] for the usual case of a frequent operation: `f` either does it all, cannot fail, asks for no attention and
/// says true, or has done nothing and says false; then the handler does it.
#[inline(always)]
pub fn chain_fast(cpu: &mut Cpu, op: &Op, rest: &[Op], f: impl FnOnce(&mut Cpu, &Op) -> bool) -> Flow {
    if f(cpu, op) { next(cpu, rest) } else { chain_any(cpu, op, rest) }
}

/// The [`Chain`] of all other operations. What stops it is left in `cpu.stopped_end`.
pub fn chain_any(cpu: &mut Cpu, op: &Op, rest: &[Op]) -> Flow {
    let result = (op.handler)(cpu, op);
    if result.is_err() || cpu.stop_after {
        cpu.stopped_end = op.end;
        // The last operation of a block that ends in a branch has set RIP itself.
        return result.and(Err(if rest.is_empty() { Stop::JUMPED } else { Stop::COMPLETED }));
    }
    next(cpu, rest)
}

const _: () = assert!(size_of::<Op>() == 40);
