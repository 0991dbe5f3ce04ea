//! EPT walks, and what the TLB keeps over VM entries and VM exits.

use super::bench::Bench;
use crate::arch::vmx::Proc2Controls;
use crate::cpu::slot;
use crate::event::ActivityState::Active;
use crate::testing::{DATA, PD, PDPT, PML4};
use crate::vmx::exit::reasons::ExitReason;
use crate::vmx::vmcs12::Field;
use iced_x86::code_asm::*;

const EPT_PML4: u64 = DATA + 0x2_0000;
const EPT_PDPT: u64 = DATA + 0x2_1000;
const EPT_PD: u64 = DATA + 0x2_2000;
const EPT_PT: u64 = DATA + 0x2_3000;
const ALL: u64 = 7 | 6 << 3;
const LARGE: u64 = 1 << 7;
/// The guest-physical 2 MiB that EPT maps in 4 KiB pages, to `TARGET`.
const SMALL: u64 = 0x60_0000;
const TARGET: u64 = 0x80_0000;

/// An EPT that maps the 16 MiB of RAM as they are, but for `SMALL`.
fn with_ept(b: &mut Bench) -> &mut Bench {
    b.rig.write_u64(EPT_PML4, EPT_PDPT | 7);
    b.rig.write_u64(EPT_PDPT, EPT_PD | 7);
    for i in 0..8 {
        b.rig.write_u64(EPT_PD + 8 * i, i << 21 | ALL | LARGE);
    }
    b.rig.write_u64(EPT_PD + 8 * (SMALL >> 21), EPT_PT | 7);
    for i in 0..512 {
        b.rig.write_u64(EPT_PT + 8 * i, (TARGET + (i << 12)) | ALL);
    }
    b.proc2(Proc2Controls::new().with_enable_ept(true)).set(Field::Eptp, EPT_PML4 | 3 << 3 | 6)
}

fn with_vpid(b: &mut Bench) -> &mut Bench {
    b.proc2(Proc2Controls::new().with_enable_vpid(true)).set(Field::Vpid, 7)
}

/// Reads `lin` with code of its own.
fn read(b: &mut Bench, lin: u64) -> u64 {
    b.rig.set_r(slot::RBX, lin);
    b.execute(|a| a.mov(rcx, qword_ptr(rbx)));
    b.rig.r(slot::RCX)
}

#[test]
fn invlpg_drops_all_of_a_large_page_that_ept_maps_in_small_ones() {
    let mut b = Bench::root();
    with_ept(&mut b).enter(Active);
    b.rig.write_u64(TARGET, 1);
    b.rig.write_u64(TARGET + 0x1000, 2);
    b.rig.write_u64(0x40_1000, 3);
    assert_eq!((read(&mut b, SMALL), read(&mut b, SMALL + 0x1000)), (1, 2));
    b.rig.write_u64(PD + 8 * (SMALL >> 21), 0x40_0087);
    b.rig.set_r(slot::RBX, SMALL);
    b.execute(|a| a.invlpg(ptr(rbx)));
    assert_eq!(read(&mut b, SMALL + 0x1000), 3);
}

#[test]
fn an_ept_violation_tells_the_rights_of_the_whole_walk_and_a_misconfiguration_below_comes_first() {
    // (PML4E, leaf, reason, qualification of a store)
    let data_write = 1 << 1 | 1 << 7 | 1 << 8;
    let cases = [
        (5, 1 | 6 << 3, ExitReason::EptViolation, data_write | 1 << 3),
        (5, ALL, ExitReason::EptViolation, data_write | 5 << 3),
        (7, 5 | 6 << 3, ExitReason::EptViolation, data_write | 5 << 3),
        (5, 0, ExitReason::EptViolation, data_write),
        (5, 2 | 6 << 3, ExitReason::EptMisconfiguration, 0),
        (5, 7 | 7 << 3, ExitReason::EptMisconfiguration, 0),
    ];
    for (top, leaf, reason, qualification) in cases {
        let mut b = Bench::root();
        // The guest's page tables, with their flags set, code and stack are read only; the rest is from `cases`.
        for table in [PML4, PDPT, PD] {
            for i in 0..512 {
                let entry = b.rig.read_u64(table + 8 * i);
                if entry != 0 {
                    b.rig.write_u64(table + 8 * i, entry | 0x60);
                }
            }
        }
        with_ept(&mut b).enter(Active);
        b.rig.write_u64(EPT_PML4, EPT_PDPT | top);
        b.rig.write_u64(EPT_PT, TARGET | leaf);
        b.rig.set_r(slot::RBX, SMALL + 8);
        b.rig.write_u64(crate::testing::PT + 8 * (crate::testing::CODE >> 12), crate::testing::CODE | 0x67);
        b.execute(|a| a.mov(qword_ptr(rbx), rcx));
        b.assert_exit_at(reason, crate::testing::CODE);
        if reason == ExitReason::EptViolation {
            assert_eq!(b.get(Field::ExitQualification) & 0x1ff, qualification, "{top:#x} {leaf:#x}");
        }
        assert_eq!(b.get(Field::GuestPhysicalAddress), SMALL + 8);
    }
}

#[test]
fn an_ept_root_at_zero_is_an_ept_to_invept_too() {
    let mut b = Bench::root();
    with_vpid(with_ept(&mut b));
    for i in 0..512 {
        let entry = b.rig.read_u64(EPT_PML4 + 8 * i);
        b.rig.write_u64(8 * i, entry);
    }
    b.set(Field::Eptp, 3 << 3 | 6).enter(Active);
    b.rig.write_u64(TARGET, 1);
    b.rig.write_u64(0x40_0000, 2);
    assert_eq!(read(&mut b, SMALL), 1);
    b.init(1);
    b.rig.write_u64(EPT_PT, 0x40_0000 | ALL);
    let descriptor = b.pointer(4, 0);
    b.rig.set_r(slot::RAX, 2);
    b.execute(|a| a.invept(rax, xmmword_ptr(descriptor)));
    b.launch();
    assert_eq!(read(&mut b, SMALL), 2);
}

#[test]
fn a_host_cr3_other_than_that_of_vm_entry_takes_effect_with_a_vpid_too() {
    let other = [DATA + 0x2_8000, DATA + 0x2_9000, DATA + 0x2_a000];
    let mut b = Bench::root();
    for (from, to) in [PML4, PDPT, PD].into_iter().zip(other) {
        for i in 0..512 {
            let entry = b.rig.read_u64(from + 8 * i);
            b.rig.write_u64(to + 8 * i, entry);
        }
    }
    b.rig.write_u64(other[0], other[1] | 7);
    b.rig.write_u64(other[1], other[2] | 7);
    b.rig.write_u64(other[2] + 8 * (SMALL >> 21), TARGET | 0x87);
    b.rig.write_u64(SMALL, 1);
    b.rig.write_u64(TARGET, 2);
    assert_eq!(read(&mut b, SMALL), 1);
    with_vpid(&mut b).set(Field::HostCr3, other[0]).enter(Active);
    b.init(1);
    b.assert_exit(ExitReason::InitSignal);
    assert_eq!(read(&mut b, SMALL), 2);
}

#[test]
fn breakpoints_that_vm_entry_loads_watch_pages_that_the_guest_has_used_before() {
    let mut b = Bench::root();
    with_vpid(&mut b).enter(Active);
    read(&mut b, SMALL);
    b.init(1);
    b.cpu().dr[0] = SMALL;
    // Read or write, 8 bytes, enabled.
    b.set(Field::GuestDr7, 0x400 | 1 | 0b1011 << 16).set(Field::GuestRip, super::bench::GUEST_RIP).launch();
    read(&mut b, SMALL);
    b.boundary();
    assert_eq!((b.handler(), b.cpu().dr6 & 0xf), (Some(1), 1));
}
