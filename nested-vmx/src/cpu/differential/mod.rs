//! The emulated processor against the host's: each form of each instruction, with random operands, on both.
//!
//! `cargo test -p nested-vmx --lib differential -- --nocapture` prints how many forms were compared. Another family of
//! instructions joins by a test that filters [`forms::all`] and calls [`Harness::compare`].

mod case;
mod forms;
mod host;
mod random;
mod table;

use case::{Harness, Verdict};
use iced_x86::{EncodingKind, FlowControl, Instruction, Mnemonic, OpKind};
use random::Rng;
use std::collections::BTreeMap;

/// What an instruction reads and writes.
#[derive(Clone, PartialEq, Eq)]
pub struct State {
    pub regs: [u64; 16],
    pub flags: u64,
    pub memory: Box<[u8; host::SCRATCH_LEN]>,
    /// FXSAVE image.
    pub fx: [u8; 512],
    /// A branch to [`host::PAD`] was taken.
    pub taken: bool,
}

/// Why an unprivileged integer instruction is not compared with the host's.
fn left_out(i: &Instruction) -> Option<&'static str> {
    use Mnemonic::*;
    let far = |n| matches!(i.op_kind(n), OpKind::FarBranch16 | OpKind::FarBranch32);
    Some(match i.mnemonic() {
        _ if i.is_privileged() => "privileged",
        _ if matches!(i.flow_control(), FlowControl::Interrupt) => "enters the kernel",
        Syscall | Sysenter | Sysexit | Sysret | Vmcall | Vmfunc => "enters the kernel",
        Jmp | Call if i.is_jmp_far_indirect() || i.is_call_far_indirect() || far(0) => "loads a segment",
        Retf | Iret | Iretd | Iretq | Lds | Les | Lfs | Lgs | Lss => "loads a segment",
        In | Out | Insb | Insw | Insd | Outsb | Outsw | Outsd => "ports",
        Pushf | Pushfd | Pushfq | Popf | Popfd | Popfq => "flags of the host's kernel",
        Lar | Lsl | Verr | Verw | Sldt | Str | Smsw | Sgdt | Sidt => "the host's descriptor tables",
        Rdfsbase | Rdgsbase | Wrfsbase | Wrgsbase => "the host's segments",
        Cpuid | Rdtsc | Rdtscp | Rdpmc | Rdrand | Rdseed | Rdpid | Xgetbv => "differs by nature",
        Into => "enters the kernel",
        _ => return None,
    })
}

/// Branches to 16-bit addresses, where the host has no code.
fn branches_to_16_bits(i: &Instruction) -> bool {
    let name = format!("{:?}", i.code());
    ["rel8_16", "rel16", "Jmp_rm16", "Call_rm16", "Retnw"].iter().any(|part| name.contains(part))
}

/// Compares all integer forms; says how many there were.
fn compare_integers(bits: u32) -> u64 {
    let mut harness = Harness::new(bits);
    let mut r = Rng::new(2);
    let (mut tested, mut total) = (0, 0);
    let mut skipped: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    let mut undefined_differs: BTreeMap<Mnemonic, u64> = BTreeMap::new();
    let mut wrong = Vec::new();
    for (form, templates) in forms::all(bits) {
        let Some(example) = harness.example(form, &templates) else { continue };
        if !forms::is_integer(&example) || !harness.guest_has(form.code) {
            continue;
        }
        total += 1;
        let branch = branches_to_16_bits(&example).then_some("branch to 16 bits");
        let reason = left_out(&example).or(branch).or((!harness.host_has(form.code)).then_some("not on this host"));
        if let Some(reason) = reason {
            skipped.entry(reason).or_default().push(format!("{:?}", form.code));
            continue;
        }
        match harness.compare(form, &templates, &mut r) {
            Verdict::Agrees { undefined_flags_differ } => {
                tested += 1;
                if undefined_flags_differ != 0 {
                    *undefined_differs.entry(example.mnemonic()).or_default() |= undefined_flags_differ;
                }
            }
            Verdict::Differs(text) => wrong.push(text),
            Verdict::NotEncodable => skipped.entry("no encoding found").or_default().push(format!("{form:?}")),
        }
    }
    for (reason, mut codes) in skipped {
        codes.dedup();
        println!("not compared ({reason}): {}", codes.join(" "));
    }
    println!("undefined flags that differ: {undefined_differs:x?}");
    println!("{bits}-bit code: forms tested {tested} of {total}");
    assert!(wrong.is_empty(), "{} forms differ:\n{}", wrong.len(), wrong.join("\n"));
    tested
}

/// Compares all forms of x87, MMX and SSE; says how many there were.
fn compare_floats(bits: u32) -> u64 {
    let mut harness = Harness::new(bits);
    let mut r = Rng::new(5);
    let (mut tested, mut total) = (0, 0);
    let (mut skipped, mut wrong) = (Vec::new(), Vec::new());
    for (form, templates) in forms::all(bits) {
        let Some(example) = harness.example(form, &templates) else { continue };
        let legacy = form.code.encoding() == EncodingKind::Legacy;
        if !legacy || forms::is_integer(&example) || !forms::is_vector(form.code) || !harness.guest_has(form.code) {
            continue;
        }
        total += 1;
        use Mnemonic::*;
        let by_nature = matches!(
            example.mnemonic(),
            // They need CR4.OSXSAVE in the guest, and show AVX's state on the host.
            Xsave | Xsave64 | Xsaveopt | Xsaveopt64 | Xsavec | Xsavec64 | Xrstor | Xrstor64 | Xgetbv | Xsetbv
        );
        if by_nature || !harness.host_has(form.code) {
            skipped.push(format!("{:?}", form.code));
            continue;
        }
        match harness.compare_floats(form, &templates, &mut r) {
            Verdict::Agrees { .. } => tested += 1,
            Verdict::Differs(text) => wrong.push(text),
            Verdict::NotEncodable => skipped.push(format!("{form:?}")),
        }
    }
    println!("not compared: {}", skipped.join(" "));
    println!("{bits}-bit code: floating-point and vector forms tested {tested} of {total}");
    assert!(wrong.is_empty(), "{} forms differ:\n{}", wrong.len(), wrong.join("\n"));
    tested
}

#[test]
fn every_vector_form_of_64_bit_code_agrees_with_the_host() {
    assert!(compare_floats(64) >= 879);
}

#[test]
fn every_vector_form_of_32_bit_code_agrees_with_the_host() {
    assert!(compare_floats(32) >= 831);
}

/// What was reached; may only rise.
#[test]
fn every_integer_form_of_64_bit_code_agrees_with_the_host() {
    assert!(compare_integers(64) >= 1355);
}

#[test]
fn every_integer_form_of_32_bit_code_agrees_with_the_host() {
    assert!(compare_integers(32) >= 1040);
}
