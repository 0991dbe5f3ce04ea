//! R1 to R8: what each state does with each event. The table is written from semantics.md.

use super::bench::Bench;
use crate::arch::cr::rflags;
use crate::arch::vmx::{PinControls, ProcControls};
use crate::cpu::flags;
use crate::event::ActivityState::{self, Active, Hlt, Shutdown, WaitForSipi};
use crate::event::{Fate, Rule, VmxMode};
use crate::vmx::exit::reasons::ExitReason;
use crate::vmx::vmcs12::Field;

const GUEST_STATES: [ActivityState; 4] = [Active, Hlt, Shutdown, WaitForSipi];

fn application_processor() -> Bench {
    let mut b = Bench::off();
    b.cpu().apic.reset(false);
    b.cpu().apic.set_virtual_wire();
    b
}

fn set_if(b: &mut Bench, on: bool) {
    b.cpu().flags.set(flags::IF, on);
}

#[test]
fn r01_init_outside_vmx_resets_the_bootstrap_processor_and_stops_the_others() {
    for state in [Active, Hlt] {
        let mut b = Bench::off();
        b.cpu().activity = state;
        b.init(7);
        assert_eq!(b.fates(7), [Fate::Reset]);
        assert_eq!((b.activity(), b.rip(), b.cpu().seg[1].base), (Active, 0xfff0, 0xffff_0000));
        let mut b = application_processor();
        b.cpu().activity = state;
        b.init(7);
        assert_eq!((b.fates(7), b.activity()), (vec![Fate::Delivered], WaitForSipi));
    }
    let mut b = application_processor();
    b.cpu().activity = Shutdown;
    b.init(7);
    assert_eq!((b.fates(7), b.activity()), (vec![Fate::Reset], WaitForSipi));
}

#[test]
fn r01_sipi_outside_vmx_is_dropped_by_a_running_or_halted_processor() {
    for state in [Active, Hlt] {
        let mut b = Bench::off();
        b.cpu().activity = state;
        b.sipi(0x10, 3);
        assert_eq!((b.fates(3), b.activity()), (vec![Fate::Dropped(Rule::R1)], state));
    }
}

#[test]
fn r01_nmi_and_interrupts_outside_vmx_wake_from_hlt() {
    for state in [Active, Hlt] {
        let mut b = Bench::off();
        b.cpu().activity = state;
        b.nmi(4);
        assert_eq!((b.handler(), b.activity(), b.fates(4)), (Some(2), Active, vec![Fate::Delivered]));
        let mut b = Bench::off();
        b.cpu().activity = state;
        b.interrupt(0x41);
        assert_eq!((b.handler(), b.activity()), (None, state), "IF=0 holds it");
        set_if(&mut b, true);
        b.boundary();
        assert_eq!((b.handler(), b.activity()), (Some(0x41), Active));
    }
}

#[test]
fn r02_wait_for_sipi_outside_vmx_takes_only_sipi() {
    let mut b = application_processor();
    b.init(1).init(2);
    assert_eq!((b.fates(2), b.activity()), (vec![Fate::Dropped(Rule::R2)], WaitForSipi));
    b.nmi(3).interrupt(0x41);
    assert_eq!((b.fates(3), b.activity()), (vec![Fate::Latched], WaitForSipi));
    b.rig.mailbox.post_sipi(0x9a, 4);
    b.cpu().check_events_at_most(0);
    assert_eq!(b.fates(4), [Fate::Started]);
    let cs = b.cpu().seg[1];
    assert_eq!((cs.selector, cs.base, b.activity()), (0x9a00, 0x9_a000, Active));
    b.boundary();
    assert_eq!(b.fates(3), [Fate::Latched, Fate::Delivered], "the NMI was held, not lost");
}

#[test]
fn r03_there_is_no_smm_to_enter() {
    let mut b = Bench::root();
    assert_eq!(b.cpu().vmx.caps.msr(0x480).unwrap_or_default() >> 49 & 1, 0, "no dual-monitor treatment");
    b.or(Field::EntryControls, 1 << 10).launch();
    b.assert_vm_fail(crate::vmx::exit::reasons::InstructionError::EntryControls);
}

#[test]
fn r04_vmx_root_latches_init_drops_sipi_and_takes_nmi_and_interrupts() {
    let mut b = Bench::root();
    b.init(1).init(2).sipi(0x10, 3);
    assert_eq!(b.fates(1), [Fate::Latched]);
    assert_eq!(b.fates(2), [Fate::Coalesced]);
    assert_eq!(b.fates(3), [Fate::Dropped(Rule::R4)]);
    assert!(b.cpu().vmx().init_latched());
    assert_eq!((b.mode(), b.activity()), (VmxMode::Root, Active));
    b.nmi(4);
    assert_eq!((b.handler(), b.fates(4)), (Some(2), vec![Fate::Delivered]));
    let mut b = Bench::root();
    set_if(&mut b, true);
    b.interrupt(0x41);
    assert_eq!(b.handler(), Some(0x41));
}

#[test]
fn r05_r06_r07_init_in_non_root_is_exit_3() {
    for state in [Active, Hlt, Shutdown] {
        let mut b = Bench::guest(state);
        b.init(5);
        b.assert_exit(ExitReason::InitSignal);
        assert_eq!(b.fates(5), [Fate::VmExit(3)]);
        assert_eq!((b.get(Field::ExitQualification), b.get(Field::GuestActivityState)), (0, state as u64));
        assert!(!b.cpu().vmx().init_latched());
    }
}

#[test]
fn r05_r06_r07_sipi_outside_wait_for_sipi_is_dropped() {
    for (state, rule) in [(Active, Rule::R5), (Hlt, Rule::R6), (Shutdown, Rule::R7)] {
        let mut b = Bench::guest(state);
        b.sipi(0x10, 5);
        assert_eq!((b.fates(5), b.activity()), (vec![Fate::Dropped(rule)], state));
        assert_eq!(b.mode(), VmxMode::NonRoot);
    }
}

#[test]
fn r08_wait_for_sipi_drops_init_and_makes_sipi_exit_4() {
    let mut b = Bench::guest(WaitForSipi);
    b.init(5);
    assert_eq!((b.fates(5), b.activity(), b.mode()), (vec![Fate::Dropped(Rule::R8)], WaitForSipi, VmxMode::NonRoot));
    b.sipi(0x9a, 6);
    b.assert_exit(ExitReason::Sipi);
    assert_eq!(b.fates(6), [Fate::VmExit(4)]);
    assert_eq!((b.get(Field::ExitQualification), b.get(Field::GuestActivityState)), (0x9a, 3));
    assert!(!b.cpu().vmx().init_latched(), "no false exit 3 after exit 4");
    b.set(Field::GuestActivityState, 0).launch().boundary();
    assert_eq!(b.mode(), VmxMode::NonRoot);
}

/// NMI: exit 0 with NMI exiting, from every state but wait-for-SIPI.
#[test]
fn r05_r06_r07_nmi_exits_when_asked_for_and_else_wakes() {
    for state in GUEST_STATES {
        let mut b = Bench::root();
        b.pin(PinControls::new().with_nmi_exiting(true)).enter(state).nmi(5);
        if state == WaitForSipi {
            assert_eq!((b.fates(5), b.activity()), (vec![Fate::Latched], WaitForSipi), "R8: held");
        } else {
            b.assert_exit(ExitReason::ExceptionOrNmi);
            assert_eq!((b.get(Field::ExitInterruptionInfo), b.fates(5)), (0x8000_0202, vec![Fate::VmExit(0)]));
            assert_eq!(b.get(Field::GuestActivityState), state as u64);
            assert!(b.cpu().nmi_blocked, "an NMI exit blocks NMIs");
        }
        let mut b = Bench::guest(state);
        b.nmi(5);
        let expected = if state == WaitForSipi { (None, WaitForSipi) } else { (Some(2), Active) };
        assert_eq!((b.handler(), b.activity()), expected, "{state:?}");
        assert_eq!(b.mode(), VmxMode::NonRoot);
    }
}

#[test]
fn r05_r06_r07_external_interrupts() {
    for state in GUEST_STATES {
        let held = matches!(state, Shutdown | WaitForSipi);
        let mut b = Bench::root();
        b.pin(PinControls::new().with_external_interrupt_exiting(true)).enter(state).interrupt(0x41);
        if held {
            assert_eq!((b.mode(), b.activity()), (VmxMode::NonRoot, state), "held even with exiting");
        } else {
            b.assert_exit(ExitReason::ExternalInterrupt);
            assert_eq!(b.get(Field::GuestActivityState), state as u64);
            assert_eq!(b.get(Field::ExitInterruptionInfo) >> 31, 0, "not acknowledged");
            assert_eq!(b.cpu().apic.pending(), Some(0x41));
        }
        for interrupts in [false, true] {
            let mut b = Bench::root();
            b.set(Field::GuestRflags, 2 | if interrupts { rflags::IF } else { 0 }).enter(state).interrupt(0x41);
            let taken = interrupts && !held;
            let expected = if taken { (Some(0x41), Active) } else { (None, state) };
            assert_eq!((b.handler(), b.activity()), expected, "{state:?}, IF={interrupts}");
        }
    }
}

#[test]
fn r05_acknowledge_on_exit_tells_the_vector() {
    let mut b = Bench::root();
    b.or(Field::ExitControls, 1 << 15).pin(PinControls::new().with_external_interrupt_exiting(true));
    b.enter(Active).interrupt(0x41);
    b.assert_exit(ExitReason::ExternalInterrupt);
    assert_eq!(b.get(Field::ExitInterruptionInfo), 0x8000_0041);
    assert_eq!(b.cpu().apic.pending(), None);
    assert_eq!(b.cpu().apic.in_service(), Some(0x41));
}

#[test]
fn r05_r06_r07_preemption_timer_exits_except_in_wait_for_sipi() {
    for state in GUEST_STATES {
        let mut b = Bench::root();
        b.pin(PinControls::new().with_preemption_timer(true)).set(Field::PreemptionTimer, 0).enter(state).boundary();
        if state == WaitForSipi {
            assert_eq!((b.mode(), b.activity()), (VmxMode::NonRoot, state));
            assert_eq!(b.cpu().preemption_deadline_tsc(), None, "R8: nothing to wait for");
        } else {
            b.assert_exit(ExitReason::PreemptionTimer);
            assert_eq!(b.get(Field::GuestActivityState), state as u64);
        }
    }
}

#[test]
fn r05_preemption_timer_counts_the_tsc_at_its_rate_and_is_saved() {
    let mut b = Bench::root();
    b.or(Field::ExitControls, 1 << 22).pin(PinControls::new().with_preemption_timer(true));
    b.set(Field::PreemptionTimer, 4).enter(Active);
    let start = b.cpu().retired();
    b.rig.run(1000);
    b.assert_exit(ExitReason::PreemptionTimer);
    assert_eq!(b.get(Field::PreemptionTimer), 0);
    let exit = b.events().iter().rev().find(|e| e.detail.kind() == crate::event::EventKind::VmExit).unwrap().retired;
    assert!((3 * 32..=4 * 32).contains(&(exit - start)), "{}", exit - start);
    b.set(Field::PreemptionTimer, 100).launch().init(1);
    b.assert_exit(ExitReason::InitSignal);
    assert!((98..=100).contains(&b.get(Field::PreemptionTimer)));
}

#[test]
fn r05_r06_monitor_trap_flag_exits_and_is_held_in_shutdown_and_wait_for_sipi() {
    for state in GUEST_STATES {
        let mut b = Bench::root();
        b.enter(state);
        b.cpu().vmx.mtf_pending = true;
        b.boundary();
        if matches!(state, Shutdown | WaitForSipi) {
            assert_eq!((b.mode(), b.cpu().vmx.mtf_pending), (VmxMode::NonRoot, true));
        } else {
            b.assert_exit(ExitReason::MonitorTrapFlag);
        }
    }
}

#[test]
fn r05_monitor_trap_flag_exits_after_each_instruction() {
    let mut b = Bench::root();
    b.proc(ProcControls::new().with_monitor_trap_flag(true)).enter(Active);
    b.rig.run(2);
    b.assert_exit_at(ExitReason::MonitorTrapFlag, super::bench::GUEST_RIP + 1);
    b.launch();
    b.rig.run(2);
    b.assert_exit_at(ExitReason::MonitorTrapFlag, super::bench::GUEST_RIP);
}

#[test]
fn windows_wake_what_they_may_wake() {
    for (state, wakes) in [(Active, true), (Hlt, true), (Shutdown, true), (WaitForSipi, false)] {
        let mut b = Bench::root();
        b.pin(PinControls::new().with_nmi_exiting(true).with_virtual_nmis(true));
        b.proc(ProcControls::new().with_nmi_window_exiting(true)).enter(state).boundary();
        assert_eq!(b.mode() == VmxMode::Root, wakes, "NMI window, {state:?}");
        let wakes = matches!(state, Active | Hlt);
        let mut b = Bench::root();
        b.set(Field::GuestRflags, 2 | rflags::IF);
        b.proc(ProcControls::new().with_interrupt_window_exiting(true)).enter(state).boundary();
        assert_eq!(b.mode() == VmxMode::Root, wakes, "interrupt window, {state:?}");
    }
}

#[test]
fn shutdown_in_vmx_root_latches_init_and_is_left_by_nmi() {
    let mut b = Bench::root();
    b.cpu().activity = Shutdown;
    b.init(1);
    assert_eq!((b.fates(1), b.activity()), (vec![Fate::Latched], Shutdown));
    b.nmi(2);
    assert_eq!((b.handler(), b.activity()), (Some(2), Active));
}

#[test]
fn a_blocked_nmi_is_held_until_iret_and_virtual_nmis_do_not_block_physical_ones() {
    let mut b = Bench::root();
    b.set(Field::GuestInterruptibility, 8).enter(Active).nmi(1);
    assert_eq!((b.fates(1), b.mode()), (vec![Fate::Latched], VmxMode::NonRoot));
    b.cpu().unblock_nmi_by_iret();
    b.boundary();
    assert_eq!(b.handler(), Some(2));
    let mut b = Bench::root();
    b.pin(PinControls::new().with_nmi_exiting(true).with_virtual_nmis(true));
    b.set(Field::GuestInterruptibility, 8).enter(Active).nmi(1);
    b.assert_exit(ExitReason::ExceptionOrNmi);
    assert_eq!(b.get(Field::GuestInterruptibility), 8, "virtual-NMI blocking is saved as it was");
}
