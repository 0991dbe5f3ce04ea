//! Structured logs on standard error.

use tracing_subscriber::{EnvFilter, filter::ParseError, fmt};

use crate::config::{Log, LogFormat};

/// Call once, first thing in a binary.
pub fn init(log: &Log) -> Result<(), ParseError> {
    let filter: EnvFilter = log.filter.parse()?;
    let builder = fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match log.format {
        LogFormat::Text => builder.with_target(false).init(),
        LogFormat::Json => builder.json().flatten_event(true).init(),
    }
    Ok(())
}
