//! The nine steps as far as KVM shows them: no event tells of a nested VM entry or exit, so the guests' own console
//! lines and the mp_state that was read stand for them.
//!
//! Pure, like [`super::chain`]: what was recorded goes in, the story and what it lacks comes out.

use nestd_proto::{Label, v1};

use super::chain::{Missing, STEPS};
use crate::output::table;

/// What L1 says before it resumes a processor in wait-for-SIPI.
pub const WAITS: &str = "resuming in wait-for-SIPI";

/// How a step is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Seen {
    /// A guest wrote this line.
    Console(String),
    /// The vCPU was read in mp_state INIT_RECEIVED in VMX non-root operation.
    MpState,
    /// The guest's exit code says so.
    ExitCode,
    /// KVM shows it to nobody. The steps after it cannot come without it.
    NotObservable,
}

/// What was seen, by step from step 1, up to the first one that is missing.
#[derive(Debug, Default)]
pub struct Account {
    pub steps: Vec<Seen>,
    /// L1's number of the processor that INIT and SIPI go to.
    pub target: Option<u32>,
    pub missing: Option<Missing>,
}

/// Who does each step, and what.
const STORY: [(&str, &str); STEPS] = [
    ("L2", "writes ICR: INIT"),
    ("L0", "the INIT is pending at its target"),
    ("L0", "VM exit 3 (INIT signal) to L1"),
    ("L1", "writes activity state wait-for-sipi and executes VMRESUME"),
    ("L0", "enters non-root operation in wait-for-SIPI"),
    ("L2", "writes ICR: SIPI"),
    ("L0", "VM exit 4 (SIPI) to L1, qualification = vector"),
    ("L1", "starts it at vector << 12 and executes VMRESUME"),
    ("L2", "the second processor runs at vector << 12; the first one saw its mark"),
];

impl Account {
    /// `guest_success`: L2's first processor saw what its second one wrote, and said so by its exit.
    pub fn of(console: &str, events: &[v1::Event], guest_success: bool) -> Self {
        let mut account = Self::default();
        account.missing = account.follow(console, events, guest_success).err();
        account
    }

    fn follow(&mut self, console: &str, events: &[v1::Event], guest_success: bool) -> Result<(), Missing> {
        let mut lines = console.lines();
        // A line is only looked for behind the one of the step before.
        let announced =
            lines.find_map(|l| l.strip_prefix("L2: sending INIT, SIPI, SIPI to APIC ID ").map(|id| (l, id)));
        let (line, id) = announced.ok_or_else(|| Missing::new(1, "L2 never said that it sends INIT"))?;
        self.target = id.parse().ok();
        self.steps.extend([Seen::Console(line.into()), Seen::NotObservable]);

        let on_target = format!("L1: cpu {id}: ");
        let mut said = |what: &str| {
            let line = lines.by_ref().find(|l| l.starts_with(&on_target) && l.contains(what));
            line.map(|l| (Seen::Console(l.into()), l.strip_prefix(&on_target).unwrap_or(l)))
        };
        let exit = said("exit 3 (INIT signal)");
        let (seen, text) = exit.ok_or_else(|| Missing::new(3, format!("L1 reported no exit 3 on processor {id}")))?;
        self.steps.push(seen.clone());
        if !text.ends_with(WAITS) {
            return Err(Missing::new(4, format!("L1 on processor {id} says \"{text}\", not \"{WAITS}\"")));
        }
        self.steps.push(seen);
        let waiting = |e: &v1::Event| {
            e.vcpu == self.target && e.level() == v1::Level::L2 && e.mp_state() == v1::MpState::InitReceived
        };
        // Only a read in the few milliseconds that it lasts shows it.
        self.steps.push(if events.iter().any(waiting) { Seen::MpState } else { Seen::NotObservable });

        let exit = said("exit 4 (SIPI), vector ");
        let (seen, text) = exit.ok_or_else(|| Missing::new(7, format!("L1 reported no exit 4 on processor {id}")))?;
        self.steps.extend([Seen::NotObservable, seen.clone()]);
        if !starts_at_its_vector(text) {
            return Err(Missing::new(8, format!("L1 on processor {id} says \"{text}\", and does not start it")));
        }
        self.steps.push(seen);
        // L2's second processor, and then its first one, which read the mark.
        let marked = lines.any(|l| l.contains('*')) && guest_success;
        if !marked {
            let what = "L2's first processor did not see the second one's mark: the second one did not run its code";
            return Err(Missing::new(9, what));
        }
        self.steps.push(Seen::ExitCode);
        Ok(())
    }

    pub fn hidden(&self) -> usize {
        self.steps.iter().filter(|s| **s == Seen::NotObservable).count()
    }

    pub fn render(&self, mode: &str) -> String {
        let rows = self.steps.iter().zip(STORY).zip(1..).map(|((seen, (level, what)), step)| {
            // Steps 1 and 6 are done by L2's first processor.
            let vcpu = if matches!(step, 1 | 6) { Some(0) } else { self.target };
            let how = match seen {
                Seen::Console(line) => format!("console: {line}"),
                Seen::MpState => format!("mp_state read as {}", v1::MpState::InitReceived.label()),
                Seen::ExitCode => "console: *, and the guest's exit code".into(),
                Seen::NotObservable if step == 5 => "not observable on KVM, unless read while it lasts".into(),
                Seen::NotObservable => "not observable on KVM".into(),
            };
            [step.to_string(), vcpu.map_or_else(|| "-".into(), |n| n.to_string()), level.into(), what.into(), how]
        });
        let how = match mode {
            "x2apic" => "the x2APIC MSR",
            _ => "the xAPIC page",
        };
        let header = ["STEP", "VCPU", "LEVEL", "WHAT", "SEEN BY"];
        format!("L2 starts its second processor through {how} (kvm engine)\n\n{}\n", table(header, rows))
    }
}

/// `exit 4 (SIPI), vector 0x10, starting at 0x10000`: the address is the vector's page.
fn starts_at_its_vector(text: &str) -> bool {
    let number = |after: &str| {
        let rest = text.split_once(after)?.1;
        let digits = rest.split(|c: char| !c.is_ascii_hexdigit()).next()?;
        u64::from_str_radix(digits, 16).ok()
    };
    let vector = number("vector 0x").filter(|v| *v <= 0xff);
    vector.is_some_and(|v| number("starting at 0x") == Some(v << 12))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As L1 and L2 write it under kvm_intel.
    const GOOD: &str = "\
L1: both processors in VMX operation, local APIC in xAPIC mode
L2: first processor runs: APIC ID 0, xAPIC mode
L2: sending INIT, SIPI, SIPI to APIC ID 1
L1: cpu 1: exit 3 (INIT signal), resuming in wait-for-SIPI
L1: cpu 1: exit 4 (SIPI), vector 0x10, starting at 0x10000
*
L2: second processor is up
";

    fn missing(change: impl Fn(&str) -> String) -> (usize, String) {
        let missing = Account::of(&change(GOOD), &[], true).missing.expect("a step is missing");
        (missing.step, missing.what)
    }

    fn without(line: &str) -> String {
        GOOD.lines().filter(|l| !l.contains(line)).map(|l| format!("{l}\n")).collect()
    }

    #[test]
    fn a_good_run_is_told_to_its_end_and_says_what_kvm_hides() {
        let account = Account::of(GOOD, &[], true);
        assert_eq!((account.missing.as_ref(), account.steps.len(), account.hidden()), (None, STEPS, 3));
        let text = account.render("xapic");
        assert_eq!(text.matches("not observable on KVM").count(), 3, "{text}");
        assert!(text.contains("xAPIC page") && text.contains("exit 4 (SIPI), vector 0x10"), "{text}");
    }

    #[test]
    fn wait_for_sipi_counts_as_seen_only_in_l2_and_on_the_target() {
        let read = |vcpu, level: v1::Level| v1::Event {
            vcpu: Some(vcpu),
            level: level as i32,
            mp_state: v1::MpState::InitReceived as i32,
            ..Default::default()
        };
        let fifth = |event| Account::of(GOOD, &[event], true).steps[4].clone();
        assert_eq!(fifth(read(1, v1::Level::L2)), Seen::MpState);
        // L1's own start of its second processor.
        assert_eq!(fifth(read(1, v1::Level::L0)), Seen::NotObservable);
        assert_eq!(fifth(read(0, v1::Level::L2)), Seen::NotObservable);
    }

    #[test]
    fn each_line_that_is_gone_is_missed_by_its_step() {
        for (line, step) in [("sending INIT", 1), ("exit 3", 3), ("exit 4", 7), ("*", 9)] {
            assert_eq!(missing(|_| without(line)).0, step, "without {line}");
        }
        assert_eq!(Account::of(GOOD, &[], false).missing.map(|m| m.step), Some(9));
    }

    #[test]
    fn the_mutants_miss_the_steps_that_they_miss_on_the_emulated_processor() {
        assert_eq!(missing(|t| t.replace(WAITS, "mutant: resuming active")).0, 4);
        assert_eq!(missing(|t| t.replace("starting at 0x10000", "mutant: resuming as it was")).0, 8);
    }

    #[test]
    fn another_processor_another_order_or_another_address_is_not_the_story() {
        assert_eq!(missing(|t| t.replace("APIC ID 1\n", "APIC ID 2\n")).0, 3);
        let (exit_3, exit_4) = ("L1: cpu 1: exit 3 (INIT signal), resuming in wait-for-SIPI\n", "exit 4");
        let late = |t: &str| t.replace(exit_3, "").replace("*\n", &format!("*\n{exit_3}"));
        assert!(late(GOOD).contains(exit_4));
        assert_eq!(missing(late).0, 7);
        assert_eq!(missing(|t| t.replace("at 0x10000", "at 0x11000")).0, 8);
    }
}
