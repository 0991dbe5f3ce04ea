//! Threads, commands, reads, injections and events of a VM, seen through its API.

use nested_vmx::bus::{Delivery, Destination, IpiMessage};
use nested_vmx::event::{ActivityState, Detail, Fate, Rule, VmxMode};
use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, mpsc};

use super::*;
use crate::event::{EventRecord, VmChange, WHOLE_VM, What};
use crate::thread::ThreadState;
use crate::vm::{GuestExit, VmError, VmState};

fn wait_thread(vm: &Vm, vcpu: u32, wanted: ThreadState) {
    let got = vm.wait_for(PATIENCE, || (vm.vcpu_published(vcpu).unwrap().thread == wanted).then_some(()));
    assert!(got.is_some(), "vCPU {vcpu} is {:?}, not {wanted:?}", vm.vcpu_published(vcpu).unwrap().thread);
}

fn proc_status(vm: &Vm, vcpu: u32, key: &str) -> String {
    let tid = vm.vcpu_published(vcpu).unwrap().tid.expect("a living thread");
    let status = std::fs::read_to_string(format!("/proc/self/task/{tid}/status")).unwrap();
    let line = status.lines().find_map(|l| l.strip_prefix(key)).unwrap();
    line.trim_start_matches(':').trim().to_owned()
}

#[test]
fn threads_are_named_and_pinned_as_the_spec_says_and_repinned_while_running() {
    let allowed = allowed_cpus();
    let (first, last) = (allowed[0], *allowed.last().unwrap());
    let config = VmConfig {
        name: "pinned".into(),
        cpus: 2,
        nested: Nested::Emulated,
        pin: vec![vec![last], vec![]],
        ..VmConfig::default()
    };
    let (vm, _) = with_spec(VmSpec::new(config, &allowed).unwrap(), vec![spin(), halted()]);
    vm.start().unwrap();
    wait_thread(&vm, 0, ThreadState::Running);
    wait_thread(&vm, 1, ThreadState::Idle);
    assert_eq!(proc_status(&vm, 0, "Name"), "pinned/vcpu0");
    assert_eq!(proc_status(&vm, 0, "Cpus_allowed_list"), last.to_string());
    let spread = vm.vcpu_published(1).unwrap().host_cpus;
    assert_eq!(spread.len(), 1, "the spread policy names one CPU");
    assert_eq!(proc_status(&vm, 1, "Cpus_allowed_list"), spread[0].to_string());

    vm.set_affinity(0, &[first]).unwrap();
    assert_eq!(proc_status(&vm, 0, "Cpus_allowed_list"), first.to_string());
    assert_eq!(vm.vcpu_published(0).unwrap().host_cpus, [first]);
    assert!(matches!(vm.set_affinity(0, &[100_000]), Err(VmError::Spec(e)) if e.field() == "pin"));
    assert!(matches!(vm.set_affinity(9, &[first]), Err(VmError::NoSuchVcpu { vcpu: 9, cpus: 2 })));
    vm.stop().unwrap();
    assert!(matches!(vm.set_affinity(0, &[first]), Err(VmError::WrongState { state: "stopped", .. })));
}

#[test]
fn each_command_is_legal_in_its_states_and_refused_with_the_state_elsewhere() {
    let (vm, engine) = scripted("commands", vec![spin(), halted()]);
    let refused = |r: Result<(), VmError>, in_state: &str| match r {
        Err(VmError::WrongState { state, .. }) => assert_eq!(state, in_state),
        other => panic!("{other:?} in {in_state}"),
    };
    refused(vm.pause(), "created");
    refused(vm.resume(), "created");
    refused(vm.reset(), "created");
    vm.start().unwrap();
    refused(vm.start(), "running");
    refused(vm.resume(), "running");
    vm.reset().unwrap();
    assert_eq!(vm.state(), VmState::Running);
    vm.pause().unwrap();
    assert!(engine.frozen.load(SeqCst));
    assert_eq!(vm.state(), VmState::Paused);
    for vcpu in 0..2 {
        assert_eq!(vm.vcpu_published(vcpu).unwrap().thread, ThreadState::Paused);
    }
    refused(vm.pause(), "paused");
    vm.reset().unwrap();
    assert_eq!(vm.state(), VmState::Paused);
    vm.resume().unwrap();
    assert!(!engine.frozen.load(SeqCst));
    wait_thread(&vm, 1, ThreadState::Idle);
    vm.stop().unwrap();
    assert_eq!(vm.state(), VmState::Stopped { exit: None });
    for r in [vm.start(), vm.pause(), vm.resume(), vm.reset(), vm.stop()] {
        refused(r, "stopped");
    }
    assert_eq!(*lock(&engine.machine_resets), [2, 4], "both vCPUs reset before the machine did, twice");
    let changes: Vec<VmChange> = vm
        .events()
        .read(1, 100)
        .events
        .iter()
        .filter_map(|e| if let What::Vm(c) = e.what { Some(c) } else { None })
        .collect();
    use VmChange::*;
    assert_eq!(changes, [Started, Reset, Paused, Reset, Resumed, Stopped]);
}

#[test]
fn a_reset_that_the_guest_asks_for_resets_every_vcpu_before_the_machine() {
    let mut asked = false;
    let guest: Script = Box::new(move |stage| {
        if !std::mem::replace(&mut asked, true) {
            return RunOutcome::GuestReset;
        }
        spin()(stage)
    });
    let (vm, engine) = scripted("guest-reset", vec![guest, spin(), halted()]);
    vm.start().unwrap();
    vm.wait_for(PATIENCE, || (!lock(&engine.machine_resets).is_empty()).then_some(())).expect("reset");
    assert_eq!(*lock(&engine.machine_resets), [3]);
    wait_thread(&vm, 2, ThreadState::Idle);
    assert_eq!(vm.state(), VmState::Running);
}

#[test]
fn a_guest_exit_stops_the_vm_and_all_its_threads() {
    let exits: Script = Box::new(|_| RunOutcome::GuestExit(GuestExit { code: 0x2a }));
    let (vm, _) = scripted("exits", vec![exits, spin(), halted()]);
    vm.start().unwrap();
    for vcpu in 0..3 {
        wait_thread(&vm, vcpu, ThreadState::Stopped);
    }
    assert_eq!(vm.state(), VmState::Stopped { exit: Some(GuestExit { code: 0x2a }) });
    assert_eq!(vm.vcpu_published(0).unwrap().state.instructions, 1, "what was published stays readable");
}

#[test]
fn a_panicking_vcpu_fails_its_vm_with_a_dump_and_no_other() {
    let go = Arc::new(AtomicBool::new(false));
    let seen = go.clone();
    let panics: Script = Box::new(move |stage| {
        stage.events.record(7, 0, VmxMode::Root, Detail::VmxOff);
        assert!(!seen.load(SeqCst), "the script was told to panic");
        RunOutcome::Park { halted: false, until: None }
    });
    let (other, _) = scripted("unharmed", vec![spin()]);
    let (vm, engine) = scripted("panics", vec![panics, spin()]);
    other.start().unwrap();
    vm.start().unwrap();
    go.store(true, SeqCst);
    // Parked or not: a fresh read has it run on.
    let _ = vm.vcpu_fresh(0, PATIENCE);
    let _ = engine.kicked(0);
    wait_thread(&vm, 0, ThreadState::Failed);
    wait_thread(&vm, 1, ThreadState::Stopped);
    let VmState::Failed { reason, dump } = vm.state() else { panic!("{:?}", vm.state()) };
    assert!(reason.contains("vCPU 0 panicked: the script was told to panic"), "{reason}");
    assert_eq!(dump.vcpu, 0);
    assert!(dump.registers.rip >= 1);
    assert!(dump.events.iter().any(|e| e.what == What::Processor(Detail::VmxOff)));
    assert!(other.vcpu_fresh(0, PATIENCE).is_ok());
    assert_eq!(other.state(), VmState::Running);
}

#[test]
fn a_fresh_read_of_a_spinning_vcpu_is_newer_than_the_published_one() {
    let (vm, _) = scripted("fresh", vec![spin()]);
    vm.start().unwrap();
    let before = vm.vcpu_fresh(0, PATIENCE).unwrap().state.instructions;
    let after = vm.vcpu_fresh(0, PATIENCE).unwrap().state.instructions;
    assert!(after > before);
    assert!(vm.registers(0).unwrap().rip > after);
    vm.pause().unwrap();
    let paused = vm.vcpu_fresh(0, PATIENCE).unwrap().state.instructions;
    assert_eq!(vm.vcpu_fresh(0, PATIENCE).unwrap().state.instructions, paused, "a read runs no guest code");
}

#[test]
fn a_halted_vcpu_sleeps_until_something_is_posted() {
    let (taken, takes) = mpsc::channel();
    let script: Script = Box::new(move |stage| {
        if let Some((injection, id)) = stage.take() {
            stage.events.record(1, id, VmxMode::Off, Detail::Nmi(Fate::Delivered));
            taken.send((injection, id)).unwrap();
        }
        stage.state.activity = ActivityState::Hlt;
        RunOutcome::Park { halted: true, until: None }
    });
    let (vm, _) = scripted("sleeps", vec![script, spin()]);
    vm.start().unwrap();
    wait_thread(&vm, 0, ThreadState::Idle);
    let wakeups = || vm.counters().vcpus[0].wakeups;
    let before = wakeups();
    // Another vCPU's traffic does not wake it.
    for _ in 0..20 {
        vm.vcpu_fresh(1, PATIENCE).unwrap();
    }
    assert_eq!(wakeups(), before);
    let injected = vm.inject(0, Injection::Nmi).unwrap();
    assert_eq!(injected.disposition, Disposition::Delivered);
    assert_eq!(takes.recv().unwrap(), (Injection::Nmi, injected.id));
    wait_thread(&vm, 0, ThreadState::Idle);
    assert_eq!(wakeups(), before + 1);
}

#[test]
fn an_injection_is_accounted_for_by_answer_and_by_event() {
    let script: Script = Box::new(|stage| {
        while let Some((injection, id)) = stage.take() {
            let detail = match injection {
                Injection::Sipi { vector } => Detail::Sipi { vector, fate: Fate::Dropped(Rule::R1) },
                Injection::Init => Detail::Init(Fate::Reset),
                Injection::Nmi => Detail::Nmi(Fate::Delivered),
            };
            stage.events.record(5, id, VmxMode::Off, detail);
        }
        RunOutcome::Park { halted: true, until: None }
    });
    let (vm, _) = scripted("inject", vec![script]);
    let latched = vm.inject(0, Injection::Init).unwrap();
    assert_eq!(latched.disposition, Disposition::Latched, "not started: nobody classified it");
    vm.start().unwrap();
    let dropped = vm.inject(0, Injection::Sipi { vector: 0x10 }).unwrap();
    assert_eq!(dropped.disposition, Disposition::Dropped(Rule::R1));
    let events = vm.events().read(1, 100).events;
    let place = |what: What, cause: u64| events.iter().position(|e| e.what == what && e.cause == cause).unwrap();
    let injected = |i: &crate::vm::Injected, injection| place(What::Injected { id: i.id, injection }, 0);
    assert!(injected(&latched, Injection::Init) < place(What::Processor(Detail::Init(Fate::Reset)), latched.id));
    let sipi = Detail::Sipi { vector: 0x10, fate: Fate::Dropped(Rule::R1) };
    assert!(injected(&dropped, Injection::Sipi { vector: 0x10 }) < place(What::Processor(sipi), dropped.id));
    let counts = &vm.counters().vcpus[0];
    assert_eq!((counts.init.delivered, counts.sipi.dropped), (1, 1));
    vm.stop().unwrap();
    assert!(matches!(vm.inject(0, Injection::Nmi), Err(VmError::WrongState { state: "stopped", .. })));
}

/// Two vCPUs send each other a message in turn, as fast as they can.
fn ping_pong(peer: usize, rounds: u64) -> Script {
    let mut sent = 0;
    Box::new(move |stage| {
        let mine = lock(&stage.engine.posted[stage.index as usize]).pop_front();
        if let Some((_, id)) = mine {
            stage.events.record(0, id, VmxMode::NonRoot, Detail::Init(Fate::VmExit(3)));
        }
        if sent < rounds {
            sent += 1;
            let id = sent * 2 + peer as u64;
            let message = IpiMessage {
                delivery: Delivery::Init,
                vector: 0,
                destination: Destination::Physical(peer as u32),
                level: false,
                cause: id,
            };
            stage.events.record(0, 0, VmxMode::NonRoot, Detail::IcrWrite { id, message });
            lock(&stage.engine.posted[peer]).push_back((Injection::Init, id));
            return RunOutcome::Kicked;
        }
        if lock(&stage.engine.posted[stage.index as usize]).is_empty() {
            std::thread::yield_now();
        }
        RunOutcome::Kicked
    })
}

#[test]
fn causes_precede_effects_in_the_order_of_two_threads() {
    const ROUNDS: u64 = 3000;
    let (vm, _) = scripted("order", vec![ping_pong(1, ROUNDS), ping_pong(0, ROUNDS)]);
    vm.start().unwrap();
    let (mut caused, mut effects, mut at) = (HashSet::new(), 0, 1);
    let mut local = [0; 2];
    while effects < ROUNDS * 2 {
        let batch = vm
            .wait_for(PATIENCE, || Some(vm.events().read(at, 100)).filter(|b| !b.events.is_empty()))
            .expect("events go on");
        assert_eq!(batch.gap, None);
        for event in batch.events {
            assert_eq!(event.seq, at, "one order without holes");
            at += 1;
            match event.what {
                What::Processor(Detail::IcrWrite { id, .. }) => assert!(caused.insert(id)),
                What::Processor(Detail::Init(_)) => {
                    assert!(caused.contains(&event.cause), "the effect of {} came before it", event.cause);
                    effects += 1;
                }
                _ => continue,
            }
            let last = &mut local[event.vcpu as usize];
            assert!(event.local_seq > *last);
            *last = event.local_seq;
        }
        assert_eq!(batch.next_seq, at);
    }
}

#[test]
fn a_slow_reader_sees_a_gap_with_its_count_and_whether_signals_are_missing() {
    const WRITTEN: u64 = 40_000;
    let (done, is_done) = mpsc::channel();
    let mut written = false;
    let script: Script = Box::new(move |stage| {
        // Being started is a wake too.
        if std::mem::replace(&mut written, true) {
            return RunOutcome::Park { halted: true, until: None };
        }
        stage.events.record(0, 0, VmxMode::Off, Detail::Init(Fate::Latched));
        let (mut from, mut to) = (ActivityState::Active, ActivityState::Hlt);
        for _ in 0..WRITTEN {
            stage.events.record(0, 0, VmxMode::Off, Detail::Activity { from, to });
            std::mem::swap(&mut from, &mut to);
        }
        done.send(()).unwrap();
        RunOutcome::Park { halted: true, until: None }
    });
    let (vm, _) = scripted("slow", vec![script]);
    vm.start().unwrap();
    is_done.recv().unwrap();
    let first = vm.events().read(1, 2);
    assert!(matches!(first.events[1].what, What::Processor(Detail::Init(_))), "HLT pushed out no INIT: {first:?}");
    assert_eq!(first.gap, None);
    let rest = vm.events().read(first.next_seq, usize::MAX);
    let gap = rest.gap.expect("a gap");
    assert!(!gap.signals);
    assert_eq!(gap.lost + rest.events.len() as u64, WRITTEN);
    assert_eq!(vm.counters().events_lost, gap.lost);
    assert_eq!(vm.events().read(rest.next_seq, 10).gap, None);
}

#[test]
fn a_client_that_pauses_and_resumes_in_a_loop_pushes_out_no_event_of_the_guest() {
    const WRITTEN: usize = 40_000;
    let script: Script = Box::new(|stage| {
        stage.events.record(0, 0, VmxMode::Off, Detail::Init(Fate::Latched));
        RunOutcome::GuestExit(GuestExit { code: 0 })
    });
    let (vm, _) = scripted("pauses", vec![script]);
    vm.start().unwrap();
    wait_thread(&vm, 0, ThreadState::Stopped);
    let at = vm.events().last_at(0);
    for _ in 0..WRITTEN {
        vm.events().record_outside(WHOLE_VM, 0, 0, at, What::Vm(VmChange::Paused));
    }
    let all = vm.events().read(1, usize::MAX);
    let init = |e: &EventRecord| matches!(e.what, What::Processor(Detail::Init(_)));
    assert!(all.events.iter().any(init));
    let gap = all.gap.expect("a gap");
    assert!(!gap.signals && gap.lost > 0);
}

#[test]
fn frequent_events_are_counted_and_recorded_only_for_a_subscriber() {
    use nested_vmx::event::EventKind;
    let (step, steps) = mpsc::channel::<u64>();
    let script: Script = Box::new(move |stage| {
        if let Ok(n) = steps.try_recv() {
            for _ in 0..n {
                let exit = Detail::VmExit {
                    vmcs_gpa: 0,
                    reason: 10,
                    qualification: 0,
                    rip: 0,
                    activity: ActivityState::Active,
                };
                stage.events.record(0, 0, VmxMode::Root, exit);
            }
            stage.state.tsc += n;
        }
        RunOutcome::Kicked
    });
    let (vm, _) = scripted("frequent", vec![script]);
    vm.start().unwrap();
    let exits = || {
        let events = vm.events().read(1, 1000).events;
        events.iter().filter(|e| matches!(e.what, What::Processor(Detail::VmExit { .. }))).count()
    };
    let ran =
        |total: u64| vm.wait_for(PATIENCE, || (vm.vcpu_fresh(0, PATIENCE).ok()?.state.tsc == total).then_some(()));
    step.send(5).unwrap();
    ran(5).unwrap();
    assert_eq!((exits(), vm.counters().vcpus[0].exits[&10]), (0, 5));
    let subscription = vm.events().subscribe([EventKind::VmExit]);
    step.send(5).unwrap();
    ran(10).unwrap();
    assert_eq!((exits(), vm.counters().vcpus[0].exits[&10]), (5, 10));
    drop(subscription);
    step.send(5).unwrap();
    ran(15).unwrap();
    assert_eq!((exits(), vm.counters().vcpus[0].exits[&10]), (5, 15));
}

#[test]
fn sixty_four_vms_leave_no_thread_behind() {
    let named = || {
        let tasks = std::fs::read_dir("/proc/self/task").unwrap();
        let names = tasks.filter_map(|t| std::fs::read_to_string(t.ok()?.path().join("comm")).ok());
        names.filter(|n| n.starts_with("many")).count()
    };
    let vms: Vec<_> = (0..64).map(|i| scripted(&format!("many{i}"), vec![spin(), halted()]).0).collect();
    vms.iter().step_by(2).for_each(|vm| vm.start().unwrap());
    for vm in vms.iter().step_by(2) {
        wait_thread(vm, 1, ThreadState::Idle);
    }
    assert!(named() > 64);
    drop(vms);
    // Joined threads are gone from /proc a moment after their join returns.
    let start = std::time::Instant::now();
    while named() > 0 {
        assert!(start.elapsed() < PATIENCE, "{} threads left", named());
        std::thread::yield_now();
    }
}
