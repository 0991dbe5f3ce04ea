//! Random sequences on two processors, in any order, against a table of the rules: written from semantics.md, not from
//! the code.

use super::bench::Bench;
use crate::apic::LocalApic;
use crate::arch::vmx::{EventType, PinControls};
use crate::bus::{Delivery, Destination};
use crate::cpu::{CpuState, RunExit, flags, slot};
use crate::event::ActivityState::{self, Active, Hlt, Shutdown, WaitForSipi};
use crate::event::VmxMode::{self, NonRoot, Off, Root};
use crate::event::{Fate, Rule};
use crate::testing::{PDPT, Rig};
use crate::vmx::vmcs12::Field;
use iced_x86::code_asm::{dword_ptr, rbx};
use proptest::prelude::*;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum What {
    Init,
    Sipi,
    /// NMI, with NMI exiting in the guest.
    Nmi,
    /// External interrupt, with external-interrupt exiting in the guest.
    Interrupt,
    Mtf,
}
use What::{Init, Interrupt, Mtf, Nmi, Sipi};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    /// INIT state: bootstrap processor active at the reset vector, others wait-for-SIPI.
    InitState,
    Latched,
    Dropped(Rule),
    Start,
    Exit(u16),
    Deliver,
    /// With RFLAGS.IF=1; else held.
    DeliverIfOpen,
    Held,
}
use Outcome::{Deliver, DeliverIfOpen, Dropped, Exit, Held, InitState, Latched, Start};

const ANY: [ActivityState; 4] = [Active, Hlt, Shutdown, WaitForSipi];
const RUNS_OR_HALTS: [ActivityState; 2] = [Active, Hlt];

/// semantics.md section 2: (mode, states, event, result). The first row that fits counts.
const TABLE: &[(VmxMode, &[ActivityState], What, Outcome)] = &[
    // R1, R2
    (Off, &[WaitForSipi], Init, Dropped(Rule::R2)),
    (Off, &ANY, Init, InitState),
    (Off, &[WaitForSipi], Sipi, Start),
    (Off, &ANY, Sipi, Dropped(Rule::R1)),
    (Off, &[WaitForSipi], Nmi, Held),
    (Off, &ANY, Nmi, Deliver),
    (Off, &[WaitForSipi], Interrupt, Held),
    (Off, &RUNS_OR_HALTS, Interrupt, DeliverIfOpen),
    // R4
    (Root, &ANY, Init, Latched),
    (Root, &ANY, Sipi, Dropped(Rule::R4)),
    (Root, &ANY, Nmi, Deliver),
    (Root, &RUNS_OR_HALTS, Interrupt, DeliverIfOpen),
    // R5 to R8
    (NonRoot, &[WaitForSipi], Init, Dropped(Rule::R8)),
    (NonRoot, &ANY, Init, Exit(3)),
    (NonRoot, &[Active], Sipi, Dropped(Rule::R5)),
    (NonRoot, &[Hlt], Sipi, Dropped(Rule::R6)),
    (NonRoot, &[Shutdown], Sipi, Dropped(Rule::R7)),
    (NonRoot, &[WaitForSipi], Sipi, Exit(4)),
    (NonRoot, &[WaitForSipi], Nmi, Held),
    (NonRoot, &ANY, Nmi, Exit(0)),
    (NonRoot, &RUNS_OR_HALTS, Interrupt, Exit(1)),
    (NonRoot, &ANY, Interrupt, Held),
    (NonRoot, &RUNS_OR_HALTS, Mtf, Exit(37)),
    (NonRoot, &ANY, Mtf, Held),
];

fn rule(mode: VmxMode, activity: ActivityState, what: What) -> Outcome {
    TABLE.iter().find(|r| r.0 == mode && r.1.contains(&activity) && r.2 == what).map_or(Held, |r| r.3)
}

/// What an entry may inject: (type, vector).
type Injection = (EventType, u8);

/// R13: whether an entry into `state` with this injection passes.
fn entry_passes(state: u64, injection: Option<Injection>) -> bool {
    match (state, injection) {
        (0..=3, None) | (0, Some(_)) => true,
        (1, Some(i)) => matches!(i, (EventType::Nmi | EventType::Other, _) | (EventType::HardwareException, 1 | 18)),
        (2, Some(i)) => matches!(i, (EventType::Nmi, _) | (EventType::HardwareException, 18)),
        _ => false,
    }
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Vmxon,
    Vmxoff,
    Enter {
        state: u64,
        injection: Option<Injection>,
    },
    Init,
    Sipi(u8),
    InitAndSipi(u8),
    SipiAndInit(u8),
    Nmi,
    Interrupt,
    Hlt,
    /// RFLAGS.IF.
    Flag(bool),
    /// The processor's code writes its ICR: this event at the other one.
    Send(What),
    SaveAndRestore,
    Run,
}

/// One processor as the table has it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Model {
    bsp: bool,
    mode: VmxMode,
    activity: ActivityState,
    init: bool,
    nmi: bool,
    nmi_blocked: bool,
    /// The VMCS's blocking by NMI.
    saved_nmi_blocking: bool,
    interrupt: bool,
    mtf: bool,
    /// RFLAGS.IF.
    open: bool,
    last_exit: u64,
    /// Of exits for events.
    qualification: u64,
    /// The vector of the SIPI that arrives.
    vector: u8,
}

impl Model {
    fn new(bsp: bool) -> Self {
        Self {
            bsp,
            mode: Off,
            activity: Active,
            init: false,
            nmi: false,
            nmi_blocked: false,
            saved_nmi_blocking: false,
            interrupt: false,
            mtf: false,
            open: false,
            last_exit: 0,
            qualification: 0,
            vector: 0,
        }
    }

    fn exit(&mut self, reason: u16) {
        self.last_exit = reason.into();
        // R16, R17.
        self.qualification = if reason == 4 { self.vector.into() } else { 0 };
        self.open = false;
        self.saved_nmi_blocking = self.nmi_blocked;
        self.nmi_blocked |= reason == 0;
        self.mode = Root;
        self.activity = Active;
        self.mtf = false;
    }

    /// Applies the table to one event; what becomes of an INIT or SIPI.
    fn event(&mut self, what: What) -> Option<Fate> {
        match rule(self.mode, self.activity, what) {
            InitState => {
                let fate = if self.bsp || self.activity == Shutdown { Fate::Reset } else { Fate::Delivered };
                self.activity = if self.bsp { Active } else { WaitForSipi };
                self.nmi_blocked = false;
                // The local APIC's registers are reset too.
                self.interrupt = false;
                self.open = false;
                Some(fate)
            }
            Latched => {
                self.init = true;
                Some(Fate::Latched)
            }
            Dropped(rule) => Some(Fate::Dropped(rule)),
            Start => {
                self.activity = Active;
                Some(Fate::Started)
            }
            Exit(reason) => {
                self.exit(reason);
                Some(Fate::VmExit(reason))
            }
            Deliver => {
                self.activity = Active;
                self.nmi_blocked = true;
                self.open = false;
                None
            }
            DeliverIfOpen if self.open => {
                self.activity = Active;
                self.interrupt = false;
                self.open = false;
                None
            }
            DeliverIfOpen | Held => None,
        }
    }

    fn init_arrives(&mut self) -> Fate {
        if self.init {
            return Fate::Coalesced;
        }
        self.event(Init).unwrap_or(Fate::Latched)
    }

    /// What the boundary takes, by priority (R19).
    fn settle(&mut self) {
        let mut delivered = false;
        loop {
            let before = self.clone();
            if self.init && self.mode != Root {
                self.init = false;
                self.event(Init);
            } else if self.mtf && rule(self.mode, self.activity, Mtf) != Held {
                self.mtf = false;
                self.event(Mtf);
            } else if self.nmi && !self.nmi_blocked && rule(self.mode, self.activity, Nmi) != Held && !delivered {
                self.nmi = false;
                delivered = self.mode != NonRoot;
                self.event(Nmi);
            } else if self.interrupt && !delivered && rule(self.mode, self.activity, Interrupt) != Held {
                self.event(Interrupt);
            }
            if *self == before {
                return;
            }
        }
    }

    /// The fates of the INIT and SIPI of this step, if it has them.
    fn step(&mut self, step: Step) -> (Option<Fate>, Option<Fate>) {
        let runs = self.activity == Active;
        let mut fates = (None, None);
        match step {
            Step::Vmxon if runs && self.mode == Off => self.mode = Root,
            Step::Vmxoff if runs && self.mode == Root => self.mode = Off,
            Step::Vmxon if runs && self.mode == NonRoot => self.exit(27),
            Step::Vmxoff if runs && self.mode == NonRoot => self.exit(26),
            Step::Enter { .. } if runs && self.mode == NonRoot => self.exit(24),
            Step::Enter { state, injection } if runs && self.mode == Root => {
                if entry_passes(state, injection) {
                    self.mode = NonRoot;
                    // What the VMCS says.
                    self.open = false;
                    self.activity = [Active, Hlt, Shutdown, WaitForSipi][state as usize];
                    self.nmi_blocked = self.saved_nmi_blocking;
                    match injection {
                        Some((EventType::Other, _)) => self.mtf = true,
                        Some((event, _)) => {
                            // R14: a vectoring entry ends active.
                            self.activity = Active;
                            self.nmi_blocked |= event == EventType::Nmi;
                        }
                        None => {}
                    }
                } else {
                    self.last_exit = 33 | 1 << 31;
                    self.qualification = 0;
                    self.open = false;
                }
            }
            Step::Init => fates.0 = Some(self.init_arrives()),
            Step::Sipi(v) => {
                self.vector = v;
                fates.1 = self.event(Sipi);
            }
            // R12: INIT comes first.
            Step::InitAndSipi(v) => {
                self.vector = v;
                fates.0 = Some(self.init_arrives());
                fates.1 = self.event(Sipi);
            }
            Step::SipiAndInit(v) => {
                self.vector = v;
                let fate = self.init_arrives();
                fates.0 = Some(fate);
                let counts = !matches!(fate, Fate::Dropped(_) | Fate::Coalesced);
                fates.1 = if counts { Some(Fate::Dropped(Rule::R12)) } else { self.event(Sipi) };
            }
            Step::Nmi => self.nmi = true,
            Step::Interrupt => self.interrupt = true,
            Step::Hlt if runs => self.activity = Hlt,
            Step::Flag(open) if runs => self.open = open,
            _ => {}
        }
        self.settle();
        fates
    }
}

/// A processor of the bench under the same steps.
struct Subject {
    bench: Bench,
    /// 64-bit mode, to return to after the INIT state.
    running: CpuState,
    cause: u64,
    inits: Vec<u64>,
    sipis: Vec<u64>,
}

impl Subject {
    fn new(bsp: bool) -> Self {
        let mut bench = Bench::root();
        bench.pin(PinControls::new().with_nmi_exiting(true).with_external_interrupt_exiting(true));
        // The launch state is of no interest here.
        bench.enter(Active).init(0);
        bench.vmxoff();
        bench.cpu().apic.reset(bsp);
        bench.cpu().apic.set_virtual_wire();
        bench.cpu().nmi_blocked = false;
        bench.cpu().regs.set_rip(super::bench::HOST_RIP);
        let running = bench.cpu().save();
        bench.clear_events();
        // Linear 3 GiB to 4 GiB as it is: the APIC's page.
        bench.rig.write_u64(PDPT + 24, 0xc000_0087);
        Self { bench, running, cause: 0, inits: Vec::new(), sipis: Vec::new() }
    }

    /// Code at the level that runs writes the ICR; what arrives at the other processor.
    fn send(&mut self, what: What) -> Step {
        let b = &mut self.bench;
        let (low, step) = match what {
            Init => (0x4500, Step::Init),
            Sipi => (0x4699, Step::Sipi(0x99)),
            Nmi => (0x4400, Step::Nmi),
            Interrupt | Mtf => (0x4041, Step::Interrupt),
        };
        b.rig.world.lock().unwrap().ipis.clear();
        b.rig.set_r(slot::RBX, 0xfee0_0300);
        b.execute(|a| a.mov(dword_ptr(rbx + 0x10), 1 << 24));
        b.execute(|a| a.mov(dword_ptr(rbx), low));
        let sent = b.rig.world.lock().unwrap().ipis.clone();
        assert!(matches!(sent[..], [m] if m.destination == Destination::Physical(1)), "R23: {sent:?}");
        let delivery = [Delivery::Init, Delivery::StartUp, Delivery::Nmi, Delivery::Fixed][(what as usize).min(3)];
        assert_eq!((sent[0].delivery, u64::from(sent[0].vector)), (delivery, low as u64 & 0xff));
        self.bench.boundary();
        step
    }

    /// Every INIT and SIPI has met its end exactly once, or is the INIT that is latched.
    fn accounts(&self) -> Result<(), TestCaseError> {
        for &cause in self.inits.iter().chain(&self.sipis) {
            let fates = self.bench.fates(cause);
            let ends = fates.iter().filter(|f| **f != Fate::Latched).count();
            let latched = self.bench.rig.cpu.vmx.init == Some(cause);
            prop_assert_eq!(ends + usize::from(latched), 1, "{:?}", fates);
        }
        Ok(())
    }

    /// After the INIT state or a start, what a boot loader would do: 64-bit mode again.
    fn revive(&mut self) {
        let now = self.bench.cpu().save();
        if now.vmx.mode != Off || self.bench.cpu().code64() {
            return;
        }
        let mut state = self.running.clone();
        state.vmx = now.vmx;
        state.activity = now.activity;
        state.nmi_blocked = now.nmi_blocked;
        state.apic = now.apic;
        state.retired = now.retired;
        self.bench.cpu().restore(&state).unwrap();
        self.bench.cpu().apic.set_virtual_wire();
    }

    /// What the handler of the interrupt would do.
    fn end_of_interrupt(&mut self) {
        let mut state = self.bench.cpu().apic.state().clone();
        state.isr = [0; 4];
        self.bench.cpu().apic = LocalApic::restore(&state).unwrap();
    }

    fn fate(&self, cause: u64) -> Option<Fate> {
        self.bench.fates(cause).first().copied()
    }

    fn step(&mut self, step: Step) -> (Option<Fate>, Option<Fate>) {
        self.cause += 2;
        let (init, sipi) = (self.cause, self.cause + 1);
        let b = &mut self.bench;
        let runs = b.activity() == Active;
        let mut fates = (false, false);
        if matches!(step, Step::Init | Step::InitAndSipi(_) | Step::SipiAndInit(_)) {
            self.inits.push(init);
        }
        if matches!(step, Step::Sipi(_) | Step::InitAndSipi(_) | Step::SipiAndInit(_)) {
            self.sipis.push(sipi);
        }
        match step {
            Step::Vmxon if runs && b.mode() != Root => drop(b.vmxon()),
            Step::Vmxoff if runs && b.mode() != Off => drop(b.vmxoff()),
            Step::Enter { state, injection } if runs && b.mode() != Off => {
                if b.mode() == Root {
                    // The same VMCS after each VMXON; its contents are still cached.
                    b.cpu().vmx.current_gpa = super::bench::VMCS_GPA;
                    b.set(Field::GuestActivityState, state).set(Field::EntryInterruptionInfo, 0);
                    b.set(Field::GuestRip, super::bench::GUEST_RIP).set(Field::GuestPendingDebug, 0);
                    b.set(Field::GuestRflags, 2);
                    if let Some((event, vector)) = injection {
                        b.inject(event, vector, None);
                    }
                }
                b.launch();
            }
            Step::Init => {
                b.rig.mailbox.post_init(init);
                fates.0 = true;
            }
            Step::Sipi(v) => {
                b.rig.mailbox.post_sipi(v, sipi);
                fates.1 = true;
            }
            Step::InitAndSipi(v) => {
                b.rig.mailbox.post_init(init);
                b.rig.mailbox.post_sipi(v, sipi);
                fates = (true, true);
            }
            Step::SipiAndInit(v) => {
                b.rig.mailbox.post_sipi(v, sipi);
                b.rig.mailbox.post_init(init);
                fates = (true, true);
            }
            Step::Nmi => drop(b.rig.mailbox.post_nmi(1_000_000)),
            Step::Interrupt => b.rig.mailbox.post_interrupt(0x41, false),
            Step::Hlt if runs => drop(b.execute(|a| a.hlt())),
            Step::Flag(open) if runs => b.cpu().flags.set(flags::IF, open),
            Step::SaveAndRestore => {
                let saved = b.cpu().save();
                b.cpu().restore(&saved).unwrap();
                assert_eq!(b.cpu().save(), saved);
            }
            Step::Run => {
                let idle = !runs;
                assert_eq!(matches!(b.rig.run(3), RunExit::Idle { .. }), idle && b.activity() != Active);
            }
            _ => {}
        }
        self.bench.boundary();
        self.end_of_interrupt();
        self.revive();
        (self.fate(init).filter(|_| fates.0), self.fate(sipi).filter(|_| fates.1))
    }

    fn view(&self, bsp: bool, vector: u8) -> Model {
        let c = &self.bench.rig.cpu;
        let last_exit = self.bench.get(Field::ExitReason);
        // Of VMXON and its like the qualification is an address.
        let of_event = last_exit < 10 || last_exit == 37 || last_exit >> 31 != 0;
        Model {
            bsp,
            mode: c.vmx_mode(),
            activity: c.activity(),
            init: c.vmx.init.is_some(),
            nmi: c.vmx.nmi.is_some(),
            nmi_blocked: c.nmi_blocked,
            saved_nmi_blocking: self.bench.get(Field::GuestInterruptibility) & 8 != 0,
            interrupt: c.apic.pending().is_some(),
            mtf: c.vmx.mtf_pending,
            open: c.flags.has(flags::IF),
            last_exit,
            qualification: if of_event { self.bench.get(Field::ExitQualification) } else { 0 },
            vector,
        }
    }
}

fn injection() -> impl Strategy<Value = Option<Injection>> {
    prop_oneof![
        4 => Just(None),
        1 => Just(Some((EventType::Nmi, 2))),
        1 => Just(Some((EventType::Other, 0))),
        1 => prop_oneof![Just(1u8), Just(6), Just(18)].prop_map(|v| Some((EventType::HardwareException, v))),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => Just(Step::Vmxon),
        1 => Just(Step::Vmxoff),
        6 => (0u64..5, injection()).prop_map(|(state, injection)| Step::Enter { state, injection }),
        2 => Just(Step::Init),
        2 => any::<u8>().prop_map(Step::Sipi),
        1 => any::<u8>().prop_map(Step::InitAndSipi),
        1 => any::<u8>().prop_map(Step::SipiAndInit),
        1 => Just(Step::Nmi),
        1 => Just(Step::Interrupt),
        1 => Just(Step::Hlt),
        1 => any::<bool>().prop_map(Step::Flag),
        2 => prop_oneof![Just(Init), Just(Sipi), Just(Nmi), Just(Interrupt)].prop_map(Step::Send),
        1 => Just(Step::SaveAndRestore),
        1 => Just(Step::Run),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 250, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random_sequences_on_two_processors_agree_with_the_table(
        steps in proptest::collection::vec((0usize..2, step()), 1..60)
    ) {
        let mut pairs = [true, false].map(|bsp| {
            let subject = Subject::new(bsp);
            let mut model = Model::new(bsp);
            model.last_exit = subject.view(bsp, 0).last_exit;
            (subject, model)
        });
        for (n, (mut who, mut step)) in steps.into_iter().enumerate() {
            if let Step::Send(what) = step {
                if pairs[who].1.activity != Active {
                    continue;
                }
                step = pairs[who].0.send(what);
                who = 1 - who;
            }
            let (subject, model) = &mut pairs[who];
            let expected = model.step(step);
            let found = subject.step(step);
            prop_assert_eq!(found, expected, "step {}: {:?} on processor {}", n, step, who);
            for (subject, model) in &pairs {
                let view = subject.view(model.bsp, model.vector);
                prop_assert_eq!(&view, model, "step {}: {:?} on processor {}", n, step, who);
            }
        }
        for (subject, _) in &pairs {
            subject.accounts()?;
        }
    }

    #[test]
    fn a_processor_that_was_saved_and_restored_goes_on_as_it_would_have(
        before in proptest::collection::vec(step(), 0..20),
        posted in proptest::collection::vec(step(), 0..3),
        steps in 1u64..40,
    ) {
        let mut subject = Subject::new(true);
        for step in before.into_iter().filter(|s| !matches!(s, Step::Send(_))) {
            subject.step(step);
        }
        // Not looked at yet: they travel too.
        let mailbox = &subject.bench.rig.mailbox;
        for step in posted {
            match step {
                Step::Init => drop(mailbox.post_init(1)),
                Step::Sipi(v) => drop(mailbox.post_sipi(v, 2)),
                Step::Nmi => drop(mailbox.post_nmi(3)),
                Step::Interrupt => mailbox.post_interrupt(0x42, false),
                _ => {}
            }
        }
        let saved = subject.bench.cpu().save();
        let mut memory = vec![0; 4 << 20];
        subject.bench.rig.ram.read(0, &mut memory).unwrap();
        let mut other = Rig::reset();
        other.ram.write(0, &memory).unwrap();
        other.cpu.restore(&saved).unwrap();
        prop_assert_eq!(&other.cpu.save(), &saved);
        let ends = [subject.bench.rig.run(steps), other.run(steps)];
        prop_assert_eq!(ends[0], ends[1]);
        prop_assert_eq!(subject.bench.cpu().save(), other.cpu.save());
    }
}
