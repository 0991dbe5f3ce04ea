//! The nested-VMX emulation.

mod activity;
pub mod caps;
pub mod entry;
pub mod exit;
mod instr;
mod intercept;
mod msr_lists;
mod state;
#[cfg(test)]
mod tests;
mod timer;
mod translations;
pub mod vmcs12;

pub use exit::ExitInfo;
pub(crate) use instr::select;
pub(crate) use intercept::{DescriptorTable, IoAccess, SystemSegment, TaskSwitchSource};
pub use state::{Controls, InvalidVmxState, NO_POINTER, Vmx, VmxState};
