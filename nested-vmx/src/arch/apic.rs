//! Local APIC registers (SDM 3, "Local APIC", "Extended xAPIC (x2APIC)").

use bitfield_struct::bitfield;

pub const DEFAULT_BASE_GPA: u64 = 0xfee0_0000;

/// IA32_APIC_BASE. The base address is the value with the low 12 bits clear.
pub mod base {
    pub const BSP: u64 = 1 << 8;
    pub const EXTD: u64 = 1 << 10;
    pub const EN: u64 = 1 << 11;
    pub const ADDRESS: u64 = !0xfff;
}

/// Offsets in the xAPIC page.
pub mod offset {
    pub const ID: u16 = 0x020;
    pub const VERSION: u16 = 0x030;
    pub const TPR: u16 = 0x080;
    pub const APR: u16 = 0x090;
    pub const PPR: u16 = 0x0a0;
    pub const EOI: u16 = 0x0b0;
    pub const RRD: u16 = 0x0c0;
    pub const LDR: u16 = 0x0d0;
    pub const DFR: u16 = 0x0e0;
    pub const SVR: u16 = 0x0f0;
    pub const ISR_FIRST: u16 = 0x100;
    pub const ISR_LAST: u16 = 0x170;
    pub const TMR_FIRST: u16 = 0x180;
    pub const TMR_LAST: u16 = 0x1f0;
    pub const IRR_FIRST: u16 = 0x200;
    pub const IRR_LAST: u16 = 0x270;
    pub const ESR: u16 = 0x280;
    pub const ICR_LOW: u16 = 0x300;
    pub const ICR_HIGH: u16 = 0x310;
    pub const LVT_TIMER: u16 = 0x320;
    pub const LVT_THERMAL: u16 = 0x330;
    pub const LVT_PERFORMANCE: u16 = 0x340;
    pub const LVT_LINT0: u16 = 0x350;
    pub const LVT_LINT1: u16 = 0x360;
    pub const LVT_ERROR: u16 = 0x370;
    pub const INITIAL_COUNT: u16 = 0x380;
    pub const CURRENT_COUNT: u16 = 0x390;
    pub const DIVIDE: u16 = 0x3e0;
    /// x2APIC only.
    pub const SELF_IPI: u16 = 0x3f0;
}

/// Error status register.
pub mod esr {
    pub const SEND_ILLEGAL_VECTOR: u32 = 1 << 5;
    pub const RECEIVED_ILLEGAL_VECTOR: u32 = 1 << 6;
    pub const ILLEGAL_REGISTER: u32 = 1 << 7;
}

/// Spurious-interrupt vector register.
pub mod svr {
    pub const ENABLED: u32 = 1 << 8;
    pub const FOCUS_DISABLED: u32 = 1 << 9;
}

/// Delivery modes, as the ICR, the LVT and I/O APIC redirections encode them.
pub mod delivery {
    pub const FIXED: u8 = 0;
    pub const LOWEST_PRIORITY: u8 = 1;
    pub const SMI: u8 = 2;
    pub const NMI: u8 = 4;
    pub const INIT: u8 = 5;
    pub const START_UP: u8 = 6;
    pub const EXT_INT: u8 = 7;
}

/// Timer modes in the timer's LVT entry.
pub mod timer_mode {
    pub const ONE_SHOT: u8 = 0;
    pub const PERIODIC: u8 = 1;
    pub const TSC_DEADLINE: u8 = 2;
}

#[bitfield(u32)]
#[derive(PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Lvt {
    pub vector: u8,
    #[bits(3)]
    pub delivery: u8,
    __: bool,
    pub delivery_status: bool,
    pub active_low: bool,
    pub remote_irr: bool,
    pub level: bool,
    pub masked: bool,
    #[bits(2)]
    pub timer_mode: u8,
    #[bits(13)]
    __: u32,
}

#[bitfield(u64)]
#[derive(PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Icr {
    pub vector: u8,
    #[bits(3)]
    pub delivery: u8,
    pub logical: bool,
    pub delivery_status: bool,
    __: bool,
    pub assert: bool,
    pub level: bool,
    #[bits(2)]
    __: u8,
    /// 0 none, 1 self, 2 all including self, 3 all excluding self.
    #[bits(2)]
    pub shorthand: u8,
    #[bits(12)]
    __: u16,
    /// xAPIC mode: bits 31:24 only.
    pub destination: u32,
}

impl Icr {
    /// Delivery status is ignored on writes; what else is undefined here is #GP in x2APIC mode.
    pub const X2APIC_RESERVED: u64 = 0xfff3_2000;
    pub const DELIVERY_STATUS: u64 = 1 << 12;
}
