//! The VMCS region in guest memory.
//!
//! Layout of revision [`REVISION_ID`] (little-endian), derived from the encodings alone so that a new field never
//! moves an old one:
//!
//! | offset | what |
//! |---|---|
//! | 0 | revision identifier; bit 31 marks a shadow VMCS |
//! | 4 | VMX-abort indicator |
//! | 8 | launch state: 0 clear, 1 launched |
//! | 12..0x100 | reserved, zero |
//! | 0x100 | 16-bit fields, 32 slots for each role |
//! | 0x200 | 32-bit fields, 32 slots for each role |
//! | 0x400 | natural-width fields, 32 slots for each role |
//! | 0x800 | 64-bit fields, 64 slots for each role |

use super::field::Width;
use super::{FIELD_COUNT, Field, Vmcs12, table};

/// VMCS revision identifier: what VMXON and VMPTRLD expect in the first word. Changes with the layout.
pub const REVISION_ID: u32 = 0x6e64_0001;
/// Bit 31 of the first word.
pub const SHADOW_INDICATOR: u32 = 1 << 31;
pub const REGION_BYTES: usize = 4096;
pub const ABORT_INDICATOR_OFFSET: u64 = 4;
pub const LAUNCH_STATE_OFFSET: u64 = 8;
const LAUNCH_STATE: usize = LAUNCH_STATE_OFFSET as usize;

const fn offset(encoding: u16) -> usize {
    let role = (encoding >> 10 & 3) as usize;
    let index = (encoding >> 1 & 0x1ff) as usize;
    let width = Width::of(encoding);
    let (base, slots) = match width {
        Width::W16 => (0x100, 32),
        Width::W32 => (0x200, 32),
        Width::Natural => (0x400, 32),
        Width::W64 => (0x800, 64),
    };
    assert!(index < slots);
    base + (role * slots + index) * width.bytes()
}

const OFFSETS: [u16; FIELD_COUNT] = {
    let mut offsets = [0; FIELD_COUNT];
    let mut i = 0;
    while i < FIELD_COUNT {
        offsets[i] = offset(table::ENCODINGS[i]) as u16;
        i += 1;
    }
    offsets
};

impl Field {
    /// Where the field lies in the region.
    pub fn region_offset(self) -> usize {
        usize::from(OFFSETS[self as usize])
    }
}

impl Vmcs12 {
    /// Reads launch state and fields; the header's first two words are the caller's (VMPTRLD's) concern.
    pub fn load(region: &[u8; REGION_BYTES]) -> Self {
        let mut vmcs = Self { launched: region[LAUNCH_STATE] & 1 != 0, ..Self::default() };
        for &field in Field::ALL {
            let (at, n) = (field.region_offset(), field.width().bytes());
            let mut bytes = [0; 8];
            bytes[..n].copy_from_slice(&region[at..at + n]);
            vmcs.set(field, u64::from_le_bytes(bytes));
        }
        vmcs
    }

    /// Writes launch state and fields over `region`; its first two words stay.
    pub fn store(&self, region: &mut [u8; REGION_BYTES]) {
        region[LAUNCH_STATE..0x100].fill(0);
        region[LAUNCH_STATE] = self.launched.into();
        for &field in Field::ALL {
            let (at, n) = (field.region_offset(), field.width().bytes());
            region[at..at + n].copy_from_slice(&self.get(field).to_le_bytes()[..n]);
        }
    }
}

impl serde::Serialize for Vmcs12 {
    /// As launch state and (encoding, value) pairs, so that a saved one survives new fields.
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let values: Vec<(u16, u64)> = self.iter().filter(|v| v.1 != 0).map(|(f, v)| (f.encoding(), v)).collect();
        serde::Serialize::serialize(&(self.launched, values), serializer)
    }
}

impl<'de> serde::Deserialize<'de> for Vmcs12 {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let (launched, values) = <(bool, Vec<(u16, u64)>) as serde::Deserialize>::deserialize(deserializer)?;
        let mut vmcs = Self { launched, ..Self::default() };
        for (encoding, value) in values {
            let Some((field, super::Part::Full)) = Field::lookup(encoding.into()) else {
                return Err(serde::de::Error::custom(format!("no VMCS field has encoding {encoding:#06x}")));
            };
            vmcs.set(field, value);
        }
        Ok(vmcs)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmx::vmcs12::Part;

    fn filled() -> Vmcs12 {
        let mut vmcs = Vmcs12 { launched: true, ..Vmcs12::default() };
        for (i, &f) in Field::ALL.iter().enumerate() {
            vmcs.set(f, 0x0102_0304_0506_0708_u64.rotate_left(i as u32 * 3) ^ i as u64);
        }
        vmcs
    }

    #[test]
    fn region_round_trip_is_exact_and_fields_do_not_overlap() {
        let vmcs = filled();
        let mut region = [0xa5; REGION_BYTES];
        vmcs.store(&mut region);
        assert_eq!(Vmcs12::load(&region), vmcs);
        assert_eq!(region[..8], [0xa5; 8], "the header's first words stay");
        let mut used = [false; REGION_BYTES];
        for &f in Field::ALL {
            for b in &mut used[f.region_offset()..f.region_offset() + f.width().bytes()] {
                assert!(!std::mem::replace(b, true), "{} overlaps", f.name());
            }
        }
    }

    #[test]
    fn region_offsets_of_this_revision_are_fixed() {
        let expected = [
            (Field::Vpid, 0x100),
            (Field::GuestCsSelector, 0x182),
            (Field::PinControls, 0x200),
            (Field::ExitReason, 0x284),
            (Field::GuestActivityState, 0x34c),
            (Field::Cr0Mask, 0x400),
            (Field::ExitQualification, 0x500),
            (Field::GuestRip, 0x678),
            (Field::HostRip, 0x758),
            (Field::TscOffset, 0x840),
            (Field::VmcsLinkGpa, 0xc00),
        ];
        let actual: Vec<_> = expected.iter().map(|e| (e.0, e.0.region_offset())).collect();
        assert_eq!(actual, expected);
    }

    #[test]
    fn every_field_is_found_by_its_encoding_and_by_nothing_else() {
        for encoding in 0..=0x1_ffffu64 {
            let found = Field::lookup(encoding);
            let full = Field::ALL.iter().find(|f| u64::from(f.encoding()) == encoding & !1);
            match found {
                None => assert!(full.is_none_or(|f| encoding & 1 != 0 && f.width() != Width::W64)),
                Some((f, Part::Full)) => assert_eq!(u64::from(f.encoding()), encoding),
                Some((f, Part::High)) => {
                    assert_eq!((u64::from(f.encoding()) | 1, f.width()), (encoding, Width::W64))
                }
            }
        }
        assert_eq!(Field::lookup(1 << 32 | 0x4402), None);
        assert!(Field::ALL.iter().all(|f| Field::from_name(f.name()) == Some(*f)));
    }

    #[test]
    fn high_part_reads_and_writes_the_upper_half_only() {
        let mut vmcs = Vmcs12::default();
        vmcs.set(Field::TscOffset, 0x1111_2222_3333_4444);
        vmcs.write_part(Field::TscOffset, Part::High, 0xffff_ffff_aaaa_bbbb);
        assert_eq!(vmcs.get(Field::TscOffset), 0xaaaa_bbbb_3333_4444);
        assert_eq!(vmcs.read_part(Field::TscOffset, Part::High), 0xaaaa_bbbb);
        vmcs.set(Field::Vpid, 0x12345);
        assert_eq!(vmcs.get(Field::Vpid), 0x2345);
    }
}
