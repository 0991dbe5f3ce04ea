//! What can go wrong with a request, free of any transport.

use nestd_vcpu::{engine::EngineError, host::PreflightError, vm::VmError};

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("there is no VM `{vm}`")]
    NoSuchVm { vm: String },
    #[error("VM `{vm}` has no vCPU {vcpu}: it has {cpus}, numbered from 0")]
    NoSuchVcpu { vm: String, vcpu: u32, cpus: u32 },
    #[error("a VM `{vm}` exists already")]
    NameTaken { vm: String },
    /// `field` is a path in the request.
    #[error("{reason}")]
    Field { field: String, reason: String },
    #[error("{limit} is {allowed}, and this asks for {wanted}")]
    Limit { limit: &'static str, allowed: u64, wanted: u64 },
    #[error("VM `{vm}` is {state}; {wanted} needs one that is {legal}")]
    WrongState { vm: String, state: &'static str, wanted: &'static str, legal: &'static str },
    #[error("VM `{vm}` has no VMX: its nested is none")]
    NotNested { vm: String },
    #[error(transparent)]
    Preflight(PreflightError),
    #[error("this host or build cannot run it: {0}")]
    Unsupported(String),
    #[error("VM `{vm}`: {what} did not happen within {after_ms} ms")]
    Timeout { vm: String, what: &'static str, after_ms: u128 },
    #[error("the daemon is shutting down")]
    Closing,
    #[error("VM `{vm}`: the host refused")]
    Host { vm: String, source: VmError },
}

impl Error {
    pub fn field(field: impl Into<String>, reason: impl std::fmt::Display) -> Self {
        let field = field.into();
        Self::Field { reason: format!("{field}: {reason}"), field }
    }

    /// What the VM layer said about the VM of this name.
    pub fn of_vm(vm: &str, error: VmError) -> Self {
        let vm = vm.to_owned();
        match error {
            VmError::Spec(e) => Self::Field { field: e.field().into(), reason: e.to_string() },
            VmError::Preflight(e) => Self::Preflight(e),
            VmError::WrongState { state, wanted, legal } => Self::WrongState { vm, state, wanted, legal },
            VmError::NoSuchVcpu { vcpu, cpus } => Self::NoSuchVcpu { vm, vcpu, cpus },
            VmError::Timeout { what, after } => Self::Timeout { vm, what, after_ms: after.as_millis() },
            VmError::Engine(EngineError::Boot(reason)) => Self::field("boot", reason),
            VmError::Engine(EngineError::Unsupported(reason)) => Self::Unsupported(reason),
            source @ (VmError::Engine(_) | VmError::Thread(_) | VmError::Pin { .. }) => Self::Host { vm, source },
        }
    }

    /// What to do about it.
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            Self::NoSuchVm { .. } => "`nestctl vm list` shows the VMs there are".into(),
            Self::NoSuchVcpu { vm, .. } => format!("`nestctl vcpu list {vm}` shows its vCPUs"),
            Self::NameTaken { vm } => format!("take another name, or `nestctl vm delete {vm}` first"),
            Self::Limit { .. } => {
                "delete VMs that are no longer needed, or raise [limits] in nestd's configuration".into()
            }
            Self::WrongState { vm, state, .. } => match *state {
                "created" => format!("`nestctl vm start {vm}` lets it run"),
                "running" => format!("`nestctl vm pause {vm}` or `nestctl vm stop {vm}` changes that"),
                "paused" => format!("`nestctl vm resume {vm}` lets it run on"),
                _ => format!("it has ended: `nestctl vm show {vm}` says how; delete it and create it again"),
            },
            Self::NotNested { .. } => "create it with nested = emulated (--nested emulated)".into(),
            Self::Preflight(e) => {
                let other = e.alternative();
                format!("nested = {other} runs here: ask for it with --nested {other}; `nestctl host` says why")
            }
            Self::Timeout { .. } => "the host may be overloaded; try again, or allow more time".into(),
            Self::Field { .. } | Self::Unsupported(_) | Self::Closing | Self::Host { .. } => return None,
        })
    }
}
