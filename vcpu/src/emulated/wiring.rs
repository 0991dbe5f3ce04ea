//! What the vCPUs of a VM share: devices, mailboxes, and who is reached by a message.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};

use nested_vmx::apic::{ApicIdentity, Sender, arbitrate_lowest_priority};
use nested_vmx::bus::{Delivery, IpiMessage};
use nested_vmx::event::{Detail, Fate, Rule};
use nested_vmx::mailbox::{Mailbox, Posted, attention};
use nested_vmx::mem::Ram;

use super::gate::Gate;
use super::schedule::Schedule;
use crate::console::Console;
use crate::engine::{Disposition, Injection};
use crate::event::{Events, What};
use crate::machine::{Devices, Outputs};
use crate::thread::lock;

/// No device has a deadline.
const NEVER: u64 = u64::MAX;

/// The vCPU whose thread looks after the devices' timers and the console's input.
pub const KEEPER: usize = 0;

/// The APICs' identities: an immutable map, published anew when one changes.
pub struct Routes {
    current: Mutex<Arc<[ApicIdentity]>>,
    /// Counts publications, so that a reader keeps its copy while it is the current one.
    version: AtomicU64,
}

/// A reader's copy of the map.
#[derive(Clone)]
pub struct RouteCache {
    map: Arc<[ApicIdentity]>,
    version: u64,
}

impl Routes {
    pub fn new(identities: Vec<ApicIdentity>) -> Self {
        Self { current: Mutex::new(identities.into()), version: AtomicU64::new(0) }
    }

    pub fn publish(&self, i: usize, identity: ApicIdentity) {
        let mut current = lock(&self.current);
        let mut next: Vec<ApicIdentity> = current.to_vec();
        if let Some(slot) = next.get_mut(i) {
            *slot = identity;
        }
        *current = next.into();
        self.version.fetch_add(1, SeqCst);
    }

    pub fn cache(&self) -> RouteCache {
        let current = lock(&self.current);
        RouteCache { map: current.clone(), version: self.version.load(SeqCst) }
    }

    fn refresh(&self, cache: &mut RouteCache) {
        if self.version.load(SeqCst) != cache.version {
            *cache = self.cache();
        }
    }
}

pub struct Wiring {
    pub ram: Arc<Ram>,
    pub mailboxes: Vec<Arc<Mailbox>>,
    pub schedule: Arc<dyn Schedule>,
    pub gate: Gate,
    pub routes: Routes,
    pub events: Arc<Events>,
    pub console: Arc<Console>,
    pub devices: Mutex<Devices>,
    /// When [`KEEPER`] has to let the devices' timers expire.
    device_deadline: AtomicU64,
    /// Console input was queued.
    input: AtomicBool,
    /// The highest time that an instruction has read, on any vCPU.
    pub latest_read: AtomicU64,
}

/// Where devices' outputs go, while the devices are locked.
pub struct Out<'a> {
    wiring: &'a Wiring,
    at: Option<u64>,
}

impl Outputs for Out<'_> {
    fn console(&mut self, bytes: &[u8]) {
        self.wiring.console.push_output(bytes);
    }

    fn message(&mut self, message: IpiMessage) {
        let mut routes = self.wiring.routes.cache();
        self.wiring.deliver(&message, None, self.at, &mut routes);
    }

    fn extint(&mut self, asserted: bool) {
        // The 8259 pair is wired to the bootstrap processor's LINT0.
        self.wiring.mailboxes[KEEPER].set_extint(asserted);
        if asserted {
            self.wiring.schedule.wake(KEEPER, self.at);
        }
    }
}

impl Wiring {
    pub fn new(
        ram: Arc<Ram>,
        mailboxes: Vec<Arc<Mailbox>>,
        schedule: Arc<dyn Schedule>,
        routes: Routes,
        events: Arc<Events>,
        console: Arc<Console>,
        devices: Devices,
    ) -> Self {
        Self {
            ram,
            gate: Gate::new(mailboxes.clone()),
            mailboxes,
            schedule,
            routes,
            events,
            console,
            devices: Mutex::new(devices),
            device_deadline: AtomicU64::new(NEVER),
            input: AtomicBool::new(false),
            latest_read: AtomicU64::new(0),
        }
    }

    /// Calls `f` with the devices on behalf of vCPU `i`, at its time `at`.
    pub fn with_devices<R>(&self, i: usize, at: u64, f: impl FnOnce(&mut Devices, &mut Out<'_>) -> R) -> R {
        let mut devices = lock(&self.devices);
        let result = f(&mut devices, &mut Out { wiring: self, at: Some(at) });
        let deadline = devices.next_deadline_ns().unwrap_or(NEVER);
        drop(devices);
        let before = self.device_deadline.swap(deadline, SeqCst);
        if deadline < before && i != KEEPER {
            // The keeper may sleep beyond it.
            self.schedule.wake(KEEPER, Some(at));
        }
        result
    }

    /// When the keeper has to call [`Wiring::keep`].
    pub fn device_deadline(&self) -> Option<u64> {
        Some(self.device_deadline.load(SeqCst)).filter(|d| *d != NEVER)
    }

    /// What the keeper does between runs: device timers that expired, and console input.
    pub fn keep(&self, now: u64) {
        let input = self.input.swap(false, SeqCst);
        if input || self.device_deadline.load(SeqCst) <= now {
            self.with_devices(KEEPER, now, |devices, out| {
                devices.advance(now, out);
                self.feed(devices, out);
            });
        }
    }

    /// Moves queued console input into the serial device, as far as it has room.
    pub fn feed(&self, devices: &mut Devices, out: &mut Out<'_>) {
        let room = devices.console_room();
        if room > 0 {
            let bytes = self.console.take_input(room);
            if !bytes.is_empty() {
                devices.console_input(&bytes, out);
            }
        }
    }

    pub fn input_queued(&self) {
        self.input.store(true, SeqCst);
        self.schedule.wake(KEEPER, None);
    }

    /// Delivers a message to the processors that it addresses, and wakes them. `sender` is the vCPU whose local
    /// APIC sent it, `at` its time.
    pub fn deliver(&self, message: &IpiMessage, sender: Option<usize>, at: Option<u64>, routes: &mut RouteCache) {
        self.routes.refresh(routes);
        let from = |i: usize| match sender.and_then(|s| Some((s, routes.map.get(s)?))) {
            Some((s, own)) => Sender::Apic { x2apic: own.x2apic, receiver: s == i },
            None => Sender::Outside,
        };
        if message.delivery == Delivery::LowestPriority {
            let candidates = routes.map.iter().enumerate().map(|(i, apic)| (i, apic, from(i)));
            if let Some(i) = arbitrate_lowest_priority(message.vector, &message.destination, candidates) {
                self.mailboxes[i].post_interrupt(message.vector, message.level);
                self.schedule.wake(i, at);
            }
            return;
        }
        for (i, apic) in routes.map.iter().enumerate() {
            if apic.accepts(&message.destination, from(i)) {
                self.deliver_to(i, message, at);
            }
        }
    }

    fn deliver_to(&self, i: usize, message: &IpiMessage, at: Option<u64>) {
        let injection = match message.delivery {
            Delivery::Fixed | Delivery::LowestPriority => {
                self.mailboxes[i].post_interrupt(message.vector, message.level);
                self.schedule.wake(i, at);
                return;
            }
            Delivery::Init => Injection::Init,
            Delivery::StartUp => Injection::Sipi { vector: message.vector },
            Delivery::Nmi => Injection::Nmi,
            // No SMM (R3); a de-assert is ignored (R12); ExtINT reaches processors by the INTR line only.
            Delivery::Smi | Delivery::InitDeassert | Delivery::ExtInt => return,
        };
        self.post(i, injection, message.cause, at);
    }

    /// Posts to one mailbox. What the sender can see of its fate is recorded here; the rest is the receiver's.
    fn post(&self, i: usize, injection: Injection, cause: u64, at: Option<u64>) -> Disposition {
        let mailbox = &self.mailboxes[i];
        let posted = match injection {
            Injection::Init => mailbox.post_init(cause),
            Injection::Sipi { vector } => mailbox.post_sipi(vector, cause),
            Injection::Nmi => mailbox.post_nmi(cause),
        };
        let fate = match posted {
            Posted::Latched => Fate::Latched,
            Posted::Coalesced => Fate::Coalesced,
            Posted::Overwrote { previous_cause_low } => {
                Fate::Overwrote { previous_cause: self.events.expand_cause(previous_cause_low) }
            }
        };
        if fate != Fate::Latched {
            self.record(i, injection, fate, cause, at);
        }
        self.schedule.wake(i, at);
        fate.into()
    }

    fn record(&self, i: usize, injection: Injection, fate: Fate, cause: u64, at: Option<u64>) {
        let detail = match injection {
            Injection::Init => Detail::Init(fate),
            Injection::Sipi { vector } => Detail::Sipi { vector, fate },
            Injection::Nmi => Detail::Nmi(fate),
        };
        let at = at.unwrap_or_else(|| self.schedule.now());
        self.events.record_outside(i as u32, at, cause, self.events.last_at(i as u32), What::Processor(detail));
    }

    /// A client's injection.
    pub fn inject(&self, i: usize, injection: Injection, cause: u64) -> Disposition {
        let enabled = self.routes.cache().map.get(i).is_some_and(|apic| apic.enabled);
        if enabled {
            self.post(i, injection, cause, None)
        } else {
            self.record(i, injection, Fate::Dropped(Rule::R22), cause, None);
            Disposition::Dropped(Rule::R22)
        }
    }

    /// vCPU `i` sent a message that others have to take in time.
    pub fn tighten(&self, i: usize, now: u64) {
        if self.mailboxes.len() > 1 {
            self.schedule.tighten(i, now);
            for mailbox in &self.mailboxes {
                mailbox.call(attention::STOP);
            }
        }
    }

    /// The machine after RESET; all vCPUs have gone through theirs.
    pub fn reset(&self) {
        for mailbox in &self.mailboxes {
            mailbox.take_events();
            mailbox.take_interrupts();
            mailbox.answer(u32::MAX);
        }
        let mut devices = lock(&self.devices);
        devices.reset(&mut Out { wiring: self, at: None });
        self.device_deadline.store(devices.next_deadline_ns().unwrap_or(NEVER), SeqCst);
        self.schedule.reset();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::emulated::schedule::Parallel;
    use crate::machine::MachineConfig;
    use nested_vmx::bus::Destination;
    use nested_vmx::mailbox::PostedSipi;

    fn wiring(cpus: u32) -> Wiring {
        let wakes: Vec<_> = (0..cpus).map(|_| Arc::default()).collect();
        let counters = (0..cpus).map(|_| Arc::default()).collect();
        let identity =
            |id| ApicIdentity { id, enabled: true, software_enabled: true, flat: true, ..Default::default() };
        let config = MachineConfig { cpus, memory_bytes: 2 << 20, testdev: true, epoch_s: 0 };
        Wiring::new(
            Arc::new(Ram::new(2 << 20).unwrap()),
            (0..cpus).map(|_| Arc::default()).collect(),
            Arc::new(Parallel::new(wakes)),
            Routes::new((0..cpus).map(identity).collect()),
            Events::new(counters, Arc::default()),
            Arc::new(Console::new(Arc::default())),
            Devices::new(config),
        )
    }

    fn message(delivery: Delivery, vector: u8, destination: Destination) -> IpiMessage {
        IpiMessage { delivery, vector, destination, level: false, cause: 9 }
    }

    #[test]
    fn a_message_reaches_exactly_those_that_it_addresses() {
        let w = wiring(3);
        let mut routes = w.routes.cache();
        w.deliver(&message(Delivery::StartUp, 0x10, Destination::Physical(1)), Some(0), Some(5), &mut routes);
        let sipi = |i: usize| w.mailboxes[i].take_events().sipi;
        assert_eq!([sipi(0), sipi(1), sipi(2)], [None, Some(PostedSipi { vector: 0x10, cause_low: 9 }), None]);
        w.deliver(&message(Delivery::Init, 0, Destination::AllExcludingSelf), Some(1), Some(5), &mut routes);
        let init = |i: usize| w.mailboxes[i].take_events().init;
        assert_eq!([init(0), init(1), init(2)], [Some(9), None, Some(9)]);
        w.deliver(&message(Delivery::InitDeassert, 0, Destination::AllIncludingSelf), Some(1), Some(5), &mut routes);
        assert_eq!([init(0), init(1), init(2)], [None; 3], "R12: a de-assert is ignored");
    }

    #[test]
    fn a_new_identity_is_seen_by_those_who_kept_the_old_map() {
        let w = wiring(2);
        let mut kept = w.routes.cache();
        w.routes.publish(1, ApicIdentity { id: 7, x2apic: true, enabled: true, ..Default::default() });
        w.deliver(&message(Delivery::Nmi, 0, Destination::Physical(7)), Some(0), None, &mut kept);
        assert_eq!(w.mailboxes[1].take_events().nmi, Some(9));
    }

    #[test]
    fn r22_an_injection_into_a_globally_disabled_apic_is_dropped_and_recorded() {
        let w = wiring(1);
        w.routes.publish(0, ApicIdentity { enabled: false, ..Default::default() });
        assert_eq!(w.inject(0, Injection::Init, 3), Disposition::Dropped(Rule::R22));
        assert!(w.mailboxes[0].peek_events().is_empty());
        let events = w.events.read(1, 10).events;
        assert_eq!(events[0].what, What::Processor(Detail::Init(Fate::Dropped(Rule::R22))));
        assert_eq!((events[0].cause, events[0].vcpu), (3, 0));
    }

    #[test]
    fn r12_a_sipi_that_overwrites_another_says_which() {
        let w = wiring(1);
        let (first, second) = (w.events.new_cause(), w.events.new_cause());
        assert_eq!(w.inject(0, Injection::Sipi { vector: 1 }, first), Disposition::Latched);
        let overwrote = w.inject(0, Injection::Sipi { vector: 2 }, second);
        assert_eq!(overwrote, Disposition::Overwrote { previous_cause: first });
        assert_eq!(w.inject(0, Injection::Nmi, 5), Disposition::Latched);
        assert_eq!(w.inject(0, Injection::Nmi, 6), Disposition::Coalesced);
    }
}
