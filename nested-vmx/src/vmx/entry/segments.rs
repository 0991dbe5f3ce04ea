//! Checks on guest segment registers (SDM 3, 27.3.1.2). A failure is exit reason 33. The id of a check on one of
//! several registers is the rule's first id plus the register's index (ES, CS, SS, DS, FS, GS, LDTR, TR).

use super::{Check, Context, guest_check as check};
use crate::arch::segment::{AccessRights, system};
use crate::vmx::vmcs12::segment_index::{CS, DS, ES, FS, GS, LDTR, SS, TR};
use crate::vmx::vmcs12::{Field as F, GuestSegment};

const SECTION: &str = "27.3.1.2";

/// One check for each register named.
macro_rules! each {
    ($first_id:literal, $rule:literal, $field:ident, $holds:ident, [$($text:literal $segment:ident),*]) => {
        &[$(check(
            $first_id + $segment as u16,
            concat!("guest-", $text, "-", $rule),
            &[F::$field[$segment]],
            SECTION,
            |c| $holds(c, $segment),
        )),*]
    };
}

/// Flattens tables of checks at compile time.
const fn concat<const N: usize>(tables: &[&'static [Check]]) -> [Check; N] {
    const NONE: Check = check(0, "", &[], SECTION, |_| true);
    let mut all = [NONE; N];
    let (mut t, mut n) = (0, 0);
    while t < tables.len() {
        let mut i = 0;
        while i < tables[t].len() {
            let c = &tables[t][i];
            all[n] = Check {
                id: c.id,
                name: c.name,
                fields: c.fields,
                section: c.section,
                failure: c.failure,
                holds: c.holds,
            };
            n += 1;
            i += 1;
        }
        t += 1;
    }
    assert!(n == N);
    all
}

pub(super) const SELECTORS: &[Check] = &[
    check(350, "guest-tr-selector-ti", &[F::GuestTrSelector], SECTION, |c| c.get(F::GuestTrSelector) & 4 == 0),
    check(351, "guest-ldtr-selector-ti", &[F::GuestLdtrSelector, F::GuestLdtrAccessRights], SECTION, |c| {
        !usable(c, LDTR) || c.get(F::GuestLdtrSelector) & 4 == 0
    }),
    check(352, "guest-ss-selector-rpl", &[F::GuestSsSelector, F::GuestCsSelector], SECTION, |c| {
        c.virtual_8086() || c.unrestricted() || c.get(F::GuestSsSelector) & 3 == c.get(F::GuestCsSelector) & 3
    }),
];

const V8086_BASES: &[Check] = each!(360, "base-v8086", GUEST_BASES, v8086_base,
    ["es" ES, "cs" CS, "ss" SS, "ds" DS, "fs" FS, "gs" GS]);
const CANONICAL_BASES: &[Check] = &[
    check(366, "guest-tr-base", &[F::GuestTrBase], SECTION, |c| c.canonical(F::GuestTrBase)),
    check(367, "guest-fs-base", &[F::GuestFsBase], SECTION, |c| c.canonical(F::GuestFsBase)),
    check(368, "guest-gs-base", &[F::GuestGsBase], SECTION, |c| c.canonical(F::GuestGsBase)),
    check(369, "guest-ldtr-base", &[F::GuestLdtrBase, F::GuestLdtrAccessRights], SECTION, |c| {
        !usable(c, LDTR) || c.canonical(F::GuestLdtrBase)
    }),
];
const LOW_BASES: &[Check] = each!(370, "base-high", GUEST_BASES, low_base,
    ["cs" CS, "ss" SS, "ds" DS, "es" ES]);
pub(super) const BASES: &[Check] = &concat::<14>(&[V8086_BASES, CANONICAL_BASES, LOW_BASES]);

pub(super) const LIMITS: &[Check] = each!(380, "limit-v8086", GUEST_LIMITS, v8086_limit,
    ["es" ES, "cs" CS, "ss" SS, "ds" DS, "fs" FS, "gs" GS]);

const V8086_RIGHTS: &[Check] = each!(390, "rights-v8086", GUEST_ACCESS_RIGHTS, v8086_rights,
    ["es" ES, "cs" CS, "ss" SS, "ds" DS, "fs" FS, "gs" GS]);
const TYPES: &[Check] = &concat::<6>(&[
    each!(400, "type", GUEST_ACCESS_RIGHTS, code_type, ["cs" CS]),
    each!(400, "type", GUEST_ACCESS_RIGHTS, stack_type, ["ss" SS]),
    each!(400, "type", GUEST_ACCESS_RIGHTS, data_type, ["ds" DS, "es" ES, "fs" FS, "gs" GS]),
]);
const S: &[Check] = each!(410, "s", GUEST_ACCESS_RIGHTS, not_system,
    ["cs" CS, "ss" SS, "ds" DS, "es" ES, "fs" FS, "gs" GS]);
const DPLS: &[Check] = &concat::<7>(&[
    each!(420, "dpl", GUEST_ACCESS_RIGHTS, code_dpl, ["cs" CS]),
    each!(420, "dpl-rpl", GUEST_ACCESS_RIGHTS, stack_dpl_is_rpl, ["ss" SS]),
    &[check(426, "guest-ss-dpl-zero", &[F::GuestSsAccessRights, F::GuestCsAccessRights, F::GuestCr0], SECTION, |c| {
        c.virtual_8086() || rights(c, SS).dpl() == 0 || rights(c, CS).kind() != 3 && c.guest_cr0.pe()
    })],
    each!(420, "dpl", GUEST_ACCESS_RIGHTS, data_dpl, ["ds" DS, "es" ES, "fs" FS, "gs" GS]),
]);
const PRESENT: &[Check] = each!(430, "p", GUEST_ACCESS_RIGHTS, present,
    ["cs" CS, "ss" SS, "ds" DS, "es" ES, "fs" FS, "gs" GS]);
const RESERVED_LOW: &[Check] = each!(440, "reserved-11-8", GUEST_ACCESS_RIGHTS, reserved_low,
    ["cs" CS, "ss" SS, "ds" DS, "es" ES, "fs" FS, "gs" GS]);
const CODE_SIZE: &[Check] =
    &[check(451, "guest-cs-d-with-l", &[F::GuestCsAccessRights, F::EntryControls], SECTION, |c| {
        c.virtual_8086() || !c.entry.ia32e_mode_guest() || !(rights(c, CS).l() && rights(c, CS).db())
    })];
const GRANULARITY: &[Check] = each!(460, "g", GUEST_ACCESS_RIGHTS, granularity_or_v8086,
    ["cs" CS, "ss" SS, "ds" DS, "es" ES, "fs" FS, "gs" GS]);
const RESERVED_HIGH: &[Check] = each!(470, "reserved-31-17", GUEST_ACCESS_RIGHTS, reserved_high,
    ["cs" CS, "ss" SS, "ds" DS, "es" ES, "fs" FS, "gs" GS]);
pub(super) const RIGHTS: &[Check] =
    &concat::<50>(&[V8086_RIGHTS, TYPES, S, DPLS, PRESENT, RESERVED_LOW, CODE_SIZE, GRANULARITY, RESERVED_HIGH]);

const TR_RIGHTS: &[F] = &[F::GuestTrAccessRights];
const LDTR_RIGHTS: &[F] = &[F::GuestLdtrAccessRights];

pub(super) const TASK_AND_LOCAL: &[Check] = &[
    check(480, "guest-tr-type", &[F::GuestTrAccessRights, F::EntryControls], SECTION, |c| match rights(c, TR).kind() {
        system::TSS_BUSY => true,
        system::TSS16_BUSY => !c.entry.ia32e_mode_guest(),
        _ => false,
    }),
    check(481, "guest-tr-s", TR_RIGHTS, SECTION, |c| !rights(c, TR).s()),
    check(482, "guest-tr-p", TR_RIGHTS, SECTION, |c| rights(c, TR).p()),
    check(483, "guest-tr-reserved-11-8", TR_RIGHTS, SECTION, |c| rights(c, TR).into_bits() & 0xf00 == 0),
    check(484, "guest-tr-g", &[F::GuestTrAccessRights, F::GuestTrLimit], SECTION, |c| granularity(segment(c, TR))),
    check(485, "guest-tr-unusable", TR_RIGHTS, SECTION, |c| usable(c, TR)),
    check(486, "guest-tr-reserved-31-17", TR_RIGHTS, SECTION, |c| rights(c, TR).into_bits() >> 17 == 0),
    check(490, "guest-ldtr-type", LDTR_RIGHTS, SECTION, |c| !usable(c, LDTR) || rights(c, LDTR).kind() == system::LDT),
    check(491, "guest-ldtr-s", LDTR_RIGHTS, SECTION, |c| !usable(c, LDTR) || !rights(c, LDTR).s()),
    check(492, "guest-ldtr-p", LDTR_RIGHTS, SECTION, |c| !usable(c, LDTR) || rights(c, LDTR).p()),
    check(493, "guest-ldtr-reserved-11-8", LDTR_RIGHTS, SECTION, |c| {
        !usable(c, LDTR) || rights(c, LDTR).into_bits() & 0xf00 == 0
    }),
    check(494, "guest-ldtr-g", &[F::GuestLdtrAccessRights, F::GuestLdtrLimit], SECTION, |c| {
        !usable(c, LDTR) || granularity(segment(c, LDTR))
    }),
    check(495, "guest-ldtr-reserved-31-17", LDTR_RIGHTS, SECTION, |c| {
        !usable(c, LDTR) || rights(c, LDTR).into_bits() >> 17 == 0
    }),
];

fn segment(c: &Context, s: usize) -> GuestSegment {
    c.vmcs.guest_segment(s)
}

fn rights(c: &Context, s: usize) -> AccessRights {
    segment(c, s).rights
}

fn usable(c: &Context, s: usize) -> bool {
    rights(c, s).usable()
}

/// Whether the checks on access rights outside virtual-8086 mode pass over this register: CS is always looked at.
fn exempt(c: &Context, s: usize) -> bool {
    c.virtual_8086() || s != CS && !usable(c, s)
}

fn v8086_base(c: &Context, s: usize) -> bool {
    !c.virtual_8086() || segment(c, s).base == u64::from(segment(c, s).selector) << 4
}

fn low_base(c: &Context, s: usize) -> bool {
    s != CS && !usable(c, s) || segment(c, s).base >> 32 == 0
}

fn v8086_limit(c: &Context, s: usize) -> bool {
    !c.virtual_8086() || segment(c, s).limit == 0xffff
}

fn v8086_rights(c: &Context, s: usize) -> bool {
    !c.virtual_8086() || rights(c, s) == AccessRights::V8086
}

/// Accessed code; with "unrestricted guest" also the accessed read/write data segment of real mode.
fn code_type(c: &Context, s: usize) -> bool {
    c.virtual_8086()
        || match rights(c, s).kind() {
            9 | 11 | 13 | 15 => true,
            3 => c.unrestricted(),
            _ => false,
        }
}

fn stack_type(c: &Context, s: usize) -> bool {
    exempt(c, s) || matches!(rights(c, s).kind(), 3 | 7)
}

/// Accessed, and readable if code.
fn data_type(c: &Context, s: usize) -> bool {
    let kind = rights(c, s).kind();
    exempt(c, s) || kind & 1 != 0 && (kind & 8 == 0 || kind & 2 != 0)
}

fn not_system(c: &Context, s: usize) -> bool {
    exempt(c, s) || rights(c, s).s()
}

fn code_dpl(c: &Context, s: usize) -> bool {
    let (cs, ss) = (rights(c, s), rights(c, SS));
    c.virtual_8086()
        || match cs.kind() {
            3 => cs.dpl() == 0,
            9 | 11 => cs.dpl() == ss.dpl(),
            _ => cs.dpl() <= ss.dpl(),
        }
}

fn stack_dpl_is_rpl(c: &Context, s: usize) -> bool {
    let ss = segment(c, s);
    c.virtual_8086() || c.unrestricted() || u16::from(ss.rights.dpl()) == ss.selector & 3
}

fn data_dpl(c: &Context, s: usize) -> bool {
    let segment = segment(c, s);
    exempt(c, s)
        || c.unrestricted()
        || segment.rights.kind() > 11
        || u16::from(segment.rights.dpl()) >= segment.selector & 3
}

fn present(c: &Context, s: usize) -> bool {
    exempt(c, s) || rights(c, s).p()
}

fn reserved_low(c: &Context, s: usize) -> bool {
    exempt(c, s) || rights(c, s).into_bits() & 0xf00 == 0
}

fn reserved_high(c: &Context, s: usize) -> bool {
    exempt(c, s) || rights(c, s).into_bits() >> 17 == 0
}

fn granularity_or_v8086(c: &Context, s: usize) -> bool {
    exempt(c, s) || granularity(segment(c, s))
}

/// A limit in pages ends in 0xfff; one in bytes has 20 bits.
fn granularity(segment: GuestSegment) -> bool {
    if segment.rights.g() { segment.limit & 0xfff == 0xfff } else { segment.limit >> 20 == 0 }
}
