//! Delays by the time-stamp counter.

use crate::cpu::{cpuid, rdtsc};

/// Where CPUID does not say: nestd's virtual TSC, and slow enough for real processors to be counted too long
/// rather than too short by a factor that matters.
const FALLBACK_TSC_HZ: u64 = 1_000_000_000;

/// CPUID.15H: TSC frequency = core crystal frequency (ECX) * EBX / EAX.
pub fn tsc_hz() -> u64 {
    if cpuid(0, 0).eax < 0x15 {
        return FALLBACK_TSC_HZ;
    }
    let leaf = cpuid(0x15, 0);
    if leaf.eax == 0 || leaf.ebx == 0 || leaf.ecx == 0 {
        return FALLBACK_TSC_HZ;
    }
    u64::from(leaf.ecx) * u64::from(leaf.ebx) / u64::from(leaf.eax)
}

/// The TSC's value in so many microseconds.
pub fn deadline_tsc(microseconds: u64) -> u64 {
    rdtsc() + microseconds * (tsc_hz() / 1_000_000)
}

pub fn delay(microseconds: u64) {
    wait_until(deadline_tsc(microseconds), || false);
}

/// Waits for `done`, but not past the deadline; says whether it came.
pub fn wait_until(deadline_tsc: u64, mut done: impl FnMut() -> bool) -> bool {
    loop {
        if done() {
            return true;
        }
        if rdtsc() >= deadline_tsc {
            return false;
        }
        core::hint::spin_loop();
    }
}
