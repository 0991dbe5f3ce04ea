//! `vm`, `vcpu`, `vmcs12`, `events` and `host` against a daemon.

use std::{io::Write, process::Stdio};

use crate::rig::{File, Server, command, guest, json, nestctl, ok, stderr};

fn create(server: &Server, name: &str, image: &File, more: &[&str]) {
    let args = ["vm", "create", name, "--kernel", image.text(), "--flat", "0x7000", "--memory", "2M"];
    server.ok(&[&args[..], &["--nested", "emulated"], more].concat());
}

#[test]
fn a_vm_goes_through_its_life_by_commands() {
    let server = Server::start();
    let image = File::new(guest::SPIN);
    create(&server, "a", &image, &["--cpus", "2"]);
    let vm = server.json(&["vm", "show", "a"]);
    assert_eq!(vm["state"], "VM_STATE_CREATED");
    assert_eq!((&vm["spec"]["cpus"], &vm["spec"]["memoryBytes"]), (&2.into(), &"2097152".into()));
    for (command, state) in
        [("start", "RUNNING"), ("pause", "PAUSED"), ("resume", "RUNNING"), ("reset", "RUNNING"), ("stop", "STOPPED")]
    {
        let said = server.ok(&["vm", command, "a"]);
        assert_eq!(said, format!("VM `a` is {state}\n"));
    }
    let list = server.ok(&["vm", "list"]);
    let line = list.lines().nth(1).unwrap().split_whitespace().collect::<Vec<_>>();
    assert_eq!(line, ["a", "STOPPED", "2", "2", "MiB", "emulated", "emulated"]);
    let again = server.nestctl(&["vm", "start", "a"]);
    assert!(stderr(&again).contains("stopped") && stderr(&again).contains("hint: "), "{}", stderr(&again));
    server.ok(&["vm", "delete", "a"]);
    assert_eq!(server.json(&["vm", "list"])["vms"], serde_json::json!([]));
}

#[test]
fn a_second_processor_is_started_by_vcpu_sipi_and_the_events_tell_it() {
    let server = Server::start();
    // At 0x7000 what the second processor runs; behind it, for the first one, a loop.
    let image = File::new(&[guest::HELLO, guest::SPIN].concat());
    let entry = (0x7000 + guest::HELLO.len()).to_string();
    create(&server, "a", &image, &["--cpus", "2", "--entry", &entry]);
    server.ok(&["vm", "start", "a"]);
    let vcpu = server.json(&["vcpu", "show", "a", "1", "--fresh"]);
    assert_eq!(vcpu["mpState"], "MP_STATE_INIT_RECEIVED");
    assert_eq!(vcpu["activityState"], "ACTIVITY_STATE_WAIT_FOR_SIPI");
    let list = server.ok(&["vcpu", "list", "a"]);
    assert!(list.lines().nth(2).unwrap().contains("WAIT_FOR_SIPI"), "{list}");
    assert!(server.ok(&["vcpu", "init", "a", "1"]).contains("INIT to vCPU 1: dropped (R2)"));
    let sipi = server.json(&["vcpu", "sipi", "a", "1", "--vector", "0x07"]);
    assert_eq!(sipi["fate"]["disposition"], "DISPOSITION_STARTED");
    // Ends with the VM, which the second processor ends.
    let events = server.ok(&["events", "a", "--follow", "--output", "json"]);
    let started = events.lines().map(json).find(|e| e["kind"] == "EVENT_KIND_VCPU_STARTED").unwrap();
    assert_eq!((&started["vcpu"], &started["causeId"]), (&1.into(), &sipi["injectionId"]));
    assert_eq!(server.ok(&["vm", "console", "a", "--no-follow"]), "hi\n");
    let table = server.ok(&["events", "a", "--kind", "VCPU_STARTED", "--kind", "INIT_DROPPED"]);
    assert_eq!(table.lines().count(), 3, "{table}");
    assert!(table.contains("SIPI, vector 0x07, started") && table.contains("dropped (R2)"), "{table}");
}

#[test]
fn a_vcpu_is_pinned_and_shown_with_its_registers() {
    let server = Server::start();
    let image = File::new(guest::SPIN);
    create(&server, "a", &image, &[]);
    let cpu = server.json(&["host"])["cpus"][0].to_string();
    assert_eq!(server.ok(&["vcpu", "pin", "a", "0", &cpu]), format!("vCPU 0 runs on host CPUs {cpu}\n"));
    let shown = server.ok(&["vcpu", "show", "a", "0", "--registers"]);
    assert!(
        shown.contains("mp_state        RUNNABLE") && shown.contains("RFLAGS") && shown.contains("SEGMENT"),
        "{shown}"
    );
}

#[test]
fn vmcs12_says_that_there_is_none_and_which_fields_exist() {
    let server = Server::start();
    let image = File::new(guest::SPIN);
    create(&server, "a", &image, &[]);
    let state = server.json(&["vmcs12", "a", "0"]);
    assert_eq!((&state["vmxMode"], &state["fields"]), (&"VMX_MODE_OFF".into(), &serde_json::json!([])));
    let wrong = server.nestctl(&["vmcs12", "a", "0", "--field", "activity"]);
    assert!(stderr(&wrong).contains("did you mean guest_activity_state"), "{}", stderr(&wrong));
}

#[test]
fn host_answers_without_a_daemon() {
    let host = json(&ok(nestctl(&["host", "--output", "json"])));
    assert_eq!(host["engines"].as_array().unwrap().len(), 4);
    assert!(ok(nestctl(&["host"])).contains("What a VM gets"));
}

#[test]
fn console_copies_standard_input_to_the_guest_and_ends_with_it() {
    let server = Server::start();
    let image = File::new(guest::ECHO);
    create(&server, "a", &image, &[]);
    server.ok(&["vm", "start", "a"]);
    let mut console = command();
    console.args(["--server", &server.address, "vm", "console", "a"]);
    let mut console = console.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    // Kept open: the guest ends it.
    let mut input = console.stdin.take().unwrap();
    input.write_all(b"hello q").unwrap();
    input.flush().unwrap();
    let output = console.wait_with_output().unwrap();
    assert_eq!(ok(output), "hello q");
}

#[test]
fn vmcs12_shows_what_the_guests_hypervisor_left_by_field() {
    let server = Server::start();
    let (l1, l2) = (File::new(nestd_guests::l1(nestd_guests::L1::Demo)), File::new(nestd_guests::l2()));
    let create = ["vm", "create", "a", "--cpus", "2", "--nested", "emulated", "--append", "apic=x2apic"];
    server.ok(&[&create[..], &["--kernel", l1.text(), "--initrd", l2.text()]].concat());
    server.ok(&["vm", "start", "a"]);
    server.ok(&["vm", "show", "a", "--watch"]);
    let state = server.json(&["vmcs12", "a", "1"]);
    assert_eq!(state["vmxMode"], "VMX_MODE_NON_ROOT");
    assert!(state["fields"].as_array().unwrap().len() > 100);
    let field = |name: &str| server.json(&["vmcs12", "a", "1", "--field", name])["fields"][0].clone();
    let reason = field("exit_reason");
    assert_eq!((&reason["value"], &reason["meaning"]), (&"4".into(), &"start-up IPI".into()));
    assert_eq!((&reason["width"], &reason["role"]), (&"VMCS_WIDTH_32".into(), &"VMCS_ROLE_EXIT_INFORMATION".into()));
    assert_eq!(reason["encoding"], 0x4402);
    // SIPI vector 0x10: the second processor of L2 was started at 0x10000.
    assert_eq!(field("guest_cs_base")["value"], "65536");
    let table = server.ok(&["vmcs12", "a", "1", "--field", "guest_cs_selector", "--field", "exit_qualification"]);
    assert!(table.contains("guest_cs_selector   0x1000") && table.contains("exit_qualification  0x10"), "{table}");
}
