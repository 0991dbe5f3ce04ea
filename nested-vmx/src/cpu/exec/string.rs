//! MOVS, STOS, LODS, CMPS, SCAS, alone and repeated.
//!
//! A repeated one stops with [`Stop::AGAIN`], its registers at the next iteration: when a store asks for a look-up (code
//! that changed, a device, a breakpoint), after each iteration when single-stepping, and whenever the remaining count is
//! a multiple of [`PIECE`]. Each time counts as a retired instruction, so that the budget bounds it and guest time runs.

use crate::cpu::access::Use;
use crate::cpu::decode::{Decoded, Selected, by_width, segment};
use crate::cpu::flags::DF;
use crate::cpu::mmu::Wanted;
use crate::cpu::mmu::tlb::Access;
use crate::cpu::op::{Op, op_flags};
use crate::cpu::seg::reg;
use crate::cpu::state::special;
use crate::cpu::{Cpu, Flow, Stop, slot};
use crate::mem::{PAGE_SIZE, Word};
use iced_x86::Code;

/// Iterations at most before events are looked at.
const PIECE: u64 = 1 << 14;
/// Fewer iterations than this are not worth a host string instruction.
const BULK: u64 = 8;

impl Cpu {
    /// Linear address of the string at rSI, in DS or the overriding segment.
    #[inline(always)]
    pub(in crate::cpu) fn string_source(&self, op: &Op, size: u64) -> Result<u64, Stop> {
        let offset = self.regs.r(slot::RSI) & op.address_mask();
        if self.code64() && op.seg < reg::FS { Ok(offset) } else { self.segmented(op.seg, offset, size, Use::Read) }
    }

    /// Linear address of the string at rDI in ES.
    #[inline(always)]
    pub(in crate::cpu) fn string_destination(&self, op: &Op, size: u64, how: Use) -> Result<u64, Stop> {
        let offset = self.regs.r(slot::RDI) & op.address_mask();
        if self.code64() { Ok(offset) } else { self.segmented(reg::ES, offset, size, how) }
    }

    /// Adds to rSI, rDI or rCX in the width of addresses: 32 bits clear the upper half, 16 keep the rest.
    #[inline(always)]
    pub(in crate::cpu) fn string_add(&mut self, op: &Op, n: u8, delta: u64) {
        let mask = op.address_mask();
        let old = self.regs.r(n);
        let keep = if mask == 0xffff { old & !mask } else { 0 };
        self.regs.set_r(n, keep | old.wrapping_add(delta) & mask);
    }

    /// By what an iteration moves rSI or rDI.
    #[inline(always)]
    pub(in crate::cpu) fn string_delta(&self, size: u64) -> u64 {
        if self.flags.has(DF) { size.wrapping_neg() } else { size }
    }

    /// The RAM offset of a string's part in one page, and whether the page may hold code. None: go element by element.
    fn string_page(&mut self, lin: u64, write: bool) -> Option<(u64, bool)> {
        let access = self.data_access;
        if access == Access::UserAligned {
            return None;
        }
        let hit = if write { self.tlb.write(access, lin, 1) } else { self.tlb.read(access, lin, 1) };
        if let Some(offset) = hit {
            return Some((offset, false));
        }
        let offset = self.translate(lin, Wanted { write, fetch: false, access }).ok()?.ram_offset?;
        Some((offset, write))
    }
}

/// What one iteration does.
trait StringOp {
    /// Ends the repetition by ZF.
    const COMPARES: bool = false;
    /// What a count of 0 zero-extends, besides RCX, when addresses have 32 bits: as Intel's processors do it.
    const EXTENDS: &[u8] = &[];
    fn step<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow;
    /// Does up to `count` iterations inside a page, upwards; returns how many.
    #[inline(always)]
    fn bulk<W: Word>(_: &mut Cpu, _: &Op, _count: u64) -> u64 {
        0
    }
}

/// How many of `count` elements upwards from rSI or rDI stay inside a page and the address's width.
#[inline(always)]
fn inside_page<W: Word>(cpu: &Cpu, op: &Op, n: u8, lin: u64, count: u64) -> u64 {
    let mask = op.address_mask();
    let before_wrap = (mask - (cpu.regs.r(n) & mask)) / W::BYTES;
    let in_page = (PAGE_SIZE - (lin & (PAGE_SIZE - 1))) / W::BYTES;
    count.min(before_wrap).min(in_page)
}

struct Movs;
impl StringOp for Movs {
    const EXTENDS: &[u8] = &[slot::RSI, slot::RDI];
    #[inline(always)]
    fn step<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
        let from = cpu.string_source(op, W::BYTES)?;
        let v: W = cpu.load(from)?;
        let to = cpu.string_destination(op, W::BYTES, Use::Write)?;
        cpu.store(to, v)?;
        let delta = cpu.string_delta(W::BYTES);
        cpu.string_add(op, slot::RSI, delta);
        cpu.string_add(op, slot::RDI, delta);
        Ok(())
    }

    fn bulk<W: Word>(cpu: &mut Cpu, op: &Op, count: u64) -> u64 {
        let (Ok(from), Ok(to)) = (cpu.string_source(op, 1), cpu.string_destination(op, 1, Use::Write)) else {
            return 0;
        };
        let n = inside_page::<W>(cpu, op, slot::RSI, from, count);
        let n = inside_page::<W>(cpu, op, slot::RDI, to, n);
        let len = n * W::BYTES;
        if n < BULK || cpu.string_source(op, len).is_err() || cpu.string_destination(op, len, Use::Write).is_err() {
            return 0;
        }
        let Some((source, _)) = cpu.string_page(from, false) else { return 0 };
        let Some((destination, code)) = cpu.string_page(to, true) else { return 0 };
        cpu.ram.copy::<W>(source, destination, n);
        if code {
            cpu.stored(destination, len);
        }
        cpu.string_add(op, slot::RSI, len);
        cpu.string_add(op, slot::RDI, len);
        n
    }
}

struct Stos;
impl StringOp for Stos {
    const EXTENDS: &[u8] = &[slot::RDI];
    #[inline(always)]
    fn step<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
        let to = cpu.string_destination(op, W::BYTES, Use::Write)?;
        let v: W = cpu.regs.get(slot::RAX);
        cpu.store(to, v)?;
        let delta = cpu.string_delta(W::BYTES);
        cpu.string_add(op, slot::RDI, delta);
        Ok(())
    }

    fn bulk<W: Word>(cpu: &mut Cpu, op: &Op, count: u64) -> u64 {
        let Ok(to) = cpu.string_destination(op, 1, Use::Write) else { return 0 };
        let n = inside_page::<W>(cpu, op, slot::RDI, to, count);
        let len = n * W::BYTES;
        if n < BULK || cpu.string_destination(op, len, Use::Write).is_err() {
            return 0;
        }
        let Some((destination, code)) = cpu.string_page(to, true) else { return 0 };
        cpu.ram.fill::<W>(destination, n, cpu.regs.get(slot::RAX));
        if code {
            cpu.stored(destination, len);
        }
        cpu.string_add(op, slot::RDI, len);
        n
    }
}

struct Lods;
impl StringOp for Lods {
    #[inline(always)]
    fn step<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
        let from = cpu.string_source(op, W::BYTES)?;
        let v: W = cpu.load(from)?;
        cpu.regs.put(slot::RAX, v);
        let delta = cpu.string_delta(W::BYTES);
        cpu.string_add(op, slot::RSI, delta);
        Ok(())
    }
}

#[inline(always)]
fn compare<W: Word>(cpu: &mut Cpu, a: W, b: W) {
    cpu.flags.sub(a, b, W::from_u64(a.to_u64().wrapping_sub(b.to_u64())));
}

struct Cmps;
impl StringOp for Cmps {
    const COMPARES: bool = true;
    #[inline(always)]
    fn step<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
        let a_at = cpu.string_source(op, W::BYTES)?;
        let a: W = cpu.load(a_at)?;
        let b_at = cpu.string_destination(op, W::BYTES, Use::Read)?;
        let b: W = cpu.load(b_at)?;
        compare(cpu, a, b);
        let delta = cpu.string_delta(W::BYTES);
        cpu.string_add(op, slot::RSI, delta);
        cpu.string_add(op, slot::RDI, delta);
        Ok(())
    }
}

struct Scas;
impl StringOp for Scas {
    const COMPARES: bool = true;
    #[inline(always)]
    fn step<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
        let at = cpu.string_destination(op, W::BYTES, Use::Read)?;
        let b: W = cpu.load(at)?;
        let a: W = cpu.regs.get(slot::RAX);
        compare(cpu, a, b);
        let delta = cpu.string_delta(W::BYTES);
        cpu.string_add(op, slot::RDI, delta);
        Ok(())
    }
}

fn once<W: Word, O: StringOp>(cpu: &mut Cpu, op: &Op) -> Flow {
    O::step::<W>(cpu, op)
}

fn repeated<W: Word, O: StringOp>(cpu: &mut Cpu, op: &Op) -> Flow {
    if cpu.regs.r(slot::RCX) & op.address_mask() == 0 {
        cpu.string_add(op, slot::RCX, 0);
        O::EXTENDS.iter().for_each(|&n| cpu.string_add(op, n, 0));
        return Ok(());
    }
    loop {
        let count = cpu.regs.r(slot::RCX) & op.address_mask();
        let mut done = 0;
        if count >= BULK && cpu.special == 0 && !cpu.flags.has(DF) {
            done = O::bulk::<W>(cpu, op, (count - 1) % PIECE + 1);
        }
        if done == 0 {
            O::step::<W>(cpu, op)?;
            done = 1;
        }
        cpu.string_add(op, slot::RCX, done.wrapping_neg());
        let left = count - done;
        if left == 0 || O::COMPARES && cpu.flags.zf() == op.has(op_flags::REPNE) {
            return Ok(());
        }
        let steps = cpu.special & (special::TRAP | special::MTF) != 0;
        if cpu.stop_after || steps || left.is_multiple_of(PIECE) {
            cpu.retired += 1;
            return Err(Stop::AGAIN);
        }
    }
}

macro_rules! string {
    ($d:expr, $bits:literal, $o:ty) => {
        if $d.op.has(op_flags::REP | op_flags::REPNE) {
            by_width!($bits, repeated, $o)
        } else {
            by_width!($bits, once, $o)
        }
    };
}

pub(in crate::cpu) fn select(d: &mut Decoded) -> Selected {
    let handler = handler(d)?;
    d.op.seg = segment(d.i.memory_segment());
    Some(handler)
}

fn handler(d: &Decoded) -> Selected {
    match d.i.code() {
        Code::Movsb_m8_m8 => string!(d, 8, Movs),
        Code::Movsw_m16_m16 => string!(d, 16, Movs),
        Code::Movsd_m32_m32 => string!(d, 32, Movs),
        Code::Movsq_m64_m64 => string!(d, 64, Movs),
        Code::Stosb_m8_AL => string!(d, 8, Stos),
        Code::Stosw_m16_AX => string!(d, 16, Stos),
        Code::Stosd_m32_EAX => string!(d, 32, Stos),
        Code::Stosq_m64_RAX => string!(d, 64, Stos),
        Code::Lodsb_AL_m8 => string!(d, 8, Lods),
        Code::Lodsw_AX_m16 => string!(d, 16, Lods),
        Code::Lodsd_EAX_m32 => string!(d, 32, Lods),
        Code::Lodsq_RAX_m64 => string!(d, 64, Lods),
        Code::Cmpsb_m8_m8 => string!(d, 8, Cmps),
        Code::Cmpsw_m16_m16 => string!(d, 16, Cmps),
        Code::Cmpsd_m32_m32 => string!(d, 32, Cmps),
        Code::Cmpsq_m64_m64 => string!(d, 64, Cmps),
        Code::Scasb_AL_m8 => string!(d, 8, Scas),
        Code::Scasw_AX_m16 => string!(d, 16, Scas),
        Code::Scasd_EAX_m32 => string!(d, 32, Scas),
        Code::Scasq_RAX_m64 => string!(d, 64, Scas),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use crate::cpu::slot;
    use crate::testing::{CODE, DATA, PT, Rig};
    use iced_x86::code_asm::*;

    fn bytes(rig: &Rig, gpa: u64, n: usize) -> Vec<u8> {
        let mut b = vec![0; n];
        rig.ram.read(gpa, &mut b).unwrap();
        b
    }

    #[test]
    fn a_copy_over_many_pages_is_exact_and_stops_between_pieces() {
        let mut rig = Rig::long();
        let data: Vec<u8> = (0..40_000u32).map(|i| ((i * 7) >> 3) as u8).collect();
        rig.ram.write(DATA + 5, &data).unwrap();
        rig.set_r(slot::RSI, DATA + 5).set_r(slot::RDI, DATA + 0x2_0ffb).set_r(slot::RCX, 40_000);
        rig.code(|a| {
            a.rep().movsb()?;
            a.jmp(CODE)
        });
        rig.run(1);
        assert!(rig.r(slot::RCX) > 0, "a piece is a unit of the budget");
        rig.run(3);
        assert_eq!((rig.r(slot::RCX), rig.r(slot::RSI)), (0, DATA + 5 + 40_000));
        assert_eq!(bytes(&rig, DATA + 0x2_0ffb, 40_001), [data, vec![0]].concat());
    }

    #[test]
    fn overlapping_copies_repeat_what_they_wrote() {
        for (distance, size) in [(1u64, 1u64), (3, 8), (8, 8), (9, 4)] {
            let mut rig = Rig::long();
            let data: Vec<u8> = (0..64).collect();
            rig.ram.write(DATA, &data).unwrap();
            rig.set_r(slot::RSI, DATA).set_r(slot::RDI, DATA + distance).set_r(slot::RCX, 20);
            rig.code(|a| match size {
                1 => a.rep().movsb(),
                4 => a.rep().movsd(),
                _ => a.rep().movsq(),
            });
            rig.run(1);
            let mut expected = [data, vec![0; 200]].concat();
            for i in 0..20 {
                let at = i * size as usize;
                let element = expected[at..at + size as usize].to_vec();
                expected[at + distance as usize..][..size as usize].copy_from_slice(&element);
            }
            assert_eq!(bytes(&rig, DATA, 200), expected[..200], "{distance} {size}");
        }
    }

    #[test]
    fn a_fault_in_the_middle_leaves_the_registers_at_the_element_that_faults() {
        let mut rig = Rig::long();
        rig.write_u64(PT + 8 * 0x101, 0); // CODE + 0x1000 is not present
        rig.set_r(slot::RDI, CODE + 0x1000 - 24).set_r(slot::RCX, 100).set_r(slot::RAX, 0x1122);
        rig.code(|a| a.rep().stosq());
        let op = rig.op(0);
        let stop = (op.handler)(&mut rig.cpu, &op).unwrap_err();
        assert_eq!(stop, crate::cpu::Stop::error(14, 2));
        assert_eq!((rig.r(slot::RCX), rig.r(slot::RDI), rig.cpu.fault_address), (97, CODE + 0x1000, CODE + 0x1000));
        assert_eq!(rig.read_u64(CODE + 0x1000 - 8), 0x1122);
    }

    #[test]
    fn compares_and_scans_end_by_the_zero_flag() {
        let mut rig = Rig::long();
        rig.ram.write(DATA, b"hello world\0").unwrap();
        rig.ram.write(DATA + 0x100, b"hello there").unwrap();
        rig.set_r(slot::RDI, DATA).set_r(slot::RCX, u64::MAX).code(|a| {
            a.repne().scasb()?;
            a.mov(rbx, rcx)?;
            a.mov(rsi, DATA)?;
            a.mov(rdi, DATA + 0x100)?;
            a.mov(ecx, 11)?;
            a.repe().cmpsb()?;
            a.setb(dl)
        });
        rig.run(7);
        assert_eq!(!rig.r(slot::RBX), 12, "strlen + 1");
        assert_eq!((rig.r(slot::RCX), rig.r(slot::RDX) & 1), (4, 0));
    }

    #[test]
    fn addresses_of_16_bits_wrap_and_backwards_goes_down() {
        let mut rig = Rig::real();
        rig.set_r(slot::RDI, 0xabcd_fffe).set_r(slot::RCX, 0xffff_0004).set_r(slot::RAX, 0x5a);
        rig.code(|a| {
            a.rep().stosb()?;
            a.std()?;
            a.mov(cx, 2)?;
            a.rep().stosb()
        });
        rig.run(1);
        assert_eq!((rig.r(slot::RDI), rig.r(slot::RCX)), (0xabcd_0002, 0xffff_0000));
        assert_eq!(bytes(&rig, 0, 3), [0x5a, 0x5a, 0]);
        assert_eq!(bytes(&rig, 0xfffd, 4), [0, 0x5a, 0x5a, 0]);
        rig.set_r(slot::RAX, 0x77);
        rig.run(3);
        assert_eq!((rig.r(slot::RDI), bytes(&rig, 0, 4)), (0xabcd_0000, vec![0x5a, 0x77, 0x77, 0]));
    }
}
