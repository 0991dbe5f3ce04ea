//! The VMX-preemption timer (SDM 3, "VMX-Preemption Timer"): counts down when bit X of the TSC changes, X as
//! IA32_VMX_MISC says, also while the processor halts or waits for a SIPI.

use super::vmcs12::Field;
use crate::cpu::Cpu;
use crate::event::ActivityState;

impl Cpu {
    fn preemption_ticks(&mut self) -> u64 {
        let rate = self.vmx.caps.offer.misc.preemption_timer_rate();
        self.bus.tsc(self.retired) >> rate
    }

    pub(super) fn start_preemption_timer(&mut self) {
        self.vmx.preemption_deadline = if self.vmx.controls.pin.preemption_timer() {
            let start = self.preemption_ticks();
            Some(start.saturating_add(self.vmx.get(Field::PreemptionTimer)))
        } else {
            None
        };
    }

    pub(super) fn preemption_expired(&mut self) -> bool {
        match self.vmx.preemption_deadline {
            Some(deadline) => self.preemption_ticks() >= deadline,
            None => false,
        }
    }

    /// The VM's TSC when the timer needs a look; none while no exit can come of it (R8).
    pub(crate) fn preemption_deadline_tsc(&self) -> Option<u64> {
        if self.activity == ActivityState::WaitForSipi {
            return None;
        }
        let rate = self.vmx.caps.offer.misc.preemption_timer_rate();
        self.vmx.preemption_deadline.map(|d| d.saturating_mul(1 << rate))
    }

    pub(super) fn save_preemption_timer(&mut self) {
        if let Some(deadline) = self.vmx.preemption_deadline
            && self.vmx.controls.exit.save_preemption_timer()
        {
            let left = deadline.saturating_sub(self.preemption_ticks());
            self.vmx.set(Field::PreemptionTimer, left);
        }
    }
}
