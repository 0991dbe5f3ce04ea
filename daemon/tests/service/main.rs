//! The daemon over real gRPC on a Unix socket: in this process, and as the real binary.

mod calls;
mod kvm;
mod lifecycle;
mod metrics;
mod process;
mod rig;
mod streams;
