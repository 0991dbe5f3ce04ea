//! A VM of the bare engine: a plain thread for each vCPU, a board with a serial line and a debug exit.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nestd_vcpu::kvm::{Created, Delivery, Devices, Kicker, KvmVcpu, KvmVm, Message, Observed, RunOutcome};
use nestd_vcpu::machine::Outcome;
use nested_vmx::cpu::BootState;
use nested_vmx::event::MpState;
use nested_vmx::mem::Ram;

use crate::guest::BSP_GPA;

/// Longer than anything takes on a loaded machine: only a hang runs into it.
pub const HANG: Duration = Duration::from_secs(60);

#[derive(Default)]
pub struct Board {
    seen: Mutex<Seen>,
    changed: Condvar,
    /// Called while a read of [`HOOK_PORT`] is under way.
    pub on_hook: Mutex<Option<Hook>>,
    /// What the next read of [`COUNTER_PORT`] gives.
    counter: AtomicU32,
}

type Hook = Box<dyn FnOnce() + Send>;

pub const HOOK_PORT: i32 = 0x60;
pub const COUNTER_PORT: i32 = 0x62;

#[derive(Default, Clone)]
pub struct Seen {
    pub serial: Vec<u8>,
    pub exit: Option<u32>,
    /// What each vCPU's run ended with, other than kicks and changes of mp_state.
    pub ends: Vec<(u32, RunOutcome)>,
    /// What each vCPU published by itself.
    pub published: Vec<(u32, MpState)>,
}

impl Board {
    fn change(&self, f: impl FnOnce(&mut Seen)) {
        f(&mut self.seen.lock().expect("not poisoned"));
        self.changed.notify_all();
    }

    /// Waits until `done` holds.
    pub fn wait(&self, what: &str, done: impl Fn(&Seen) -> bool) -> Seen {
        let seen = self.seen.lock().expect("not poisoned");
        let (seen, timeout) = self.changed.wait_timeout_while(seen, HANG, |s| !done(s)).expect("not poisoned");
        let text = String::from_utf8_lossy(&seen.serial).into_owned();
        assert!(!timeout.timed_out(), "{what}: never; serial {text:?}, ends {:?}", seen.ends);
        seen.clone()
    }
}

impl Devices for Board {
    fn io_read(&self, port: u16, _: u8) -> u32 {
        match i32::from(port) {
            HOOK_PORT => {
                if let Some(hook) = self.on_hook.lock().expect("not poisoned").take() {
                    hook();
                }
                u32::MAX
            }
            COUNTER_PORT => self.counter.fetch_add(1, Ordering::SeqCst),
            _ => u32::MAX,
        }
    }

    fn io_write(&self, port: u16, _: u8, value: u32) -> Outcome {
        match port {
            0x3f8 => self.change(|s| s.serial.push(value as u8)),
            0xf4 => {
                self.change(|s| s.exit = Some(value));
                return Outcome::Exit(value);
            }
            _ => {}
        }
        Outcome::Continue
    }

    fn mmio_read(&self, _: u64, _: u8) -> u64 {
        u64::MAX
    }

    fn mmio_write(&self, _: u64, _: u8, _: u64) {}
}

enum Command {
    Observe(Sender<Observed>),
    Rip(Sender<u64>),
    /// Resets, and does not run before `Go`.
    Reset(Sender<()>),
    Go,
    Quit,
}

pub struct Rig {
    pub vm: Arc<KvmVm>,
    pub ram: Arc<Ram>,
    pub board: Arc<Board>,
    kickers: Vec<Arc<Kicker>>,
    commands: Vec<Sender<Command>>,
    threads: Vec<JoinHandle<()>>,
    /// User and system time of each vCPU's thread, in ns, when it last took a command.
    cpu_ns: Vec<Arc<AtomicU64>>,
}

impl Rig {
    /// The BSP starts in real mode at BSP_GPA, CS=0, once `go` is called.
    pub fn new(cpus: u32, place: impl FnOnce(&Ram)) -> Self {
        let ram = Arc::new(Ram::new(64 << 20).expect("RAM"));
        place(&ram);
        let bsp = BootState::real_mode(0, BSP_GPA as u16);
        let counters = (0..cpus).map(|_| Arc::default()).collect();
        let Created { vm, vcpus, kickers } =
            KvmVm::create(Arc::clone(&ram), Some(&bsp), false, counters).expect("a VM");
        let board = Arc::new(Board::default());
        let mut rig = Self { vm, ram, board, kickers, commands: vec![], threads: vec![], cpu_ns: vec![] };
        for vcpu in vcpus {
            let (tx, rx) = channel();
            let board = Arc::clone(&rig.board);
            let cpu_ns = Arc::new(AtomicU64::new(0));
            rig.commands.push(tx);
            rig.cpu_ns.push(Arc::clone(&cpu_ns));
            rig.threads.push(std::thread::spawn(move || run_vcpu(vcpu, rx, &board, &cpu_ns)));
        }
        rig
    }

    pub fn started(cpus: u32, place: impl FnOnce(&Ram)) -> Self {
        let rig = Self::new(cpus, place);
        rig.go();
        rig
    }

    pub fn go(&self) {
        for i in 0..self.commands.len() {
            self.tell(i, Command::Go);
        }
    }

    fn tell(&self, vcpu: usize, command: Command) {
        self.commands[vcpu].send(command).expect("the thread lives");
        self.kickers[vcpu].kick();
    }

    pub fn kicker(&self, vcpu: usize) -> Arc<Kicker> {
        Arc::clone(&self.kickers[vcpu])
    }

    pub fn observe(&self, vcpu: usize) -> Observed {
        let (tx, rx) = channel();
        self.tell(vcpu, Command::Observe(tx));
        rx.recv_timeout(HANG).expect("an answer")
    }

    pub fn rip(&self, vcpu: usize) -> u64 {
        let (tx, rx) = channel();
        self.tell(vcpu, Command::Rip(tx));
        rx.recv_timeout(HANG).expect("an answer")
    }

    pub fn cpu_ns(&self, vcpu: usize) -> u64 {
        self.observe(vcpu);
        self.cpu_ns[vcpu].load(Ordering::SeqCst)
    }

    pub fn reset(&self) {
        for i in 0..self.commands.len() {
            let (tx, rx) = channel();
            self.tell(i, Command::Reset(tx));
            rx.recv_timeout(HANG).expect("an answer");
        }
        self.vm.reset().expect("reset");
        self.board.change(|s| *s = Seen::default());
    }

    /// Sends, and says that it was accepted.
    pub fn send(&self, vcpu: u32, message: Message) {
        assert_eq!(self.vm.send(vcpu, message).expect("sent"), Delivery::Accepted, "{message:?}");
    }

    /// Asks for fresh states until one satisfies `done`.
    pub fn observe_until(&self, vcpu: usize, what: &str, done: impl Fn(&Observed) -> bool) -> Observed {
        let begin = Instant::now();
        loop {
            let observed = self.observe(vcpu);
            if done(&observed) {
                return observed;
            }
            assert!(begin.elapsed() < HANG, "{what}: never; {observed:x?}");
            std::thread::yield_now();
        }
    }

    /// Waits for the debug exit; the serial output and the exit's value.
    pub fn finish(&self) -> (String, u32) {
        let seen = self.board.wait("debug exit", |s| s.exit.is_some() || bad_end(s));
        let text = String::from_utf8_lossy(&seen.serial).into_owned();
        let Some(exit) = seen.exit else { panic!("no debug exit; serial {text:?}, ends {:?}", seen.ends) };
        (text, exit)
    }

    /// Waits for a vCPU to end other than by a debug exit.
    pub fn end(&self) -> (u32, RunOutcome) {
        let seen = self.board.wait("an end", |s| !s.ends.is_empty());
        seen.ends[0].clone()
    }
}

fn bad_end(seen: &Seen) -> bool {
    seen.ends.iter().any(|(_, outcome)| !matches!(outcome, RunOutcome::Asked(_)))
}

impl Drop for Rig {
    fn drop(&mut self) {
        for i in 0..self.commands.len() {
            let _ = self.commands[i].send(Command::Quit);
            self.kickers[i].kick();
        }
        for thread in self.threads.drain(..) {
            let result = thread.join();
            if !std::thread::panicking() {
                result.expect("the vCPU's thread did not panic");
            }
        }
    }
}

fn run_vcpu(mut vcpu: KvmVcpu, commands: Receiver<Command>, board: &Board, cpu_ns: &AtomicU64) {
    let _adopted = vcpu.adopt_thread();
    let index = vcpu.index();
    let mut running = false;
    loop {
        vcpu.clear_kick();
        // A vCPU that does not run waits for its next command.
        let waited = if running { None } else { commands.recv().ok() };
        for command in waited.into_iter().chain(commands.try_iter()) {
            match command {
                Command::Observe(reply) => {
                    let now = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
                    cpu_ns.store(now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64, Ordering::SeqCst);
                    let _ = reply.send(vcpu.observe(board).expect("readable"));
                }
                Command::Rip(reply) => {
                    let _ = reply.send(vcpu.registers(board).expect("readable").rip);
                }
                Command::Reset(reply) => {
                    vcpu.stand();
                    running = false;
                    let _ = reply.send(());
                }
                Command::Go => running = true,
                Command::Quit => return,
            }
        }
        if !running {
            continue;
        }
        match vcpu.run(board) {
            RunOutcome::Kicked => {}
            RunOutcome::MpStateChanged => {
                let observed = vcpu.observe(board).expect("readable");
                board.change(|s| s.published.push((index, observed.mp_state)));
            }
            end => {
                running = false;
                board.change(|s| s.ends.push((index, end)));
            }
        }
    }
}
