//! The nested-VMX emulation.

pub mod caps;
pub mod entry;
pub mod exit;
pub mod vmcs12;

/// A VM exit on its way: what the exit fields will say (SDM 3, "VM-Exit Information Fields").
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ExitInfo {
    pub reason: u16,
    pub qualification: u64,
    pub guest_linear: u64,
    pub guest_physical: u64,
    pub instruction_length: u32,
    pub instruction_information: u32,
}
