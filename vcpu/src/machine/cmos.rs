//! CMOS memory and the clock in it (MC146818), at 0x70 and 0x71: memory sizes where firmware leaves them, and the
//! time. It gives no interrupts, and the clock cannot be set.

use serde::{Deserialize, Serialize};

use super::{LOW_RAM_END_GPA, MachineConfig};

const STATUS_A: u8 = 0x0a;
const STATUS_B: u8 = 0x0b;
const STATUS_C: u8 = 0x0c;
const STATUS_D: u8 = 0x0d;
const CENTURY: u8 = 0x32;
const UPDATE_IN_PROGRESS: u8 = 0x80;
/// 32768 Hz, 1024 Hz periodic rate.
const STATUS_A_RESET: u8 = 0x26;
const BINARY: u8 = 1 << 2;
const HOURS_24: u8 = 1 << 1;
const VALID: u8 = 0x80;

const NS_PER_S: u64 = 1_000_000_000;
/// From the announcement of an update to its end (data sheet: 244 us before it, and 1984 us).
const UPDATE_NS: u64 = 2_228_000;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Cmos {
    epoch_s: u64,
    index: u8,
    /// 128 bytes.
    memory: Vec<u8>,
}

impl Cmos {
    pub(super) fn new(config: &MachineConfig) -> Self {
        let mut memory = vec![0; 128];
        let mut put16 = |at: usize, value: u64| {
            memory[at..at + 2].copy_from_slice(&(value.min(0xffff) as u16).to_le_bytes());
        };
        let low = config.memory_bytes.min(LOW_RAM_END_GPA);
        put16(0x15, 640);
        put16(0x17, low.saturating_sub(1 << 20) >> 10);
        put16(0x30, low.saturating_sub(1 << 20) >> 10);
        put16(0x34, low.saturating_sub(16 << 20) >> 16);
        let high = config.memory_bytes - low;
        memory[0x5b..0x5e].copy_from_slice(&(high >> 16).to_le_bytes()[..3]);
        memory[0x5f] = config.cpus.saturating_sub(1) as u8;
        memory[usize::from(STATUS_A)] = STATUS_A_RESET;
        memory[usize::from(STATUS_B)] = HOURS_24;
        Self { epoch_s: config.epoch_s, index: 0, memory }
    }

    pub(super) fn select(&mut self, value: u8) {
        // Bit 7 masks NMIs, of which there are none from this machine.
        self.index = value & 0x7f;
    }

    pub(super) fn write(&mut self, value: u8) {
        match self.index {
            0..=9 | CENTURY | STATUS_C | STATUS_D => {}
            STATUS_A => self.memory[usize::from(STATUS_A)] = value & !UPDATE_IN_PROGRESS,
            // 128 entries and an index of 7 bits; a restored state may be shorter.
            i => {
                if let Some(byte) = self.memory.get_mut(usize::from(i)) {
                    *byte = value;
                }
            }
        }
    }

    pub(super) fn read(&self, now_ns: u64) -> u8 {
        let stored = self.memory.get(usize::from(self.index)).copied().unwrap_or(0);
        let now = Time::from_unix(self.epoch_s.saturating_add(now_ns / NS_PER_S));
        let value = match self.index {
            0 => now.second,
            2 => now.minute,
            4 => return self.hour(now.hour),
            6 => now.weekday,
            7 => now.day,
            8 => now.month,
            9 => (now.year % 100) as u8,
            CENTURY => (now.year / 100) as u8,
            STATUS_A if now_ns % NS_PER_S >= NS_PER_S - UPDATE_NS => return stored | UPDATE_IN_PROGRESS,
            STATUS_C => return 0,
            STATUS_D => return VALID,
            _ => return stored,
        };
        self.encode(value)
    }

    fn status_b(&self) -> u8 {
        self.memory.get(usize::from(STATUS_B)).copied().unwrap_or(HOURS_24)
    }

    fn encode(&self, value: u8) -> u8 {
        if self.status_b() & BINARY != 0 { value } else { (value / 10 % 10) << 4 | (value % 10) }
    }

    fn hour(&self, hour: u8) -> u8 {
        if self.status_b() & HOURS_24 != 0 {
            return self.encode(hour);
        }
        let pm = if hour >= 12 { 0x80 } else { 0 };
        self.encode((hour + 11) % 12 + 1) | pm
    }
}

struct Time {
    year: u64,
    month: u8,
    day: u8,
    /// 1 is Sunday.
    weekday: u8,
    hour: u8,
    minute: u8,
    second: u8,
}

impl Time {
    /// The proleptic Gregorian calendar in years that begin in March, so that leap days come last.
    fn from_unix(seconds: u64) -> Self {
        let (days, second_of_day) = (seconds / 86_400, seconds % 86_400);
        // Days since 0000-03-01.
        let shifted = days + 719_468;
        let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
        let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let march_month = (5 * day_of_year + 2) / 153;
        let month = if march_month < 10 { march_month + 3 } else { march_month - 9 };
        Self {
            year: era * 400 + year_of_era + u64::from(month <= 2),
            month: month as u8,
            day: (day_of_year - (153 * march_month + 2) / 5 + 1) as u8,
            weekday: ((days + 4) % 7 + 1) as u8,
            hour: (second_of_day / 3600) as u8,
            minute: (second_of_day / 60 % 60) as u8,
            second: (second_of_day % 60) as u8,
        }
    }
}
