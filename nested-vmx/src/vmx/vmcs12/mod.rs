//! The VMCS12: L1's VMCS, field by field.
//!
//! The current VMCS lives in the processor as [`Vmcs12`] and is written to its 4 KiB region by VMCLEAR, by VMPTRLD of
//! another and by VMXOFF. The region's layout is guest ABI, versioned by [`REVISION_ID`].

mod field;
mod region;
mod table;

pub use field::{FieldInfo, Part, Role, Width};
pub use region::{ABORT_INDICATOR_OFFSET, LAUNCH_STATE_OFFSET, REGION_BYTES, REVISION_ID, SHADOW_INDICATOR};
pub use table::Field;

use crate::arch::segment::AccessRights;
use crate::arch::vmx::{EntryControls, ExitControls, InterruptionInfo, PinControls, Proc2Controls, ProcControls};
use crate::vmx::caps::Offer;

/// How many fields there are.
pub const FIELD_COUNT: usize = table::ENCODINGS.len();

const NO_FIELD: u8 = u8::MAX;
const SLOTS: usize = 16 * 64;

/// Index of a field's encoding in [`BY_SLOT`]: width, role and the low 6 bits of the index.
const fn slot(encoding: u16) -> usize {
    ((encoding >> 13 & 3) as usize) << 8 | ((encoding >> 10 & 3) as usize) << 6 | (encoding >> 1 & 0x3f) as usize
}

/// Field number by slot.
static BY_SLOT: [u8; SLOTS] = {
    assert!(FIELD_COUNT < NO_FIELD as usize);
    let mut map = [NO_FIELD; SLOTS];
    let mut i = 0;
    while i < FIELD_COUNT {
        let s = slot(table::ENCODINGS[i]);
        assert!(map[s] == NO_FIELD);
        map[s] = i as u8;
        i += 1;
    }
    map
};

impl Field {
    pub const GUEST_SELECTORS: [Self; 8] = [
        Self::GuestEsSelector,
        Self::GuestCsSelector,
        Self::GuestSsSelector,
        Self::GuestDsSelector,
        Self::GuestFsSelector,
        Self::GuestGsSelector,
        Self::GuestLdtrSelector,
        Self::GuestTrSelector,
    ];
    pub const GUEST_BASES: [Self; 8] = [
        Self::GuestEsBase,
        Self::GuestCsBase,
        Self::GuestSsBase,
        Self::GuestDsBase,
        Self::GuestFsBase,
        Self::GuestGsBase,
        Self::GuestLdtrBase,
        Self::GuestTrBase,
    ];
    pub const GUEST_LIMITS: [Self; 8] = [
        Self::GuestEsLimit,
        Self::GuestCsLimit,
        Self::GuestSsLimit,
        Self::GuestDsLimit,
        Self::GuestFsLimit,
        Self::GuestGsLimit,
        Self::GuestLdtrLimit,
        Self::GuestTrLimit,
    ];
    pub const GUEST_ACCESS_RIGHTS: [Self; 8] = [
        Self::GuestEsAccessRights,
        Self::GuestCsAccessRights,
        Self::GuestSsAccessRights,
        Self::GuestDsAccessRights,
        Self::GuestFsAccessRights,
        Self::GuestGsAccessRights,
        Self::GuestLdtrAccessRights,
        Self::GuestTrAccessRights,
    ];
    pub const GUEST_PDPTES: [Self; 4] = [Self::GuestPdpte0, Self::GuestPdpte1, Self::GuestPdpte2, Self::GuestPdpte3];
    pub const CR3_TARGETS: [Self; 4] = [Self::Cr3Target0, Self::Cr3Target1, Self::Cr3Target2, Self::Cr3Target3];

    #[inline(always)]
    pub const fn encoding(self) -> u16 {
        table::ENCODINGS[self as usize]
    }

    pub fn info(self) -> &'static FieldInfo {
        &table::INFO[self as usize]
    }

    /// The stable name of the API and the command line, for instance `guest_rip`.
    pub fn name(self) -> &'static str {
        self.info().name
    }

    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|f| f.name() == name)
    }

    pub const fn width(self) -> Width {
        Width::of(self.encoding())
    }

    pub const fn role(self) -> Role {
        Role::of(self.encoding())
    }

    /// The field that a VMREAD or VMWRITE operand names. The access type (bit 0) exists for 64-bit fields only.
    pub fn lookup(encoding: u64) -> Option<(Self, Part)> {
        let full = u16::try_from(encoding & !1).ok()?;
        let number = BY_SLOT[slot(full)];
        let field = *Self::ALL.get(usize::from(number))?;
        if field.encoding() != full {
            return None;
        }
        match (encoding & 1, field.width()) {
            (0, _) => Some((field, Part::Full)),
            (_, Width::W64) => Some((field, Part::High)),
            _ => None,
        }
    }

    /// [`Field::lookup`], restricted to the fields that a processor with this offer has.
    pub fn lookup_offered(encoding: u64, offer: &Offer) -> Option<(Self, Part)> {
        Self::lookup(encoding).filter(|(field, _)| (field.info().exists)(offer))
    }
}

/// A guest segment register as the VMCS holds it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GuestSegment {
    pub selector: u16,
    pub base: u64,
    pub limit: u32,
    pub rights: AccessRights,
}

/// Index of a segment register in the VMCS's order.
pub mod segment_index {
    pub const ES: usize = 0;
    pub const CS: usize = 1;
    pub const SS: usize = 2;
    pub const DS: usize = 3;
    pub const FS: usize = 4;
    pub const GS: usize = 5;
    pub const LDTR: usize = 6;
    pub const TR: usize = 7;
}

/// A VMCS, cached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vmcs12 {
    values: [u64; FIELD_COUNT],
    /// Launch state: set by VMLAUNCH, cleared by VMCLEAR.
    pub launched: bool,
}

impl Default for Vmcs12 {
    fn default() -> Self {
        Self { values: [0; FIELD_COUNT], launched: false }
    }
}

impl Vmcs12 {
    #[inline(always)]
    pub fn get(&self, field: Field) -> u64 {
        self.values[field as usize]
    }

    #[inline(always)]
    pub fn get32(&self, field: Field) -> u32 {
        self.get(field) as u32
    }

    #[inline(always)]
    pub fn get16(&self, field: Field) -> u16 {
        self.get(field) as u16
    }

    /// Keeps the bits that the field has.
    #[inline(always)]
    pub fn set(&mut self, field: Field, value: u64) {
        self.values[field as usize] = value & field.width().mask();
    }

    /// As VMREAD sees it.
    pub fn read_part(&self, field: Field, part: Part) -> u64 {
        match part {
            Part::Full => self.get(field),
            Part::High => self.get(field) >> 32,
        }
    }

    /// As VMWRITE does it.
    pub fn write_part(&mut self, field: Field, part: Part, value: u64) {
        let value = match part {
            Part::Full => value,
            Part::High => self.get(field) & 0xffff_ffff | value << 32,
        };
        self.set(field, value);
    }

    /// All fields with their values, for the API.
    pub fn iter(&self) -> impl Iterator<Item = (Field, u64)> + '_ {
        Field::ALL.iter().map(|&f| (f, self.get(f)))
    }

    pub fn pin(&self) -> PinControls {
        PinControls::from_bits(self.get32(Field::PinControls))
    }

    pub fn proc(&self) -> ProcControls {
        ProcControls::from_bits(self.get32(Field::ProcControls))
    }

    /// The secondary controls in force: all clear when the primary controls do not activate them.
    pub fn proc2(&self) -> Proc2Controls {
        if self.proc().secondary_controls() {
            Proc2Controls::from_bits(self.get32(Field::Proc2Controls))
        } else {
            Proc2Controls::new()
        }
    }

    pub fn exit_controls(&self) -> ExitControls {
        ExitControls::from_bits(self.get32(Field::ExitControls))
    }

    pub fn entry_controls(&self) -> EntryControls {
        EntryControls::from_bits(self.get32(Field::EntryControls))
    }

    pub fn injection(&self) -> InterruptionInfo {
        InterruptionInfo::from_bits(self.get32(Field::EntryInterruptionInfo))
    }

    /// By [`segment_index`]; an index past TR reads TR.
    pub fn guest_segment(&self, index: usize) -> GuestSegment {
        let index = index.min(segment_index::TR);
        GuestSegment {
            selector: self.get16(Field::GUEST_SELECTORS[index]),
            base: self.get(Field::GUEST_BASES[index]),
            limit: self.get32(Field::GUEST_LIMITS[index]),
            rights: AccessRights::from_bits(self.get32(Field::GUEST_ACCESS_RIGHTS[index])),
        }
    }

    pub fn set_guest_segment(&mut self, index: usize, segment: GuestSegment) {
        let index = index.min(segment_index::TR);
        self.set(Field::GUEST_SELECTORS[index], segment.selector.into());
        self.set(Field::GUEST_BASES[index], segment.base);
        self.set(Field::GUEST_LIMITS[index], segment.limit.into());
        self.set(Field::GUEST_ACCESS_RIGHTS[index], segment.rights.into_bits().into());
    }
}
