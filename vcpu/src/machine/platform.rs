//! Port devices without interrupt controllers and timers: both engines use them.

use serde::{Deserialize, Serialize};

use super::cmos::Cmos;
use super::fw_cfg::{self, FwCfg};
use super::serial::{Com1, InvalidSerialState, SERIAL_PORT, SerialState};
use super::{Lines, MachineConfig, Outcome};

const SERIAL_LAST: u16 = SERIAL_PORT + 7;
const KEYBOARD_DATA: u16 = 0x60;
const KEYBOARD_COMMAND: u16 = 0x64;
const CMOS_INDEX: u16 = 0x70;
const CMOS_DATA: u16 = 0x71;
const SYSTEM_CONTROL_A: u16 = 0x92;
const PCI_FIRST: u16 = 0xcf8;
const RESET_CONTROL: u16 = 0xcf9;
const PCI_LAST: u16 = 0xcff;
/// isa-debug-exit.
const DEBUG_EXIT_FIRST: u16 = 0xf4;
const DEBUG_EXIT_LAST: u16 = 0xf7;
/// A write drives the interrupt line of that number, as QEMU's testdev does.
const TEST_IRQ_FIRST: u16 = 0x2000;
const TEST_IRQ_LAST: u16 = 0x2017;
/// Writing this word here, byte by byte, powers off (Bochs, QEMU).
const SHUTDOWN_PORT: u16 = 0x8900;
const SHUTDOWN: &[u8] = b"Shutdown";

/// The A20 gate is always open.
const A20: u8 = 2;

#[derive(Debug)]
pub struct Platform {
    config: MachineConfig,
    serial: Com1,
    registers: Registers,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Registers {
    cmos: Cmos,
    fw_cfg: FwCfg,
    reset_control: u8,
    system_control_a: u8,
    /// The keyboard controller waits for the byte of "write output port".
    output_port_next: bool,
    /// How much of the shutdown word was written.
    shutdown_matched: u8,
}

/// A snapshot of [`Platform`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlatformState {
    config: MachineConfig,
    serial: SerialState,
    registers: Registers,
}

/// Accesses to 8-bit devices that are wider go to consecutive ports.
pub(super) fn read_bytes(port: u16, size: u8, mut read: impl FnMut(u16) -> u8) -> u32 {
    (0..size.min(4)).fold(0, |value, i| value | u32::from(read(port.wrapping_add(i.into()))) << (8 * i))
}

/// All bytes are written; what the first says that asks for anything counts.
pub(super) fn write_bytes(port: u16, size: u8, value: u32, mut write: impl FnMut(u16, u8) -> Outcome) -> Outcome {
    (0..size.min(4)).fold(Outcome::Continue, |outcome, i| {
        let new = write(port.wrapping_add(i.into()), (value >> (8 * i)) as u8);
        if outcome == Outcome::Continue { new } else { outcome }
    })
}

impl Platform {
    pub fn new(config: MachineConfig) -> Self {
        let registers = Registers {
            cmos: Cmos::new(&config),
            fw_cfg: FwCfg::default(),
            reset_control: 0,
            system_control_a: A20,
            output_port_next: false,
            shutdown_matched: 0,
        };
        Self { config, serial: Com1::new(), registers }
    }

    pub fn reset(&mut self) {
        *self = Self::new(self.config);
    }

    pub fn config(&self) -> &MachineConfig {
        &self.config
    }

    /// Ports where the width of the access means something.
    pub(super) fn is_wide(port: u16) -> bool {
        matches!(
            port,
            PCI_FIRST..=PCI_LAST
                | DEBUG_EXIT_FIRST..=DEBUG_EXIT_LAST
                | TEST_IRQ_FIRST..=TEST_IRQ_LAST
                | fw_cfg::SELECTOR..=fw_cfg::DATA
        )
    }

    pub fn io_read(&mut self, port: u16, size: u8, now_ns: u64) -> u32 {
        if !Self::is_wide(port) {
            return read_bytes(port, size, |port| self.read_byte(port, now_ns));
        }
        match port {
            RESET_CONTROL if size == 1 => self.registers.reset_control.into(),
            fw_cfg::DATA if size == 1 && self.config.testdev => self.registers.fw_cfg.read(&self.config).into(),
            // No PCI.
            _ => u32::MAX >> (32 - 8 * u32::from(size.clamp(1, 4))),
        }
    }

    pub fn io_write(&mut self, port: u16, size: u8, value: u32, lines: &mut impl Lines) -> Outcome {
        match port {
            DEBUG_EXIT_FIRST..=DEBUG_EXIT_LAST if self.config.testdev => {
                let mask = u32::MAX >> (32 - 8 * u32::from(size.clamp(1, 4)));
                return Outcome::Exit(value & mask);
            }
            TEST_IRQ_FIRST..=TEST_IRQ_LAST if self.config.testdev => {
                lines.set_irq((port - TEST_IRQ_FIRST) as u8, value != 0);
            }
            fw_cfg::SELECTOR if size == 2 && self.config.testdev => self.registers.fw_cfg.select(value as u16),
            RESET_CONTROL if size == 1 => {
                let value = value as u8;
                let rising = value & !self.registers.reset_control & 4 != 0;
                self.registers.reset_control = value & 0xe;
                if rising {
                    return Outcome::Reset;
                }
            }
            _ if Self::is_wide(port) => {}
            _ => return write_bytes(port, size, value, |port, byte| self.write_byte(port, byte, lines)),
        }
        Outcome::Continue
    }

    pub(super) fn read_byte(&mut self, port: u16, now_ns: u64) -> u8 {
        match port {
            SERIAL_PORT..=SERIAL_LAST => self.serial.read((port - SERIAL_PORT) as u8),
            CMOS_DATA => self.registers.cmos.read(now_ns),
            // Neither input nor output is waiting, and no keyboard answers.
            KEYBOARD_DATA | KEYBOARD_COMMAND => 0,
            SYSTEM_CONTROL_A => self.registers.system_control_a,
            _ => 0xff,
        }
    }

    pub(super) fn write_byte(&mut self, port: u16, value: u8, lines: &mut impl Lines) -> Outcome {
        let r = &mut self.registers;
        match port {
            SERIAL_PORT..=SERIAL_LAST => self.serial.write((port - SERIAL_PORT) as u8, value, lines),
            CMOS_INDEX => r.cmos.select(value),
            CMOS_DATA => r.cmos.write(value),
            // Bit 0 of the controller's output port is the reset line, active low.
            KEYBOARD_COMMAND if value >= 0xf0 && value & 1 == 0 => return Outcome::Reset,
            KEYBOARD_COMMAND => r.output_port_next = value == 0xd1,
            KEYBOARD_DATA if std::mem::take(&mut r.output_port_next) && value & 1 == 0 => return Outcome::Reset,
            SYSTEM_CONTROL_A if value & 1 != 0 => return Outcome::Reset,
            SYSTEM_CONTROL_A => r.system_control_a = value | A20,
            SHUTDOWN_PORT => {
                let next = usize::from(r.shutdown_matched);
                r.shutdown_matched = match SHUTDOWN.get(next) {
                    Some(&expected) if expected == value => r.shutdown_matched + 1,
                    _ => u8::from(value == SHUTDOWN[0]),
                };
                if usize::from(r.shutdown_matched) == SHUTDOWN.len() {
                    r.shutdown_matched = 0;
                    return Outcome::PowerOff;
                }
            }
            _ => {}
        }
        Outcome::Continue
    }

    /// How many bytes of console input the serial device has room for.
    pub fn console_room(&self) -> usize {
        self.serial.room()
    }

    /// Console input for the guest; returns how many bytes were taken.
    pub fn console_input(&mut self, bytes: &[u8], lines: &mut impl Lines) -> usize {
        self.serial.input(bytes, lines)
    }

    pub fn state(&self) -> PlatformState {
        PlatformState { config: self.config, serial: self.serial.state(), registers: self.registers.clone() }
    }

    pub fn restore(state: &PlatformState) -> Result<Self, InvalidSerialState> {
        let serial = Com1::restore(&state.serial)?;
        Ok(Self { config: state.config, serial, registers: state.registers.clone() })
    }
}
