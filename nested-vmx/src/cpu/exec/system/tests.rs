//! System instructions in protected, compatibility and virtual-8086 mode, and their faults.

use crate::arch::cr::rflags;
use crate::arch::descriptor::Descriptor;
use crate::arch::segment::{AccessRights, system};
use crate::cpu::seg::{Segment, TableRegister, reg};
use crate::cpu::{Stop, slot};
use crate::event::ActivityState;
use crate::testing::{CODE, DATA, Rig, STACK};
use iced_x86::code_asm::*;

mod debug;
mod paging;

const GDT: u64 = 0x5000;
const IDT: u64 = 0x6000;
const TSS: u64 = 0x7000;
const OTHER_TSS: u64 = 0x7800;
const HANDLERS: u64 = 0x11_0000;
const INNER_STACK: u64 = 0x28_0000;

/// Selectors of [`protected`]'s GDT.
const KERNEL_CODE: u16 = 0x08;
const KERNEL_DATA: u16 = 0x10;
const USER_CODE: u16 = 0x1b;
const USER_DATA: u16 = 0x23;
const TASK: u16 = 0x28;
const OTHER_TASK: u16 = 0x30;
const CALL_GATE: u16 = 0x3b;
const CONFORMING: u16 = 0x40;
const NOT_PRESENT: u16 = 0x48;
const READ_ONLY: u16 = 0x50;
const EXPAND_DOWN: u16 = 0x58;
const TASK_GATE: u16 = 0x6b;
const SMALL: u16 = 0x70;

fn descriptor(base: u64, limit: u64, access: u64, flags: u64) -> u64 {
    limit & 0xffff
        | (base & 0xff_ffff) << 16
        | access << 40
        | (limit >> 16 & 0xf) << 48
        | flags << 52
        | (base >> 24) << 56
}

fn gate(selector: u16, offset: u64, kind: u8, dpl: u8, parameters: u64) -> u64 {
    let access = u64::from(kind | dpl << 5 | 0x80);
    offset & 0xffff | u64::from(selector) << 16 | parameters << 32 | access << 40 | (offset >> 16) << 48
}

/// 32-bit protected mode without paging, with a GDT, an IDT whose handlers are HLT, and two tasks.
fn protected(cpl: u8) -> Rig {
    let mut rig = Rig::protected();
    let tss = |base, kind: u8| descriptor(base, 0x67, u64::from(kind) | 0x80, 0);
    let gdt = [
        0,
        descriptor(0, 0xf_ffff, 0x9b, 0xc),
        descriptor(0, 0xf_ffff, 0x93, 0xc),
        descriptor(0, 0xf_ffff, 0xfb, 0xc),
        descriptor(0, 0xf_ffff, 0xf3, 0xc),
        tss(TSS, system::TSS_BUSY),
        tss(OTHER_TSS, system::TSS_AVAILABLE),
        gate(KERNEL_CODE, HANDLERS + 0x1000, system::CALL_GATE, 3, 2),
        descriptor(0, 0xf_ffff, 0x9e, 0xc),
        descriptor(0, 0xf_ffff, 0x73, 0xc),
        descriptor(0, 0xf_ffff, 0xf0, 0xc),
        descriptor(DATA, 0xfff, 0xf6, 0x4),
        descriptor(0x7c00, 0xf, 0x82, 0),
        gate(OTHER_TASK, 0, system::TASK_GATE, 3, 0),
        descriptor(DATA, 0xff, 0xf2, 0x4),
    ];
    for (i, d) in gdt.into_iter().enumerate() {
        rig.write_u64(GDT + 8 * i as u64, d);
    }
    for v in 0..256u64 {
        rig.write_u64(IDT + 8 * v, gate(KERNEL_CODE, HANDLERS + 16 * v, system::INTERRUPT_GATE, 0, 0));
        rig.ram.write(HANDLERS + 16 * v, &[0xf4]).unwrap();
    }
    rig.write_u64(TSS + 4, INNER_STACK | u64::from(KERNEL_DATA) << 32);
    let c = &mut rig.cpu;
    c.gdtr = TableRegister { base: GDT, limit: 0x77 };
    c.idtr = TableRegister { base: IDT, limit: 0x7ff };
    let ar = AccessRights::new().with_kind(system::TSS_BUSY).with_p(true);
    c.seg[usize::from(reg::TR)] = Segment { selector: TASK, base: TSS, limit: 0x67, ar };
    if cpl == 3 {
        for n in 0..6 {
            let s = &mut c.seg[n];
            s.selector = if n == usize::from(reg::CS) { USER_CODE } else { USER_DATA };
            s.ar.set_dpl(3);
        }
        c.cpl = 3;
        c.mode_changed();
    }
    rig
}

/// The vector whose handler the processor halted in, and what lies on the stack.
fn halted(rig: &Rig) -> (u64, Vec<u32>) {
    assert_eq!(rig.cpu.activity, ActivityState::Hlt, "rip {:#x}", rig.cpu.regs.rip());
    let top = rig.r(slot::RSP);
    let stack = (0..10).map(|i| rig.read_u64(top + 4 * i) as u32).collect();
    ((rig.cpu.regs.rip() - 1 - HANDLERS) / 16, stack)
}

fn put16(rig: &Rig, gpa: u64, v: u16) {
    rig.ram.write(gpa, &v.to_le_bytes()).unwrap();
}

fn put32(rig: &Rig, gpa: u64, v: u32) {
    rig.ram.write(gpa, &v.to_le_bytes()).unwrap();
}

#[test]
fn segment_loads_check_type_privilege_and_presence() {
    // (register, selector, CPL, result)
    let gp = |s: u16| Err(Stop::gp(u32::from(s & !3)));
    let table = [
        (reg::DS, KERNEL_DATA, 0, Ok(())),
        (reg::DS, 0, 0, Ok(())),
        (reg::DS, 3, 0, Ok(())),
        (reg::DS, USER_DATA, 0, Ok(())),
        (reg::DS, KERNEL_DATA | 3, 0, gp(KERNEL_DATA)),
        (reg::DS, KERNEL_DATA, 3, gp(KERNEL_DATA)),
        (reg::DS, KERNEL_CODE, 0, Ok(())),
        (reg::DS, CONFORMING | 3, 3, Ok(())),
        (reg::ES, NOT_PRESENT, 0, Err(Stop::np(NOT_PRESENT.into()))),
        (reg::ES, TASK, 0, gp(TASK)),
        (reg::ES, 0x78, 0, gp(0x78)),
        (reg::FS, 0x0c, 0, gp(0x0c)),
        (reg::SS, 0, 0, Err(Stop::GP0)),
        (reg::SS, KERNEL_DATA, 0, Ok(())),
        (reg::SS, USER_DATA, 0, gp(USER_DATA)),
        (reg::SS, READ_ONLY, 0, gp(READ_ONLY)),
        (reg::SS, NOT_PRESENT | 3, 3, Err(Stop::ss(NOT_PRESENT.into()))),
        (reg::SS, USER_DATA, 3, Ok(())),
    ];
    for (n, selector, cpl, expected) in table {
        let mut rig = protected(cpl);
        let before = *rig.cpu.segment(n);
        assert_eq!(rig.cpu.load_segment(n, selector), expected, "{n} {selector:#x} {cpl}");
        if expected.is_err() {
            assert_eq!(*rig.cpu.segment(n), before);
        }
    }
}

#[test]
fn loading_a_segment_sets_the_accessed_flag_in_memory() {
    let mut rig = protected(0);
    rig.cpu.load_segment(reg::DS, SMALL).unwrap();
    assert_ne!(rig.read_u64(GDT + u64::from(SMALL)) & Descriptor::ACCESSED, 0);
    assert_eq!(rig.cpu.segment(reg::DS).ar.kind() & 1, 1);
}

#[test]
fn limits_and_types_of_segments_fault() {
    for (selector, offset, fault) in
        [(SMALL, 0xfcu32, false), (SMALL, 0xfd, true), (EXPAND_DOWN, 0xfff, true), (EXPAND_DOWN, 0x1000, false)]
    {
        let mut rig = protected(0);
        rig.cpu.load_segment(reg::FS, selector).unwrap();
        rig.code(|a| {
            a.mov(dword_ptr(offset).fs(), eax)?;
            a.hlt()
        });
        rig.run(10);
        assert_eq!(rig.cpu.regs.rip() > HANDLERS, fault, "{selector:#x} {offset:#x}");
    }
    let mut rig = protected(0);
    rig.cpu.load_segment(reg::FS, READ_ONLY).unwrap();
    rig.code(|a| a.mov(dword_ptr(DATA as u32).fs(), eax));
    rig.run(10);
    assert_eq!(halted(&rig).0, 13);
}

#[test]
fn a_protected_mode_interrupt_switches_to_the_tss_stack_and_iret_returns() {
    let mut rig = protected(3);
    rig.write_u64(IDT + 8 * 0x80, gate(KERNEL_CODE, HANDLERS + 0x800, system::INTERRUPT_GATE, 3, 0));
    rig.code(|a| {
        a.int(0x80)?;
        a.mov(ebx, 7)?;
        a.jmp(CODE)
    });
    rig.run(100);
    let (v, stack) = halted(&rig);
    assert_eq!((v, rig.cpu.cpl, rig.r(slot::RSP)), (0x80, 0, INNER_STACK - 20));
    assert_eq!(stack[..5], [CODE as u32 + 2, USER_CODE.into(), 2, STACK as u32, USER_DATA.into()]);
    rig.ram.write(HANDLERS + 0x801, &[0xcf]).unwrap();
    rig.cpu.set_activity(ActivityState::Active);
    rig.run(2);
    assert_eq!((rig.cpu.cpl, rig.r(slot::RBX), rig.r(slot::RSP)), (3, 7, STACK));
    assert!(rig.cpu.segment(reg::DS).ar.usable());
}

#[test]
fn a_call_gate_copies_parameters_and_far_return_drops_them_and_privileged_segments() {
    let mut rig = protected(3);
    // mov ds, ax at the gate's target (ax = 0x10), then retf 8.
    rig.ram.write(HANDLERS + 0x1000, &[0x8e, 0xd8, 0xca, 8, 0]).unwrap();
    rig.set_r(slot::RAX, KERNEL_DATA.into()).code(|a| {
        a.push(0x1111)?;
        a.push(0x2222)?;
        a.db(&[0x9a, 0, 0, 0, 0])?;
        a.dw(&[CALL_GATE])?;
        a.mov(ebx, 1)
    });
    rig.run(3);
    assert_eq!((rig.cpu.cpl, rig.cpu.regs.rip()), (0, HANDLERS + 0x1000));
    let top = rig.r(slot::RSP);
    let stack: Vec<u32> = (0..6).map(|i| rig.read_u64(top + 4 * i) as u32).collect();
    assert_eq!(top, INNER_STACK - 24);
    assert_eq!(stack[1..], [USER_CODE.into(), 0x2222, 0x1111, STACK as u32 - 8, USER_DATA.into()]);
    rig.run(3);
    assert_eq!((rig.cpu.cpl, rig.r(slot::RBX), rig.r(slot::RSP)), (3, 1, STACK));
    assert!(rig.cpu.segment(reg::DS).ar.unusable());
    assert!(rig.cpu.segment(reg::ES).ar.usable());
}

fn write_other_task(rig: &Rig, eip: u64) {
    put32(rig, OTHER_TSS + 32, eip as u32);
    put32(rig, OTHER_TSS + 36, 2);
    put32(rig, OTHER_TSS + 40, 0xaaaa);
    put32(rig, OTHER_TSS + 56, STACK as u32 + 0x1000);
    for (i, s) in [KERNEL_DATA, KERNEL_CODE, KERNEL_DATA, KERNEL_DATA, 0, 0].into_iter().enumerate() {
        put16(rig, OTHER_TSS + 72 + 4 * i as u64, s);
    }
}

#[test]
fn a_far_call_switches_tasks_and_iret_switches_back() {
    for target in [OTHER_TASK, TASK_GATE] {
        let mut rig = protected(0);
        write_other_task(&rig, DATA);
        rig.ram.write(DATA, &[0x40, 0xcf]).unwrap(); // inc eax; iret
        rig.set_r(slot::RAX, 5).code(|a| {
            a.db(&[0x9a, 0, 0, 0, 0])?;
            a.dw(&[target])?;
            a.mov(ebx, 9)
        });
        rig.run(1);
        assert_eq!((rig.cpu.regs.rip(), rig.r(slot::RAX)), (DATA, 0xaaaa));
        assert_eq!(rig.cpu.segment(reg::TR).selector, OTHER_TASK);
        assert!(rig.cpu.flags.has(rflags::NT) && rig.cpu.cr0.ts());
        assert_ne!(rig.read_u64(GDT + u64::from(OTHER_TASK)) & Descriptor::BUSY, 0);
        rig.run(3);
        assert_eq!((rig.r(slot::RAX), rig.r(slot::RBX)), (5, 9));
        assert_eq!(rig.cpu.segment(reg::TR).selector, TASK);
        assert_eq!(rig.read_u64(GDT + u64::from(OTHER_TASK)) & Descriptor::BUSY, 0);
        assert_eq!(rig.read_u64(OTHER_TSS + 40) as u32, 0xaaab);
    }
}

#[test]
fn an_exception_through_a_task_gate_pushes_its_error_code_on_the_new_task_s_stack() {
    let mut rig = protected(3);
    write_other_task(&rig, HANDLERS + 16 * 13);
    rig.write_u64(IDT + 8 * 13, gate(OTHER_TASK, 0, system::TASK_GATE, 0, 0));
    rig.code(|a| {
        a.mov(eax, KERNEL_DATA as u32)?;
        a.mov(ds, eax)
    });
    rig.run(10);
    let (v, stack) = halted(&rig);
    assert_eq!((v, stack[0], rig.r(slot::RSP)), (13, KERNEL_DATA.into(), STACK + 0x1000 - 4));
    assert_eq!(rig.cpu.cpl, 0);
    assert_eq!(rig.read_u64(TSS + 32) as u32, CODE as u32 + 5);
}

#[test]
fn a_bad_segment_of_a_new_task_faults_in_the_new_task() {
    let mut rig = protected(0);
    write_other_task(&rig, DATA);
    put16(&rig, OTHER_TSS + 84, USER_CODE & !3 | 4); // DS in an LDT that is not there
    rig.code(|a| {
        a.db(&[0xea, 0, 0, 0, 0])?;
        a.dw(&[OTHER_TASK])
    });
    rig.run(10);
    let (v, stack) = halted(&rig);
    assert_eq!((v, stack[0]), (10, 0x1c));
    assert_eq!(stack[1], DATA as u32);
}

fn to_v86(rig: &mut Rig, iopl: u64) {
    // Code at 0x1000:0, stack 0x2000:0x100.
    let frame = [
        0u32,
        0x1000,
        (rflags::VM | rflags::FIXED1 | iopl << 12) as u32,
        0x100,
        0x2000,
        0x3000,
        0x3100,
        0x3200,
        0x3300,
    ];
    for (i, v) in frame.into_iter().enumerate() {
        put32(rig, STACK - 36 + 4 * i as u64, v);
    }
    rig.set_r(slot::RSP, STACK - 36).code(|a| a.iretd());
    rig.run(1);
}

#[test]
fn virtual_8086_mode_is_entered_by_iret_and_left_by_exceptions() {
    let mut rig = protected(0);
    rig.ram.write(0x10000, &[0x8c, 0xd8, 0xfa]).unwrap(); // mov ax, ds; cli
    to_v86(&mut rig, 0);
    assert!(rig.cpu.virtual_8086());
    assert_eq!((rig.cpu.cpl, rig.cpu.regs.rip()), (3, 0));
    assert_eq!(rig.cpu.segment(reg::ES).base, 0x30000);
    rig.run(10);
    let (v, stack) = halted(&rig);
    assert_eq!((v, stack[0], stack[1], stack[2]), (13, 0, 2, 0x1000));
    assert_eq!(u64::from(stack[3]) & rflags::VM, rflags::VM);
    assert_eq!(stack[4..], [0x100, 0x2000, 0x3000, 0x3100, 0x3200, 0x3300]);
    assert_eq!(rig.r(slot::RAX) & 0xffff, 0x3100);
    assert!(rig.cpu.segment(reg::DS).ar.unusable());
    assert!(!rig.cpu.virtual_8086());
}

#[test]
fn iopl_3_lets_virtual_8086_code_mask_interrupts_and_push_flags() {
    let mut rig = protected(0);
    // cli; pushf; pop ax; mov bx, sp
    rig.ram.write(0x10000, &[0xfa, 0x9c, 0x58, 0x89, 0xe3]).unwrap();
    to_v86(&mut rig, 3);
    rig.run(4);
    assert_eq!((rig.r(slot::RAX) & 0xffff, rig.r(slot::RBX) & 0xffff), (0x3002, 0x100));
}

#[test]
fn ports_need_iopl_or_the_bit_map() {
    for (map, allowed) in [(0xffu8, false), (0x00, true), (0x10, false), (0x0f, true)] {
        let mut rig = protected(3);
        rig.cpu.seg[usize::from(reg::TR)].limit = 0x100;
        put16(&rig, TSS + 102, 0x68);
        rig.ram.write(TSS + 0x68 + (0x3f4 >> 3), &[map, 0xff]).unwrap();
        rig.code(|a| {
            a.mov(dx, 0x3f4)?;
            a.out(dx, al)
        });
        rig.run(2);
        assert_eq!(rig.world.lock().unwrap().outs.len(), usize::from(allowed), "{map:#x}");
    }
}

#[test]
fn ins_and_outs_move_strings_between_ports_and_memory() {
    let mut rig = Rig::long();
    rig.world.lock().unwrap().ins = vec![0x33, 0x22, 0x11];
    rig.set_r(slot::RDX, 0x60).set_r(slot::RDI, DATA).set_r(slot::RCX, 3);
    rig.code(|a| {
        a.rep().insb()?;
        a.mov(rsi, DATA)?;
        a.outsw()
    });
    rig.run(5);
    assert_eq!(rig.read_u64(DATA), 0x33_2211);
    assert_eq!((rig.r(slot::RDI), rig.r(slot::RCX)), (DATA + 3, 0));
    assert_eq!(rig.world.lock().unwrap().outs, [(0x60, 2, 0x2211)]);
}

#[test]
fn syscall_and_sysret_move_between_privileges() {
    let mut rig = Rig::long_at(3);
    rig.cpu.msrs.star = 0x0008 << 32 | 0x0010 << 48;
    rig.cpu.msrs.lstar = DATA;
    rig.cpu.msrs.fmask = rflags::IF;
    rig.cpu.flags.set(rflags::IF, true);
    rig.ram.write(DATA, &[0x48, 0x0f, 0x07]).unwrap(); // sysretq
    rig.code(|a| {
        a.syscall()?;
        a.mov(ebx, 4)
    });
    rig.run(1);
    assert_eq!((rig.cpu.cpl, rig.cpu.regs.rip(), rig.r(slot::RCX)), (0, DATA, CODE + 2));
    assert_eq!((rig.cpu.segment(reg::CS).selector, rig.cpu.segment(reg::SS).selector), (8, 0x10));
    assert!(!rig.cpu.flags.has(rflags::IF));
    rig.run(2);
    assert_eq!((rig.cpu.cpl, rig.r(slot::RBX)), (3, 4));
    assert_eq!((rig.cpu.segment(reg::CS).selector, rig.cpu.segment(reg::SS).selector), (0x23, 0x1b));
    assert!(rig.cpu.flags.has(rflags::IF));
}

#[test]
fn sysenter_and_sysexit_in_protected_mode() {
    let mut rig = protected(3);
    rig.cpu.msrs.sysenter_cs = 8;
    rig.cpu.msrs.sysenter_esp = INNER_STACK;
    rig.cpu.msrs.sysenter_eip = DATA;
    rig.ram.write(DATA, &[0x0f, 0x35]).unwrap();
    rig.set_r(slot::RCX, STACK).set_r(slot::RDX, CODE + 2).code(|a| {
        a.sysenter()?;
        a.mov(ebx, 4)
    });
    rig.run(1);
    assert_eq!((rig.cpu.cpl, rig.r(slot::RSP)), (0, INNER_STACK));
    rig.run(2);
    assert_eq!((rig.cpu.cpl, rig.r(slot::RBX), rig.cpu.segment(reg::CS).selector), (3, 4, USER_CODE));
}

#[test]
fn lar_lsl_and_verification_tell_without_faulting() {
    let mut rig = protected(3);
    rig.set_r(slot::RAX, KERNEL_DATA.into()).set_r(slot::RBX, SMALL.into()).set_r(slot::RCX, 0xfff8);
    rig.code(|a| {
        a.lar(esi, eax)?;
        a.setz(dl)?;
        a.lsl(edi, ebx)?;
        a.setz(dh)?;
        a.verw(cx)?;
        a.setz(al)
    });
    rig.run(6);
    assert_eq!((rig.r(slot::RDX) & 0xffff, rig.r(slot::RDI), rig.r(slot::RAX) & 0xff), (0x100, 0xff, 0));
}

#[test]
fn unaligned_user_accesses_fault_only_with_am_and_ac() {
    for (am, ac, fault) in [(true, true, true), (true, false, false), (false, true, false)] {
        let mut rig = protected(3);
        rig.cpu.cr0.set_am(am);
        rig.cpu.flags.set(rflags::AC, ac);
        rig.cpu.mode_changed();
        rig.code(|a| {
            a.mov(eax, dword_ptr(DATA as u32))?;
            a.mov(eax, dword_ptr(DATA as u32 + 4))?;
            a.mov(eax, dword_ptr(DATA as u32 + 2))?;
            a.jmp(CODE)
        });
        rig.run(5);
        assert_eq!(rig.cpu.activity == ActivityState::Hlt, fault, "{am} {ac}");
        if fault {
            let (v, stack) = halted(&rig);
            assert_eq!((v, stack[0], stack[1]), (17, 0, CODE as u32 + 10));
        }
    }
}

#[test]
fn privileged_instructions_fault_in_user_mode() {
    let table: [(&str, &[u8]); 12] = [
        ("hlt", &[0xf4]),
        ("cli", &[0xfa]),
        ("sti", &[0xfb]),
        ("lgdt", &[0x0f, 0x01, 0x10]),
        ("lidt", &[0x0f, 0x01, 0x18]),
        ("ltr", &[0x0f, 0x00, 0xd8]),
        ("mov cr0", &[0x0f, 0x22, 0xc0]),
        ("mov from cr3", &[0x0f, 0x20, 0xd8]),
        ("mov dr7", &[0x0f, 0x23, 0xf8]),
        ("wrmsr", &[0x0f, 0x30]),
        ("invlpg", &[0x0f, 0x01, 0x38]),
        ("clts", &[0x0f, 0x06]),
    ];
    for (name, code) in table {
        let mut rig = protected(3);
        rig.ram.write(CODE, code).unwrap();
        rig.run(5);
        let (v, stack) = halted(&rig);
        assert_eq!((v, stack[0], stack[1]), (13, 0, CODE as u32), "{name}");
    }
}

#[test]
fn compatibility_mode_runs_32_bit_code_under_long_mode_and_is_interrupted_by_64_bit_handlers() {
    let mut rig = Rig::long();
    for (i, d) in [0, 0x00af_9b00_0000_ffffu64, 0x00cf_9300_0000_ffff, 0x00cf_9b00_0000_ffff].into_iter().enumerate() {
        rig.write_u64(GDT + 8 * i as u64, d);
    }
    rig.cpu.gdtr = TableRegister { base: GDT, limit: 0x1f };
    rig.cpu.idtr = TableRegister { base: IDT, limit: 0xfff };
    rig.write_u64(IDT + 16 * 6, gate(8, HANDLERS, system::INTERRUPT_GATE, 0, 0));
    rig.write_u64(IDT + 16 * 6 + 8, 0);
    rig.ram.write(HANDLERS, &[0xf4]).unwrap();
    // push 0x18; push DATA; retfq
    rig.code(|a| {
        a.push(0x18)?;
        a.push(DATA as i32)?;
        a.db(&[0x48, 0xcb])
    });
    // 32-bit: inc eax; ud2
    rig.ram.write(DATA, &[0x40, 0x0f, 0x0b]).unwrap();
    rig.run(4);
    assert_eq!((rig.cpu.code64(), rig.r(slot::RAX)), (false, 1));
    rig.run(5);
    assert!(rig.cpu.code64());
    assert_eq!(rig.cpu.activity, ActivityState::Hlt);
    let top = rig.r(slot::RSP);
    assert_eq!([rig.read_u64(top), rig.read_u64(top + 8), rig.read_u64(top + 32)], [DATA + 1, 0x18, 0x10]);
}

#[test]
fn the_tsc_does_not_go_back_inside_a_block() {
    let mut rig = Rig::long();
    rig.set_r(slot::RCX, 0x10).code(|a| {
        a.nop()?;
        a.nop()?;
        a.rdtsc()?;
        a.mov(ebx, eax)?;
        a.rdmsr()?;
        a.jmp(CODE)
    });
    rig.run(6);
    assert_eq!((rig.r(slot::RBX), rig.r(slot::RAX)), (2, 4));
}
