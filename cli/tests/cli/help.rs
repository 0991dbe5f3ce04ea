//! What nestctl says of itself, and of mistakes.

use std::process::Stdio;

use crate::rig::{Server, command, json, nestctl, ok, stderr, stdout};

const COMMANDS: [&[&str]; 24] = [
    &["demo"],
    &["run"],
    &["vm"],
    &["vm", "create"],
    &["vm", "start"],
    &["vm", "pause"],
    &["vm", "resume"],
    &["vm", "reset"],
    &["vm", "stop"],
    &["vm", "delete"],
    &["vm", "list"],
    &["vm", "show"],
    &["vm", "console"],
    &["vcpu"],
    &["vcpu", "list"],
    &["vcpu", "show"],
    &["vcpu", "init"],
    &["vcpu", "sipi"],
    &["vcpu", "nmi"],
    &["vcpu", "pin"],
    &["vmcs12"],
    &["events"],
    &["host"],
    &["man"],
];

#[test]
fn every_command_explains_itself() {
    for command in COMMANDS {
        let help = ok(nestctl(&[command, &["--help"]].concat()));
        assert!(help.contains("Usage: nestctl") && help.contains("--server"), "{command:?}: {help}");
    }
    let demo = ok(nestctl(&["demo", "--help"]));
    assert!(demo.contains("INIT, SIPI, SIPI") && demo.contains("--apic") && !demo.contains("--l1"), "{demo}");
    let run = ok(nestctl(&["run", "--help"]));
    assert!(run.contains("(value << 1) | 1") && run.contains("124"), "{run}");
}

#[test]
fn completions_and_man_pages_are_generated() {
    for shell in ["bash", "zsh", "fish"] {
        let script = ok(nestctl(&["completions", shell]));
        assert!(script.contains("nestctl") && script.contains("vmcs12"), "{shell}");
    }
    let directory = tempfile::tempdir().unwrap();
    let pages = directory.path().join("man");
    ok(nestctl(&["man", pages.to_str().unwrap()]));
    for page in ["nestctl.1", "nestctl-demo.1", "nestctl-vcpu-sipi.1"] {
        assert!(std::fs::read_to_string(pages.join(page)).unwrap().contains(".TH"), "{page}");
    }
}

#[test]
fn an_unreachable_daemon_is_an_error_with_a_hint() {
    let output = nestctl(&["--server", "unix:/nonexistent/nestd.sock", "vm", "list"]);
    assert_eq!(output.status.code(), Some(1));
    let error = stderr(&output);
    assert!(error.contains("error: cannot reach nestd at unix:/nonexistent/nestd.sock"), "{error}");
    assert!(error.contains("hint: "), "{error}");
    let output = nestctl(&["--server", "tcp:1", "vm", "list"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("unix:PATH"));
}

#[test]
fn refusals_carry_the_daemons_hint_and_in_json_their_code() {
    let server = Server::start();
    let output = server.nestctl(&["vm", "start", "gone"]);
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(stderr(&output), "error: there is no VM `gone`\nhint: `nestctl vm list` shows the VMs there are\n");
    assert!(stdout(&output).is_empty());
    let output = server.nestctl(&["--output", "json", "vm", "start", "gone"]);
    let error = json(&stderr(&output));
    assert_eq!(error["error"]["code"], "NOT_FOUND");
    assert!(error["error"]["hint"].as_str().unwrap().contains("vm list"));
}

#[test]
fn wrong_values_are_refused_with_what_to_write() {
    for (args, said) in [
        (&["vcpu", "sipi", "a", "1", "--vector", "256"][..], "from 0 to 0xff"),
        (&["vcpu", "pin", "a", "1", "x"], "0-3,8"),
        (&["run", "--memory", "many"], "512M"),
        (&["run", "--kernel", "k", "--timeout", "soon"], "60s"),
        (&["events", "a", "--kind", "VM_EXITS"], "VM_EXIT"),
    ] {
        let output = nestctl(args);
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        assert!(stderr(&output).contains(said), "{args:?}: {}", stderr(&output));
    }
}

#[test]
fn a_reader_that_leaves_early_is_no_error() {
    for args in [&["host"][..], &["completions", "bash"]] {
        let mut child = command().args(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        drop(child.stdout.take());
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success() && output.stderr.is_empty(), "{args:?}: {}", stderr(&output));
    }
}
