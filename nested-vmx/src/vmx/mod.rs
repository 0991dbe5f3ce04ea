//! The nested-VMX emulation.

pub mod caps;
pub mod entry;
pub mod exit;
mod intercept;
mod state;
pub mod vmcs12;

pub use exit::ExitInfo;
pub use state::{Controls, NO_POINTER, Vectoring, Vmx};
