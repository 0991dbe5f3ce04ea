//! The MSR lists of VM entry and VM exit (SDM 3, "Loading MSRs", "Saving MSRs").

use super::vmcs12::Field;
use crate::arch::msr;
use crate::cpu::Cpu;

/// The entry that failed, counted from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MsrListError {
    pub entry: u64,
}

/// Bytes of an entry: MSR address, reserved, value.
const ENTRY_BYTES: u64 = 16;
/// More than IA32_VMX_MISC recommends is undefined; this bounds what a guest can make a VM entry do.
const MAX_ENTRIES: u64 = 512;

impl Cpu {
    pub(super) fn load_msr_list(&mut self, count: Field, gpa: Field) -> Result<(), MsrListError> {
        let (count, gpa) = (self.vmx.get(count), self.vmx.get(gpa));
        for n in 0..count {
            let failed = MsrListError { entry: n + 1 };
            if n == MAX_ENTRIES {
                return Err(failed);
            }
            let address: u64 = self.load_physical(gpa + n * ENTRY_BYTES);
            let value: u64 = self.load_physical(gpa + n * ENTRY_BYTES + 8);
            let address = u32::try_from(address).map_err(|_| failed)?;
            let refused = matches!(
                address,
                msr::IA32_FS_BASE | msr::IA32_GS_BASE | msr::IA32_SMM_MONITOR_CTL | msr::IA32_BIOS_UPDT_TRIG
            );
            if refused || self.is_x2apic_msr(address) || self.write_msr(address, value).is_err() {
                return Err(failed);
            }
        }
        Ok(())
    }

    pub(super) fn store_msr_list(&mut self, count: Field, gpa: Field) -> Result<(), MsrListError> {
        let (count, gpa) = (self.vmx.get(count), self.vmx.get(gpa));
        for n in 0..count {
            let failed = MsrListError { entry: n + 1 };
            if n == MAX_ENTRIES {
                return Err(failed);
            }
            let address: u64 = self.load_physical(gpa + n * ENTRY_BYTES);
            let address = u32::try_from(address).map_err(|_| failed)?;
            if address == msr::IA32_SMBASE || self.is_x2apic_msr(address) {
                return Err(failed);
            }
            let value = self.read_msr(address).map_err(|_| failed)?;
            self.store_physical(gpa + n * ENTRY_BYTES + 8, value);
        }
        Ok(())
    }

    fn is_x2apic_msr(&self, address: u32) -> bool {
        (msr::IA32_X2APIC_FIRST..=msr::IA32_X2APIC_LAST).contains(&address)
    }
}
