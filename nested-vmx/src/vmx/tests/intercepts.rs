//! What L1 may intercept: each control makes its instruction exit, with the right information, and without it none
//! does.

use super::bench::{BITMAP, Bench};
use crate::arch::cr::dr;
use crate::arch::vmx::{PinControls, Proc2Controls, ProcControls};
use crate::cpu::slot;
use crate::event::ActivityState::Active;
use crate::event::VmxMode;
use crate::testing::{CODE, DATA};
use crate::vmx::exit::reasons::ExitReason;
use crate::vmx::vmcs12::Field;
use iced_x86::IcedError;
use iced_x86::code_asm::*;

type Code = fn(&mut CodeAssembler) -> Result<(), IcedError>;
type Prepare = fn(&mut Bench) -> &mut Bench;

const NONE: Prepare = |b| b;

/// Runs one instruction in the guest: Some((qualification, instruction information)) if it exits for `reason`.
#[track_caller]
fn exits(prepare: Prepare, code: Code, reason: ExitReason) -> Option<(u64, u64)> {
    let mut b = Bench::root();
    prepare(&mut b);
    b.enter(Active);
    b.rig.set_r(slot::RAX, 0x5).set_r(slot::RCX, 0x10).set_r(slot::RDX, 0x1234);
    b.execute(code);
    if b.mode() == VmxMode::NonRoot {
        return None;
    }
    b.assert_exit_at(reason, CODE);
    assert!(b.get(Field::ExitInstructionLength) > 0);
    Some((b.get(Field::ExitQualification), b.get(Field::ExitInstructionInfo)))
}

#[test]
fn each_control_makes_its_instruction_exit_and_nothing_else_does() {
    let proc = |c: ProcControls| c.into_bits();
    let p = ProcControls::new();
    let cases: [(u32, Code, ExitReason, u64); 13] = [
        (proc(p.with_hlt_exiting(true)), |a| a.hlt(), ExitReason::Hlt, 0),
        (proc(p.with_invlpg_exiting(true)), |a| a.invlpg(byte_ptr(DATA + 5)), ExitReason::Invlpg, DATA + 5),
        (proc(p.with_rdtsc_exiting(true)), |a| a.rdtsc(), ExitReason::Rdtsc, 0),
        (proc(p.with_pause_exiting(true)), |a| a.pause(), ExitReason::Pause, 0),
        (proc(p.with_cr3_load_exiting(true)), |a| a.mov(cr3, r9), ExitReason::CrAccess, 3 | 9 << 8),
        (proc(p.with_cr3_store_exiting(true)), |a| a.mov(rbx, cr3), ExitReason::CrAccess, 3 | 1 << 4 | 3 << 8),
        (proc(p.with_cr8_load_exiting(true)), |a| a.mov(cr8, rax), ExitReason::CrAccess, 8),
        (proc(p.with_cr8_store_exiting(true)), |a| a.mov(rcx, cr8), ExitReason::CrAccess, 8 | 1 << 4 | 1 << 8),
        (proc(p.with_mov_dr_exiting(true)), |a| a.mov(dr3, rdx), ExitReason::MovDr, 3 | 2 << 8),
        (proc(p.with_mov_dr_exiting(true)), |a| a.mov(rsi, dr6), ExitReason::MovDr, 6 | 1 << 4 | 6 << 8),
        (proc(p.with_unconditional_io_exiting(true)), |a| a.out(dx, al), ExitReason::Io, 0x1234 << 16),
        (proc(p.with_unconditional_io_exiting(true)), |a| a.in_(eax, 0x70u32), ExitReason::Io, 3 | 8 | 64 | 0x70 << 16),
        (proc(p.with_unconditional_io_exiting(true)), |a| a.in_(ax, dx), ExitReason::Io, 1 | 8 | 0x1234 << 16),
    ];
    for (n, (bits, code, reason, qualification)) in cases.into_iter().enumerate() {
        let mut b = Bench::root();
        b.or(Field::ProcControls, bits).enter(Active);
        b.rig.set_r(slot::RAX, 0x5).set_r(slot::RDX, 0x1234).set_r(9, 0x1000);
        b.execute(code);
        b.assert_exit_at(reason, CODE);
        assert_eq!(b.get(Field::ExitQualification), qualification, "case {n}");
        if n != 4 {
            // Without the control (MOV to CR3 would need valid tables).
            assert_eq!(exits(NONE, code, reason), None, "case {n}");
        }
    }
    let proc2: [(Prepare, Code, ExitReason); 2] = [
        (|b| b.proc2(Proc2Controls::new().with_wbinvd_exiting(true)), |a| a.wbinvd(), ExitReason::Wbinvd),
        (
            |b| b.proc2(Proc2Controls::new().with_descriptor_table_exiting(true)),
            |a| a.sgdt(ptr(DATA)),
            ExitReason::GdtrIdtr,
        ),
    ];
    for (prepare, code, reason) in proc2 {
        assert!(exits(prepare, code, reason).is_some());
        assert_eq!(exits(NONE, code, reason), None);
    }
}

#[test]
fn cpuid_invd_and_vmx_instructions_always_exit() {
    assert_eq!(exits(NONE, |a| a.cpuid(), ExitReason::Cpuid), Some((0, 0)));
    assert_eq!(exits(NONE, |a| a.invd(), ExitReason::Invd), Some((0, 0)));
    // XSETBV too, whatever it asks for, once CR4.OSXSAVE allows it.
    let osxsave: Prepare = |b| {
        let enabled = b.get(Field::GuestCr4) | 1 << 18;
        b.set(Field::GuestCr4, enabled)
    };
    assert_eq!(exits(osxsave, |a| a.xsetbv(), ExitReason::Xsetbv), Some((0, 0)));
    assert_eq!(exits(NONE, |a| a.xsetbv(), ExitReason::Xsetbv), None);
    assert_eq!(exits(NONE, |a| a.vmcall(), ExitReason::Vmcall), Some((0, 0)));
}

#[test]
fn rdtscp_needs_its_enabling_control() {
    let mut b = Bench::root();
    b.set(Field::ExceptionBitmap, 1 << 6).enter(Active).execute(|a| a.rdtscp());
    b.assert_exit_at(ExitReason::ExceptionOrNmi, CODE);
    assert_eq!(b.get(Field::ExitInterruptionInfo), 0x8000_0306);
    let enabled: Prepare = |b| b.proc2(Proc2Controls::new().with_enable_rdtscp(true));
    assert_eq!(exits(enabled, |a| a.rdtscp(), ExitReason::Rdtscp), None);
    let both: Prepare =
        |b| b.proc(ProcControls::new().with_rdtsc_exiting(true)).proc2(Proc2Controls::new().with_enable_rdtscp(true));
    assert_eq!(exits(both, |a| a.rdtscp(), ExitReason::Rdtscp), Some((0, 0)));
}

#[test]
fn the_tsc_offset_counts_in_the_guest_only() {
    let mut b = Bench::root();
    b.proc(ProcControls::new().with_use_tsc_offsetting(true)).set(Field::TscOffset, 1 << 40).enter(Active);
    b.execute(|a| a.rdtsc());
    assert_eq!(b.rig.r(slot::RDX), 1 << 8);
    b.init(1).execute(|a| a.rdtsc());
    assert_eq!(b.rig.r(slot::RDX), 0);
}

#[test]
fn cr0_and_cr4_masks_and_shadows() {
    const TS: u64 = 1 << 3;
    // L1 owns TS and shows it set.
    let owned: Prepare = |b| b.set(Field::Cr0Mask, TS).set(Field::Cr0Shadow, TS | 0x8000_0031);
    assert_eq!(exits(owned, |a| a.mov(rax, cr0), ExitReason::CrAccess), None);
    let mut b = Bench::root();
    owned(&mut b).enter(Active).execute(|a| a.mov(rax, cr0));
    assert_eq!(b.rig.r(slot::RAX) & TS, TS, "the shadow is read");
    assert!(!b.cpu().cr0.ts());
    assert_eq!(exits(owned, |a| a.clts(), ExitReason::CrAccess), Some((2 << 4, 0)));
    let mut b = Bench::root();
    owned(&mut b).enter(Active);
    let cr0_without_ts = b.cpu().cr0.into_bits();
    b.rig.set_r(slot::RBX, cr0_without_ts);
    b.execute(|a| a.mov(cr0, rbx));
    b.assert_exit_at(ExitReason::CrAccess, CODE);
    assert_eq!(b.get(Field::ExitQualification), 3 << 8);
    b.launch();
    b.rig.set_r(slot::RBX, cr0_without_ts | TS | 1 << 18);
    b.execute(|a| a.mov(cr0, rbx));
    assert_eq!(b.mode(), VmxMode::NonRoot, "what agrees with the shadow does not exit");
    assert!(!b.cpu().cr0.ts(), "and the bit that L1 owns stays");
    assert!(b.cpu().cr0.am(), "while another is loaded");
    let lmsw: Prepare = |b| b.set(Field::Cr0Mask, TS);
    assert_eq!(exits(lmsw, |a| a.lmsw(dx), ExitReason::CrAccess), None);
    let mut b = Bench::root();
    lmsw(&mut b).enter(Active);
    b.rig.set_r(slot::RDX, 9);
    b.execute(|a| a.lmsw(dx));
    b.assert_exit_at(ExitReason::CrAccess, CODE);
    assert_eq!(b.get(Field::ExitQualification), 3 << 4 | 9 << 16);
    let mut b = Bench::root();
    b.set(Field::Cr4Mask, 1 << 13).set(Field::Cr4Shadow, 0).enter(Active).execute(|a| a.mov(rax, cr4));
    assert_eq!(b.rig.r(slot::RAX) & 1 << 13, 0, "VMXE is hidden");
}

#[test]
fn cr3_targets_do_not_exit() {
    let mut b = Bench::root();
    b.proc(ProcControls::new().with_cr3_load_exiting(true)).set(Field::Cr3TargetCount, 2);
    b.set(Field::Cr3Target1, crate::testing::PML4).set(Field::Cr3Target2, 0x9000).enter(Active);
    b.rig.set_r(slot::RAX, crate::testing::PML4);
    b.execute(|a| a.mov(cr3, rax));
    assert_eq!(b.mode(), VmxMode::NonRoot);
    b.rig.set_r(slot::RAX, 0x9000);
    b.execute(|a| a.mov(cr3, rax));
    b.assert_exit_at(ExitReason::CrAccess, CODE);
}

#[test]
fn a_mov_to_cr0_that_vmx_forbids_is_a_fault() {
    let mut b = Bench::root();
    b.set(Field::ExceptionBitmap, 1 << 13).enter(Active);
    let without_ne = b.cpu().cr0.with_ne(false).into_bits();
    b.rig.set_r(slot::RAX, without_ne);
    b.execute(|a| a.mov(cr0, rax));
    b.assert_exit_at(ExitReason::ExceptionOrNmi, CODE);
    assert_eq!(b.get(Field::ExitInterruptionInfo), 0x8000_0b0d);
}

#[test]
fn msr_bitmaps_choose_by_number_and_direction() {
    let rdmsr: Code = |a| a.rdmsr();
    let wrmsr: Code = |a| a.wrmsr();
    // RCX is 0x10, the TSC; without a bitmap every access exits.
    assert_eq!(exits(NONE, rdmsr, ExitReason::Rdmsr), Some((0, 0)));
    assert_eq!(exits(NONE, wrmsr, ExitReason::Wrmsr), Some((0, 0)));
    let bitmap: Prepare =
        |b| b.proc(ProcControls::new().with_use_msr_bitmaps(true)).set(Field::MsrBitmapGpa, BITMAP & !0xfff);
    assert_eq!(exits(bitmap, rdmsr, ExitReason::Rdmsr), None);
    for (msr, write, byte, bit) in [
        (0x10u32, false, 2, 0),
        (0x174, true, 0x800 + 0x2e, 4),
        (0xc000_0080, false, 0x400 + 0x10, 0),
        (0xc000_0102, true, 0xc00 + 0x20, 2),
    ] {
        for set in [false, true] {
            let mut b = Bench::root();
            bitmap(&mut b);
            b.rig.ram.write((BITMAP & !0xfff) + byte, &[if set { 1 << bit } else { 0 }]).unwrap();
            b.enter(Active);
            b.rig.set_r(slot::RCX, msr.into()).set_r(slot::RAX, 0).set_r(slot::RDX, 0);
            b.execute(if write { wrmsr } else { rdmsr });
            assert_eq!(b.mode() == VmxMode::Root, set, "{msr:#x}");
        }
    }
    let mut b = Bench::root();
    bitmap(&mut b).enter(Active);
    b.rig.set_r(slot::RCX, 0x4000_0000);
    b.execute(rdmsr);
    b.assert_exit_at(ExitReason::Rdmsr, CODE);
}

#[test]
fn io_bitmaps_choose_by_port_and_look_at_every_byte() {
    let a_gpa = BITMAP & !0xfff;
    let b_gpa = a_gpa + 0x1000;
    for (port, size, byte, bit, exit) in [
        (0x80u64, 1, a_gpa + 0x10, 0, true),
        (0x81, 1, a_gpa + 0x10, 0, false),
        (0x7e, 4, a_gpa + 0x10, 0, true),
        (0x7e, 2, a_gpa + 0x10, 0, false),
        (0x8000, 1, b_gpa, 0, true),
        (0x7fff, 2, b_gpa, 0, true),
        (0xffff, 1, b_gpa, 0, false),
        (0xffff, 2, b_gpa, 0, true),
    ] {
        let mut b = Bench::root();
        b.proc(ProcControls::new().with_use_io_bitmaps(true).with_unconditional_io_exiting(true));
        b.set(Field::IoBitmapAGpa, a_gpa).set(Field::IoBitmapBGpa, b_gpa);
        b.rig.ram.write(byte, &[1 << bit]).unwrap();
        b.enter(Active);
        b.rig.set_r(slot::RDX, port);
        let code: Code = match size {
            1 => |a| a.out(dx, al),
            2 => |a| a.out(dx, ax),
            _ => |a| a.out(dx, eax),
        };
        b.execute(code);
        assert_eq!(b.mode() == VmxMode::Root, exit, "port {port:#x}, {size} bytes");
    }
}

#[test]
fn the_exception_bitmap_and_the_page_fault_mask_and_match() {
    // #UD: bit 6.
    for (bitmap, exit) in [(1 << 6, true), (0, false)] {
        let mut b = Bench::root();
        b.set(Field::ExceptionBitmap, bitmap).enter(Active).execute(|a| a.ud2());
        if exit {
            b.assert_exit_at(ExitReason::ExceptionOrNmi, CODE);
            assert_eq!(b.get(Field::ExitInterruptionInfo), 0x8000_0306);
            assert_eq!(b.get(Field::GuestRflags) & 1 << 16, 1 << 16, "RF, as the frame would have it");
        } else {
            assert_eq!((b.mode(), b.handler()), (VmxMode::NonRoot, Some(6)));
        }
    }
    // A write to a page that is not there: error code 2.
    const NOWHERE: u64 = 0x4000_0000;
    for (bitmap, mask, matched, exit) in
        [(1 << 14, 0, 0, true), (0, 0, 0, false), (1 << 14, 2, 0, false), (0, 2, 0, true), (1 << 14, 2, 2, true)]
    {
        let mut b = Bench::root();
        b.set(Field::ExceptionBitmap, bitmap).set(Field::PageFaultMask, mask).set(Field::PageFaultMatch, matched);
        b.enter(Active);
        b.rig.set_r(slot::RBX, NOWHERE);
        b.cpu().cr2 = 7;
        b.execute(|a| a.mov(byte_ptr(rbx), 1));
        if exit {
            b.assert_exit_at(ExitReason::ExceptionOrNmi, CODE);
            assert_eq!(b.get(Field::ExitInterruptionInfo), 0x8000_0b0e);
            assert_eq!((b.get(Field::ExitInterruptionErrorCode), b.get(Field::ExitQualification)), (2, NOWHERE));
            assert_eq!(b.cpu().cr2, 7, "CR2 is L1's business");
        } else {
            assert_eq!((b.handler(), b.cpu().cr2), (Some(14), NOWHERE));
        }
    }
}

#[test]
fn a_debug_exception_that_exits_leaves_dr6_alone() {
    let mut b = Bench::root();
    b.set(Field::ExceptionBitmap, 1 << 1).set(Field::GuestRflags, 2 | 1 << 8).enter(Active);
    b.cpu().dr6 = dr::DR6_RESET;
    b.execute(|a| a.nop()).boundary();
    b.assert_exit_at(ExitReason::ExceptionOrNmi, CODE + 1);
    assert_eq!((b.get(Field::ExitQualification), b.cpu().dr6), (dr::DR6_BS, dr::DR6_RESET));
    assert_eq!(b.get(Field::GuestPendingDebug), 0);
}

#[test]
fn a_triple_fault_is_exit_2() {
    let mut b = Bench::root();
    b.set(Field::GuestIdtrLimit, 0).enter(Active).execute(|a| a.ud2());
    b.assert_exit_at(ExitReason::TripleFault, CODE);
    assert_eq!(b.get(Field::GuestActivityState), 0, "never the shutdown state");
}

#[test]
fn an_exit_during_delivery_tells_what_was_being_delivered() {
    // #UD whose gate is beyond the IDT: #GP, which L1 intercepts.
    let mut b = Bench::root();
    b.set(Field::GuestIdtrLimit, 16 * 6 - 1).set(Field::ExceptionBitmap, 1 << 13).enter(Active).execute(|a| a.ud2());
    b.assert_exit_at(ExitReason::ExceptionOrNmi, CODE);
    assert_eq!((b.get(Field::ExitInterruptionInfo), b.get(Field::IdtVectoringInfo)), (0x8000_0b0d, 0x8000_0306));
    // The injected event, likewise; what L1 injects next is delivered.
    let mut b = Bench::root();
    b.set(Field::GuestIdtrLimit, 16 * 6 - 1).set(Field::ExceptionBitmap, 1 << 13);
    b.inject(crate::arch::vmx::EventType::SoftwareInterrupt, 0x80, None).set(Field::EntryInstructionLength, 2).launch();
    assert_eq!((b.mode(), b.get(Field::IdtVectoringInfo)), (VmxMode::Root, 0x8000_0480));
    assert_eq!(b.get(Field::ExitInstructionLength), 2);
}

#[test]
fn acknowledged_or_not_interrupts_of_l1_do_not_reach_a_guest_with_exiting() {
    let mut b = Bench::root();
    b.pin(PinControls::new().with_external_interrupt_exiting(true)).set(Field::GuestRflags, 0x202).enter(Active);
    b.rig.mailbox.post_interrupt(0x41, false);
    b.rig.run(1);
    b.assert_exit_at(ExitReason::ExternalInterrupt, super::bench::GUEST_RIP);
}
