//! Each check fails on the change of its row that breaks it, alone and first, and passes on the neighbouring change.

use std::collections::{BTreeMap, BTreeSet};

use super::*;
use crate::arch::segment::AccessRights;
use crate::arch::vmx::EventType;
use crate::vmx::caps::tests::limits;
use crate::vmx::caps::{EptVpidCaps, Limits, Misc, OFFER, Offer};
use crate::vmx::vmcs12::segment_index::*;
use crate::vmx::vmcs12::{GuestSegment, REVISION_ID, SHADOW_INDICATOR};

use Field as F;

#[derive(Clone)]
struct Memory(BTreeMap<u64, u64>);

impl PhysicalRead for Memory {
    fn read_u64(&self, gpa: u64) -> u64 {
        self.0.get(&gpa).copied().unwrap_or(u64::MAX)
    }
}

/// A VM entry about to be checked.
#[derive(Clone)]
struct Entry {
    vmcs: Vmcs12,
    offer: Offer,
    limits: Limits,
    memory: Memory,
    host_lma: bool,
    vmcs_gpa: u64,
}

impl Entry {
    fn check(&self) -> Result<(), u16> {
        let caps = Caps::new(self.offer, self.limits);
        let context = Context::new(&self.vmcs, &caps, &self.memory, self.host_lma, self.vmcs_gpa);
        context.check_controls_and_host().and_then(|()| context.check_guest()).map_err(|c| c.id)
    }

    fn set(&mut self, field: Field, value: u64) -> &mut Self {
        self.vmcs.set(field, value);
        self
    }

    fn or(&mut self, field: Field, bits: u64) -> &mut Self {
        let value = self.vmcs.get(field);
        self.set(field, value | bits)
    }

    fn clear(&mut self, field: Field, bits: u64) -> &mut Self {
        let value = self.vmcs.get(field);
        self.set(field, value & !bits)
    }

    fn pin(&mut self, c: PinControls) -> &mut Self {
        self.or(F::PinControls, c.into_bits().into())
    }

    fn proc(&mut self, c: ProcControls) -> &mut Self {
        self.or(F::ProcControls, c.into_bits().into())
    }

    fn proc2(&mut self, c: Proc2Controls) -> &mut Self {
        self.proc(ProcControls::new().with_secondary_controls(true)).or(F::Proc2Controls, c.into_bits().into())
    }

    fn exit(&mut self, c: ExitControls) -> &mut Self {
        self.or(F::ExitControls, c.into_bits().into())
    }

    fn entry(&mut self, c: EntryControls) -> &mut Self {
        self.or(F::EntryControls, c.into_bits().into())
    }

    fn rights(&mut self, segment: usize, change: impl FnOnce(AccessRights) -> AccessRights) -> &mut Self {
        let s = self.vmcs.guest_segment(segment);
        self.vmcs.set_guest_segment(segment, GuestSegment { rights: change(s.rights), ..s });
        self
    }

    fn rights_bits(&mut self, segment: usize, bits: u32) -> &mut Self {
        self.or(F::GUEST_ACCESS_RIGHTS[segment], bits.into())
    }

    fn inject(&mut self, event: EventType, vector: u8, error_code: bool) -> &mut Self {
        let info = InterruptionInfo::new()
            .with_valid(true)
            .with_event_type(event)
            .with_vector(vector)
            .with_error_code(error_code);
        self.set(F::EntryInterruptionInfo, info.into_bits().into())
    }

    fn ept(&mut self) -> &mut Self {
        self.proc2(Proc2Controls::new().with_enable_ept(true)).set(F::Eptp, 0x5_0000 | 3 << 3 | 6)
    }

    fn unrestricted(&mut self) -> &mut Self {
        self.ept().proc2(Proc2Controls::new().with_unrestricted_guest(true))
    }

    fn tpr_shadow(&mut self) -> &mut Self {
        self.memory.0.insert(0x6_0080, 0x30);
        self.proc(ProcControls::new().with_use_tpr_shadow(true)).set(F::VirtualApicGpa, 0x6_0000)
    }

    fn virtual_interrupts(&mut self) -> &mut Self {
        self.tpr_shadow()
            .pin(PinControls::new().with_external_interrupt_exiting(true))
            .proc2(Proc2Controls::new().with_virtual_interrupt_delivery(true))
    }

    fn posted(&mut self) -> &mut Self {
        self.virtual_interrupts()
            .pin(PinControls::new().with_process_posted_interrupts(true))
            .exit(ExitControls::new().with_acknowledge_interrupt(true))
    }

    fn vm_functions(&mut self) -> &mut Self {
        self.ept().proc2(Proc2Controls::new().with_enable_vm_functions(true)).set(F::VmFunctionControls, 1)
    }

    /// A 32-bit protected-mode guest.
    fn guest32(&mut self) -> &mut Self {
        self.clear(F::EntryControls, EntryControls::new().with_ia32e_mode_guest(true).into_bits().into())
            .clear(F::GuestCr4, Cr4::new().with_pae(true).into_bits())
            .rights(CS, |r| r.with_l(false).with_db(true))
    }

    /// The same with PAE paging.
    fn guest_pae(&mut self) -> &mut Self {
        self.guest32().or(F::GuestCr4, Cr4::new().with_pae(true).into_bits())
    }

    /// A virtual-8086 guest.
    fn v8086(&mut self) -> &mut Self {
        self.guest32().or(F::GuestRflags, rflags::VM);
        for s in ES..=GS {
            let segment = GuestSegment { selector: 0x100, base: 0x1000, limit: 0xffff, rights: AccessRights::V8086 };
            self.vmcs.set_guest_segment(s, segment);
        }
        self
    }

    /// L1 outside IA-32e mode, and its VMCS so.
    fn host32(&mut self) -> &mut Self {
        self.host_lma = false;
        self.guest32().clear(F::ExitControls, ExitControls::new().with_host_address_space_size(true).into_bits().into())
    }

    fn hlt(&mut self) -> &mut Self {
        self.set(F::GuestActivityState, 1)
    }

    fn sti(&mut self) -> &mut Self {
        self.or(F::GuestRflags, rflags::IF).set(F::GuestInterruptibility, 1)
    }

    fn mov_ss(&mut self) -> &mut Self {
        self.set(F::GuestInterruptibility, 2)
    }

    fn virtual_nmis(&mut self) -> &mut Self {
        self.pin(PinControls::new().with_nmi_exiting(true).with_virtual_nmis(true))
    }

    fn link(&mut self, header: u32) -> &mut Self {
        self.memory.0.insert(0x7_0000, header.into());
        self.set(F::VmcsLinkGpa, 0x7_0000)
    }
}

/// Everything on that a check mentions, whatever the processor offers today.
fn full_offer() -> Offer {
    Offer {
        pin: OFFER.pin.with_process_posted_interrupts(true),
        proc: OFFER.proc.with_use_tpr_shadow(true),
        proc2: OFFER
            .proc2
            .with_virtualize_apic_accesses(true)
            .with_virtualize_x2apic_mode(true)
            .with_apic_register_virtualization(true)
            .with_virtual_interrupt_delivery(true)
            .with_enable_vm_functions(true)
            .with_vmcs_shadowing(true)
            .with_enable_pml(true)
            .with_ept_violation_ve(true)
            .with_mode_based_execute(true)
            .with_use_tsc_scaling(true),
        vm_functions: 1,
        ..OFFER
    }
}

const TOO_WIDE: u64 = 1 << 39;
const NOT_CANONICAL: u64 = 1 << 47;

/// A 64-bit host with a 64-bit guest that passes every check.
fn valid() -> Entry {
    let code = GuestSegment { selector: 8, base: 0, limit: u32::MAX, rights: AccessRights::from_bits(0xa09b) };
    let data = GuestSegment { selector: 16, base: 0, limit: u32::MAX, rights: AccessRights::from_bits(0xc093) };
    let mut vmcs = Vmcs12::default();
    let caps = Caps::new(full_offer(), limits());
    for (field, allowed) in [
        (F::PinControls, caps.pin),
        (F::ProcControls, caps.proc),
        (F::ExitControls, caps.exit),
        (F::EntryControls, caps.entry),
    ] {
        vmcs.set(field, allowed.must.into());
    }
    for s in [ES, SS, DS, FS, GS] {
        vmcs.set_guest_segment(s, data);
    }
    vmcs.set_guest_segment(CS, code);
    vmcs.set_guest_segment(LDTR, GuestSegment { rights: AccessRights::from_bits(0x82), ..GuestSegment::default() });
    let tr = GuestSegment { selector: 24, base: 0x1000, limit: 0x67, rights: AccessRights::from_bits(0x8b) };
    vmcs.set_guest_segment(TR, tr);
    for (field, value) in [
        (F::HostCsSelector, 8),
        (F::HostSsSelector, 16),
        (F::HostTrSelector, 24),
        (F::HostCr0, 0x8000_0031),
        (F::HostCr3, 0x2000),
        (F::HostCr4, 0x2020),
        (F::HostRip, 0xffff_8000_0000_1000),
        (F::GuestCr0, 0x8000_0031),
        (F::GuestCr3, 0x3000),
        (F::GuestCr4, 0x2020),
        (F::GuestRflags, 2),
        (F::GuestRip, 0x1000),
        (F::GuestDr7, 0x400),
        (F::VmcsLinkGpa, u64::MAX),
    ] {
        vmcs.set(field, value);
    }
    let memory = Memory((0..4).map(|i| (0x3000 + 8 * i, 0x4001)).collect());
    let mut e = Entry { vmcs, offer: full_offer(), limits: limits(), memory, host_lma: true, vmcs_gpa: 0x9000 };
    e.exit(ExitControls::new().with_host_address_space_size(true));
    e.entry(EntryControls::new().with_ia32e_mode_guest(true));
    e
}

type Change = fn(&mut Entry) -> &mut Entry;

/// (check, what fails it, its neighbour that passes)
#[rustfmt::skip]
const ROWS: &[(u16, Change, Change)] = &[
    (100, |e| e.or(F::PinControls, 1 << 8), |e| e.or(F::PinControls, 1)),
    (101, |e| e.proc(ProcControls::new().with_tertiary_controls(true)), |e| e.proc(ProcControls::new().with_hlt_exiting(true))),
    (102, |e| e.proc2(Proc2Controls::new().with_enable_pconfig(true)), |e| e.set(F::Proc2Controls, 1 << 27)),
    (103, |e| e.set(F::Cr3TargetCount, 5), |e| e.set(F::Cr3TargetCount, 4)),
    (104, |e| e.proc(ProcControls::new().with_use_io_bitmaps(true)).set(F::IoBitmapBGpa, 0x800), |e| e.set(F::IoBitmapBGpa, 0x800)),
    (105, |e| e.proc(ProcControls::new().with_use_io_bitmaps(true)).set(F::IoBitmapAGpa, TOO_WIDE), |e| e.set(F::IoBitmapAGpa, TOO_WIDE)),
    (106, |e| e.proc(ProcControls::new().with_use_msr_bitmaps(true)).set(F::MsrBitmapGpa, 1), |e| e.set(F::MsrBitmapGpa, 1)),
    (107, |e| e.proc(ProcControls::new().with_use_msr_bitmaps(true)).set(F::MsrBitmapGpa, TOO_WIDE), |e| e.proc(ProcControls::new().with_use_msr_bitmaps(true)).set(F::MsrBitmapGpa, TOO_WIDE >> 1)),
    (108, |e| e.tpr_shadow().set(F::VirtualApicGpa, 0x6_0010), |e| e.tpr_shadow()),
    (109, |e| e.tpr_shadow().set(F::VirtualApicGpa, TOO_WIDE), |e| e.tpr_shadow()),
    (110, |e| e.tpr_shadow().set(F::TprThreshold, 0x10), |e| e.virtual_interrupts().set(F::TprThreshold, 0x10)),
    (111, |e| e.tpr_shadow().set(F::TprThreshold, 4), |e| e.tpr_shadow().set(F::TprThreshold, 3)),
    (112, |e| e.pin(PinControls::new().with_virtual_nmis(true)), |e| e.virtual_nmis()),
    (113, |e| e.proc(ProcControls::new().with_nmi_window_exiting(true)), |e| e.virtual_nmis().proc(ProcControls::new().with_nmi_window_exiting(true))),
    (114, |e| e.proc2(Proc2Controls::new().with_virtualize_apic_accesses(true)).set(F::ApicAccessGpa, 0x10), |e| e.proc2(Proc2Controls::new().with_virtualize_apic_accesses(true)).set(F::ApicAccessGpa, 0x1000)),
    (115, |e| e.proc2(Proc2Controls::new().with_virtualize_apic_accesses(true)).set(F::ApicAccessGpa, TOO_WIDE), |e| e.set(F::ApicAccessGpa, TOO_WIDE)),
    (116, |e| e.proc2(Proc2Controls::new().with_apic_register_virtualization(true)), |e| e.tpr_shadow().proc2(Proc2Controls::new().with_apic_register_virtualization(true))),
    (117, |e| e.tpr_shadow().proc2(Proc2Controls::new().with_virtualize_x2apic_mode(true).with_virtualize_apic_accesses(true)), |e| e.tpr_shadow().proc2(Proc2Controls::new().with_virtualize_x2apic_mode(true))),
    (118, |e| e.tpr_shadow().proc2(Proc2Controls::new().with_virtual_interrupt_delivery(true)), |e| e.virtual_interrupts()),
    (119, |e| e.virtual_interrupts().pin(PinControls::new().with_process_posted_interrupts(true)), |e| e.posted()),
    (120, |e| e.posted().set(F::PostedInterruptNotificationVector, 0x100), |e| e.posted().set(F::PostedInterruptNotificationVector, 0xff)),
    (121, |e| e.posted().set(F::PostedInterruptDescriptorGpa, 0x20), |e| e.posted().set(F::PostedInterruptDescriptorGpa, 0x40)),
    (122, |e| e.posted().set(F::PostedInterruptDescriptorGpa, TOO_WIDE), |e| e.set(F::PostedInterruptDescriptorGpa, TOO_WIDE)),
    (123, |e| e.proc2(Proc2Controls::new().with_enable_vpid(true)), |e| e.proc2(Proc2Controls::new().with_enable_vpid(true)).set(F::Vpid, 1)),
    (124, |e| e.ept().set(F::Eptp, 0x5_0000 | 3 << 3 | 1), |e| e.ept().set(F::Eptp, 0x5_0000 | 3 << 3)),
    (125, |e| e.ept().set(F::Eptp, 0x5_0000 | 4 << 3 | 6), |e| e.ept()),
    (126, |e| { e.offer.ept_vpid = EptVpidCaps::new().with_memory_type_wb(true).with_walk_length_4(true); e.ept().or(F::Eptp, 1 << 6) }, |e| e.ept().or(F::Eptp, 1 << 6)),
    (127, |e| e.ept().or(F::Eptp, 1 << 7), |e| e.ept().or(F::Eptp, 1 << 12)),
    (128, |e| e.proc2(Proc2Controls::new().with_enable_pml(true)), |e| e.ept().proc2(Proc2Controls::new().with_enable_pml(true))),
    (129, |e| e.ept().proc2(Proc2Controls::new().with_enable_pml(true)).set(F::PmlGpa, 8), |e| e.set(F::PmlGpa, 8)),
    (130, |e| e.ept().proc2(Proc2Controls::new().with_enable_pml(true)).set(F::PmlGpa, TOO_WIDE), |e| e.set(F::PmlGpa, TOO_WIDE)),
    (131, |e| e.proc2(Proc2Controls::new().with_unrestricted_guest(true)), |e| e.unrestricted()),
    (132, |e| e.vm_functions().set(F::VmFunctionControls, 2), |e| e.set(F::VmFunctionControls, 2)),
    (133, |e| e.proc2(Proc2Controls::new().with_enable_vm_functions(true)).set(F::VmFunctionControls, 1), |e| e.vm_functions()),
    (134, |e| e.vm_functions().set(F::EptpListGpa, 8), |e| e.vm_functions().set(F::VmFunctionControls, 0).set(F::EptpListGpa, 8)),
    (135, |e| e.vm_functions().set(F::EptpListGpa, TOO_WIDE), |e| e.vm_functions().set(F::EptpListGpa, 0x1000)),
    (136, |e| e.proc2(Proc2Controls::new().with_vmcs_shadowing(true)).set(F::VmwriteBitmapGpa, 8), |e| e.set(F::VmwriteBitmapGpa, 8)),
    (137, |e| e.proc2(Proc2Controls::new().with_vmcs_shadowing(true)).set(F::VmreadBitmapGpa, TOO_WIDE), |e| e.set(F::VmreadBitmapGpa, TOO_WIDE)),
    (138, |e| e.proc2(Proc2Controls::new().with_ept_violation_ve(true)).set(F::VirtualizationExceptionGpa, 8), |e| e.set(F::VirtualizationExceptionGpa, 8)),
    (139, |e| e.proc2(Proc2Controls::new().with_ept_violation_ve(true)).set(F::VirtualizationExceptionGpa, TOO_WIDE), |e| e.set(F::VirtualizationExceptionGpa, TOO_WIDE)),
    (140, |e| e.proc2(Proc2Controls::new().with_use_tsc_scaling(true)), |e| e.proc2(Proc2Controls::new().with_use_tsc_scaling(true)).set(F::TscMultiplier, 1)),
    (150, |e| e.exit(ExitControls::new().with_clear_bndcfgs(true)), |e| e.exit(ExitControls::new().with_save_pat(true))),
    (151, |e| e.exit(ExitControls::new().with_save_preemption_timer(true)), |e| e.pin(PinControls::new().with_preemption_timer(true)).exit(ExitControls::new().with_save_preemption_timer(true))),
    (152, |e| e.set(F::ExitMsrStoreGpa, 8).set(F::ExitMsrStoreCount, 1), |e| e.set(F::ExitMsrStoreGpa, 8)),
    (153, |e| e.set(F::ExitMsrStoreGpa, TOO_WIDE - 16).set(F::ExitMsrStoreCount, 2), |e| e.set(F::ExitMsrStoreGpa, TOO_WIDE - 16).set(F::ExitMsrStoreCount, 1)),
    (154, |e| e.set(F::ExitMsrLoadGpa, 8).set(F::ExitMsrLoadCount, 1), |e| e.set(F::ExitMsrLoadGpa, 16).set(F::ExitMsrLoadCount, 1)),
    (155, |e| e.set(F::ExitMsrLoadGpa, u64::MAX - 15).set(F::ExitMsrLoadCount, 2), |e| e.set(F::ExitMsrLoadGpa, u64::MAX - 15)),
    (160, |e| e.entry(EntryControls::new().with_load_pkrs(true)), |e| e.set(F::GuestPat, 0x06).entry(EntryControls::new().with_load_pat(true))),
    (161, |e| e.inject(EventType::Reserved, 0, false), |e| e.inject(EventType::Other, 0, false)),
    (162, |e| e.inject(EventType::Nmi, 3, false), |e| e.inject(EventType::Nmi, 2, false)),
    (163, |e| e.inject(EventType::HardwareException, 13, false), |e| e.inject(EventType::HardwareException, 13, true)),
    (164, |e| e.inject(EventType::HardwareException, 6, false).or(F::EntryInterruptionInfo, 1 << 30), |e| e.inject(EventType::HardwareException, 6, false)),
    (165, |e| e.inject(EventType::HardwareException, 13, true).set(F::EntryErrorCode, 0x1_0000), |e| e.inject(EventType::HardwareException, 13, true).set(F::EntryErrorCode, 0x8000)),
    (166, |e| e.inject(EventType::SoftwareInterrupt, 0x80, false).set(F::EntryInstructionLength, 16), |e| e.inject(EventType::SoftwareInterrupt, 0x80, false).set(F::EntryInstructionLength, 0)),
    (167, |e| e.set(F::EntryMsrLoadGpa, 8).set(F::EntryMsrLoadCount, 1), |e| e.set(F::EntryMsrLoadGpa, 8)),
    (168, |e| e.set(F::EntryMsrLoadGpa, TOO_WIDE).set(F::EntryMsrLoadCount, 1), |e| e.set(F::EntryMsrLoadGpa, TOO_WIDE)),
    (169, |e| { e.offer.entry = e.offer.entry.with_entry_to_smm(true); e.entry(EntryControls::new().with_entry_to_smm(true)) }, |e| e),

    (200, |e| e.clear(F::HostCr0, 1 << 5), |e| e.or(F::HostCr0, 1 << 16)),
    (201, |e| e.or(F::HostCr4, 1 << 14), |e| e.or(F::HostCr4, 1 << 17)),
    (202, |e| e.or(F::HostCr3, TOO_WIDE), |e| e.or(F::HostCr3, TOO_WIDE >> 1)),
    (203, |e| e.set(F::HostSysenterEsp, NOT_CANONICAL), |e| e.set(F::HostSysenterEsp, NOT_CANONICAL - 1)),
    (204, |e| e.set(F::HostSysenterEip, NOT_CANONICAL), |e| e.set(F::HostSysenterEip, !(NOT_CANONICAL - 1))),
    (205, |e| e.exit(ExitControls::new().with_load_pat(true)).set(F::HostPat, 2 << 56), |e| e.exit(ExitControls::new().with_load_pat(true)).set(F::HostPat, 7 << 56)),
    (206, |e| e.exit(ExitControls::new().with_load_efer(true)).set(F::HostEfer, 0x502), |e| e.exit(ExitControls::new().with_load_efer(true)).set(F::HostEfer, 0xd01)),
    (207, |e| e.exit(ExitControls::new().with_load_efer(true)).set(F::HostEfer, 0x400), |e| e.exit(ExitControls::new().with_load_efer(true)).set(F::HostEfer, 0x500)),
    (220, |e| e.set(F::HostGsSelector, 4), |e| e.set(F::HostGsSelector, 8)),
    (221, |e| e.set(F::HostCsSelector, 0), |e| e.set(F::HostDsSelector, 0)),
    (222, |e| e.set(F::HostTrSelector, 0), |e| e.set(F::HostFsSelector, 0)),
    (223, |e| e.host32().set(F::HostSsSelector, 0).set(F::HostRip, 0), |e| e.set(F::HostSsSelector, 0)),
    (224, |e| e.set(F::HostFsBase, NOT_CANONICAL), |e| e.set(F::HostFsBase, u64::MAX)),
    (225, |e| e.set(F::HostGsBase, NOT_CANONICAL), |e| e.set(F::HostGsBase, u64::MAX)),
    (226, |e| e.set(F::HostGdtrBase, NOT_CANONICAL), |e| e.set(F::HostGdtrBase, u64::MAX)),
    (227, |e| e.set(F::HostIdtrBase, NOT_CANONICAL), |e| e.set(F::HostIdtrBase, u64::MAX)),
    (228, |e| e.set(F::HostTrBase, NOT_CANONICAL), |e| e.set(F::HostTrBase, u64::MAX)),
    (240, |e| { e.host_lma = false; e.guest32() }, |e| e.host32().set(F::HostRip, 0)),
    (241, |e| { e.host32(); e.host_lma = true; e }, |e| e.guest32()),
    (243, |e| e.host32().or(F::HostCr4, 1 << 17).set(F::HostRip, 0), |e| e.or(F::HostCr4, 1 << 17)),
    (244, |e| e.host32().set(F::HostRip, 1 << 32), |e| e.host32().set(F::HostRip, 0xffff_ffff)),
    (245, |e| e.clear(F::HostCr4, 1 << 5), |e| e.host32().clear(F::HostCr4, 1 << 5).set(F::HostRip, 0)),
    (246, |e| e.set(F::HostRip, NOT_CANONICAL), |e| e.set(F::HostRip, NOT_CANONICAL - 1)),

    (300, |e| e.clear(F::GuestCr0, 1), |e| e.unrestricted().guest32().clear(F::GuestCr0, 0x8000_0001)),
    (301, |e| e.unrestricted().guest32().clear(F::GuestCr0, 1), |e| e.unrestricted().guest32().clear(F::GuestCr0, 1 << 31)),
    (302, |e| e.clear(F::GuestCr4, 1 << 13), |e| e.or(F::GuestCr4, 1 << 20)),
    (303, |e| { e.limits.cr4 = e.limits.cr4.with_cet(true); e.or(F::GuestCr4, 1 << 23) }, |e| { e.limits.cr4 = e.limits.cr4.with_cet(true); e.or(F::GuestCr4, 1 << 23).or(F::GuestCr0, 1 << 16) }),
    (304, |e| e.entry(EntryControls::new().with_load_debug_controls(true)).set(F::GuestDebugctl, 1 << 40), |e| e.set(F::GuestDebugctl, 1 << 40)),
    (305, |e| e.clear(F::GuestCr4, 1 << 5), |e| e.guest32()),
    (306, |e| e.guest32().or(F::GuestCr4, 1 << 17), |e| e.or(F::GuestCr4, 1 << 17)),
    (307, |e| e.or(F::GuestCr3, TOO_WIDE), |e| e.or(F::GuestCr3, TOO_WIDE >> 1)),
    (308, |e| e.entry(EntryControls::new().with_load_debug_controls(true)).set(F::GuestDr7, 1 << 32), |e| e.set(F::GuestDr7, 1 << 32)),
    (309, |e| e.set(F::GuestSysenterEsp, NOT_CANONICAL), |e| e.set(F::GuestSysenterEsp, u64::MAX)),
    (310, |e| e.set(F::GuestSysenterEip, NOT_CANONICAL), |e| e.set(F::GuestSysenterEip, u64::MAX)),
    (311, |e| e.entry(EntryControls::new().with_load_pat(true)).set(F::GuestPat, 0x0300), |e| e.set(F::GuestPat, 0x0300)),
    (312, |e| e.entry(EntryControls::new().with_load_efer(true)).set(F::GuestEfer, 0x1500), |e| e.entry(EntryControls::new().with_load_efer(true)).set(F::GuestEfer, 0x500)),
    (313, |e| e.entry(EntryControls::new().with_load_efer(true)).set(F::GuestEfer, 0x100), |e| e.set(F::GuestEfer, 0x100)),
    (314, |e| e.entry(EntryControls::new().with_load_efer(true)).set(F::GuestEfer, 0x400), |e| e.unrestricted().guest32().entry(EntryControls::new().with_load_efer(true)).set(F::GuestEfer, 0x100).clear(F::GuestCr0, 1 << 31)),

    (350, |e| e.set(F::GuestTrSelector, 28), |e| e.set(F::GuestTrSelector, 27)),
    (351, |e| e.set(F::GuestLdtrSelector, 4), |e| e.set(F::GuestLdtrSelector, 4).rights(LDTR, |r| r.with_unusable(true))),
    (352, |e| e.set(F::GuestSsSelector, 17).rights(SS, |r| r.with_dpl(1)), |e| e.unrestricted().set(F::GuestSsSelector, 17)),
    (360, |e| e.v8086().or(F::GuestEsBase, 1), |e| e.or(F::GuestEsBase, 1)),
    (361, |e| e.v8086().or(F::GuestCsBase, 1), |e| e.or(F::GuestCsBase, 1)),
    (362, |e| e.v8086().or(F::GuestSsBase, 1), |e| e.or(F::GuestSsBase, 1)),
    (363, |e| e.v8086().or(F::GuestDsBase, 1), |e| e.or(F::GuestDsBase, 1)),
    (364, |e| e.v8086().or(F::GuestFsBase, 1), |e| e.or(F::GuestFsBase, 1)),
    (365, |e| e.v8086().or(F::GuestGsBase, 1), |e| e.v8086()),
    (366, |e| e.set(F::GuestTrBase, NOT_CANONICAL), |e| e.set(F::GuestTrBase, u64::MAX)),
    (367, |e| e.set(F::GuestFsBase, NOT_CANONICAL), |e| e.set(F::GuestFsBase, u64::MAX)),
    (368, |e| e.set(F::GuestGsBase, NOT_CANONICAL), |e| e.set(F::GuestGsBase, u64::MAX)),
    (369, |e| e.set(F::GuestLdtrBase, NOT_CANONICAL), |e| e.set(F::GuestLdtrBase, NOT_CANONICAL).rights(LDTR, |r| r.with_unusable(true))),
    (370, |e| e.set(F::GuestEsBase, 1 << 32), |e| e.set(F::GuestEsBase, 1 << 32).rights(ES, |r| r.with_unusable(true))),
    (371, |e| e.set(F::GuestCsBase, 1 << 32), |e| e.set(F::GuestCsBase, 1 << 31)),
    (372, |e| e.set(F::GuestSsBase, 1 << 32), |e| e.set(F::GuestSsBase, 1 << 31)),
    (373, |e| e.set(F::GuestDsBase, 1 << 32), |e| e.set(F::GuestDsBase, 1 << 31)),
    (380, |e| e.v8086().set(F::GuestEsLimit, 0xfffff), |e| e.v8086()),
    (381, |e| e.v8086().set(F::GuestCsLimit, 0xfffff), |e| e.v8086()),
    (382, |e| e.v8086().set(F::GuestSsLimit, 0xfffe), |e| e.v8086()),
    (383, |e| e.v8086().set(F::GuestDsLimit, 0xfffff), |e| e.v8086()),
    (384, |e| e.v8086().set(F::GuestFsLimit, 0xfffff), |e| e.v8086()),
    (385, |e| e.v8086().set(F::GuestGsLimit, 0xfffff), |e| e.v8086()),
    (390, |e| e.v8086().rights(ES, |r| r.with_dpl(0)), |e| e.rights(ES, |r| r.with_dpl(3))),
    (391, |e| e.v8086().rights(CS, |r| r.with_kind(11)), |e| e.v8086()),
    (392, |e| e.v8086().rights(SS, |r| r.with_unusable(true)), |e| e.rights(SS, |r| r.with_unusable(true))),
    (393, |e| e.v8086().rights(DS, |r| r.with_db(true)), |e| e.v8086()),
    (394, |e| e.v8086().rights(FS, |r| r.with_p(false)), |e| e.v8086()),
    (395, |e| e.v8086().rights(GS, |r| r.with_s(false)), |e| e.v8086()),
    (400, |e| e.rights(ES, |r| r.with_kind(2)), |e| e.rights(ES, |r| r.with_kind(1))),
    (401, |e| e.rights(CS, |r| r.with_kind(3)), |e| e.unrestricted().rights(CS, |r| r.with_kind(3))),
    (402, |e| e.rights(SS, |r| r.with_kind(1)), |e| e.rights(SS, |r| r.with_kind(7))),
    (403, |e| e.rights(DS, |r| r.with_kind(9)), |e| e.rights(DS, |r| r.with_kind(11))),
    (404, |e| e.rights(FS, |r| r.with_kind(0)), |e| e.rights(FS, |r| r.with_kind(0).with_unusable(true))),
    (405, |e| e.rights(GS, |r| r.with_kind(13)), |e| e.rights(GS, |r| r.with_kind(15))),
    (410, |e| e.rights(ES, |r| r.with_s(false)), |e| e.rights(ES, |r| r.with_s(false).with_unusable(true))),
    (411, |e| e.rights(CS, |r| r.with_s(false)), |e| e),
    (412, |e| e.rights(SS, |r| r.with_s(false)), |e| e.rights(SS, |r| r.with_s(false).with_unusable(true))),
    (413, |e| e.rights(DS, |r| r.with_s(false)), |e| e.rights(DS, |r| r.with_s(false).with_unusable(true))),
    (414, |e| e.rights(FS, |r| r.with_s(false)), |e| e.rights(FS, |r| r.with_s(false).with_unusable(true))),
    (415, |e| e.rights(GS, |r| r.with_s(false)), |e| e.rights(GS, |r| r.with_s(false).with_unusable(true))),
    (420, |e| e.set(F::GuestEsSelector, 17), |e| e.set(F::GuestEsSelector, 17).rights(ES, |r| r.with_dpl(1))),
    (421, |e| e.rights(CS, |r| r.with_dpl(1)), |e| e.rights(CS, |r| r.with_dpl(1)).rights(SS, |r| r.with_dpl(1)).set(F::GuestSsSelector, 17).set(F::GuestCsSelector, 9)),
    (422, |e| e.rights(CS, |r| r.with_kind(13)).rights(SS, |r| r.with_dpl(1)), |e| e.unrestricted().rights(CS, |r| r.with_kind(13)).rights(SS, |r| r.with_dpl(1))),
    (423, |e| e.set(F::GuestDsSelector, 19), |e| e.set(F::GuestDsSelector, 19).rights(DS, |r| r.with_kind(15))),
    (424, |e| e.set(F::GuestFsSelector, 17), |e| e.unrestricted().set(F::GuestFsSelector, 17)),
    (425, |e| e.set(F::GuestGsSelector, 17), |e| e.set(F::GuestGsSelector, 17).rights(GS, |r| r.with_unusable(true))),
    (426, |e| e.unrestricted().rights(CS, |r| r.with_kind(3)).rights(SS, |r| r.with_dpl(1)), |e| e.unrestricted().rights(CS, |r| r.with_kind(3))),
    (430, |e| e.rights(ES, |r| r.with_p(false)), |e| e.rights(ES, |r| r.with_p(false).with_unusable(true))),
    (431, |e| e.rights(CS, |r| r.with_p(false)), |e| e),
    (432, |e| e.rights(SS, |r| r.with_p(false)), |e| e.rights(SS, |r| r.with_p(false).with_unusable(true))),
    (433, |e| e.rights(DS, |r| r.with_p(false)), |e| e.rights(DS, |r| r.with_p(false).with_unusable(true))),
    (434, |e| e.rights(FS, |r| r.with_p(false)), |e| e.rights(FS, |r| r.with_p(false).with_unusable(true))),
    (435, |e| e.rights(GS, |r| r.with_p(false)), |e| e.rights(GS, |r| r.with_p(false).with_unusable(true))),
    (440, |e| e.rights_bits(ES, 0x100), |e| e.rights_bits(ES, 0x1_0100)),
    (441, |e| e.rights_bits(CS, 0x100), |e| e.rights_bits(CS, 0x1000)),
    (442, |e| e.rights_bits(SS, 0x200), |e| e.rights_bits(SS, 0x1_0200)),
    (443, |e| e.rights_bits(DS, 0x400), |e| e.rights_bits(DS, 0x1_0400)),
    (444, |e| e.rights_bits(FS, 0x800), |e| e.rights_bits(FS, 0x1_0800)),
    (445, |e| e.rights_bits(GS, 0xf00), |e| e.rights_bits(GS, 0x1_0f00)),
    (451, |e| e.rights(CS, |r| r.with_db(true)), |e| e.rights(CS, |r| r.with_db(true).with_l(false))),
    (460, |e| e.set(F::GuestEsLimit, 0xf_fffe), |e| e.set(F::GuestEsLimit, 0xf_fffe).rights(ES, |r| r.with_g(false))),
    (461, |e| e.rights(CS, |r| r.with_g(false)), |e| e.rights(CS, |r| r.with_g(false)).set(F::GuestCsLimit, 0xf_ffff)),
    (462, |e| e.set(F::GuestSsLimit, 0), |e| e.set(F::GuestSsLimit, 0xfff)),
    (463, |e| e.rights(DS, |r| r.with_g(false)).set(F::GuestDsLimit, 0x10_0000), |e| e.rights(DS, |r| r.with_g(false)).set(F::GuestDsLimit, 0xf_fff0)),
    (464, |e| e.set(F::GuestFsLimit, 0), |e| e.set(F::GuestFsLimit, 0).rights(FS, |r| r.with_unusable(true))),
    (465, |e| e.set(F::GuestGsLimit, 0), |e| e.set(F::GuestGsLimit, 0xfff)),
    (470, |e| e.rights_bits(ES, 1 << 17), |e| e.rights_bits(ES, 3 << 16)),
    (471, |e| e.rights_bits(CS, 1 << 17), |e| e.rights_bits(CS, 1 << 16)),
    (472, |e| e.rights_bits(SS, 1 << 31), |e| e.rights_bits(SS, 1 << 31 | 1 << 16)),
    (473, |e| e.rights_bits(DS, 1 << 17), |e| e.rights_bits(DS, 3 << 16)),
    (474, |e| e.rights_bits(FS, 1 << 17), |e| e.rights_bits(FS, 3 << 16)),
    (475, |e| e.rights_bits(GS, 1 << 17), |e| e.rights_bits(GS, 3 << 16)),
    (480, |e| e.rights(TR, |r| r.with_kind(3)), |e| e.guest32().rights(TR, |r| r.with_kind(3))),
    (481, |e| e.rights(TR, |r| r.with_s(true)), |e| e),
    (482, |e| e.rights(TR, |r| r.with_p(false)), |e| e),
    (483, |e| e.rights_bits(TR, 0x800), |e| e.rights_bits(TR, 0x1000)),
    (484, |e| e.rights(TR, |r| r.with_g(true)), |e| e.rights(TR, |r| r.with_g(true)).set(F::GuestTrLimit, 0xfff)),
    (485, |e| e.rights(TR, |r| r.with_unusable(true)), |e| e),
    (486, |e| e.rights_bits(TR, 1 << 17), |e| e),
    (490, |e| e.rights(LDTR, |r| r.with_kind(3)), |e| e.rights(LDTR, |r| r.with_kind(3).with_unusable(true))),
    (491, |e| e.rights(LDTR, |r| r.with_s(true)), |e| e.rights(LDTR, |r| r.with_s(true).with_unusable(true))),
    (492, |e| e.rights(LDTR, |r| r.with_p(false)), |e| e.rights(LDTR, |r| r.with_p(false).with_unusable(true))),
    (493, |e| e.rights_bits(LDTR, 0x100), |e| e.rights_bits(LDTR, 0x1_0100)),
    (494, |e| e.set(F::GuestLdtrLimit, 0x10_0000), |e| e.set(F::GuestLdtrLimit, 0xf_ffff)),
    (495, |e| e.rights_bits(LDTR, 1 << 17), |e| e.rights_bits(LDTR, 3 << 16)),

    (530, |e| e.set(F::GuestGdtrBase, NOT_CANONICAL), |e| e.set(F::GuestGdtrBase, u64::MAX)),
    (531, |e| e.set(F::GuestIdtrBase, NOT_CANONICAL), |e| e.set(F::GuestIdtrBase, u64::MAX)),
    (532, |e| e.set(F::GuestGdtrLimit, 0x1_0000), |e| e.set(F::GuestGdtrLimit, 0xffff)),
    (533, |e| e.set(F::GuestIdtrLimit, 0x1_0000), |e| e.set(F::GuestIdtrLimit, 0xffff)),
    (540, |e| e.guest32().set(F::GuestRip, 1 << 32), |e| e.guest32().set(F::GuestRip, 0xffff_ffff)),
    (541, |e| e.set(F::GuestRip, 1 << 48), |e| e.set(F::GuestRip, 1 << 47)),
    (542, |e| e.or(F::GuestRflags, 1 << 15), |e| e.or(F::GuestRflags, 1 << 14)),
    (543, |e| e.clear(F::GuestRflags, 2), |e| e),
    (544, |e| e.v8086().entry(EntryControls::new().with_ia32e_mode_guest(true)).or(F::GuestCr4, 1 << 5), |e| e.v8086()),
    (545, |e| e.inject(EventType::External, 0x20, false), |e| e.inject(EventType::External, 0x20, false).or(F::GuestRflags, rflags::IF)),

    (600, |e| { e.offer.misc = Misc::new().with_cr3_targets(4); e.set(F::GuestActivityState, 3) }, |e| e.set(F::GuestActivityState, 3)),
    (601, |e| e.hlt().rights(CS, |r| r.with_kind(13)).rights(SS, |r| r.with_dpl(1)).unrestricted(), |e| e.rights(CS, |r| r.with_kind(13)).rights(SS, |r| r.with_dpl(1)).unrestricted()),
    (602, |e| e.hlt().sti(), |e| e.sti()),
    (603, |e| e.hlt().inject(EventType::HardwareException, 6, false), |e| e.hlt().inject(EventType::HardwareException, 1, false)),
    (604, |e| e.set(F::GuestActivityState, 2).inject(EventType::HardwareException, 1, false), |e| e.set(F::GuestActivityState, 2).inject(EventType::HardwareException, 18, false)),
    (605, |e| e.set(F::GuestActivityState, 3).inject(EventType::Nmi, 2, false), |e| e.set(F::GuestActivityState, 2).inject(EventType::Nmi, 2, false)),
    (610, |e| e.set(F::GuestInterruptibility, 1 << 5), |e| e.set(F::GuestInterruptibility, 1 << 3)),
    (611, |e| e.sti().or(F::GuestInterruptibility, 2), |e| e.mov_ss()),
    (612, |e| e.set(F::GuestInterruptibility, 1), |e| e.sti()),
    (613, |e| e.sti().inject(EventType::External, 0x20, false), |e| e.sti().inject(EventType::HardwareException, 6, false)),
    (614, |e| e.mov_ss().or(F::GuestRflags, rflags::IF).inject(EventType::External, 0x20, false), |e| e.mov_ss().inject(EventType::HardwareException, 6, false)),
    (615, |e| e.mov_ss().inject(EventType::Nmi, 2, false), |e| e.sti().inject(EventType::Nmi, 2, false)),
    (616, |e| e.set(F::GuestInterruptibility, 4), |e| e.set(F::GuestInterruptibility, 8)),
    (617, |e| e.virtual_nmis().set(F::GuestInterruptibility, 8).inject(EventType::Nmi, 2, false), |e| e.set(F::GuestInterruptibility, 8).inject(EventType::Nmi, 2, false)),
    (618, |e| e.set(F::GuestInterruptibility, 16), |e| e),
    (620, |e| e.set(F::GuestPendingDebug, 1 << 13), |e| e.set(F::GuestPendingDebug, 0x500f)),
    (621, |e| e.mov_ss().or(F::GuestRflags, rflags::TF), |e| e.mov_ss().or(F::GuestRflags, rflags::TF).set(F::GuestPendingDebug, 1 << 14)),
    (622, |e| e.hlt().set(F::GuestPendingDebug, 1 << 14), |e| e.set(F::GuestPendingDebug, 1 << 14)),
    (630, |e| e.set(F::VmcsLinkGpa, 0x7_0008), |e| e.link(REVISION_ID)),
    (631, |e| e.set(F::VmcsLinkGpa, TOO_WIDE), |e| e.link(REVISION_ID)),
    (632, |e| e.link(REVISION_ID ^ 1), |e| e.link(REVISION_ID)),
    (633, |e| e.link(REVISION_ID | SHADOW_INDICATOR), |e| e.link(REVISION_ID | SHADOW_INDICATOR).proc2(Proc2Controls::new().with_vmcs_shadowing(true))),
    (634, |e| { e.vmcs_gpa = 0x7_0000; e.link(REVISION_ID) }, |e| e.link(REVISION_ID)),
    (640, |e| e.ept().guest_pae().set(F::GuestPdpte2, 0x4003), |e| e.ept().guest_pae().set(F::GuestPdpte2, 0x4002)),
    (641, |e| { e.memory.0.insert(0x3018, TOO_WIDE | 1); e.guest_pae() }, |e| e.guest_pae()),
];

#[test]
fn the_baseline_passes() {
    assert_eq!(valid().check(), Ok(()));
}

#[test]
fn each_check_fails_on_its_row_and_passes_on_the_neighbour() {
    let mut wrong = Vec::new();
    for &(id, bad, good) in ROWS {
        let (mut failing, mut passing) = (valid(), valid());
        let (failed, passed) = (bad(&mut failing).check(), good(&mut passing).check());
        if failed != Err(id) || passed != Ok(()) {
            wrong.push((id, failed, passed));
        }
    }
    assert!(wrong.is_empty(), "(id, with the bad change, with the good one): {wrong:?}");
}

#[test]
fn every_check_has_a_row_and_a_unique_id_and_name() {
    let ids: Vec<u16> = checks().map(|c| c.id).collect();
    let unique: BTreeSet<u16> = ids.iter().copied().collect();
    assert_eq!(unique.len(), ids.len(), "duplicate id");
    assert_eq!(checks().map(|c| c.name).collect::<BTreeSet<_>>().len(), ids.len(), "duplicate name");
    let rows: BTreeSet<u16> = ROWS.iter().map(|r| r.0).collect();
    assert_eq!(rows, unique);
    assert!(checks().all(|c| !c.fields.is_empty() && check_by_id(c.id).is_some_and(|found| found.name == c.name)));
}

#[test]
fn the_failure_kind_follows_the_area() {
    for check in checks() {
        let expected = match check.id {
            100..200 => Failure::Instruction(InstructionError::EntryControls),
            200..300 => Failure::Instruction(InstructionError::EntryHostState),
            630..640 => Failure::GuestState { qualification: 4 },
            640.. => Failure::GuestState { qualification: 2 },
            _ => Failure::GuestState { qualification: 0 },
        };
        assert_eq!(check.failure, expected, "{}", check.name);
    }
}
