//! What makes a VM out of processors: vCPU threads and their pinning, the two engines, guest memory, devices
//! and boot protocols.
//!
//! [`vm::Vm`] is the whole API: commands go in, published state and events come out. Nothing here knows of
//! gRPC or tokio.

pub mod boot;
pub mod console;
pub mod counters;
pub mod emulated;
pub mod engine;
pub mod event;
pub mod host;
pub mod kvm;
pub mod machine;
pub mod spec;
#[cfg(test)]
mod testing;
pub mod thread;
pub mod vm;
