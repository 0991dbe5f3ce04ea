//! Single-stepping and instruction breakpoints (SDM 3, "Debug Exceptions").

use super::Cpu;
use super::flags::{RF, TF};
use super::state::shadow;
use crate::arch::cr::dr;
use crate::arch::exception;

/// The bits of DR7 that can be changed: enables, LE, GE, GD, conditions and lengths.
const DR7_DEFINED: u64 = 0xffff_23ff;

/// What was in force when a single-stepped instruction began.
#[derive(Clone, Copy)]
pub(super) struct StepState {
    trap: bool,
    resume: bool,
}

impl Cpu {
    pub(super) fn step_state(&self) -> StepState {
        StepState { trap: self.flags.has(TF), resume: self.flags.has(RF) }
    }

    /// MOV to DR7, or to a breakpoint's address.
    pub(super) fn write_dr7(&mut self, value: u64) {
        let watched = (self.dr7 | value) & 0xff != 0;
        self.dr7 = value & DR7_DEFINED | dr::DR7_RESET;
        if watched {
            // The TLB holds no page with a data breakpoint.
            self.tlb.flush();
        }
        self.mode_changed();
    }

    /// A single-stepped instruction is complete.
    pub(super) fn stepped(&mut self, before: StepState) {
        if before.resume {
            // RF suppresses instruction breakpoints for one instruction only.
            self.flags.set(RF, false);
            self.mode_changed();
        }
        if before.trap {
            self.pending_debug |= dr::DR6_BS;
        }
    }

    /// An iteration of a repeated string instruction is complete, and the instruction is not: RF stays.
    pub(super) fn iterated(&mut self, before: StepState) {
        if before.trap {
            self.pending_debug |= dr::DR6_BS;
        }
    }

    /// Records I/O breakpoints that a port access hits; the trap comes after the instruction (CR4.DE enables them).
    pub(super) fn note_port_breakpoint(&mut self, port: u16, size: u8) {
        if self.dr7 & 0xff == 0 || !self.cr4.de() {
            return;
        }
        for n in 0..4 {
            let watched = u64::from([1u8, 2, 8, 4][(self.dr7 >> (18 + 4 * n) & 3) as usize]);
            let start = self.dr[n] & !(watched - 1);
            let overlaps = u64::from(port) < start.wrapping_add(watched) && start < u64::from(port) + u64::from(size);
            if self.dr7 >> (2 * n) & 3 != 0 && self.dr7 >> (16 + 4 * n) & 3 == 2 && overlaps {
                self.pending_debug |= 1 << n;
            }
        }
    }

    /// Raises #DB if DR7 has an instruction breakpoint at RIP that RF does not suppress.
    pub(super) fn instruction_breakpoint(&mut self) -> bool {
        if self.dr7 & 0xff == 0 || self.flags.has(RF) || self.shadow & shadow::MOV_SS != 0 {
            return false;
        }
        let lin = self.mode.cs_base.wrapping_add(self.regs.rip());
        let hit = (0..4)
            .filter(|n| self.dr7 >> (2 * n) & 3 != 0 && self.dr7 >> (16 + 4 * n) & 3 == 0 && self.dr[*n] == lin)
            .fold(0u64, |hits, n| hits | 1 << n);
        if hit != 0 {
            self.pending_debug |= hit;
            self.raise_exception(exception::DB, None);
        }
        hit != 0
    }
}
