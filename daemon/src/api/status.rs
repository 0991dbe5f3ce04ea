//! Errors as gRPC statuses, with google.rpc details that programs can read.

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

use crate::error::Error;

const DOMAIN: &str = "nestd.v1";

impl From<Error> for Status {
    fn from(error: Error) -> Self {
        let (code, reason) = match &error {
            Error::NoSuchVm { .. } => (Code::NotFound, "NO_SUCH_VM"),
            Error::NoSuchVcpu { .. } => (Code::NotFound, "NO_SUCH_VCPU"),
            Error::NameTaken { .. } => (Code::AlreadyExists, "NAME_TAKEN"),
            Error::Field { .. } => (Code::InvalidArgument, "FIELD"),
            Error::Limit { .. } => (Code::ResourceExhausted, "LIMIT"),
            Error::WrongState { .. } => (Code::FailedPrecondition, "WRONG_STATE"),
            Error::NotNested { .. } => (Code::FailedPrecondition, "NOT_NESTED"),
            Error::Preflight(_) => (Code::FailedPrecondition, "PREFLIGHT"),
            Error::Unsupported(_) => (Code::FailedPrecondition, "UNSUPPORTED"),
            Error::Timeout { .. } => (Code::DeadlineExceeded, "TIMEOUT"),
            Error::Closing => (Code::Unavailable, "CLOSING"),
            Error::Host { .. } => (Code::Internal, "HOST"),
        };
        let mut metadata: Vec<(&str, String)> = match &error {
            Error::NoSuchVm { vm } | Error::NameTaken { vm } | Error::NotNested { vm } => vec![("vm", vm.clone())],
            Error::NoSuchVcpu { vm, vcpu, .. } => vec![("vm", vm.clone()), ("vcpu", vcpu.to_string())],
            Error::Field { field, .. } => vec![("field", field.clone())],
            Error::Limit { limit, allowed, wanted } => {
                vec![("limit", (*limit).into()), ("allowed", allowed.to_string()), ("wanted", wanted.to_string())]
            }
            Error::WrongState { vm, state, legal, .. } => {
                vec![("vm", vm.clone()), ("state", (*state).into()), ("legal", (*legal).into())]
            }
            Error::Preflight(e) => {
                vec![("missing", e.to_string()), ("alternative", e.alternative().to_string())]
            }
            Error::Timeout { vm, .. } | Error::Host { vm, .. } => vec![("vm", vm.clone())],
            Error::Unsupported(_) | Error::Closing => Vec::new(),
        };
        metadata.extend(error.hint().map(|hint| ("hint", hint)));
        let metadata: std::collections::HashMap<String, String> =
            metadata.into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
        let mut details = ErrorDetails::with_error_info(reason, DOMAIN, metadata);
        match &error {
            Error::Field { field, reason } => {
                details.add_bad_request_violation(field, reason);
            }
            Error::Limit { limit, .. } => {
                details.add_quota_failure_violation(*limit, error.to_string());
            }
            Error::WrongState { vm, .. } => {
                details.add_precondition_failure_violation(reason, vm, error.to_string());
            }
            _ => {}
        }
        Status::with_error_details(code, full_text(&error), details)
    }
}

/// The error with its causes: a status has no chain.
fn full_text(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(source) = cause {
        text += &format!(": {source}");
        cause = source.source();
    }
    text
}
