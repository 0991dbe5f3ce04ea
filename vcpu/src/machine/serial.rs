//! COM1: vm-superio's 16550, with its interrupt and its output handed on.

use std::convert::Infallible;
use std::sync::atomic::{AtomicBool, Ordering};

use serde::{Deserialize, Serialize};
use vm_superio::Trigger;
use vm_superio::serial::{NoEvents, Serial};

use super::Lines;

pub(super) const SERIAL_PORT: u16 = 0x3f8;
pub const SERIAL_IRQ: u8 = 4;

/// Remembers that the device asked for an interrupt until the access is over.
#[derive(Debug, Default)]
struct Asked(AtomicBool);

impl Trigger for Asked {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        self.0.store(true, Ordering::Relaxed);
        Ok(())
    }
}

#[derive(Debug)]
pub(super) struct Com1(Serial<Asked, NoEvents, Vec<u8>>);

/// A snapshot of the serial device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SerialState {
    baud_divisor_low: u8,
    baud_divisor_high: u8,
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    in_buffer: Vec<u8>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the serial device's input buffer cannot hold {bytes} bytes")]
pub struct InvalidSerialState {
    pub bytes: usize,
}

impl Com1 {
    pub(super) fn new() -> Self {
        Self(Serial::new(Asked::default(), Vec::new()))
    }

    pub(super) fn read(&mut self, offset: u8) -> u8 {
        self.0.read(offset)
    }

    pub(super) fn write(&mut self, offset: u8, value: u8, lines: &mut impl Lines) {
        // Its errors are the trigger's and the writer's, which have none.
        let _ = self.0.write(offset, value);
        if !self.0.writer().is_empty() {
            lines.console(self.0.writer());
            self.0.writer_mut().clear();
        }
        self.interrupt(lines);
    }

    pub(super) fn room(&self) -> usize {
        self.0.fifo_capacity()
    }

    /// In loopback mode, or without room, none is taken.
    pub(super) fn input(&mut self, bytes: &[u8], lines: &mut impl Lines) -> usize {
        let bytes = &bytes[..bytes.len().min(self.room())];
        if bytes.is_empty() {
            return 0;
        }
        let taken = self.0.enqueue_raw_bytes(bytes).unwrap_or(0);
        self.interrupt(lines);
        taken
    }

    fn interrupt(&mut self, lines: &mut impl Lines) {
        if self.0.interrupt_evt().0.swap(false, Ordering::Relaxed) {
            lines.pulse_irq(SERIAL_IRQ);
        }
    }

    pub(super) fn state(&self) -> SerialState {
        let s = self.0.state();
        SerialState {
            baud_divisor_low: s.baud_divisor_low,
            baud_divisor_high: s.baud_divisor_high,
            interrupt_enable: s.interrupt_enable,
            interrupt_identification: s.interrupt_identification,
            line_control: s.line_control,
            line_status: s.line_status,
            modem_control: s.modem_control,
            modem_status: s.modem_status,
            scratch: s.scratch,
            in_buffer: s.in_buffer,
        }
    }

    /// An interrupt that was asked for is in the interrupt controller's state already.
    pub(super) fn restore(state: &SerialState) -> Result<Self, InvalidSerialState> {
        let s = state.clone();
        let bytes = s.in_buffer.len();
        let state = vm_superio::serial::SerialState {
            baud_divisor_low: s.baud_divisor_low,
            baud_divisor_high: s.baud_divisor_high,
            interrupt_enable: s.interrupt_enable,
            interrupt_identification: s.interrupt_identification,
            line_control: s.line_control,
            line_status: s.line_status,
            modem_control: s.modem_control,
            modem_status: s.modem_status,
            scratch: s.scratch,
            in_buffer: s.in_buffer,
        };
        let serial = Serial::from_state(&state, Asked::default(), NoEvents, Vec::new())
            .map_err(|_| InvalidSerialState { bytes })?;
        serial.interrupt_evt().0.store(false, Ordering::Relaxed);
        Ok(Self(serial))
    }
}
