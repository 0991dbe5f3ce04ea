//! What went wrong, and what to do about it.

use std::fmt;

use nestd::api::code_name;
use nestd_proto::v1;
use tonic_types::StatusExt;

/// Exit status of failures of nestctl itself. Even, because odd ones belong to guests (see `run --help`).
pub const FAILED: u8 = 126;

/// Exit status after SIGINT or SIGTERM, as shells have it.
pub const INTERRUPTED: u8 = 130;

/// A failed command.
#[derive(Debug)]
pub struct Failure {
    pub message: String,
    pub hint: Option<String>,
    /// The gRPC status code's name, if the daemon refused.
    pub code: Option<&'static str>,
    pub exit: u8,
}

impl Failure {
    pub fn new(message: impl Into<String>) -> Self {
        Self { message: message.into(), hint: None, code: None, exit: 1 }
    }

    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    pub fn exit(mut self, exit: u8) -> Self {
        self.exit = exit;
        self
    }

    /// For `--output json`: one object on standard error.
    pub fn to_json(&self) -> serde_json::Value {
        serde_json::json!({ "error": { "message": self.message, "hint": self.hint, "code": self.code } })
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.message.fmt(f)
    }
}

impl From<tonic::Status> for Failure {
    fn from(status: tonic::Status) -> Self {
        let hint = status.get_details_error_info().and_then(|info| info.metadata.get("hint").cloned());
        let hint = hint.or_else(|| match status.code() {
            tonic::Code::Unavailable => Some("is nestd still running?".into()),
            tonic::Code::Unimplemented => Some("nestctl and nestd are of different versions".into()),
            _ => None,
        });
        let code = code_name(status.code());
        let message = if status.message().is_empty() { code } else { status.message() };
        Self { message: message.into(), hint, code: Some(code), exit: 1 }
    }
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        Self::new(error.to_string())
    }
}

impl From<serde_json::Error> for Failure {
    fn from(error: serde_json::Error) -> Self {
        Self::new(format!("cannot write JSON: {error}"))
    }
}

/// What a VM that failed tells its user.
pub fn vm_failed(vm: &v1::Vm) -> Failure {
    let reason = vm.failure.as_ref().map_or("no reason given", |f| f.reason.as_str());
    Failure::new(format!("VM `{}` failed: {reason}", vm.name))
        .hint(format!("`nestctl vm show {}` prints the failed vCPU's state", vm.name))
        .exit(FAILED)
}
