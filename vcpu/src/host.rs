//! What this host can do, and which engine a VM gets because of it.

use kvm_ioctls::{Cap, Kvm};
use serde::{Deserialize, Serialize};

use crate::spec::{MAX_CPUS, MAX_MEMORY_BYTES, Nested, Scheduler};

/// The KVM this host has (kvm-hosts.md, "Detecting").
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum KvmKind {
    Absent {
        reason: String,
    },
    Intel,
    Amd,
    /// /dev/kvm opens on a CPU without VMX or SVM.
    Pvm,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostLimits {
    pub max_vcpus: u32,
    pub max_memory_bytes: u64,
    /// KVM's own limit; 0 without KVM.
    pub kvm_max_vcpus: u32,
    pub host_memory_bytes: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostReport {
    pub kvm: KvmKind,
    /// Whether the kernel runs VMX for a guest.
    pub kernel_nesting: bool,
    pub kernel_nesting_reason: String,
    /// Host CPUs that this process may use.
    pub cpus: Vec<usize>,
    pub limits: HostLimits,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum EngineKind {
    Kvm,
    Emulated,
}

/// What `nested` came to on this host, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Choice {
    pub engine: EngineKind,
    /// Never [`Nested::Auto`].
    pub nested: Nested,
    pub reason: String,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PreflightError {
    #[error("nested = none needs /dev/kvm: {reason}; nested = emulated runs without it")]
    NoKvm { reason: String },
    #[error("nested = kernel needs a kvm_intel host with nested=1: {reason}; nested = emulated runs on this host")]
    NoKernelNesting { reason: String },
}

impl PreflightError {
    /// What would run here instead.
    pub fn alternative(&self) -> Nested {
        Nested::Emulated
    }
}

/// Looks at the host. Never fails: what is missing is part of the report.
pub fn preflight() -> HostReport {
    let cpus = allowed_cpus();
    let host_memory_bytes = memory_bytes().unwrap_or(0);
    let mut limits =
        HostLimits { max_vcpus: MAX_CPUS, max_memory_bytes: MAX_MEMORY_BYTES, kvm_max_vcpus: 0, host_memory_bytes };
    let kvm = match Kvm::new() {
        Ok(kvm) => kvm,
        Err(e) => {
            let reason = format!("/dev/kvm: {}", std::io::Error::from(e));
            let kernel_nesting_reason = reason.clone();
            return HostReport {
                kvm: KvmKind::Absent { reason },
                kernel_nesting: false,
                kernel_nesting_reason,
                cpus,
                limits,
            };
        }
    };
    limits.kvm_max_vcpus = u32::try_from(kvm.check_extension_int(Cap::MaxVcpus)).unwrap_or(0);
    let kind = kvm_kind();
    let guest_vmx = kvm.get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES).is_ok_and(|cpuid| {
        const VMX: u32 = 1 << 5;
        cpuid.as_slice().iter().any(|e| e.function == 1 && e.ecx & VMX != 0)
    });
    let nested_state = kvm.check_extension(Cap::NestedState);
    let (kernel_nesting, why) = match &kind {
        KvmKind::Intel if !guest_vmx => (false, "kvm_intel is loaded with nested=0"),
        KvmKind::Intel if !nested_state => (false, "this KVM lacks KVM_CAP_NESTED_STATE"),
        KvmKind::Intel => (true, "kvm_intel offers VMX to guests"),
        KvmKind::Amd => (false, "the host CPU is AMD: KVM nests SVM, not VMX"),
        _ => (false, "the host CPU has neither VMX nor SVM (kvm_pvm)"),
    };
    HostReport { kvm: kind, kernel_nesting, kernel_nesting_reason: why.into(), cpus, limits }
}

/// Decides which engine runs a VM. The rule's one home.
pub fn choose_engine(nested: Nested, scheduler: Scheduler, host: &HostReport) -> Result<Choice, PreflightError> {
    let emulated = |reason: String| Choice { engine: EngineKind::Emulated, nested: Nested::Emulated, reason };
    let kvm = |nested, reason: String| Choice { engine: EngineKind::Kvm, nested, reason };
    match nested {
        Nested::None => match &host.kvm {
            KvmKind::Absent { reason } => Err(PreflightError::NoKvm { reason: reason.clone() }),
            _ => Ok(kvm(Nested::None, "nested = none: the host's KVM runs it".into())),
        },
        Nested::Kernel if host.kernel_nesting => {
            Ok(kvm(Nested::Kernel, format!("nested = kernel: {}", host.kernel_nesting_reason)))
        }
        Nested::Kernel => Err(PreflightError::NoKernelNesting { reason: host.kernel_nesting_reason.clone() }),
        Nested::Emulated => Ok(emulated("nested = emulated".into())),
        Nested::Auto if matches!(scheduler, Scheduler::Deterministic { .. }) => {
            Ok(emulated("auto: the deterministic scheduler needs the emulated processor".into()))
        }
        Nested::Auto if host.kernel_nesting => Ok(kvm(Nested::Kernel, format!("auto: {}", host.kernel_nesting_reason))),
        Nested::Auto => Ok(emulated(format!("auto: no nesting in the kernel ({})", host.kernel_nesting_reason))),
    }
}

/// The host CPUs that this process may run on.
pub fn allowed_cpus() -> Vec<usize> {
    use rustix::thread::{CpuSet, sched_getaffinity};
    match sched_getaffinity(None) {
        Ok(set) => (0..CpuSet::MAX_CPU).filter(|&c| set.is_set(c)).collect(),
        Err(_) => (0..std::thread::available_parallelism().map_or(1, |n| n.get())).collect(),
    }
}

/// Which KVM a /dev/kvm on this host is.
pub(crate) fn kvm_kind() -> KvmKind {
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let has = |flag: &str| {
        cpuinfo.lines().filter(|l| l.starts_with("flags")).any(|l| l.split_whitespace().any(|word| word == flag))
    };
    if has("vmx") {
        KvmKind::Intel
    } else if has("svm") {
        KvmKind::Amd
    } else {
        KvmKind::Pvm
    }
}

fn memory_bytes() -> Option<u64> {
    let meminfo = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = meminfo.lines().find_map(|l| l.strip_prefix("MemTotal:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kb| kb << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(kvm: KvmKind, kernel_nesting: bool) -> HostReport {
        HostReport {
            kvm,
            kernel_nesting,
            kernel_nesting_reason: "because".into(),
            cpus: vec![0],
            limits: HostLimits { max_vcpus: 1, max_memory_bytes: 1, kvm_max_vcpus: 0, host_memory_bytes: 1 },
        }
    }

    #[test]
    fn the_engine_follows_what_the_host_can_do() {
        let absent = host(KvmKind::Absent { reason: "gone".into() }, false);
        let pvm = host(KvmKind::Pvm, false);
        let nests = host(KvmKind::Intel, true);
        let engine = |n, h: &HostReport| choose_engine(n, Scheduler::Parallel, h).map(|c| (c.engine, c.nested));
        assert_eq!(engine(Nested::Auto, &absent), Ok((EngineKind::Emulated, Nested::Emulated)));
        assert_eq!(engine(Nested::Auto, &pvm), Ok((EngineKind::Emulated, Nested::Emulated)));
        assert_eq!(engine(Nested::Auto, &nests), Ok((EngineKind::Kvm, Nested::Kernel)));
        assert_eq!(engine(Nested::Kernel, &nests), Ok((EngineKind::Kvm, Nested::Kernel)));
        let replayed = choose_engine(Nested::Auto, Scheduler::Deterministic { seed: 1 }, &nests);
        assert_eq!(replayed.map(|c| c.nested), Ok(Nested::Emulated));
        assert_eq!(engine(Nested::None, &pvm), Ok((EngineKind::Kvm, Nested::None)));
        assert_eq!(engine(Nested::None, &absent), Err(PreflightError::NoKvm { reason: "gone".into() }));
        let refused = engine(Nested::Kernel, &pvm).unwrap_err();
        assert_eq!(refused, PreflightError::NoKernelNesting { reason: "because".into() });
        assert_eq!(refused.alternative(), Nested::Emulated);
        assert!(refused.to_string().contains("nested = emulated runs on this host"));
    }

    #[test]
    fn preflight_describes_this_host() {
        let report = preflight();
        assert!(!report.cpus.is_empty() && report.limits.host_memory_bytes > 0);
        assert!(!report.kernel_nesting_reason.is_empty());
    }
}
