//! R23: which ICR writes of L2 reach the real local APIC.

use super::bench::{BITMAP, Bench};
use crate::apic::LocalApic;
use crate::arch::apic::base;
use crate::arch::vmx::{Proc2Controls, ProcControls};
use crate::bus::{Delivery, Destination};
use crate::cpu::slot;
use crate::event::ActivityState::Active;
use crate::event::{Detail, VmxMode};
use crate::testing::{CODE, DATA, PDPT};
use crate::vmx::exit::reasons::{ExitReason, InstructionError};
use crate::vmx::vmcs12::Field;
use iced_x86::code_asm::*;

const APIC: u64 = 0xfee0_0000;
const ICR_LOW: u64 = 0x300;
const INIT: u32 = 0x4500;
const EPT_PML4: u64 = DATA + 0x2_0000;
const EPT_PDPT: u64 = DATA + 0x2_1000;
const EPT_LOW_PD: u64 = DATA + 0x2_2000;
const EPT_HIGH_PD: u64 = DATA + 0x2_3000;
const EPT_PT: u64 = DATA + 0x2_4000;
/// A guest-physical page that EPT maps to the APIC page, 4 KiB at a time.
const ALIAS: u64 = 0x60_0000;

/// An EPT that maps RAM and the APIC page as they are, and the page at `ALIAS` to the APIC page too.
fn with_ept(b: &mut Bench) -> &mut Bench {
    const ALL: u64 = 7 | 6 << 3;
    b.rig.write_u64(EPT_PML4, EPT_PDPT | 7);
    b.rig.write_u64(EPT_PDPT, EPT_LOW_PD | 7);
    b.rig.write_u64(EPT_PDPT + 24, EPT_HIGH_PD | 7);
    for i in 0..8 {
        b.rig.write_u64(EPT_LOW_PD + 8 * i, i << 21 | ALL | 0x80);
    }
    b.rig.write_u64(EPT_LOW_PD + 8 * (ALIAS >> 21), EPT_PT | 7);
    b.rig.write_u64(EPT_PT, APIC | ALL);
    b.rig.write_u64(EPT_HIGH_PD + 8 * (APIC >> 21 & 0x1ff), APIC & !0x1f_ffff | ALL | 0x80);
    // The guest's own tables: linear 3 GiB to 4 GiB as it is.
    b.rig.write_u64(PDPT + 24, 0xc000_0087);
    b.proc2(Proc2Controls::new().with_enable_ept(true)).set(Field::Eptp, EPT_PML4 | 3 << 3 | 6)
}

#[track_caller]
fn assert_sent(b: &Bench) {
    let world = b.rig.world.lock().unwrap();
    let message = world.ipis.last().expect("nothing was sent");
    assert_eq!((message.delivery, message.destination), (Delivery::Init, Destination::Physical(0)));
    let written = world.events.iter().find(|e| matches!(e.detail, Detail::IcrWrite { .. })).unwrap();
    assert_eq!((written.mode, written.cause), (VmxMode::NonRoot, message.cause));
}

#[test]
fn r23_a_store_that_ends_in_the_apic_page_reaches_the_real_apic_whatever_the_page_size() {
    for lin in [APIC + ICR_LOW, ALIAS + ICR_LOW] {
        let mut b = Bench::root();
        with_ept(&mut b).enter(Active);
        b.rig.set_r(slot::RBX, lin);
        b.execute(|a| a.mov(dword_ptr(rbx), INIT as i32));
        assert_eq!(b.mode(), VmxMode::NonRoot);
        assert_sent(&b);
    }
    // Without EPT too.
    let mut b = Bench::root();
    b.rig.write_u64(PDPT + 24, 0xc000_0087);
    b.enter(Active);
    b.rig.set_r(slot::RBX, APIC + ICR_LOW);
    b.execute(|a| a.mov(dword_ptr(rbx), INIT as i32));
    assert_sent(&b);
}

#[test]
fn r23_a_page_that_ept_does_not_map_is_an_ept_violation() {
    let mut b = Bench::root();
    with_ept(&mut b);
    b.rig.write_u64(EPT_PT, 0);
    b.enter(Active);
    b.rig.set_r(slot::RBX, ALIAS + ICR_LOW);
    b.execute(|a| a.mov(dword_ptr(rbx), INIT as i32));
    b.assert_exit_at(ExitReason::EptViolation, CODE);
    assert_eq!(b.get(Field::GuestPhysicalAddress), ALIAS + ICR_LOW);
    assert_eq!(b.get(Field::GuestLinearAddress), ALIAS + ICR_LOW);
    assert_eq!(b.get(Field::ExitQualification) & 0x1bf, 2 | 1 << 7 | 1 << 8);
    assert!(b.rig.world.lock().unwrap().ipis.is_empty());
}

/// The APIC-access page is not offered yet: no store can be meant for it.
#[test]
fn r23_virtualized_apic_accesses_are_refused() {
    let mut b = Bench::root();
    b.proc2(Proc2Controls::new().with_virtualize_apic_accesses(true)).launch();
    b.assert_vm_fail(InstructionError::EntryControls);
}

#[test]
fn r23_wrmsr_to_the_icr_exits_or_reaches_the_real_apic_as_the_bitmap_says() {
    for (bitmap, set, reaches) in [(false, false, false), (true, true, false), (true, false, true)] {
        let mut b = Bench::root();
        let x2apic = b.cpu().apic.base() | base::EXTD;
        let _ = b.cpu().write_msr(0x1b, x2apic);
        if bitmap {
            let gpa = BITMAP & !0xfff;
            b.proc(ProcControls::new().with_use_msr_bitmaps(true)).set(Field::MsrBitmapGpa, gpa);
            b.rig.ram.write(gpa + 0x800 + 0x830 / 8, &[u8::from(set)]).unwrap();
        }
        b.enter(Active);
        b.rig.set_r(slot::RCX, 0x830).set_r(slot::RAX, INIT.into()).set_r(slot::RDX, 0);
        b.execute(|a| a.wrmsr());
        if reaches {
            assert_sent(&b);
        } else {
            b.assert_exit_at(ExitReason::Wrmsr, CODE);
            assert!(b.rig.world.lock().unwrap().ipis.is_empty());
        }
    }
}

/// A processor's own INIT by physical ID: the message goes out and comes back through its mailbox.
#[test]
fn r05_an_init_that_l2_sends_to_its_own_processor_is_exit_3() {
    let mut b = Bench::root();
    with_ept(&mut b).enter(Active);
    b.rig.set_r(slot::RBX, APIC + ICR_LOW);
    b.execute(|a| a.mov(dword_ptr(rbx), INIT as i32));
    let message = *b.rig.world.lock().unwrap().ipis.last().unwrap();
    b.init(message.cause);
    b.assert_exit(ExitReason::InitSignal);
    assert_eq!(b.fates(message.cause), [crate::event::Fate::VmExit(3)]);
    assert!(LocalApic::restore(b.cpu().apic.state()).is_ok());
}
