//! What guests can do in each processor mode, and how KVM's exits end them.

use iced_x86::code_asm::*;
use nestd_vcpu::kvm::{KvmFailure, RunOutcome};

use crate::guest::*;
use crate::rig::{COUNTER_PORT, Rig};

crate::cases![
    a_real_mode_guest_prints_and_exits,
    a_protected_mode_guest_prints_and_exits,
    a_long_mode_guest_prints_and_exits,
    string_output_arrives_whole_and_in_order,
    string_input_arrives_whole_and_in_order,
    memory_that_is_not_there_reads_all_ones,
    every_vcpu_reads_its_own_apic_id_and_no_vmx,
    a_triple_fault_ends_the_run_as_one,
    an_instruction_that_kvm_pvm_cannot_emulate_is_named_with_its_bytes on Pvm,
    code_outside_memory_fails_with_rip,
];

fn a_real_mode_guest_prints_and_exits() {
    let rig = Rig::started(1, |ram| {
        place(ram, BSP_GPA, 16, |a| {
            print(a, "real")?;
            exit(a, 5)
        });
    });
    assert_eq!(rig.finish(), ("real".into(), 5));
}

fn a_protected_mode_guest_prints_and_exits() {
    let rig = Rig::started(1, |ram| {
        place_protected(ram, |a| {
            print(a, "protected")?;
            exit(a, 6)
        });
    });
    assert_eq!(rig.finish(), ("protected".into(), 6));
}

fn a_long_mode_guest_prints_and_exits() {
    let rig = Rig::started(1, |ram| {
        place_long(ram, |a| {
            // Only right with 64-bit operands.
            a.mov(rax, 0x1_0000_0041u64)?;
            a.mov(rbx, rax)?;
            a.shr(rbx, 32)?;
            a.add(rax, rbx)?;
            a.mov(dx, SERIAL)?;
            a.out(dx, al)?;
            print(a, "long")?;
            exit(a, 7)
        });
    });
    assert_eq!(rig.finish(), ("Blong".into(), 7));
}

fn string_output_arrives_whole_and_in_order() {
    let rig = Rig::started(1, |ram| {
        ram.write(0x6100, b"0123456789abcdef").expect("in RAM");
        place(ram, BSP_GPA, 16, |a| {
            a.cld()?;
            a.mov(dx, SERIAL)?;
            a.mov(si, 0x6100)?;
            a.mov(cx, 16)?;
            a.rep().outsb()?;
            exit(a, 0)
        });
    });
    assert_eq!(rig.finish().0, "0123456789abcdef");
}

fn string_input_arrives_whole_and_in_order() {
    let rig = Rig::started(1, |ram| {
        place(ram, BSP_GPA, 16, |a| {
            a.cld()?;
            a.mov(dx, COUNTER_PORT)?;
            a.mov(di, 0x6100)?;
            a.mov(cx, 5)?;
            a.rep().insw()?;
            exit(a, 0)
        });
    });
    rig.finish();
    let mut got = [0; 12];
    rig.ram.read(0x6100, &mut got).expect("in RAM");
    assert_eq!(got, [0, 0, 1, 0, 2, 0, 3, 0, 4, 0, 0, 0]);
}

fn memory_that_is_not_there_reads_all_ones() {
    let rig = Rig::started(1, |ram| {
        place_protected(ram, |a| {
            a.mov(eax, dword_ptr(0xd000_0000u32))?;
            a.cmp(eax, -1)?;
            a.mov(eax, 1)?;
            a.mov(ecx, 2)?;
            a.cmovne(eax, ecx)?;
            a.out(DEBUG_EXIT, al)
        });
    });
    assert_eq!(rig.finish().1, 1);
}

fn every_vcpu_reads_its_own_apic_id_and_no_vmx() {
    use nestd_vcpu::kvm::Message;
    let report = |a: &mut CodeAssembler| {
        a.mov(eax, 1)?;
        a.cpuid()?;
        a.shr(ebx, 24)?;
        a.add(ebx, i32::from(b'0'))?;
        a.mov(dx, SERIAL)?;
        a.mov(al, bl)?;
        a.out(dx, al)?;
        a.bt(ecx, 5)?;
        a.mov(al, i32::from(b'-'))?;
        let mut no_vmx = a.create_label();
        a.jnc(no_vmx)?;
        a.mov(al, i32::from(b'V'))?;
        a.set_label(&mut no_vmx)?;
        a.out(dx, al)
    };
    let rig = Rig::started(2, |ram| {
        place(ram, BSP_GPA, 16, |a| {
            report(a)?;
            hlt_forever(a)
        });
        place_with_ip(ram, AP_GPA, 0, 16, |a| {
            report(a)?;
            exit(a, 0)
        });
    });
    rig.board.wait("the BSP's report", |s| s.serial.len() == 2);
    rig.send(1, Message::Init);
    rig.send(1, Message::Sipi { vector: AP_VECTOR });
    assert_eq!(rig.finish().0, "0-1-");
}

fn a_triple_fault_ends_the_run_as_one() {
    let rig = Rig::started(1, |ram| {
        place_protected(ram, |a| {
            // An IDT with no entries: #UD, #DF and so on.
            a.lidt(fword_ptr(0x6200))?;
            a.ud2()
        });
    });
    assert_eq!(rig.end(), (0, RunOutcome::TripleFault));
    assert_eq!(rig.observe(0).activity, nested_vmx::event::ActivityState::Shutdown);
}

fn an_instruction_that_kvm_pvm_cannot_emulate_is_named_with_its_bytes() {
    let rig = Rig::started(1, |ram| {
        place_long(ram, |a| {
            a.nop()?;
            a.popcnt(rax, rbx)
        });
    });
    let (_, RunOutcome::Failed(failure)) = rig.end() else { panic!("no failure") };
    let KvmFailure::Emulation { rip, cpl, bytes, .. } = &failure else { panic!("{failure}") };
    assert_eq!((*rip, *cpl), (0x7c01, 0));
    assert_eq!(bytes.0[..5], [0xf3, 0x48, 0x0f, 0xb8, 0xc3]);
    assert!(failure.to_string().contains("f3 48 0f b8 c3"), "{failure}");
}

fn code_outside_memory_fails_with_rip() {
    let rig = Rig::started(1, |ram| {
        place_protected(ram, |a| {
            a.mov(eax, 0xd000_0000u32)?;
            a.jmp(eax)
        });
    });
    let (_, RunOutcome::Failed(failure)) = rig.end() else { panic!("no failure") };
    assert!(failure.to_string().contains("0xd0000000"), "{failure}");
}
