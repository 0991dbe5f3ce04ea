//! What a loader and a processor may rely on.

use std::collections::BTreeSet;

use iced_x86::{CpuidFeature, Decoder, DecoderOptions};
use nestd_guests::{L1, bench, l1, l2};

fn images() -> [(&'static str, &'static [u8]); 5] {
    [
        ("l1 demo", l1(L1::Demo)),
        ("l1 stays-active", l1(L1::StaysActive)),
        ("l1 ignores-sipi", l1(L1::IgnoresSipi)),
        ("l2", l2()),
        ("bench", bench()),
    ]
}

fn number(bytes: &[u8], offset: usize, size: usize) -> u64 {
    bytes[offset..offset + size].iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

/// Name and bytes of each ELF64 section that holds code.
fn code_sections(image: &[u8]) -> Vec<(String, &[u8])> {
    let (table, count) = (number(image, 0x28, 8) as usize, number(image, 0x3c, 2) as usize);
    let header = |index: usize| &image[table + index * 64..table + (index + 1) * 64];
    let names = number(header(number(image, 0x3e, 2) as usize), 0x18, 8) as usize;
    let executable = |section: &&[u8]| number(section, 8, 8) & 4 != 0;
    (0..count)
        .map(header)
        .filter(executable)
        .map(|section| {
            let name = &image[names + number(section, 0, 4) as usize..];
            let name = name.iter().take_while(|byte| **byte != 0).map(|byte| char::from(*byte)).collect();
            let (offset, size) = (number(section, 0x18, 8) as usize, number(section, 0x20, 8) as usize);
            (name, &image[offset..offset + size])
        })
        .collect()
}

/// The bring-up of a processor, and kvm_pvm's instruction emulator, need guests of plain integer code.
#[test]
fn guests_use_baseline_integer_instructions_only() {
    use CpuidFeature::*;
    let allowed: BTreeSet<CpuidFeature> =
        [INTEL8086, INTEL186, INTEL286, INTEL386, INTEL486, X64, CPUID, MSR, TSC, CMOV, PAUSE, MULTIBYTENOP].into();
    for (name, image) in images() {
        let mut used = BTreeSet::new();
        let sections = code_sections(image);
        assert!(sections.iter().any(|(section, _)| section == ".text"), "{name}: sections {sections:?}");
        for (section, code) in sections {
            let bitness = match section.as_str() {
                ".boot16" => 16,
                // The header, which is data, comes first.
                ".boot32" => 32,
                _ => 64,
            };
            let code = if section == ".boot32" { &code[32..] } else { code };
            for instruction in &mut Decoder::with_ip(bitness, code, 0, DecoderOptions::NONE) {
                // Tables and markers behind code decode to anything, in .boot16 only.
                if instruction.is_invalid() && bitness == 16 {
                    continue;
                }
                assert!(!instruction.is_invalid(), "{name} {section}: invalid at {:#x}", instruction.ip());
                used.extend(instruction.cpuid_features().iter().copied());
            }
        }
        println!("{name}: {used:?}");
        let vmx = BTreeSet::from([VMX]);
        let excess: Vec<_> = used.difference(&allowed).filter(|feature| !vmx.contains(feature)).collect();
        assert!(excess.is_empty(), "{name} uses {excess:?}");
        assert_eq!(used.contains(&VMX), name.starts_with("l1") || name == "bench", "{name}");
    }
}

/// A loader that reads the ELF file and one that goes by the multiboot header must load the same.
#[test]
fn the_multiboot_header_describes_what_the_elf_segments_do() {
    const MAGIC: u64 = 0x1bad_b002;
    for (name, image) in images() {
        let header = (0..8192).step_by(4).find(|offset| number(image, *offset, 4) == MAGIC).expect("a header");
        let field = |index: usize| number(image, header + 4 * index, 4);
        assert_eq!((MAGIC + field(1) + field(2)) & 0xffff_ffff, 0, "{name}: checksum");
        let (header_gpa, load_gpa, load_end_gpa, bss_end_gpa) = (field(3), field(4), field(5), field(6));
        assert_eq!(field(7), number(image, 0x18, 8), "{name}: entry");
        let file_start = header - (header_gpa - load_gpa) as usize;

        let (table, count) = (number(image, 0x20, 8) as usize, number(image, 0x38, 2) as usize);
        let mut end = 0;
        for program in (0..count).map(|index| &image[table + index * 56..]).filter(|program| number(program, 0, 4) == 1)
        {
            let (offset, gpa) = (number(program, 8, 8), number(program, 0x18, 8));
            let (in_file, in_memory) = (number(program, 0x20, 8), number(program, 0x28, 8));
            assert_eq!(offset, file_start as u64 + gpa - load_gpa, "{name}: segment at {gpa:#x}");
            assert!(gpa >= load_gpa && gpa + in_file <= load_end_gpa, "{name}: segment at {gpa:#x}");
            end = end.max(gpa + in_memory);
        }
        assert_eq!(end, bss_end_gpa, "{name}: end");
        assert!(bss_end_gpa < 16 << 20, "{name} must end below L2's memory");
    }
}
