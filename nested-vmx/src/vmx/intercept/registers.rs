//! Accesses to control and debug registers (SDM 3, "Exit Qualification for Control-Register Accesses", "Changes to
//! Instruction Behavior in VMX Non-Root Operation").

use crate::cpu::{Cpu, Flow, Stop};
use crate::event::VmxMode;
use crate::vmx::exit::reasons::ExitReason;
use crate::vmx::vmcs12::Field;

const MOV_TO: u64 = 0;
const MOV_FROM: u64 = 1 << 4;
const CLTS: u64 = 2 << 4;
const LMSW: u64 = 3 << 4;
const TS: u64 = 1 << 3;

fn gpr(number: u8) -> u64 {
    u64::from(number & 15) << 8
}

impl Cpu {
    /// MOV to CR0: the value to load, with the bits that L1 owns left as they are.
    pub(crate) fn intercept_cr0_load(&mut self, value: u64, gpr: u8) -> Result<u64, Stop> {
        let current = self.cr0.into_bits();
        self.intercept_masked_load(0, value, current, gpr)
    }

    /// MOV to CR4, likewise.
    pub(crate) fn intercept_cr4_load(&mut self, value: u64, gpr: u8) -> Result<u64, Stop> {
        let current = self.cr4.into_bits();
        self.intercept_masked_load(4, value, current, gpr)
    }

    fn intercept_masked_load(&mut self, cr: u64, value: u64, current: u64, n: u8) -> Result<u64, Stop> {
        if !self.in_non_root() {
            return Ok(value);
        }
        let (mask, shadow) = self.mask_and_shadow(cr);
        if (value ^ shadow) & mask != 0 {
            return Err(self.exit_for(ExitReason::CrAccess, cr | MOV_TO | gpr(n), 0));
        }
        Ok(value & !mask | current & mask)
    }

    fn mask_and_shadow(&self, cr: u64) -> (u64, u64) {
        let (mask, shadow) =
            if cr == 0 { (Field::Cr0Mask, Field::Cr0Shadow) } else { (Field::Cr4Mask, Field::Cr4Shadow) };
        (self.vmx.get(mask), self.vmx.get(shadow))
    }

    /// What MOV from CR0 and SMSW read.
    pub(crate) fn visible_cr0(&self) -> u64 {
        self.visible(0, self.cr0.into_bits())
    }

    /// What MOV from CR4 reads.
    pub(crate) fn visible_cr4(&self) -> u64 {
        self.visible(4, self.cr4.into_bits())
    }

    fn visible(&self, cr: u64, current: u64) -> u64 {
        if !self.in_non_root() {
            return current;
        }
        let (mask, shadow) = self.mask_and_shadow(cr);
        current & !mask | shadow & mask
    }

    /// CLTS: whether it clears CR0.TS.
    pub(crate) fn intercept_clts(&mut self) -> Result<bool, Stop> {
        if !self.in_non_root() {
            return Ok(true);
        }
        let (mask, shadow) = self.mask_and_shadow(0);
        if mask & shadow & TS != 0 {
            return Err(self.exit_for(ExitReason::CrAccess, CLTS, 0));
        }
        Ok(mask & TS == 0)
    }

    /// LMSW with `source`; `memory_lin` is the linear address of a memory operand. Returns the CR0 to load, given the
    /// one that LMSW would load outside non-root operation.
    pub(crate) fn intercept_lmsw(&mut self, source: u16, memory_lin: Option<u64>, value: u64) -> Result<u64, Stop> {
        if !self.in_non_root() {
            return Ok(value);
        }
        let (mask, shadow) = self.mask_and_shadow(0);
        // LMSW sets PE but never clears it.
        let sets_pe = u64::from(source) & !shadow & mask & 1 != 0;
        if sets_pe || (u64::from(source) ^ shadow) & mask & 0xe != 0 {
            let memory = u64::from(memory_lin.is_some()) << 6;
            let stop = self.exit_for(ExitReason::CrAccess, LMSW | memory | u64::from(source) << 16, 0);
            self.exit.guest_linear = memory_lin.unwrap_or(0);
            return Err(stop);
        }
        Ok(value & !mask | self.cr0.into_bits() & mask)
    }

    /// MOV to CR3.
    pub(crate) fn intercept_cr3_load(&mut self, value: u64, n: u8) -> Flow {
        if !self.in_non_root() || !self.vmx.controls.proc.cr3_load_exiting() {
            return Ok(());
        }
        let targets = self.vmx.get(Field::Cr3TargetCount).min(4) as usize;
        if Field::CR3_TARGETS[..targets].iter().any(|&t| self.vmx.get(t) == value) {
            return Ok(());
        }
        Err(self.exit_for(ExitReason::CrAccess, 3 | MOV_TO | gpr(n), 0))
    }

    /// MOV from CR3.
    pub(crate) fn intercept_cr3_store(&mut self, n: u8) -> Flow {
        if !self.in_non_root() || !self.vmx.controls.proc.cr3_store_exiting() {
            return Ok(());
        }
        Err(self.exit_for(ExitReason::CrAccess, 3 | MOV_FROM | gpr(n), 0))
    }

    pub(crate) fn intercept_cr8_load(&mut self, n: u8) -> Flow {
        if !self.in_non_root() || !self.vmx.controls.proc.cr8_load_exiting() {
            return Ok(());
        }
        Err(self.exit_for(ExitReason::CrAccess, 8 | MOV_TO | gpr(n), 0))
    }

    pub(crate) fn intercept_cr8_store(&mut self, n: u8) -> Flow {
        if !self.in_non_root() || !self.vmx.controls.proc.cr8_store_exiting() {
            return Ok(());
        }
        Err(self.exit_for(ExitReason::CrAccess, 8 | MOV_FROM | gpr(n), 0))
    }

    /// MOV DR, after the checks of CPL and CR4.DE, before that of DR7.GD. `n` is the general register.
    pub(crate) fn intercept_mov_dr(&mut self, dr: u8, from_dr: bool, n: u8) -> Flow {
        if !self.in_non_root() || !self.vmx.controls.proc.mov_dr_exiting() {
            return Ok(());
        }
        Err(self.exit_for(ExitReason::MovDr, u64::from(dr & 7) | u64::from(from_dr) << 4 | gpr(n), 0))
    }

    /// Whether VMX operation lets an instruction load CR0 with `value`; if not, #GP(0).
    pub(crate) fn vmx_permits_cr0(&self, value: u64) -> bool {
        match self.vmx_mode {
            VmxMode::Off => true,
            VmxMode::Root => self.vmx.caps.cr0_permitted(value, false),
            VmxMode::NonRoot => self.vmx.caps.cr0_permitted(value, self.vmx.controls.proc2.unrestricted_guest()),
        }
    }

    /// Whether VMX operation lets an instruction load CR4 with `value`; if not, #GP(0).
    pub(crate) fn vmx_permits_cr4(&self, value: u64) -> bool {
        self.vmx_mode == VmxMode::Off || self.vmx.caps.cr4_permitted(value)
    }
}
