//! CR0, CR4 and RFLAGS (SDM 3, "Control Registers").

use bitfield_struct::bitfield;

#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct Cr0 {
    pub pe: bool,
    pub mp: bool,
    pub em: bool,
    pub ts: bool,
    pub et: bool,
    pub ne: bool,
    #[bits(10)]
    _6: u16,
    pub wp: bool,
    _17: bool,
    pub am: bool,
    #[bits(10)]
    _19: u16,
    pub nw: bool,
    pub cd: bool,
    pub pg: bool,
    #[bits(32)]
    _32: u32,
}

#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct Cr4 {
    pub vme: bool,
    pub pvi: bool,
    pub tsd: bool,
    pub de: bool,
    pub pse: bool,
    pub pae: bool,
    pub mce: bool,
    pub pge: bool,
    pub pce: bool,
    pub osfxsr: bool,
    pub osxmmexcpt: bool,
    pub umip: bool,
    pub la57: bool,
    pub vmxe: bool,
    pub smxe: bool,
    _15: bool,
    pub fsgsbase: bool,
    pub pcide: bool,
    pub osxsave: bool,
    pub kl: bool,
    pub smep: bool,
    pub smap: bool,
    pub pke: bool,
    pub cet: bool,
    pub pks: bool,
    #[bits(39)]
    _25: u64,
}

/// RFLAGS bits.
pub mod rflags {
    pub const CF: u64 = 1 << 0;
    /// Bit 1 always reads 1.
    pub const FIXED1: u64 = 1 << 1;
    pub const PF: u64 = 1 << 2;
    pub const AF: u64 = 1 << 4;
    pub const ZF: u64 = 1 << 6;
    pub const SF: u64 = 1 << 7;
    pub const TF: u64 = 1 << 8;
    pub const IF: u64 = 1 << 9;
    pub const DF: u64 = 1 << 10;
    pub const OF: u64 = 1 << 11;
    pub const IOPL: u64 = 3 << 12;
    pub const NT: u64 = 1 << 14;
    pub const RF: u64 = 1 << 16;
    pub const VM: u64 = 1 << 17;
    pub const AC: u64 = 1 << 18;
    pub const VIF: u64 = 1 << 19;
    pub const VIP: u64 = 1 << 20;
    pub const ID: u64 = 1 << 21;
    /// The arithmetic flags that instructions compute.
    pub const ARITHMETIC: u64 = CF | PF | AF | ZF | SF | OF;
    /// Bits that are neither defined nor fixed to 1: 63:22, 15, 5, 3.
    pub const RESERVED: u64 = !0x3f_ffff | 1 << 15 | 1 << 5 | 1 << 3;
}

/// DR6 and DR7 bits (SDM 3, "Debug Registers").
pub mod dr {
    pub const DR6_BD: u64 = 1 << 13;
    pub const DR6_BS: u64 = 1 << 14;
    pub const DR6_BT: u64 = 1 << 15;
    /// What reads 1 when nothing happened.
    pub const DR6_RESET: u64 = 0xffff_0ff0;
    pub const DR7_GD: u64 = 1 << 13;
    pub const DR7_RESET: u64 = 0x400;
}
