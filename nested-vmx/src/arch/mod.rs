//! Architectural definitions only: no behaviour.

pub mod apic;
pub mod cr;
pub mod descriptor;
pub mod efer;
pub mod exception;
pub mod msr;
pub mod segment;
pub mod vmx;

/// Linear-address bits of 4-level paging.
pub const LINEAR_ADDRESS_BITS: u32 = 48;

/// Whether `address` is canonical: bits 63:47 are equal (SDM 1, "Canonical Addressing").
#[inline(always)]
pub const fn is_canonical(address: u64) -> bool {
    ((address as i64) << (64 - LINEAR_ADDRESS_BITS)) >> (64 - LINEAR_ADDRESS_BITS) == address as i64
}
