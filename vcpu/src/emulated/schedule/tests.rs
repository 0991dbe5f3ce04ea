//! The schedules, driven by threads that only count instructions.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::*;
use crate::thread::lock;

const PATIENCE: Duration = Duration::from_secs(20);

/// What a counting vCPU does next, told its time and how many instructions it may run.
enum Step {
    Ran(u64),
    Idle(Option<u64>),
    Done,
}

type Program = Box<dyn FnMut(u64, u64) -> Step + Send>;

fn wakes(n: usize) -> Wakes {
    (0..n).map(|_| Arc::default()).collect()
}

/// Runs each program on a thread of its own until it is done; one that is done is idle for the others.
fn drive(schedule: &Arc<dyn Schedule>, wakes: &Wakes, programs: Vec<Program>) {
    let end = Instant::now() + PATIENCE;
    std::thread::scope(|scope| {
        for (i, mut program) in programs.into_iter().enumerate() {
            scope.spawn(move || {
                let mut turn = schedule.turn(i, 0, 0);
                loop {
                    turn = match turn {
                        Turn::Run { now, budget } => match program(now, budget) {
                            Step::Ran(n) => {
                                assert!(n <= budget);
                                schedule.turn(i, now + n, n)
                            }
                            Step::Idle(deadline) => schedule.idle(i, now, 0, deadline),
                            Step::Done => {
                                schedule.idle(i, now, 0, None);
                                return;
                            }
                        },
                        Turn::Wait | Turn::Sleep { .. } => {
                            let until = match turn {
                                Turn::Sleep { until: Some(until) } => until,
                                _ => end,
                            };
                            wakes[i].wait(Some(until));
                            assert!(Instant::now() < end, "vCPU {i} was never woken");
                            schedule.turn(i, 0, 0)
                        }
                    };
                }
            });
        }
    });
}

fn parallel(n: usize) -> (Arc<dyn Schedule>, Wakes) {
    let wakes = wakes(n);
    (Arc::new(Parallel::new(wakes.clone())), wakes)
}

fn deterministic(n: usize, seed: u64) -> (Arc<dyn Schedule>, Wakes) {
    let wakes = wakes(n);
    (Arc::new(Deterministic::new(wakes.clone(), seed)), wakes)
}

#[test]
fn running_vcpus_stay_within_the_window_of_each_other() {
    const END: u64 = 3_000_000;
    let (schedule, wakes) = parallel(3);
    let times: Arc<[AtomicU64; 3]> = Arc::default();
    let worst = Arc::new(AtomicU64::new(0));
    let programs = (0..3).map(|i| {
        let (times, worst) = (times.clone(), worst.clone());
        let program = move |now: u64, budget: u64| {
            let others = (0..3).filter(|j| *j != i).map(|j| times[j].load(SeqCst)).min().unwrap();
            let after = now + budget;
            worst.fetch_max(after.saturating_sub(others), SeqCst);
            times[i].store(if after >= END { NEVER } else { after }, SeqCst);
            if after >= END { Step::Done } else { Step::Ran(budget) }
        };
        Box::new(program) as Program
    });
    drive(&schedule, &wakes, programs.collect());
    let worst = worst.load(SeqCst);
    // A vCPU's time as others know it lags by the quantum that it runs.
    assert!(worst > 0 && worst <= WINDOW + WINDOW / 4, "{worst}");
    assert!(schedule.now() >= END - WINDOW / 4);
}

#[test]
fn an_idle_vcpu_holds_nobody_back_and_wakes_in_its_wakers_time() {
    let (schedule, wakes) = parallel(2);
    let woken_at = Arc::new(AtomicU64::new(0));
    let seen = woken_at.clone();
    let mut idled = false;
    let sleeper = move |now: u64, _: u64| {
        if !std::mem::replace(&mut idled, true) {
            return Step::Idle(None);
        }
        seen.store(now, SeqCst);
        Step::Done
    };
    let waker = schedule.clone();
    let runner = move |now: u64, budget: u64| {
        if now < 100 * WINDOW {
            return Step::Ran(budget);
        }
        waker.wake(1, Some(now));
        Step::Done
    };
    drive(&schedule, &wakes, vec![Box::new(runner), Box::new(sleeper)]);
    assert!((100 * WINDOW..101 * WINDOW).contains(&woken_at.load(SeqCst)), "{woken_at:?}");
}

fn timers(schedule: Arc<dyn Schedule>, wakes: Wakes) -> Vec<(usize, u64)> {
    let log = Arc::new(Mutex::new(Vec::new()));
    let programs = [(7_000_000_000u64, 3), (10_000_000_000, 2)].into_iter().enumerate().map(|(i, (period, times))| {
        let (log, mut next) = (log.clone(), period);
        let program = move |now: u64, _| {
            if now >= next {
                lock(&log).push((i, now));
                next += period;
            }
            if next > period * times { Step::Done } else { Step::Idle(Some(next)) }
        };
        Box::new(program) as Program
    });
    drive(&schedule, &wakes, programs.collect());
    Arc::try_unwrap(log).unwrap().into_inner().unwrap()
}

#[test]
fn when_all_are_idle_time_skips_to_the_deadlines_in_their_order() {
    let expected =
        [(0, 7_000_000_000), (1, 10_000_000_000), (0, 14_000_000_000), (1, 20_000_000_000), (0, 21_000_000_000)];
    let start = Instant::now();
    let (schedule, wakes) = parallel(2);
    assert_eq!(timers(schedule, wakes), expected);
    let (schedule, wakes) = deterministic(2, 9);
    assert_eq!(timers(schedule, wakes), expected);
    assert!(start.elapsed() < Duration::from_secs(10), "42 s of guest time were skipped, not slept");
}

#[test]
fn a_running_vcpu_wakes_an_idle_one_at_its_deadline() {
    for (schedule, wakes) in [parallel(2), deterministic(2, 3)] {
        let deadline = 333_333;
        let woken_at = Arc::new(AtomicU64::new(0));
        let (seen, done) = (woken_at.clone(), woken_at.clone());
        let sleeper = move |now: u64, _: u64| {
            if now < deadline {
                return Step::Idle(Some(deadline));
            }
            seen.store(now, SeqCst);
            Step::Done
        };
        let runner = move |_: u64, budget: u64| if done.load(SeqCst) != 0 { Step::Done } else { Step::Ran(budget) };
        drive(&schedule, &wakes, vec![Box::new(runner), Box::new(sleeper)]);
        assert_eq!(woken_at.load(SeqCst), deadline);
    }
}

/// How many instructions the other vCPU runs while the sender runs `pause` after an INIT.
fn share_after_init(schedule: Arc<dyn Schedule>, wakes: Wakes, pause: u64) -> u64 {
    let (sent, over) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
    let (init_sent, waits_over) = (sent.clone(), over.clone());
    let sender = schedule.clone();
    let mut ran = 0;
    let source = move |now: u64, budget: u64| {
        if sent.load(SeqCst) == 0 {
            if now < 10 * WINDOW {
                return Step::Ran(budget);
            }
            sender.tighten(0, now + 1);
            sent.store(1, SeqCst);
            return Step::Ran(1);
        }
        if ran >= pause {
            over.store(true, SeqCst);
            return Step::Done;
        }
        ran += budget;
        Step::Ran(budget)
    };
    let share = Arc::new(AtomicU64::new(0));
    let counted = share.clone();
    let target = move |_: u64, budget: u64| {
        if waits_over.load(SeqCst) {
            return Step::Done;
        }
        // As the mailbox's STOP does, the INIT ends a running quantum: it does not reach past it.
        let budget = budget.min(500);
        if init_sent.load(SeqCst) != 0 {
            counted.fetch_add(budget, SeqCst);
        }
        Step::Ran(budget)
    };
    drive(&schedule, &wakes, vec![Box::new(source), Box::new(target)]);
    share.load(SeqCst)
}

#[test]
fn r4_the_target_of_an_init_gets_its_share_of_the_pause_before_the_sipi() {
    const PAUSE: u64 = 20_000;
    for _ in 0..20 {
        for (schedule, wakes) in [parallel(2), deterministic(2, 5)] {
            let share = share_after_init(schedule, wakes, PAUSE);
            assert!(share >= PAUSE - 3 * TIGHT_WINDOW, "{share} of {PAUSE}");
        }
    }
}

fn trace(seed: u64, disturb: bool) -> Vec<(usize, u64, u64)> {
    let (schedule, wakes) = deterministic(3, seed);
    let log = Arc::new(Mutex::new(Vec::new()));
    let programs = (0..3).map(|i| {
        let (log, schedule) = (log.clone(), schedule.clone());
        let mut owed = 0u64;
        let program = move |now: u64, budget: u64| {
            // A kick ends a run early; the rest of the quantum follows.
            let ran = if disturb && budget > 2 && !now.is_multiple_of(3) { budget / 2 } else { budget };
            owed += ran;
            if ran == budget {
                lock(&log).push((i, now + ran, std::mem::take(&mut owed)));
            }
            if i == 0 && (400_000..1_000_000).contains(&now) {
                schedule.wake(1, Some(now));
            }
            match (now, i) {
                (2_000_000.., _) => Step::Done,
                (500_000..600_000, 1) => Step::Idle(Some(700_000)),
                _ => Step::Ran(ran),
            }
        };
        Box::new(program) as Program
    });
    drive(&schedule, &wakes, programs.collect());
    Arc::into_inner(log).unwrap().into_inner().unwrap()
}

#[test]
fn one_seed_is_one_run_whatever_the_threads_do() {
    let first = trace(1, false);
    assert!(first.len() > 100);
    for _ in 0..5 {
        assert_eq!(trace(1, false), first);
    }
    assert_ne!(trace(2, false), first);
}

#[test]
fn what_comes_from_outside_is_done_when_nobody_runs() {
    let (schedule, wakes) = deterministic(2, 1);
    let (inside, overlaps, done) =
        (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    const ACTIONS: u64 = 200;
    let programs = (0..2).map(|_| {
        let (inside, done) = (inside.clone(), done.clone());
        let program = move |_: u64, budget: u64| {
            inside.fetch_add(1, SeqCst);
            std::hint::spin_loop();
            inside.fetch_sub(1, SeqCst);
            if done.load(SeqCst) == ACTIONS { Step::Done } else { Step::Ran(budget) }
        };
        Box::new(program) as Program
    });
    std::thread::scope(|scope| {
        let outside = (schedule.clone(), inside.clone(), overlaps.clone(), done.clone());
        scope.spawn(move || {
            let (schedule, inside, overlaps, done) = outside;
            for _ in 0..ACTIONS {
                let (inside, overlaps, done) = (inside.clone(), overlaps.clone(), done.clone());
                schedule.outside(Box::new(move || {
                    overlaps.fetch_add(inside.load(SeqCst), SeqCst);
                    done.fetch_add(1, SeqCst);
                }));
            }
        });
        drive(&schedule, &wakes, programs.collect());
    });
    assert_eq!((overlaps.load(SeqCst), done.load(SeqCst)), (0, ACTIONS));
}

#[test]
fn a_frozen_realtime_clock_stands_still_and_goes_on_where_it_stood() {
    let wakes = wakes(1);
    let schedule = Realtime::new(wakes);
    assert_eq!(schedule.now(), 0);
    schedule.unfreeze();
    while schedule.now() == 0 {
        std::hint::spin_loop();
    }
    schedule.freeze();
    let at = schedule.now();
    std::thread::yield_now();
    assert_eq!(schedule.now(), at);
    schedule.unfreeze();
    assert!(schedule.now() >= at && schedule.now() < at + 1_000_000_000);
}
