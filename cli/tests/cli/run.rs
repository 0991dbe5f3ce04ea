//! `nestctl run`: the guest's console and exit status.

use std::{
    io::{BufRead, BufReader},
    process::{Command, Stdio},
};

use crate::rig::{File, Server, command, guest, nestctl, stderr, stdout};

#[test]
fn the_guests_console_and_exit_status_are_the_commands() {
    let image = File::new(guest::HELLO);
    let args = ["run", "--kernel", image.text(), "--flat", "0x7c00", "--nested", "emulated", "--memory", "2M"];
    let output = nestctl(&args);
    assert_eq!((output.status.code(), stdout(&output).as_str()), (Some(0x10 << 1 | 1), "hi\n"), "{}", stderr(&output));
    // The same on a daemon that is named, which is left without the VM.
    let server = Server::start();
    let output = server.nestctl(&args);
    assert_eq!((output.status.code(), stdout(&output).as_str()), (Some(0x10 << 1 | 1), "hi\n"), "{}", stderr(&output));
    assert_eq!(server.json(&["vm", "list"])["vms"], serde_json::json!([]));
}

#[test]
fn a_guest_that_does_not_end_is_stopped_by_the_timeout() {
    let image = File::new(guest::SPIN);
    let output =
        nestctl(&["run", "--kernel", image.text(), "--flat", "0x7c00", "--nested", "emulated", "--timeout", "100ms"]);
    assert_eq!(output.status.code(), Some(124), "{}", stderr(&output));
}

#[test]
fn sigterm_stops_the_machine_and_leaves_nothing_on_the_daemon() {
    let server = Server::start();
    // Says that it runs, and then does for ever.
    let image = File::new(&[&guest::HELLO[..12], guest::SPIN].concat());
    let mut run = command();
    run.args(["--server", &server.address, "run", "--kernel", image.text(), "--flat", "0x7c00"]);
    let mut run = run.args(["--nested", "emulated"]).stdout(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(run.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, "hi\n");
    assert!(Command::new("kill").arg(run.id().to_string()).status().unwrap().success());
    assert_eq!(run.wait().unwrap().code(), Some(130));
    assert_eq!(server.json(&["vm", "list"])["vms"], serde_json::json!([]));
}

#[test]
fn what_cannot_run_exits_126_with_a_hint() {
    let output = nestctl(&["run"]);
    assert_eq!(output.status.code(), Some(126));
    assert!(stderr(&output).contains("--kernel FILE"));
    let output = nestctl(&["run", "--kernel", "/nonexistent"]);
    assert_eq!(output.status.code(), Some(126));
    assert!(stderr(&output).contains("cannot read /nonexistent"));
    // Neither multiboot nor ELF.
    let image = File::new(&[0; 4096]);
    let output = nestctl(&["run", "--kernel", image.text(), "--nested", "emulated"]);
    assert_eq!(output.status.code(), Some(126), "{}", stderr(&output));
}

#[test]
fn a_multiboot_kernel_runs_with_its_command_line_and_initrd() {
    let (l1, l2) = (File::new(nestd_guests::l1(nestd_guests::L1::Demo)), File::new(nestd_guests::l2()));
    let args = ["run", "--kernel", l1.text(), "--initrd", l2.text(), "--append", "apic=x2apic", "--cpus", "2"];
    let output = nestctl(&[&args[..], &["--nested", "emulated", "--pin", "0", "--timeout", "60s"]].concat());
    assert_eq!(output.status.code(), Some(1), "{}{}", stdout(&output), stderr(&output));
    let console = stdout(&output);
    assert!(
        console.contains("local APIC in x2APIC mode") && console.contains("L2: second processor is up"),
        "{console}"
    );
}
