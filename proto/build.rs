//! Compiles the protos with protox, so that no system protoc is needed.

use std::{env, error::Error, fs, path::PathBuf};

use prost::Message;

const PROTOS: [&str; 5] = [
    "nestd/v1/vm.proto",
    "nestd/v1/vcpu.proto",
    "nestd/v1/nested.proto",
    "nestd/v1/events.proto",
    "nestd/v1/host.proto",
];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=nestd");
    let descriptors = protox::compile(PROTOS, ["."])?;
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("cargo sets OUT_DIR")?);
    fs::write(out.join("descriptors.bin"), descriptors.encode_to_vec())?;
    let mut config = prost_build::Config::new();
    config.enable_type_names();
    tonic_prost_build::configure().compile_fds_with_config(descriptors, config)?;
    Ok(())
}
