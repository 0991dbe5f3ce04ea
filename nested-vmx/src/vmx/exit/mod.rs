//! VM exits.

pub mod reasons;
