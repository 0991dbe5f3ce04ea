//! The story as a table.

use nestd_proto::{
    Label,
    v1::{self, event::Detail},
};

use super::chain::{STEPS, Story};
use crate::output::{describe, guest_time, table};

/// One line: a step, or something that happened beside the steps.
struct Line<'a> {
    step: Option<usize>,
    event: &'a v1::Event,
}

pub fn render(story: &Story, mode: &str, vm: &v1::Vm) -> String {
    let steps = story.steps.iter().zip(1..).filter_map(|(e, step)| Some(Line { step: Some(step), event: (*e)? }));
    let beside = story.beside.iter().map(|event| Line { step: None, event });
    let mut lines: Vec<Line> = steps.chain(beside).collect();
    // In the order in which it happened; steps told by one event keep theirs.
    lines.sort_by_key(|line| (line.event.sequence, line.step));
    // The log's zero is the VM's start, long before; the story begins with the INIT.
    let begin = story.steps[0].map_or(0, |e| e.time_ns);
    let rows = lines.iter().map(|line| {
        let e = line.event;
        [
            line.step.map_or_else(String::new, |step| step.to_string()),
            format!("+{}", guest_time(e.time_ns.saturating_sub(begin))),
            e.vcpu.map_or_else(|| "-".into(), |n| n.to_string()),
            actor(line).into(),
            what(line),
            e.mp_state().label().into(),
            e.activity_state().label().into(),
            if e.cause_id == 0 { String::new() } else { format!("<- {}", e.cause_id) },
        ]
    });
    let header = ["STEP", "GUEST TIME", "VCPU", "LEVEL", "WHAT", "MP_STATE", "ACTIVITY", "CAUSE"];
    let how = match mode {
        "x2apic" => "the x2APIC MSR",
        _ => "the xAPIC page",
    };
    let engine = vm.engine().label().to_lowercase();
    format!("L2 starts its second processor through {how} ({engine} engine)\n\n{}\n", table(header, rows))
}

/// Who does the step (semantics: one VM entry is L1's VMRESUME, and L0's entering of the state).
fn actor(line: &Line) -> &'static str {
    match line.step {
        Some(1 | 6 | 9) => "L2",
        Some(2 | 3 | 5 | 7) => "L0",
        Some(4 | 8) => "L1",
        _ => line.event.level().label(),
    }
}

fn what(line: &Line) -> String {
    let activity = |a: v1::ActivityState| a.label().to_lowercase().replace('_', "-");
    match (line.step, &line.event.detail) {
        (Some(2), Some(Detail::Init(_))) => "the INIT is pending at its target, where nothing blocks it".into(),
        (Some(3), Some(Detail::VmExit(_))) => "VM exit 3 (INIT signal) to L1; the INIT is consumed".into(),
        (Some(4), Some(Detail::VmEntry(e))) => {
            format!("writes activity state {} and executes VMRESUME", activity(e.activity_state()))
        }
        (Some(5), _) => "enters non-root operation in wait-for-SIPI".into(),
        (Some(7), Some(Detail::VmExit(e))) => {
            format!("VM exit 4 (SIPI) to L1, qualification {:#04x}", e.qualification)
        }
        (Some(8), Some(Detail::VmEntry(e))) => {
            format!(
                "starts it: activity state {}, RIP {:#x}, and executes VMRESUME",
                activity(e.activity_state()),
                e.rip
            )
        }
        (Some(STEPS), _) => "the second processor runs at vector << 12; the first one saw its mark".into(),
        _ => describe(line.event),
    }
}
