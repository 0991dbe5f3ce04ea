//! An emulated x86-64 processor with VMX.
//!
//! Pure: no KVM, no I/O, no clock, no threads. The world outside one processor is reached through
//! [`bus::Bus`]; other threads reach a processor through its [`mailbox::Mailbox`].

pub mod apic;
pub mod arch;
pub mod bus;
pub mod cpu;
pub mod event;
pub mod mailbox;
pub mod mem;
#[cfg(test)]
pub(crate) mod testing;
pub mod vmx;
