//! L1 hypervisors whose VMX the host's kernel runs. Without kvm_intel and nested=1 these count as ignored.

use std::sync::Arc;
use std::time::{Duration, Instant};

use nestd_guests::{L1, exit_code};
use nestd_vcpu::engine::{Injection, VcpuState};
use nestd_vcpu::event::{Level, What};
use nestd_vcpu::host::{EngineKind, allowed_cpus};
use nestd_vcpu::spec::{Boot, Nested, VmConfig, VmSpec};
use nestd_vcpu::vm::{GuestExit, Vm, VmOptions, VmState};
use nested_vmx::event::{MpState, VmxMode};

use crate::rig::HANG;

crate::cases![
    an_l1_under_kvm_starts_its_l2s_second_processor on Nesting,
    an_l1_under_kvm_that_breaks_the_handshake_is_found_by_its_l2 on Nesting,
    the_vmx_side_of_a_vcpu_under_kvm_is_published_and_reset on Nesting,
];

/// The first processor has nothing more to say: what L1 says on the second one is not mixed with it.
const BUSY: &str = "bench: alu begins\n";
const EXIT_3: &str = "L1: cpu 1: exit 3 (INIT signal), resuming in wait-for-SIPI";
const EXIT_4: &str = "L1: cpu 1: exit 4 (SIPI), vector 0x10, starting at 0x10000";

/// An L1 with its L2. The guests spin with IF=1: KVM inside Bochs, where these tests usually run, needs it.
fn started(nested: Nested, l1: L1, l2: &[u8], append: &str) -> Arc<Vm> {
    let append = format!("{append} interrupts=on");
    let boot =
        Boot::Kernel { image: nestd_guests::l1(l1).to_vec(), append, modules: vec![(l2.to_vec(), String::new())] };
    let config = VmConfig { name: "nested".into(), cpus: 2, nested, boot, ..VmConfig::default() };
    let vm = Vm::create(VmSpec::new(config, &allowed_cpus()).expect("a legal spec"), VmOptions::default());
    let vm = vm.expect("a VM");
    assert_eq!((vm.choice().engine, vm.choice().nested), (EngineKind::Kvm, Nested::Kernel));
    vm.start().expect("started");
    vm
}

fn wait<T>(vm: &Vm, what: &str, look: impl FnMut() -> Option<T>) -> T {
    match vm.wait_for(HANG, look) {
        Some(found) => found,
        None => panic!("{what}: never; VM {:?}, console {:?}", vm.state(), console(vm)),
    }
}

fn console(vm: &Vm) -> String {
    String::from_utf8_lossy(&vm.read_console(0, usize::MAX).bytes).into_owned()
}

fn exit_code_of(vm: &Vm) -> u32 {
    match wait(vm, "the VM's end", || Some(vm.state()).filter(VmState::ended)) {
        VmState::Stopped { exit: Some(GuestExit { code }) } => code,
        state => panic!("no exit of the guest's: {state:?}, console {:?}", console(vm)),
    }
}

fn wait_lines(vm: &Vm, line: &str, count: usize) {
    wait(vm, line, || (console(vm).matches(line).count() == count).then_some(()));
}

/// KVM publishes nothing by itself when a vCPU changes its VMX mode: each look is a fresh read. One after the other
/// without a pause would keep the vCPU from running at all on a host with one CPU.
fn read_until(vm: &Vm, vcpu: u32, what: &str, is: impl Fn(&VcpuState) -> bool) -> VcpuState {
    const BETWEEN_READS: Duration = Duration::from_millis(20);
    let deadline = Instant::now() + HANG;
    loop {
        let state = vm.vcpu_fresh(vcpu, HANG).expect("a fresh read").state;
        if is(&state) {
            return state;
        }
        let alive = !vm.state().ended() && Instant::now() < deadline;
        assert!(alive, "{what}: never; VM {:?}, {state:?}, console {:?}", vm.state(), console(vm));
        std::thread::sleep(BETWEEN_READS);
    }
}

fn an_l1_under_kvm_starts_its_l2s_second_processor() {
    // `auto` takes the kernel where it nests.
    for (nested, apic) in [(Nested::Kernel, "apic=xapic"), (Nested::Auto, "apic=x2apic")] {
        let vm = started(nested, L1::Demo, nestd_guests::l2(), apic);
        assert_eq!(exit_code_of(&vm), exit_code::SUCCESS.into(), "{}", console(&vm));
        let text = console(&vm);
        assert!(text.contains(EXIT_3) && text.contains(EXIT_4), "{text}");
    }
}

fn an_l1_under_kvm_that_breaks_the_handshake_is_found_by_its_l2() {
    for mutant in [L1::StaysActive, L1::IgnoresSipi] {
        let vm = started(Nested::Kernel, mutant, nestd_guests::l2(), "apic=xapic");
        assert_ne!(exit_code_of(&vm), exit_code::SUCCESS.into(), "{mutant:?}: {}", console(&vm));
    }
}

/// The first processor runs a loop in L2; the second one is parked there until it is sent something.
fn the_vmx_side_of_a_vcpu_under_kvm_is_published_and_reset() {
    let vm = started(Nested::Kernel, L1::Demo, nestd_guests::bench(), "loop=alu n=1000000000000");
    let parked = |s: &VcpuState| s.vmx_mode == VmxMode::NonRoot && s.mp_state == MpState::Halted;
    let waits = |s: &VcpuState| s.vmx_mode == VmxMode::NonRoot && s.mp_state == MpState::InitReceived;
    wait_lines(&vm, BUSY, 1);
    let in_l2 = read_until(&vm, 1, "the second processor in L2", parked);
    assert!(in_l2.vmxon_gpa.is_some() && in_l2.current_vmcs_gpa.is_some(), "{in_l2:?}");
    let report = vm.nested_state(1).expect("a report");
    assert_eq!((report.mode, report.vmxon_gpa), (VmxMode::NonRoot, in_l2.vmxon_gpa));
    assert_ne!(report.revision_id, 0);
    read_until(&vm, 0, "the first processor in L2", |s| s.vmx_mode == VmxMode::NonRoot);

    let init = vm.inject(1, Injection::Init).expect("sent");
    wait_lines(&vm, EXIT_3, 1);
    read_until(&vm, 1, "wait-for-SIPI in L2", waits);
    let change = What::MpState { from: MpState::Halted, to: MpState::InitReceived };
    let events = vm.events().last_of(1, 64);
    assert!(
        events.iter().any(|e| e.cause == init.id && e.what == change && e.level == Level::L2)
            // A read on the way, while L1 handled the exit, has taken the vCPU for running.
            || events.iter().any(|e| e.mp_state == MpState::InitReceived && e.level == Level::L2),
        "{events:?}"
    );

    vm.reset().expect("reset");
    wait_lines(&vm, BUSY, 2);
    read_until(&vm, 1, "the second processor in L2 after the reset", parked);

    vm.inject(1, Injection::Init).expect("sent");
    wait_lines(&vm, EXIT_3, 2);
    read_until(&vm, 1, "wait-for-SIPI in L2", waits);
    vm.inject(1, Injection::Sipi { vector: 0x10 }).expect("sent");
    wait_lines(&vm, EXIT_4, 1);
}
