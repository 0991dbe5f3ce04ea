//! Segment registers: the visible selector and the hidden descriptor cache.

use crate::arch::segment::AccessRights;
use serde::{Deserialize, Serialize};

/// Numbers of [`super::Cpu::seg`], in the processor's encoding order.
pub mod reg {
    pub const ES: u8 = 0;
    pub const CS: u8 = 1;
    pub const SS: u8 = 2;
    pub const DS: u8 = 3;
    pub const FS: u8 = 4;
    pub const GS: u8 = 5;
    pub const LDTR: u8 = 6;
    pub const TR: u8 = 7;
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Segment {
    pub selector: u16,
    pub base: u64,
    /// In bytes, granularity applied.
    pub limit: u32,
    pub ar: AccessRights,
}

impl Segment {
    /// As real mode and RESET have it.
    pub const fn real(selector: u16, code: bool) -> Self {
        let kind = if code { 0xb } else { 0x3 };
        let ar = AccessRights::new().with_kind(kind).with_s(true).with_p(true);
        Self { selector, base: (selector as u64) << 4, limit: 0xffff, ar }
    }

    /// Whether `len` bytes at `offset` are inside the limit (SDM 3, "Limit Checking").
    #[inline]
    pub fn contains(&self, offset: u64, len: u64) -> bool {
        let last = offset.wrapping_add(len - 1);
        if self.ar.s() && self.ar.is_expand_down() {
            let top = if self.ar.db() { 0xffff_ffff } else { 0xffff };
            offset > u64::from(self.limit) && last <= top && last >= offset
        } else {
            last <= u64::from(self.limit) && last >= offset
        }
    }
}

/// GDTR or IDTR.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TableRegister {
    pub base: u64,
    pub limit: u16,
}
