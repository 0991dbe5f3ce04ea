//! Exceptions and interrupts, by mode.

use super::seg::{Segment, TableRegister, reg};
use super::{RunExit, slot};
use crate::arch::segment::{AccessRights, system};
use crate::event::{ActivityState, Detail};
use crate::testing::{CODE, DATA, Rig, STACK};
use iced_x86::code_asm::*;

const GDT: u64 = 0x5000;
const IDT: u64 = 0x6000;
const TSS: u64 = 0x7000;
/// Handlers, one every 16 bytes, by vector.
const HANDLERS: u64 = 0x11_0000;
const RSP0: u64 = 0x28_0000;
const IST1: u64 = 0x29_0000;

const CODE64: u64 = 0x00af_9b00_0000_ffff;
const CODE64_USER: u64 = 0x00af_fb00_0000_ffff;
const DATA_FLAT: u64 = 0x00cf_9300_0000_ffff;
const DATA_USER: u64 = 0x00cf_f300_0000_ffff;

fn gate64(selector: u16, offset: u64, kind: u8, dpl: u8, ist: u8) -> [u64; 2] {
    let low = offset & 0xffff
        | u64::from(selector) << 16
        | u64::from(ist) << 32
        | u64::from(kind | dpl << 5 | 0x80) << 40
        | (offset & 0xffff_0000) << 32;
    [low, offset >> 32]
}

/// Long mode with a GDT (kernel 8, 0x10; user 0x1b, 0x23; TSS 0x28), an IDT whose handlers are HLT, a TSS.
fn long_at(cpl: u8) -> Rig {
    let mut rig = Rig::long_at(cpl);
    for (i, d) in [0, CODE64, DATA_FLAT, CODE64_USER, DATA_USER].into_iter().enumerate() {
        rig.write_u64(GDT + 8 * i as u64, d);
    }
    for v in 0..256u64 {
        let [low, high] = gate64(8, HANDLERS + 16 * v, system::INTERRUPT_GATE, 0, 0);
        rig.write_u64(IDT + 16 * v, low);
        rig.write_u64(IDT + 16 * v + 8, high);
        rig.ram.write(HANDLERS + 16 * v, &[0xf4]).unwrap();
    }
    rig.write_u64(TSS + 4, RSP0);
    rig.write_u64(TSS + 0x24, IST1);
    let c = &mut rig.cpu;
    c.gdtr = TableRegister { base: GDT, limit: 0x37 };
    c.idtr = TableRegister { base: IDT, limit: 0xfff };
    let ar = AccessRights::new().with_kind(system::TSS_BUSY).with_p(true);
    c.seg[usize::from(reg::TR)] = Segment { selector: 0x28, base: TSS, limit: 0x67, ar };
    if cpl == 3 {
        c.seg[usize::from(reg::CS)].selector = 0x1b;
        c.seg[usize::from(reg::SS)].selector = 0x23;
    }
    rig
}

/// The vector whose handler the processor halted in.
fn halted_in(rig: &Rig) -> u64 {
    assert_eq!(rig.cpu.activity, ActivityState::Hlt, "rip {:#x}", rig.cpu.regs.rip());
    (rig.cpu.regs.rip() - 1 - HANDLERS) / 16
}

fn stack(rig: &Rig) -> Vec<u64> {
    let top = rig.r(slot::RSP);
    (0..6).map(|i| rig.read_u64(top + 8 * i)).collect()
}

#[test]
fn a_fault_in_long_mode_pushes_its_frame_and_error_code() {
    let mut rig = long_at(0);
    rig.code(|a| {
        a.mov(rax, 0x8000_0000_0000u64)?;
        a.mov(rbx, qword_ptr(rax))
    });
    rig.run(100);
    assert_eq!(halted_in(&rig), 13);
    assert_eq!(rig.r(slot::RSP), STACK - 48);
    assert_eq!(stack(&rig), [0, CODE + 10, 8, 0x1_0002, STACK, 0x10].map(|v: u64| v));
}

#[test]
fn a_fault_in_user_mode_switches_to_rsp0_with_a_null_ss() {
    let mut rig = long_at(3);
    rig.code(|a| a.hlt());
    rig.run(100);
    assert_eq!(halted_in(&rig), 13);
    assert_eq!(rig.cpu.cpl, 0);
    assert_eq!(rig.cpu.seg[usize::from(reg::SS)].selector, 0);
    assert!(rig.cpu.seg[usize::from(reg::SS)].ar.unusable());
    assert_eq!(rig.r(slot::RSP), RSP0 - 48);
    assert_eq!(stack(&rig), [0, CODE, 0x1b, 0x1_0002, STACK, 0x23].map(|v: u64| v));
}

#[test]
fn ist_switches_the_stack_without_a_change_of_privilege() {
    let mut rig = long_at(0);
    rig.write_u64(IDT + 16 * 6, gate64(8, HANDLERS + 16 * 6, system::TRAP_GATE, 0, 1)[0]);
    rig.set_r(slot::RSP, STACK + 3).code(|a| a.ud2());
    rig.run(100);
    assert_eq!((halted_in(&rig), rig.r(slot::RSP)), (6, IST1 - 40));
    assert_eq!(rig.read_u64(IST1 - 16), STACK + 3);
    assert_eq!(rig.cpu.seg[usize::from(reg::SS)].selector, 0x10);
}

#[test]
fn int_n_needs_the_gate_s_privilege_and_returns_behind_itself() {
    let mut rig = long_at(3);
    let [low, _] = gate64(8, HANDLERS + 16 * 0x80, system::INTERRUPT_GATE, 3, 0);
    rig.write_u64(IDT + 16 * 0x80, low);
    rig.code(|a| a.int(0x80));
    rig.run(100);
    assert_eq!(halted_in(&rig), 0x80);
    assert_eq!(stack(&rig)[0], CODE + 2);
    let mut rig = long_at(3);
    rig.code(|a| a.int(0x80));
    rig.run(100);
    assert_eq!(halted_in(&rig), 13);
    // Index, IDT flag, not external.
    assert_eq!(stack(&rig)[..2], [0x80 * 8 + 2, CODE]);
}

#[test]
fn iret_returns_from_an_interrupt_to_user_code() {
    let mut rig = long_at(3);
    rig.ram.write(HANDLERS + 16 * 0x30, &[0x48, 0xcf]).unwrap();
    rig.cpu.flags.set(super::flags::IF, true);
    rig.code(|a| {
        a.mov(rax, 1u64)?;
        a.mov(rbx, 2u64)?;
        a.jmp(CODE)
    });
    rig.run(1);
    rig.cpu.deliver_event(super::deliver::Vectored::external(0x30));
    assert_eq!((rig.cpu.cpl, rig.cpu.regs.rip()), (0, HANDLERS + 16 * 0x30));
    assert!(!rig.cpu.flags.has(super::flags::IF));
    assert_eq!(rig.run(2), RunExit::Budget);
    assert_eq!((rig.cpu.cpl, rig.r(slot::RBX), rig.r(slot::RSP)), (3, 2, STACK));
    assert!(rig.cpu.flags.has(super::flags::IF));
    assert_eq!(rig.cpu.seg[usize::from(reg::SS)].selector, 0x23);
}

#[test]
fn a_fault_on_the_way_to_a_contributory_fault_is_a_double_fault_and_one_more_a_triple() {
    let mut rig = long_at(0);
    // #GP's gate is not present: #NP while delivering #GP.
    rig.write_u64(IDT + 16 * 13, 0);
    rig.code(|a| {
        a.mov(rax, 0x8000_0000_0000u64)?;
        a.mov(rbx, qword_ptr(rax))
    });
    rig.run(100);
    assert_eq!((halted_in(&rig), stack(&rig)[0]), (8, 0));
    let mut rig = long_at(0);
    rig.cpu.idtr.limit = 0;
    rig.code(|a| a.ud2());
    assert_eq!(rig.run(100), RunExit::Idle { deadline_tsc: None });
    assert_eq!(rig.cpu.activity, ActivityState::Shutdown);
    assert!(rig.world.lock().unwrap().events.iter().any(|e| e.detail == Detail::TripleFault));
}

#[test]
fn cr2_changes_when_a_page_fault_is_delivered() {
    let mut rig = long_at(0);
    rig.code(|a| {
        a.mov(rax, 0x7000_0000u64)?;
        a.mov(byte_ptr(rax + 5), 1)
    });
    rig.run(100);
    assert_eq!((halted_in(&rig), stack(&rig)[0], rig.cpu.cr2), (14, 2, 0x7000_0005));
}

#[test]
fn real_mode_reaches_long_mode_by_its_own_code() {
    let mut rig = Rig::real();
    let long = long_at(0);
    let mut low = vec![0u8; 0x8000];
    long.ram.read(0, &mut low).unwrap();
    rig.ram.write(0, &low).unwrap();
    // GDT pointer at 0x500.
    rig.write_u64(0x500, 0x37 | GDT << 16);
    rig.write_u64(GDT + 0x30, 0x00cf_9b00_0000_ffff);
    rig.code(|a| {
        a.cli()?;
        a.lgdt(ptr(0x500i32))?;
        a.mov(eax, cr4)?;
        a.or(eax, 0x20)?;
        a.mov(cr4, eax)?;
        a.mov(eax, crate::testing::PML4 as u32)?;
        a.mov(cr3, eax)?;
        a.mov(ecx, 0xc000_0080u32)?;
        a.rdmsr()?;
        a.or(eax, 0x100)?;
        a.wrmsr()?;
        a.mov(eax, cr0)?;
        a.or(eax, 0x8000_0001u32)?;
        a.mov(cr0, eax)?;
        // jmp far 8:DATA, operand size 32
        a.db(&[0x66, 0xea])?;
        a.dd(&[DATA as u32])?;
        a.dw(&[8])
    });
    // mov ax, 0x10; mov ss, eax; hlt
    rig.ram.write(DATA, &[0x66, 0xb8, 0x10, 0, 0x8e, 0xd0, 0xf4]).unwrap();
    rig.run(100);
    assert_eq!(rig.cpu.activity, ActivityState::Hlt, "rip {:#x}", rig.cpu.regs.rip());
    assert!(rig.cpu.efer.lma() && rig.cpu.code64());
    assert_eq!(rig.cpu.regs.rip(), DATA + 7);
}

#[test]
fn an_interrupt_waits_for_sti_and_one_more_instruction() {
    let mut rig = long_at(0);
    let _ = rig.cpu.apic.mmio_write(0xf0, 4, 0x1ff, Default::default());
    rig.mailbox.post_interrupt(0x55, false);
    rig.code(|a| {
        a.nop()?;
        a.sti()?;
        a.nop()?;
        a.nop()
    });
    rig.run(3);
    assert_eq!(rig.cpu.regs.rip(), CODE + 3);
    rig.run(1);
    assert_eq!((halted_in(&rig), stack(&rig)[0]), (0x55, CODE + 3));
}

#[test]
fn an_nmi_does_not_come_between_sti_and_the_next_instruction() {
    let mut rig = long_at(0);
    rig.code(|a| {
        a.sti()?;
        a.nop()?;
        a.nop()
    });
    rig.run(1);
    rig.mailbox.post_nmi(1);
    rig.run(2);
    assert_eq!((halted_in(&rig), stack(&rig)[0]), (2, CODE + 2));
}

#[test]
fn an_nmi_blocks_the_next_one_until_iret() {
    let mut rig = long_at(0);
    rig.ram.write(HANDLERS + 32, &[0x90, 0x48, 0xcf]).unwrap(); // nop; iretq
    rig.code(|a| a.jmp(CODE));
    rig.run(1);
    rig.mailbox.post_nmi(1);
    rig.run(1);
    assert_eq!(rig.cpu.regs.rip(), HANDLERS + 33);
    rig.mailbox.post_nmi(2);
    rig.run(1);
    assert_eq!(rig.cpu.regs.rip(), CODE, "back before the second one");
    rig.run(1);
    assert_eq!(rig.cpu.regs.rip(), HANDLERS + 33);
}

#[test]
fn an_alignment_check_whose_handler_has_a_misaligned_stack_uses_up_its_budget() {
    let (gdt, idt) = (DATA, DATA + 0x1000);
    let mut rig = Rig::protected();
    rig.write_u64(gdt + 8, 0x00cf_fa00_0000_ffff);
    // An interrupt gate of #AC to user code.
    rig.write_u64(idt + 8 * 17, 0x0010_ee00_000b_0000);
    rig.code(|a| a.push(eax)).set_r(slot::RSP, STACK + 1);
    let c = &mut rig.cpu;
    c.gdtr = TableRegister { base: gdt, limit: 0xf };
    c.idtr = TableRegister { base: idt, limit: 0x7ff };
    for (n, s) in c.seg.iter_mut().enumerate().take(6) {
        s.selector = if n == usize::from(reg::CS) { 0xb } else { s.selector | 3 };
        s.ar = s.ar.with_dpl(3);
    }
    c.cpl = 3;
    c.cr0 = c.cr0.with_am(true);
    c.flags.set(super::flags::AC, true);
    c.mode_changed();
    assert_eq!((rig.run(5), rig.r(slot::RSP)), (RunExit::Budget, STACK + 1));
}

#[test]
fn blocking_by_sti_ends_with_the_syscall_behind_it() {
    let mut rig = long_at(0);
    rig.cpu.msrs.lstar = CODE + 0x100;
    rig.code(|a| {
        a.sti()?;
        a.syscall()
    });
    rig.run(2);
    assert_eq!((rig.cpu.regs.rip(), rig.cpu.shadow), (CODE + 0x100, 0));
}

#[test]
fn a_return_to_user_code_makes_kernel_segments_null_and_keeps_the_bases_of_fs_and_gs() {
    let mut rig = long_at(0);
    for n in [reg::FS, reg::GS] {
        rig.cpu.seg[usize::from(n)].base = 0x1234_5000;
    }
    for (i, v) in [CODE, 0x1b, 2, DATA, 0x23].into_iter().enumerate() {
        rig.write_u64(STACK + 8 * i as u64, v);
    }
    rig.code(|a| a.iretq());
    rig.run(1);
    assert_eq!(rig.cpu.cpl, 3);
    for n in [reg::FS, reg::GS] {
        let s = rig.cpu.segment(n);
        assert_eq!((s.selector, s.ar.usable(), s.base), (0, false, 0x1234_5000));
    }
}

#[test]
fn lldt_refuses_a_base_that_is_not_canonical() {
    for (upper, vector) in [(0xffff_8000, None), (0xaaaa_aaaa, Some(13))] {
        let mut rig = long_at(0);
        rig.write_u64(GDT + 0x28, 0x8200_0000_00ff);
        rig.write_u64(GDT + 0x30, upper);
        rig.set_r(slot::RAX, 0x28).code(|a| {
            a.lldt(ax)?;
            a.hlt()
        });
        rig.run(5);
        match vector {
            Some(v) => assert_eq!((halted_in(&rig), stack(&rig)[0]), (v, 0x28)),
            None => assert_eq!(rig.cpu.segment(reg::LDTR).base, upper << 32),
        }
    }
}
