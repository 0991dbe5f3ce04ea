use super::{raised, rig, with_cr4};
use crate::arch::exception::{GP, UD};
use crate::cpu::slot;
use crate::testing::{DATA, Rig};
use iced_x86::code_asm::*;

/// π on the stack, XMM1 and XMM15 set, FIP at the FLDPI.
fn loaded() -> Rig {
    let mut rig = rig();
    rig.code(|a| {
        a.fldz()?;
        a.fldpi()
    });
    rig.run(2);
    rig.cpu.fp.xmm[1] = 0x0f0e_0d0c_0b0a_0908_0706_0504_0302_0100;
    rig.cpu.fp.xmm[15] = u128::MAX;
    rig.cpu.fp.mxcsr = 0x1fa0;
    rig
}

fn read<const N: usize>(rig: &Rig, gpa: u64) -> [u8; N] {
    let mut b = [0; N];
    rig.ram.read(gpa, &mut b).unwrap();
    b
}

const PI: [u8; 10] = [0x35, 0xc2, 0x68, 0x21, 0xa2, 0xda, 0x0f, 0xc9, 0x00, 0x40];

#[test]
fn fxsave_area_is_laid_out_as_the_sdm_says_and_restores() {
    let mut rig = loaded();
    rig.ram.write(DATA, &[0x5a; 512]).unwrap();
    assert_eq!(raised(&mut rig, |a| a.fxsave64(ptr(rdi))), None);
    let area: [u8; 512] = read(&rig, DATA);
    assert_eq!(area[..8], [0x7f, 0x03, 0x00, 0x30, 0xc0, 0, 0, 0]);
    assert_eq!(area[8..16], (crate::testing::CODE + 2).to_le_bytes());
    assert_eq!(area[24..32], [0xa0, 0x1f, 0, 0, 0xff, 0xff, 0, 0]);
    assert_eq!((&area[32..42], &area[42..48], &area[48..64]), (&PI[..], &[0; 6][..], &[0; 16][..]));
    assert_eq!(area[176..192], std::array::from_fn::<u8, 16, _>(|n| n as u8));
    assert_eq!((&area[400..416], &area[416..]), (&[0xff; 16][..], &[0x5a; 96][..]));
    let saved = rig.cpu.fp.clone();
    rig.cpu.fp = Default::default();
    assert_eq!(raised(&mut rig, |a| a.fxrstor64(ptr(rdi))), None);
    assert_eq!(rig.cpu.fp, saved);
    rig.ram.write(DATA + 26, &[1]).unwrap();
    assert_eq!(raised(&mut rig, |a| a.fxrstor64(ptr(rdi))), Some(GP), "reserved bit of MXCSR");
}

#[test]
fn outside_64_bit_mode_fxsave_has_eight_xmm_registers() {
    let mut rig = Rig::protected();
    rig.cpu.cr4 = rig.cpu.cr4.with_osfxsr(true);
    rig.cpu.fp.xmm = [u128::MAX; 16];
    rig.set_r(slot::RDI, DATA);
    rig.ram.write(DATA, &[0x5a; 512]).unwrap();
    assert_eq!(raised(&mut rig, |a| a.fxsave(ptr(edi))), None);
    let area: [u8; 512] = read(&rig, DATA);
    assert_eq!((&area[272..288], &area[288..]), (&[0xff; 16][..], &[0x5a; 224][..]));
    rig.ram.write(DATA + 160, &[0; 256]).unwrap();
    assert_eq!(raised(&mut rig, |a| a.fxrstor(ptr(edi))), None);
    assert_eq!((rig.cpu.fp.xmm[7], rig.cpu.fp.xmm[8]), (0, u128::MAX));
}

#[test]
fn fnsave_and_fnstenv_have_the_formats_of_both_operand_sizes() {
    let mut rig = loaded();
    assert_eq!(raised(&mut rig, |a| a.fnstenv(ptr(rdi))), None);
    let env: [u8; 28] = read(&rig, DATA);
    assert_eq!(env[..12], [0x7f, 3, 0xff, 0xff, 0, 0x30, 0xff, 0xff, 0xff, 0x4f, 0xff, 0xff]);
    assert_eq!(env[12..16], (crate::testing::CODE as u32 + 2).to_le_bytes());
    let mut real = Rig::real();
    real.cpu.fp.init_x87();
    real.set_r(slot::RDI, 0x5000);
    (real.cpu.fp.instruction, real.cpu.fp.opcode, real.cpu.fp.data) = (0x1_2345, 0x123, 0x5_4321);
    assert_eq!(raised(&mut real, |a| a.fnsave(ptr(di))), None);
    let state: [u8; 94] = read(&real, 0x5000);
    assert_eq!(state[..14], [0x7f, 3, 0, 0, 0xff, 0xff, 0x45, 0x23, 0x23, 0x11, 0x21, 0x43, 0x00, 0x50]);
    // FNSAVE initializes; FRSTOR brings all back.
    let mut rig = loaded();
    let before = rig.cpu.fp.clone();
    assert_eq!(raised(&mut rig, |a| a.fnsave(ptr(rdi))), None);
    assert_eq!((rig.cpu.fp.full, rig.cpu.fp.status), (0, 0));
    assert_eq!(raised(&mut rig, |a| a.frstor(ptr(rdi))), None);
    assert_eq!(rig.cpu.fp, before);
    assert_eq!(read::<10>(&rig, DATA + 28), PI);
}

#[test]
fn xsave_writes_what_is_asked_for_and_xrstor_brings_it_back() {
    let mut rig = loaded();
    rig.set_r(slot::RAX, 2).set_r(slot::RDX, 0);
    rig.ram.write(DATA, &[0x5a; 576]).unwrap();
    rig.write_u64(DATA + 512, 5);
    assert_eq!(raised(&mut rig, |a| a.xsave64(ptr(rdi))), None);
    let area: [u8; 576] = read(&rig, DATA);
    assert_eq!((&area[..24], &area[24..28]), (&[0x5a; 24][..], &[0xa0, 0x1f, 0, 0][..]));
    assert_eq!((&area[32..160], &area[400..416]), (&[0x5a; 128][..], &[0xff; 16][..]));
    assert_eq!((rig.read_u64(DATA + 512), area[520]), (7, 0x5a), "XSTATE_BV keeps what was not asked for");

    for compact in [false, true] {
        let mut rig = loaded();
        rig.set_r(slot::RAX, 7).set_r(slot::RDX, 0);
        let code = if compact { CodeAssembler::xsavec64 } else { CodeAssembler::xsave64 };
        assert_eq!(raised(&mut rig, |a| code(a, ptr(rdi))), None);
        assert_eq!(rig.read_u64(DATA + 520), if compact { 1 << 63 | 3 } else { 0 });
        let saved = rig.cpu.fp.clone();
        rig.cpu.fp = Default::default();
        assert_eq!(raised(&mut rig, |a| a.xrstor64(ptr(rdi))), None);
        assert_eq!(rig.cpu.fp, saved);
        // What the area does not have is initialized.
        rig.write_u64(DATA + 512, 0);
        assert_eq!(raised(&mut rig, |a| a.xrstor64(ptr(rdi))), None);
        let fp = &rig.cpu.fp;
        assert_eq!((fp.control, fp.full, fp.xmm, fp.r), (0x37f, 0, [0; 16], [0; 8]));
        assert_eq!(fp.mxcsr, if compact { 0x1f80 } else { 0x1fa0 });
    }
}

#[test]
fn xrstor_refuses_headers_that_ask_for_what_is_not_there() {
    // (XSTATE_BV, XCOMP_BV, the next word)
    let bad = [(4, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1 << 63, 0), (0, 1 << 63 | 4, 0), (0, 1 << 63, 1)];
    for (present, compact, next) in bad {
        let mut rig = rig();
        rig.set_r(slot::RAX, 3);
        rig.write_u64(DATA + 512, present);
        rig.write_u64(DATA + 520, compact);
        rig.write_u64(DATA + 528, next);
        assert_eq!(raised(&mut rig, |a| a.xrstor(ptr(rdi))), Some(GP), "{present} {compact:#x} {next}");
    }
}

#[test]
fn xsavec_and_xgetbv_see_which_components_are_in_use() {
    let mut rig = rig();
    rig.set_r(slot::RCX, 1);
    assert_eq!(raised(&mut rig, |a| a.xgetbv()), None);
    assert_eq!(rig.r(slot::RAX), 0);
    rig.cpu.fp.mxcsr = 0x1f81;
    assert_eq!(raised(&mut rig, |a| a.xgetbv()), None);
    assert_eq!(rig.r(slot::RAX), 2);
    rig.set_r(slot::RAX, 3).set_r(slot::RDX, 0);
    assert_eq!(raised(&mut rig, |a| a.xsavec(ptr(rdi))), None);
    assert_eq!((rig.read_u64(DATA + 512), rig.read_u64(DATA + 520)), (2, 1 << 63 | 3));
}

#[test]
fn xsetbv_takes_what_the_model_has() {
    for (index, value, expected) in [(0, 1, None), (0, 3, None), (0, 2, Some(GP)), (0, 7, Some(GP)), (1, 3, Some(GP))] {
        let mut rig = rig();
        rig.set_r(slot::RCX, index).set_r(slot::RAX, value).set_r(slot::RDX, 0);
        assert_eq!(raised(&mut rig, |a| a.xsetbv()), expected);
    }
    let mut rig = rig();
    with_cr4(&mut rig, |c| c.with_osxsave(false));
    assert_eq!(raised(&mut rig, |a| a.xsetbv()), Some(UD));
}

#[test]
fn cpuid_describes_the_xsave_area_and_osxsave() {
    let mut rig = rig();
    assert_eq!(rig.cpu.cpuid(0xd, 0), [3, 576, 576, 0]);
    assert_eq!(rig.cpu.cpuid(1, 0)[2] >> 26 & 3, 3);
    with_cr4(&mut rig, |c| c.with_osxsave(false));
    assert_eq!(rig.cpu.cpuid(1, 0)[2] >> 26 & 3, 1);
}

#[test]
fn r21_init_keeps_floating_point_and_xcr0() {
    let mut rig = loaded();
    let fp = rig.cpu.fp.clone();
    rig.cpu.init_state();
    assert_eq!((rig.cpu.fp, rig.cpu.xcr0), (fp, 3));
    assert_eq!(Rig::reset().cpu.fp.control, 0x40);
}

#[test]
fn a_restored_state_with_reserved_bits_is_refused() {
    let mut rig = loaded();
    let mut state = rig.cpu.save();
    state.fp.mxcsr = 1 << 16;
    assert!(rig.cpu.restore(&state).is_err());
    state.fp.mxcsr = 0x1f80;
    assert!(rig.cpu.restore(&state).is_ok());
    assert_eq!(rig.cpu.fp, state.fp);
}
