//! Control registers, and the paging that they control.

use super::protected;
use crate::arch::cr::{Cr0, Cr4, rflags};
use crate::arch::exception as vector;
use crate::cpu::Stop;
use crate::testing::{DATA, PT, Rig};
use iced_x86::code_asm::*;

#[test]
fn control_registers_reject_what_the_sdm_says() {
    let bits = |c: Cr0| c.into_bits();
    let base = Cr0::new().with_pe(true).with_pg(true).with_ne(true).with_wp(true).with_et(true);
    for (value, ok) in [
        (bits(base), true),
        (bits(base.with_pe(false)), false),
        (bits(base.with_nw(true)), false),
        (bits(base.with_nw(true).with_cd(true)), true),
        (bits(base) | 1 << 32, false),
        (bits(base) | 1 << 7, true),
        (bits(base.with_pg(false)), false),
    ] {
        assert_eq!(Rig::long().cpu.write_cr0(value).is_ok(), ok, "CR0 {value:#x}");
    }
    let base = Cr4::new().with_pae(true);
    for (value, ok) in [
        (base.into_bits(), true),
        (0, false),
        (base.with_pcide(true).into_bits(), true),
        (base.into_bits() | 1 << 15, false),
        (base.into_bits() | 1 << 40, false),
        (base.with_vme(true).into_bits(), false),
    ] {
        assert_eq!(Rig::long().cpu.write_cr4(value).is_ok(), ok, "CR4 {value:#x}");
    }
    for (value, ok) in [(0x1000, true), (1 << 46, false), (1 << 63 | 0x1000, false), (0x1018, true)] {
        assert_eq!(Rig::long().cpu.write_cr3(value).is_ok(), ok, "CR3 {value:#x}");
    }
    let mut rig = protected(0);
    assert!(rig.cpu.write_cr4(Cr4::new().with_pcide(true).into_bits()).is_err());
}

#[test]
fn pae_paging_loads_and_checks_its_pdptes() {
    let mut rig = protected(0);
    rig.write_u64(0x9000, 0xa000 | 1);
    rig.write_u64(0xa000, 0x83); // 2 MiB at 0
    rig.write_u64(0x9008, 0b1001);
    rig.cpu.write_cr4(Cr4::new().with_pae(true).into_bits()).unwrap();
    rig.cpu.write_cr3(0x9000).unwrap();
    let pg = rig.cpu.cr0.with_pg(true).into_bits();
    assert!(rig.cpu.write_cr0(pg).is_ok());
    rig.write_u64(0x9008, 0b011);
    assert_eq!(rig.cpu.write_cr3(0x9000), Err(Stop::GP0));
    // The old ones stay in force until the next load.
    rig.code(|a| a.mov(eax, dword_ptr(DATA as u32)));
    rig.run(1);
    assert_eq!(rig.cpu.fault_address, DATA, "2 MiB are mapped: DATA is not");
}

#[test]
fn pcids_keep_translations_and_global_pages_outlive_mov_cr3() {
    let mut rig = Rig::long();
    rig.cpu.write_cr4(rig.cpu.cr4.with_pcide(true).with_pge(true).into_bits()).unwrap();
    let page = PT + 8 * 0x150;
    let read = |rig: &mut Rig| rig.cpu.load::<u64>(0x15_0000).is_ok();
    assert!(read(&mut rig));
    rig.write_u64(page, 0);
    assert!(read(&mut rig), "cached");
    rig.cpu.write_cr3(0x1001).unwrap();
    assert!(!read(&mut rig), "another PCID");
    rig.cpu.write_cr3(0x1000 | 1 << 63).unwrap();
    assert!(read(&mut rig), "kept by bit 63");
    rig.cpu.write_cr3(0x1000).unwrap();
    assert!(!read(&mut rig), "flushed");
    // Global.
    rig.write_u64(page, 0x15_0000 | 0x107);
    assert!(read(&mut rig));
    rig.write_u64(page, 0);
    rig.cpu.write_cr3(0x1000).unwrap();
    assert!(read(&mut rig));
    rig.cpu.write_cr4(rig.cpu.cr4.with_pge(false).into_bits()).unwrap();
    assert!(!read(&mut rig));
}

#[test]
fn page_rights_follow_wp_smep_smap_and_nx() {
    const SUPERVISOR_RO: u64 = 1;
    const USER: u64 = 7;
    const NX: u64 = 1 << 63 | 7;
    // (page, CR4 bits, AC, WP) -> (write, fetch)
    type Case = (u64, Cr4, bool, bool, Option<u32>, Option<u32>);
    let none = Cr4::new();
    let table: [Case; 8] = [
        (SUPERVISOR_RO, none, false, true, Some(3), None),
        (SUPERVISOR_RO, none, false, false, None, None),
        (USER, none, false, true, None, None),
        (USER, none.with_smap(true), false, true, Some(3), None),
        (USER, none.with_smap(true), true, true, None, None),
        (USER, none.with_smep(true), false, true, None, Some(0x11)),
        (NX, none, false, true, None, Some(0x11)),
        (0, none, false, true, Some(2), Some(0x10)),
    ];
    for (rights, extra, ac, wp, write, fetch) in table {
        let mut rig = Rig::long();
        rig.write_u64(PT + 8 * 0x150, 0x15_0000 | rights);
        rig.cpu.cr4 = Cr4::from_bits(rig.cpu.cr4.into_bits() | extra.into_bits());
        rig.cpu.cr0.set_wp(wp);
        rig.cpu.flags.set(rflags::AC, ac);
        rig.cpu.mode_changed();
        let fault = |r: Result<(), Stop>| match r.err().map(Stop::kind) {
            Some(crate::cpu::StopKind::Exception { vector: vector::PF, error }) => error,
            other => {
                assert_eq!(other, None);
                None
            }
        };
        assert_eq!(fault(rig.cpu.store(0x15_0000, 1u8)), write, "{rights:#x} {extra:?}");
        rig.cpu.regs.set_rip(0x15_0000);
        rig.cpu.fault_address = 0;
        rig.run(1);
        assert_eq!(rig.cpu.fault_address == 0x15_0000, fetch.is_some(), "{rights:#x} {extra:?}");
    }
}
