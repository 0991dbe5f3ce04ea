//! What can go wrong, as typed values.

use std::fmt;

/// KVM could not create the VM or change its state.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    #[error("cannot open /dev/kvm")]
    Open(#[source] std::io::Error),
    #[error("this host's KVM lacks {name}")]
    MissingCapability { name: &'static str },
    #[error("{what} failed")]
    Ioctl {
        what: &'static str,
        #[source]
        source: std::io::Error,
    },
    #[error("{asked} vCPUs asked for, but KVM on this host allows {limit} in a VM")]
    TooManyVcpus { asked: u32, limit: u32 },
    #[error("guest memory cannot be mapped")]
    Memory(#[source] std::io::Error),
    #[error("no vCPU {index}: the VM has {count}")]
    NoSuchVcpu { index: u32, count: u32 },
}

/// Names the ioctl that failed.
pub(super) fn ioctl<E: Into<std::io::Error>>(what: &'static str) -> impl FnOnce(E) -> KvmError {
    move |source| KvmError::Ioctl { what, source: source.into() }
}

/// Why a vCPU cannot go on. Each fails its VM.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KvmFailure {
    #[error(
        "KVM cannot emulate the instruction at rip {rip:#x} (cs base {cs_base:#x}, cpl {cpl}), bytes {bytes}: \
         internal error, suberror 1"
    )]
    Emulation { rip: u64, cs_base: u64, cpl: u8, bytes: InstructionBytes },
    #[error("KVM internal error, suberror {suberror} ({}), rip {rip:#x}, data {data:x?}", suberror_name(*.suberror))]
    Internal { suberror: u32, data: Vec<u64>, rip: u64 },
    #[error("the processor refused to enter the guest: hardware reason {reason:#x} on host CPU {host_cpu}")]
    FailEntry { reason: u64, host_cpu: u32 },
    #[error("KVM reports hardware exit reason {reason:#x}, which it does not know")]
    UnknownHardwareExit { reason: u64 },
    #[error("KVM cannot reach guest memory at {gpa:#x} ({size:#x} bytes)")]
    MemoryFault { gpa: u64, size: u64 },
    #[error("KVM_RUN returned exit reason {reason} ({name}), which this engine never asks for")]
    UnexpectedExit { reason: u32, name: &'static str },
    #[error("{what} failed: errno {errno} ({})", std::io::Error::from_raw_os_error(*.errno))]
    Ioctl { what: &'static str, errno: i32 },
}

/// The bytes of an instruction that KVM could not emulate; empty if KVM did not supply them.
#[derive(Clone, PartialEq, Eq)]
pub struct InstructionBytes(pub Vec<u8>);

impl fmt::Display for InstructionBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return f.write_str("not supplied");
        }
        for (i, byte) in self.0.iter().enumerate() {
            write!(f, "{}{byte:02x}", if i == 0 { "" } else { " " })?;
        }
        Ok(())
    }
}

impl fmt::Debug for InstructionBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

fn suberror_name(suberror: u32) -> &'static str {
    match suberror {
        kvm_bindings::KVM_INTERNAL_ERROR_EMULATION => "emulation",
        kvm_bindings::KVM_INTERNAL_ERROR_SIMUL_EX => "simultaneous exceptions",
        kvm_bindings::KVM_INTERNAL_ERROR_DELIVERY_EV => "exit while an event was delivered",
        kvm_bindings::KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON => "unexpected hardware exit",
        _ => "unknown",
    }
}
