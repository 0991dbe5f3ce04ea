//! Checks on VM-execution, VM-exit and VM-entry control fields (SDM 3, 27.2.1). A failure is VM-instruction error 7.

use super::{Check, Context, controls_check as check};
use crate::arch::exception;
use crate::arch::vmx::{Eptp, EventType};
use crate::vmx::caps::Caps;
use crate::vmx::vmcs12::Field as F;

const EXECUTION: &str = "27.2.1.1";
const EXIT: &str = "27.2.1.2";
const ENTRY: &str = "27.2.1.3";

pub(super) const CHECKS: &[Check] = &[
    check(100, "pin-controls-reserved", &[F::PinControls], EXECUTION, |c| c.caps.pin.permits(c.pin.into_bits())),
    check(101, "proc-controls-reserved", &[F::ProcControls], EXECUTION, |c| c.caps.proc.permits(c.proc.into_bits())),
    check(102, "proc2-controls-reserved", &[F::Proc2Controls], EXECUTION, |c| {
        c.caps.proc2.permits(c.proc2.into_bits())
    }),
    check(103, "cr3-target-count", &[F::Cr3TargetCount], EXECUTION, |c| {
        c.get(F::Cr3TargetCount) <= c.caps.offer.misc.cr3_targets().into()
    }),
    check(104, "io-bitmap-alignment", &[F::IoBitmapAGpa, F::IoBitmapBGpa], EXECUTION, |c| {
        !c.proc.use_io_bitmaps() || c.page_aligned(F::IoBitmapAGpa) && c.page_aligned(F::IoBitmapBGpa)
    }),
    check(105, "io-bitmap-width", &[F::IoBitmapAGpa, F::IoBitmapBGpa], EXECUTION, |c| {
        !c.proc.use_io_bitmaps() || c.within_physical(F::IoBitmapAGpa) && c.within_physical(F::IoBitmapBGpa)
    }),
    check(106, "msr-bitmap-alignment", &[F::MsrBitmapGpa], EXECUTION, |c| {
        !c.proc.use_msr_bitmaps() || c.page_aligned(F::MsrBitmapGpa)
    }),
    check(107, "msr-bitmap-width", &[F::MsrBitmapGpa], EXECUTION, |c| {
        !c.proc.use_msr_bitmaps() || c.within_physical(F::MsrBitmapGpa)
    }),
    check(108, "virtual-apic-alignment", &[F::VirtualApicGpa], EXECUTION, |c| {
        !c.proc.use_tpr_shadow() || c.page_aligned(F::VirtualApicGpa)
    }),
    check(109, "virtual-apic-width", &[F::VirtualApicGpa], EXECUTION, |c| {
        !c.proc.use_tpr_shadow() || c.within_physical(F::VirtualApicGpa)
    }),
    check(110, "tpr-threshold-reserved", &[F::TprThreshold], EXECUTION, |c| {
        !c.proc.use_tpr_shadow() || c.proc2.virtual_interrupt_delivery() || c.get(F::TprThreshold) & !0xf == 0
    }),
    check(111, "tpr-threshold-above-vtpr", &[F::TprThreshold, F::VirtualApicGpa], EXECUTION, |c| {
        !c.proc.use_tpr_shadow()
            || c.proc2.virtualize_apic_accesses()
            || c.proc2.virtual_interrupt_delivery()
            || c.get(F::TprThreshold) & 0xf <= vtpr_class(c)
    }),
    check(112, "virtual-nmis-without-nmi-exiting", &[F::PinControls], EXECUTION, |c| {
        c.pin.nmi_exiting() || !c.pin.virtual_nmis()
    }),
    check(113, "nmi-window-without-virtual-nmis", &[F::PinControls, F::ProcControls], EXECUTION, |c| {
        c.pin.virtual_nmis() || !c.proc.nmi_window_exiting()
    }),
    check(114, "apic-access-alignment", &[F::ApicAccessGpa], EXECUTION, |c| {
        !c.proc2.virtualize_apic_accesses() || c.page_aligned(F::ApicAccessGpa)
    }),
    check(115, "apic-access-width", &[F::ApicAccessGpa], EXECUTION, |c| {
        !c.proc2.virtualize_apic_accesses() || c.within_physical(F::ApicAccessGpa)
    }),
    check(116, "apic-virtualization-without-tpr-shadow", &[F::ProcControls, F::Proc2Controls], EXECUTION, |c| {
        c.proc.use_tpr_shadow()
            || !c.proc2.virtualize_x2apic_mode()
                && !c.proc2.apic_register_virtualization()
                && !c.proc2.virtual_interrupt_delivery()
    }),
    check(117, "x2apic-mode-with-apic-accesses", &[F::Proc2Controls], EXECUTION, |c| {
        !c.proc2.virtualize_x2apic_mode() || !c.proc2.virtualize_apic_accesses()
    }),
    check(118, "virtual-interrupts-without-interrupt-exiting", &[F::PinControls, F::Proc2Controls], EXECUTION, |c| {
        !c.proc2.virtual_interrupt_delivery() || c.pin.external_interrupt_exiting()
    }),
    check(119, "posted-interrupts-controls", &[F::PinControls, F::Proc2Controls, F::ExitControls], EXECUTION, |c| {
        !c.pin.process_posted_interrupts() || c.proc2.virtual_interrupt_delivery() && c.exit.acknowledge_interrupt()
    }),
    check(120, "posted-interrupts-vector", &[F::PostedInterruptNotificationVector], EXECUTION, |c| {
        !c.pin.process_posted_interrupts() || c.get(F::PostedInterruptNotificationVector) <= 0xff
    }),
    check(121, "posted-interrupts-alignment", &[F::PostedInterruptDescriptorGpa], EXECUTION, |c| {
        !c.pin.process_posted_interrupts() || c.get(F::PostedInterruptDescriptorGpa) & 0x3f == 0
    }),
    check(122, "posted-interrupts-width", &[F::PostedInterruptDescriptorGpa], EXECUTION, |c| {
        !c.pin.process_posted_interrupts() || c.within_physical(F::PostedInterruptDescriptorGpa)
    }),
    check(123, "vpid-zero", &[F::Vpid], EXECUTION, |c| !c.proc2.enable_vpid() || c.get(F::Vpid) != 0),
    check(124, "eptp-memory-type", &[F::Eptp], EXECUTION, |c| {
        !c.proc2.enable_ept() || eptp_memory_type_valid(c.caps, eptp(c))
    }),
    check(125, "eptp-walk-length", &[F::Eptp], EXECUTION, |c| {
        !c.proc2.enable_ept() || eptp_walk_length_valid(c.caps, eptp(c))
    }),
    check(126, "eptp-accessed-dirty", &[F::Eptp], EXECUTION, |c| {
        !c.proc2.enable_ept() || eptp_flags_valid(c.caps, eptp(c))
    }),
    check(127, "eptp-reserved", &[F::Eptp], EXECUTION, |c| {
        !c.proc2.enable_ept() || eptp_reserved_clear(c.caps, eptp(c))
    }),
    check(128, "pml-without-ept", &[F::Proc2Controls], EXECUTION, |c| !c.proc2.enable_pml() || c.proc2.enable_ept()),
    check(129, "pml-alignment", &[F::PmlGpa], EXECUTION, |c| !c.proc2.enable_pml() || c.page_aligned(F::PmlGpa)),
    check(130, "pml-width", &[F::PmlGpa], EXECUTION, |c| !c.proc2.enable_pml() || c.within_physical(F::PmlGpa)),
    check(131, "unrestricted-or-execute-control-without-ept", &[F::Proc2Controls], EXECUTION, |c| {
        c.proc2.enable_ept() || !c.proc2.unrestricted_guest() && !c.proc2.mode_based_execute()
    }),
    check(132, "vm-functions-reserved", &[F::VmFunctionControls], EXECUTION, |c| {
        !c.proc2.enable_vm_functions() || c.get(F::VmFunctionControls) & !c.caps.offer.vm_functions == 0
    }),
    check(133, "eptp-switching-without-ept", &[F::VmFunctionControls, F::Proc2Controls], EXECUTION, |c| {
        !eptp_switching(c) || c.proc2.enable_ept()
    }),
    check(134, "eptp-list-alignment", &[F::EptpListGpa], EXECUTION, |c| {
        !eptp_switching(c) || c.page_aligned(F::EptpListGpa)
    }),
    check(135, "eptp-list-width", &[F::EptpListGpa], EXECUTION, |c| {
        !eptp_switching(c) || c.within_physical(F::EptpListGpa)
    }),
    check(136, "vmcs-shadowing-alignment", &[F::VmreadBitmapGpa, F::VmwriteBitmapGpa], EXECUTION, |c| {
        !c.proc2.vmcs_shadowing() || c.page_aligned(F::VmreadBitmapGpa) && c.page_aligned(F::VmwriteBitmapGpa)
    }),
    check(137, "vmcs-shadowing-width", &[F::VmreadBitmapGpa, F::VmwriteBitmapGpa], EXECUTION, |c| {
        !c.proc2.vmcs_shadowing() || c.within_physical(F::VmreadBitmapGpa) && c.within_physical(F::VmwriteBitmapGpa)
    }),
    check(138, "virtualization-exception-alignment", &[F::VirtualizationExceptionGpa], EXECUTION, |c| {
        !c.proc2.ept_violation_ve() || c.page_aligned(F::VirtualizationExceptionGpa)
    }),
    check(139, "virtualization-exception-width", &[F::VirtualizationExceptionGpa], EXECUTION, |c| {
        !c.proc2.ept_violation_ve() || c.within_physical(F::VirtualizationExceptionGpa)
    }),
    check(140, "tsc-multiplier-zero", &[F::TscMultiplier], EXECUTION, |c| {
        !c.proc2.use_tsc_scaling() || c.get(F::TscMultiplier) != 0
    }),
    check(150, "exit-controls-reserved", &[F::ExitControls], EXIT, |c| c.caps.exit.permits(c.exit.into_bits())),
    check(151, "save-preemption-timer-without-timer", &[F::ExitControls, F::PinControls], EXIT, |c| {
        c.pin.preemption_timer() || !c.exit.save_preemption_timer()
    }),
    check(152, "exit-msr-store-alignment", &[F::ExitMsrStoreGpa, F::ExitMsrStoreCount], EXIT, |c| {
        msr_list_aligned(c, F::ExitMsrStoreCount, F::ExitMsrStoreGpa)
    }),
    check(153, "exit-msr-store-width", &[F::ExitMsrStoreGpa, F::ExitMsrStoreCount], EXIT, |c| {
        msr_list_within(c, F::ExitMsrStoreCount, F::ExitMsrStoreGpa)
    }),
    check(154, "exit-msr-load-alignment", &[F::ExitMsrLoadGpa, F::ExitMsrLoadCount], EXIT, |c| {
        msr_list_aligned(c, F::ExitMsrLoadCount, F::ExitMsrLoadGpa)
    }),
    check(155, "exit-msr-load-width", &[F::ExitMsrLoadGpa, F::ExitMsrLoadCount], EXIT, |c| {
        msr_list_within(c, F::ExitMsrLoadCount, F::ExitMsrLoadGpa)
    }),
    check(160, "entry-controls-reserved", &[F::EntryControls], ENTRY, |c| c.caps.entry.permits(c.entry.into_bits())),
    check(161, "injection-type", &[F::EntryInterruptionInfo], ENTRY, |c| {
        !c.injection.valid()
            || match c.injection.event_type() {
                EventType::Reserved => false,
                EventType::Other => c.caps.offer.proc.monitor_trap_flag(),
                _ => true,
            }
    }),
    check(162, "injection-vector", &[F::EntryInterruptionInfo], ENTRY, |c| {
        let vector = c.injection.vector();
        !c.injection.valid()
            || match c.injection.event_type() {
                EventType::Nmi => vector == exception::NMI,
                EventType::HardwareException => vector <= 31,
                EventType::Other => vector == 0,
                _ => true,
            }
    }),
    check(163, "injection-error-code", &[F::EntryInterruptionInfo, F::GuestCr0], ENTRY, |c| {
        !c.injection.valid() || c.injection.error_code() == delivers_error_code(c)
    }),
    check(164, "injection-reserved", &[F::EntryInterruptionInfo], ENTRY, |c| {
        !c.injection.valid() || c.injection.into_bits() & 0x7fff_f000 == 0
    }),
    check(165, "injection-error-code-reserved", &[F::EntryErrorCode], ENTRY, |c| {
        !c.injection.valid() || !c.injection.error_code() || c.get(F::EntryErrorCode) & 0xffff_0000 == 0
    }),
    check(166, "injection-instruction-length", &[F::EntryInstructionLength], ENTRY, |c| {
        let shortest = if c.caps.offer.misc.zero_length_injection() { 0 } else { 1 };
        !c.injection.valid()
            || !c.injection.event_type().is_software()
            || (shortest..=15).contains(&c.get(F::EntryInstructionLength))
    }),
    check(167, "entry-msr-load-alignment", &[F::EntryMsrLoadGpa, F::EntryMsrLoadCount], ENTRY, |c| {
        msr_list_aligned(c, F::EntryMsrLoadCount, F::EntryMsrLoadGpa)
    }),
    check(168, "entry-msr-load-width", &[F::EntryMsrLoadGpa, F::EntryMsrLoadCount], ENTRY, |c| {
        msr_list_within(c, F::EntryMsrLoadCount, F::EntryMsrLoadGpa)
    }),
    check(169, "entry-smm-controls", &[F::EntryControls], ENTRY, |c| {
        // The processor is never in SMM (R3).
        !c.entry.entry_to_smm() && !c.entry.deactivate_dual_monitor()
    }),
];

/// Whether VM entry would accept an EPT pointer: what INVEPT asks too.
pub(crate) fn eptp_valid(caps: &Caps, eptp: u64) -> bool {
    let eptp = Eptp::from_bits(eptp);
    eptp_memory_type_valid(caps, eptp)
        && eptp_walk_length_valid(caps, eptp)
        && eptp_flags_valid(caps, eptp)
        && eptp_reserved_clear(caps, eptp)
}

fn eptp_memory_type_valid(caps: &Caps, eptp: Eptp) -> bool {
    match eptp.memory_type() {
        0 => caps.offer.ept_vpid.memory_type_uc(),
        6 => caps.offer.ept_vpid.memory_type_wb(),
        _ => false,
    }
}

fn eptp_walk_length_valid(caps: &Caps, eptp: Eptp) -> bool {
    match eptp.walk_length() {
        3 => caps.offer.ept_vpid.walk_length_4(),
        4 => caps.offer.ept_vpid.walk_length_5(),
        _ => false,
    }
}

fn eptp_flags_valid(caps: &Caps, eptp: Eptp) -> bool {
    !eptp.accessed_dirty() || caps.offer.ept_vpid.accessed_dirty()
}

fn eptp_reserved_clear(caps: &Caps, eptp: Eptp) -> bool {
    let shadow_stack = eptp.supervisor_shadow_stack() && !caps.offer.ept_vpid.supervisor_shadow_stack();
    !shadow_stack && eptp.into_bits() & 0xf00 == 0 && !caps.beyond_physical(eptp.into_bits())
}

fn eptp(c: &Context) -> Eptp {
    Eptp::from_bits(c.get(F::Eptp))
}

fn eptp_switching(c: &Context) -> bool {
    c.proc2.enable_vm_functions() && c.get(F::VmFunctionControls) & 1 != 0
}

/// Bits 7:4 of the virtual TPR (offset 0x80 of the virtual-APIC page).
fn vtpr_class(c: &Context) -> u64 {
    c.memory.read_u64(c.get(F::VirtualApicGpa) + 0x80) >> 4 & 0xf
}

/// An error code is delivered exactly with a hardware exception that has one, in protected mode.
fn delivers_error_code(c: &Context) -> bool {
    let protected = !c.unrestricted() || c.guest_cr0.pe();
    let vector = c.injection.vector();
    protected
        && c.injection.event_type() == EventType::HardwareException
        && exception::has_error_code(vector)
        // #CP exists with CET only; without it vector 21 has no error code.
        && (vector != exception::CP || c.caps.limits.cr4.cet())
}

/// 16 bytes each, on 16 bytes.
fn msr_list_aligned(c: &Context, count: F, gpa: F) -> bool {
    c.get(count) == 0 || c.get(gpa) & 0xf == 0
}

fn msr_list_within(c: &Context, count: F, gpa: F) -> bool {
    let (count, gpa) = (c.get(count), c.get(gpa));
    // The count has 32 bits: only the sum can overflow.
    let last = gpa.checked_add(count.wrapping_mul(16).wrapping_sub(1));
    count == 0 || !c.caps.beyond_physical(gpa) && last.is_some_and(|last| !c.caps.beyond_physical(last))
}
