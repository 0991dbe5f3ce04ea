//! The processor.

mod access;
mod apic;
mod block;
mod boot_state;
mod control;
mod debug;
mod decode;
mod deliver;
#[cfg(test)]
mod deliver_tests;
#[cfg(test)]
mod differential;
mod exec;
pub mod flags;
mod fp;
mod frame;
mod mmu;
mod mode;
pub mod model;
mod msr;
pub(crate) mod op;
mod regs;
mod reset;
mod run;
#[cfg(test)]
mod run_tests;
pub mod seg;
mod segload;
mod snapshot;
mod state;
mod stop;
mod task;

pub use boot_state::BootState;
pub(crate) use decode::{Decoded, Selected, Shape};
pub(crate) use deliver::Vectored;
pub use fp::FpState;
pub use mmu::tlb::Access;
pub(crate) use mmu::tlb::ContextKey;
pub(crate) use msr::valid_pat;
#[cfg(test)]
pub(crate) use op::Op;
pub use regs::{Regs, slot};
pub(crate) use run::Boundary;
pub use run::RunExit;
pub use snapshot::{CpuState, InvalidState, Registers};
pub use state::{Cpu, CpuConfig};
pub(crate) use state::{shadow, special};
pub use stop::{Flow, Stop, StopKind};

/// The frequency of the guest's TSC, and of guest time: one tick is one nanosecond. With the virtual clock a
/// retired instruction is one tick.
pub const TSC_HZ: u64 = 1_000_000_000;

/// MAXPHYADDR of the CPU model.
pub const PHYSICAL_ADDRESS_BITS: u32 = 46;
