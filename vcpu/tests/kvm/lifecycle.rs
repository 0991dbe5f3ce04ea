//! Kicks, fresh reads, reset, many VMs.

use std::time::Instant;

use iced_x86::code_asm::*;
use nestd_vcpu::kvm::{KvmError, KvmVm, MAX_CPUS, Message};
use nested_vmx::event::MpState;

use crate::guest::*;
use crate::rig::{HANG, Rig};

crate::cases![
    a_fresh_read_of_a_spinning_vcpu_answers,
    a_storm_of_kicks_loses_no_work_of_the_guest,
    a_reset_brings_back_the_state_after_creation,
    a_reset_forgets_a_pending_init_and_sipi,
    sixteen_vms_with_two_vcpus_each_run_at_once,
    too_many_vcpus_are_refused_with_the_limit,
];

fn spin(a: &mut CodeAssembler) -> Result<(), iced_x86::IcedError> {
    let mut again = a.create_label();
    a.sti()?;
    a.set_label(&mut again)?;
    a.jmp(again)
}

fn a_fresh_read_of_a_spinning_vcpu_answers() {
    let rig = Rig::started(2, |ram| {
        place(ram, BSP_GPA, 16, spin);
    });
    for _ in 0..100 {
        assert_eq!(rig.observe_until(0, "in the loop", |o| o.rip != BSP_GPA).rip, BSP_GPA + 1);
        assert_eq!(rig.observe(1).mp_state, MpState::Uninitialized);
    }
}

fn a_storm_of_kicks_loses_no_work_of_the_guest() {
    const ROUNDS: i32 = 2000;
    const KICKS: u32 = 3000;
    let rig = Rig::new(1, |ram| {
        place(ram, BSP_GPA, 16, |a| {
            let mut again = a.create_label();
            a.mov(ecx, ROUNDS)?;
            a.mov(dx, SERIAL)?;
            a.set_label(&mut again)?;
            a.mov(eax, ecx)?;
            a.out(dx, al)?;
            a.dec(ecx)?;
            a.jnz(again)?;
            exit(a, 1)
        });
    });
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                let kicker = rig.kicker(0);
                for _ in 0..KICKS {
                    kicker.kick();
                    std::thread::yield_now();
                }
            });
        }
        rig.go();
    });
    let seen = rig.board.wait("debug exit", |s| s.exit.is_some() || !s.ends.is_empty());
    assert_eq!(seen.exit, Some(1), "{:?}", seen.ends);
    let expected: Vec<u8> = (1..=ROUNDS).rev().map(|n| n as u8).collect();
    assert!(seen.serial == expected, "each byte once, in order");
}

fn a_reset_brings_back_the_state_after_creation() {
    let rig = Rig::started(2, |ram| {
        place_long(ram, |a| {
            a.mov(rbx, 0x1234_5678_9abcu64)?;
            print(a, "once")?;
            exit(a, 1)
        });
        place_with_ip(ram, AP_GPA, 0, 16, |a| {
            print(a, "ap")?;
            hlt_forever(a)
        });
    });
    assert_eq!(rig.finish(), ("once".into(), 1));
    rig.send(1, Message::Init);
    rig.observe_until(1, "INIT_RECEIVED", |o| o.mp_state == MpState::InitReceived);
    rig.send(1, Message::Sipi { vector: AP_VECTOR });
    rig.observe_until(1, "HALTED", |o| o.mp_state == MpState::Halted);
    rig.reset();
    let bsp = rig.observe(0);
    assert_eq!((bsp.rip, bsp.cr0 & 0x8000_0001, bsp.efer), (BSP_GPA, 0, 0));
    assert_eq!(rig.observe(1).mp_state, MpState::Uninitialized);
    rig.go();
    assert_eq!(rig.finish(), ("once".into(), 1));
    assert_eq!(rig.observe(1).mp_state, MpState::Uninitialized);
}

fn a_reset_forgets_a_pending_init_and_sipi() {
    let rig = Rig::new(2, |ram| {
        place(ram, BSP_GPA, 16, hlt_forever);
    });
    rig.send(1, Message::Init);
    rig.send(1, Message::Sipi { vector: AP_VECTOR });
    rig.reset();
    assert_eq!(rig.observe(1).mp_state, MpState::Uninitialized);
    rig.send(1, Message::Sipi { vector: AP_VECTOR });
    rig.reset();
    rig.send(1, Message::Init);
    assert_eq!(rig.observe(1).mp_state, MpState::InitReceived);
}

fn sixteen_vms_with_two_vcpus_each_run_at_once() {
    let begin = Instant::now();
    let rigs: Vec<_> = (0..16)
        .map(|n| {
            Rig::started(2, move |ram| {
                place(ram, BSP_GPA, 16, |a| {
                    spin_while_flag_is(a, 0)?;
                    exit(a, n)
                });
                place_with_ip(ram, AP_GPA, 0, 16, |a| {
                    a.xor(ax, ax)?;
                    a.mov(ds, ax)?;
                    a.mov(byte_ptr(FLAG_GPA), 1)?;
                    hlt_forever(a)
                });
            })
        })
        .collect();
    for rig in &rigs {
        rig.observe(1);
        rig.send(1, Message::Init);
    }
    for rig in &rigs {
        rig.observe_until(1, "INIT_RECEIVED", |o| o.mp_state == MpState::InitReceived);
        rig.send(1, Message::Sipi { vector: AP_VECTOR });
    }
    for (rig, n) in rigs.iter().zip(0..) {
        assert_eq!(rig.finish().1, n);
    }
    assert!(begin.elapsed() < HANG);
}

fn too_many_vcpus_are_refused_with_the_limit() {
    let ram = std::sync::Arc::new(nested_vmx::mem::Ram::new(1 << 20).expect("RAM"));
    for cpus in [0, MAX_CPUS + 1] {
        let counters = (0..cpus).map(|_| std::sync::Arc::default()).collect();
        match KvmVm::create(std::sync::Arc::clone(&ram), None, false, counters) {
            Err(KvmError::TooManyVcpus { asked, limit }) => assert!(asked == cpus && limit <= MAX_CPUS),
            _ => panic!("{cpus} vCPUs accepted"),
        }
    }
}
