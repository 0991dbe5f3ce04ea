//! The processor.

/// The frequency of the guest's TSC, and of guest time: one tick is one nanosecond. With the virtual clock a
/// retired instruction is one tick.
pub const TSC_HZ: u64 = 1_000_000_000;
