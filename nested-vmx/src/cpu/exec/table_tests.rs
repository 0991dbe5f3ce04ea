//! What the host comparison ([`crate::cpu::differential`]) does not reach: instructions by the SDM's words, each with
//! all status flags clear and with all set; real mode, faults, repeated strings and what they meet.

use crate::cpu::flags::{AC, AF, ARITHMETIC, CF, DF, OF, PF, SF, TF, ZF};
use crate::cpu::regs::HIGH_BYTE;
use crate::cpu::seg::reg;
use crate::cpu::slot::{RAX, RBP, RBX, RCX, RDI, RDX, RSI, RSP};
use crate::cpu::{RunExit, Stop};
use crate::testing::{CODE, DATA, Rig};
use iced_x86::code_asm::*;
use iced_x86::{Decoder, DecoderOptions, IcedError, RflagsBits};

type Assemble = fn(&mut CodeAssembler) -> Result<(), IcedError>;

/// RAX and RDX before and after; the flags that the SDM defines, and their values. What it leaves undefined is compared
/// with the host's, elsewhere.
struct Row {
    name: &'static str,
    code: Assemble,
    before: (u64, u64),
    after: (u64, u64),
    changes: u64,
    flags: u64,
}

macro_rules! row {
    ($name:literal, $code:expr, ($a:expr, $d:expr) => ($ra:expr, $rd:expr), $changes:expr => $flags:expr) => {
        Row { name: $name, code: $code, before: ($a, $d), after: ($ra, $rd), changes: $changes, flags: $flags }
    };
}

const ALL: u64 = ARITHMETIC;
const TOP: u64 = 1 << 63;

const ROWS: &[Row] = &[
    row!("shl by 4", |a| a.shl(rax, 4), (0xf000_0000_0000_0001, 0) => (0x10, 0), CF | ZF | SF | PF => CF),
    row!("shr by 1", |a| a.shr(rax, 1), (TOP | 1, 0) => (TOP >> 1, 0), ALL & !AF => CF | OF | PF),
    row!("sar by 1", |a| a.sar(al, 1), (0x81, 0) => (0xc0, 0), ALL & !AF => CF | SF | PF),
    row!("shift by 0 changes no flag", |a| a.shl(eax, 32), (!0, 0) => (0xffff_ffff, 0), 0 => 0),
    row!("rol leaves SF ZF PF", |a| a.rol(ax, 4), (0x1234, 0) => (0x2341, 0), CF => CF),
    row!("ror by 1", |a| a.ror(al, 1), (1, 0) => (0x80, 0), CF | OF => CF | OF),
    row!("shld", |a| a.shld(rax, rdx, 8), (0x11, 0xab << 56) => (0x11ab, 0xab << 56), CF | ZF | SF | PF => 0),
    row!("shrd", |a| a.shrd(eax, edx, 4), (0x10, 5) => (0x5000_0001, 5), CF | ZF | SF | PF => 0),
    row!("mul", |a| a.mul(rdx), (TOP, 4) => (0, 2), CF | OF => CF | OF),
    row!("mul that fits", |a| a.mul(dl), (0x0f, 0x11) => (0xff, 0x11), CF | OF => 0),
    row!("imul", |a| a.imul_2(rax, rdx), (!0, 3) => (!2, 3), CF | OF => 0),
    row!("imul that does not fit", |a| a.imul_3(ax, dx, 0x100), (0, 0x100) => (0, 0x100), CF | OF => CF | OF),
    row!("div", |a| a.div(dl), (1000, 7) => ((1000 / 7) | ((1000 % 7) << 8), 7), 0 => 0),
    row!("idiv", |a| a.idiv(cl), (-7i64 as u64 & 0xffff, 0) => (0xff << 8 | 0xfd, 0), 0 => 0),
    row!("bt", |a| a.bt(rax, 63), (TOP, 0) => (TOP, 0), CF => CF),
    row!("bts", |a| a.bts(eax, edx), (0, 33) => (2, 33), CF => 0),
    row!("bsf of 0", |a| a.bsf(rax, rdx), (5, 0) => (5, 0), ZF => ZF),
    row!("bsr", |a| a.bsr(rax, rdx), (5, 0x8001) => (15, 0x8001), ZF => 0),
    row!("tzcnt of 0", |a| a.tzcnt(ax, dx), (0, 0) => (16, 0), CF | ZF => CF),
    row!("lzcnt", |a| a.lzcnt(eax, edx), (0, !0) => (0, !0), CF | ZF => ZF),
    row!("popcnt", |a| a.popcnt(rax, rdx), (0, 0x8000_0000_0000_0003) => (3, 0x8000_0000_0000_0003), ALL => 0),
    row!("bswap", |a| a.bswap(eax), (0x1122_3344_5566_7788, 0) => (0x8877_6655, 0), 0 => 0),
    row!("cwde", |a| a.cwde(), (0x8000, 0) => (0xffff_8000, 0), 0 => 0),
    row!("cqo", |a| a.cqo(), (TOP, 1) => (TOP, !0), 0 => 0),
    row!("cwd keeps the rest", |a| a.cwd(), (0x8000, !0 << 16) => (0x8000, !0), 0 => 0),
    row!("xadd of one register", |a| a.xadd(eax, eax), (3, 0) => (6, 0), ALL => PF),
    row!("cmpxchg that fails", |a| a.cmpxchg(edx, ecx), (1, 2) => (2, 2), ALL => CF | AF | SF | PF),
    row!("sahf", |a| a.sahf(), (0xd5 << 8, 0) => (0xd5 << 8, 0), ALL & !OF => ALL & !OF),
    row!("andn", |a| a.andn(rax, rdx, rax), (0xff, 0xf0) => (0xf, 0xf0), CF | OF | ZF | SF => 0),
    row!("bextr", |a| a.bextr(eax, eax, edx), (0xabcd, 0x0804) => (0xbc, 0x0804), CF | OF | ZF => 0),
    row!("pdep", |a| a.pdep(rax, rax, rdx), (0b101, 0xf00f) => (5, 0xf00f), 0 => 0),
    row!("pext", |a| a.pext(rax, rax, rdx), (0xabcd, 0xf0f0) => (0xac, 0xf0f0), 0 => 0),
    row!("crc32", |a| a.crc32(eax, dl), (0, 1) => (0xf26b_8303, 1), 0 => 0),
];

/// The status flags that the instruction at CODE leaves undefined.
fn undefined(rig: &Rig) -> u64 {
    let mut bytes = [0; 16];
    rig.ram.read(CODE, &mut bytes).unwrap();
    let undefined = Decoder::new(64, &bytes, DecoderOptions::NONE).decode().rflags_undefined();
    let pairs = [
        (RflagsBits::OF, OF),
        (RflagsBits::SF, SF),
        (RflagsBits::ZF, ZF),
        (RflagsBits::AF, AF),
        (RflagsBits::CF, CF),
        (RflagsBits::PF, PF),
    ];
    pairs.iter().filter(|(bit, _)| undefined & bit != 0).fold(0, |m, (_, flag)| m | flag)
}

#[test]
fn instructions_by_the_manual_with_all_flags_clear_and_all_set() {
    for row in ROWS {
        for flags in [0, ARITHMETIC] {
            let mut rig = Rig::long();
            rig.cpu.flags.set_status(flags);
            rig.set_r(RAX, row.before.0).set_r(RDX, row.before.1).set_r(RCX, 2).code(row.code);
            rig.run(1);
            assert_eq!((rig.r(RAX), rig.r(RDX)), row.after, "{} with flags {flags:#x}", row.name);
            let undefined = undefined(&rig) & !row.changes;
            let expected = flags & !row.changes | row.flags;
            let seen = rig.cpu.flags.status();
            assert_eq!(seen & !undefined, expected & !undefined, "{} with flags {flags:#x}", row.name);
        }
    }
}

/// The fault of the first instruction at CODE, whose state must be that of its start.
fn fault(rig: &mut Rig) -> Option<Stop> {
    let op = rig.op(0);
    let before = (rig.cpu.regs.general(), rig.cpu.flags.bits());
    let stop = (op.handler)(&mut rig.cpu, &op).err();
    if stop.is_some() {
        assert_eq!((rig.cpu.regs.general(), rig.cpu.flags.bits()), before);
    }
    stop
}

#[test]
fn faults_leave_the_state_of_the_instructions_start() {
    let cases: [(Assemble, Stop); 6] = [
        (|a| a.div(rbx), Stop::DE),
        (|a| a.idiv(cl), Stop::DE),
        (|a| a.cmpxchg16b(ptr(rdi + 8)), Stop::GP0),
        (|a| a.mov(rax, ptr(rsi)), Stop::GP0),
        (|a| a.add(ptr(rbp), rax), Stop::SS0),
        (|a| a.enter(16, 3), Stop::SS0),
    ];
    for (code, stop) in cases {
        let mut rig = Rig::long();
        rig.set_r(RDI, DATA).set_r(RSI, 1 << 60).set_r(RBP, 1 << 60).set_r(RAX, 0x80 << 8).set_r(RCX, 1).code(code);
        assert_eq!(fault(&mut rig), Some(stop));
    }
}

#[test]
fn vex_needs_protected_mode_and_bound_its_bounds() {
    let mut rig = Rig::protected();
    rig.set_r(RCX, 0xf0).set_r(RDX, 0xff).code(|a| a.andn(eax, ecx, edx));
    assert_eq!(fault(&mut rig), None);
    assert_eq!(rig.r(RAX), 0x0f);
    let mut rig = Rig::real();
    rig.code(|a| a.andn(eax, ecx, edx));
    assert_eq!(fault(&mut rig), Some(Stop::UD));
    for (index, out) in [(-5i32, false), (-6, true), (7, false), (8, true)] {
        let mut rig = Rig::protected();
        rig.write_u64(DATA, u64::from(-5i32 as u32) | 7 << 32);
        rig.set_r(RAX, u64::from(index as u32)).set_r(RDI, DATA).code(|a| a.bound(eax, qword_ptr(edi)));
        assert_eq!(fault(&mut rig), out.then_some(Stop::fault(5)));
    }
}

#[test]
fn pusha_and_popa_of_real_mode_wrap_at_64_kib() {
    let mut rig = Rig::real();
    for (n, r) in [RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI].into_iter().enumerate() {
        rig.set_r(r, 0x1110 + n as u64);
    }
    rig.set_r(RSP, 0xdead_0008).code(|a| {
        a.pusha()?;
        a.mov(bp, 0)?;
        a.mov(di, 0)?;
        a.popa()
    });
    rig.run(1);
    assert_eq!(rig.r(RSP), 0xdead_fff8);
    assert_eq!(rig.read_u64(0), 0x1110 << 48 | 0x1111 << 32 | 0x1112 << 16 | 0x1113);
    assert_eq!(rig.read_u64(0xfff8), 0x0008 << 48 | 0x1115 << 32 | 0x1116 << 16 | 0x1117);
    rig.run(3);
    assert_eq!((rig.r(RSP), rig.r(RBP), rig.r(RDI)), (0xdead_0008, 0x1115, 0x1117));
}

#[test]
fn a_limit_ends_a_string_where_the_segment_does() {
    let mut rig = Rig::protected();
    rig.cpu.seg[usize::from(reg::ES)].limit = DATA as u32 + 0x2fff;
    rig.set_r(RDI, DATA).set_r(RCX, 0x1000).set_r(RAX, 0x5a5a_5a5a).code(|a| a.rep().stosd());
    let op = rig.op(0);
    assert_eq!((op.handler)(&mut rig.cpu, &op), Err(Stop::GP0));
    assert_eq!((rig.r(RDI), rig.r(RCX)), (DATA + 0x3000, 0x400));
    assert_eq!(rig.read_u64(DATA + 0x2ff8), 0x5a5a_5a5a_5a5a_5a5a);
    assert_eq!(rig.read_u64(DATA + 0x3000), 0);
}

#[test]
fn a_string_over_code_is_seen_by_the_next_instruction() {
    let mut rig = Rig::long();
    rig.set_r(RDI, CODE + 0x80).set_r(RCX, 16).set_r(RAX, 0x90).code(|a| {
        let mut there = a.create_label();
        let mut back = a.create_label();
        a.jmp(there)?;
        a.set_label(&mut back)?;
        a.rep().stosb()?;
        a.set_label(&mut there)?;
        a.nops_with_size(0x70)?;
        a.mov(rdi, CODE + 0x80)?;
        a.nops_with_size(0x20)?;
        a.jmp(back)
    });
    // At CODE + 0x80 are NOPs, or part of MOV; run once, overwrite with INC RBX (3 bytes each), run again.
    rig.ram.write(CODE + 0x80, &[0x48, 0xff, 0xc3, 0x48, 0xff, 0xc3]).unwrap();
    rig.cpu.regs.set_rip(CODE + 0x80);
    rig.run(2);
    assert_eq!(rig.r(RBX), 2);
    rig.ram.write(CODE, &[0xf3, 0xaa, 0xe9, 0x79, 0, 0, 0]).unwrap();
    rig.cpu.regs.set_rip(CODE);
    rig.run(4);
    assert_eq!(rig.r(RBX), 2, "the INCs are NOPs now");
    assert_eq!((rig.r(RCX), rig.cpu.regs.rip()), (0, CODE + 0x82));
}

#[test]
fn a_single_stepped_string_traps_after_each_iteration() {
    let mut rig = Rig::long();
    rig.set_r(RDI, DATA).set_r(RCX, 3).code(|a| a.rep().stosb());
    rig.cpu.flags.set(TF, true);
    rig.cpu.mode_changed();
    // No IDT: the trap ends in shutdown, after one iteration.
    assert!(matches!(rig.run(10), RunExit::Idle { .. }));
    assert_eq!((rig.r(RCX), rig.r(RDI)), (2, DATA + 1));
}

#[test]
fn devices_are_written_in_order_by_strings() {
    let mut rig = Rig::long();
    rig.ram.write(DATA, &[1, 2, 3, 4]).unwrap();
    rig.set_r(RSI, DATA + 3).set_r(RDI, 0x2000_0003).set_r(RCX, 4).code(|a| a.rep().movsb());
    rig.cpu.flags.set(DF, true);
    let op = rig.op(0);
    while let Err(stop) = (op.handler)(&mut rig.cpu, &op) {
        assert_eq!(stop, Stop::AGAIN);
        rig.cpu.stop_after = false;
    }
    let writes: Vec<_> = rig.world.lock().unwrap().mmio_writes.iter().map(|w| (w.0 & 0xff, w.2)).collect();
    assert_eq!(writes, [(3, 4), (2, 3), (1, 2), (0, 1)]);
}

#[test]
fn random_numbers_repeat_with_the_saved_state() {
    let mut rig = Rig::long();
    rig.code(|a| {
        a.rdrand(rax)?;
        a.rdseed(rdx)?;
        a.jmp(CODE)
    });
    let saved = rig.cpu.save();
    rig.cpu.flags.set_status(ARITHMETIC);
    rig.run(2);
    let first = (rig.r(RAX), rig.r(RDX));
    assert!(first.0 != first.1 && rig.cpu.flags.status() == CF);
    rig.cpu.restore(&saved).unwrap();
    rig.run(2);
    assert_eq!((rig.r(RAX), rig.r(RDX)), first);
}

#[test]
fn high_byte_registers_take_part() {
    let mut rig = Rig::protected();
    rig.set_r(RAX, 0x1234).set_r(RBX, 0x5678).code(|a| {
        a.xchg(ah, bl)?;
        a.rol(bh, 4)
    });
    rig.run(2);
    assert_eq!((rig.r(RAX), rig.r(RBX), rig.cpu.regs.get::<u8>(RBX | HIGH_BYTE)), (0x7834, 0x6512, 0x65));
}

#[test]
fn strings_check_the_alignment_of_each_element() {
    let mut rig = Rig::long_at(3);
    rig.cpu.cr0 = rig.cpu.cr0.with_am(true);
    rig.cpu.flags.set(AC, true);
    rig.cpu.mode_changed();
    rig.set_r(RDI, DATA + 4).set_r(RCX, 100).code(|a| a.rep().stosq());
    assert_eq!(fault(&mut rig), Some(Stop::error(17, 0)));
}

/// House rule no-guest-panic; arithmetic that overflows panics in test builds.
#[test]
fn random_code_in_random_states_never_panics() {
    let mut seed = 0x1234_5678_9abc_def1u64;
    let mut next = move || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    for make in [Rig::real, Rig::protected, Rig::long, || Rig::long_at(3)] {
        let mut rig = make();
        let saved = rig.cpu.save();
        let mut tables = vec![0; 0x5000];
        rig.ram.read(0, &mut tables).unwrap();
        for _ in 0..4000 {
            rig.cpu.restore(&saved).unwrap();
            rig.ram.write(0, &tables).unwrap();
            let mut code: Vec<u8> = (0..8).flat_map(|_| next().to_le_bytes()).collect();
            // Two-byte opcodes as often as others.
            for at in [0, 16, 32] {
                match next() % 4 {
                    0 => code[at] = 0x0f,
                    1 => code[at..at + 2].copy_from_slice(&[0x66, 0x0f]),
                    2 => code[at..at + 2].copy_from_slice(&[0xf3, 0x0f]),
                    _ => {}
                }
            }
            rig.ram.write(CODE, &code).unwrap();
            for n in 0..16 {
                let v = match next() % 4 {
                    0 => DATA + next() % 0x1_0000,
                    1 => next() % 256,
                    2 => next() >> (next() % 64),
                    _ => next(),
                };
                rig.set_r(n, v);
            }
            rig.cpu.flags.set_status(next());
            rig.cpu.flags.set(DF, next() % 4 == 0);
            rig.run(12);
        }
    }
}
