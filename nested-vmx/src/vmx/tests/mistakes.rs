//! semantics.md section 5: what went wrong elsewhere, each as a test.

use super::bench::{Bench, GUEST_RIP};
use crate::arch::cr::rflags;
use crate::arch::vmx::{EventType, PinControls};
use crate::cpu::{Boundary, CpuState, RunExit};
use crate::event::ActivityState::{Active, Hlt, WaitForSipi};
use crate::event::{Fate, VmxMode};
use crate::testing::Rig;
use crate::vmx::exit::reasons::ExitReason;
use crate::vmx::vmcs12::Field;

#[test]
fn r16_init_does_not_stay_pending_after_it_became_exit_3() {
    let mut b = Bench::guest(Active);
    b.init(1);
    b.assert_exit(ExitReason::InitSignal);
    b.launch().boundary();
    assert_eq!((b.mode(), b.rip()), (VmxMode::NonRoot, GUEST_RIP));
}

#[test]
fn r17_exit_4_does_not_save_active_nor_nmi_blocking() {
    let mut b = Bench::guest(WaitForSipi);
    b.sipi(0x10, 1);
    assert_eq!((b.get(Field::GuestActivityState), b.get(Field::GuestInterruptibility)), (3, 0));
}

#[test]
fn r04_r09_init_masked_in_root_is_latched_and_exits_at_the_next_entry() {
    let mut b = Bench::root();
    b.init(1).enter(Active).boundary();
    b.assert_exit(ExitReason::InitSignal);
}

#[test]
fn r17_entering_wait_for_sipi_keeps_if_in_the_saved_flags() {
    let mut b = Bench::root();
    b.set(Field::GuestRflags, 2 | rflags::IF).enter(WaitForSipi).sipi(0x10, 1);
    assert_eq!(b.get(Field::GuestRflags), 2 | rflags::IF);
}

#[test]
fn r18_the_entry_after_exit_3_succeeds() {
    let mut b = Bench::guest(Hlt);
    b.init(1);
    assert_eq!(b.get(Field::GuestInterruptibility), 0);
    b.set(Field::GuestActivityState, 3).launch();
    assert_eq!((b.mode(), b.activity()), (VmxMode::NonRoot, WaitForSipi));
}

#[test]
fn r05_r06_a_dropped_sipi_does_not_stay_latched_and_the_processor_halts_again() {
    let mut b = Bench::guest(Hlt);
    b.sipi(0x10, 1);
    assert_eq!(b.cpu().check_events(), Boundary::Idle);
    assert_eq!((b.rig.mailbox.attention(), b.rig.mailbox.peek_events().is_empty()), (0, true));
    assert_eq!(b.rig.run(100), RunExit::Idle { deadline_tsc: None });
}

#[test]
fn r08_a_sipi_in_non_root_is_not_eaten_because_init_is_blocked_in_root() {
    let mut b = Bench::guest(WaitForSipi);
    b.sipi(0x10, 1);
    b.assert_exit(ExitReason::Sipi);
}

#[test]
fn r08_nothing_but_sipi_leaves_wait_for_sipi() {
    let mut b = Bench::root();
    b.pin(
        PinControls::new()
            .with_external_interrupt_exiting(true)
            .with_nmi_exiting(true)
            .with_virtual_nmis(true)
            .with_preemption_timer(true),
    );
    b.set(Field::GuestRflags, 2 | rflags::IF).set(Field::PreemptionTimer, 0).enter(WaitForSipi);
    b.cpu().vmx.mtf_pending = true;
    b.nmi(1).interrupt(0x41).init(2);
    assert_eq!((b.mode(), b.activity()), (VmxMode::NonRoot, WaitForSipi));
    assert_eq!(b.rig.run(100), RunExit::Idle { deadline_tsc: None });
}

#[test]
fn r13_injection_into_wait_for_sipi_is_refused() {
    for event in [EventType::Nmi, EventType::HardwareException, EventType::Other] {
        let mut b = Bench::root();
        let vector = match event {
            EventType::Nmi => 2,
            EventType::Other => 0,
            _ => 1,
        };
        b.inject(event, vector, None).set(Field::GuestActivityState, 3).launch();
        b.assert_entry_failure(605);
    }
}

#[test]
fn a_blocked_init_is_not_a_wake_event() {
    let mut b = Bench::root();
    b.cpu().activity = Hlt;
    b.init(1);
    for _ in 0..3 {
        assert_eq!(b.rig.run(100), RunExit::Idle { deadline_tsc: None });
        assert_eq!(b.rig.mailbox.attention(), 0);
    }
    assert_eq!(b.fates(1), [Fate::Latched]);
}

#[test]
fn reads_are_pure() {
    let mut b = Bench::root();
    b.init(1);
    b.rig.mailbox.post_sipi(0x10, 2);
    let before = b.cpu().save();
    let c = b.cpu();
    let _ = (c.registers(), c.activity(), c.vmx_mode(), c.vmx().fields().count(), c.vmx().init_latched());
    assert_eq!(b.cpu().save(), before);
    assert!(before.posted.sipi.is_some() && before.vmx.init == Some(1));
}

#[test]
fn every_injection_is_accounted_for() {
    let mut b = Bench::off();
    b.cpu().apic.reset(false);
    // A SIPI before the INIT is accepted is dropped aloud.
    b.rig.mailbox.post_sipi(0x10, 1);
    b.rig.mailbox.post_init(2);
    b.boundary();
    b.sipi(0x11, 3).sipi(0x12, 4).init(5).init(6).nmi(7).nmi(8);
    for cause in 1..=8 {
        assert_eq!(b.fates(cause).len(), 1, "cause {cause}: {:?}", b.fates(cause));
    }
}

#[test]
fn a_state_that_cannot_be_is_refused_and_changes_nothing() {
    let mut b = Bench::guest(WaitForSipi);
    let good = b.cpu().save();
    let mut cases: Vec<CpuState> = Vec::new();
    for change in [
        |s: &mut CpuState| s.vmx.vmxon_gpa = None,
        |s: &mut CpuState| s.vmx.current_vmcs_gpa = None,
        |s: &mut CpuState| s.vmx.current_vmcs_gpa = Some(0x123),
        |s: &mut CpuState| s.vmx.vmxon_gpa = Some(1 << 60),
    ] {
        let mut bad = good.clone();
        change(&mut bad);
        cases.push(bad);
    }
    for bad in cases {
        assert!(b.cpu().restore(&bad).is_err());
        assert_eq!(b.cpu().save(), good);
    }
}

#[test]
fn wait_for_sipi_and_a_latched_init_travel_in_the_snapshot() {
    let mut b = Bench::guest(WaitForSipi);
    b.nmi(5);
    let saved = b.cpu().save();
    let mut other = Bench { rig: Rig::reset() };
    other.cpu().restore(&saved).unwrap();
    assert_eq!(other.cpu().save(), saved);
    assert_eq!((other.mode(), other.activity()), (VmxMode::NonRoot, WaitForSipi));
    other.sipi(0x33, 9);
    assert_eq!((other.mode(), other.get(Field::ExitQualification)), (VmxMode::Root, 0x33));

    let mut b = Bench::root();
    b.init(1);
    let saved = b.cpu().save();
    let mut other = Bench::root();
    other.cpu().restore(&saved).unwrap();
    assert!(other.cpu().vmx().init_latched());
    other.enter(Active).boundary();
    other.assert_exit(ExitReason::InitSignal);
    assert_eq!(other.fates(1), [Fate::VmExit(3)]);
}
