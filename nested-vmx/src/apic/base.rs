//! IA32_APIC_BASE and the modes (SDM 3, "x2APIC State Transitions").

use super::{GeneralProtection, LocalApic, Work};
use crate::arch::apic::base;

impl LocalApic {
    /// IA32_APIC_BASE.
    pub fn base(&self) -> u64 {
        self.state.base
    }

    /// IA32_APIC_BASE.EN: also what CPUID.1:EDX.APIC shows.
    pub fn enabled(&self) -> bool {
        self.state.base & base::EN != 0
    }

    pub fn x2apic(&self) -> bool {
        self.state.x2apic()
    }

    pub fn bsp(&self) -> bool {
        self.state.base & base::BSP != 0
    }

    /// The page at which the registers are: none when disabled, and x2APIC mode closes it (R22).
    pub fn mmio_window(&self) -> Option<u64> {
        (self.enabled() && !self.x2apic()).then_some(self.state.base & base::ADDRESS)
    }

    pub fn write_base(&mut self, value: u64, physical_address_bits: u32) -> Result<Work, GeneralProtection> {
        let address = base::ADDRESS & 1u64.checked_shl(physical_address_bits).map_or(u64::MAX, |b| b - 1);
        if value & !(address | base::EN | base::EXTD | base::BSP) != 0 {
            return Err(GeneralProtection);
        }
        const MODE: u64 = base::EN | base::EXTD;
        const DISABLED: u64 = 0;
        const XAPIC: u64 = base::EN;
        const X2APIC: u64 = base::EN | base::EXTD;
        let (old, new) = (self.state.base & MODE, value & MODE);
        match (old, new) {
            _ if old == new => {}
            (DISABLED, XAPIC) | (XAPIC, X2APIC | DISABLED) | (X2APIC, DISABLED) => {}
            _ => return Err(GeneralProtection),
        }
        let (window, identity) = (self.mmio_window(), self.identity());
        self.state.base = value;
        // A disabled APIC may lose its state; this one returns to that after RESET, as the SDM allows.
        if old != new && new == DISABLED {
            self.clear_registers();
        }
        // "x2APIC State Transitions": the ICR's destination is zeroed on the way into x2APIC mode.
        if old != new && new == X2APIC {
            self.state.icr.set_destination(0);
        }
        Ok(Work {
            identity_changed: identity != self.identity(),
            window_changed: window != self.mmio_window(),
            deadline_changed: old != new,
            ..Work::default()
        })
    }
}
