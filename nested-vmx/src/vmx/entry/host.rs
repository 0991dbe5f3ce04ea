//! Checks on the host-state area (SDM 3, 27.2.2 to 27.2.4). A failure is VM-instruction error 8.

use super::{Check, host_check as check};
use crate::arch::cr::Cr4;
use crate::arch::efer::Efer;
use crate::cpu::valid_pat;
use crate::vmx::vmcs12::Field as F;

const REGISTERS: &str = "27.2.2";
const SEGMENTS: &str = "27.2.3";
const ADDRESS_SPACE: &str = "27.2.4";

const SELECTORS: &[F] = &[
    F::HostEsSelector,
    F::HostCsSelector,
    F::HostSsSelector,
    F::HostDsSelector,
    F::HostFsSelector,
    F::HostGsSelector,
    F::HostTrSelector,
];

pub(super) const CHECKS: &[Check] = &[
    check(200, "host-cr0", &[F::HostCr0], REGISTERS, |c| c.caps.cr0_permitted(c.get(F::HostCr0), false)),
    check(201, "host-cr4", &[F::HostCr4], REGISTERS, |c| c.caps.cr4_permitted(c.get(F::HostCr4))),
    check(202, "host-cr3", &[F::HostCr3], REGISTERS, |c| c.within_physical(F::HostCr3)),
    check(203, "host-sysenter-esp", &[F::HostSysenterEsp], REGISTERS, |c| c.canonical(F::HostSysenterEsp)),
    check(204, "host-sysenter-eip", &[F::HostSysenterEip], REGISTERS, |c| c.canonical(F::HostSysenterEip)),
    check(205, "host-pat", &[F::HostPat, F::ExitControls], REGISTERS, |c| {
        !c.exit.load_pat() || valid_pat(c.get(F::HostPat))
    }),
    check(206, "host-efer-reserved", &[F::HostEfer, F::ExitControls], REGISTERS, |c| {
        !c.exit.load_efer() || c.get(F::HostEfer) & !Efer::DEFINED == 0
    }),
    check(207, "host-efer-mode", &[F::HostEfer, F::ExitControls], REGISTERS, |c| {
        let efer = Efer::from_bits(c.get(F::HostEfer));
        let long = c.exit.host_address_space_size();
        !c.exit.load_efer() || efer.lma() == long && efer.lme() == long
    }),
    check(220, "host-selector-rpl-ti", SELECTORS, SEGMENTS, |c| SELECTORS.iter().all(|&s| c.get(s) & 7 == 0)),
    check(221, "host-cs-null", &[F::HostCsSelector], SEGMENTS, |c| c.get(F::HostCsSelector) != 0),
    check(222, "host-tr-null", &[F::HostTrSelector], SEGMENTS, |c| c.get(F::HostTrSelector) != 0),
    check(223, "host-ss-null", &[F::HostSsSelector, F::ExitControls], SEGMENTS, |c| {
        c.exit.host_address_space_size() || c.get(F::HostSsSelector) != 0
    }),
    check(224, "host-fs-base", &[F::HostFsBase], SEGMENTS, |c| c.canonical(F::HostFsBase)),
    check(225, "host-gs-base", &[F::HostGsBase], SEGMENTS, |c| c.canonical(F::HostGsBase)),
    check(226, "host-gdtr-base", &[F::HostGdtrBase], SEGMENTS, |c| c.canonical(F::HostGdtrBase)),
    check(227, "host-idtr-base", &[F::HostIdtrBase], SEGMENTS, |c| c.canonical(F::HostIdtrBase)),
    check(228, "host-tr-base", &[F::HostTrBase], SEGMENTS, |c| c.canonical(F::HostTrBase)),
    check(240, "address-space-outside-ia32e", &[F::ExitControls, F::EntryControls], ADDRESS_SPACE, |c| {
        c.host_lma || !c.entry.ia32e_mode_guest() && !c.exit.host_address_space_size()
    }),
    check(241, "address-space-in-ia32e", &[F::ExitControls], ADDRESS_SPACE, |c| {
        !c.host_lma || c.exit.host_address_space_size()
    }),
    // A 64-bit guest of a 32-bit host needs no check of its own: 240 and 241 exclude it.
    check(243, "host-32-with-pcid", &[F::ExitControls, F::HostCr4], ADDRESS_SPACE, |c| {
        c.exit.host_address_space_size() || !Cr4::from_bits(c.get(F::HostCr4)).pcide()
    }),
    check(244, "host-32-rip", &[F::ExitControls, F::HostRip], ADDRESS_SPACE, |c| {
        c.exit.host_address_space_size() || c.get(F::HostRip) >> 32 == 0
    }),
    check(245, "host-64-without-pae", &[F::ExitControls, F::HostCr4], ADDRESS_SPACE, |c| {
        !c.exit.host_address_space_size() || Cr4::from_bits(c.get(F::HostCr4)).pae()
    }),
    check(246, "host-64-rip", &[F::ExitControls, F::HostRip], ADDRESS_SPACE, |c| {
        !c.exit.host_address_space_size() || c.canonical(F::HostRip)
    }),
];
