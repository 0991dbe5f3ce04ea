//! Segment registers (SDM 3, "Segment Descriptors"; access rights as the VMCS holds them).

use bitfield_struct::bitfield;

/// Access rights in the VMCS's format: bits 55:40 of the descriptor (without limit 19:16), and "unusable".
#[bitfield(u32)]
#[derive(PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(transparent)]
pub struct AccessRights {
    #[bits(4)]
    pub kind: u8,
    /// Code or data (not system).
    pub s: bool,
    #[bits(2)]
    pub dpl: u8,
    pub p: bool,
    #[bits(4)]
    _8: u8,
    pub avl: bool,
    /// 64-bit code.
    pub l: bool,
    /// 32-bit operands (code), 32-bit stack, or 4 GiB upper bound.
    pub db: bool,
    /// Limit in pages.
    pub g: bool,
    pub unusable: bool,
    #[bits(15)]
    _17: u16,
}

impl AccessRights {
    /// Bits 11:8 and 31:17.
    pub const RESERVED: u32 = 0xf00 | 0xfffe_0000;
    pub const UNUSABLE: Self = Self::from_bits(1 << 16);
    /// What the VMCS has for each segment in virtual-8086 mode.
    pub const V8086: Self = Self::from_bits(0xf3);

    /// Code segment (only meaningful when `s`).
    pub const fn is_code(self) -> bool {
        self.kind() & 8 != 0
    }

    /// Conforming, when code.
    pub const fn is_conforming(self) -> bool {
        self.kind() & 4 != 0
    }

    /// Expand-down, when data.
    pub const fn is_expand_down(self) -> bool {
        self.kind() & 0xc == 4
    }

    /// Writable data.
    pub const fn is_writable(self) -> bool {
        self.kind() & 0xa == 2
    }

    /// Data, or readable code.
    pub const fn is_readable(self) -> bool {
        self.kind() & 0xa != 8
    }

    pub const fn usable(self) -> bool {
        !self.unusable()
    }

    /// From the high half of a descriptor.
    pub const fn from_descriptor_high(high: u32) -> Self {
        Self::from_bits(high >> 8 & 0xf0ff)
    }
}

/// System descriptor types.
pub mod system {
    pub const TSS16_AVAILABLE: u8 = 1;
    pub const LDT: u8 = 2;
    pub const TSS16_BUSY: u8 = 3;
    pub const CALL_GATE16: u8 = 4;
    pub const TASK_GATE: u8 = 5;
    pub const INTERRUPT_GATE16: u8 = 6;
    pub const TRAP_GATE16: u8 = 7;
    pub const TSS_AVAILABLE: u8 = 9;
    pub const TSS_BUSY: u8 = 11;
    pub const CALL_GATE: u8 = 12;
    pub const INTERRUPT_GATE: u8 = 14;
    pub const TRAP_GATE: u8 = 15;
}
