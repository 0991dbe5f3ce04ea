use nested_vmx::cpu::seg::Segment;
use proptest::prelude::*;

use super::*;

/// Writes by page, so that a test may give a machine gigabytes.
struct Memory {
    size: u64,
    written: Vec<(u64, Vec<u8>)>,
}

impl Memory {
    fn new(size: u64) -> Self {
        Self { size, written: Vec::new() }
    }
    fn byte(&self, gpa: u64) -> Option<u8> {
        self.written.iter().rev().find_map(|(at, bytes)| {
            let offset = usize::try_from(gpa.checked_sub(*at)?).ok()?;
            bytes.get(offset).copied()
        })
    }
    fn bytes<const N: usize>(&self, gpa: u64) -> [u8; N] {
        std::array::from_fn(|i| self.byte(gpa + i as u64).expect("written"))
    }
    fn u32(&self, gpa: u64) -> u32 {
        u32::from_le_bytes(self.bytes(gpa))
    }
    fn u64(&self, gpa: u64) -> u64 {
        u64::from_le_bytes(self.bytes(gpa))
    }
    fn string(&self, gpa: u64) -> String {
        (gpa..).map_while(|at| self.byte(at).filter(|b| *b != 0)).map(char::from).collect()
    }
}

impl GuestMemory for Memory {
    fn size(&self) -> u64 {
        self.size
    }
    fn write(&mut self, gpa: u64, bytes: &[u8]) -> Result<(), OutsideRam> {
        self.written.push((gpa, bytes.to_vec()));
        Ok(())
    }
}

const SIZE: u64 = 64 << 20;
const MAGIC: u32 = 0x1bad_b002;

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|w| w.to_le_bytes()).collect()
}

fn header(flags: u32, addresses: &[u32]) -> Vec<u8> {
    let sum = 0u32.wrapping_sub(MAGIC.wrapping_add(flags));
    [words(&[MAGIC, flags, sum]), words(addresses)].concat()
}

struct Segment64 {
    kind: u32,
    vaddr: u64,
    paddr: u64,
    data: Vec<u8>,
    memory: u64,
}

/// An ELF file with these segments, each 0x100-aligned behind the headers.
fn elf(bits: u32, entry: u64, segments: &[Segment64]) -> Vec<u8> {
    let (header_len, entry_len) = if bits == 64 { (64, 56) } else { (52, 32) };
    let mut file = vec![0x7f, b'E', b'L', b'F', if bits == 64 { 2 } else { 1 }, 1, 1];
    file.resize(16, 0);
    let push = |file: &mut Vec<u8>, value: u64| match bits {
        64 => file.extend(value.to_le_bytes()),
        _ => file.extend((value as u32).to_le_bytes()),
    };
    file.extend(2u16.to_le_bytes());
    file.extend(if bits == 64 { 62u16 } else { 3 }.to_le_bytes());
    file.extend(1u32.to_le_bytes());
    push(&mut file, entry);
    push(&mut file, header_len);
    push(&mut file, 0);
    file.extend(0u32.to_le_bytes());
    for half in [header_len as u16, entry_len, segments.len() as u16, 0, 0, 0] {
        file.extend(half.to_le_bytes());
    }
    let mut offset = 0x100;
    let mut body = Vec::new();
    for s in segments {
        file.extend(s.kind.to_le_bytes());
        if bits == 64 {
            file.extend(7u32.to_le_bytes());
        }
        for field in [offset, s.vaddr, s.paddr, s.data.len() as u64, s.memory] {
            push(&mut file, field);
        }
        if bits == 32 {
            file.extend(7u32.to_le_bytes());
        }
        push(&mut file, 4);
        body.extend(&s.data);
        body.resize(body.len().next_multiple_of(0x100), 0);
        offset = 0x100 + body.len() as u64;
    }
    file.resize(0x100, 0);
    file.extend(body);
    file
}

fn load_segment(vaddr: u64, paddr: u64, data: Vec<u8>, memory: u64) -> Segment64 {
    Segment64 { kind: 1, vaddr, paddr, data, memory }
}

fn pvh_note(entry: u32) -> Segment64 {
    let data = [words(&[4, 4, 18]), b"Xen\0".to_vec(), words(&[entry])].concat();
    Segment64 { kind: 4, vaddr: 0, paddr: 0, memory: data.len() as u64, data }
}

fn boot(image: &[u8], append: &str, modules: &[(Vec<u8>, String)]) -> (Result<BootState, BootError>, Memory) {
    let mut memory = Memory::new(SIZE);
    let state = load_kernel(&Kernel { image, append, modules }, &mut memory);
    (state, memory)
}

fn fails(image: &[u8]) -> BootError {
    boot(image, "", &[]).0.expect_err("must not boot")
}

/// A flat image with its header at file offset 16: load address 1 MiB, 64 bytes, then 4096 of bss.
fn flat_multiboot() -> Vec<u8> {
    let mut image = vec![0x90; 16];
    image.extend(header(0x1_0003, &[0x10_0010, 0x10_0000, 0x10_0040, 0x10_1040, 0x10_0030]));
    image.resize(64, 0xaa);
    image.extend([0xbb; 64]);
    image
}

#[test]
fn multiboot_with_address_fields_starts_as_the_specification_says() {
    let modules = [(b"first".to_vec(), "one a=b".to_owned()), (b"second".to_vec(), String::new())];
    let (state, memory) = boot(&flat_multiboot(), "apic=x2apic", &modules);
    let state = state.unwrap();
    assert_eq!((state.rip, state.gprs[0]), (0x10_0030, 0x2bad_b002));
    assert_eq!((state.cr0, state.cr4, state.efer, state.rflags), (0x11, 0, 0, 2));
    let cs = state.segments[1];
    assert_eq!((cs.base, cs.limit, u32::from(cs.ar)), (0, u32::MAX, 0xc09b));
    assert_eq!(memory.u64(state.gdtr.base + u64::from(cs.selector)), 0x00cf_9b00_0000_ffff);
    assert_eq!(
        (memory.byte(0x10_003f), memory.byte(0x10_0040), memory.byte(0x10_103f)),
        (Some(0xaa), Some(0), Some(0))
    );
    assert_eq!(memory.byte(0x10_1040), None);

    let info = state.gprs[3];
    assert_eq!(memory.u32(info), 0x24d);
    assert_eq!((memory.u32(info + 4), memory.u32(info + 8)), (639, (SIZE - (1 << 20)) as u32 >> 10));
    assert_eq!(memory.string(memory.u32(info + 16).into()), "kernel apic=x2apic");
    assert_eq!(memory.u32(info + 20), 2);
    let list = u64::from(memory.u32(info + 24));
    let (start, end) = (memory.u32(list), memory.u32(list + 4));
    assert_eq!((start, end), (0x10_2000, 0x10_2005));
    assert_eq!(memory.bytes(start.into()), *b"first");
    assert_eq!(memory.string(memory.u32(list + 8).into()), "one a=b");
    assert_eq!(memory.u32(list + 16), 0x10_3000);
    let (len, map) = (memory.u32(info + 44), u64::from(memory.u32(info + 48)));
    let ram: Vec<_> = (0..u64::from(len / 24))
        .map(|i| map + 24 * i)
        .filter(|at| memory.u32(*at) == 20 && memory.u32(at + 20) == 1)
        .map(|at| (memory.u64(at + 4), memory.u64(at + 12)))
        .collect();
    assert_eq!(ram, [(0, 0x9_fc00), (1 << 20, SIZE - (1 << 20))]);
}

#[test]
fn multiboot_loads_elf32_and_elf64_at_physical_addresses() {
    for bits in [32, 64] {
        let mut text = header(3, &[]);
        text.resize(32, 0x90);
        let segments = [
            load_segment(0xc010_0000, 0x10_0000, text, 32),
            load_segment(0xc020_0000, 0x20_0000, vec![1, 2, 3], 0x5000),
        ];
        let (state, memory) = boot(&elf(bits, 0xc010_0010, &segments), "", &[(vec![9], String::new())]);
        let state = state.unwrap();
        assert_eq!(state.rip, 0x10_0010, "the virtual entry, as a physical address");
        assert_eq!(memory.bytes(0x20_0000), [1, 2, 3, 0]);
        assert_eq!(memory.byte(0x20_4fff), Some(0));
        assert_eq!(memory.byte(0x20_5000), Some(9), "the module follows the kernel");
    }
}

#[test]
fn pvh_starts_at_the_notes_entry_with_start_info() {
    let segments = [load_segment(0xffff_ffff_8100_0000, 0x100_0000, vec![0x90; 64], 0x1000), pvh_note(0x100_0010)];
    let image = elf(64, 0x100_0000, &segments);
    let (state, memory) = boot(&image, "console=ttyS0", &[(b"initrd".to_vec(), String::new())]);
    let state = state.unwrap();
    assert_eq!((state.rip, state.cr0, state.segments[7].limit), (0x100_0010, 0x11, 0x67));
    let info = state.gprs[3];
    assert_eq!((memory.u32(info), memory.u32(info + 4), memory.u32(info + 12)), (0x336e_c578, 1, 1));
    let module = memory.u64(info + 16);
    assert_eq!((memory.u64(module), memory.u64(module + 8)), (0x100_1000, 6));
    assert_eq!(memory.string(memory.u64(info + 24)), "console=ttyS0");
    assert_eq!(memory.u64(info + 32), 0);
    let (map, entries) = (memory.u64(info + 40), memory.u32(info + 48));
    assert_eq!((memory.u64(map), memory.u64(map + 8), memory.u32(map + 16)), (0, 0x9_fc00, 1));
    assert_eq!(entries, 5);
}

#[test]
fn memory_above_4_gib_is_in_the_map() {
    let mut memory = Memory::new(5 << 30);
    let state = load_kernel(&Kernel { image: &flat_multiboot(), append: "", modules: &[] }, &mut memory).unwrap();
    let info = state.gprs[3];
    let last = u64::from(memory.u32(info + 48) + memory.u32(info + 44)) - 24;
    assert_eq!((memory.u64(last + 4), memory.u64(last + 12)), (4 << 30, 2 << 30));
    assert_eq!(memory.u32(info + 8), ((3 << 30) - (1 << 20)) >> 10);
}

#[test]
fn flat_images_start_in_real_mode() {
    let mut memory = Memory::new(SIZE);
    let state = load_flat(&[0xf4], 0x7c00, None, &mut memory).unwrap();
    assert_eq!((state.segments[1], state.rip, state.cr0), (Segment::real(0, true), 0x7c00, 0x10));
    assert_eq!(memory.byte(0x7c00), Some(0xf4));
    let state = load_flat(&[0xf4], 0x8_0000, Some(0x9_1234), &mut memory).unwrap();
    assert_eq!((state.segments[1].base, state.rip), (0x9_0000, 0x1234));
    assert_eq!(load_flat(&[0], 1 << 20, None, &mut memory), Err(BootError::FlatEntry { entry_gpa: 1 << 20 }));
    assert!(matches!(load_flat(&[0; 2], SIZE - 1, Some(0), &mut memory), Err(BootError::Memory { .. })));
}

#[test]
fn bad_images_say_what_is_wrong() {
    use BootError::*;
    assert_eq!(fails(b"no kernel"), UnknownProtocol);
    let text = || load_segment(0x10_0000, 0x10_0000, vec![0x90; 64], 64);
    assert_eq!(fails(&elf(64, 0x10_0000, &[text()])), ElfWithoutProtocol);
    assert_eq!(fails(&elf(64, 0, &[pvh_note(0)])), ElfEmpty);
    assert_eq!(fails(&elf(64, 0, &[text(), pvh_note(0x20_0000)])), Entry { entry: 0x20_0000 });
    assert!(matches!(fails(b"\x7fELF\x02\x01\x01"), Elf(_)));
    assert_eq!(fails(&header(0x8, &[])), MultibootFlags { flags: 8, unknown: 8 });
    assert!(matches!(fails(&header(0, &[])), Elf(_)), "a header without addresses needs an ELF file");

    let short = load_segment(0x10_0000, 0x10_0000, [header(0, &[]), vec![0; 64]].concat(), 8);
    assert!(matches!(fails(&elf(32, 0x10_0000, &[short])), ElfSegment { index: 0, .. }));
    let text = || load_segment(0x10_0000, 0x10_0000, header(0, &[]), 64);
    let outside = load_segment(0, SIZE - 1, vec![1], 2);
    assert!(matches!(fails(&elf(32, 0x10_0000, &[text(), outside])), Memory { .. }));
    let huge = load_segment(0, 0, vec![1], u64::MAX);
    assert!(matches!(fails(&elf(64, 0x10_0000, &[text(), huge])), ElfSegment { index: 1, .. }));
    let low = load_segment(0, 0x7_ffff, vec![1], 2);
    assert!(matches!(fails(&elf(32, 0x10_0000, &[text(), low])), OverlapsInfo { .. }));
    assert_eq!(fails(&elf(32, 0x30_0000, &[text()])), Entry { entry: 0x30_0000 });

    for (addresses, what) in [
        ([0x10_0000, 0x10_0004, 0, 0, 0x10_0000], "header_addr is below load_addr"),
        ([0x10_0004, 0x10_0000, 0, 0, 0x10_0000], "the image would start before the file"),
        ([0x10_0000, 0x10_0000, 0xf_0000, 0, 0x10_0000], "load_end_addr is below load_addr"),
        ([0x10_0000, 0x10_0000, 0x10_1000, 0, 0x10_0000], "load_end_addr lies behind the end of the file"),
        ([0x10_0000, 0x10_0000, 0, 0x10_0001, 0x10_0000], "bss_end_addr lies inside the loaded data"),
    ] {
        assert_eq!(fails(&header(0x1_0000, &addresses)), MultibootAddresses { what });
    }
    assert_eq!(fails(&header(0x1_0000, &[0x10_0000, 0x10_0000, 0, 0, 0x20_0000])), Entry { entry: 0x20_0000 });
}

#[test]
fn modules_and_command_lines_are_bounded() {
    let image = flat_multiboot();
    let big = [(vec![0; SIZE as usize], String::new())];
    assert!(matches!(boot(&image, "", &big).0, Err(BootError::NoRoomForModules { .. })));
    assert!(matches!(boot(&image, &"x".repeat(1 << 20), &[]).0, Err(BootError::TooMuchInfo { .. })));
    assert_eq!(boot(&image, "a\0b", &[]).0, Err(BootError::Nul));
}

/// A valid image of each protocol, to be damaged.
fn seeds() -> Vec<Vec<u8>> {
    let mut text = header(3, &[]);
    text.resize(64, 0x90);
    let text = || load_segment(0x10_0000, 0x10_0000, text.clone(), 0x1000);
    vec![
        flat_multiboot(),
        elf(32, 0x10_0010, &[text()]),
        elf(64, 0x10_0010, &[text()]),
        elf(64, 0, &[load_segment(0, 0x10_0000, vec![1; 64], 0x1000), pvh_note(0x10_0000)]),
    ]
}

proptest! {
    #[test]
    fn damaged_images_never_panic_and_never_write_outside_ram(
        seed in 0usize..4,
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..12),
        cut in any::<prop::sample::Index>(),
        truncate in any::<bool>(),
    ) {
        let mut image = seeds().swap_remove(seed);
        for (at, value) in changes {
            // Most fields that matter are in the first 256 bytes.
            let at = at.index(image.len().min(320));
            image[at] = value;
        }
        if truncate {
            image.truncate(cut.index(image.len()));
        }
        let (_, memory) = boot(&image, "x", &[(vec![1, 2], "m".into())]);
        for (gpa, bytes) in &memory.written {
            prop_assert!(gpa + bytes.len() as u64 <= SIZE);
        }
    }

    #[test]
    fn random_images_never_panic(image in prop::collection::vec(any::<u8>(), 0..600)) {
        let _ = boot(&image, "", &[]);
        let _ = boot(&[&b"\x7fELF"[..], &image].concat(), "", &[]);
    }
}
