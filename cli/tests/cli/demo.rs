//! `nestctl demo`: the main job.

use std::process::{Child, Command};

use nestd_guests::L1;

use crate::rig::{File, json, nestctl, ok, stderr, stdout};

#[test]
fn the_demo_shows_all_nine_steps_through_both_apic_modes() {
    let output = ok(nestctl(&["demo"]));
    assert_eq!(output.matches("All nine steps were seen").count(), 2, "{output}");
    for (mode, timeline) in ["xAPIC page", "x2APIC MSR"].into_iter().zip(output.split("L2 starts its second").skip(1)) {
        assert!(timeline.contains(mode), "{output}");
        let steps: Vec<&str> =
            timeline.lines().filter(|l| l.starts_with(|c: char| c.is_ascii_digit())).map(|l| &l[..1]).collect();
        assert_eq!(steps, ["1", "2", "3", "4", "5", "6", "7", "8", "9"], "{timeline}");
    }
    assert!(output.contains("INIT_RECEIVED") && output.contains("Where to go next"), "{output}");
}

#[test]
fn the_demos_json_is_one_event_a_line() {
    let output = ok(nestctl(&["demo", "--apic", "x2apic", "--output", "json"]));
    let kinds: Vec<String> = output.lines().map(|l| json(l)["kind"].as_str().unwrap().to_owned()).collect();
    for kind in ["ICR_WRITE", "VM_EXIT", "VM_ENTRY", "MP_STATE"] {
        assert!(kinds.iter().any(|k| k == &format!("EVENT_KIND_{kind}")), "{kind} is not in {kinds:?}");
    }
}

#[test]
fn the_demos_guests_run_from_files_too() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name).display().to_string();
    ok(nestctl(&["demo", "--images", &path("guests")]));
    let (l1, l2) = (path("guests/l1.elf"), path("guests/l2.elf"));
    let output = nestctl(&["run", "--kernel", &l1, "--initrd", &l2, "--cpus", "2", "--nested", "emulated"]);
    assert_eq!(output.status.code(), Some(1), "debug exit 0: {}", stderr(&output));
    assert!(stdout(&output).contains("L2: second processor is up"), "{}", stdout(&output));
}

#[test]
fn a_mutant_l1_fails_the_demo_at_the_step_that_it_breaks() {
    for (mutant, step) in [(L1::StaysActive, "step 4 is missing"), (L1::IgnoresSipi, "step 8 is missing")] {
        let l1 = File::new(nestd_guests::l1(mutant));
        for apic in ["xapic", "x2apic"] {
            let output = nestctl(&["demo", "--apic", apic, "--l1", l1.text()]);
            assert_eq!(output.status.code(), Some(1), "{mutant:?} {apic}: {}", stdout(&output));
            assert!(stderr(&output).contains(step), "{mutant:?} {apic}: {}", stderr(&output));
        }
    }
}

fn host_nests() -> bool {
    let host = json(&ok(nestctl(&["host", "--output", "json"])));
    let kernel = host["engines"].as_array().unwrap().iter().find(|e| e["nested"] == "NESTED_KERNEL").unwrap();
    kernel["possible"] == true
}

#[test]
fn the_demo_under_kvm_tells_the_steps_that_kvm_shows_and_finds_the_mutants() {
    if !host_nests() {
        println!("skipped: no nesting in this host's kernel");
        return;
    }
    // KVM inside Bochs, where this usually runs, needs guests that spin with IF=1.
    let demo = |more: &[&str]| nestctl(&[&["demo", "--nested", "kernel", "--append", "interrupts=on"], more].concat());
    let output = ok(demo(&[]));
    assert_eq!(output.matches("Every step that KVM shows was seen").count(), 2, "{output}");
    for (mutant, step) in [(L1::StaysActive, "step 4 is missing"), (L1::IgnoresSipi, "step 8 is missing")] {
        let l1 = File::new(nestd_guests::l1(mutant));
        let output = demo(&["--apic", "xapic", "--l1", l1.text()]);
        assert_eq!(output.status.code(), Some(1), "{mutant:?}: {}", stdout(&output));
        assert!(stderr(&output).contains(step), "{mutant:?}: {}", stderr(&output));
    }
}

#[test]
fn kernel_nesting_that_the_host_lacks_is_refused_with_emulated_offered() {
    if host_nests() {
        println!("skipped: this host nests");
        return;
    }
    let output = nestctl(&["demo", "--nested", "kernel"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("--nested emulated"), "{}", stderr(&output));
}

#[test]
fn the_demo_passes_on_an_overloaded_host() {
    struct Busy(Child);
    impl Drop for Busy {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }
    let spin = || Busy(Command::new("sh").args(["-c", "while :; do :; done"]).spawn().unwrap());
    let _busy: Vec<Busy> = (0..4).map(|_| spin()).collect();
    let output = ok(nestctl(&["demo"]));
    assert_eq!(output.matches("All nine steps were seen").count(), 2, "{output}");
}
