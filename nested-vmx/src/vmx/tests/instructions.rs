//! The VMX instructions: faults, VMfailInvalid, VMfailValid, what they do.

use super::bench::{Bench, VMCS_GPA, VMXON_GPA};
use crate::arch::cr::rflags;
use crate::cpu::slot;
use crate::event::ActivityState::Active;
use crate::event::VmxMode;
use crate::testing::CODE;
use crate::vmx::exit::reasons::{ExitReason, InstructionError};
use crate::vmx::vmcs12::{Field, REVISION_ID, SHADOW_INDICATOR};
use iced_x86::IcedError;
use iced_x86::code_asm::*;

type Code = fn(&mut CodeAssembler) -> Result<(), IcedError>;

/// A pointer in memory that instructions take as an operand.
const POINTER: u64 = super::bench::BITMAP;

const ALL: [(&str, Code, ExitReason); 12] = [
    ("vmxon", |a| a.vmxon(qword_ptr(POINTER)), ExitReason::Vmxon),
    ("vmxoff", |a| a.vmxoff(), ExitReason::Vmxoff),
    ("vmclear", |a| a.vmclear(qword_ptr(POINTER)), ExitReason::Vmclear),
    ("vmptrld", |a| a.vmptrld(qword_ptr(POINTER)), ExitReason::Vmptrld),
    ("vmptrst", |a| a.vmptrst(qword_ptr(POINTER)), ExitReason::Vmptrst),
    ("vmread", |a| a.vmread(rax, rcx), ExitReason::Vmread),
    ("vmwrite", |a| a.vmwrite(rcx, rax), ExitReason::Vmwrite),
    ("vmlaunch", |a| a.vmlaunch(), ExitReason::Vmlaunch),
    ("vmresume", |a| a.vmresume(), ExitReason::Vmresume),
    ("vmcall", |a| a.vmcall(), ExitReason::Vmcall),
    ("invept", |a| a.invept(rax, xmmword_ptr(POINTER)), ExitReason::Invept),
    ("invvpid", |a| a.invvpid(rax, xmmword_ptr(POINTER)), ExitReason::Invvpid),
];

fn status(b: &Bench) -> u64 {
    b.rig.cpu.flags.bits() & rflags::ARITHMETIC
}

#[test]
fn outside_vmx_operation_all_but_vmxon_are_undefined() {
    for (name, code, _) in ALL {
        let mut b = Bench::off();
        if name == "vmxon" {
            b.cpu().cr4 = b.cpu().cr4.with_vmxe(false);
        }
        b.execute(code);
        assert_eq!(b.handler(), Some(6), "{name}");
    }
}

#[test]
fn above_cpl_0_they_raise_general_protection() {
    for (name, code, _) in ALL {
        let mut b = Bench::root();
        b.cpu().cpl = 3;
        b.cpu().seg[2].ar = b.cpu().seg[2].ar.with_dpl(3);
        b.cpu().mode_changed();
        // The handler runs at CPL 0 on the stack that the TSS names.
        let tss = b.cpu().seg[7].base;
        b.rig.write_u64(tss + 4, crate::testing::STACK);
        b.execute(code);
        assert_eq!(b.handler(), Some(13), "{name}");
    }
}

#[test]
fn in_non_root_operation_each_exits_with_its_reason_and_length() {
    for (name, code, reason) in ALL {
        let mut b = Bench::guest(Active);
        b.execute(code);
        b.assert_exit_at(reason, CODE);
        assert!(b.get(Field::ExitInstructionLength) >= 3, "{name}");
    }
}

#[test]
fn exits_of_memory_operands_carry_displacement_and_instruction_information() {
    let mut b = Bench::guest(Active);
    b.execute(|a| a.vmptrld(qword_ptr(rbx + r9 * 4 - 0x10)));
    b.assert_exit_at(ExitReason::Vmptrld, CODE);
    assert_eq!(b.get(Field::ExitQualification), -0x10i64 as u64);
    // Scale 4, 64-bit addresses, DS, index R9, base RBX.
    assert_eq!(b.get(Field::ExitInstructionInfo), 2 | 2 << 7 | 3 << 15 | 9 << 18 | 3 << 23);
    let mut b = Bench::guest(Active);
    b.execute(|a| a.vmread(r8, rcx));
    assert_eq!(b.get(Field::ExitInstructionInfo), 8 << 3 | 1 << 10 | 1 << 28);
    let mut b = Bench::guest(Active);
    b.execute(|a| a.vmwrite(r8, rcx));
    assert_eq!(b.get(Field::ExitInstructionInfo), 1 << 3 | 1 << 10 | 8 << 28);
    let mut b = Bench::guest(Active);
    b.execute(|a| a.invept(rdx, xmmword_ptr(rsi).fs()));
    assert_eq!(b.get(Field::ExitInstructionInfo), 2 << 7 | 4 << 15 | 1 << 22 | 6 << 23 | 2 << 28);
    let mut b = Bench::guest(Active);
    b.rig.ram.write(CODE, &[0x0f, 0xc7, 0x35, 0x40, 0, 0, 0]).unwrap(); // vmptrld [rip + 0x40]
    b.cpu().regs.set_rip(CODE);
    b.rig.run(1);
    b.assert_exit_at(ExitReason::Vmptrld, CODE);
    assert_eq!(b.get(Field::ExitQualification), CODE + 7 + 0x40);
    assert_eq!(b.get(Field::ExitInstructionInfo), 2 << 7 | 3 << 15 | 1 << 22 | 1 << 27);
}

#[test]
fn vmxon_needs_its_feature_bit_the_fixed_bits_and_a_region_with_the_revision() {
    let mut b = Bench::off();
    b.cpu().msrs.feature_control = 1;
    b.vmxon();
    assert_eq!((b.handler(), b.mode()), (Some(13), VmxMode::Off));
    let mut b = Bench::off();
    b.cpu().cr0 = b.cpu().cr0.with_ne(false);
    b.vmxon();
    assert_eq!(b.handler(), Some(13));
    for header in [REVISION_ID + 1, REVISION_ID | SHADOW_INDICATOR] {
        let mut b = Bench::off();
        b.rig.ram.write(VMXON_GPA, &header.to_le_bytes()).unwrap();
        b.vmxon();
        assert_eq!((status(&b), b.mode()), (rflags::CF, VmxMode::Off));
    }
    for gpa in [VMXON_GPA + 8, 1 << 50] {
        let mut b = Bench::off();
        b.pointer(0, gpa);
        b.vmxon();
        assert_eq!((status(&b), b.mode()), (rflags::CF, VmxMode::Off));
    }
    let mut b = Bench::off();
    b.vmxon();
    assert_eq!((status(&b), b.mode(), b.cpu().vmx().vmxon_gpa()), (0, VmxMode::Root, Some(VMXON_GPA)));
    b.vmxon();
    assert_eq!(status(&b), rflags::CF, "VMfail without a current VMCS is VMfailInvalid");
    let mut b = Bench::root();
    b.vmxon();
    b.assert_vm_fail(InstructionError::VmxonInRoot);
}

#[test]
fn vmclear_and_vmptrld_check_their_pointer() {
    for (gpa, clear, load) in [
        (VMCS_GPA + 1, InstructionError::VmclearAddress, InstructionError::VmptrldAddress),
        (1 << 46, InstructionError::VmclearAddress, InstructionError::VmptrldAddress),
        (VMXON_GPA, InstructionError::VmclearVmxonPointer, InstructionError::VmptrldVmxonPointer),
    ] {
        let mut b = Bench::root();
        b.rig.write_u64(POINTER, gpa);
        b.execute(|a| a.vmclear(qword_ptr(POINTER)));
        b.assert_vm_fail(clear);
        b.execute(|a| a.vmptrld(qword_ptr(POINTER)));
        b.assert_vm_fail(load);
    }
    // Not a VMCS; nothing there at all.
    for gpa in [VMCS_GPA + 0x10_0000, 0xd000_0000] {
        let mut b = Bench::root();
        b.rig.write_u64(POINTER, gpa);
        b.execute(|a| a.vmptrld(qword_ptr(POINTER)));
        b.assert_vm_fail(InstructionError::VmptrldRevision);
    }
}

#[test]
fn a_vmcs_lives_in_its_region_while_it_is_not_current() {
    const OTHER: u64 = VMCS_GPA + 0x10_0000;
    let mut b = Bench::guest(Active);
    b.init(1);
    b.set(Field::TscOffset, 0x1234_5678_9abc);
    b.rig.ram.write(OTHER, &REVISION_ID.to_le_bytes()).unwrap();
    b.rig.write_u64(POINTER, OTHER);
    b.execute(|a| a.vmclear(qword_ptr(POINTER))).execute(|a| a.vmptrld(qword_ptr(POINTER)));
    assert_eq!((status(&b), b.cpu().vmx().current_vmcs_gpa(), b.get(Field::TscOffset)), (0, Some(OTHER), 0));
    b.rig.write_u64(POINTER, VMCS_GPA);
    b.execute(|a| a.vmptrld(qword_ptr(POINTER)));
    assert_eq!(b.get(Field::TscOffset), 0x1234_5678_9abc);
    assert!(b.cpu().vmx.vmcs.launched, "the launch state travels too");
    b.execute(|a| a.vmptrst(qword_ptr(POINTER + 8)));
    assert_eq!(b.rig.read_u64(POINTER + 8), VMCS_GPA);
    b.execute(|a| a.vmclear(qword_ptr(POINTER)));
    assert_eq!((b.cpu().vmx().current_vmcs_gpa(), b.rig.read_u64(VMCS_GPA + 8) as u32), (None, 0));
    b.execute(|a| a.vmptrst(qword_ptr(POINTER + 8)));
    assert_eq!(b.rig.read_u64(POINTER + 8), u64::MAX);
    b.execute(|a| a.vmlaunch());
    assert_eq!(status(&b), rflags::CF, "no current VMCS");
}

#[test]
fn vmread_and_vmwrite_reach_the_fields_that_exist() {
    let mut b = Bench::root();
    let run = |b: &mut Bench, field: u64, value: u64, code: Code| {
        b.rig.set_r(slot::RCX, field).set_r(slot::RAX, value);
        b.execute(code);
    };
    run(&mut b, 0x2010, 0x1122_3344_5566_7788, |a| a.vmwrite(rcx, rax));
    assert_eq!((status(&b), b.get(Field::TscOffset)), (0, 0x1122_3344_5566_7788));
    run(&mut b, 0x2011, 0, |a| a.vmread(rax, rcx));
    assert_eq!(b.rig.r(slot::RAX), 0x1122_3344);
    run(&mut b, 0x4402, 0x99, |a| a.vmwrite(rcx, rax));
    assert_eq!((status(&b), b.get(Field::ExitReason)), (0, 0x99), "IA32_VMX_MISC[29]");
    for field in [0x4403, 0x6c20, 0x2018, 1 << 32 | 0x4402] {
        run(&mut b, field, 0, |a| a.vmread(rax, rcx));
        b.assert_vm_fail(InstructionError::UnsupportedField);
    }
    b.rig.write_u64(POINTER, 0x2);
    run(&mut b, 0x0800, 0, |a| a.vmwrite(rcx, qword_ptr(POINTER)));
    assert_eq!(b.get(Field::GuestEsSelector), 2);
    run(&mut b, 0x0800, 0, |a| a.vmread(qword_ptr(POINTER + 8), rcx));
    assert_eq!(b.rig.read_u64(POINTER + 8), 2);
}

#[test]
fn vm_entry_refuses_the_wrong_launch_state_and_mov_ss_blocking() {
    let mut b = Bench::root();
    b.execute(|a| a.vmresume());
    b.assert_vm_fail(InstructionError::VmresumeNotLaunched);
    b.cpu().vmx.vmcs.launched = true;
    b.execute(|a| a.vmlaunch());
    b.assert_vm_fail(InstructionError::VmlaunchNotClear);
    b.cpu().shadow = crate::cpu::shadow::MOV_SS;
    b.execute(|a| a.vmresume());
    b.assert_vm_fail(InstructionError::EntryMovSs);
    b.execute(|a| a.vmcall());
    b.assert_vm_fail(InstructionError::VmcallInRoot);
}

#[test]
fn invept_and_invvpid_check_type_and_descriptor() {
    let invept: Code = |a| a.invept(rax, xmmword_ptr(POINTER));
    let invvpid: Code = |a| a.invvpid(rax, xmmword_ptr(POINTER));
    let eptp = 0x5_0000 | 3 << 3 | 6;
    for (code, kind, low, high, ok) in [
        (invept, 1, eptp, 0, true),
        (invept, 1, eptp | 1, 0, false),
        (invept, 2, 0, 0, true),
        (invept, 0, eptp, 0, false),
        (invept, 3, eptp, 0, false),
        (invvpid, 0, 5, 0x1000, true),
        (invvpid, 0, 5, 1 << 47, false),
        (invvpid, 0, 0, 0x1000, false),
        (invvpid, 1, 5, 0, true),
        (invvpid, 1, 0, 0, false),
        (invvpid, 2, 0, 0, true),
        (invvpid, 3, 5, 0, true),
        (invvpid, 1, 5 | 1 << 16, 0, false),
        (invvpid, 4, 5, 0, false),
    ] {
        let mut b = Bench::root();
        b.rig.write_u64(POINTER, low);
        b.rig.write_u64(POINTER + 8, high);
        b.rig.set_r(slot::RAX, kind);
        b.execute(code);
        if ok {
            assert_eq!(status(&b), 0, "type {kind}, {low:#x}");
        } else {
            b.assert_vm_fail(InstructionError::InveptInvvpidOperand);
        }
    }
}
