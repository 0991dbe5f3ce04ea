//! The local APIC (xAPIC and x2APIC).

/// What decides which messages address this APIC; published when it changes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct ApicIdentity {
    pub id: u32,
    /// Logical destination register.
    pub ldr: u32,
    /// Destination format register: true is the flat model (xAPIC only).
    pub flat: bool,
    pub x2apic: bool,
    /// IA32_APIC_BASE.EN: a globally disabled APIC takes no message at all (R22).
    pub enabled: bool,
}
