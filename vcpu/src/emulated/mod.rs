//! The emulated engine: the adapter between nested-vmx's processors, vCPU threads and the machine's devices.

pub mod gate;
pub mod schedule;
