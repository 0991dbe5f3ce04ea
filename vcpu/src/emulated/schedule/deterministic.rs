//! The virtual clock with one token: one vCPU runs at a time, for quanta drawn from a seed. Everything that
//! decides who runs for how long is guest time and the seed, so one seed gives one run.
//!
//! A vCPU that stops early for its thread's business (a read, a pause) keeps the token and the rest of its
//! quantum: observers do not change the run. What comes from outside is taken when nobody runs.

use std::sync::Mutex;

use super::{NEVER, Schedule, TIGHT_SPAN, TIGHT_WINDOW, Turn, WINDOW, Wakes};
use crate::thread::lock;

/// Quanta are 1 to this many instructions, or to a quarter of it after an INIT or SIPI.
const MAX_QUANTUM: u64 = 16_384;
const MAX_TIGHT_QUANTUM: u64 = 1_024;

type Action = Box<dyn FnOnce() + Send>;

pub struct Deterministic {
    wakes: Wakes,
    state: Mutex<State>,
}

struct State {
    slots: Vec<Slot>,
    /// Who has the token, and for how many instructions more.
    holder: Option<(usize, u64)>,
    /// The holder runs guest code, or an action from outside is being done.
    busy: bool,
    actions: Vec<Action>,
    seed: u64,
    tight_until: u64,
}

#[derive(Clone, Copy, Debug, Default)]
struct Slot {
    now: u64,
    idle: bool,
    /// When an idle one has to run again.
    deadline: Option<u64>,
    /// Something was left since it last began to run.
    poked: bool,
}

impl State {
    /// SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators").
    fn draw(&mut self, below: u64) -> u64 {
        self.seed = self.seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.seed;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % below.max(1)
    }

    fn unidle(&mut self, i: usize, at: u64) {
        let slot = &mut self.slots[i];
        slot.now = slot.now.max(at);
        slot.idle = false;
        slot.deadline = None;
    }

    fn now(&self) -> u64 {
        self.slots.iter().map(|s| s.now).max().unwrap_or(0)
    }

    fn next_deadline(&self) -> Option<(u64, usize)> {
        self.slots.iter().enumerate().filter_map(|(i, s)| Some((s.deadline?, i))).min()
    }

    /// Gives the token to someone; to nobody when all are idle without a deadline.
    fn pass(&mut self) {
        self.holder = None;
        let slowest = |s: &Self| s.slots.iter().filter(|s| !s.idle).map(|s| s.now).min();
        // Deadlines that the slowest has reached, or the first one when all are idle.
        while let Some((deadline, i)) = self.next_deadline()
            && slowest(self).is_none_or(|now| deadline <= now)
        {
            self.unidle(i, deadline);
        }
        let Some(now) = slowest(self) else { return };
        let tight = now < self.tight_until;
        let (window, quantum) = if tight { (TIGHT_WINDOW, MAX_TIGHT_QUANTUM) } else { (WINDOW, MAX_QUANTUM) };
        let may = |s: &Slot| !s.idle && s.now <= now + window;
        let candidates = self.slots.iter().filter(|s| may(s)).count() as u64;
        let nth = self.draw(candidates) as usize;
        let quantum = 1 + self.draw(quantum);
        let Some(i) = (0..self.slots.len()).filter(|&i| may(&self.slots[i])).nth(nth) else { return };
        let room = match self.next_deadline() {
            Some((deadline, _)) => deadline.saturating_sub(self.slots[i].now).max(1),
            None => NEVER,
        };
        self.holder = Some((i, quantum.min(room)));
    }

    fn pass_if_free(&mut self) {
        if !self.busy && self.holder.is_none_or(|(_, left)| left == 0) {
            self.pass();
        }
    }

    /// The holder stands at a boundary.
    fn stand(&mut self, i: usize, now: u64, ran: u64) {
        let slot = &mut self.slots[i];
        slot.now = slot.now.max(now);
        if let Some((holder, left)) = &mut self.holder
            && *holder == i
            && self.busy
        {
            *left = left.saturating_sub(ran);
            self.busy = false;
        }
    }
}

impl Deterministic {
    pub fn new(wakes: Wakes, seed: u64) -> Self {
        let state = State {
            slots: wakes.iter().map(|_| Slot::default()).collect(),
            holder: None,
            busy: false,
            actions: Vec::new(),
            seed,
            tight_until: 0,
        };
        Self { wakes, state: Mutex::new(state) }
    }

    /// With nobody running: does what came from outside.
    fn act(&self) {
        loop {
            let actions = {
                let mut state = lock(&self.state);
                if state.busy || state.actions.is_empty() {
                    return;
                }
                state.busy = true;
                std::mem::take(&mut state.actions)
            };
            for action in actions {
                action();
            }
            {
                let mut state = lock(&self.state);
                state.busy = false;
                // Those who asked for a turn meanwhile sleep.
                state.pass_if_free();
            }
            self.wake_holder(None);
        }
    }

    fn wake_holder(&self, but: Option<usize>) {
        let holder = lock(&self.state).holder;
        if let Some((holder, _)) = holder
            && but != Some(holder)
        {
            self.wakes[holder].notify();
        }
    }
}

impl Schedule for Deterministic {
    fn turn(&self, i: usize, now: u64, ran: u64) -> Turn {
        lock(&self.state).stand(i, now, ran);
        self.act();
        let turn = {
            let mut state = lock(&self.state);
            if state.slots[i].idle {
                // Its thread woke up for something else.
                return Turn::Sleep { until: None };
            }
            state.pass_if_free();
            match state.holder {
                Some((holder, budget)) if holder == i && !state.busy => {
                    state.busy = true;
                    state.slots[i].poked = false;
                    Turn::Run { now: state.slots[i].now, budget }
                }
                _ => Turn::Wait,
            }
        };
        if turn == Turn::Wait {
            self.wake_holder(Some(i));
        }
        turn
    }

    fn idle(&self, i: usize, now: u64, ran: u64, deadline: Option<u64>) -> Turn {
        {
            let mut state = lock(&self.state);
            state.stand(i, now, ran);
            if !state.slots[i].poked {
                state.slots[i].idle = true;
                state.slots[i].deadline = deadline;
                state.pass();
            }
        }
        let turn = self.turn(i, now, 0);
        if matches!(turn, Turn::Sleep { .. }) {
            self.wake_holder(Some(i));
        }
        turn
    }

    fn rest(&self, i: usize, now: u64, ran: u64) {
        lock(&self.state).stand(i, now, ran);
        self.act();
    }

    fn wake(&self, i: usize, at: Option<u64>) {
        {
            let mut state = lock(&self.state);
            state.slots[i].poked = true;
            if !state.slots[i].idle {
                return;
            }
            let at = at.unwrap_or_else(|| state.now());
            state.unidle(i, at);
            if state.holder.is_some() {
                return;
            }
            state.pass();
        }
        self.wake_holder(None);
    }

    fn tighten(&self, i: usize, now: u64) {
        let mut state = lock(&self.state);
        state.tight_until = state.tight_until.max(now.saturating_add(TIGHT_SPAN));
        // The others stand at boundaries: from one time on they go together.
        let latest = state.slots.iter().filter(|s| !s.idle).map(|s| s.now).fold(now, u64::max);
        state.slots[i].now = latest;
        if let Some((holder, left)) = &mut state.holder
            && *holder == i
        {
            // It comes to its next boundary at once, and has the token no longer.
            *left = 0;
        }
    }

    fn outside(&self, action: Action) {
        lock(&self.state).actions.push(action);
        self.act();
    }

    fn now(&self) -> u64 {
        lock(&self.state).now()
    }

    fn reset(&self) {
        let mut state = lock(&self.state);
        let now = state.now();
        for i in 0..state.slots.len() {
            state.unidle(i, now);
            state.slots[i].poked = false;
        }
        state.holder = None;
        state.busy = false;
    }
}
