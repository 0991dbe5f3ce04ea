//! Both real binaries together.

use std::{
    io::{BufRead, BufReader},
    path::Path,
    process::{Command, Stdio},
};

use crate::rig::{File, command, guest, json, ok};

#[test]
fn nestctl_steers_a_vm_of_the_nestd_that_runs_beside_it() {
    // A test of the workspace builds nestd; one of nestctl alone may not.
    let nestd = Path::new(env!("CARGO_BIN_EXE_nestctl")).with_file_name("nestd");
    if !nestd.exists() {
        println!("skipped: no nestd beside nestctl; test the workspace, or build nestd");
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let address = format!("unix:{}", directory.path().join("nestd.sock").display());
    let mut daemon = Command::new(nestd)
        .args(["--listen", &address, "--metrics", "off", "--state-dir"])
        .arg(directory.path())
        .env_remove("NESTD_LOG")
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut log = BufReader::new(daemon.stderr.take().unwrap()).lines();
    assert!(log.any(|line| line.unwrap().contains("serves")), "the daemon does not serve");

    let nestctl = |args: &[&str]| ok(command().args(["--server", &address]).args(args).output().unwrap());
    let image = File::new(guest::SPIN);
    nestctl(&["vm", "create", "a", "--kernel", image.text(), "--flat", "0x7c00", "--nested", "emulated"]);
    nestctl(&["vm", "start", "a"]);
    assert_eq!(json(&nestctl(&["vm", "show", "a", "--output", "json"]))["state"], "VM_STATE_RUNNING");
    let demo = nestctl(&["demo", "--apic", "xapic"]);
    assert!(demo.contains("All nine steps were seen"), "{demo}");

    assert!(Command::new("kill").arg(daemon.id().to_string()).status().unwrap().success());
    assert!(log.any(|line| line.unwrap().contains("nestd ends")));
    assert!(daemon.wait().unwrap().success());
}
