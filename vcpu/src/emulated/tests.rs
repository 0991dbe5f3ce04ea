//! Whole VMs on the emulated processor, with guests of a few bytes.

use std::sync::Arc;
use std::time::{Duration, Instant};

use iced_x86::IcedError;
use iced_x86::code_asm::*;
use nested_vmx::event::{ActivityState, Detail, Rule};

use crate::engine::{Disposition, Injection};
use crate::event::{VmChange, What};
use crate::host::allowed_cpus;
use crate::spec::{Boot, Clock, Nested, Scheduler, VmConfig, VmSpec};
use crate::thread::ThreadState;
use crate::vm::{GuestExit, Vm, VmOptions, VmState};

const PATIENCE: Duration = Duration::from_secs(20);
const LOAD_GPA: u64 = 0x1000;

/// A VM that starts `image` in real mode at [`LOAD_GPA`].
fn flat(name: &str, image: &[u8], change: impl FnOnce(&mut VmConfig)) -> Arc<Vm> {
    let mut config = VmConfig {
        name: name.into(),
        memory_bytes: 16 << 20,
        nested: Nested::Emulated,
        boot: Boot::Flat { image: image.into(), load_gpa: LOAD_GPA, entry_gpa: None },
        ..VmConfig::default()
    };
    change(&mut config);
    Vm::create(VmSpec::new(config, &allowed_cpus()).unwrap(), VmOptions::default()).unwrap()
}

fn ends(vm: &Vm) -> VmState {
    let ended = vm.wait_for(PATIENCE, || Some(vm.state()).filter(VmState::ended));
    ended.unwrap_or_else(|| panic!("still {:?}: {:?}", vm.state(), vm.inspect(0, PATIENCE)))
}

/// mov dx, port; mov al, value; out dx, al
fn out(port: u16, value: u8) -> Vec<u8> {
    let [low, high] = port.to_le_bytes();
    vec![0xba, low, high, 0xb0, value, 0xee]
}

const HLT_FOREVER: [u8; 3] = [0xf4, 0xeb, 0xfd];

#[test]
fn a_flat_guest_writes_to_the_console_and_exits() {
    let image = [out(0x3f8, b'h'), out(0x3f8, b'i'), out(0xf4, 0x2a), HLT_FOREVER.into()].concat();
    let vm = flat("hello", &image, |_| {});
    vm.start().unwrap();
    assert_eq!(ends(&vm), VmState::Stopped { exit: Some(GuestExit { code: 0x2a }) });
    assert_eq!(vm.console().read(0, 100).bytes, b"hi");
    assert!(vm.counters().vcpus[0].instructions >= 9);
}

#[test]
fn a_halted_guest_sleeps_and_application_processors_wait_for_sipi() {
    let vm = flat("halted", &[&[0xfa][..], &HLT_FOREVER].concat(), |c| c.cpus = 2);
    vm.start().unwrap();
    reaches(&vm, 0, ThreadState::Idle, ActivityState::Hlt);
    reaches(&vm, 1, ThreadState::Idle, ActivityState::WaitForSipi);
}

fn reaches(vm: &Vm, vcpu: u32, thread: ThreadState, activity: ActivityState) {
    let found = vm.wait_for(PATIENCE, || {
        let r = vm.vcpu_published(vcpu).unwrap();
        (r.thread == thread && r.state.activity == activity).then_some(())
    });
    assert!(found.is_some(), "{:?}", vm.vcpu_published(vcpu));
}

const SPIN: [u8; 2] = [0xeb, 0xfe];

#[test]
fn an_application_processor_is_started_by_an_injected_sipi() {
    let vm = flat("sipi", &SPIN, |c| c.cpus = 2);
    vm.start().unwrap();
    reaches(&vm, 1, ThreadState::Idle, ActivityState::WaitForSipi);
    let inject = |injection| vm.inject(1, injection).unwrap().disposition;
    assert_eq!(inject(Injection::Init), Disposition::Dropped(Rule::R2));
    assert_eq!(inject(Injection::Sipi { vector: 1 }), Disposition::Started);
    reaches(&vm, 1, ThreadState::Running, ActivityState::Active);
    assert_eq!(vm.registers(1).unwrap().segments[1].selector, 0x100);
    assert_eq!(inject(Injection::Sipi { vector: 2 }), Disposition::Dropped(Rule::R1));
    assert_eq!(inject(Injection::Init), Disposition::Delivered);
    reaches(&vm, 1, ThreadState::Idle, ActivityState::WaitForSipi);
    let counts = &vm.counters().vcpus[1];
    assert_eq!((counts.init.delivered, counts.init.dropped), (1, 1));
    assert_eq!((counts.sipi.delivered, counts.sipi.dropped), (1, 1));
}

#[test]
fn two_running_vcpus_stay_together_in_guest_time() {
    let vm = flat("together", &SPIN, |c| c.cpus = 2);
    vm.start().unwrap();
    assert_eq!(vm.inject(1, Injection::Sipi { vector: 1 }).unwrap().disposition, Disposition::Started);
    for _ in 0..20 {
        vm.pause().unwrap();
        let at = |vcpu| vm.vcpu_fresh(vcpu, PATIENCE).unwrap().state;
        let (a, b) = (at(0), at(1));
        assert!(a.time_ns.abs_diff(b.time_ns) <= 100_000, "{} and {}", a.time_ns, b.time_ns);
        vm.resume().unwrap();
    }
    let after = vm.vcpu_fresh(1, PATIENCE).unwrap().state;
    assert!(after.instructions > 0);
}

#[test]
fn a_reset_puts_every_processor_and_memory_back_and_time_goes_on() {
    // mov byte [0x600], 1; spin
    let image = [&[0xc6, 0x06, 0x00, 0x06, 0x01][..], &SPIN].concat();
    let vm = flat("reset", &image, |c| c.cpus = 2);
    vm.start().unwrap();
    assert_eq!(vm.inject(1, Injection::Sipi { vector: 1 }).unwrap().disposition, Disposition::Started);
    let before = vm.vcpu_fresh(0, PATIENCE).unwrap().state;
    vm.reset().unwrap();
    reaches(&vm, 1, ThreadState::Idle, ActivityState::WaitForSipi);
    let runs_on = vm.wait_for(PATIENCE, || {
        let after = vm.vcpu_fresh(0, PATIENCE).unwrap().state;
        assert!(after.time_ns >= before.time_ns && after.instructions >= before.instructions);
        (after.instructions > before.instructions).then_some(())
    });
    runs_on.expect("the bootstrap processor runs again");
    assert_eq!(vm.state(), VmState::Running);
    assert_eq!(vm.inject(1, Injection::Sipi { vector: 1 }).unwrap().disposition, Disposition::Started);
}

#[test]
fn the_pit_counts_guest_time_to_the_block() {
    // PIT channel 2, mode 0, counts down from 0xffff with its gate open; then 2000 turns of a loop; then it is read
    // and written to the console.
    let image = [
        &out(0x61, 1)[..],
        &out(0x43, 0xb0),
        &out(0x42, 0xff),
        &out(0x42, 0xff),
        &[0xb9, 0xd0, 0x07, 0xe2, 0xfe],                         // mov cx, 2000; loop $
        &out(0x43, 0x80),                                        // latch
        &[0xba, 0x42, 0x00, 0xec, 0x88, 0xc3, 0xec, 0x88, 0xc7], // in al, dx; mov bl, al; in al, dx; mov bh, al
        &[0xba, 0xf8, 0x03, 0x88, 0xd8, 0xee, 0x88, 0xf8, 0xee], // to the console
        &out(0xf4, 0),
        &HLT_FOREVER,
    ]
    .concat();
    let vm = flat("pit", &image, |_| {});
    vm.start().unwrap();
    ends(&vm);
    let bytes = vm.console().read(0, 2).bytes;
    let counted = 0xffff - u16::from_le_bytes([bytes[0], bytes[1]]);
    // 2000 instructions are 2000 ns, which are 2.39 ticks of 1.193182 MHz.
    assert!((2..=3).contains(&counted), "{counted}");
}

#[test]
fn an_init_that_is_blocked_wakes_its_target_once_and_not_again() {
    let vm = flat("blocked", &SPIN, |c| c.cpus = 2);
    vm.start().unwrap();
    reaches(&vm, 1, ThreadState::Idle, ActivityState::WaitForSipi);
    let wakeups = || vm.counters().vcpus[1].wakeups;
    let before = wakeups();
    for n in 1..=3 {
        assert_eq!(vm.inject(1, Injection::Init).unwrap().disposition, Disposition::Dropped(Rule::R2));
        reaches(&vm, 1, ThreadState::Idle, ActivityState::WaitForSipi);
        // The other vCPU's instructions and reads wake nobody.
        vm.vcpu_fresh(0, PATIENCE).unwrap();
        assert!(wakeups() <= before + n, "{} wakeups for {n} events", wakeups() - before);
    }
}

#[test]
fn a_triple_fault_fails_the_vm_with_a_dump_and_a_stopped_guest_stays_readable() {
    // lidt [0x2000] (all zeros there); int3
    let vm = flat("triple", &[0x0f, 0x01, 0x1e, 0x00, 0x20, 0xcc], |c| c.cpus = 2);
    vm.start().unwrap();
    let VmState::Failed { reason, dump } = ends(&vm) else { panic!("{:?}", vm.state()) };
    assert_eq!(reason, "vCPU 0: triple fault");
    assert!(dump.exact);
    assert_eq!((dump.vcpu, dump.registers.rip), (0, LOAD_GPA + 5));
    assert!(dump.events.iter().any(|e| matches!(e.what, What::Processor(Detail::TripleFault))));
    assert_eq!(vm.registers(0).unwrap(), dump.registers);
}

#[test]
fn a_guest_asks_for_a_reset_and_for_power_off() {
    let mut image = vec![0xba, 0xf9, 0x0c, 0xb0, 0x06, 0xee]; // mov dx, 0xcf9; mov al, 6; out dx, al
    image.extend(HLT_FOREVER);
    let vm = flat("resets", &image, |_| {});
    vm.start().unwrap();
    let reset = |e: &crate::event::EventRecord| e.what == What::Vm(VmChange::Reset);
    let twice = vm.wait_for(PATIENCE, || {
        (vm.events().read(1, 1000).events.iter().filter(|e| reset(e)).count() >= 2).then_some(())
    });
    assert!(twice.is_some(), "it boots, resets and boots again");
    vm.stop().unwrap();

    let image: Vec<u8> = b"Shutdown".iter().flat_map(|b| out(0x8900, *b)).chain(HLT_FOREVER).collect();
    let vm = flat("off", &image, |_| {});
    vm.start().unwrap();
    assert_eq!(ends(&vm), VmState::Stopped { exit: None });
}

/// Assembles 16-bit code for [`LOAD_GPA`].
fn assemble(code: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Vec<u8> {
    let mut a = CodeAssembler::new(16).unwrap();
    code(&mut a).unwrap();
    a.assemble(LOAD_GPA).unwrap()
}

fn out_port(a: &mut CodeAssembler, port: u16, value: u8) -> Result<(), IcedError> {
    a.mov(dx, u32::from(port))?;
    a.mov(al, u32::from(value))?;
    a.out(dx, al)
}

#[test]
fn console_input_reaches_the_guest_in_order() {
    // Echoes until it reads a full stop.
    let image = assemble(|a| {
        let mut wait = a.create_label();
        a.set_label(&mut wait)?;
        a.mov(dx, 0x3fd)?;
        a.in_(al, dx)?;
        a.test(al, 1)?;
        a.je(wait)?;
        a.mov(dx, 0x3f8)?;
        a.in_(al, dx)?;
        a.out(dx, al)?;
        a.cmp(al, i32::from(b'.'))?;
        a.jne(wait)?;
        out_port(a, 0xf4, 7)?;
        a.hlt()
    });
    let vm = flat("echo", &image, |_| {});
    vm.start().unwrap();
    let said = "More than a serial device's buffer holds at once, said in one breath.";
    assert_eq!(vm.write_console(said.as_bytes()), said.len());
    assert_eq!(ends(&vm), VmState::Stopped { exit: Some(GuestExit { code: 7 }) });
    assert_eq!(vm.console().read(0, 1000).bytes, said.as_bytes());
}

/// Halts until the PIT has interrupted through the 8259 pair that often, then exits.
fn timer_guest(ticks: u8) -> Vec<u8> {
    assemble(|a| {
        let (mut main, mut wait) = (a.create_label(), a.create_label());
        a.jmp(main)?;
        // The handler, right behind a short jump.
        a.inc(bx)?;
        out_port(a, 0x20, 0x20)?;
        a.iret()?;
        a.set_label(&mut main)?;
        a.mov(di, 0x20 * 4)?;
        a.mov(word_ptr(di), LOAD_GPA as u32 + 2)?;
        a.mov(word_ptr(di + 2), 0)?;
        a.mov(sp, 0x8000)?;
        for (port, value) in [(0x20, 0x11), (0x21, 0x20), (0x21, 4), (0x21, 1), (0x21, 0xfe)] {
            out_port(a, port, value)?;
        }
        // Channel 0, mode 2, 11932 ticks: 100 Hz.
        for (port, value) in [(0x43, 0x34), (0x40, 0x9c), (0x40, 0x2e)] {
            out_port(a, port, value)?;
        }
        a.xor(bx, bx)?;
        a.set_label(&mut wait)?;
        a.sti()?;
        a.hlt()?;
        a.cmp(bx, i32::from(ticks))?;
        a.jb(wait)?;
        out_port(a, 0xf4, ticks)?;
        a.hlt()
    })
}

#[test]
fn a_halted_guest_is_woken_by_the_pit_in_guest_time() {
    const TICKS: u8 = 100;
    for (clock, seed) in [(Clock::Virtual, None), (Clock::Virtual, Some(4)), (Clock::Realtime, None)] {
        let vm = flat("pit-irq", &timer_guest(TICKS), |c| {
            c.clock = clock;
            c.cpus = 2;
            c.scheduler = seed.map_or(Scheduler::Parallel, |seed| Scheduler::Deterministic { seed });
        });
        let start = Instant::now();
        vm.start().unwrap();
        assert_eq!(ends(&vm), VmState::Stopped { exit: Some(GuestExit { code: TICKS.into() }) });
        let guest_ns = vm.vcpu_published(0).unwrap().state.time_ns;
        let expected = 10_000_000 * u64::from(TICKS);
        match clock {
            Clock::Virtual => assert!(guest_ns.abs_diff(expected) < 10_000_000, "{guest_ns}"),
            // The host may be late, the guest's clock may not be early.
            Clock::Realtime => {
                assert!(guest_ns >= expected - 10_000_000 && start.elapsed() >= Duration::from_millis(900));
            }
        }
        let counts = &vm.counters().vcpus[0];
        assert!(counts.wakeups <= 3 * u64::from(TICKS), "{} wakeups for {TICKS} ticks", counts.wakeups);
    }
}

#[test]
fn random_numbers_are_each_vms_own_and_repeat_with_the_seed_of_a_deterministic_one() {
    let image = assemble(|a| {
        a.mov(dx, 0x3f8)?;
        a.rdrand(eax)?;
        for _ in 0..4 {
            a.out(dx, al)?;
            a.shr(eax, 8)?;
        }
        out_port(a, 0xf4, 0)?;
        a.hlt()
    });
    let number = |scheduler| {
        let vm = flat("random", &image, |c| c.scheduler = scheduler);
        vm.start().unwrap();
        ends(&vm);
        let bytes = vm.console().read(0, 4).bytes;
        assert_eq!(bytes.len(), 4);
        bytes
    };
    let seeded = |seed| number(Scheduler::Deterministic { seed });
    assert_eq!(seeded(1), seeded(1));
    assert_ne!(seeded(1), seeded(2));
    // Two draws of 32 bits may be equal, once in a lifetime; three are not.
    let parallel: Vec<_> = (0..3).map(|_| number(Scheduler::Parallel)).collect();
    assert!(parallel.iter().any(|n| *n != parallel[0]), "{parallel:?}");
}
