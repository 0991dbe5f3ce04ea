//! R9 to R23: transitions, saved state, priorities, the INIT state, who is addressed.

use super::bench::{Bench, GUEST_RIP, HOST_RIP};
use crate::arch::cr::{dr, rflags};
use crate::arch::exception;
use crate::arch::vmx::{EventType, PinControls, ProcControls};
use crate::cpu::{Cpu, slot};
use crate::event::ActivityState::{self, Active, Hlt, Shutdown, WaitForSipi};
use crate::event::{Detail, Fate, Rule, VmxMode};
use crate::vmx::exit::reasons::{ExitReason, InstructionError};
use crate::vmx::vmcs12::Field;

type Change = fn(&mut Bench) -> &mut Bench;

#[test]
fn r09_a_latched_init_exits_before_the_guest_retires_an_instruction() {
    for state in [Active, Hlt, Shutdown] {
        let mut b = Bench::root();
        b.init(1).enter(state);
        let retired = b.cpu().retired();
        b.boundary();
        b.assert_exit(ExitReason::InitSignal);
        assert_eq!((b.cpu().retired(), b.get(Field::GuestRip)), (retired, GUEST_RIP));
        assert_eq!(b.fates(1), [Fate::Latched, Fate::VmExit(3)]);
        assert_eq!(b.get(Field::GuestActivityState), state as u64);
    }
}

#[test]
fn r09_an_injected_event_is_delivered_before_the_latched_init_exits() {
    let mut b = Bench::root();
    b.init(1).inject(EventType::HardwareException, exception::UD, None).enter(Active);
    b.boundary();
    b.assert_exit(ExitReason::InitSignal);
    assert_eq!(b.get(Field::GuestRip), super::bench::HANDLERS + 16 * 6);
    assert_eq!(b.get(Field::IdtVectoringInfo) >> 31, 0, "delivered, not under way");
}

#[test]
fn r09_an_entry_into_wait_for_sipi_drops_the_latched_init() {
    let mut b = Bench::root();
    b.init(1).enter(WaitForSipi).boundary();
    assert_eq!(b.fates(1), [Fate::Latched, Fate::Dropped(Rule::R8)]);
    assert_eq!((b.mode(), b.activity()), (VmxMode::NonRoot, WaitForSipi));
}

#[test]
fn r09_a_failed_entry_keeps_the_latch() {
    let mut b = Bench::root();
    b.init(1).set(Field::PinControls, 0).launch().boundary();
    b.assert_vm_fail(InstructionError::EntryControls);
    assert!(b.cpu().vmx().init_latched());
    let mut b = Bench::root();
    b.init(1).set(Field::GuestRflags, 0).launch().boundary();
    b.assert_entry_failure(543);
    assert!(b.cpu().vmx().init_latched());
    let mut b = Bench::root();
    b.init(1).set(Field::EntryMsrLoadGpa, super::bench::MSR_LIST).set(Field::EntryMsrLoadCount, 1);
    b.rig.write_u64(super::bench::MSR_LIST, 0xc000_0100);
    b.launch().boundary();
    assert_eq!((b.get(Field::ExitReason), b.get(Field::ExitQualification)), (34 | 1 << 31, 1));
    assert!(b.cpu().vmx().init_latched());
    assert_eq!(b.fates(1), [Fate::Latched]);
}

#[test]
fn r10_vmxon_blocks_init_and_vmxoff_lets_the_latched_one_take_effect() {
    let mut b = Bench::off();
    b.vmxon().init(1);
    assert_eq!((b.fates(1), b.mode()), (vec![Fate::Latched], VmxMode::Root));
    b.vmxoff().boundary();
    assert_eq!(b.fates(1), [Fate::Latched, Fate::Reset]);
    assert_eq!((b.rip(), b.mode(), b.cpu().vmx().init_latched()), (0xfff0, VmxMode::Off, false));
}

#[test]
fn r11_a_sipi_that_arrives_during_the_entry_is_classified_after_it() {
    let mut b = Bench::root();
    b.set(Field::GuestActivityState, 3);
    b.rig.mailbox.post_sipi(0x12, 9);
    // The entry itself: the boundary before VMLAUNCH is behind us.
    let _ = b.cpu().vm_entry(true);
    assert_eq!((b.activity(), b.fates(9)), (WaitForSipi, vec![]));
    b.boundary();
    b.assert_exit(ExitReason::Sipi);
    assert_eq!((b.fates(9), b.get(Field::ExitQualification)), (vec![Fate::VmExit(4)], 0x12));
}

#[test]
fn r12_init_comes_before_a_sipi_that_is_pending_with_it() {
    let mut b = Bench::off();
    b.cpu().apic.reset(false);
    b.rig.mailbox.post_init(1);
    b.rig.mailbox.post_sipi(0x20, 2);
    b.boundary();
    assert_eq!((b.fates(1), b.fates(2)), (vec![Fate::Delivered], vec![Fate::Started]));
    assert_eq!((b.cpu().seg[1].base, b.activity()), (0x2_0000, Active));
}

#[test]
fn r12_an_init_that_counts_overwrites_a_pending_sipi_and_a_dropped_one_does_not() {
    let mut b = Bench::off();
    b.cpu().apic.reset(false);
    b.rig.mailbox.post_sipi(0x20, 2);
    b.rig.mailbox.post_init(1);
    b.boundary();
    assert_eq!((b.fates(1), b.fates(2)), (vec![Fate::Delivered], vec![Fate::Dropped(Rule::R12)]));
    // Now it waits for a SIPI, and an INIT is dropped: the SIPI stays.
    b.rig.mailbox.post_sipi(0x21, 4);
    b.rig.mailbox.post_init(3);
    b.boundary();
    assert_eq!((b.fates(3), b.fates(4)), (vec![Fate::Dropped(Rule::R2)], vec![Fate::Started]));
    let mut b = Bench::root();
    b.rig.mailbox.post_sipi(0x20, 2);
    b.rig.mailbox.post_init(1);
    b.boundary();
    assert_eq!((b.fates(1), b.fates(2)), (vec![Fate::Latched], vec![Fate::Dropped(Rule::R12)]));
}

#[test]
fn r12_init_and_sipi_together_in_non_root_give_exit_3_and_drop_the_sipi_in_root() {
    let mut b = Bench::guest(Active);
    b.rig.mailbox.post_init(1);
    b.rig.mailbox.post_sipi(0x20, 2);
    b.boundary();
    b.assert_exit(ExitReason::InitSignal);
    assert_eq!(b.fates(2), [Fate::Dropped(Rule::R4)]);
}

/// The checks themselves are tested one by one in `entry::tests`; here that a failure is an exit 33.
#[test]
fn r13_a_failed_check_of_non_register_state_is_exit_33_with_bit_31() {
    let cases: [(Change, u16); 4] = [
        (|b| b.set(Field::GuestActivityState, 4), 600),
        (|b| b.set(Field::GuestActivityState, 3).inject(EventType::Nmi, 2, None), 605),
        (|b| b.set(Field::GuestInterruptibility, 4), 616),
        (|b| b.set(Field::VmcsLinkGpa, 0x123), 630),
    ];
    for (change, check) in cases {
        let mut b = Bench::root();
        let before = b.get(Field::EntryInterruptionInfo);
        change(&mut b).launch();
        b.assert_entry_failure(check);
        assert_eq!(b.get(Field::ExitQualification), if check == 630 { 4 } else { 0 });
        assert!(!b.cpu().vmx.vmcs.launched, "a failed VMLAUNCH leaves the launch state clear");
        assert_eq!(b.get(Field::EntryInterruptionInfo) & !(1 << 31 | 0xfff), before & !(1 << 31 | 0xfff));
    }
}

#[test]
fn r14_a_vectoring_entry_ends_active() {
    for state in [Hlt, Shutdown] {
        let mut b = Bench::root();
        b.inject(EventType::Nmi, 2, None).enter(state);
        assert_eq!((b.activity(), b.handler()), (Active, Some(2)));
        assert!(b.cpu().nmi_blocked, "an injected NMI blocks NMIs");
    }
    let mut b = Bench::root();
    b.inject(EventType::External, 0x30, None).set(Field::GuestRflags, 2 | rflags::IF).enter(Hlt);
    assert_eq!((b.activity(), b.handler()), (Active, Some(0x30)));
}

#[test]
fn r14_other_events_and_plain_entries_keep_the_state_of_the_field() {
    for state in [Active, Hlt, Shutdown, WaitForSipi] {
        let b = Bench::guest(state);
        assert_eq!(b.activity(), state);
    }
    let mut b = Bench::root();
    b.inject(EventType::Other, 0, None).enter(Hlt);
    assert_eq!(b.activity(), Hlt);
    b.boundary();
    b.assert_exit(ExitReason::MonitorTrapFlag);
    assert_eq!(b.get(Field::GuestActivityState), 1);
}

#[test]
fn r14_pending_debug_exceptions_are_delivered_after_a_plain_entry_but_not_into_shutdown_or_wait_for_sipi() {
    for state in [Active, Hlt, Shutdown, WaitForSipi] {
        let mut b = Bench::root();
        let (pending, flags) = if state == Hlt { (0x4000, 2 | rflags::TF) } else { (0x1001, 2) };
        b.set(Field::GuestPendingDebug, pending).set(Field::GuestRflags, flags).enter(state).boundary();
        let delivered = matches!(state, Active | Hlt);
        let expected = if delivered { (Some(1), Active) } else { (None, state) };
        assert_eq!((b.handler(), b.activity()), expected, "{state:?}");
    }
}

#[test]
fn r15_the_processor_offers_hlt_shutdown_and_wait_for_sipi() {
    let mut b = Bench::root();
    assert_eq!(b.cpu().read_msr(0x485).unwrap_or_default() >> 6 & 7, 7);
    for state in [Hlt, Shutdown, WaitForSipi] {
        Bench::guest(state);
    }
}

#[test]
fn r16_exit_3_changes_no_register_keeps_the_apic_and_a_pending_nmi_and_saves_pending_debug() {
    let mut b = Bench::root();
    b.set(Field::GuestInterruptibility, 8 | 2).set(Field::GuestPendingDebug, 0x1003);
    b.enter(Active);
    for n in [0, 1, 2, 3, 5, 6, 7, 15] {
        b.cpu().regs.set_r(n, 0x1111 * u64::from(n));
    }
    b.cpu().apic.accept(0x55, false);
    b.nmi(8);
    let (apic, general) = (b.cpu().apic.state().clone(), b.cpu().regs.general());
    b.init(9);
    b.assert_exit(ExitReason::InitSignal);
    let mut after = b.cpu().regs.general();
    after[usize::from(slot::RSP)] = general[usize::from(slot::RSP)];
    assert_eq!(after, general);
    assert_eq!(*b.cpu().apic.state(), apic);
    assert!(b.cpu().apic.bsp(), "on the bootstrap processor too");
    assert_eq!(b.cpu().vmx.nmi, Some(8), "the NMI stays pending");
    assert_eq!((b.get(Field::ExitQualification), b.get(Field::GuestPendingDebug)), (0, 0x1003));
    assert_eq!(b.get(Field::GuestInterruptibility), 8 | 2);
    assert_eq!((b.get(Field::ExitInterruptionInfo), b.get(Field::IdtVectoringInfo)), (0, 0));
}

#[test]
fn r17_exit_4_saves_wait_for_sipi_no_pending_debug_and_no_nmi_blocking_of_its_own() {
    for nmi_blocking in [0, 8] {
        let mut b = Bench::root();
        b.set(Field::GuestInterruptibility, nmi_blocking).set(Field::GuestRflags, 2 | rflags::IF).enter(WaitForSipi);
        b.cpu().pending_debug = dr::DR6_BS;
        let general = b.cpu().regs.general();
        b.sipi(0xff, 1);
        b.assert_exit(ExitReason::Sipi);
        assert_eq!(b.get(Field::ExitQualification), 0xff);
        assert_eq!((b.get(Field::GuestActivityState), b.get(Field::GuestPendingDebug)), (3, 0));
        assert_eq!(b.get(Field::GuestInterruptibility), nmi_blocking);
        assert_eq!((b.get(Field::GuestRip), b.get(Field::GuestRflags)), (GUEST_RIP, 2 | rflags::IF));
        assert_eq!(b.cpu().regs.general()[..4], general[..4]);
    }
}

#[test]
fn r18_after_either_exit_root_operation_runs_active_and_blocks_init_again() {
    let cases: [(ActivityState, Change); 2] = [(Hlt, |b| b.init(1)), (WaitForSipi, |b| b.sipi(0x10, 1))];
    for (state, event) in cases {
        let mut b = Bench::guest(state);
        event(&mut b);
        assert_eq!((b.mode(), b.activity(), b.rip()), (VmxMode::Root, Active, HOST_RIP));
        assert_eq!(b.get(Field::GuestActivityState), state as u64);
        assert_eq!(b.get(Field::EntryInterruptionInfo) >> 31, 0);
        assert_eq!(b.get(Field::GuestInterruptibility) & 4, 0);
        b.init(2);
        assert_eq!((b.fates(2), b.mode()), (vec![Fate::Latched], VmxMode::Root));
        assert_eq!(b.cpu().flags.bits(), 2);
    }
}

/// (before the entry, in the guest, the exit, its vector) in R19's order.
const PRIORITIES: [(Change, Change, ExitReason, u64); 8] = [
    (NOTHING, |b| with(b, |c| c.vmx.init = Some(1)), ExitReason::InitSignal, 0),
    (NOTHING, |b| with(b, |c| c.vmx.mtf_pending = true), ExitReason::MonitorTrapFlag, 0),
    (
        |b| b.set(Field::ExceptionBitmap, 1 << 1),
        |b| with(b, |c| c.pending_debug = dr::DR6_BS),
        ExitReason::ExceptionOrNmi,
        1,
    ),
    (|b| b.pin(PinControls::new().with_preemption_timer(true)), NOTHING, ExitReason::PreemptionTimer, 0),
    (
        |b| {
            b.pin(PinControls::new().with_nmi_exiting(true).with_virtual_nmis(true));
            b.proc(ProcControls::new().with_nmi_window_exiting(true))
        },
        NOTHING,
        ExitReason::NmiWindow,
        0,
    ),
    (
        |b| b.pin(PinControls::new().with_nmi_exiting(true)),
        |b| with(b, |c| c.vmx.nmi = Some(2)),
        ExitReason::ExceptionOrNmi,
        2,
    ),
    (
        |b| {
            b.set(Field::GuestRflags, 2 | rflags::IF);
            b.proc(ProcControls::new().with_interrupt_window_exiting(true))
        },
        NOTHING,
        ExitReason::InterruptWindow,
        0,
    ),
    (
        |b| b.pin(PinControls::new().with_external_interrupt_exiting(true)),
        |b| with(b, |c| c.apic.accept(0x41, false)),
        ExitReason::ExternalInterrupt,
        0,
    ),
];

const NOTHING: Change = |b| b;

fn with(b: &mut Bench, change: impl FnOnce(&mut Cpu)) -> &mut Bench {
    change(b.cpu());
    b
}

#[test]
fn r19_of_any_two_events_the_one_with_the_higher_priority_is_taken() {
    for (i, first) in PRIORITIES.iter().enumerate() {
        for second in &PRIORITIES[i..] {
            let mut b = Bench::root();
            (first.0)(&mut b);
            (second.0)(&mut b);
            b.enter(Active);
            (first.1)(&mut b);
            (second.1)(&mut b);
            b.boundary_once();
            b.assert_exit(first.2);
            assert_eq!(b.get(Field::ExitInterruptionInfo) & 0xff, first.3, "{:?} against {:?}", first.2, second.2);
        }
    }
}

#[test]
fn r20_nothing_comes_between_a_vm_entry_and_the_delivery_of_its_event() {
    let mut b = Bench::root();
    b.pin(PinControls::new().with_external_interrupt_exiting(true)).set(Field::GuestRflags, 2 | rflags::IF);
    b.inject(EventType::External, 0x30, None).set(Field::GuestActivityState, 0);
    b.rig.mailbox.post_interrupt(0x41, false);
    let _ = b.cpu().vm_entry(true);
    assert_eq!(b.handler(), Some(0x30));
    b.boundary();
    b.assert_exit(ExitReason::ExternalInterrupt);
    assert_eq!(b.get(Field::IdtVectoringInfo), 0);
}

#[test]
fn r21_the_init_state() {
    let mut b = Bench::off();
    let c = b.cpu();
    c.cr0 = c.cr0.with_cd(false).with_nw(false);
    c.xcr0 = 7;
    c.msrs.tsc_offset = 12345;
    c.msrs.pat = 0x0606_0606_0606_0606;
    c.msrs.mtrr_def_type = 0xc06;
    c.msrs.star = 9;
    c.dr6 = 0;
    c.dr7 = 0x4ff;
    c.regs.set_general(&[7; 16]);
    let (feature_control, base, id) = (c.msrs.feature_control, c.apic.base(), c.apic.identity().id);
    c.apic.accept(0x55, false);
    b.init(1);
    let c = b.cpu();
    assert_eq!((c.msrs.tsc_offset, c.msrs.pat, c.msrs.mtrr_def_type), (12345, 0x0606_0606_0606_0606, 0xc06));
    assert_eq!((c.msrs.feature_control, c.apic.base(), c.apic.identity().id), (feature_control, base, id));
    assert_eq!((c.xcr0, c.cr0.into_bits()), (7, 0x10), "CD and NW are kept, ET is 1");
    assert_eq!((c.cr3, c.cr4.into_bits(), c.efer.into_bits()), (0, 0, 0));
    assert_eq!((c.dr6, c.dr7, c.flags.bits()), (0xffff_0ff0, 0x400, 2));
    let mut general = [0; 16];
    general[usize::from(slot::RDX)] = crate::cpu::model::SIGNATURE.into();
    assert_eq!(c.regs.general(), general);
    assert_eq!((c.idtr.base, c.idtr.limit, c.seg[1].selector), (0, 0xffff, 0xf000));
    assert_eq!(c.apic.pending(), None, "the local APIC's registers are set");
    assert!(c.apic.bsp());
    b.cpu().cr0 = b.cpu().cr0.with_cd(true).with_nw(true);
    b.init(2);
    assert_eq!(b.cpu().cr0.into_bits(), 0x6000_0010);
}

#[test]
fn r22_an_application_processor_leaves_reset_waiting_for_sipi() {
    use crate::cpu::{Cpu, CpuConfig};
    let rig = crate::testing::Rig::reset();
    for bsp in [true, false] {
        let bus = Box::new(crate::testing::TestBus(rig.world.clone()));
        let config = CpuConfig { apic_id: 1, bsp, count: 2, random_seed: 0 };
        let cpu = Cpu::new(config, rig.ram.clone(), rig.mailbox.clone(), bus);
        assert_eq!(cpu.activity(), if bsp { Active } else { WaitForSipi });
        assert_eq!((cpu.regs.rip(), cpu.seg[1].base, cpu.cr0.into_bits()), (0xfff0, 0xffff_0000, 0x6000_0010));
    }
}

#[test]
fn r22_a_software_disabled_apic_still_takes_init_nmi_and_sipi() {
    let mut b = Bench::off();
    b.cpu().apic.reset(false);
    assert!(!b.cpu().apic.identity().software_enabled && b.cpu().apic.identity().enabled);
    b.init(1).sipi(0x10, 2);
    assert_eq!((b.fates(1), b.fates(2)), (vec![Fate::Delivered], vec![Fate::Started]));
    b.nmi(3);
    assert_eq!(b.fates(3), [Fate::Delivered]);
}

#[test]
fn events_of_an_exit_carry_the_cause_of_the_init_or_sipi() {
    let mut b = Bench::guest(WaitForSipi);
    b.clear_events().sipi(0x10, 77);
    let events = b.events();
    let exit = events.iter().find(|e| matches!(e.detail, Detail::VmExit { .. })).unwrap();
    assert_eq!((exit.cause, exit.mode), (77, VmxMode::NonRoot));
    assert!(events.iter().any(|e| e.detail == Detail::Activity { from: WaitForSipi, to: Active }));
}

#[test]
fn the_entry_is_told_before_the_activity_that_it_brings() {
    let mut b = Bench::root();
    b.clear_events().enter(WaitForSipi);
    let details: Vec<Detail> = b.events().iter().map(|e| e.detail).collect();
    assert!(matches!(details[0], Detail::VmEntry { activity: WaitForSipi, rip: GUEST_RIP, injected: 0, .. }));
    assert_eq!(details[1..], [Detail::Activity { from: Active, to: WaitForSipi }]);
}

#[test]
fn the_single_step_of_l1s_vmlaunch_does_not_trap_in_l2() {
    for state in [Active, WaitForSipi] {
        let mut b = Bench::root();
        b.cpu().flags.set(rflags::TF, true);
        b.cpu().mode_changed();
        b.enter(state);
        assert_eq!((b.cpu().pending_debug, b.activity()), (0, state));
        b.init(1).sipi(0x10, 2);
        assert_eq!((b.mode(), b.get(Field::GuestPendingDebug)), (VmxMode::Root, 0));
    }
}

#[test]
fn blocking_by_sti_lasts_for_the_guests_first_instruction() {
    let mut b = Bench::root();
    b.set(Field::GuestRflags, 2 | rflags::IF).set(Field::GuestInterruptibility, 1).enter(Active);
    b.interrupt(0x41);
    assert_eq!(b.handler(), None, "blocked");
    b.rig.run(1);
    b.boundary();
    assert_eq!(b.handler(), Some(0x41));
}
