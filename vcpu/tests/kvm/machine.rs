//! VMs on KVM through the crate's API, as the daemon uses it.

use std::sync::Arc;

use iced_x86::code_asm::*;
use nestd_vcpu::engine::{Disposition, Injection};
use nestd_vcpu::event::What;
use nestd_vcpu::host::{EngineKind, PreflightError, allowed_cpus};
use nestd_vcpu::spec::{Boot, Nested, VmConfig, VmSpec};
use nestd_vcpu::vm::{GuestExit, Vm, VmError, VmOptions, VmState};
use nested_vmx::event::{Detail, Fate, MpState, Rule};

use crate::guest::*;
use crate::rig::HANG;

crate::cases![
    a_flat_image_boots_prints_and_ends_its_vm,
    a_multiboot_kernel_starts_in_protected_mode,
    pause_stops_a_spinning_guest_and_resume_lets_it_go_on,
    injected_init_and_sipi_are_published_with_their_causes,
    both_engines_tell_the_same_init_and_sipi_story,
    a_disabled_local_apic_takes_no_injection,
    a_busy_vcpu_is_read_and_moved_between_host_cpus,
    a_reset_boots_again_with_clean_memory,
    the_guest_resets_its_machine,
    the_guest_powers_its_machine_off,
    serial_input_interrupts_the_guest,
    an_unemulatable_instruction_fails_the_vm_with_a_dump on Pvm,
    a_triple_fault_fails_the_vm_and_is_an_event,
    paging_that_kvm_pvm_lacks_is_explained on Pvm,
    stop_ends_vcpus_that_spin_and_vcpus_that_wait,
    sixteen_vms_run_and_end_on_their_own,
    kernel_nesting_is_refused_with_what_is_missing on Pvm,
];

/// Where images are loaded, below everything that tests place: page tables, GDT, flag, code.
const LOAD_GPA: u64 = 0x1000;

type Code<'a> = &'a dyn Fn(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>;

/// An image with the BSP's real-mode code at BSP_GPA and the AP's at AP_GPA.
fn image(bsp: Code<'_>, ap: Code<'_>) -> Vec<u8> {
    let ram = nested_vmx::mem::Ram::new(0x10000).expect("RAM");
    place(&ram, BSP_GPA, 16, |a| bsp(a));
    place_with_ip(&ram, AP_GPA, 0, 16, |a| ap(a));
    image_of(&ram)
}

fn image_of(ram: &nested_vmx::mem::Ram) -> Vec<u8> {
    let mut image = vec![0; 0xa000 - LOAD_GPA as usize];
    ram.read(LOAD_GPA, &mut image).expect("in RAM");
    image
}

fn nothing(a: &mut CodeAssembler) -> Result<(), iced_x86::IcedError> {
    a.cli()?;
    hlt_forever(a)
}

fn flat(image: Vec<u8>) -> Boot {
    Boot::Flat { image, load_gpa: LOAD_GPA, entry_gpa: Some(BSP_GPA) }
}

fn started_on(nested: Nested, cpus: u32, boot: Boot) -> Arc<Vm> {
    let config = VmConfig { name: "kvm".into(), cpus, nested, boot, ..VmConfig::default() };
    let spec = VmSpec::new(config, &allowed_cpus()).expect("a legal spec");
    let vm = Vm::create(spec, VmOptions::default()).expect("a VM");
    vm.start().expect("started");
    vm
}

fn started(cpus: u32, boot: Boot) -> Arc<Vm> {
    let vm = started_on(Nested::None, cpus, boot);
    assert_eq!(vm.choice().engine, EngineKind::Kvm);
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

fn wait_console(vm: &Vm, text: &str) {
    wait(vm, text, || (console(vm) == text).then_some(()));
}

/// The end of the VM: its exit, or why it failed.
fn end(vm: &Vm) -> VmState {
    wait(vm, "the VM's end", || Some(vm.state()).filter(VmState::ended))
}

fn exited(code: u32) -> VmState {
    VmState::Stopped { exit: Some(GuestExit { code }) }
}

fn failure(vm: &Vm) -> String {
    match end(vm) {
        VmState::Failed { reason, .. } => reason,
        state => panic!("not failed: {state:?}"),
    }
}

fn wait_mp_state(vm: &Vm, vcpu: u32, mp_state: MpState) {
    wait(vm, "mp_state", || {
        let published = vm.vcpu_published(vcpu).expect("a vCPU").state.mp_state;
        (published == mp_state).then_some(())
    });
}

fn a_flat_image_boots_prints_and_ends_its_vm() {
    let vm = started(
        1,
        flat(image(
            &|a| {
                print(a, "flat")?;
                exit(a, 5)
            },
            &nothing,
        )),
    );
    assert_eq!(end(&vm), exited(5));
    assert_eq!(console(&vm), "flat");
    let counters = vm.counters();
    let io_exits = counters.vcpus[0].kvm_exits.get(&2).copied();
    assert_eq!(io_exits, Some(5), "four bytes and the debug exit");
}

/// A multiboot1 header with address fields, and 32-bit code behind it.
fn a_multiboot_kernel_starts_in_protected_mode() {
    const LOAD: u32 = 0x10_0000;
    const MAGIC: u32 = 0x1bad_b002;
    const FLAGS: u32 = 1 << 16;
    let mut a = CodeAssembler::new(32).expect("a valid bitness");
    let code = |a: &mut CodeAssembler| {
        a.cmp(eax, 0x2bad_b002)?;
        let mut wrong = a.create_label();
        a.jne(wrong)?;
        print(a, "multiboot")?;
        exit(a, 1)?;
        a.set_label(&mut wrong)?;
        exit(a, 2)
    };
    code(&mut a).expect("encodable");
    let code = a.assemble(u64::from(LOAD) + 32).expect("assembles");
    let header = [MAGIC, FLAGS, 0u32.wrapping_sub(MAGIC).wrapping_sub(FLAGS), LOAD, LOAD, 0, 0, LOAD + 32];
    let mut image: Vec<u8> = header.iter().flat_map(|word| word.to_le_bytes()).collect();
    image.extend(code);
    let vm = started(1, Boot::Kernel { image, append: String::new(), modules: vec![] });
    assert_eq!((end(&vm), console(&vm)), (exited(1), "multiboot".into()));
}

fn counting(a: &mut CodeAssembler) -> Result<(), iced_x86::IcedError> {
    let mut again = a.create_label();
    a.sti()?;
    a.xor(eax, eax)?;
    a.set_label(&mut again)?;
    a.inc(eax)?;
    a.jmp(again)
}

fn pause_stops_a_spinning_guest_and_resume_lets_it_go_on() {
    let vm = started(2, flat(image(&counting, &nothing)));
    let count = || vm.registers(0).expect("registers").gprs[0];
    for _ in 0..20 {
        let running = count();
        wait(&vm, "progress", || (count() != running).then_some(()));
        vm.pause().expect("paused");
        let paused = count();
        assert_eq!((count(), count()), (paused, paused));
        assert_eq!(vm.vcpu_fresh(1, HANG).expect("read").state.mp_state, MpState::Uninitialized);
        vm.resume().expect("resumed");
    }
    assert_eq!(vm.state(), VmState::Running);
}

fn injected_init_and_sipi_are_published_with_their_causes() {
    let vm = started(
        2,
        flat(image(&nothing, &|a| {
            print(a, "ap")?;
            nothing(a)
        })),
    );
    assert_eq!(vm.vcpu_published(1).expect("a vCPU").state.mp_state, MpState::Uninitialized);
    let init = vm.inject(1, Injection::Init).expect("injected");
    assert_eq!(init.disposition, Disposition::AcceptedFateNotObservable);
    wait_mp_state(&vm, 1, MpState::InitReceived);
    let sipi = vm.inject(1, Injection::Sipi { vector: AP_VECTOR }).expect("injected");
    assert_eq!(sipi.disposition, Disposition::AcceptedFateNotObservable);
    wait_console(&vm, "ap");
    while vm.vcpu_fresh(1, HANG).expect("read").state.mp_state != MpState::Halted {
        std::thread::yield_now();
    }
    let story: Vec<_> = vm.events().read(1, 1000).events.into_iter().filter(|e| e.vcpu == 1).collect();
    let whats: Vec<_> = story.iter().map(|e| (e.what, e.cause)).collect();
    let step = |from, to| What::MpState { from, to };
    let injected = |id, injection| (What::Injected { id, injection }, 0);
    assert_eq!(whats[0], injected(init.id, Injection::Init), "{whats:?}");
    assert_eq!(whats[1], (step(MpState::Uninitialized, MpState::InitReceived), init.id));
    assert_eq!(whats[2], injected(sipi.id, Injection::Sipi { vector: AP_VECTOR }));
    // Whether somebody looked before it halted is chance.
    let (What::MpState { from: MpState::InitReceived, .. }, cause) = whats[3] else { panic!("{whats:?}") };
    assert_eq!(cause, sipi.id);
    assert_eq!(story.last().map(|e| e.mp_state), Some(MpState::Halted));
    assert_eq!(story[0].mp_state, MpState::Uninitialized);
    assert!(story.windows(2).all(|w| w[0].seq < w[1].seq));
}

/// The states of vCPU 1 until it has printed and halted. An AP leaves RESET in INIT_RECEIVED on the emulated
/// processor and in UNINITIALIZED on KVM (R22): the story compared begins behind that.
fn ap_story(nested: Nested, image: &[u8]) -> Vec<MpState> {
    let vm = started_on(nested, 2, flat(image.to_vec()));
    vm.inject(1, Injection::Init).expect("injected");
    wait_mp_state(&vm, 1, MpState::InitReceived);
    vm.inject(1, Injection::Sipi { vector: AP_VECTOR }).expect("injected");
    wait_console(&vm, "ap");
    while vm.vcpu_fresh(1, HANG).expect("read").state.mp_state != MpState::Halted {
        std::thread::yield_now();
    }
    let states = vm.events().read(1, 10_000).events.into_iter().filter(|e| e.vcpu == 1).map(|e| e.mp_state);
    let mut story: Vec<_> = states.filter(|&s| s != MpState::Uninitialized).collect();
    story.dedup();
    story
}

fn both_engines_tell_the_same_init_and_sipi_story() {
    let image = image(&nothing, &|a| {
        print(a, "ap")?;
        nothing(a)
    });
    let (kvm, emulated) = (ap_story(Nested::None, &image), ap_story(Nested::Emulated, &image));
    assert_eq!(kvm, [MpState::InitReceived, MpState::Runnable, MpState::Halted]);
    assert_eq!(emulated, kvm);
}

fn a_disabled_local_apic_takes_no_injection() {
    let vm = started(
        1,
        flat(image(
            &|a| {
                a.mov(ecx, 0x1b)?;
                a.rdmsr()?;
                a.and(eax, !(1 << 11))?;
                a.wrmsr()?;
                print(a, "off")?;
                nothing(a)
            },
            &nothing,
        )),
    );
    wait_console(&vm, "off");
    let nmi = vm.inject(0, Injection::Nmi).expect("injected");
    assert_eq!(nmi.disposition, Disposition::Dropped(Rule::R22));
    let events = vm.events().read(1, 1000).events;
    let dropped = What::Processor(Detail::Nmi(Fate::Dropped(Rule::R22)));
    assert!(events.iter().any(|e| e.what == dropped && e.cause == nmi.id), "{events:?}");
}

fn a_busy_vcpu_is_read_and_moved_between_host_cpus() {
    let vm = started(1, flat(image(&counting, &nothing)));
    let tid = wait(&vm, "a thread", || vm.vcpu_published(0).expect("a vCPU").tid);
    for cpu in allowed_cpus() {
        vm.set_affinity(0, &[cpu]).expect("pinned");
        let status = std::fs::read_to_string(format!("/proc/self/task/{tid}/status")).expect("the thread");
        let allowed = status.lines().find_map(|l| l.strip_prefix("Cpus_allowed_list:")).map(str::trim);
        assert_eq!(allowed, Some(cpu.to_string().as_str()));
        let report = vm.vcpu_fresh(0, HANG).expect("read");
        assert_eq!((report.host_cpus, report.state.mp_state), (vec![cpu], MpState::Runnable));
    }
}

fn a_reset_boots_again_with_clean_memory() {
    let vm = started(
        2,
        flat(image(
            &|a| {
                // The flag's first value comes from the image, the word's far above it from empty RAM.
                a.mov(al, byte_ptr(FLAG_GPA))?;
                a.add(al, byte_ptr(0xf000))?;
                a.add(al, i32::from(b'0'))?;
                a.mov(dx, SERIAL)?;
                a.out(dx, al)?;
                a.mov(byte_ptr(FLAG_GPA), 5)?;
                a.mov(byte_ptr(0xf000), 3)?;
                hlt_forever(a)
            },
            &counting,
        )),
    );
    for round in 1..=5 {
        wait_console(&vm, &"0".repeat(round));
        // An AP that runs, and an INIT that may still be on its way.
        for injection in [Injection::Init, Injection::Sipi { vector: AP_VECTOR }, Injection::Init] {
            vm.inject(1, injection).expect("injected");
        }
        vm.reset().expect("reset");
    }
    wait_console(&vm, &"0".repeat(6));
    assert_eq!(vm.vcpu_fresh(1, HANG).expect("read").state.mp_state, MpState::Uninitialized);
}

fn the_guest_resets_its_machine() {
    let vm = started(
        1,
        flat(image(
            &|a| {
                print(a, "r")?;
                a.mov(dx, 0xcf9)?;
                a.mov(al, 6)?;
                a.out(dx, al)?;
                hlt_forever(a)
            },
            &nothing,
        )),
    );
    wait(&vm, "three boots", || (console(&vm).len() >= 3).then_some(()));
    vm.stop().expect("stopped");
}

fn the_guest_powers_its_machine_off() {
    let image = image(
        &|a| {
            a.mov(dx, 0x8900)?;
            for byte in b"Shutdown" {
                a.mov(al, i32::from(*byte))?;
                a.out(dx, al)?;
            }
            hlt_forever(a)
        },
        &nothing,
    );
    assert_eq!(end(&started(1, flat(image))), VmState::Stopped { exit: None });
}

fn serial_input_interrupts_the_guest() {
    let ram = nested_vmx::mem::Ram::new(0x10000).expect("RAM");
    place(&ram, 0x7400, 16, |a| {
        // Until the line status says that there is no more: ISA interrupts are edges.
        let (mut again, mut done) = (a.create_label(), a.create_label());
        a.set_label(&mut again)?;
        a.mov(dx, SERIAL + 5)?;
        a.in_(al, dx)?;
        a.test(al, 1)?;
        a.jz(done)?;
        a.mov(dx, SERIAL)?;
        a.in_(al, dx)?;
        a.inc(al)?;
        a.out(dx, al)?;
        a.jmp(again)?;
        a.set_label(&mut done)?;
        a.mov(al, 0x20)?;
        a.out(0x20, al)?;
        a.iret()
    });
    place(&ram, BSP_GPA, 16, |a| {
        // The 8259 pair at vectors 0x20 and 0x28, all but line 4 masked.
        for (port, value) in [(0x20, 0x11), (0x21, 0x20), (0x21, 4), (0x21, 1), (0x21, 0xef), (0xa1, 0xff)] {
            a.mov(al, value)?;
            a.out(port, al)?;
        }
        // The IVT lies below the image.
        a.mov(dword_ptr(4 * 0x24), 0x7400)?;
        a.mov(dx, SERIAL + 1)?;
        a.mov(al, 1)?;
        a.out(dx, al)?;
        print(a, ">")?;
        a.sti()?;
        hlt_forever(a)
    });
    let vm = started(1, flat(image_of(&ram)));
    wait_console(&vm, ">");
    assert_eq!(vm.write_console(b"HAL"), 3);
    wait_console(&vm, ">IBM");
    // More than the device's own buffer holds.
    let many = vec![b'a'; 500];
    assert_eq!(vm.write_console(&many), 500);
    wait_console(&vm, &(">IBM".to_owned() + &"b".repeat(500)));
}

fn an_unemulatable_instruction_fails_the_vm_with_a_dump() {
    let ram = nested_vmx::mem::Ram::new(0x10000).expect("RAM");
    place_long(&ram, |a| {
        print(a, "!")?;
        a.popcnt(rax, rbx)
    });
    let vm = started(1, flat(image_of(&ram)));
    let VmState::Failed { reason, dump } = end(&vm) else { panic!("{:?}", vm.state()) };
    assert!(reason.contains("f3 48 0f b8 c3") && reason.contains("cannot emulate"), "{reason}");
    assert!(reason.contains(&format!("rip {:#x}", dump.state.rip)), "{reason}");
    assert!(dump.exact && dump.registers.rip == dump.state.rip && dump.state.efer & 1 << 10 != 0);
}

fn a_triple_fault_fails_the_vm_and_is_an_event() {
    let ram = nested_vmx::mem::Ram::new(0x10000).expect("RAM");
    place_protected(&ram, |a| {
        a.lidt(fword_ptr(0x6200))?;
        a.ud2()
    });
    let vm = started(1, flat(image_of(&ram)));
    assert!(failure(&vm).contains("triple fault"), "{:?}", vm.state());
    let events = vm.events().read(1, 1000).events;
    assert!(events.iter().any(|e| e.what == What::Processor(Detail::TripleFault)), "{events:?}");
}

fn paging_that_kvm_pvm_lacks_is_explained() {
    let ram = nested_vmx::mem::Ram::new(0x10000).expect("RAM");
    place_protected(&ram, |a| {
        // A page directory at 0x1000 that maps the first 4 MiB by one large page.
        a.mov(dword_ptr(0x1000), 0x83)?;
        a.mov(eax, cr4)?;
        a.or(eax, 1 << 4)?;
        a.mov(cr4, eax)?;
        a.mov(eax, 0x1000)?;
        a.mov(cr3, eax)?;
        a.mov(eax, cr0)?;
        a.or(eax, 0x8000_0000u32 as i32)?;
        a.mov(cr0, eax)?;
        a.nop()?;
        exit(a, 1)
    });
    let vm = started(1, flat(image_of(&ram)));
    assert!(failure(&vm).contains("kvm_pvm has no 32-bit"), "{:?}", vm.state());
}

fn stop_ends_vcpus_that_spin_and_vcpus_that_wait() {
    let vm = started(4, flat(image(&counting, &nothing)));
    vm.inject(1, Injection::Init).expect("injected");
    vm.inject(2, Injection::Nmi).expect("injected");
    wait_mp_state(&vm, 1, MpState::InitReceived);
    vm.stop().expect("stopped");
    assert_eq!(vm.state(), VmState::Stopped { exit: None });
    assert!((0..4).all(|i| vm.vcpu_published(i).expect("a vCPU").tid.is_none()));
    assert!(matches!(vm.inject(0, Injection::Nmi), Err(VmError::WrongState { .. })));
}

fn sixteen_vms_run_and_end_on_their_own() {
    let vms: Vec<_> = (0..16)
        .map(|n| {
            let boot = flat(image(
                &move |a| {
                    spin_while_flag_is(a, 0)?;
                    exit(a, n)
                },
                &|a| {
                    a.xor(ax, ax)?;
                    a.mov(ds, ax)?;
                    a.mov(byte_ptr(FLAG_GPA), 1)?;
                    hlt_forever(a)
                },
            ));
            started(2, boot)
        })
        .collect();
    for vm in &vms {
        vm.inject(1, Injection::Init).expect("injected");
        wait_mp_state(vm, 1, MpState::InitReceived);
        vm.inject(1, Injection::Sipi { vector: AP_VECTOR }).expect("injected");
    }
    for (vm, n) in vms.iter().zip(0..) {
        assert_eq!(end(vm), exited(n));
    }
}

fn kernel_nesting_is_refused_with_what_is_missing() {
    let config = VmConfig { name: "n".into(), nested: Nested::Kernel, ..VmConfig::default() };
    let spec = VmSpec::new(config, &allowed_cpus()).expect("a legal spec");
    let Err(VmError::Preflight(error)) = Vm::create(spec, VmOptions::default()) else { panic!("not refused") };
    assert!(matches!(error, PreflightError::NoKernelNesting { .. }));
    assert_eq!(error.alternative(), Nested::Emulated);
    assert!(error.to_string().contains("nested = emulated"), "{error}");
}
