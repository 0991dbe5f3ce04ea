//! The nested-VMX emulation.
