use super::{raised, rig, with_cr0, with_cr4};
use crate::arch::exception::{GP, MF, NM, PF, UD, XM};
use crate::testing::{DATA, PT, Rig};
use iced_x86::IcedError;
use iced_x86::code_asm::*;

type Code = fn(&mut CodeAssembler) -> Result<(), IcedError>;

const X87: Code = |a| a.fld1();
const X87_CONTROL: Code = |a| a.fnstcw(word_ptr(rdi));
const WAIT: Code = |a| a.wait();
const MMX: Code = |a| a.paddb(mm0, mm1);
const MMX_BY_SSE: Code = |a| a.pavgb(mm0, mm1);
const EMMS: Code = |a| a.emms();
const SSE: Code = |a| a.addps(xmm0, xmm1);
const SSE_MOVE: Code = |a| a.movdqu(xmm0, xmmword_ptr(rdi));
const LDMXCSR: Code = |a| a.ldmxcsr(dword_ptr(rdi + 0x100));
const MIXED: Code = |a| a.movq2dq(xmm0, mm0);
const FXSAVE: Code = |a| a.fxsave(ptr(rdi));
const XSAVE: Code = |a| a.xsave(ptr(rdi));
const XGETBV: Code = |a| a.xgetbv();
const MOVNTI: Code = |a| a.movnti(dword_ptr(rdi), eax);

/// SDM 3, "Device-Not-Available Exception", "Emulation of the MMX Instruction Set", "Enabling SSE".
#[test]
fn control_registers_decide_who_raises_nm_and_ud() {
    // (code, CR0.EM, CR0.TS, CR0.TS without MP, no CR4.OSFXSR, no CR4.OSXSAVE)
    let table: [(Code, [Option<u8>; 5]); 14] = [
        (X87, [Some(NM), Some(NM), Some(NM), None, None]),
        (X87_CONTROL, [Some(NM), Some(NM), Some(NM), None, None]),
        (WAIT, [None, Some(NM), None, None, None]),
        (MMX, [Some(UD), Some(NM), Some(NM), None, None]),
        (MMX_BY_SSE, [Some(UD), Some(NM), Some(NM), None, None]),
        (EMMS, [Some(UD), Some(NM), Some(NM), None, None]),
        (SSE, [Some(UD), Some(NM), Some(NM), Some(UD), None]),
        (SSE_MOVE, [Some(UD), Some(NM), Some(NM), Some(UD), None]),
        (LDMXCSR, [Some(UD), Some(NM), Some(NM), Some(UD), None]),
        (MIXED, [Some(UD), Some(NM), Some(NM), Some(UD), None]),
        (FXSAVE, [Some(NM), Some(NM), Some(NM), None, None]),
        (XSAVE, [None, Some(NM), Some(NM), None, Some(UD)]),
        (XGETBV, [None, None, None, None, Some(UD)]),
        (MOVNTI, [None, None, None, None, None]),
    ];
    let cases: [fn(&mut Rig); 5] = [
        |r| with_cr0(r, |c| c.with_em(true)),
        |r| with_cr0(r, |c| c.with_ts(true)),
        |r| with_cr0(r, |c| c.with_ts(true).with_mp(false)),
        |r| with_cr4(r, |c| c.with_osfxsr(false)),
        |r| with_cr4(r, |c| c.with_osxsave(false)),
    ];
    for (n, (code, expected)) in table.into_iter().enumerate() {
        assert_eq!(raised(&mut rig(), code), None, "row {n}, everything enabled");
        for (case, (set, expected)) in cases.into_iter().zip(expected).enumerate() {
            let mut rig = rig();
            set(&mut rig);
            assert_eq!(raised(&mut rig, code), expected, "row {n}, case {case}");
        }
    }
}

#[test]
fn an_unmasked_x87_exception_waits_for_the_next_waiting_instruction() {
    let pending = || {
        let mut rig = rig();
        // 1 / 0 with ZM clear.
        rig.cpu.fp.set_control(0x037b);
        rig.code(|a| {
            a.fld1()?;
            a.fldz()?;
            a.fdivp(st1, st0)
        });
        rig.run(3);
        assert_eq!((rig.cpu.retired(), rig.cpu.fp.status & 0x80bf), (3, 0x8084));
        // Nothing was divided, and nothing popped.
        assert_eq!((rig.cpu.fp.full.count_ones(), rig.cpu.fp.st(0), rig.cpu.fp.opcode), (2, 0, 0x6f9));
        rig
    };
    for code in [X87, WAIT, MMX, MIXED, EMMS] {
        assert_eq!(raised(&mut pending(), code), Some(MF));
        let mut ignored = pending();
        with_cr0(&mut ignored, |c| c.with_ne(false));
        assert_eq!(raised(&mut ignored, code), None, "FERR# is not wired");
    }
    let quiet: [Code; 6] = [X87_CONTROL, SSE, FXSAVE, |a| a.fnclex(), |a| a.fninit(), |a| a.fnstsw(ax)];
    for code in quiet {
        assert_eq!(raised(&mut pending(), code), None);
    }
    let mut rig = pending();
    assert_eq!(raised(&mut rig, |a| a.fnclex()), None);
    assert_eq!(raised(&mut rig, X87), None);
}

#[test]
fn unmasking_a_recorded_exception_makes_it_pending() {
    let mut rig = rig();
    rig.ram.write(DATA, &0x037bu16.to_le_bytes()).unwrap();
    rig.code(|a| {
        a.fld1()?;
        a.fldz()?;
        a.fdivp(st1, st0)?;
        a.fldcw(word_ptr(rdi))
    });
    rig.run(4);
    assert_eq!(rig.cpu.fp.status & 0x8084, 0x8084);
    assert_eq!(raised(&mut rig, WAIT), Some(MF));
}

#[test]
fn an_unmasked_simd_exception_sets_flags_and_writes_nothing() {
    let mut rig = rig();
    let one_and_zero = u128::from(1f32.to_bits());
    for (osxmmexcpt, expected) in [(true, XM), (false, UD)] {
        with_cr4(&mut rig, |c| c.with_osxmmexcpt(osxmmexcpt));
        (rig.cpu.fp.xmm[0], rig.cpu.fp.xmm[1], rig.cpu.fp.mxcsr) = (one_and_zero, 0, 0x1f80 & !(1 << 9));
        assert_eq!(raised(&mut rig, |a| a.divss(xmm0, xmm1)), Some(expected));
        assert_eq!((rig.cpu.fp.xmm[0], rig.cpu.fp.mxcsr & 0x3f), (one_and_zero, 4));
    }
    // Masked, the quotient is infinite.
    rig.cpu.fp.mxcsr = 0x1f80;
    assert_eq!(raised(&mut rig, |a| a.divss(xmm0, xmm1)), None);
    assert_eq!((rig.cpu.fp.xmm[0], rig.cpu.fp.mxcsr), (0x7f80_0000, 0x1f84));
}

#[test]
fn sixteen_byte_operands_are_aligned_except_where_they_need_not_be() {
    let aligned: [Code; 6] = [
        |a| a.paddb(xmm0, xmmword_ptr(rdi + 1)),
        |a| a.addps(xmm0, xmmword_ptr(rdi + 8)),
        |a| a.movaps(xmmword_ptr(rdi + 1), xmm0),
        |a| a.movdqa(xmm0, xmmword_ptr(rdi + 4)),
        |a| a.movntdq(xmmword_ptr(rdi + 8), xmm0),
        |a| a.pshufd(xmm0, xmmword_ptr(rdi + 2), 1),
    ];
    for code in aligned {
        assert_eq!(raised(&mut rig(), code), Some(GP));
    }
    let free: [Code; 7] = [
        |a| a.movups(xmm0, xmmword_ptr(rdi + 1)),
        |a| a.movdqu(xmmword_ptr(rdi + 1), xmm0),
        |a| a.lddqu(xmm0, xmmword_ptr(rdi + 3)),
        |a| a.pcmpistri(xmm0, xmmword_ptr(rdi + 3), 0),
        |a| a.addsd(xmm0, qword_ptr(rdi + 1)),
        |a| a.cvtps2pd(xmm0, qword_ptr(rdi + 1)),
        |a| a.movhps(xmm0, qword_ptr(rdi + 1)),
    ];
    for code in free {
        assert_eq!(raised(&mut rig(), code), None);
    }
    let areas: [Code; 3] = [|a| a.fxsave(ptr(rdi + 8)), |a| a.fxrstor(ptr(rdi + 8)), |a| a.xsave(ptr(rdi + 16))];
    for code in areas {
        assert_eq!(raised(&mut rig(), code), Some(GP));
    }
}

#[test]
fn a_long_operand_that_ends_in_an_absent_page_is_not_written_at_all() {
    // The first 2 MiB have 4 KiB pages: page 0x51 is absent.
    let stores: [Code; 6] = [
        |a| a.movups(xmmword_ptr(rdi + 0xff8), xmm0),
        |a| a.fstp(tbyte_ptr(rdi + 0xff8)),
        |a| a.fnsave(ptr(rdi + 0xfd0)),
        |a| a.fnstenv(ptr(rdi + 0xff0)),
        |a| a.fxsave(ptr(rdi + 0xf00)),
        |a| a.maskmovdqu(xmm0, xmm1),
    ];
    for (n, code) in stores.into_iter().enumerate() {
        let mut rig = rig();
        rig.write_u64(PT + 8 * 0x51, 0);
        let base = if n == 5 { 0x5_0ff8 } else { 0x5_0000 };
        rig.set_r(crate::cpu::slot::RDI, base);
        rig.cpu.fp.xmm = [u128::MAX; 16];
        rig.cpu.fp.full = 0xff;
        rig.ram.write(0x5_0e00, &[0xaa; 0x200]).unwrap();
        assert_eq!(raised(&mut rig, code), Some(PF), "{n}");
        let mut bytes = [0; 0x200];
        rig.ram.read(0x5_0e00, &mut bytes).unwrap();
        assert!(bytes.iter().all(|&b| b == 0xaa), "{n}");
    }
}

#[test]
fn mmx_results_appear_in_the_x87_registers() {
    let mut rig = rig();
    rig.cpu.fp.set_top(3);
    rig.set_r(crate::cpu::slot::RAX, 0x1122_3344_5566_7788).code(|a| {
        a.movq(mm2, rax)?;
        a.paddb(mm2, mm2)?;
        a.movq(rcx, mm2)?;
        a.emms()
    });
    rig.run(3);
    let fp = &rig.cpu.fp;
    assert_eq!((fp.top(), fp.full), (0, 0xff));
    assert_eq!(fp.st(2), 0xffff_2244_6688_aacc_ee10);
    assert_eq!(rig.r(crate::cpu::slot::RCX), 0x2244_6688_aacc_ee10);
    rig.run(1);
    assert_eq!((rig.cpu.fp.top(), rig.cpu.fp.full), (0, 0));
}
