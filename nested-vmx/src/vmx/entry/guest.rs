//! Checks on guest control registers, debug registers and MSRs (SDM 3, 27.3.1.1), descriptor tables (27.3.1.3), RIP
//! and RFLAGS (27.3.1.4). A failure is exit reason 33.

use super::{Check, guest_check as check};
use crate::arch::LINEAR_ADDRESS_BITS;
use crate::arch::cr::rflags;
use crate::arch::efer::Efer;
use crate::arch::vmx::EventType;
use crate::cpu::valid_pat;
use crate::vmx::vmcs12::{Field as F, segment_index};

const REGISTER: &str = "27.3.1.1";
const TABLES: &str = "27.3.1.3";
const FLOW: &str = "27.3.1.4";

pub(super) const REGISTERS: &[Check] = &[
    check(300, "guest-cr0", &[F::GuestCr0], REGISTER, |c| c.caps.cr0_permitted(c.get(F::GuestCr0), c.unrestricted())),
    check(301, "guest-cr0-paging-without-protection", &[F::GuestCr0], REGISTER, |c| {
        !c.guest_cr0.pg() || c.guest_cr0.pe()
    }),
    check(302, "guest-cr4", &[F::GuestCr4], REGISTER, |c| c.caps.cr4_permitted(c.get(F::GuestCr4))),
    check(303, "guest-cr4-cet-without-wp", &[F::GuestCr4, F::GuestCr0], REGISTER, |c| {
        !c.guest_cr4.cet() || c.guest_cr0.wp()
    }),
    check(304, "guest-debugctl", &[F::GuestDebugctl, F::EntryControls], REGISTER, |c| {
        !c.entry.load_debug_controls() || c.get(F::GuestDebugctl) & !c.caps.limits.debugctl == 0
    }),
    check(305, "guest-64-without-paging", &[F::GuestCr0, F::GuestCr4, F::EntryControls], REGISTER, |c| {
        !c.entry.ia32e_mode_guest() || c.guest_cr0.pg() && c.guest_cr4.pae()
    }),
    check(306, "guest-32-with-pcid", &[F::GuestCr4, F::EntryControls], REGISTER, |c| {
        c.entry.ia32e_mode_guest() || !c.guest_cr4.pcide()
    }),
    check(307, "guest-cr3", &[F::GuestCr3], REGISTER, |c| c.within_physical(F::GuestCr3)),
    check(308, "guest-dr7", &[F::GuestDr7, F::EntryControls], REGISTER, |c| {
        !c.entry.load_debug_controls() || c.get(F::GuestDr7) >> 32 == 0
    }),
    check(309, "guest-sysenter-esp", &[F::GuestSysenterEsp], REGISTER, |c| c.canonical(F::GuestSysenterEsp)),
    check(310, "guest-sysenter-eip", &[F::GuestSysenterEip], REGISTER, |c| c.canonical(F::GuestSysenterEip)),
    check(311, "guest-pat", &[F::GuestPat, F::EntryControls], REGISTER, |c| {
        !c.entry.load_pat() || valid_pat(c.get(F::GuestPat))
    }),
    check(312, "guest-efer-reserved", &[F::GuestEfer, F::EntryControls], REGISTER, |c| {
        !c.entry.load_efer() || c.get(F::GuestEfer) & !Efer::DEFINED == 0
    }),
    check(313, "guest-efer-lma", &[F::GuestEfer, F::EntryControls], REGISTER, |c| {
        !c.entry.load_efer() || Efer::from_bits(c.get(F::GuestEfer)).lma() == c.entry.ia32e_mode_guest()
    }),
    check(314, "guest-efer-lme", &[F::GuestEfer, F::GuestCr0, F::EntryControls], REGISTER, |c| {
        let efer = Efer::from_bits(c.get(F::GuestEfer));
        !c.entry.load_efer() || !c.guest_cr0.pg() || efer.lma() == efer.lme()
    }),
];

pub(super) const TABLES_AND_FLOW: &[Check] = &[
    check(530, "guest-gdtr-base", &[F::GuestGdtrBase], TABLES, |c| c.canonical(F::GuestGdtrBase)),
    check(531, "guest-idtr-base", &[F::GuestIdtrBase], TABLES, |c| c.canonical(F::GuestIdtrBase)),
    check(532, "guest-gdtr-limit", &[F::GuestGdtrLimit], TABLES, |c| c.get(F::GuestGdtrLimit) <= 0xffff),
    check(533, "guest-idtr-limit", &[F::GuestIdtrLimit], TABLES, |c| c.get(F::GuestIdtrLimit) <= 0xffff),
    check(540, "guest-rip-32", &[F::GuestRip, F::GuestCsAccessRights, F::EntryControls], FLOW, |c| {
        runs_64_bit_code(c) || c.get(F::GuestRip) >> 32 == 0
    }),
    check(541, "guest-rip-64", &[F::GuestRip, F::GuestCsAccessRights, F::EntryControls], FLOW, |c| {
        // Bits 63:N equal each other; bit N-1 is not looked at, so RIP may be just past the lower half.
        let high = (c.get(F::GuestRip) as i64) >> LINEAR_ADDRESS_BITS;
        !runs_64_bit_code(c) || high == 0 || high == -1
    }),
    check(542, "guest-rflags-reserved", &[F::GuestRflags], FLOW, |c| c.guest_rflags & rflags::RESERVED == 0),
    check(543, "guest-rflags-fixed", &[F::GuestRflags], FLOW, |c| c.guest_rflags & rflags::FIXED1 != 0),
    check(544, "guest-rflags-vm", &[F::GuestRflags, F::GuestCr0, F::EntryControls], FLOW, |c| {
        !c.virtual_8086() || !c.entry.ia32e_mode_guest() && c.guest_cr0.pe()
    }),
    check(545, "guest-rflags-if", &[F::GuestRflags, F::EntryInterruptionInfo], FLOW, |c| {
        let external = c.injection.valid() && c.injection.event_type() == EventType::External;
        !external || c.guest_rflags & rflags::IF != 0
    }),
];

fn runs_64_bit_code(c: &super::Context) -> bool {
    c.entry.ia32e_mode_guest() && c.vmcs.guest_segment(segment_index::CS).rights.l()
}
