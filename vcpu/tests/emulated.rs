//! The small hypervisor and its guest on the emulated processor, through the VM's API.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::Duration;

use nestd_guests::L1;
use nestd_vcpu::event::{EventRecord, What};
use nestd_vcpu::host::allowed_cpus;
use nestd_vcpu::spec::{Boot, Clock, Nested, Scheduler, VmConfig, VmSpec};
use nestd_vcpu::vm::{GuestExit, Vm, VmOptions, VmState};
use nested_vmx::bus::Delivery;
use nested_vmx::event::{ActivityState, Detail, Fate, VmxMode};

const PATIENCE: Duration = Duration::from_secs(60);

fn vm(name: &str, image: &[u8], append: &str, module: Option<&[u8]>, change: impl FnOnce(&mut VmConfig)) -> Arc<Vm> {
    let modules = module.map(|m| (m.to_vec(), String::new())).into_iter().collect();
    let mut config = VmConfig {
        name: name.into(),
        cpus: 2,
        memory_bytes: 64 << 20,
        nested: Nested::Emulated,
        boot: Boot::Kernel { image: image.into(), append: append.into(), modules },
        ..VmConfig::default()
    };
    change(&mut config);
    Vm::create(VmSpec::new(config, &allowed_cpus()).unwrap(), VmOptions::default()).unwrap()
}

fn console(vm: &Vm) -> String {
    String::from_utf8_lossy(&vm.console().read(0, 1 << 20).bytes).into_owned()
}

/// Runs it to its end: exit code, console, events.
fn run(vm: &Vm) -> (u32, String, Vec<EventRecord>) {
    vm.start().unwrap();
    let ended = vm.wait_for(PATIENCE, || Some(vm.state()).filter(VmState::ended));
    let events = || {
        let log = vm.events().read(1, usize::MAX);
        assert!(!log.gap.is_some_and(|g| g.signals), "the log lost signals: {:?}", log.gap);
        log.events
    };
    let Some(VmState::Stopped { exit: Some(GuestExit { code }) }) = ended else {
        let tail: Vec<_> = events().into_iter().rev().take(30).collect();
        let at: Vec<_> = (0..2).map(|i| vm.vcpu_published(i)).collect();
        panic!("{:?}\n{at:#?}\n{}\nlatest events first: {tail:#?}", vm.state(), console(vm));
    };
    (code, console(vm), events())
}

fn processor(e: &EventRecord) -> Option<Detail> {
    match e.what {
        What::Processor(detail) => Some(detail),
        _ => None,
    }
}

/// The steps of semantics.md, section 1, each caused by the one before it.
fn handshake(events: &[EventRecord]) {
    let after = |seq: u64, what: &str, is: &dyn Fn(&EventRecord, Detail) -> bool| -> EventRecord {
        let found = events.iter().find(|e| e.seq > seq && processor(e).is_some_and(|d| is(e, d)));
        *found.unwrap_or_else(|| panic!("missing after {seq}: {what}\n{events:#?}"))
    };
    let icr = |delivery| move |e: &EventRecord, d: Detail| matches!(d, Detail::IcrWrite { message, .. } if message.delivery == delivery && e.vcpu == 0);
    let entered = after(0, "L2 runs", &|e, d| matches!(d, Detail::VmEntry { .. }) && e.vcpu == 0);
    let init = after(entered.seq, "L2 sends INIT", &icr(Delivery::Init));
    let exit3 = after(init.seq, "exit 3", &|e, d| matches!(d, Detail::VmExit { reason: 3, .. }) && e.vcpu == 1);
    let waits = after(exit3.seq, "entry to wait-for-SIPI", &|e, d| {
        matches!(d, Detail::VmEntry { activity: ActivityState::WaitForSipi, .. }) && e.vcpu == 1
    });
    let exit4 = after(waits.seq, "exit 4", &|e, d| {
        matches!(d, Detail::VmExit { reason: 4, qualification: 0x10, activity: ActivityState::WaitForSipi, .. })
            && e.vcpu == 1
    });
    let runs = after(exit4.seq, "entry to active", &|e, d| {
        matches!(d, Detail::VmEntry { activity: ActivityState::Active, .. }) && e.vcpu == 1
    });
    let Some(Detail::IcrWrite { id: init_id, .. }) = processor(&init) else { unreachable!() };
    assert_eq!(exit3.cause, init_id, "exit 3 was caused by the INIT");
    let sipi = after(init.seq, "L2 sends the SIPI that became exit 4", &|e, d| {
        matches!(d, Detail::IcrWrite { id, message } if id == exit4.cause && message.delivery == Delivery::StartUp)
            && e.vcpu == 0
    });
    assert!(sipi.seq < exit4.seq && runs.seq > exit4.seq);
}

#[test]
fn l2_alone_starts_its_second_processor() {
    for append in ["apic=xapic", "apic=x2apic"] {
        let (code, console, events) = run(&vm("alone", nestd_guests::l2(), append, None, |_| {}));
        assert_eq!(code, 0, "{console}");
        assert!(console.contains('*'), "{console}");
        let started = |e: &&EventRecord| matches!(processor(e), Some(Detail::Sipi { fate: Fate::Started, .. }));
        assert_eq!(events.iter().filter(started).count(), 1);
    }
}

#[test]
fn l1_starts_l2s_second_processor_by_exit_3_and_exit_4() {
    for append in ["apic=xapic", "apic=x2apic"] {
        let vm = vm("demo", nestd_guests::l1(L1::Demo), append, Some(nestd_guests::l2()), |_| {});
        let (code, console, events) = run(&vm);
        assert_eq!(code, 0, "{console}");
        handshake(&events);
        let sipis = || {
            events.iter().filter_map(|e| match processor(e)? {
                Detail::Sipi { vector: 0x10, fate } if e.vcpu == 1 => Some(fate),
                _ => None,
            })
        };
        assert_eq!(sipis().filter(|f| *f == Fate::VmExit(4)).count(), 1);
        // It is sent twice, as Linux does: the other one meets a processor that does not wait for it.
        assert!(sipis().all(|f| matches!(f, Fate::VmExit(4) | Fate::Dropped(_))), "{:?}", sipis().collect::<Vec<_>>());
    }
}

#[test]
fn the_handshake_needs_no_luck_on_one_host_cpu_or_in_host_time_only() {
    let cpu = allowed_cpus()[0];
    let one_cpu =
        vm("crowded", nestd_guests::l1(L1::Demo), "", Some(nestd_guests::l2()), |c| c.pin = vec![vec![cpu]; 2]);
    let (code, console, events) = run(&one_cpu);
    assert_eq!(code, 0, "{console}");
    handshake(&events);
    let realtime = vm("realtime", nestd_guests::l2(), "", None, |c| c.clock = Clock::Realtime);
    assert_eq!(run(&realtime).0, 0);
}

#[test]
fn one_seed_gives_one_event_log_and_the_handshake_holds_under_many() {
    let log = |seed: u64| {
        let vm = vm("seeded", nestd_guests::l1(L1::Demo), "", Some(nestd_guests::l2()), |c| {
            c.scheduler = Scheduler::Deterministic { seed };
        });
        let (code, console, events) = run(&vm);
        assert_eq!(code, 0, "seed {seed}: {console}");
        handshake(&events);
        (format!("{events:?}"), console)
    };
    let first = log(1);
    assert_eq!(log(1), first, "the same to the byte");
    for seed in 2..6 {
        assert_ne!(log(seed).0, first.0);
    }
}

#[test]
fn reads_and_pauses_do_not_change_a_deterministic_run() {
    let run_of = |observed: bool| {
        let vm = vm("observed", nestd_guests::l1(L1::Demo), "", Some(nestd_guests::l2()), |c| {
            c.scheduler = Scheduler::Deterministic { seed: 7 };
        });
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let observer = scope.spawn(|| {
                let mut reads = 0;
                while observed && !over.load(SeqCst) {
                    // The VM may not run yet, or not any more.
                    let answers = [vm.vcpu_fresh(1, PATIENCE).is_ok(), vm.pause().is_ok(), vm.resume().is_ok()];
                    reads += answers.into_iter().filter(|ok| *ok).count();
                }
                reads
            });
            let ran = run(&vm);
            over.store(true, SeqCst);
            let processor_events: Vec<_> =
                ran.2.iter().filter_map(|e| Some((e.vcpu, e.time_ns, processor(e)?, e.cause))).collect();
            (ran.0, processor_events, observer.join().unwrap())
        })
    };
    let (code, events, _) = run_of(false);
    let (observed_code, observed_events, reads) = run_of(true);
    assert!(reads > 0);
    assert_eq!((observed_code, observed_events), (code, events));
}

#[test]
fn published_state_shows_vmx_while_l2_runs() {
    let vm = vm("stays", nestd_guests::l1(L1::StaysActive), "", Some(nestd_guests::l2()), |_| {});
    let (code, _, _) = run(&vm);
    assert_ne!(code, 0, "L2's second processor is missing");
    let nested = vm.nested_state(1).unwrap();
    assert!(nested.vmxon_gpa.is_some() && nested.current_vmcs_gpa.is_some() && nested.fields.len() > 100);
    assert_ne!(vm.vcpu_published(1).unwrap().state.vmx_mode, VmxMode::Off);
}
