//! VM exits.

pub mod reasons;

/// A VM exit on its way: what the exit fields will say (SDM 3, "VM-Exit Information Fields").
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ExitInfo {
    pub reason: u16,
    pub qualification: u64,
    pub guest_linear: u64,
    pub guest_physical: u64,
    pub instruction_length: u32,
    pub instruction_information: u32,
    /// VM-exit interruption information and error code.
    pub interruption: u32,
    pub interruption_error_code: u32,
}
