//! Checks on guest non-register state (R13; SDM 3, 27.3.1.5) and on the page-directory-pointer-table entries
//! (27.3.1.6). A failure is exit reason 33.

use super::{
    Check, Context, QUALIFICATION_LINK_POINTER, QUALIFICATION_PDPTE, guest_check as check,
    guest_check_qualified as check_qualified,
};
use crate::arch::cr::rflags;
use crate::arch::exception;
use crate::arch::msr::debugctl;
use crate::arch::vmx::{EventType, Interruptibility, PendingDebug};
use crate::event::ActivityState;
use crate::vmx::vmcs12::{Field as F, REVISION_ID, segment_index};

const SECTION: &str = "27.3.1.5";
const PDPTES: &str = "27.3.1.6";

const ACTIVITY: &[F] = &[F::GuestActivityState];
const ACTIVITY_AND_INJECTION: &[F] = &[F::GuestActivityState, F::EntryInterruptionInfo];
const BLOCKING: &[F] = &[F::GuestInterruptibility];
const BLOCKING_AND_INJECTION: &[F] = &[F::GuestInterruptibility, F::EntryInterruptionInfo];
const PENDING: &[F] =
    &[F::GuestPendingDebug, F::GuestRflags, F::GuestDebugctl, F::GuestInterruptibility, F::GuestActivityState];
const LINK: &[F] = &[F::VmcsLinkGpa];

pub(super) const CHECKS: &[Check] = &[
    check(600, "activity-unsupported", ACTIVITY, SECTION, |c| {
        let misc = c.caps.offer.misc;
        match activity(c) {
            Some(ActivityState::Active) => true,
            Some(ActivityState::Hlt) => misc.activity_hlt(),
            Some(ActivityState::Shutdown) => misc.activity_shutdown(),
            Some(ActivityState::WaitForSipi) => misc.activity_wait_for_sipi(),
            None => false,
        }
    }),
    check(601, "hlt-needs-ss-dpl-0", &[F::GuestActivityState, F::GuestSsAccessRights], SECTION, |c| {
        !is(c, ActivityState::Hlt) || c.vmcs.guest_segment(segment_index::SS).rights.dpl() == 0
    }),
    check(602, "blocking-needs-active", &[F::GuestActivityState, F::GuestInterruptibility], SECTION, |c| {
        !blocks_by_instruction(c) || is(c, ActivityState::Active)
    }),
    check(603, "injection-into-hlt", ACTIVITY_AND_INJECTION, SECTION, |c| {
        !is(c, ActivityState::Hlt)
            || !c.injection.valid()
            || match c.injection.event_type() {
                EventType::External | EventType::Nmi | EventType::Other => true,
                EventType::HardwareException => matches!(c.injection.vector(), exception::DB | exception::MC),
                _ => false,
            }
    }),
    check(604, "injection-into-shutdown", ACTIVITY_AND_INJECTION, SECTION, |c| {
        !is(c, ActivityState::Shutdown)
            || !c.injection.valid()
            || match c.injection.event_type() {
                EventType::Nmi => true,
                EventType::HardwareException => c.injection.vector() == exception::MC,
                _ => false,
            }
    }),
    check(605, "injection-into-wait-for-sipi", ACTIVITY_AND_INJECTION, SECTION, |c| {
        !is(c, ActivityState::WaitForSipi) || !c.injection.valid()
    }),
    check(610, "interruptibility-reserved", BLOCKING, SECTION, |c| c.get(F::GuestInterruptibility) & !0x1f == 0),
    check(611, "sti-and-mov-ss-blocking", BLOCKING, SECTION, |c| !(blocking(c).sti() && blocking(c).mov_ss())),
    check(612, "sti-blocking-needs-if", &[F::GuestInterruptibility, F::GuestRflags], SECTION, |c| {
        !blocking(c).sti() || c.guest_rflags & rflags::IF != 0
    }),
    check(613, "sti-blocking-with-interrupt", BLOCKING_AND_INJECTION, SECTION, |c| {
        !injects(c, EventType::External) || !blocking(c).sti()
    }),
    check(614, "mov-ss-blocking-with-interrupt", BLOCKING_AND_INJECTION, SECTION, |c| {
        !injects(c, EventType::External) || !blocking(c).mov_ss()
    }),
    check(615, "mov-ss-blocking-with-nmi", BLOCKING_AND_INJECTION, SECTION, |c| {
        !injects(c, EventType::Nmi) || !blocking(c).mov_ss()
    }),
    // The processor is never in SMM (R3).
    check(616, "smi-blocking", BLOCKING, SECTION, |c| !blocking(c).smi()),
    check(617, "virtual-nmi-blocking-with-nmi", BLOCKING_AND_INJECTION, SECTION, |c| {
        !c.pin.virtual_nmis() || !injects(c, EventType::Nmi) || !blocking(c).nmi()
    }),
    // No SGX.
    check(618, "enclave-interruption", BLOCKING, SECTION, |c| !blocking(c).enclave()),
    check(620, "pending-debug-reserved", &[F::GuestPendingDebug], SECTION, |c| {
        // Bit 16 (RTM) counts as reserved: the processor has no RTM.
        const DEFINED: u64 = 0xf | 1 << 12 | 1 << 14;
        c.get(F::GuestPendingDebug) & !DEFINED == 0
    }),
    check(621, "pending-debug-bs-missing", PENDING, SECTION, |c| {
        !bs_is_checked(c) || !single_steps(c) || pending(c).bs()
    }),
    check(622, "pending-debug-bs-unfounded", PENDING, SECTION, |c| {
        !bs_is_checked(c) || single_steps(c) || !pending(c).bs()
    }),
    check_qualified(630, "link-pointer-alignment", LINK, SECTION, QUALIFICATION_LINK_POINTER, |c| {
        no_link(c) || c.page_aligned(F::VmcsLinkGpa)
    }),
    check_qualified(631, "link-pointer-width", LINK, SECTION, QUALIFICATION_LINK_POINTER, |c| {
        no_link(c) || c.within_physical(F::VmcsLinkGpa)
    }),
    check_qualified(632, "link-pointer-revision", LINK, SECTION, QUALIFICATION_LINK_POINTER, |c| {
        no_link(c) || link_header(c) & 0x7fff_ffff == REVISION_ID
    }),
    check_qualified(633, "link-pointer-shadow-indicator", LINK, SECTION, QUALIFICATION_LINK_POINTER, |c| {
        no_link(c) || (link_header(c) >> 31 != 0) == c.proc2.vmcs_shadowing()
    }),
    check_qualified(634, "link-pointer-is-current", LINK, SECTION, QUALIFICATION_LINK_POINTER, |c| {
        c.get(F::VmcsLinkGpa) != c.vmcs_gpa
    }),
    check_qualified(640, "pdptes-of-ept", &F::GUEST_PDPTES, PDPTES, QUALIFICATION_PDPTE, |c| {
        !pae_paging(c) || !c.proc2.enable_ept() || F::GUEST_PDPTES.iter().all(|&f| pdpte_valid(c, c.get(f)))
    }),
    check_qualified(641, "pdptes-in-memory", &[F::GuestCr3], PDPTES, QUALIFICATION_PDPTE, |c| {
        let table_gpa = c.get(F::GuestCr3) & 0xffff_ffe0;
        !pae_paging(c) || c.proc2.enable_ept() || (0..4).all(|i| pdpte_valid(c, c.memory.read_u64(table_gpa + 8 * i)))
    }),
];

fn activity(c: &Context) -> Option<ActivityState> {
    ActivityState::from_u64(c.get(F::GuestActivityState))
}

fn is(c: &Context, state: ActivityState) -> bool {
    activity(c) == Some(state)
}

fn blocking(c: &Context) -> Interruptibility {
    Interruptibility::from_bits(c.vmcs.get32(F::GuestInterruptibility))
}

fn pending(c: &Context) -> PendingDebug {
    PendingDebug::from_bits(c.get(F::GuestPendingDebug))
}

fn blocks_by_instruction(c: &Context) -> bool {
    blocking(c).sti() || blocking(c).mov_ss()
}

fn injects(c: &Context, event: EventType) -> bool {
    c.injection.valid() && c.injection.event_type() == event
}

/// Where the pending single-step trap must agree with TF and BTF.
fn bs_is_checked(c: &Context) -> bool {
    blocks_by_instruction(c) || is(c, ActivityState::Hlt)
}

fn single_steps(c: &Context) -> bool {
    c.guest_rflags & rflags::TF != 0 && c.get(F::GuestDebugctl) & debugctl::BTF == 0
}

fn no_link(c: &Context) -> bool {
    c.get(F::VmcsLinkGpa) == u64::MAX
}

fn link_header(c: &Context) -> u32 {
    c.memory.read_u64(c.get(F::VmcsLinkGpa)) as u32
}

fn pae_paging(c: &Context) -> bool {
    c.guest_cr0.pg() && c.guest_cr4.pae() && !c.entry.ia32e_mode_guest()
}

/// A present entry has bits 2:1, 8:5 and those beyond the physical-address width clear.
fn pdpte_valid(c: &Context, pdpte: u64) -> bool {
    pdpte & 1 == 0 || pdpte & 0x1e6 == 0 && !c.caps.beyond_physical(pdpte)
}
