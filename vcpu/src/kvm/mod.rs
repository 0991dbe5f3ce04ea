//! The KVM engine: VMs on the host's KVM, with its in-kernel local APIC, and with its nested VMX where it has one.
//!
//! A [`KvmVcpu`] belongs to one thread, which alone does ioctls on it: from another thread most of them wait until
//! the vCPU leaves `KVM_RUN`, and some change what they read. Other threads have a [`Kicker`] and [`KvmVm::send`],
//! which never wait for a vCPU.
#![allow(unsafe_code)]

mod boot;
mod cpuid;
mod engine;
mod failure;
mod kick;
mod nested;
mod reset;
mod vcpu;
mod vm;

pub(crate) use engine::build;
pub use failure::{InstructionBytes, KvmError, KvmFailure};
pub use kick::{Adopted, Kicker};
pub use nested::VmxState;
pub use vcpu::{Devices, KvmVcpu, Observed, RunOutcome, activity};
pub use vm::{Created, Delivery, KvmVm, MAX_CPUS, Message};

/// Opens /dev/kvm.
fn open() -> std::io::Result<kvm_ioctls::Kvm> {
    kvm_ioctls::Kvm::new().map_err(|e| std::io::Error::from_raw_os_error(e.errno()))
}
