//! `docs/rules.md` names tests: it cannot go stale.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");
const CRATES: [&str; 4] = ["nested-vmx", "vcpu", "daemon", "cli"];
const RULES: std::ops::RangeInclusive<u8> = 1..=23;

/// The names of all functions in the Rust files below a folder.
fn functions(folder: &Path, names: &mut BTreeSet<String>) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() && !path.ends_with("target") {
            functions(&path, names);
        } else if path.extension().is_some_and(|e| e == "rs") {
            let text = fs::read_to_string(&path).unwrap();
            let declared = text.lines().filter_map(|line| line.trim_start().strip_prefix("fn ")?.split_once('('));
            names.extend(declared.map(|(name, _)| name.to_owned()));
        }
    }
}

/// The rules in a test's name: `r05_r06_what` is of R5 and R6.
fn rules(name: &str) -> Vec<u8> {
    let digits = |part: &str| part.strip_prefix('r').filter(|d| d.len() == 2).and_then(|d| d.parse().ok());
    name.split('_').map_while(digits).collect()
}

#[test]
fn the_rules_document_names_existing_tests_and_no_rule_is_without_one() {
    let mut names = BTreeSet::new();
    for name in CRATES {
        functions(&Path::new(ROOT).join(name), &mut names);
    }
    let text = fs::read_to_string(Path::new(ROOT).join("docs/rules.md")).unwrap();
    let is_name =
        |s: &&str| s.contains('_') && s.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_');
    let named: Vec<&str> = text.split('`').skip(1).step_by(2).filter(is_name).collect();
    let missing: Vec<_> = named.iter().filter(|n| !names.contains(**n)).collect();
    assert!(missing.is_empty(), "docs/rules.md names tests that do not exist: {missing:#?}");
    for rule in RULES {
        assert!(names.iter().any(|n| rules(n).contains(&rule)), "no test is named r{rule:02}_");
        // From the rule's bold number to the next one's.
        let start = format!("**R{rule}.**");
        let part = text.split_once(&start).unwrap_or_else(|| panic!("docs/rules.md has no {start}")).1;
        let part = part.split("\n**R").next().unwrap_or(part);
        assert!(
            named.iter().any(|n| rules(n).contains(&rule) && part.contains(n)),
            "docs/rules.md: R{rule} names no test"
        );
    }
}
