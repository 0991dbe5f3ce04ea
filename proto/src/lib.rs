//! The public gRPC contract of nestd: generated code, its descriptors, and the JSON mapping.

/// Package `nestd.v1`. The comments of the `.proto` files are the reference.
#[allow(clippy::all)]
pub mod v1 {
    tonic::include_proto!("nestd.v1");
}

pub mod json;
mod label;

pub use label::Label;

/// The compiled `.proto` files with everything they import, for reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
