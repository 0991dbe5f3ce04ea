//! The nestd daemon: VM registry, gRPC services, metrics, configuration.
//!
//! The binary is [`Daemon`] with a configuration and a signal; nestctl runs the same [`Daemon`] in its own process.

pub mod api;
pub mod config;
mod error;
pub mod logging;
mod metrics;
mod registry;
mod server;
mod socket;
pub mod units;

pub use server::{Daemon, ServeError};
pub use socket::{Socket, SocketError};
