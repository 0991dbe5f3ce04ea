//! The nested-VMX emulation.

pub mod caps;
pub mod entry;
pub mod exit;
pub mod vmcs12;
