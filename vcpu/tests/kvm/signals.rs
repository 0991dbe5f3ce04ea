//! INIT, SIPI and NMI: by the guest, from outside, and mp_state as it is published.

use std::time::{Duration, Instant};

use iced_x86::code_asm::*;
use nestd_vcpu::kvm::{Delivery, Message};
use nested_vmx::event::MpState;

use crate::guest::*;
use crate::rig::{HOOK_PORT, Rig};

crate::cases![
    the_first_message_after_creation_is_delivered,
    an_ap_starts_by_the_guests_init_and_sipi,
    an_injected_init_and_sipi_start_an_ap_and_mp_state_tells_each_step,
    a_sipi_before_any_init_is_lost_and_the_ap_still_starts_later,
    an_init_during_a_port_access_takes_effect_after_it,
    an_nmi_wakes_a_halted_vcpu_and_is_handled,
    an_nmi_pending_before_the_first_init_does_not_burn_the_host_cpu,
    no_such_vcpu_is_an_error,
];

fn ap_halts(a: &mut CodeAssembler) -> Result<(), iced_x86::IcedError> {
    a.cli()?;
    hlt_forever(a)
}

fn the_first_message_after_creation_is_delivered() {
    for message in [Message::Init, Message::Nmi] {
        let rig = Rig::new(2, |_| {});
        assert_eq!(rig.vm.send(1, message).expect("sent"), Delivery::Accepted);
    }
}

fn an_ap_starts_by_the_guests_init_and_sipi() {
    let rig = Rig::started(2, |ram| {
        place_protected(ram, |a| {
            let mut wait = a.create_label();
            a.mov(dword_ptr(0xfee0_0310u32), 1 << 24)?;
            a.mov(dword_ptr(0xfee0_0300u32), 0x4500)?;
            a.mov(dword_ptr(0xfee0_0310u32), 1 << 24)?;
            a.mov(dword_ptr(0xfee0_0300u32), 0x4600 | i32::from(AP_VECTOR))?;
            a.set_label(&mut wait)?;
            a.pause()?;
            a.cmp(byte_ptr(FLAG_GPA), 1)?;
            a.jne(wait)?;
            print(a, "B")?;
            exit(a, 3)
        });
        place_with_ip(ram, AP_GPA, 0, 16, |a| {
            print(a, "A")?;
            a.xor(ax, ax)?;
            a.mov(ds, ax)?;
            a.mov(byte_ptr(FLAG_GPA), 1)?;
            ap_halts(a)
        });
    });
    assert_eq!(rig.finish(), ("AB".into(), 3));
    rig.observe_until(1, "the AP halts", |o| o.mp_state == MpState::Halted);
}

fn an_injected_init_and_sipi_start_an_ap_and_mp_state_tells_each_step() {
    let rig = Rig::started(2, |ram| {
        place(ram, BSP_GPA, 16, hlt_forever);
        place_with_ip(ram, AP_GPA, 0, 16, |a| {
            a.xor(ax, ax)?;
            a.mov(ds, ax)?;
            spin_while_flag_is(a, 0)?;
            ap_halts(a)
        });
    });
    let steps = |s: MpState| move |o: &nestd_vcpu::kvm::Observed| o.mp_state == s;
    assert_eq!(rig.observe(1).mp_state, MpState::Uninitialized);
    rig.send(1, Message::Init);
    rig.observe_until(1, "INIT_RECEIVED", steps(MpState::InitReceived));
    assert_eq!(rig.observe(1).mp_state, MpState::InitReceived, "a read changes nothing");
    rig.send(1, Message::Sipi { vector: AP_VECTOR });
    rig.observe_until(1, "RUNNABLE", steps(MpState::Runnable));
    assert_eq!(rig.observe(1).mp_state, MpState::Runnable, "it spins");
    rig.ram.write(FLAG_GPA, &[1]).expect("in RAM");
    let halted = rig.observe_until(1, "HALTED", steps(MpState::Halted));
    assert_eq!(halted.activity, nested_vmx::event::ActivityState::Hlt);
    rig.observe_until(0, "the BSP halts", steps(MpState::Halted));
    assert!(rig.board.wait("", |_| true).ends.is_empty());
}

fn a_sipi_before_any_init_is_lost_and_the_ap_still_starts_later() {
    let rig = Rig::started(2, |ram| {
        place(ram, BSP_GPA, 16, hlt_forever);
        place_with_ip(ram, AP_GPA, 0, 16, |a| exit(a, 9));
    });
    rig.observe(1);
    rig.send(1, Message::Sipi { vector: AP_VECTOR });
    assert_eq!(rig.observe(1).mp_state, MpState::Uninitialized);
    rig.send(1, Message::Init);
    rig.observe_until(1, "INIT_RECEIVED", |o| o.mp_state == MpState::InitReceived);
    assert_eq!(rig.observe(1).mp_state, MpState::InitReceived, "the early SIPI is gone");
    rig.send(1, Message::Sipi { vector: AP_VECTOR });
    assert_eq!(rig.finish().1, 9);
}

fn an_init_during_a_port_access_takes_effect_after_it() {
    let rig = Rig::started(2, |ram| {
        place(ram, BSP_GPA, 16, hlt_forever);
        place_with_ip(ram, AP_GPA, 0, 16, |a| {
            let mut again = a.create_label();
            a.sti()?;
            a.mov(dx, HOOK_PORT)?;
            a.set_label(&mut again)?;
            a.in_(eax, dx)?;
            a.jmp(again)
        });
    });
    rig.observe(1);
    rig.send(1, Message::Init);
    rig.observe_until(1, "INIT_RECEIVED", |o| o.mp_state == MpState::InitReceived);
    for _ in 0..20 {
        let vm = std::sync::Arc::clone(&rig.vm);
        *rig.board.on_hook.lock().expect("not poisoned") = Some(Box::new(move || {
            vm.send(1, Message::Init).expect("sent");
        }));
        rig.send(1, Message::Sipi { vector: AP_VECTOR });
        // The vCPU publishes that it started in the middle of the access, and then has to accept the INIT.
        rig.board.wait("the access", |_| rig.board.on_hook.lock().expect("not poisoned").is_none());
        rig.observe_until(1, "INIT_RECEIVED", |o| o.mp_state == MpState::InitReceived);
        // INIT leaves RIP at the reset vector (SDM 3, table "Processor States Following Power-up, Reset, or INIT"):
        // an access that is completed after it would move RIP on.
        assert_eq!(rig.rip(1), 0xfff0);
    }
}

fn an_nmi_wakes_a_halted_vcpu_and_is_handled() {
    let rig = Rig::started(1, |ram| {
        // Vector 2 of the real-mode IVT.
        ram.write(8, &[0x00, 0x74, 0, 0]).expect("in RAM");
        place(ram, 0x7400, 16, |a| {
            print(a, "N")?;
            a.mov(byte_ptr(FLAG_GPA), 1)?;
            a.iret()
        });
        place(ram, BSP_GPA, 16, |a| {
            let mut again = a.create_label();
            a.cli()?;
            print(a, "h")?;
            a.set_label(&mut again)?;
            a.hlt()?;
            a.cmp(byte_ptr(FLAG_GPA), 1)?;
            a.jne(again)?;
            exit(a, 2)
        });
    });
    rig.observe_until(0, "halts", |o| o.mp_state == MpState::Halted);
    rig.send(0, Message::Nmi);
    assert_eq!(rig.finish(), ("hN".into(), 2));
}

fn an_nmi_pending_before_the_first_init_does_not_burn_the_host_cpu() {
    let rig = Rig::started(2, |ram| {
        place(ram, BSP_GPA, 16, hlt_forever);
        place_with_ip(ram, AP_GPA, 0, 16, |a| exit(a, 4));
    });
    rig.observe(1);
    rig.send(1, Message::Nmi);
    assert!(rig.observe(1).nmi_pending);
    // A rate needs an interval: what is waited for here is the interval, not a state.
    let (begin, cpu_begin) = (Instant::now(), rig.cpu_ns(1));
    while begin.elapsed() < Duration::from_millis(300) {
        rig.board.wait("", |_| true);
        std::thread::park_timeout(Duration::from_millis(50));
    }
    let busy_ns = rig.cpu_ns(1) - cpu_begin;
    assert!(u128::from(busy_ns) * 4 < begin.elapsed().as_nanos(), "{busy_ns} ns of {:?}", begin.elapsed());
    rig.send(1, Message::Init);
    rig.observe_until(1, "INIT_RECEIVED", |o| o.mp_state == MpState::InitReceived);
    rig.send(1, Message::Sipi { vector: AP_VECTOR });
    assert_eq!(rig.finish().1, 4);
}

fn no_such_vcpu_is_an_error() {
    let rig = Rig::new(1, |_| {});
    assert!(rig.vm.send(1, Message::Nmi).is_err());
    assert!(rig.vm.send(u32::MAX, Message::Init).is_err());
}
