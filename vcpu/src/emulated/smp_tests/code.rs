//! Code that another processor or the host changes.

use super::*;

/// `mov eax, value; ret`
fn returns(value: u32) -> Vec<u8> {
    assemble(32, 0, |a| {
        a.mov(eax, value)?;
        a.ret()
    })
}

/// SDM 3, "Handling Self- and Cross-Modifying Code".
#[test]
fn code_that_another_processor_rewrites_runs_as_new_after_serializing() {
    const ROUNDS: u32 = 500;
    const FLAG: i32 = 0xe100;
    const ACK: i32 = 0xe180;
    const TEMPLATE: i32 = 0xd000;
    /// An aligned value; one that crosses pages; one copied as a whole; one on the page of the flags.
    const FUNCTIONS: [i32; 4] = [0x9003, 0xaffd, 0xc000, 0xe003];
    let machine = Machine::new(2, |a| {
        each(
            a,
            |a| {
                repeat(a, ROUNDS, |a| {
                    a.mov(dword_ptr(FUNCTIONS[0] + 1), edi)?;
                    a.mov(dword_ptr(FUNCTIONS[1] + 1), edi)?;
                    a.mov(dword_ptr(TEMPLATE + 1), edi)?;
                    a.mov(ebp, edi)?;
                    a.mov(esi, TEMPLATE)?;
                    a.mov(edi, FUNCTIONS[2])?;
                    a.mov(ecx, 6)?;
                    a.cld()?;
                    a.rep().movsb()?;
                    a.mov(edi, ebp)?;
                    a.xor(esi, esi)?;
                    a.mov(eax, edi)?;
                    a.xchg(dword_ptr(FUNCTIONS[3] + 1), eax)?;
                    a.mov(dword_ptr(FLAG), edi)?;
                    wait_until(a, ACK, edi)
                })
            },
            |a| {
                repeat(a, ROUNDS, |a| {
                    wait_until(a, FLAG, edi)?;
                    a.xor(eax, eax)?;
                    a.cpuid()?;
                    for f in FUNCTIONS {
                        a.mov(edx, f)?;
                        a.call(edx)?;
                        a.cmp(eax, edi)?;
                        bad_if_unequal(a)?;
                    }
                    a.mov(dword_ptr(ACK), edi)
                })
            },
        )
    });
    for f in FUNCTIONS.into_iter().chain([TEMPLATE]) {
        machine.put(f as u64, &returns(0));
    }
    machine.run();
}

const JMP_SELF: [u8; 2] = [0xeb, 0xfe];
const RET: u8 = 0xc3;
const NOP: u8 = 0x90;

#[test]
fn a_loop_ends_when_another_processor_overwrites_its_jump() {
    const LOOP: u64 = 0x9000;
    let machine = Machine::new(2, |a| {
        each(
            a,
            |a| {
                // Long enough for the other one to be in its loop.
                repeat(a, 200_000, |a| a.nop())?;
                a.mov(word_ptr(LOOP as i32), i32::from(u16::from_le_bytes([NOP, NOP])))
            },
            |a| {
                a.mov(edx, LOOP as i32)?;
                a.call(edx)
            },
        )
    });
    machine.put(LOOP, &[&JMP_SELF[..], &[RET]].concat());
    machine.run();
}

#[test]
fn code_that_the_host_writes_is_seen_by_a_running_and_by_a_paused_guest() {
    const LOOP: u64 = 0x9000;
    let machine = Machine::new(1, |a| {
        a.mov(edx, LOOP as i32)?;
        a.call(edx)
    });
    let code = |value: u32| {
        assemble(32, 0, |a| {
            let mut again = a.create_label();
            a.set_label(&mut again)?;
            a.mov(ecx, value)?;
            a.jmp(again)
        })
    };
    let vm = &machine.vm;
    let shown_value = || vm.registers(0).unwrap().gprs[1];
    let shows = |value: u32| {
        let shown = vm.wait_for(PATIENCE, || (shown_value() == u64::from(value)).then_some(()));
        assert!(shown.is_some(), "{value} was written, {} is still loaded", shown_value());
    };
    machine.put(LOOP, &code(0x5000));
    machine.start();
    shows(0x5000);
    for n in 1..=50u32 {
        machine.put(LOOP + 1, &(0x5000 + n).to_le_bytes());
        shows(0x5000 + n);
    }
    for n in 1..=20u32 {
        vm.pause().unwrap();
        let before = shown_value();
        machine.put(LOOP + 1, &(0x6000 + n).to_le_bytes());
        assert_eq!(shown_value(), before, "it stands");
        vm.resume().unwrap();
        shows(0x6000 + n);
    }
    machine.put(LOOP + 5, &[RET]);
    machine.ends();
}
