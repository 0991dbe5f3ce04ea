//! What a row of the field table becomes.

use crate::vmx::caps::Offer;

/// Width of a field: bits 14:13 of its encoding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Width {
    W16,
    W64,
    W32,
    Natural,
}

impl Width {
    pub const fn of(encoding: u16) -> Self {
        match encoding >> 13 & 3 {
            0 => Self::W16,
            1 => Self::W64,
            2 => Self::W32,
            _ => Self::Natural,
        }
    }

    pub const fn bytes(self) -> usize {
        match self {
            Self::W16 => 2,
            Self::W32 => 4,
            Self::W64 | Self::Natural => 8,
        }
    }

    pub const fn mask(self) -> u64 {
        match self {
            Self::W16 => 0xffff,
            Self::W32 => 0xffff_ffff,
            Self::W64 | Self::Natural => u64::MAX,
        }
    }
}

/// What a field is for: bits 11:10 of its encoding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    Control,
    /// VM-exit information; read-only unless IA32_VMX_MISC\[29\] says otherwise.
    ExitInfo,
    Guest,
    Host,
}

impl Role {
    pub const fn of(encoding: u16) -> Self {
        match encoding >> 10 & 3 {
            0 => Self::Control,
            1 => Self::ExitInfo,
            2 => Self::Guest,
            _ => Self::Host,
        }
    }
}

/// One row of the table.
pub struct FieldInfo {
    pub encoding: u16,
    /// Stable, for the API and the command line.
    pub name: &'static str,
    /// The SDM's name.
    pub text: &'static str,
    /// Whether a processor with this offer has the field.
    pub exists: fn(&Offer) -> bool,
}

/// How VMREAD or VMWRITE reaches a field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    Full,
    /// Bits 63:32 of a 64-bit field.
    High,
}

macro_rules! vmcs_fields {
    ($($ident:ident = $encoding:literal, $name:literal, $text:literal, $exists:expr;)*) => {
        /// A VMCS field.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(u8)]
        pub enum Field {
            $(#[doc = $text] $ident,)*
        }

        impl Field {
            pub const ALL: &[Self] = &[$(Self::$ident,)*];
        }

        pub(super) static INFO: &[super::field::FieldInfo] = &[
            $(super::field::FieldInfo { encoding: $encoding, name: $name, text: $text, exists: $exists },)*
        ];

        pub(super) const ENCODINGS: &[u16] = &[$($encoding,)*];
    };
}
pub(super) use vmcs_fields;
