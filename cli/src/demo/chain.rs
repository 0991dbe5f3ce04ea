//! The nine steps of the handshake, found in an event list by following cause ids.
//!
//! Pure: what was recorded goes in, the story and what it lacks comes out.

use nestd_proto::v1::{self, event::Detail};

pub const STEPS: usize = 9;

/// Basic exit reasons (SDM volume 3, appendix "VMX Basic Exit Reasons").
const EXIT_INIT: u32 = 3;
const EXIT_SIPI: u32 = 4;

/// The handshake as far as it was seen.
#[derive(Debug, Default)]
pub struct Story<'a> {
    /// By step, from step 1. Two steps may be told by one event: a VM entry is L1's doing and L0's.
    pub steps: [Option<&'a v1::Event>; STEPS],
    /// Where INIT and SIPI go.
    pub target: Option<u32>,
    /// What else L2's INIT and SIPI writes caused, for instance a second SIPI and its being dropped.
    pub beside: Vec<&'a v1::Event>,
    pub missing: Option<Missing>,
}

/// The first step that was not seen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Missing {
    pub step: usize,
    pub what: String,
    /// The rule by which an event was dropped, if that is why.
    pub rule: Option<String>,
}

impl Missing {
    pub fn new(step: usize, what: impl Into<String>) -> Self {
        Self { step, what: what.into(), rule: None }
    }
}

/// An ICR write of L2 that starts a step.
struct Write<'a> {
    event: &'a v1::Event,
    id: u64,
    vector: u32,
}

impl<'a> Story<'a> {
    /// `guest_success`: L2's first processor saw what its second one wrote, and said so by its exit.
    pub fn follow(events: &'a [v1::Event], guest_success: bool) -> Self {
        let mut story = Self::default();
        story.missing = story.find(events, guest_success).err();
        story.collect_beside(events);
        story
    }

    fn see(&mut self, step: usize, event: &'a v1::Event) {
        self.steps[step - 1] = Some(event);
    }

    fn find(&mut self, events: &'a [v1::Event], guest_success: bool) -> Result<(), Missing> {
        let init = writes(events, v1::DeliveryMode::Init)
            .next()
            .ok_or_else(|| Missing::new(1, "L2 never wrote ICR with delivery mode INIT"))?;
        self.see(1, init.event);

        let latched = events.iter().find(|e| caused_by(e, init.id) && is_init(e));
        let latched = latched.ok_or_else(|| Missing::new(2, "no vCPU received the INIT"))?;
        let (target, target_name) = on(latched);
        if let Some(rule) = dropped_by(latched) {
            let what = format!("{target_name} dropped the INIT ({rule})");
            return Err(Missing { rule: Some(rule), ..Missing::new(2, what) });
        }
        self.see(2, latched);
        self.target = target;

        // All that follows on the target, in order.
        let at_target: Vec<&v1::Event> = events.iter().filter(|e| e.vcpu == target).collect();
        let exit = find_after(&at_target, latched, |e| caused_by(e, init.id) && exit_reason(e) == Some(EXIT_INIT));
        let exit = exit
            .ok_or_else(|| Missing::new(3, format!("{target_name} had no VM exit 3 (INIT signal) from this INIT")))?;
        self.see(3, exit);

        let entry = self.next_entry(&at_target, exit, 4, &target_name)?;
        let state = entered(entry).unwrap_or_default();
        if state != v1::ActivityState::WaitForSipi {
            let what = format!("L1 resumed {target_name} in activity state {}, not wait-for-SIPI", name(state));
            return Err(Missing::new(4, what));
        }
        self.see(4, entry);

        let waiting = from(&at_target, entry).find(|e| e.mp_state() == v1::MpState::InitReceived);
        let waiting =
            waiting.ok_or_else(|| Missing::new(5, format!("mp_state of {target_name} never read INIT_RECEIVED")))?;
        // The change of mp_state tells it better than the entry, if there is one.
        let change = find_after(&at_target, entry, |e| e.kind() == v1::EventKind::MpState)
            .filter(|e| e.mp_state() == v1::MpState::InitReceived);
        self.see(5, change.unwrap_or(waiting));

        self.find_start(events, &at_target, entry, &target_name)?;
        if !guest_success {
            self.steps[8] = None;
            let what = "L2's first processor did not see the second one's mark: the second one did not run its code";
            return Err(Missing::new(9, what));
        }
        Ok(())
    }

    /// Steps 6 to 9: SIPI, exit 4, the second entry, and L2 on its way.
    fn find_start(
        &mut self,
        events: &'a [v1::Event],
        at_target: &[&'a v1::Event],
        waiting: &'a v1::Event,
        target_name: &str,
    ) -> Result<(), Missing> {
        // Several SIPIs are sent; the one of the story is the one that became the exit.
        let exit = find_after(at_target, waiting, |e| exit_reason(e) == Some(EXIT_SIPI));
        let sipis: Vec<Write> = writes(events, v1::DeliveryMode::Startup).collect();
        if sipis.is_empty() {
            return Err(Missing::new(6, "L2 never wrote ICR with a SIPI"));
        }
        let Some(exit) = exit else {
            self.steps[5] = Some(sipis[0].event);
            let mut rules =
                sipis.iter().filter_map(|s| events.iter().find(|e| caused_by(e, s.id)).and_then(dropped_by));
            let rule = rules.next_back();
            let why = rule.as_ref().map_or(String::new(), |rule| format!("; SIPI was dropped ({rule})"));
            let what = format!("{target_name} had no VM exit 4 (SIPI){why}");
            return Err(Missing { rule, ..Missing::new(7, what) });
        };
        let sipi = sipis.iter().find(|s| s.id == exit.cause_id && s.event.sequence < exit.sequence);
        let sipi = sipi.ok_or_else(|| Missing::new(6, "VM exit 4 was not caused by a SIPI of L2"))?;
        self.see(6, sipi.event);
        let qualification = match &exit.detail {
            Some(Detail::VmExit(e)) => e.qualification,
            _ => u64::MAX,
        };
        if qualification != u64::from(sipi.vector) {
            let what =
                format!("VM exit 4 has qualification {qualification:#x}, but the SIPI's vector is {:#x}", sipi.vector);
            return Err(Missing::new(7, what));
        }
        self.see(7, exit);

        let entry = self.next_entry(at_target, exit, 8, target_name)?;
        let state = entered(entry).unwrap_or_default();
        if state != v1::ActivityState::Active {
            let what = format!("L1 resumed {target_name} in activity state {}, not active", name(state));
            return Err(Missing::new(8, what));
        }
        if let Some(Detail::VmEntry(v1::VmEntry { rip: rip @ 1.., .. })) = entry.detail {
            return Err(Missing::new(8, format!("L1 resumed {target_name} at RIP {rip:#x}, not 0")));
        }
        self.see(8, entry);
        let runs = find_after(at_target, entry, |e| e.kind() == v1::EventKind::MpState);
        self.see(9, runs.filter(|e| e.mp_state() == v1::MpState::Runnable).unwrap_or(entry));
        Ok(())
    }

    /// The first VM entry on the target after `exit`: L1's answer to it.
    fn next_entry(
        &self,
        at_target: &[&'a v1::Event],
        exit: &v1::Event,
        step: usize,
        target_name: &str,
    ) -> Result<&'a v1::Event, Missing> {
        let answer =
            find_after(at_target, exit, |e| matches!(e.kind(), v1::EventKind::VmEntry | v1::EventKind::VmEntryFailed));
        match answer.map(|e| (e, &e.detail)) {
            Some((_, Some(Detail::VmEntryFailed(f)))) => Err(Missing::new(
                step,
                format!("L1's VM entry on {target_name} failed check {} ({})", f.check_id, f.check_name),
            )),
            Some((entry, _)) => Ok(entry),
            None => Err(Missing::new(step, format!("L1 never resumed {target_name} after the VM exit"))),
        }
    }

    fn collect_beside(&mut self, events: &'a [v1::Event]) {
        let ids: Vec<u64> = writes(events, v1::DeliveryMode::Init)
            .chain(writes(events, v1::DeliveryMode::Startup))
            .map(|w| w.id)
            .collect();
        let is_step = |e: &v1::Event| self.steps.iter().flatten().any(|s| s.sequence == e.sequence);
        let of_story = |e: &&v1::Event| {
            let writes_it = matches!(&e.detail, Some(Detail::IcrWrite(w)) if ids.contains(&w.id));
            (writes_it || ids.contains(&e.cause_id)) && !is_step(e)
        };
        self.beside = events.iter().filter(of_story).collect();
    }
}

/// ICR writes of this kind from L2.
fn writes(events: &[v1::Event], mode: v1::DeliveryMode) -> impl Iterator<Item = Write<'_>> {
    events.iter().filter(|e| e.level() == v1::Level::L2).filter_map(move |event| match &event.detail {
        Some(Detail::IcrWrite(w)) if w.delivery_mode() == mode => Some(Write { event, id: w.id, vector: w.vector }),
        _ => None,
    })
}

fn caused_by(event: &v1::Event, id: u64) -> bool {
    event.cause_id == id
}

fn is_init(event: &v1::Event) -> bool {
    matches!(event.detail, Some(Detail::Init(_)))
}

/// The rule by which an INIT or SIPI is gone.
fn dropped_by(event: &v1::Event) -> Option<String> {
    let (Some(Detail::Init(v1::InitEvent { fate })) | Some(Detail::Sipi(v1::SipiEvent { fate, .. }))) = &event.detail
    else {
        return None;
    };
    fate.as_ref().filter(|f| f.disposition() == v1::Disposition::Dropped).map(|f| f.rule.clone())
}

fn exit_reason(event: &v1::Event) -> Option<u32> {
    match &event.detail {
        Some(Detail::VmExit(e)) => Some(e.reason),
        _ => None,
    }
}

fn entered(event: &v1::Event) -> Option<v1::ActivityState> {
    match &event.detail {
        Some(Detail::VmEntry(e)) => Some(e.activity_state()),
        _ => None,
    }
}

fn name(state: v1::ActivityState) -> String {
    use nestd_proto::Label;
    state.label().to_lowercase().replace('_', "-")
}

fn on(event: &v1::Event) -> (Option<u32>, String) {
    (event.vcpu, event.vcpu.map_or_else(|| "the VM".into(), |n| format!("vCPU {n}")))
}

/// `events` from `start` on.
fn from<'a, 'b>(events: &'b [&'a v1::Event], start: &v1::Event) -> impl Iterator<Item = &'a v1::Event> + 'b {
    let sequence = start.sequence;
    events.iter().copied().filter(move |e| e.sequence >= sequence)
}

fn find_after<'a>(
    events: &[&'a v1::Event],
    start: &v1::Event,
    is: impl Fn(&v1::Event) -> bool,
) -> Option<&'a v1::Event> {
    from(events, start).find(|e| e.sequence > start.sequence && is(e))
}

#[cfg(test)]
mod tests {
    use super::*;
    use v1::{ActivityState, DeliveryMode, EventKind, Level, MpState};

    /// The events of a good run, as the daemon tells them.
    fn recorded() -> Vec<v1::Event> {
        let icr = |id, mode: DeliveryMode, vector| {
            let write = v1::IcrWrite { id, delivery_mode: mode as i32, vector, destination: "physical 1".into() };
            event(0, Level::L2, EventKind::IcrWrite, 0, ActivityState::Active, Detail::IcrWrite(write))
        };
        let active = ActivityState::Active;
        let waiting = ActivityState::WaitForSipi;
        let latched = v1::Fate { disposition: v1::Disposition::Latched as i32, ..Default::default() };
        let dropped =
            v1::Fate { disposition: v1::Disposition::Dropped as i32, rule: "R5".into(), ..Default::default() };
        let mut events = vec![
            // L1 starts its own second processor: not part of the story.
            v1::Event { level: Level::L1 as i32, ..icr(1, DeliveryMode::Init, 0) },
            icr(7, DeliveryMode::Init, 0),
            event(
                1,
                Level::L0,
                EventKind::InitLatched,
                7,
                ActivityState::Hlt,
                Detail::Init(v1::InitEvent { fate: Some(latched) }),
            ),
            exit(EXIT_INIT, 0, 7),
            entry(waiting, 0xfff0),
            change(waiting),
            icr(8, DeliveryMode::Startup, 0x10),
            exit(EXIT_SIPI, 0x10, 8),
            entry(active, 0),
            change(active),
            icr(9, DeliveryMode::Startup, 0x10),
            event(
                1,
                Level::L0,
                EventKind::SipiDropped,
                9,
                active,
                Detail::Sipi(v1::SipiEvent { vector: 0x10, fate: Some(dropped) }),
            ),
        ];
        for (event, sequence) in events.iter_mut().zip(1..) {
            event.sequence = sequence;
        }
        events
    }

    fn event(
        vcpu: u32,
        level: Level,
        kind: EventKind,
        cause_id: u64,
        activity: ActivityState,
        detail: Detail,
    ) -> v1::Event {
        let mp_state = match activity {
            ActivityState::WaitForSipi => MpState::InitReceived,
            ActivityState::Hlt => MpState::Halted,
            _ => MpState::Runnable,
        };
        v1::Event {
            vcpu: Some(vcpu),
            level: level as i32,
            kind: kind as i32,
            cause_id,
            mp_state: mp_state as i32,
            activity_state: activity as i32,
            detail: Some(detail),
            ..Default::default()
        }
    }

    fn exit(reason: u32, qualification: u64, cause: u64) -> v1::Event {
        let exit = v1::VmExit { reason, qualification, ..Default::default() };
        event(1, Level::L0, EventKind::VmExit, cause, ActivityState::Active, Detail::VmExit(exit))
    }

    fn entry(state: ActivityState, rip: u64) -> v1::Event {
        let entry = v1::VmEntry { activity_state: state as i32, rip, ..Default::default() };
        event(1, Level::L1, EventKind::VmEntry, 0, state, Detail::VmEntry(entry))
    }

    fn change(to: ActivityState) -> v1::Event {
        let change = v1::StateChange { to_activity_state: to as i32, ..Default::default() };
        event(1, Level::L2, EventKind::MpState, 0, to, Detail::StateChange(change))
    }

    /// The step that is missing when `change` was done to a good run.
    fn missing(change: impl Fn(&mut Vec<v1::Event>)) -> (usize, String) {
        let mut events = recorded();
        change(&mut events);
        let missing = Story::follow(&events, true).missing.expect("a step is missing");
        (missing.step, missing.what)
    }

    #[test]
    fn the_whole_chain_is_found_and_the_second_sipi_stands_beside_it() {
        let events = recorded();
        let story = Story::follow(&events, true);
        assert_eq!(story.missing, None);
        let sequences: Vec<_> = story.steps.iter().map(|s| s.unwrap().sequence).collect();
        assert_eq!(sequences, [2, 3, 4, 5, 6, 7, 8, 9, 10]);
        assert_eq!(story.beside.iter().map(|e| e.sequence).collect::<Vec<_>>(), [11, 12]);
        assert_eq!(story.target, Some(1));
    }

    #[test]
    fn each_event_that_is_gone_is_missed_by_its_step() {
        // Index in the recorded list, and the step that then has nothing. Without their own event, steps 5 and 9
        // are told by the VM entry.
        for (index, step) in [(1, 1), (2, 2), (3, 3), (7, 7)] {
            assert_eq!(missing(|e| drop(e.remove(index))).0, step, "without event {index}");
        }
        for index in [5, 9] {
            let mut events = recorded();
            events.remove(index);
            assert_eq!(Story::follow(&events, true).missing, None, "without event {index}");
        }
        assert_eq!(missing(|e| e.retain(|e| entered(e).is_none())).0, 4);
        assert_eq!(missing(|e| e.truncate(6)).0, 6);
        assert_eq!(missing(|e| e.truncate(8)).0, 8);
    }

    #[test]
    fn a_wrong_cause_breaks_the_chain() {
        assert_eq!(missing(|e| e[3].cause_id = 1).0, 3);
        assert_eq!(missing(|e| e[7].cause_id = 1).0, 6);
    }

    #[test]
    fn an_l1_that_stays_active_misses_step_4() {
        let (step, what) = missing(|e| e[4] = v1::Event { sequence: 5, ..entry(ActivityState::Active, 0x6000) });
        assert_eq!((step, what.as_str()), (4, "L1 resumed vCPU 1 in activity state active, not wait-for-SIPI"));
    }

    #[test]
    fn an_l1_that_ignores_exit_4_misses_step_8() {
        let (step, what) = missing(|e| e[8] = v1::Event { sequence: 9, ..entry(ActivityState::WaitForSipi, 0) });
        assert_eq!((step, what.as_str()), (8, "L1 resumed vCPU 1 in activity state wait-for-sipi, not active"));
    }

    #[test]
    fn a_dropped_sipi_is_named_with_its_rule() {
        let mut events = recorded();
        events[7] = v1::Event { sequence: 8, cause_id: 8, ..events[11].clone() };
        events.truncate(8);
        let missing = Story::follow(&events, true).missing.unwrap();
        assert_eq!((missing.step, missing.rule.as_deref()), (7, Some("R5")));
    }

    #[test]
    fn a_failed_entry_is_named_with_its_check() {
        let failed = v1::VmEntryFailed { check_id: 601, check_name: "activity state".into(), ..Default::default() };
        let failed =
            event(1, Level::L0, EventKind::VmEntryFailed, 0, ActivityState::Active, Detail::VmEntryFailed(failed));
        let (step, what) = missing(|e| e[4] = v1::Event { sequence: 5, ..failed.clone() });
        assert_eq!(step, 4);
        assert!(what.contains("check 601 (activity state)"), "{what}");
    }

    #[test]
    fn a_vector_that_changed_on_its_way_misses_step_7() {
        let (step, what) = missing(|e| e[7] = v1::Event { sequence: 8, ..exit(EXIT_SIPI, 0x11, 8) });
        assert_eq!(step, 7);
        assert!(what.contains("0x11"), "{what}");
    }

    #[test]
    fn without_the_guests_own_proof_step_9_is_missing() {
        let events = recorded();
        assert_eq!(Story::follow(&events, false).missing.map(|m| m.step), Some(9));
    }
}
