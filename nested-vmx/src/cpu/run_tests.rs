//! The run loop: budgets, blocks, code that changes.

use super::{RunExit, slot};
use crate::testing::{CODE, DATA, Rig};
use iced_x86::code_asm::*;

#[test]
fn a_loop_runs_to_the_exact_instruction() {
    for budget in [1, 2, 3, 4, 5, 1000, 3001] {
        let mut rig = Rig::long();
        rig.code(|a| {
            let mut top = a.create_label();
            a.mov(rcx, 1000u64)?;
            a.set_label(&mut top)?;
            a.add(rax, rcx)?;
            a.dec(rcx)?;
            a.jnz(top)?;
            a.jmp(CODE)
        });
        assert_eq!(rig.run(budget), RunExit::Budget);
        assert_eq!(rig.cpu.retired(), budget);
        if budget == 3001 {
            assert_eq!((rig.r(slot::RAX), rig.r(slot::RCX)), (500_500, 0));
        }
    }
}

#[test]
fn calls_stack_and_memory_operands() {
    let mut rig = Rig::long();
    rig.set_r(slot::RDI, DATA).code(|a| {
        let mut f = a.create_label();
        a.mov(rax, 5u64)?;
        a.push(rax)?;
        a.call(f)?;
        a.mov(qword_ptr(rdi + 8), rax)?;
        a.add(dword_ptr(rdi + 8), 0x10)?;
        a.movzx(ebx, byte_ptr(rdi + 8))?;
        a.pop(rcx)?;
        a.lea(rdx, qword_ptr(rcx + rcx * 8 + 1))?;
        a.jmp(CODE)?;
        a.set_label(&mut f)?;
        a.neg(rax)?;
        a.ret()
    });
    rig.run(10);
    assert_eq!(rig.r(slot::RBX), 0xb);
    assert_eq!((rig.r(slot::RCX), rig.r(slot::RDX)), (5, 46));
    assert_eq!(rig.read_u64(DATA + 8), (-5i64 as u64 & !0xffff_ffff) | 0x0b);
}

#[test]
fn code_that_changes_itself_is_seen_by_the_next_instruction() {
    let mut rig = Rig::long();
    rig.set_r(slot::RDI, CODE).code(|a| {
        // Turns the second next instruction's immediate from 1 to 7.
        a.mov(byte_ptr(rdi + 7), 7)?;
        a.nop()?;
        a.nop()?;
        a.mov(al, 1)?;
        a.jmp(CODE)
    });
    // mov byte [rdi+7], imm8 has 4 bytes; 2 nops; mov al, imm8 begins at 6.
    rig.run(4);
    assert_eq!(rig.r(slot::RAX) & 0xff, 7);
    rig.ram.write(CODE + 3, &[9]).unwrap();
    rig.run(5);
    assert_eq!(rig.r(slot::RAX) & 0xff, 9);
}

#[test]
fn an_instruction_that_crosses_a_page_runs_and_follows_changes_of_both_pages() {
    let mut rig = Rig::long();
    let code = [0x48, 0xb8, 1, 2, 3, 4, 5, 6, 7, 8]; // mov rax, imm64
    rig.ram.write(CODE + 0xffb, &code).unwrap();
    rig.ram.write(CODE + 0x1005, &[0xeb, 0xf4]).unwrap(); // jmp back
    rig.cpu.regs.set_rip(CODE + 0xffb);
    rig.run(2);
    assert_eq!(rig.r(slot::RAX), 0x0807_0605_0403_0201);
    rig.ram.write(CODE + 0x1000, &[0x44]).unwrap();
    rig.run(2);
    assert_eq!(rig.r(slot::RAX), 0x0807_0605_4403_0201);
    // It is decoded once, like any other.
    let blocks = |rig: &Rig| rig.cpu.cache.as_ref().unwrap().len();
    let before = blocks(&rig);
    rig.run(1000);
    assert_eq!(blocks(&rig), before);
    // Where the second page is another one, so are the bytes.
    rig.ram.write(DATA, &[0x55]).unwrap();
    rig.ram.write(DATA + 5, &[0xeb, 0xf4]).unwrap();
    rig.write_u64(crate::testing::PT + 8 * ((CODE >> 12) + 1), DATA | 7);
    rig.cpu.tlb.flush();
    rig.run(2);
    assert_eq!(rig.r(slot::RAX), 0x0000_0000_5503_0201);
}

#[test]
fn what_others_decoded_of_a_page_before_its_fast_writes_were_revoked_is_decoded_again() {
    let mut rig = Rig::long();
    rig.code(|a| a.jmp(CODE));
    assert!(rig.ram.map_for_write(CODE));
    let page = (CODE / 0x1000) as u32;
    let before = rig.ram.generation(page);
    rig.run(1);
    assert_ne!(rig.ram.generation(page), before);
    let decoded = rig.ram.generation(page);
    rig.run(10);
    assert_eq!(rig.ram.generation(page), decoded);
}

#[test]
fn a_page_that_another_claims_while_this_one_waits_to_claim_its_own_is_revoked_too() {
    let mut rig = Rig::long();
    rig.set_r(slot::RDI, DATA).code(|a| {
        a.mov(byte_ptr(rdi), 1)?;
        a.jmp(CODE + 0x1000)
    });
    // mov byte [rdi], 2; jmp to itself
    rig.ram.write(CODE + 0x1000, &[0xc6, 0x07, 2, 0xeb, 0xfe]).unwrap();
    assert!(rig.ram.map_for_write(CODE + 0x1000));
    let ram = std::sync::Arc::clone(&rig.ram);
    rig.world.lock().unwrap().before_exclusive = Some(Box::new(move || {
        assert!(ram.mark_code(DATA));
        ram.revoke_fast_writes();
    }));
    rig.run(4);
    assert!(rig.world.lock().unwrap().before_exclusive.is_none());
    assert_eq!(rig.ram.generation((DATA / 0x1000) as u32), 1);
}

#[test]
fn a_string_that_goes_on_and_on_in_a_device_keeps_to_its_budget() {
    let mut rig = Rig::long();
    rig.set_r(slot::RDI, 0x2000_0000).set_r(slot::RCX, u64::MAX).code(|a| a.rep().stosb());
    assert_eq!((rig.run(100), rig.cpu.retired()), (RunExit::Budget, 100));
    assert_eq!(rig.r(slot::RDI), 0x2000_0064);
}
