//! The 8254 timer (Intel 8254 data sheet) and port 0x61. Counts are worked out from guest time when someone looks.
//! BCD counting is accepted and counts in binary: kernels do not use it.

use serde::{Deserialize, Serialize};

pub const PIT_HZ: u64 = 1_193_182;
pub(super) const PIT_IRQ: u8 = 0;
const NS_PER_S: u128 = 1_000_000_000;
/// Bit 4 of port 0x61 toggles with each DRAM refresh.
const REFRESH_NS: u64 = 15_085;

fn ticks(ns: u64) -> u64 {
    (u128::from(ns) * u128::from(PIT_HZ) / NS_PER_S) as u64
}

/// The first nanosecond at which `ticks` have passed.
fn ns(ticks: u64) -> u64 {
    (u128::from(ticks) * NS_PER_S).div_ceil(u128::from(PIT_HZ)).min(u64::MAX.into()) as u64
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Mode {
    TerminalCount,
    OneShot,
    Rate,
    Square,
    SoftwareStrobe,
    HardwareStrobe,
}

impl Mode {
    fn from_bits(bits: u8) -> Self {
        match bits & 7 {
            0 => Self::TerminalCount,
            1 => Self::OneShot,
            2 | 6 => Self::Rate,
            3 | 7 => Self::Square,
            4 => Self::SoftwareStrobe,
            _ => Self::HardwareStrobe,
        }
    }

    /// The gate starts it, not the count.
    fn gate_triggered(self) -> bool {
        matches!(self, Self::OneShot | Self::HardwareStrobe)
    }

    fn periodic(self) -> bool {
        matches!(self, Self::Rate | Self::Square)
    }
}

/// How counts are read and written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Access {
    Low,
    High,
    LowThenHigh,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Clocking {
    /// No count was loaded, or it waits for its trigger.
    Idle,
    /// The gate holds it, after this many ticks.
    Held {
        ticks: u64,
    },
    Running {
        start_ns: u64,
    },
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Channel {
    mode: Mode,
    access: Access,
    bcd: bool,
    gate: bool,
    /// 1 to 65536.
    reload: u32,
    loaded: bool,
    clocking: Clocking,
    written_low: Option<u8>,
    read_high_next: bool,
    latched_count: Option<u16>,
    latched_status: Option<u8>,
    /// Rising edges of the output up to this tick were taken.
    taken_ticks: u64,
}

impl Channel {
    fn new(gate: bool) -> Self {
        Self {
            mode: Mode::TerminalCount,
            access: Access::LowThenHigh,
            bcd: false,
            gate,
            reload: 0x1_0000,
            loaded: false,
            clocking: Clocking::Idle,
            written_low: None,
            read_high_next: false,
            latched_count: None,
            latched_status: None,
            taken_ticks: 0,
        }
    }

    fn elapsed(&self, now_ns: u64) -> Option<u64> {
        match self.clocking {
            Clocking::Idle => None,
            Clocking::Held { ticks } => Some(ticks),
            Clocking::Running { start_ns } => Some(ticks(now_ns.saturating_sub(start_ns))),
        }
    }

    fn period(&self) -> u64 {
        u64::from(self.reload.max(1))
    }

    fn count(&self, now_ns: u64) -> u16 {
        let (n, Some(ticks)) = (self.period(), self.elapsed(now_ns)) else { return self.reload as u16 };
        let count = match self.mode {
            Mode::Rate => n - ticks % n,
            // Counts by two, twice through a period.
            Mode::Square => (n - (2 * (ticks % n)) % n) & !1,
            _ => n.wrapping_sub(ticks),
        };
        count as u16
    }

    fn output(&self, now_ns: u64) -> bool {
        let (n, Some(ticks)) = (self.period(), self.elapsed(now_ns)) else {
            return self.mode != Mode::TerminalCount;
        };
        match self.mode {
            Mode::TerminalCount | Mode::OneShot => ticks >= n,
            Mode::Rate => !self.gate || ticks % n != n - 1,
            Mode::Square => !self.gate || ticks % n < n.div_ceil(2),
            Mode::SoftwareStrobe | Mode::HardwareStrobe => ticks != n,
        }
    }

    /// The next tick at which the output rises, after those taken.
    fn next_edge_tick(&self) -> Option<u64> {
        let n = self.period();
        if self.mode.periodic() {
            return Some((self.taken_ticks / n).saturating_add(1).saturating_mul(n));
        }
        // The strobes are low for one tick.
        let edge = match self.mode {
            Mode::SoftwareStrobe | Mode::HardwareStrobe => n + 1,
            _ => n,
        };
        (self.taken_ticks < edge).then_some(edge)
    }

    fn deadline_ns(&self) -> Option<u64> {
        let Clocking::Running { start_ns } = self.clocking else { return None };
        Some(start_ns.saturating_add(ns(self.next_edge_tick()?)))
    }

    /// Whether the output rose, at least once.
    fn take_edges(&mut self, now_ns: u64) -> bool {
        if self.deadline_ns().is_none_or(|d| d > now_ns) {
            return false;
        }
        self.taken_ticks = self.elapsed(now_ns).unwrap_or(0);
        true
    }

    fn control(&mut self, value: u8, now_ns: u64) {
        let access = match value >> 4 & 3 {
            0 => {
                self.latch_count(now_ns);
                return;
            }
            1 => Access::Low,
            2 => Access::High,
            _ => Access::LowThenHigh,
        };
        let mode = Mode::from_bits(value >> 1);
        *self = Self { access, mode, bcd: value & 1 != 0, reload: self.reload, ..Self::new(self.gate) };
    }

    fn latch_count(&mut self, now_ns: u64) {
        if self.latched_count.is_none() {
            self.latched_count = Some(self.count(now_ns));
        }
    }

    fn latch_status(&mut self, now_ns: u64) {
        let mode = match self.mode {
            Mode::TerminalCount => 0,
            Mode::OneShot => 1,
            Mode::Rate => 2,
            Mode::Square => 3,
            Mode::SoftwareStrobe => 4,
            Mode::HardwareStrobe => 5,
        };
        let access = match self.access {
            Access::Low => 1,
            Access::High => 2,
            Access::LowThenHigh => 3,
        };
        let output = u8::from(self.output(now_ns));
        let status = output << 7 | u8::from(!self.loaded) << 6 | access << 4 | mode << 1 | u8::from(self.bcd);
        self.latched_status.get_or_insert(status);
    }

    fn write(&mut self, value: u8, now_ns: u64) {
        let count = match (self.access, self.written_low.take()) {
            (Access::Low, _) => u32::from(value),
            (Access::High, _) => u32::from(value) << 8,
            (Access::LowThenHigh, None) => {
                self.written_low = Some(value);
                // In mode 0 the first byte stops the count.
                if self.mode == Mode::TerminalCount {
                    self.clocking = Clocking::Idle;
                }
                return;
            }
            (Access::LowThenHigh, Some(low)) => u32::from(value) << 8 | u32::from(low),
        };
        self.reload = if count == 0 { 0x1_0000 } else { count };
        self.loaded = true;
        if !self.mode.gate_triggered() {
            self.start(now_ns);
        }
    }

    fn start(&mut self, now_ns: u64) {
        self.taken_ticks = 0;
        self.clocking = match self.gate || self.mode.gate_triggered() {
            true => Clocking::Running { start_ns: now_ns },
            false => Clocking::Held { ticks: 0 },
        };
    }

    fn read(&mut self, now_ns: u64) -> u8 {
        if let Some(status) = self.latched_status.take() {
            return status;
        }
        let count = self.latched_count.unwrap_or_else(|| self.count(now_ns));
        let high = match self.access {
            Access::Low => false,
            Access::High => true,
            Access::LowThenHigh => {
                self.read_high_next = !self.read_high_next;
                !self.read_high_next
            }
        };
        if self.access != Access::LowThenHigh || high {
            self.latched_count = None;
        }
        if high { (count >> 8) as u8 } else { count as u8 }
    }

    fn set_gate(&mut self, gate: bool, now_ns: u64) {
        if gate == self.gate {
            return;
        }
        self.gate = gate;
        match (gate, self.mode) {
            (true, Mode::TerminalCount | Mode::SoftwareStrobe) => {
                if let Clocking::Held { ticks } = self.clocking {
                    self.clocking = Clocking::Running { start_ns: now_ns.saturating_sub(ns(ticks)) };
                }
            }
            // Triggered by the gate: starts, or starts over.
            (true, _) if self.loaded => self.start(now_ns),
            (false, Mode::OneShot | Mode::HardwareStrobe) => {}
            (false, _) => {
                if let Clocking::Running { .. } = self.clocking {
                    self.clocking = Clocking::Held { ticks: self.elapsed(now_ns).unwrap_or(0) };
                }
            }
            _ => {}
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PitState {
    channels: [Channel; 3],
    speaker: bool,
}

impl PitState {
    pub(super) fn new() -> Self {
        Self { channels: [Channel::new(true), Channel::new(true), Channel::new(false)], speaker: false }
    }

    pub(super) fn read(&mut self, port: u16, now_ns: u64) -> u8 {
        match port {
            0x40..=0x42 => self.channels[usize::from(port - 0x40)].read(now_ns),
            0x61 => {
                let c2 = &self.channels[2];
                let refresh = !(now_ns / REFRESH_NS).is_multiple_of(2);
                u8::from(c2.gate)
                    | u8::from(self.speaker) << 1
                    | u8::from(refresh) << 4
                    | u8::from(c2.output(now_ns)) << 5
            }
            _ => 0,
        }
    }

    pub(super) fn write(&mut self, port: u16, value: u8, now_ns: u64) {
        match port {
            0x40..=0x42 => self.channels[usize::from(port - 0x40)].write(value, now_ns),
            0x43 if value >> 6 == 3 => {
                for (i, channel) in self.channels.iter_mut().enumerate() {
                    if value & 2 << i != 0 {
                        if value & 0x20 == 0 {
                            channel.latch_count(now_ns);
                        }
                        if value & 0x10 == 0 {
                            channel.latch_status(now_ns);
                        }
                    }
                }
            }
            0x43 => self.channels[usize::from(value >> 6)].control(value, now_ns),
            0x61 => {
                self.speaker = value & 2 != 0;
                self.channels[2].set_gate(value & 1 != 0, now_ns);
            }
            _ => {}
        }
    }

    /// Whether channel 0 raised its interrupt since the last call. Several at once are one, as in an IRR.
    pub(super) fn advance(&mut self, now_ns: u64) -> bool {
        self.channels[0].take_edges(now_ns)
    }

    pub(super) fn next_deadline_ns(&self) -> Option<u64> {
        self.channels[0].deadline_ns()
    }
}
