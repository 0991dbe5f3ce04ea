//! Compiles the guest images with the compiler that builds this crate, for the host's own target: a guest needs no
//! other rustup target, no nightly and no assembler.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Image, source folder, `mutant` configuration.
const IMAGES: [(&str, &str, Option<&str>); 5] = [
    ("l1-demo", "l1", None),
    ("l1-stays-active", "l1", Some("stays-active")),
    ("l1-ignores-sipi", "l1", Some("ignores-sipi")),
    ("l2", "l2", None),
    ("bench", "bench", None),
];

fn main() {
    println!("cargo::rerun-if-changed=guest");
    println!("cargo::rerun-if-changed=src/exit_code.rs");
    let source = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it")).join("guest");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it"));

    let mut rt = compiler();
    rt.args(["--crate-name", "rt", "--crate-type", "rlib", "-o"]).arg(out.join("librt.rlib"));
    run(rt.arg(source.join("rt/lib.rs")));

    for (image, folder, mutant) in IMAGES {
        let mut rustc = compiler();
        rustc.args(["--crate-name", folder, "--crate-type", "bin"]);
        rustc.args(["--check-cfg", "cfg(mutant, values(\"stays-active\", \"ignores-sipi\"))"]);
        if let Some(mutant) = mutant {
            rustc.args(["--cfg", &format!("mutant=\"{mutant}\"")]);
        }
        rustc.arg("--extern").arg(join("rt=", &out.join("librt.rlib")));
        rustc.args(["-C", "lto=fat"]);
        for argument in ["-nostdlib", "-nostartfiles", "-static", "-no-pie", "-Wl,--build-id=none", "-Wl,--gc-sections"]
        {
            rustc.args(["-C", &format!("link-arg={argument}")]);
        }
        rustc.arg("-C").arg(join("link-arg=-Wl,-T,", &source.join("rt/link.ld")));
        rustc.arg("-o").arg(out.join(format!("{image}.elf")));
        run(rustc.arg(source.join(folder).join("main.rs")));
    }
}

/// rustc with what every guest crate needs. Guests are optimized in every profile of ours: they run on an emulator.
fn compiler() -> Command {
    let mut rustc = Command::new(env::var_os("RUSTC").expect("cargo sets it"));
    rustc.args(["--edition", "2024", "--target", &env::var("HOST").expect("cargo sets it")]);
    rustc.args(["-C", "panic=abort", "-C", "opt-level=2", "-C", "codegen-units=1", "-C", "relocation-model=static"]);
    rustc.args(["-C", "no-vectorize-loops", "-C", "no-vectorize-slp", "-C", "strip=debuginfo"]);
    // Integer code only: without this LLVM copies and zeroes structures through SSE registers.
    rustc.args(["-C", "llvm-args=-force-attribute=noimplicitfloat"]);
    // Interrupts and exceptions use the running stack.
    rustc.args(["-C", "llvm-args=-force-attribute=noredzone"]);
    rustc
}

fn join(prefix: &str, path: &Path) -> std::ffi::OsString {
    let mut joined = std::ffi::OsString::from(prefix);
    joined.push(path);
    joined
}

fn run(command: &mut Command) {
    let status = command.status().unwrap_or_else(|error| panic!("cannot start {command:?}: {error}"));
    assert!(status.success(), "failed: {command:?}");
}
