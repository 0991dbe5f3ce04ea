//! Segment selectors and descriptors as they lie in memory (SDM 3, "Segment Selectors", "Segment Descriptors").

use super::segment::AccessRights;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Selector(pub u16);

impl Selector {
    /// Selectors 0 to 3.
    pub const fn is_null(self) -> bool {
        self.0 & !3 == 0
    }

    pub const fn rpl(self) -> u8 {
        (self.0 & 3) as u8
    }

    /// TI: the descriptor is in the LDT.
    pub const fn local(self) -> bool {
        self.0 & 4 != 0
    }

    /// Offset of the descriptor in its table.
    pub const fn offset(self) -> u64 {
        (self.0 & !7) as u64
    }

    /// What an exception's error code says of it: index and TI (SDM 3, "Error Code").
    pub const fn error(self) -> u32 {
        (self.0 & !3) as u32
    }

    pub const fn with_rpl(self, rpl: u8) -> Self {
        Self(self.0 & !3 | (rpl & 3) as u16)
    }
}

/// A descriptor of 8 bytes; `upper` is bits 127:64 where a system descriptor or gate has 16.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Descriptor {
    pub lower: u64,
    pub upper: u64,
}

impl Descriptor {
    /// The accessed flag of code and data segments.
    pub const ACCESSED: u64 = 1 << 40;
    /// The busy flag of a TSS.
    pub const BUSY: u64 = 1 << 41;

    pub const fn ar(self) -> AccessRights {
        AccessRights::from_descriptor_high((self.lower >> 32) as u32)
    }

    /// Code or data rather than a system segment or a gate.
    pub const fn s(self) -> bool {
        self.ar().s()
    }

    pub const fn kind(self) -> u8 {
        self.ar().kind()
    }

    pub const fn dpl(self) -> u8 {
        self.ar().dpl()
    }

    pub const fn p(self) -> bool {
        self.ar().p()
    }

    pub const fn is_code(self) -> bool {
        self.s() && self.ar().is_code()
    }

    pub const fn is_conforming_code(self) -> bool {
        self.is_code() && self.ar().is_conforming()
    }

    pub const fn is_writable_data(self) -> bool {
        self.s() && self.ar().is_writable()
    }

    /// Bits 31:0 of the base; system descriptors of 64-bit mode have bits 63:32 in `upper`.
    pub const fn base32(self) -> u64 {
        self.lower >> 16 & 0xff_ffff | self.lower >> 32 & 0xff00_0000
    }

    pub const fn base64(self) -> u64 {
        self.base32() | self.upper << 32
    }

    /// In bytes, granularity applied.
    pub const fn limit(self) -> u32 {
        let limit = (self.lower & 0xffff | self.lower >> 32 & 0xf_0000) as u32;
        if self.ar().g() { limit << 12 | 0xfff } else { limit }
    }

    /// Of a gate: the target's selector.
    pub const fn gate_selector(self) -> Selector {
        Selector((self.lower >> 16) as u16)
    }

    /// Of a gate: the target's offset, 16, 32 or (with `upper`) 64 bits.
    pub const fn gate_offset(self, bits: u32) -> u64 {
        let low = self.lower & 0xffff;
        match bits {
            16 => low,
            32 => low | self.lower >> 32 & 0xffff_0000,
            _ => low | self.lower >> 32 & 0xffff_0000 | self.upper << 32,
        }
    }

    /// Of an interrupt or trap gate in long mode: the interrupt-stack table's entry, 0 for none.
    pub const fn gate_ist(self) -> u8 {
        (self.lower >> 32) as u8 & 7
    }

    /// Of a call gate: parameters to copy.
    pub const fn gate_parameters(self) -> u8 {
        (self.lower >> 32) as u8 & 0x1f
    }
}
