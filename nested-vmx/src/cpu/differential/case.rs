//! One case: operands for an instruction, its run on both processors, the comparison.

mod float;

use super::State;
use super::forms::{Form, Template, decode, has_features, is_memory};
use super::host::{self, Host, INSN, PAD, SCRATCH, SCRATCH_LEN, Signal};
use super::random::Rng;
use crate::arch::{exception, is_canonical};
use crate::cpu::flags::{ARITHMETIC, CF, DF, IF, OF, ZF};
use crate::cpu::op::Op;
use crate::cpu::seg::reg;
use crate::cpu::{Cpu, Flow, StopKind};
use crate::testing::{PD, Rig};
use iced_x86::{Code, FlowControl, Instruction, InstructionInfoFactory, Mnemonic, OpKind, Register, RflagsBits};
use std::fmt::Write;

/// Encodings of a form, and operands for each.
const ENCODINGS: usize = 20;
const OPERANDS: usize = 12;
/// Operands lie in the middle of the scratch memory; strings, bit offsets and stacks have room on both sides.
const MIDDLE: u64 = SCRATCH + 0x800;
const MIDDLE_LEN: u64 = 0x1000;
/// Where the guest's RAM has the pages that the host has at the same linear addresses.
const SCRATCH_GPA: u64 = 0x60_0000 + (SCRATCH & 0x1f_ffff);
const CODE_GPA: u64 = 0x80_0000 + (host::CODE & 0x1f_ffff);

pub enum Verdict {
    Agrees { undefined_flags_differ: u64 },
    Differs(String),
    NotEncodable,
}

pub struct Harness {
    bits: u32,
    rig: Rig,
    host: Host,
    info: InstructionInfoFactory,
    image: Box<[u8; SCRATCH_LEN]>,
}

/// How an instruction ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Done,
    Divide,
    Undefined,
    /// #GP, #PF, #BR.
    Protection,
    Stack,
    Other,
}

impl From<Signal> for End {
    fn from(s: Signal) -> Self {
        match s.0 {
            libc::SIGFPE => End::Divide,
            libc::SIGILL => End::Undefined,
            libc::SIGSEGV => End::Protection,
            libc::SIGBUS => End::Stack,
            _ => End::Other,
        }
    }
}

impl Harness {
    /// For 64-bit code, or 32-bit code in compatibility mode.
    pub fn new(bits: u32) -> Self {
        let mut rig = Rig::long_at(3);
        if bits == 32 {
            let cs = &mut rig.cpu.seg[usize::from(reg::CS)];
            cs.ar = cs.ar.with_l(false).with_db(true);
            rig.cpu.mode_changed();
        }
        for (lin, gpa) in [(SCRATCH, SCRATCH_GPA), (host::CODE, CODE_GPA)] {
            rig.write_u64(PD + 8 * (lin >> 21), gpa & !0x1f_ffff | 0x87);
        }
        let mut r = Rng::new(3);
        let mut image = Box::new([0; SCRATCH_LEN]);
        for word in image.as_chunks_mut::<8>().0 {
            *word = r.operand().to_le_bytes();
        }
        Self { bits, rig, host: Host::new(), info: InstructionInfoFactory::new(), image }
    }

    pub fn guest_has(&self, code: Code) -> bool {
        has_features(code, |leaf, subleaf| self.rig.cpu.cpuid(leaf, subleaf))
    }

    pub fn host_has(&self, code: Code) -> bool {
        has_features(code, |leaf, subleaf| {
            let r = std::arch::x86_64::__cpuid_count(leaf, subleaf);
            [r.eax, r.ebx, r.ecx, r.edx]
        })
    }

    /// Some instruction of the form.
    pub fn example(&self, form: Form, templates: &[Template]) -> Option<Instruction> {
        let mut r = Rng::new(4);
        let bytes = encode(form, self.bits, templates, &mut r)?;
        Some(decode(&bytes, self.bits, INSN).0)
    }

    pub fn compare(&mut self, form: Form, templates: &[Template], r: &mut Rng) -> Verdict {
        let (mut cases, mut undefined_flags_differ) = (0, 0);
        for _ in 0..ENCODINGS {
            let Some(bytes) = encode(form, self.bits, templates, r).and_then(|b| self.aim(b, r)) else { continue };
            let (i, _) = decode(&bytes, self.bits, INSN);
            self.host.place(self.bits, &bytes);
            self.rig.ram.write(CODE_GPA, self.host.code()).unwrap();
            let Some(&op) = self.rig.cpu.decode_for_test(&bytes).first() else { continue };
            for _ in 0..OPERANDS {
                let Some(before) = self.operands(&i, r) else { continue };
                cases += 1;
                match self.run(&i, &op, &before) {
                    Ok(undefined) => undefined_flags_differ |= undefined,
                    Err(text) => return Verdict::Differs(format!("{form:?} {bytes:02x?} {text}")),
                }
            }
        }
        if cases == 0 { Verdict::NotEncodable } else { Verdict::Agrees { undefined_flags_differ } }
    }

    /// Points absolute addresses, branches and ENTER's size to where they do no harm. None: cannot.
    fn aim(&mut self, mut bytes: Vec<u8>, r: &mut Rng) -> Option<Vec<u8>> {
        let (i, offsets) = decode(&bytes, self.bits, INSN);
        let target = target(&i, r);
        let behind = INSN + bytes.len() as u64;
        if is_memory(&i) {
            let at = offsets.displacement_offset();
            match (i.memory_base(), i.memory_index(), offsets.displacement_size()) {
                (Register::RIP | Register::EIP, _, 4) => {
                    bytes[at..at + 4].copy_from_slice(&(target.wrapping_sub(behind) as u32).to_le_bytes());
                }
                (Register::None, Register::None, n) if n > 0 => {
                    bytes[at..at + n].copy_from_slice(&target.to_le_bytes()[..n]);
                }
                (Register::None, ..) => return None,
                _ => {}
            }
        }
        if i.op_count() > 0 && matches!(i.op_kind(0), OpKind::NearBranch32 | OpKind::NearBranch64) {
            let (at, n) = (offsets.immediate_offset(), offsets.immediate_size());
            bytes[at..at + n].copy_from_slice(&PAD.wrapping_sub(behind).to_le_bytes()[..n]);
        }
        if i.mnemonic() == Mnemonic::Enter {
            bytes[offsets.immediate_offset() + 1] &= 3;
        }
        Some(bytes)
    }

    /// A state in which the instruction's memory operands are in the scratch memory.
    fn operands(&mut self, i: &Instruction, r: &mut Rng) -> Option<State> {
        let mut regs: [u64; 16] = std::array::from_fn(|_| r.operand());
        let mut memory = self.image.clone();
        let flags = r.next() & ARITHMETIC | if i.is_string_instruction() { r.next() & DF } else { 0 } | IF | 2;
        let branch = matches!(i.flow_control(), FlowControl::IndirectBranch | FlowControl::IndirectCall);
        match i.mnemonic() {
            Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc
                if is_memory(i) && i.op1_kind() == OpKind::Register =>
            {
                let n = i.op1_register().full_register();
                if n == i.memory_base().full_register() {
                    return None;
                }
                regs[n.number()] = r.below(0x2000).wrapping_sub(0x1000);
            }
            Mnemonic::Div | Mnemonic::Idiv if r.one_in(2) => {
                regs[2] = if r.one_in(2) { 0 } else { ((regs[0] as i64) >> 63) as u64 };
                regs[0] = regs[0] & !0xffff | r.next() & 0xffff >> r.below(16);
            }
            _ => {}
        }
        if i.is_string_instruction() && (i.has_rep_prefix() || i.has_repne_prefix()) {
            regs[1] = r.below(24) | if address_bits(i) == 32 { r.next() << 32 } else { 0 };
        }
        if self.bits == 32 {
            regs = std::array::from_fn(|n| if n < 8 { regs[n] & 0xffff_ffff } else { 0 });
        }
        let mut pinned = [false; 16];
        for m in self.info.info(i).used_memory() {
            if !pin(i, m.base(), m.index(), m.scale(), m.displacement(), &mut regs, &mut pinned, r) {
                return None;
            }
        }
        // Also operands that are not accessed (hints) get a good address.
        if is_memory(i) {
            let (scale, disp) = (i.memory_index_scale(), i.memory_displacement64());
            if !pin(i, i.memory_base(), i.memory_index(), scale, disp, &mut regs, &mut pinned, r) {
                return None;
            }
        }
        let at = address(i, &regs).filter(|a| (SCRATCH..SCRATCH + SCRATCH_LEN as u64 - 16).contains(a));
        if let Some(a) = at {
            let a = (a - SCRATCH) as usize;
            memory[a..a + 8].copy_from_slice(&r.operand().to_le_bytes());
            memory[a + 8..a + 16].copy_from_slice(&r.operand().to_le_bytes());
            match i.mnemonic() {
                _ if branch => memory[a..a + 8].copy_from_slice(&PAD.to_le_bytes()),
                Mnemonic::Cmpxchg if r.one_in(2) => memory[a..a + 8].copy_from_slice(&regs[0].to_le_bytes()),
                Mnemonic::Cmpxchg8b if r.one_in(2) => {
                    memory[a..a + 4].copy_from_slice(&regs[0].to_le_bytes()[..4]);
                    memory[a + 4..a + 8].copy_from_slice(&regs[2].to_le_bytes()[..4]);
                }
                Mnemonic::Cmpxchg16b if r.one_in(2) => {
                    memory[a..a + 8].copy_from_slice(&regs[0].to_le_bytes());
                    memory[a + 8..a + 16].copy_from_slice(&regs[2].to_le_bytes());
                }
                _ => {}
            }
        } else if i.mnemonic() == Mnemonic::Cmpxchg && r.one_in(2) {
            regs[0] = regs[i.op0_register().full_register().number()];
        } else if branch {
            if pinned[i.op0_register().number()] {
                return None;
            }
            regs[i.op0_register().number()] = PAD;
        }
        if i.flow_control() == FlowControl::Return && is_canonical(regs[4]) {
            let a = (regs[4] - SCRATCH) as usize;
            memory[a..a + 8].copy_from_slice(&PAD.to_le_bytes());
        }
        if self.bits == 32 {
            regs.iter_mut().for_each(|v| *v &= 0xffff_ffff);
        }
        Some(State { regs, flags, memory, fx: fx_image(), taken: false })
    }

    /// Runs both; Ok has the undefined flags that differ.
    fn run(&mut self, i: &Instruction, op: &Op, before: &State) -> Result<u64, String> {
        let mut expected = before.clone();
        let host_end = self.host.run(self.bits, &mut expected).map_or_else(End::from, |()| End::Done);
        let undefined = undefined_flags(i, before);
        let mut undefined_differ = 0;
        // The handler alone, and the chain, which may have another path.
        for chained in [false, true] {
            let mut seen = before.clone();
            let end = self.run_guest(op, &mut seen, chained);
            undefined_differ |= (seen.flags ^ expected.flags) & undefined & ARITHMETIC;
            let flags_differ = (seen.flags ^ expected.flags) & (ARITHMETIC | DF) & !undefined;
            let mut regs = expected.regs;
            if undefined_result(i, before) {
                let n = i.op0_register().full_register().number();
                regs[n] = seen.regs[n];
            }
            let same_memory = seen.memory == expected.memory || undefined_result(i, before) && is_memory(i);
            if (end, seen.taken) != (host_end, expected.taken) || seen.regs != regs || flags_differ != 0 || !same_memory
            {
                return Err(explain(i, before, &expected, &seen, (host_end, end)));
            }
        }
        Ok(undefined_differ)
    }

    fn run_guest(&mut self, op: &Op, s: &mut State, chained: bool) -> End {
        self.rig.ram.write(SCRATCH_GPA, &s.memory[..]).unwrap();
        let cpu = &mut self.rig.cpu;
        cpu.regs.set_general(&s.regs);
        cpu.regs.set_rip(INSN);
        cpu.flags.set_bits(s.flags);
        cpu.stop_after = false;
        let run = |cpu: &mut Cpu| -> Flow { if chained { (op.chain)(cpu, op, &[]) } else { (op.handler)(cpu, op) } };
        let end = loop {
            match run(cpu).map_err(|stop| stop.kind()) {
                Err(StopKind::Again) => cpu.stop_after = false,
                Ok(()) | Err(StopKind::Completed | StopKind::Jumped) => break End::Done,
                Err(StopKind::Exception { vector, .. }) => {
                    break match vector {
                        exception::DE | exception::MF | exception::XM => End::Divide,
                        exception::UD => End::Undefined,
                        exception::GP | exception::PF | exception::BR => End::Protection,
                        exception::SS => End::Stack,
                        _ => End::Other,
                    };
                }
                Err(StopKind::VmExit | StopKind::Delivered) => break End::Other,
            }
        };
        s.regs = cpu.regs.general();
        s.flags = cpu.flags.bits();
        s.taken = cpu.regs.rip() == PAD;
        self.rig.ram.read(SCRATCH_GPA, &mut s.memory[..]).unwrap();
        end
    }
}

fn encode(form: Form, bits: u32, templates: &[Template], r: &mut Rng) -> Option<Vec<u8>> {
    (0..64).find_map(|_| {
        let t = &templates[r.below(templates.len() as u64) as usize];
        t.encode(form, bits, INSN, r)
    })
}

/// An FXSAVE image as FNINIT and the reset MXCSR leave it.
fn fx_image() -> [u8; 512] {
    let mut fx = [0; 512];
    fx[..2].copy_from_slice(&0x37fu16.to_le_bytes());
    fx[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
    fx
}

fn target(i: &Instruction, r: &mut Rng) -> u64 {
    // Vector operands are sometimes misaligned, which faults.
    let align = match i.memory_size().size() {
        16 if i.mnemonic() == Mnemonic::Cmpxchg16b || !r.one_in(8) => 15,
        512 => 15,
        _ => 0,
    };
    MIDDLE + (r.below(MIDDLE_LEN) & !align)
}

fn address_bits(i: &Instruction) -> u32 {
    let string = (0..i.op_count()).any(|n| matches!(i.op_kind(n), OpKind::MemorySegESI | OpKind::MemoryESEDI));
    if string || i.memory_base().is_gpr32() || i.memory_index().is_gpr32() || i.memory_base() == Register::EIP {
        32
    } else {
        64
    }
}

/// The explicit memory operand's address; its base may be RIP, as iced-x86's displacement then is the address.
fn address(i: &Instruction, regs: &[u64; 16]) -> Option<u64> {
    if !is_memory(i) || i.memory_index() == Register::AL {
        return None;
    }
    let value = |r: Register| if r.is_gpr() { regs[r.full_register().number()] } else { 0 };
    let index = value(i.memory_index()).wrapping_mul(i.memory_index_scale().into());
    let a = value(i.memory_base()).wrapping_add(index).wrapping_add(i.memory_displacement64());
    Some(if address_bits(i) == 32 { a & 0xffff_ffff } else { a })
}

/// Sets the base register so that the address is in the scratch memory.
#[allow(clippy::too_many_arguments)]
fn pin(
    i: &Instruction,
    base: Register,
    index: Register,
    scale: u32,
    disp: u64,
    regs: &mut [u64; 16],
    pinned: &mut [bool; 16],
    r: &mut Rng,
) -> bool {
    if !base.is_gpr() {
        return true;
    }
    let n = base.full_register().number();
    if base.full_register() == index.full_register() {
        return false;
    }
    let index = match index {
        Register::None => 0,
        Register::AL => regs[0] & 0xff,
        index => regs[index.full_register().number()],
    };
    let beyond = index.wrapping_mul(scale.into()).wrapping_add(disp);
    if pinned[n] {
        // Another operand's base, too: good if this one is near.
        let a = regs[n].wrapping_add(beyond);
        let a = if base.is_gpr32() { a & 0xffff_ffff } else { a };
        return (SCRATCH + 0x100..SCRATCH + SCRATCH_LEN as u64 - 0x100).contains(&a) || !is_canonical(regs[n]);
    }
    let mut value = target(i, r).wrapping_sub(beyond);
    if base.is_gpr64() && r.one_in(32) {
        // Not canonical: #GP or #SS.
        value ^= 1 << 55;
    }
    regs[n] = if base.is_gpr32() { regs[n] & !0xffff_ffff | value & 0xffff_ffff } else { value };
    pinned[n] = true;
    true
}

/// The shift count, when the instruction is a shift by CL or a constant.
fn shift_count(i: &Instruction, before: &State) -> Option<u64> {
    use Mnemonic::*;
    let last = i.op_count().wrapping_sub(1);
    let bits = if is_memory(i) { i.memory_size().size() } else { i.op0_register().size() } as u64 * 8;
    matches!(i.mnemonic(), Shl | Sal | Shr | Sar | Rol | Ror | Rcl | Rcr | Shld | Shrd).then(|| {
        let n = if i.op_kind(last) == OpKind::Register { before.regs[1] } else { i.immediate(last) };
        n & if bits == 64 { 63 } else { 31 }
    })
}

fn undefined_flags(i: &Instruction, before: &State) -> u64 {
    let undefined = i.rflags_undefined();
    let pairs = [
        (RflagsBits::OF, OF),
        (RflagsBits::SF, crate::cpu::flags::SF),
        (RflagsBits::ZF, ZF),
        (RflagsBits::AF, crate::cpu::flags::AF),
        (RflagsBits::CF, CF),
        (RflagsBits::PF, crate::cpu::flags::PF),
    ];
    let mask = pairs.iter().filter(|(bit, _)| undefined & bit != 0).fold(0, |m, (_, flag)| m | flag);
    match shift_count(i, before) {
        // A count of 0 changes no flag, one of 1 defines OF.
        Some(0) => 0,
        Some(1) => mask & !OF,
        _ => mask,
    }
}

/// SHLD and SHRD of 16 bits by more than 16 have no defined result.
fn undefined_result(i: &Instruction, before: &State) -> bool {
    matches!(i.mnemonic(), Mnemonic::Shld | Mnemonic::Shrd)
        && i.op1_register().size() == 2
        && shift_count(i, before).is_some_and(|n| n > 16)
}

fn explain(i: &Instruction, before: &State, host: &State, guest: &State, ends: (End, End)) -> String {
    let mut text = format!("{:?} ", i.mnemonic());
    if ends.0 != ends.1 || host.taken != guest.taken {
        let _ = write!(text, "host {:?} taken {}, guest {:?} taken {}; ", ends.0, host.taken, ends.1, guest.taken);
    }
    for n in 0..16 {
        let (b, h, g) = (before.regs[n], host.regs[n], guest.regs[n]);
        if h != g {
            let _ = write!(text, "r{n} was {b:#x}: host {h:#x}, guest {g:#x}; ");
        }
    }
    let arithmetic = |s: &State| s.flags & (ARITHMETIC | DF);
    if arithmetic(host) != arithmetic(guest) {
        let (b, h, g) = (arithmetic(before), arithmetic(host), arithmetic(guest));
        let _ = write!(text, "flags were {b:#x}: host {h:#x}, guest {g:#x}; ");
    }
    for a in (0..SCRATCH_LEN).filter(|&a| host.memory[a] != guest.memory[a]).take(4) {
        let (b, h, g) = (before.memory[a], host.memory[a], guest.memory[a]);
        let _ = write!(text, "[{a:#x}] was {b:#x}: host {h:#x}, guest {g:#x}; ");
    }
    let _ = write!(text, "rax {:#x} rcx {:#x} rdx {:#x}", before.regs[0], before.regs[1], before.regs[2]);
    text
}
