//! What VM entries load and VM exits save and load, MSR lists, aborts.

use super::bench::{Bench, GUEST_RIP, HOST_RIP, MSR_LIST, VMCS_GPA};
use crate::arch::cr::rflags;
use crate::arch::msr;
use crate::cpu::slot;
use crate::event::ActivityState::{Active, Shutdown};
use crate::event::{Detail, Fate, Rule, VmxMode};
use crate::testing::STACK;
use crate::vmx::exit::reasons::ExitReason;
use crate::vmx::vmcs12::{Field, Role};

#[test]
fn guest_state_is_loaded_by_the_entry_and_saved_by_the_exit_unchanged() {
    let mut b = Bench::root();
    b.set(Field::GuestSysenterCs, 8).set(Field::GuestSysenterEsp, 0x1000).set(Field::GuestSysenterEip, 0x2000);
    b.set(Field::GuestRflags, 0x202).set(Field::GuestInterruptibility, 1);
    let before: Vec<_> = b.cpu().vmx.vmcs.iter().collect();
    b.enter(Active);
    assert_eq!((b.cpu().msrs.sysenter_eip, b.rip(), b.cpu().shadow), (0x2000, GUEST_RIP, 1));
    b.init(1);
    let after: Vec<_> = b.cpu().vmx.vmcs.iter().collect();
    for (old, new) in before.iter().zip(&after).filter(|(old, _)| old.0.role() != Role::ExitInfo) {
        assert_eq!(old, new, "{}", old.0.name());
    }
}

#[test]
fn host_state_is_loaded_by_the_exit() {
    let mut b = Bench::root();
    b.set(Field::HostFsBase, 0x1111_0000).set(Field::HostGsBase, 0xffff_8000_0000_0000);
    b.set(Field::HostSysenterEip, 0x3333).set(Field::HostFsSelector, 0).set(Field::HostGsSelector, 16);
    b.or(Field::ExitControls, 1 << 19).set(Field::HostPat, 0x0606);
    b.set(Field::GuestRflags, 2 | rflags::IF | rflags::CF).set(Field::GuestDr7, 0x455).enter(Active).init(1);
    let c = b.cpu();
    assert_eq!((c.regs.rip(), c.regs.r(slot::RSP), c.flags.bits(), c.dr7), (HOST_RIP, STACK, 2, 0x400));
    assert_eq!((c.seg[4].base, c.seg[5].base), (0x1111_0000, 0xffff_8000_0000_0000));
    assert!(c.seg[4].ar.unusable() && c.seg[5].ar.usable() && c.seg[6].ar.unusable());
    assert_eq!((c.seg[1].selector, c.seg[1].ar.into_bits()), (8, 0xa09b));
    assert_eq!((c.seg[7].selector, c.seg[7].limit, c.gdtr.limit, c.idtr.limit), (24, 0x67, 0xffff, 0xffff));
    assert_eq!((c.msrs.sysenter_eip, c.msrs.pat, c.msrs.debugctl, c.cpl), (0x3333, 0x0606, 0, 0));
}

#[test]
fn cr0_bits_that_vm_entries_leave_alone_stay() {
    let mut b = Bench::root();
    b.cpu().cr0 = b.cpu().cr0.with_cd(true).with_et(true);
    let without = b.get(Field::GuestCr0) & !(1 << 4);
    b.set(Field::GuestCr0, without).enter(Active);
    assert!(b.cpu().cr0.cd() && b.cpu().cr0.et());
}

fn list(b: &mut Bench, entries: &[(u64, u64)]) {
    for (i, (address, value)) in entries.iter().enumerate() {
        b.rig.write_u64(MSR_LIST + 16 * i as u64, *address);
        b.rig.write_u64(MSR_LIST + 16 * i as u64 + 8, *value);
    }
}

#[test]
fn msr_lists_are_loaded_and_stored() {
    let mut b = Bench::root();
    list(&mut b, &[(msr::IA32_STAR.into(), 0x11), (msr::IA32_KERNEL_GS_BASE.into(), 0x22)]);
    b.set(Field::EntryMsrLoadGpa, MSR_LIST).set(Field::EntryMsrLoadCount, 2);
    b.set(Field::ExitMsrStoreGpa, MSR_LIST + 0x10).set(Field::ExitMsrStoreCount, 1);
    b.enter(Active);
    assert_eq!((b.cpu().msrs.star, b.cpu().msrs.kernel_gs_base), (0x11, 0x22));
    b.cpu().msrs.kernel_gs_base = 0x33;
    b.set(Field::ExitMsrLoadGpa, MSR_LIST).set(Field::ExitMsrLoadCount, 1);
    b.cpu().msrs.star = 0;
    b.init(1);
    assert_eq!((b.rig.read_u64(MSR_LIST + 0x18), b.cpu().msrs.star), (0x33, 0x11));
}

#[test]
fn an_msr_that_cannot_be_loaded_fails_the_entry_and_names_its_place() {
    let bad = [msr::IA32_FS_BASE.into(), u64::from(msr::IA32_X2APIC_ICR), 0x1_0000_0010, 0x4000_0000];
    for address in bad {
        let mut b = Bench::root();
        list(&mut b, &[(msr::IA32_STAR.into(), 0x11), (address, 0)]);
        b.set(Field::EntryMsrLoadGpa, MSR_LIST).set(Field::EntryMsrLoadCount, 2).launch();
        assert_eq!((b.get(Field::ExitReason), b.get(Field::ExitQualification)), (34 | 1 << 31, 2));
        assert_eq!((b.mode(), b.rip(), b.cpu().vmx.vmcs.launched), (VmxMode::Root, HOST_RIP, false));
    }
}

#[test]
fn a_vmx_abort_leaves_a_shutdown_that_nothing_but_reset_ends() {
    for (count, gpa, indicator) in
        [(Field::ExitMsrLoadCount, Field::ExitMsrLoadGpa, 4), (Field::ExitMsrStoreCount, Field::ExitMsrStoreGpa, 1)]
    {
        let mut b = Bench::root();
        list(&mut b, &[(0x4000_0000, 0)]);
        b.set(gpa, MSR_LIST).set(count, 1).enter(Active);
        b.cpu().regs.set_rip(GUEST_RIP);
        b.init(1);
        assert_eq!(b.activity(), Shutdown);
        assert_eq!(b.rig.read_u64(VMCS_GPA) >> 32, indicator);
        assert!(b.events().iter().any(|e| e.detail == Detail::VmxAbort { indicator: indicator as u32 }));
        b.init(2).nmi(3).sipi(0x10, 4);
        assert_eq!((b.activity(), b.fates(2)), (Shutdown, vec![Fate::Dropped(Rule::R4)]));
        let saved = b.cpu().save();
        b.cpu().restore(&saved).unwrap();
        b.nmi(5);
        assert_eq!(b.activity(), Shutdown);
    }
}

#[test]
fn a_32_bit_guest_without_paging_runs_under_unrestricted_guest() {
    use crate::arch::vmx::Proc2Controls;
    let mut b = Bench::root();
    b.proc2(Proc2Controls::new().with_enable_ept(true).with_unrestricted_guest(true));
    // Identity by one 1-GiB page.
    const PML4: u64 = crate::testing::DATA + 0x2_0000;
    b.rig.write_u64(PML4, (PML4 + 0x1000) | 7);
    b.rig.write_u64(PML4 + 0x1000, 7 | 6 << 3 | 0x80);
    b.set(Field::Eptp, PML4 | 3 << 3 | 6);
    let cr0 = b.get(Field::GuestCr0) & !0x8000_0001;
    let entry = b.get(Field::EntryControls) & !(1 << 9);
    b.set(Field::GuestCr0, cr0).set(Field::EntryControls, entry).set(Field::GuestEfer, 0).set(Field::GuestCr4, 0x2000);
    for (i, kind) in [(0, 3), (1, 11), (2, 3), (3, 3), (4, 3), (5, 3)] {
        let rights = crate::arch::segment::AccessRights::from_bits(0x90 | kind);
        let segment = crate::vmx::vmcs12::GuestSegment { selector: 0, base: 0, limit: 0xffff, rights };
        b.cpu().vmx.vmcs.set_guest_segment(i, segment);
    }
    // Real mode at 0x7000: mov al, 7; vmcall.
    b.rig.ram.write(0x7000, &[0xb0, 7, 0x0f, 0x01, 0xc1]).unwrap();
    b.set(Field::GuestRip, 0x7000).set(Field::GuestRsp, 0x7000).enter(Active);
    b.rig.run(2);
    b.assert_exit_at(ExitReason::Vmcall, 0x7002);
    assert_eq!((b.rig.r(slot::RAX) & 0xff, b.cpu().long_mode(), b.bits()), (7, true, 64));
    assert_eq!(b.get(Field::EntryControls) & 1 << 9, 0, "EFER.LMA of the guest");
}

impl Bench {
    fn bits(&self) -> u32 {
        self.rig.bits()
    }
}

#[test]
fn a_guest_instruction_that_faults_through_ept_is_repeated_after_l1_maps_the_page() {
    use crate::arch::vmx::Proc2Controls;
    let mut b = Bench::root();
    b.proc2(Proc2Controls::new().with_enable_ept(true));
    const PML4: u64 = crate::testing::DATA + 0x2_0000;
    b.rig.write_u64(PML4, (PML4 + 0x1000) | 7);
    b.rig.write_u64(PML4 + 0x1000, (PML4 + 0x2000) | 7);
    for i in 0..8u64 {
        b.rig.write_u64(PML4 + 0x2000 + 8 * i, i << 21 | 7 | 6 << 3 | 0x80);
    }
    // 6 MiB to 8 MiB: not mapped.
    b.rig.write_u64(PML4 + 0x2000 + 24, 0);
    b.set(Field::Eptp, PML4 | 3 << 3 | 6).enter(Active);
    b.rig.ram.write(0x60_0000, &[9]).unwrap();
    b.rig.set_r(slot::RBX, 0x60_0000);
    b.execute(|a| a.mov(iced_x86::code_asm::al, iced_x86::code_asm::byte_ptr(iced_x86::code_asm::rbx)));
    b.assert_exit_at(ExitReason::EptViolation, crate::testing::CODE);
    assert_eq!(b.get(Field::ExitQualification) & 0x1bf, 1 | 1 << 7 | 1 << 8);
    b.rig.write_u64(PML4 + 0x2000 + 24, 3 << 21 | 7 | 6 << 3 | 0x80);
    // VMRESUME from another place: the faulting instruction is at CODE.
    b.rig.ram.write(HOST_RIP, &[0x0f, 0x01, 0xc3]).unwrap();
    b.cpu().regs.set_rip(HOST_RIP);
    b.rig.run(2);
    assert_eq!((b.mode(), b.rig.r(slot::RAX) & 0xff), (VmxMode::NonRoot, 9));
}

#[test]
fn execute_only_pages_run_and_are_not_read() {
    use crate::arch::vmx::Proc2Controls;
    use iced_x86::code_asm::{al, byte_ptr, rbx};
    const PML4: u64 = crate::testing::DATA + 0x2_0000;
    let mut b = Bench::root();
    b.proc2(Proc2Controls::new().with_enable_ept(true));
    b.rig.write_u64(PML4, (PML4 + 0x1000) | 7);
    b.rig.write_u64(PML4 + 0x1000, (PML4 + 0x2000) | 7);
    for i in 0..8u64 {
        // The page of the code is execute-only.
        let rights = if i == 3 { 4 } else { 7 };
        b.rig.write_u64(PML4 + 0x2000 + 8 * i, i << 21 | rights | 6 << 3 | 0x80);
    }
    const CODE: u64 = 0x60_0000;
    let mut a = iced_x86::code_asm::CodeAssembler::new(64).unwrap();
    a.nop().unwrap();
    a.mov(al, byte_ptr(rbx)).unwrap();
    b.rig.ram.write(CODE, &a.assemble(CODE).unwrap()).unwrap();
    b.set(Field::Eptp, PML4 | 3 << 3 | 6).set(Field::GuestRip, CODE).enter(Active);
    b.rig.set_r(slot::RBX, CODE);
    b.rig.run(2);
    b.assert_exit_at(ExitReason::EptViolation, CODE + 1);
    // A read; the page is executable only; the guest's own tables allow user, write and execute.
    assert_eq!(b.get(Field::ExitQualification), 1 | 4 << 3 | 3 << 7 | 3 << 9);
}
