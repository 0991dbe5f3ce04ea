//! The world as one processor sees it.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};

use nested_vmx::apic::ApicIdentity;
use nested_vmx::bus::{Bus, BusFlow, Delivery, IpiMessage};
use nested_vmx::event::{Detail, Event, EventKind, VmxMode};
use nested_vmx::mailbox::attention;

use super::wiring::{RouteCache, Wiring};
use crate::engine::RunOutcome;
use crate::event::EventWriter;
use crate::machine::Outcome;
use crate::thread::lock;
use crate::vm::GuestExit;

/// COM1's first port: a read may make room for input.
const SERIAL_DATA: u16 = 0x3f8;
/// Instructions that a processor runs in a nanosecond of the host's clock, at most: how far it runs before it
/// looks at a deadline again.
const PER_HOST_NS: u64 = 1;

/// What a vCPU's bus and its run loop share; both are on one thread.
#[derive(Default)]
pub struct Desk {
    /// VM time less retired instructions (wrapping): what the vCPU was moved forward by.
    pub offset: AtomicU64,
    /// Something happened that an observer may ask for.
    pub news: AtomicBool,
    /// What the guest asked of the VM.
    outcome: Mutex<Option<RunOutcome>>,
}

impl Desk {
    pub fn take_outcome(&self) -> Option<RunOutcome> {
        lock(&self.outcome).take()
    }
}

pub struct MachineBus {
    i: usize,
    wiring: Arc<Wiring>,
    desk: Arc<Desk>,
    events: EventWriter,
    routes: RouteCache,
    /// Guest time is the host's.
    realtime: bool,
    /// Where the processor stood when it last said so.
    retired: u64,
}

impl MachineBus {
    pub fn new(i: usize, wiring: Arc<Wiring>, desk: Arc<Desk>, events: EventWriter, realtime: bool) -> Self {
        let routes = wiring.routes.cache();
        Self { i, wiring, desk, events, routes, realtime, retired: 0 }
    }

    fn now(&self) -> u64 {
        match self.realtime {
            true => self.wiring.schedule.now(),
            false => self.retired.wrapping_add(self.desk.offset.load(Relaxed)),
        }
    }

    fn flow(&self, outcome: Outcome) -> BusFlow {
        let outcome = match outcome {
            Outcome::Continue => return BusFlow::Continue,
            Outcome::Exit(code) => RunOutcome::GuestExit(GuestExit { code }),
            Outcome::PowerOff => RunOutcome::PowerOff,
            Outcome::Reset => RunOutcome::GuestReset,
        };
        lock(&self.desk.outcome).get_or_insert(outcome);
        BusFlow::Stop
    }

    /// Leave the run at the next boundary.
    fn stop(&self) {
        self.wiring.mailboxes[self.i].call(attention::STOP);
    }
}

impl Bus for MachineBus {
    fn stand_at(&mut self, retired: u64) {
        self.retired = retired;
    }

    fn io_read(&mut self, port: u16, size: u8) -> u32 {
        let now = self.now();
        self.wiring.with_devices(self.i, now, |devices, out| {
            let value = devices.io_read(port, size, now, out);
            if port == SERIAL_DATA {
                self.wiring.feed(devices, out);
            }
            value
        })
    }

    fn io_write(&mut self, port: u16, size: u8, value: u32) -> BusFlow {
        let now = self.now();
        let outcome =
            self.wiring.with_devices(self.i, now, |devices, out| devices.io_write(port, size, value, now, out));
        self.flow(outcome)
    }

    fn mmio_read(&mut self, gpa: u64, size: u8) -> u64 {
        let now = self.now();
        self.wiring.with_devices(self.i, now, |devices, _| devices.mmio_read(gpa, size))
    }

    fn mmio_write(&mut self, gpa: u64, _size: u8, value: u64) -> BusFlow {
        let now = self.now();
        self.wiring.with_devices(self.i, now, |devices, out| devices.mmio_write(gpa, value, out));
        BusFlow::Continue
    }

    fn acknowledge_extint(&mut self) -> Option<u8> {
        let now = self.now();
        self.wiring.with_devices(self.i, now, |devices, out| devices.acknowledge_extint(out))
    }

    fn send_ipi(&mut self, message: IpiMessage) {
        let now = self.now();
        self.wiring.deliver(&message, Some(self.i), Some(now), &mut self.routes);
        if matches!(message.delivery, Delivery::Init | Delivery::StartUp) {
            self.wiring.tighten(self.i, now);
        }
    }

    fn eoi_broadcast(&mut self, vector: u8) {
        let now = self.now();
        self.wiring.with_devices(self.i, now, |devices, out| devices.eoi_broadcast(vector, out));
    }

    fn apic_changed(&mut self, identity: ApicIdentity) {
        self.wiring.routes.publish(self.i, identity);
    }

    fn tsc(&mut self, retired: u64) -> u64 {
        self.retired = retired;
        self.now()
    }

    /// A vCPU that is behind one that has read the time goes forward to there, with its timers.
    fn read_tsc(&mut self, retired: u64) -> u64 {
        let own = self.tsc(retired);
        let latest = self.wiring.latest_read.fetch_max(own, Relaxed);
        if self.realtime || latest <= own {
            return own;
        }
        self.desk.offset.fetch_add(latest - own, Relaxed);
        // What was to happen in so many instructions happens sooner.
        self.wiring.mailboxes[self.i].call(attention::INTERRUPTS);
        latest
    }

    fn instructions_until(&mut self, retired: u64, deadline_tsc: u64) -> u64 {
        let left = deadline_tsc.saturating_sub(self.tsc(retired));
        if self.realtime { left.saturating_mul(PER_HOST_NS) } else { left }
    }

    fn new_cause(&mut self) -> u64 {
        self.wiring.events.new_cause()
    }

    fn expand_cause(&mut self, low: u32) -> u64 {
        self.wiring.events.expand_cause(low)
    }

    /// Every kind is counted, so every kind is wanted; the writer decides what is recorded.
    fn wants(&self, _kind: EventKind) -> bool {
        true
    }

    fn event(&mut self, event: Event) {
        self.retired = event.retired;
        let now = self.now();
        if self.events.record(now, event.cause, event.mode, event.detail) {
            self.desk.news.store(true, Relaxed);
            self.stop();
        }
        if event.detail == Detail::TripleFault && event.mode != VmxMode::NonRoot {
            // A PC's chipset would reset the machine; what led here is worth more than another boot.
            lock(&self.desk.outcome).get_or_insert(RunOutcome::Failed(format!("vCPU {}: triple fault", self.i)));
            self.stop();
        }
    }

    fn exclusive(&mut self, f: &mut dyn FnMut()) {
        self.wiring.gate.alone(self.i, f);
    }
}
