//! One file for each command.

pub mod events;
pub mod generate;
pub mod host;
pub mod run;
pub mod vcpu;
pub mod vm;
pub mod vmcs12;
