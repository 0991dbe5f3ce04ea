//! What L1's flags, pending debug exceptions and the monitor trap flag do around VM entries.

use super::bench::{Bench, GUEST_RIP, HANDLERS};
use crate::arch::cr::rflags;
use crate::arch::vmx::ProcControls;
use crate::cpu::flags;
use crate::event::ActivityState::{Active, WaitForSipi};
use crate::event::{Fate, Rule, VmxMode};
use crate::vmx::exit::reasons::ExitReason;
use crate::vmx::vmcs12::Field;

#[test]
fn single_stepping_a_vm_entry_traps_neither_in_l2_nor_after_a_failed_one() {
    for (state, mode) in [(0, VmxMode::NonRoot), (9, VmxMode::Root)] {
        let mut b = Bench::root();
        b.set(Field::GuestActivityState, state).set(Field::GuestRflags, 2 | rflags::RF);
        for bit in [flags::TF, flags::RF] {
            b.cpu().flags.set(bit, true);
        }
        b.cpu().mode_changed();
        b.launch();
        let found = (b.mode(), b.cpu().pending_debug, b.cpu().flags.has(flags::RF));
        assert_eq!(found, (mode, 0, mode == VmxMode::NonRoot));
    }
}

#[test]
fn r14_pending_breakpoints_that_were_not_enabled_are_no_debug_exception() {
    let mut b = Bench::root();
    b.set(Field::GuestPendingDebug, 3).enter(Active).boundary();
    assert_eq!(b.rip(), GUEST_RIP);
}

#[test]
fn r05_monitor_trap_flag_exits_behind_the_delivery_of_a_pending_interrupt() {
    let mut b = Bench::root();
    b.proc(ProcControls::new().with_monitor_trap_flag(true)).set(Field::GuestRflags, 2 | rflags::IF).enter(Active);
    b.interrupt(0x41);
    b.assert_exit_at(ExitReason::MonitorTrapFlag, HANDLERS + 16 * 0x41);
}

#[test]
fn an_instruction_s_exit_saves_rf_clear_and_an_event_s_exit_as_it_was() {
    let mut b = Bench::root();
    b.set(Field::GuestRflags, 2 | rflags::RF).enter(Active).init(1);
    b.assert_exit(ExitReason::InitSignal);
    assert_eq!(b.get(Field::GuestRflags), 2 | rflags::RF);
    b.launch().execute(|a| a.cpuid());
    b.assert_exit_at(ExitReason::Cpuid, crate::testing::CODE);
    assert_eq!(b.get(Field::GuestRflags), 2);
}

#[test]
fn r12_an_init_that_joins_a_pending_one_overwrites_the_sipi_between_them() {
    let mut b = Bench::off();
    b.cpu().apic.reset(false);
    let m = &b.rig.mailbox;
    m.post_init(1);
    m.post_sipi(0x10, 2);
    m.post_init(3);
    b.boundary();
    assert_eq!((b.activity(), b.fates(2)), (WaitForSipi, vec![Fate::Dropped(Rule::R12)]));
}
