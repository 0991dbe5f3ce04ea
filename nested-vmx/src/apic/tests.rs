use proptest::prelude::*;

use super::*;
use crate::arch::apic::{base, offset};
use crate::bus::{Delivery, Destination};

const AT_0: Now = Now { tsc: 0, guest_offset: 0 };
const PHYSICAL_BITS: u32 = 46;

fn at(tsc: u64) -> Now {
    Now { tsc, guest_offset: 0 }
}

/// A software-enabled xAPIC.
fn xapic() -> LocalApic {
    let mut apic = LocalApic::new(5, false);
    let _ = apic.mmio_write(offset::SVR, 4, 0x1ff, AT_0);
    apic
}

fn x2apic() -> LocalApic {
    let mut apic = xapic();
    assert!(apic.write_base(apic.base() | base::EXTD, PHYSICAL_BITS).is_ok());
    apic
}

fn write(apic: &mut LocalApic, at: u16, value: u32) -> Work {
    apic.mmio_write(at, 4, value.into(), AT_0)
}

fn read(apic: &mut LocalApic, at: u16) -> u32 {
    apic.mmio_read(at, 4, AT_0) as u32
}

fn msr(at: u16) -> u32 {
    0x800 + u32::from(at >> 4)
}

#[test]
fn reset_leaves_the_registers_of_the_sdm_table() {
    let mut apic = LocalApic::new(5, true);
    assert_eq!(apic.base(), 0xfee0_0900);
    assert_eq!(apic.mmio_window(), Some(0xfee0_0000));
    for (at, value) in [
        (offset::ID, 5 << 24),
        (offset::VERSION, 0x0005_0014),
        (offset::TPR, 0),
        (offset::LDR, 0),
        (offset::DFR, 0xffff_ffff),
        (offset::SVR, 0xff),
        (offset::ESR, 0),
        (offset::ICR_LOW, 0),
        (offset::LVT_TIMER, 0x10000),
        (offset::LVT_LINT0, 0x10000),
        (offset::LVT_ERROR, 0x10000),
        (offset::INITIAL_COUNT, 0),
        (offset::CURRENT_COUNT, 0),
        (offset::DIVIDE, 0),
    ] {
        assert_eq!(read(&mut apic, at), value, "{at:#x}");
    }
}

#[test]
fn base_transitions_follow_the_sdm_figure() {
    const XAPIC: u64 = base::EN;
    const X2APIC: u64 = base::EN | base::EXTD;
    // From (as steps from xAPIC), to, allowed.
    let table: &[(&[u64], u64, bool)] = &[
        (&[], XAPIC, true),
        (&[], X2APIC, true),
        (&[], 0, true),
        (&[], base::EXTD, false),
        (&[X2APIC], X2APIC, true),
        (&[X2APIC], 0, true),
        (&[X2APIC], XAPIC, false),
        (&[X2APIC], base::EXTD, false),
        (&[0], XAPIC, true),
        (&[0], X2APIC, false),
        (&[0], base::EXTD, false),
    ];
    for (steps, to, allowed) in table {
        let mut apic = LocalApic::new(0, false);
        for step in *steps {
            assert!(apic.write_base(0xfee0_0000 | step, PHYSICAL_BITS).is_ok());
        }
        let before = apic.clone();
        let result = apic.write_base(0xfee0_0000 | to, PHYSICAL_BITS);
        assert_eq!(result.is_ok(), *allowed, "{steps:x?} to {to:#x}");
        assert!(*allowed || apic == before, "a fault changes nothing");
    }
}

#[test]
fn base_reserved_bits_are_gp_and_a_moved_page_is_reported() {
    let mut apic = LocalApic::new(0, true);
    for bad in [1 << 9, 1, 1 << PHYSICAL_BITS, 1 << 63] {
        assert_eq!(apic.write_base(apic.base() | bad, PHYSICAL_BITS), Err(GeneralProtection), "{bad:#x}");
    }
    let work = apic.write_base(0xfeb0_0000 | base::EN | base::BSP, PHYSICAL_BITS).unwrap();
    assert!(work.window_changed && !work.identity_changed);
    assert_eq!(apic.mmio_window(), Some(0xfeb0_0000));
}

#[test]
fn r22_x2apic_mode_closes_the_window_and_disabling_clears_the_state() {
    let mut apic = x2apic();
    assert_eq!(apic.mmio_window(), None);
    let identity = apic.identity();
    assert!(identity.x2apic && identity.ldr == 1 << 5);
    apic.accept(0x30, false);
    let work = apic.write_base(0xfee0_0000, PHYSICAL_BITS).unwrap();
    assert!(work.identity_changed && !apic.identity().enabled);
    assert_eq!(apic.pending(), None);
    assert!(apic.accepts_extint());
    apic.accept(0x30, false);
    assert!(apic.write_base(0xfee0_0000 | base::EN, PHYSICAL_BITS).is_ok());
    assert_eq!((apic.pending(), read(&mut apic, offset::SVR)), (None, 0xff));
}

#[test]
fn x2apic_msrs_fault_where_the_sdm_says() {
    let mut apic = x2apic();
    let all = 0x800..=0x8ffu32;
    let readable =
        |m: u32| matches!(m, 0x802 | 0x803 | 0x808 | 0x80a | 0x80d | 0x80f..=0x828 | 0x830 | 0x832..=0x839 | 0x83e);
    let zero_writable = |m: u32| matches!(m, 0x808 | 0x80b | 0x80f | 0x828 | 0x830 | 0x832..=0x838 | 0x83e | 0x83f);
    for m in all {
        assert_eq!(apic.read_msr(m, AT_0).is_ok(), readable(m), "RDMSR {m:#x}");
        let value = if m == 0x80f { 0x1ff } else { 0 };
        assert_eq!(apic.write_msr(m, value, AT_0).is_ok(), zero_writable(m), "WRMSR {m:#x}");
    }
    for (at, value) in [
        (offset::TPR, 0x100),
        (offset::EOI, 1),
        (offset::ESR, 1),
        (offset::SVR, 0x1000),
        (offset::LVT_TIMER, 0x700),
        (offset::LVT_ERROR, 0x8000),
        (offset::LVT_LINT0, 0x2_0000),
        (offset::DIVIDE, 4),
        (offset::SELF_IPI, 0x100),
        (offset::TPR, 1 << 32),
    ] {
        assert_eq!(apic.write_msr(msr(at), value, AT_0), Err(GeneralProtection), "{at:#x}={value:#x}");
    }
    assert_eq!(apic.write_msr(0x830, 1 << 13, AT_0), Err(GeneralProtection));
    assert_eq!(xapic().read_msr(0x802, AT_0), Err(GeneralProtection));
}

#[test]
fn only_aligned_dword_stores_count_and_narrow_loads_see_their_bytes() {
    let mut apic = xapic();
    let _ = apic.mmio_write(offset::TPR, 1, 0x50, AT_0);
    let _ = apic.mmio_write(offset::TPR + 4, 4, 0x50, AT_0);
    assert_eq!(apic.tpr(), 0);
    assert_eq!(apic.mmio_read(offset::ID + 3, 1, AT_0), 5);
    assert_eq!(apic.mmio_read(offset::ID + 2, 2, AT_0), 0x0500);
    assert_eq!(apic.mmio_read(offset::ID + 4, 4, AT_0), 0);
    assert_eq!(apic.mmio_read(offset::ID, 8, AT_0), 0);
}

#[test]
fn priorities_gate_delivery() {
    let mut apic = xapic();
    apic.accept(0x31, false);
    apic.accept(0x52, false);
    assert_eq!(apic.pending(), Some(0x52));
    let _ = write(&mut apic, offset::TPR, 0x50);
    assert_eq!(apic.pending(), None, "same class as the task priority");
    apic.set_cr8(4);
    assert_eq!((apic.tpr(), apic.acknowledge()), (0x40, Some(0x52)));
    assert_eq!((apic.ppr(), apic.pending()), (0x50, None));
    apic.accept(0x5f, false);
    assert_eq!(apic.pending(), None, "same class as what is in service");
    apic.accept(0x60, false);
    assert_eq!(apic.acknowledge(), Some(0x60));
    assert_eq!(apic.eoi().eoi_broadcast, None);
    assert_eq!((apic.in_service(), apic.ppr()), (Some(0x52), 0x50));
    let _ = apic.eoi();
    assert_eq!((apic.ppr(), apic.acknowledge()), (0x40, Some(0x5f)));
    let _ = apic.eoi();
    apic.set_cr8(0);
    assert_eq!((apic.acknowledge(), apic.acknowledge()), (Some(0x31), None));
}

#[test]
fn ppr_takes_the_subclass_of_the_tpr_only() {
    let mut apic = xapic();
    apic.accept(0x47, false);
    apic.acknowledge();
    for (tpr, ppr) in [(0x00, 0x40), (0x3f, 0x40), (0x41, 0x41), (0x4f, 0x4f), (0x52, 0x52)] {
        apic.set_tpr(tpr);
        assert_eq!(apic.ppr(), ppr, "TPR {tpr:#x}");
    }
}

#[test]
fn registers_show_irr_isr_and_tmr_in_their_quarters() {
    let mut apic = xapic();
    apic.accept(0xa5, true);
    apic.accept(0x35, false);
    assert_eq!(read(&mut apic, offset::IRR_FIRST + 0x50), 1 << 5);
    assert_eq!(read(&mut apic, offset::TMR_FIRST + 0x50), 1 << 5);
    assert_eq!(read(&mut apic, offset::IRR_FIRST + 0x10), 1 << 21);
    assert_eq!(apic.acknowledge(), Some(0xa5));
    assert_eq!(read(&mut apic, offset::ISR_FIRST + 0x50), 1 << 5);
    assert_eq!(read(&mut apic, offset::IRR_FIRST + 0x50), 0);
}

#[test]
fn eoi_of_a_level_triggered_vector_is_broadcast() {
    let mut apic = xapic();
    apic.post([0, 1 << 4, 0, 0], [0, 1 << 4, 0, 0]);
    assert_eq!(apic.acknowledge(), Some(0x44));
    assert_eq!(write(&mut apic, offset::EOI, 0).eoi_broadcast, Some(0x44));
    apic.post([0, 1 << 4, 0, 0], [0; 4]);
    apic.acknowledge();
    assert_eq!(write(&mut apic, offset::EOI, 0).eoi_broadcast, None, "edge-triggered since");
    assert_eq!(write(&mut apic, offset::EOI, 0), Work::default(), "nothing in service");
}

#[test]
fn r22_software_disable_masks_the_lvts_and_holds_what_is_pending() {
    let mut apic = xapic();
    let _ = write(&mut apic, offset::LVT_LINT0, 0x700);
    assert!(apic.accepts_extint());
    apic.accept(0x40, false);
    assert!(write(&mut apic, offset::SVR, 0xff).identity_changed);
    assert!(!apic.accepts_extint());
    apic.accept(0x50, false);
    apic.post([0, 0, 1, 0], [0; 4]);
    assert_eq!(apic.pending(), Some(0x40));
    let _ = write(&mut apic, offset::LVT_TIMER, 0x20);
    assert_eq!(read(&mut apic, offset::LVT_TIMER), 0x1_0020, "cannot be unmasked");
    let _ = write(&mut apic, offset::ICR_HIGH, 1 << 24);
    assert!(write(&mut apic, offset::ICR_LOW, 0x4030).ipi.is_some(), "still sends");
    assert!(apic.identity().enabled && !apic.identity().software_enabled);
}

#[test]
fn icr_sends_in_both_modes() {
    let mut apic = xapic();
    let _ = write(&mut apic, offset::ICR_HIGH, 3 << 24);
    let ipi = write(&mut apic, offset::ICR_LOW, 0x4608).ipi.unwrap();
    assert_eq!((ipi.delivery, ipi.vector, ipi.destination), (Delivery::StartUp, 8, Destination::Physical(3)));
    assert_eq!((read(&mut apic, offset::ICR_LOW), read(&mut apic, offset::ICR_HIGH)), (0x4608, 3 << 24));

    let mut apic = x2apic();
    let ipi = apic.write_msr(0x830, 0x0000_0103_0000_4500, AT_0).unwrap().ipi.unwrap();
    assert_eq!((ipi.delivery, ipi.destination), (Delivery::Init, Destination::Physical(0x103)));
    assert_eq!(apic.read_msr(0x830, AT_0), Ok(0x0000_0103_0000_4500));
}

#[test]
fn self_ipis_land_in_the_own_irr() {
    let mut apic = xapic();
    assert_eq!(write(&mut apic, offset::ICR_LOW, 0x4_4031), Work::default());
    assert_eq!(apic.acknowledge(), Some(0x31));
    let mut apic = x2apic();
    assert_eq!(apic.write_msr(msr(offset::SELF_IPI), 0x32, AT_0), Ok(Work::default()));
    assert_eq!(apic.acknowledge(), Some(0x32));
}

#[test]
fn esr_latches_on_write_and_its_interrupt_is_armed_again_by_it() {
    let mut apic = xapic();
    let _ = write(&mut apic, offset::LVT_ERROR, 0xe0);
    assert_eq!(write(&mut apic, offset::ICR_LOW, 0x400f).ipi, None);
    assert_eq!(apic.acknowledge(), Some(0xe0));
    let _ = apic.eoi();
    apic.accept(3, false);
    read(&mut apic, 0x040);
    assert_eq!(apic.pending(), None, "not armed");
    assert_eq!(read(&mut apic, offset::ESR), 0);
    let _ = write(&mut apic, offset::ESR, 0);
    assert_eq!(read(&mut apic, offset::ESR), 0xe0);
    let _ = write(&mut apic, 0x040, 0);
    assert_eq!(apic.pending(), Some(0xe0));
    let _ = write(&mut apic, offset::ESR, 0);
    assert_eq!(read(&mut apic, offset::ESR), 0x80);
}

#[test]
fn one_shot_timer_counts_crystal_ticks_and_fires_once() {
    for (divide, by) in [(0, 2), (1, 4), (2, 8), (3, 16), (8, 32), (9, 64), (10, 128), (11, 1)] {
        let mut apic = xapic();
        let _ = write(&mut apic, offset::DIVIDE, divide);
        let _ = write(&mut apic, offset::LVT_TIMER, 0x40);
        let start = at(1000);
        assert!(apic.mmio_write(offset::INITIAL_COUNT, 4, 100, start).deadline_changed);
        let end = 1000 + 100 * 40 * by;
        assert_eq!(apic.next_deadline(start), Some(end));
        assert_eq!(apic.mmio_read(offset::CURRENT_COUNT, 4, at(1000 + 30 * 40 * by)), 70);
        apic.advance(at(end - 1));
        assert_eq!(apic.pending(), None);
        apic.advance(at(end));
        assert_eq!(apic.acknowledge(), Some(0x40));
        assert_eq!(apic.mmio_read(offset::CURRENT_COUNT, 4, at(end + 5)), 0);
        assert_eq!(apic.next_deadline(at(end)), None);
    }
}

#[test]
fn periodic_timer_keeps_its_phase_when_looked_at_late() {
    let mut apic = xapic();
    let _ = write(&mut apic, offset::DIVIDE, 11);
    let _ = write(&mut apic, offset::LVT_TIMER, 0x2_0041);
    let _ = write(&mut apic, offset::INITIAL_COUNT, 10);
    apic.advance(at(3 * 400 + 100));
    assert_eq!(apic.acknowledge(), Some(0x41));
    assert_eq!(apic.next_deadline(at(1300)), Some(1600));
    assert_eq!(apic.mmio_read(offset::CURRENT_COUNT, 4, at(1300)), 8);
    let _ = apic.mmio_write(offset::INITIAL_COUNT, 4, 0, at(1300));
    assert_eq!(apic.next_deadline(at(1300)), None);
}

#[test]
fn a_masked_timer_runs_but_its_expiry_is_not_kept() {
    let mut apic = xapic();
    let _ = write(&mut apic, offset::LVT_TIMER, 0x1_0040);
    let _ = write(&mut apic, offset::INITIAL_COUNT, 10);
    assert_eq!(apic.next_deadline(AT_0), None);
    let _ = apic.mmio_write(offset::LVT_TIMER, 4, 0x40, at(10_000));
    apic.advance(at(20_000));
    assert_eq!(apic.pending(), None);
}

#[test]
fn changing_the_divisor_keeps_the_count() {
    let mut apic = xapic();
    let _ = write(&mut apic, offset::DIVIDE, 11);
    let _ = write(&mut apic, offset::LVT_TIMER, 0x40);
    let _ = apic.mmio_write(offset::INITIAL_COUNT, 4, 100, at(100_000));
    let _ = apic.mmio_write(offset::DIVIDE, 4, 0, at(100_000 + 60 * 40));
    assert_eq!(apic.mmio_read(offset::CURRENT_COUNT, 4, at(100_000 + 60 * 40)), 40);
    assert_eq!(apic.next_deadline(at(102_400)), Some(102_400 + 40 * 80));
}

#[test]
fn tsc_deadline_is_in_the_processors_own_tsc() {
    let mut apic = x2apic();
    let now = Now { tsc: 1_000, guest_offset: 5_000 };
    assert!(apic.write_tsc_deadline(7_000, now).deadline_changed);
    assert_eq!(apic.tsc_deadline(now), 0, "ignored in the other modes");
    assert!(apic.write_msr(msr(offset::LVT_TIMER), 0x4_0042, now).is_ok());
    let _ = apic.write_tsc_deadline(7_000, now);
    assert!(apic.write_msr(msr(offset::INITIAL_COUNT), 5, now).is_ok());
    assert_eq!((apic.next_deadline(now), apic.tsc_deadline(now)), (Some(2_000), 7_000));
    assert_eq!(apic.read_msr(msr(offset::INITIAL_COUNT), now), Ok(0));
    let later = Now { tsc: 2_000, ..now };
    assert_eq!(apic.tsc_deadline(later), 0);
    apic.advance(later);
    assert_eq!((apic.acknowledge(), apic.next_deadline(later)), (Some(0x42), None));

    let _ = apic.write_tsc_deadline(1, later);
    assert_eq!(apic.next_deadline(later), Some(2_000), "in the past: at once");
    assert!(apic.write_msr(msr(offset::LVT_TIMER), 0x42, Now { tsc: 1_500, ..now }).is_ok());
    assert_eq!(apic.next_deadline(later), None, "leaving the mode disarms");
}

#[test]
fn r21_init_keeps_mode_and_id_and_resets_the_rest() {
    let mut apic = x2apic();
    let base = apic.base();
    apic.accept(0x40, false);
    apic.set_tpr(0x20);
    assert!(apic.write_msr(msr(offset::LVT_TIMER), 0x41, AT_0).is_ok());
    assert!(apic.write_msr(msr(offset::INITIAL_COUNT), 9, AT_0).is_ok());
    apic.init();
    assert_eq!((apic.base(), apic.identity().id, apic.x2apic()), (base, 5, true));
    assert_eq!((apic.pending(), apic.tpr(), apic.next_deadline(AT_0)), (None, 0, None));
    assert_eq!(apic.read_msr(msr(offset::SVR), AT_0), Ok(0xff));
    apic.reset(true);
    assert_eq!((apic.base(), apic.identity().id), (0xfee0_0900, 5));
}

#[test]
fn a_restored_apic_goes_on_as_the_saved_one() {
    let mut apic = xapic();
    apic.accept(0x40, true);
    apic.accept(0x60, false);
    apic.acknowledge();
    let restored = LocalApic::restore(&apic.state().clone());
    assert_eq!(restored, Ok(apic.clone()));
    let bad = ApicState { irr: [1, 0, 0, 0], ..apic.state().clone() };
    assert_eq!(LocalApic::restore(&bad), Err(InvalidApicState::Vector));
}

#[test]
fn virtual_wire_lets_external_interrupts_through() {
    let mut apic = LocalApic::new(0, true);
    assert!(!apic.accepts_extint());
    apic.set_virtual_wire();
    assert!(apic.accepts_extint() && apic.identity().software_enabled);
    assert_eq!(read(&mut apic, offset::LVT_LINT1), 0x400);
}

#[derive(Clone, Debug)]
enum Operation {
    Mmio(u16, u32),
    Msr(u32, u64),
    Base(u64),
    Deadline(u64),
    Accept(u8, bool),
    Post([u64; 4], [u64; 4]),
    Acknowledge,
    Init,
    Advance,
}

fn operation() -> impl Strategy<Value = Operation> {
    let small = prop_oneof![any::<u32>(), 0..0x200u32, Just(0x4_0040), Just(0x2_0040), Just(0x40)];
    prop_oneof![
        4 => ((0u16..0x40).prop_map(|r| r << 4), small.clone()).prop_map(|(r, v)| Operation::Mmio(r, v)),
        4 => (0x800u32..0x840, small).prop_map(|(m, v)| Operation::Msr(m, v.into())),
        1 => prop_oneof![Just(0u64), Just(0x800), Just(0xc00), Just(0x900)].prop_map(|b| Operation::Base(0xfee0_0000 | b)),
        1 => any::<u64>().prop_map(Operation::Deadline),
        2 => (any::<u8>(), any::<bool>()).prop_map(|(v, l)| Operation::Accept(v, l)),
        1 => any::<([u64; 4], [u64; 4])>().prop_map(|(i, l)| Operation::Post(i, l)),
        3 => Just(Operation::Acknowledge),
        1 => Just(Operation::Init),
        2 => Just(Operation::Advance),
    ]
}

proptest! {
    #[test]
    fn any_sequence_leaves_a_state_that_can_be_restored(
        operations in prop::collection::vec((operation(), 0u64..100_000), 1..60),
        guest_offset: u64,
    ) {
        let mut apic = xapic();
        let mut now = Now { tsc: 0, guest_offset };
        for (operation, ticks) in operations {
            now.tsc += ticks;
            match operation {
                Operation::Mmio(at, value) => {
                    let _ = apic.mmio_write(at, 4, value.into(), now);
                    apic.mmio_read(at, 4, now);
                }
                Operation::Msr(msr, value) => {
                    let before = apic.clone();
                    let faulted = apic.write_msr(msr, value, now).is_err();
                    prop_assert!(!faulted || apic == before);
                    let _ = apic.read_msr(msr, now);
                }
                Operation::Base(value) => {
                    let _ = apic.write_base(value, PHYSICAL_BITS);
                }
                Operation::Deadline(deadline) => {
                    let _ = apic.write_tsc_deadline(deadline, now);
                }
                Operation::Accept(vector, level) => apic.accept(vector, level),
                Operation::Post(irr, level) => apic.post(irr, level),
                Operation::Acknowledge => {
                    let (pending, ppr) = (apic.pending(), apic.ppr());
                    prop_assert_eq!(apic.acknowledge(), pending);
                    if let Some(vector) = pending {
                        prop_assert!(vector >> 4 > ppr >> 4);
                        prop_assert_eq!(apic.in_service(), Some(vector));
                    }
                }
                Operation::Init => apic.init(),
                Operation::Advance => {
                    apic.advance(now);
                    prop_assert!(apic.next_deadline(now).is_none_or(|d| d > now.tsc));
                }
            }
            let restored = LocalApic::restore(apic.state());
            prop_assert_eq!(restored.as_ref(), Ok(&apic));
        }
    }
}
