//! What the guests write to the debug-exit port; compiled into the guests and into [`crate`].

/// An 8-bit write here ends the VM. The process exit status by QEMU's convention is `(value << 1) | 1`.
pub const DEBUG_EXIT_PORT: u16 = 0xf4;

/// The guest's job was done.
pub const SUCCESS: u8 = 0x00;
/// L2: its second processor did not show itself in time.
pub const SECOND_PROCESSOR_MISSING: u8 = 0x01;
/// An exception in the guest that reports it.
pub const EXCEPTION: u8 = 0x02;
/// A guest panicked.
pub const PANIC: u8 = 0x03;
/// The machine lacks something the guest needs, or was started with something that it cannot use.
pub const UNSUPPORTED: u8 = 0x04;
/// L1: VMLAUNCH or VMRESUME failed.
pub const VM_ENTRY_FAILED: u8 = 0x05;
/// L1: a VM exit that it does not handle.
pub const UNEXPECTED_EXIT: u8 = 0x06;
