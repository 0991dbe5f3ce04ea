//! IA32_EFER (SDM 3, "Extended Feature Enable Register").

use bitfield_struct::bitfield;

#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct Efer {
    pub sce: bool,
    #[bits(7)]
    _1: u8,
    pub lme: bool,
    _9: bool,
    pub lma: bool,
    pub nxe: bool,
    #[bits(52)]
    _12: u64,
}

impl Efer {
    /// The bits that exist.
    pub const DEFINED: u64 = 1 << 0 | 1 << 8 | 1 << 10 | 1 << 11;
}
