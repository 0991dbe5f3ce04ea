//! Single-stepping, breakpoints, RF.

use super::{HANDLERS, KERNEL_DATA, halted, protected, put32};
use crate::arch::cr::{dr, rflags};
use crate::cpu::slot;
use crate::event::ActivityState;
use crate::testing::{CODE, DATA};
use iced_x86::code_asm::*;

#[test]
fn single_step_traps_after_each_instruction() {
    let mut rig = protected(0);
    rig.cpu.flags.set(rflags::TF, true);
    rig.cpu.mode_changed();
    rig.code(|a| {
        a.nop()?;
        a.nop()
    });
    rig.run(10);
    let (v, stack) = halted(&rig);
    assert_eq!((v, stack[0]), (1, CODE as u32 + 1));
    assert_eq!(rig.cpu.dr6, dr::DR6_RESET | dr::DR6_BS);
    assert_eq!(u64::from(stack[2]) & (rflags::TF | rflags::RF), rflags::TF);
}

#[test]
fn popf_that_sets_tf_traps_behind_the_next_instruction_and_mov_ss_delays_it() {
    let mut rig = protected(0);
    rig.code(|a| {
        a.push(0x102)?;
        a.popfd()?;
        a.mov(ss, eax)?;
        a.nop()?;
        a.nop()
    });
    rig.set_r(slot::RAX, KERNEL_DATA.into());
    rig.run(10);
    let (v, stack) = halted(&rig);
    assert_eq!((v, u64::from(stack[0])), (1, CODE + 5 + 1 + 2 + 1));
}

#[test]
fn data_breakpoints_trap_after_the_access_and_instruction_breakpoints_before() {
    let mut rig = protected(0);
    rig.code(|a| {
        a.mov(eax, DATA as u32)?;
        a.mov(dr0, eax)?;
        a.mov(eax, 0xd0002)?; // write, 4 bytes, G0
        a.mov(dr7, eax)?;
        a.mov(eax, dword_ptr(DATA as u32))?;
        a.mov(byte_ptr(DATA as u32 + 3), 1)?;
        a.nop()
    });
    rig.run(20);
    let (v, stack) = halted(&rig);
    assert_eq!((v, rig.cpu.dr6 & 0xf), (1, 1));
    assert_eq!(u64::from(stack[0]), CODE + 5 + 3 + 5 + 3 + 5 + 7);

    let mut rig = protected(0);
    rig.cpu.dr[1] = CODE + 1;
    rig.cpu.write_dr7(1 << 2);
    rig.code(|a| {
        a.nop()?;
        a.nop()
    });
    rig.run(10);
    let (v, stack) = halted(&rig);
    assert_eq!((v, rig.cpu.dr6 & 0xf, u64::from(stack[0])), (1, 2, CODE + 1));
    // IRET with RF set runs it once.
    rig.ram.write(HANDLERS + 17, &[0xcf]).unwrap();
    let top = rig.r(slot::RSP);
    put32(&rig, top + 8, stack[2] | rflags::RF as u32);
    rig.cpu.set_activity(ActivityState::Active);
    rig.run(2);
    assert_eq!(rig.cpu.regs.rip(), CODE + 2);
    assert!(!rig.cpu.flags.has(rflags::RF));
}

#[test]
fn general_detect_faults_on_debug_register_access() {
    let mut rig = protected(0);
    rig.cpu.write_dr7(dr::DR7_GD);
    rig.code(|a| a.mov(eax, dr0));
    rig.run(10);
    let (v, stack) = halted(&rig);
    assert_eq!((v, stack[0]), (1, CODE as u32));
    assert_eq!(rig.cpu.dr6 & dr::DR6_BD, dr::DR6_BD);
    assert_eq!(rig.cpu.dr7 & dr::DR7_GD, 0);
}

#[test]
fn faults_push_rf_and_traps_do_not() {
    let mut rig = protected(0);
    rig.code(|a| a.ud2());
    rig.run(5);
    assert_ne!(u64::from(halted(&rig).1[2]) & rflags::RF, 0);
    let mut rig = protected(0);
    rig.code(|a| a.int3());
    rig.run(5);
    let (v, stack) = halted(&rig);
    assert_eq!((v, stack[0], u64::from(stack[2]) & rflags::RF), (3, CODE as u32 + 1, 0));
}
