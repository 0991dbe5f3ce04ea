//! `docs/instructions.md`: what is implemented, from the decoder's and the processor's own tables.

use super::forms::{self, has_feature, has_features};
use crate::cpu::Cpu;
use crate::cpu::mode::Mode;
use crate::testing::Rig;
use iced_x86::{Code, Mnemonic};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

const PATH: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/instructions.md");
const REGENERATE: &str = "NESTD_REGENERATE";

/// Forms of a mnemonic: (implemented, all).
type Counts = BTreeMap<String, (u64, u64)>;

/// Counts of what the model has, and the CPUID features with instructions that it does not have.
fn implemented(rig: &mut Rig) -> (Counts, BTreeSet<String>) {
    let mut codes: BTreeMap<Code, bool> = BTreeMap::new();
    for bits in [16, 32, 64] {
        rig.cpu.mode = Mode { code_bits: bits, protected: true, long: bits == 64, ..Mode::default() };
        for (form, templates) in forms::all(bits.into()) {
            let works = templates[0].example_bytes(bits.into()).is_some_and(|b| works(&rig.cpu, &b));
            *codes.entry(form.code).or_default() |= works;
        }
    }
    let mut counts = Counts::new();
    let mut not_advertised = BTreeSet::new();
    for (code, works) in codes {
        let name = format!("{:?}", code.mnemonic()).to_uppercase();
        if code.mnemonic() == Mnemonic::INVALID {
            continue;
        }
        if !has_features(code, |leaf, subleaf| rig.cpu.cpuid(leaf, subleaf)) && !works {
            let missing = code.cpuid_features().iter().filter(|f| !has_feature(**f, |a, b| rig.cpu.cpuid(a, b)));
            not_advertised.extend(missing.map(|f| format!("{f:?}")));
            continue;
        }
        // These raise #UD by definition.
        let works = works || matches!(code.mnemonic(), Mnemonic::Ud0 | Mnemonic::Ud1 | Mnemonic::Ud2);
        let count = counts.entry(name).or_default();
        count.0 += u64::from(works);
        count.1 += 1;
    }
    (counts, not_advertised)
}

fn works(cpu: &Cpu, bytes: &[u8]) -> bool {
    cpu.decode_for_test(bytes).first().is_some_and(|op| !op.is_undefined())
}

fn text(counts: &Counts, not_advertised: &BTreeSet<String>) -> String {
    let done: u64 = counts.values().map(|c| c.0).sum();
    let all: u64 = counts.values().map(|c| c.1).sum();
    let mut t = format!(
        "# Instructions of the CPU model nestd-v1\n\n\
         Generated: `{REGENERATE}=1 cargo test -p nested-vmx --lib instruction_table`. A form is an iced-x86 `Code`, in 16, \
         32 or 64-bit code. What is not implemented raises #UD.\n\n\
         Implemented: {done} of {all} forms.\n\n| mnemonic | forms | |\n|---|---|---|\n"
    );
    for (name, &(done, all)) in counts {
        let note = match done {
            0 => "#UD",
            n if n == all => "",
            _ => "partly",
        };
        let _ = writeln!(t, "| {name} | {done} of {all} | {note} |");
    }
    let names: Vec<&str> = not_advertised.iter().map(String::as_str).collect();
    let _ = write!(t, "\nNot in the model, so #UD, are the instructions that need one of: {}.\n", names.join(", "));
    t
}

/// The number behind "Implemented:".
fn recorded(text: &str) -> u64 {
    let number = text.split("Implemented: ").nth(1).and_then(|t| t.split(' ').next());
    number.and_then(|n| n.parse().ok()).unwrap_or(0)
}

#[test]
fn instruction_table_of_the_docs_is_current_and_never_shrinks() {
    let (counts, not_advertised) = implemented(&mut Rig::long());
    let now = text(&counts, &not_advertised);
    let old = std::fs::read_to_string(PATH).unwrap_or_default();
    assert!(recorded(&now) >= recorded(&old), "{} forms were implemented, now {}", recorded(&old), recorded(&now));
    if std::env::var_os(REGENERATE).is_some() {
        std::fs::create_dir_all(std::path::Path::new(PATH).parent().unwrap()).unwrap();
        std::fs::write(PATH, &now).unwrap();
    } else {
        assert!(
            now == old,
            "docs/instructions.md is stale: {REGENERATE}=1 cargo test -p nested-vmx --lib instruction_table"
        );
    }
}
