//! Two processors on two threads share memory as x86 says: exact LOCK operations, memory ordering, one time.

mod code;

use std::sync::Arc;
use std::time::Duration;

use iced_x86::IcedError;
use iced_x86::code_asm::*;
use nested_vmx::mem::Ram;

use crate::engine::{Built, Disposition, Injection};
use crate::host::{Choice, EngineKind, allowed_cpus};
use crate::spec::{Boot, Nested, VmConfig, VmSpec};
use crate::vm::{GuestExit, Vm, VmState};

const PATIENCE: Duration = Duration::from_secs(20);

type Code = Result<(), IcedError>;

/// Real mode code of each processor, on the way to [`MAIN`].
const ENTRY: [u64; 2] = [0x1000, 0x2000];
/// Both processors run this in 32-bit protected mode, with their number in ESI.
const MAIN: u64 = 0x3000;
const GDT: u64 = 0x5000;
const GDTR: u64 = 0x5100;
/// How many processors have come to [`MAIN`], and how many are through.
const READY: i32 = 0x6000;
const DONE: i32 = 0x6040;
/// Counts what must not be.
const BAD: i32 = 0x6080;
/// From here on memory is a test's own.
const FREE: i32 = 0x7000;

struct Machine {
    vm: Arc<Vm>,
    ram: Arc<Ram>,
}

impl Machine {
    /// `main` ends behind its last instruction; the guest exits when all processors got there.
    fn new(cpus: u32, main: impl FnOnce(&mut CodeAssembler) -> Code) -> Self {
        let config = VmConfig {
            name: "smp".into(),
            cpus,
            memory_bytes: 16 << 20,
            nested: Nested::Emulated,
            boot: Boot::Flat { image: entry(0), load_gpa: ENTRY[0], entry_gpa: None },
            ..VmConfig::default()
        };
        let spec = VmSpec::new(config, &allowed_cpus()).unwrap();
        let choice = Choice { engine: EngineKind::Emulated, nested: Nested::Emulated, reason: "test".into() };
        let mut ram = None;
        let vm = Vm::with_engine(spec, choice, allowed_cpus(), |spec, context| {
            let (engine, vcpus) = super::engine(spec, context)?;
            ram = Some(engine.wiring.ram.clone());
            Ok(Built { engine, vcpus })
        });
        let machine = Self { vm: vm.unwrap(), ram: ram.unwrap() };
        machine.put(ENTRY[1], &entry(1));
        // Null, flat 32-bit code, flat data.
        for (i, descriptor) in [0u64, 0x00cf_9b00_0000_ffff, 0x00cf_9300_0000_ffff].iter().enumerate() {
            machine.put(GDT + 8 * i as u64, &descriptor.to_le_bytes());
        }
        machine.put(GDTR, &[&23u16.to_le_bytes()[..], &(GDT as u32).to_le_bytes()].concat());
        machine.put(MAIN, &assemble(32, MAIN, |a| around(a, cpus, main)));
        machine
    }

    fn put(&self, gpa: u64, bytes: &[u8]) {
        self.ram.write(gpa, bytes).unwrap();
    }

    fn get(&self, gpa: i32) -> u32 {
        self.words(gpa, 1)[0]
    }

    fn words(&self, gpa: i32, count: usize) -> Vec<u32> {
        let mut bytes = vec![0; 4 * count];
        self.ram.read(gpa as u64, &mut bytes).unwrap();
        bytes.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
    }

    fn start(&self) {
        self.vm.start().unwrap();
        if self.vm.spec().cpus == 2 {
            let sipi = Injection::Sipi { vector: (ENTRY[1] >> 12) as u8 };
            assert_eq!(self.vm.inject(1, sipi).unwrap().disposition, Disposition::Started);
        }
    }

    fn ends(&self) {
        let vm = &self.vm;
        let ended = vm.wait_for(PATIENCE, || Some(vm.state()).filter(VmState::ended));
        let at: Vec<_> = (0..vm.spec().cpus).map(|i| vm.vcpu_published(i)).collect();
        assert_eq!(ended, Some(VmState::Stopped { exit: Some(GuestExit { code: 0 }) }), "{at:#?}");
    }

    /// Runs to the end; nothing bad was counted.
    fn run(&self) {
        self.start();
        self.ends();
        assert_eq!(self.get(BAD), 0);
    }
}

fn assemble(bits: u32, ip: u64, code: impl FnOnce(&mut CodeAssembler) -> Code) -> Vec<u8> {
    let mut a = CodeAssembler::new(bits).unwrap();
    code(&mut a).unwrap();
    a.assemble(ip).unwrap()
}

/// From real mode to [`MAIN`]; it may lie anywhere.
fn entry(cpu: i32) -> Vec<u8> {
    assemble(16, 0, |a| {
        a.cli()?;
        a.mov(esi, cpu)?;
        a.lgdt(fword_ptr(GDTR as i32))?;
        a.mov(eax, cr0)?;
        a.or(eax, 1)?;
        a.mov(cr0, eax)?;
        // jmp far 0x08:MAIN
        let [low, high] = (MAIN as u16).to_le_bytes();
        a.db(&[0xea, low, high, 0x08, 0x00])
    })
}

fn around(a: &mut CodeAssembler, cpus: u32, main: impl FnOnce(&mut CodeAssembler) -> Code) -> Code {
    let (mut sleep, mut end) = (a.create_label(), a.create_label());
    a.mov(eax, 0x10)?;
    a.mov(ds, eax)?;
    a.mov(es, eax)?;
    a.mov(ss, eax)?;
    a.imul_3(esp, esi, 0x100)?;
    a.add(esp, 0x5800)?;
    a.lock().inc(dword_ptr(READY))?;
    wait_until(a, READY, cpus as i32)?;
    main(a)?;
    a.lock().inc(dword_ptr(DONE))?;
    a.test(esi, esi)?;
    a.je(end)?;
    mark(a, &mut sleep)?;
    a.hlt()?;
    a.jmp(sleep)?;
    mark(a, &mut end)?;
    wait_until(a, DONE, cpus as i32)?;
    a.mov(al, 0)?;
    a.out(0xf4, al)
}

fn wait_until(a: &mut CodeAssembler, gpa: i32, value: impl Into<Wanted>) -> Code {
    let (mut again, mut over) = (a.create_label(), a.create_label());
    mark(a, &mut again)?;
    match value.into() {
        Wanted::Value(v) => a.cmp(dword_ptr(gpa), v)?,
        Wanted::Register(r) => a.cmp(dword_ptr(gpa), r)?,
    }
    a.je(over)?;
    a.pause()?;
    a.jmp(again)?;
    mark(a, &mut over)
}

/// The assembler takes one label an instruction, and none behind the last.
fn mark(a: &mut CodeAssembler, label: &mut CodeLabel) -> Code {
    a.set_label(label)?;
    a.nop()
}

enum Wanted {
    Value(i32),
    Register(AsmRegister32),
}

impl From<i32> for Wanted {
    fn from(v: i32) -> Self {
        Self::Value(v)
    }
}

impl From<AsmRegister32> for Wanted {
    fn from(r: AsmRegister32) -> Self {
        Self::Register(r)
    }
}

/// Counts in EDI from 1 to `count`.
fn repeat(a: &mut CodeAssembler, count: u32, body: impl FnOnce(&mut CodeAssembler) -> Code) -> Code {
    let mut again = a.create_label();
    a.mov(edi, 1)?;
    mark(a, &mut again)?;
    body(a)?;
    a.inc(edi)?;
    a.cmp(edi, count as i32)?;
    a.jbe(again)
}

/// One part for each processor.
fn each(
    a: &mut CodeAssembler,
    zero: impl FnOnce(&mut CodeAssembler) -> Code,
    one: impl FnOnce(&mut CodeAssembler) -> Code,
) -> Code {
    let (mut other, mut over) = (a.create_label(), a.create_label());
    a.test(esi, esi)?;
    a.jne(other)?;
    zero(a)?;
    a.jmp(over)?;
    mark(a, &mut other)?;
    one(a)?;
    mark(a, &mut over)
}

/// Counts it when the flags say `above or equal` no more.
fn bad_if_below(a: &mut CodeAssembler) -> Code {
    let mut fine = a.create_label();
    a.jae(fine)?;
    a.lock().inc(dword_ptr(BAD))?;
    mark(a, &mut fine)
}

fn bad_if_unequal(a: &mut CodeAssembler) -> Code {
    let mut fine = a.create_label();
    a.je(fine)?;
    a.lock().inc(dword_ptr(BAD))?;
    mark(a, &mut fine)
}

type AtWord = fn(&mut CodeAssembler, i32) -> Code;

/// Ways to add 1 to the word at an address, atomically.
const LOCKED: [(&str, AtWord); 4] = [
    ("add", |a, p| a.lock().add(dword_ptr(p), 1)),
    ("xadd", |a, p| {
        a.mov(eax, 1)?;
        a.lock().xadd(dword_ptr(p), eax)
    }),
    ("cmpxchg", |a, p| {
        let mut again = a.create_label();
        a.mov(eax, dword_ptr(p))?;
        mark(a, &mut again)?;
        a.lea(ebx, dword_ptr(eax + 1))?;
        a.lock().cmpxchg(dword_ptr(p), ebx)?;
        a.jne(again)
    }),
    ("cmpxchg8b", |a, p| {
        let mut again = a.create_label();
        a.mov(eax, dword_ptr(p))?;
        a.mov(edx, dword_ptr(p + 4))?;
        mark(a, &mut again)?;
        a.mov(ebx, eax)?;
        a.mov(ecx, edx)?;
        a.add(ebx, 1)?;
        a.adc(ecx, 0)?;
        a.lock().cmpxchg8b(qword_ptr(p))?;
        a.jne(again)
    }),
];

#[test]
fn no_processor_reads_a_tsc_below_one_that_was_read_before() {
    const LOCK: i32 = FREE;
    const LAST: i32 = FREE + 0x40;
    let machine = Machine::new(2, |a| {
        let (mut again, mut good, mut bad) = (a.create_label(), a.create_label(), a.create_label());
        a.mov(edi, 20_000)?;
        mark(a, &mut again)?;
        a.mov(ebx, 1)?;
        a.xchg(dword_ptr(LOCK), ebx)?;
        a.test(ebx, ebx)?;
        a.jne(again)?;
        a.rdtsc()?;
        a.cmp(edx, dword_ptr(LAST + 4))?;
        a.ja(good)?;
        a.jb(bad)?;
        a.cmp(eax, dword_ptr(LAST))?;
        a.jae(good)?;
        mark(a, &mut bad)?;
        a.inc(dword_ptr(BAD))?;
        mark(a, &mut good)?;
        a.mov(dword_ptr(LAST), eax)?;
        a.mov(dword_ptr(LAST + 4), edx)?;
        a.mov(dword_ptr(LOCK), 0)?;
        a.dec(edi)?;
        a.jne(again)
    });
    machine.run();
}

#[test]
fn locked_operations_of_two_processors_lose_nothing() {
    // Where the word is in its two pages, and how often each processor adds to it: a crossing stops the others.
    const PLACES: [(&str, i32, u32); 3] =
        [("aligned", 0x40, 100_000), ("line-crossing", 0x7d, 10_000), ("page-crossing", 0xffd, 10_000)];
    // The lower half of a quadword overflows on the way.
    const START: u32 = 0xffff_ff00;
    let address = |op: usize, place: usize| FREE + (op * PLACES.len() + place) as i32 * 0x2000 + PLACES[place].1;
    let machine = Machine::new(2, |a| {
        for (o, (_, add)) in LOCKED.iter().enumerate() {
            for (p, (_, _, count)) in PLACES.iter().enumerate() {
                repeat(a, *count, |a| add(a, address(o, p)))?;
            }
        }
        Ok(())
    });
    let all = || (0..LOCKED.len()).flat_map(|o| (0..PLACES.len()).map(move |p| (o, p)));
    for (o, p) in all() {
        machine.put(address(o, p) as u64, &u64::from(START).to_le_bytes());
    }
    machine.run();
    for (o, p) in all() {
        let counted = machine.get(address(o, p)).wrapping_sub(START);
        assert_eq!(counted, 2 * PLACES[p].2, "lock {} on a {} word", LOCKED[o].0, PLACES[p].0);
        let carry = if LOCKED[o].0 == "cmpxchg8b" { 1 } else { 0 };
        assert_eq!(machine.get(address(o, p) + 4), carry, "lock {} on a {} word", LOCKED[o].0, PLACES[p].0);
    }
}

#[test]
fn a_crossing_locked_operation_is_exact_against_one_that_overlaps_it() {
    const COUNT: u32 = 100_000;
    const CROSSING: [i32; 2] = [FREE + 0x7e, FREE + 0x1ffe];
    let machine = Machine::new(2, |a| {
        for p in CROSSING {
            each(
                a,
                |a| repeat(a, COUNT, |a| a.lock().add(dword_ptr(p), 0x1_0000)),
                |a| repeat(a, COUNT, |a| a.lock().inc(word_ptr(p + 2))),
            )?;
        }
        Ok(())
    });
    machine.run();
    for p in CROSSING {
        assert_eq!(machine.get(p) >> 16, (2 * COUNT) & 0xffff);
    }
}

#[test]
fn xchg_makes_a_lock_that_guards_plain_stores() {
    const COUNT: u32 = 50_000;
    const LOCK: i32 = FREE;
    const GUARDED: i32 = FREE + 0x80;
    let machine = Machine::new(2, |a| {
        repeat(a, COUNT, |a| {
            let (mut again, mut taken) = (a.create_label(), a.create_label());
            mark(a, &mut again)?;
            a.mov(eax, 1)?;
            a.xchg(dword_ptr(LOCK), eax)?;
            a.test(eax, eax)?;
            a.je(taken)?;
            wait_until(a, LOCK, 0)?;
            a.jmp(again)?;
            mark(a, &mut taken)?;
            a.inc(dword_ptr(GUARDED))?;
            a.mov(dword_ptr(LOCK), 0)
        })
    });
    machine.run();
    assert_eq!(machine.get(GUARDED), 2 * COUNT);
}

/// SDM 3, "Neither Loads Nor Stores Are Reordered with Like Operations".
#[test]
fn who_sees_a_flag_sees_the_data_stored_before_it() {
    const COUNT: u32 = 300_000;
    const DATA: i32 = FREE;
    const FLAG: i32 = FREE + 0x80;
    const SEEN_BETWEEN: i32 = FREE + 0x100;
    let machine = Machine::new(2, |a| {
        each(
            a,
            |a| {
                repeat(a, COUNT, |a| {
                    a.mov(dword_ptr(DATA), edi)?;
                    a.mov(dword_ptr(FLAG), edi)
                })
            },
            |a| {
                let (mut again, mut over) = (a.create_label(), a.create_label());
                mark(a, &mut again)?;
                a.mov(eax, dword_ptr(FLAG))?;
                a.mov(ebx, dword_ptr(DATA))?;
                a.cmp(ebx, eax)?;
                bad_if_below(a)?;
                a.cmp(eax, COUNT as i32)?;
                a.je(over)?;
                a.mov(dword_ptr(SEEN_BETWEEN), eax)?;
                a.jmp(again)?;
                mark(a, &mut over)
            },
        )
    });
    machine.run();
    assert_ne!(machine.get(SEEN_BETWEEN), 0, "the two ran one after the other");
}

/// SDM 3, "Loads May Be Reordered with Earlier Stores to Different Locations", and what forbids it.
#[test]
fn a_fence_or_a_locked_operation_keeps_a_load_behind_an_earlier_store() {
    const COUNT: u32 = 200_000;
    /// Each processor stores the number of its round to its own word, then reads the other's.
    const WORD: [i32; 2] = [FREE, FREE + 0x80];
    const READ: [i32; 2] = [0x10_0000, 0x20_0000];
    let ways: [(&str, AtWord); 3] = [
        ("mfence", |a, p| {
            a.mov(dword_ptr(p), edi)?;
            a.mfence()
        }),
        ("lock", |a, p| {
            a.mov(dword_ptr(p), edi)?;
            a.lock().add(dword_ptr(esp - 4), 0)
        }),
        ("xchg", |a, p| {
            a.mov(eax, edi)?;
            a.xchg(dword_ptr(p), eax)
        }),
    ];
    for (name, store) in ways {
        let part = |a: &mut CodeAssembler, me: usize| {
            repeat(a, COUNT, |a| {
                store(a, WORD[me])?;
                a.mov(eax, dword_ptr(WORD[1 - me]))?;
                a.mov(dword_ptr(edi * 4 + READ[me]), eax)
            })
        };
        let machine = Machine::new(2, |a| each(a, |a| part(a, 0), |a| part(a, 1)));
        machine.run();
        let [read0, read1] = READ.map(|p| machine.words(p, COUNT as usize + 1));
        let mut together = 0;
        for i in 1..=COUNT {
            // In its round i, 0 did not see the other's round `next`: which came later, then, and sees 0's round i.
            let next = read0[i as usize] + 1;
            together += u32::from(next > 1 && next <= COUNT);
            if next <= COUNT {
                assert!(read1[next as usize] >= i, "{name}: neither saw the other, in rounds {i} and {next}");
            }
        }
        assert_ne!(together, 0, "{name}: the two ran one after the other");
    }
}

/// SDM 3, "Accessed and Dirty Flags": the processor sets them with locked accesses.
#[test]
fn accessed_and_dirty_flags_and_concurrent_edits_of_the_entry_do_not_lose_each_other() {
    const COUNT: u32 = 50_000;
    const DIRECTORY: i32 = 0x2_0000;
    const TABLE: i32 = 0x2_1000;
    const PAGE: i32 = 0x3_0000;
    const PRESENT_WRITABLE: u32 = 3;
    const ENTRY_OF_PAGE: i32 = TABLE + (PAGE >> 12) * 4;
    const FLAGS: i32 = 1 << 5 | 1 << 6;
    /// A bit that the processor ignores.
    const SOFTWARE: i32 = 1 << 9;
    let machine = Machine::new(2, |a| {
        a.mov(eax, DIRECTORY)?;
        a.mov(cr3, eax)?;
        a.mov(eax, cr0)?;
        a.or(eax, i32::MIN)?;
        a.mov(cr0, eax)?;
        each(
            a,
            |a| {
                repeat(a, COUNT, |a| {
                    a.lock().xor(dword_ptr(ENTRY_OF_PAGE), SOFTWARE)?;
                    a.mov(eax, dword_ptr(ENTRY_OF_PAGE))?;
                    a.and(eax, SOFTWARE)?;
                    a.mov(ebx, edi)?;
                    a.and(ebx, 1)?;
                    a.shl(ebx, SOFTWARE.trailing_zeros())?;
                    a.cmp(eax, ebx)?;
                    bad_if_unequal(a)
                })
            },
            |a| {
                repeat(a, COUNT, |a| {
                    a.lock().and(dword_ptr(ENTRY_OF_PAGE), !FLAGS)?;
                    a.invlpg(byte_ptr(PAGE))?;
                    a.mov(dword_ptr(PAGE), edi)?;
                    a.mov(eax, dword_ptr(ENTRY_OF_PAGE))?;
                    a.and(eax, FLAGS)?;
                    a.cmp(eax, FLAGS)?;
                    bad_if_unequal(a)
                })
            },
        )
    });
    machine.put(DIRECTORY as u64, &(TABLE as u32 | PRESENT_WRITABLE).to_le_bytes());
    for page in 0..1024u32 {
        machine.put(TABLE as u64 + 4 * u64::from(page), &(page << 12 | PRESENT_WRITABLE).to_le_bytes());
    }
    machine.run();
    assert_eq!(machine.get(ENTRY_OF_PAGE) & 0xfff, PRESENT_WRITABLE | FLAGS as u32, "an even number of toggles");
}
