//! Single-stepping, breakpoints, RF.

use super::{HANDLERS, KERNEL_DATA, halted, protected, put32};
use crate::arch::cr::{dr, rflags};
use crate::cpu::slot;
use crate::event::ActivityState;
use crate::testing::{CODE, DATA, Rig};
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

/// MOV SS with TF set, then what `f` has.
fn stepped_behind_mov_ss(f: impl FnOnce(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>) -> Rig {
    let mut rig = protected(0);
    rig.cpu.flags.set(rflags::TF, true);
    rig.cpu.mode_changed();
    put32(&rig, DATA, KERNEL_DATA.into());
    rig.code(|a| {
        a.mov(ss, word_ptr(DATA as u32))?;
        f(a)
    });
    rig
}

#[test]
fn a_single_step_trap_that_mov_ss_held_back_is_lost_when_an_event_is_delivered() {
    const BEHIND_MOV_SS: u32 = CODE as u32 + 6;
    let mut rig = stepped_behind_mov_ss(|a| a.int1());
    rig.run(10);
    let (v, stack) = halted(&rig);
    assert_eq!((v, stack[0], rig.cpu.dr6), (1, BEHIND_MOV_SS + 1, dr::DR6_RESET));
    let mut rig = stepped_behind_mov_ss(|a| a.int1());
    rig.cpu.dr[0] = DATA;
    rig.cpu.write_dr7(0x3_0002); // read or write, 1 byte, G0
    rig.run(10);
    assert_eq!(halted(&rig).1[0], BEHIND_MOV_SS + 1);

    let mut rig = stepped_behind_mov_ss(|a| a.mov(eax, dr0));
    rig.cpu.write_dr7(dr::DR7_GD);
    rig.run(10);
    let (v, stack) = halted(&rig);
    assert_eq!((v, stack[0], rig.cpu.dr6), (1, BEHIND_MOV_SS, dr::DR6_RESET | dr::DR6_BD));
}

#[test]
fn a_data_breakpoint_that_mov_ss_held_back_traps_at_the_handler_of_a_software_interrupt() {
    let mut rig = stepped_behind_mov_ss(|a| a.int3());
    rig.cpu.dr[0] = DATA;
    rig.cpu.write_dr7(0x3_0002); // read or write, 1 byte, G0
    rig.run(10);
    let (v, stack) = halted(&rig);
    assert_eq!((v, u64::from(stack[0]), rig.cpu.dr6), (1, HANDLERS + 16 * 3, dr::DR6_RESET | 1));
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
