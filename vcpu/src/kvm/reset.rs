//! A vCPU's whole architectural state as KVM first had it, kept to put it back at a VM reset.

use kvm_bindings::{
    KVM_VCPUEVENT_VALID_SMM, Msrs, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Kvm, VcpuFd};

use super::failure::{KvmError, ioctl};
use super::nested;

/// Writing the TSC would take the vCPUs of a VM apart; RESET need not clear it for a guest to boot.
pub(super) const IA32_TSC: u32 = 0x10;

pub(super) struct ResetState {
    /// The guest may be in VMX operation.
    vmx: bool,
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: Box<kvm_xsave>,
    xcrs: Option<kvm_xcrs>,
    debug_regs: kvm_debugregs,
    lapic: kvm_lapic_state,
    events: kvm_vcpu_events,
    msrs: Vec<kvm_msr_entry>,
}

impl ResetState {
    /// Reads it from a vCPU that has never run, with its boot state loaded.
    pub(super) fn capture(kvm: &Kvm, vcpu: &VcpuFd, vmx: bool) -> Result<Self, KvmError> {
        Ok(Self {
            vmx,
            mp_state: vcpu.get_mp_state().map_err(ioctl("KVM_GET_MP_STATE"))?,
            regs: vcpu.get_regs().map_err(ioctl("KVM_GET_REGS"))?,
            sregs: vcpu.get_sregs().map_err(ioctl("KVM_GET_SREGS"))?,
            xsave: Box::new(vcpu.get_xsave().map_err(ioctl("KVM_GET_XSAVE"))?),
            // A host without XSAVE has no XCR0.
            xcrs: vcpu.get_xcrs().ok(),
            debug_regs: vcpu.get_debug_regs().map_err(ioctl("KVM_GET_DEBUGREGS"))?,
            lapic: vcpu.get_lapic().map_err(ioctl("KVM_GET_LAPIC"))?,
            events: vcpu.get_vcpu_events().map_err(ioctl("KVM_GET_VCPU_EVENTS"))?,
            msrs: read_msrs(kvm, vcpu)?,
        })
    }

    /// Puts it back. The vCPU must be outside `KVM_RUN`, with no access open.
    pub(super) fn restore(&self, vcpu: &VcpuFd) -> Result<(), KvmError> {
        if self.vmx {
            // First: in VMX operation CR4.VMXE cannot be cleared, and the registers are L2's.
            nested::leave(vcpu).map_err(ioctl("KVM_SET_NESTED_STATE"))?;
        }
        vcpu.set_mp_state(self.mp_state).map_err(ioctl("KVM_SET_MP_STATE"))?;
        vcpu.set_regs(&self.regs).map_err(ioctl("KVM_SET_REGS"))?;
        vcpu.set_sregs(&self.sregs).map_err(ioctl("KVM_SET_SREGS"))?;
        // SAFETY: the buffer came from KVM_GET_XSAVE of this vCPU, and no feature enabled since needs a larger one
        // (arch_prctl(ARCH_REQ_XCOMP_GUEST_PERM) is never called).
        unsafe { vcpu.set_xsave(&self.xsave) }.map_err(ioctl("KVM_SET_XSAVE"))?;
        if let Some(xcrs) = &self.xcrs {
            vcpu.set_xcrs(xcrs).map_err(ioctl("KVM_SET_XCRS"))?;
        }
        vcpu.set_debug_regs(&self.debug_regs).map_err(ioctl("KVM_SET_DEBUGREGS"))?;
        vcpu.set_lapic(&self.lapic).map_err(ioctl("KVM_SET_LAPIC"))?;
        // After the local APIC: the TSC deadline is only accepted in the timer mode that it belongs to.
        write_msrs(vcpu, &self.msrs)?;
        let mut events = self.events;
        // Clears an INIT that is still pending. A pending SIPI needs nothing: outside INIT_RECEIVED it is dropped
        // when next looked at, and a new INIT overwrites it.
        events.flags |= KVM_VCPUEVENT_VALID_SMM;
        vcpu.set_vcpu_events(&events).map_err(ioctl("KVM_SET_VCPU_EVENTS"))
    }
}

/// All MSRs that KVM lists and this vCPU has.
fn read_msrs(kvm: &Kvm, vcpu: &VcpuFd) -> Result<Vec<kvm_msr_entry>, KvmError> {
    let list = kvm.get_msr_index_list().map_err(ioctl("KVM_GET_MSR_INDEX_LIST"))?;
    let indices: Vec<u32> = list.as_slice().iter().copied().filter(|&i| i != IA32_TSC).collect();
    let mut values = Vec::with_capacity(indices.len());
    let mut rest = &indices[..];
    while !rest.is_empty() {
        let entries: Vec<_> = rest
            .iter()
            .take(kvm_bindings::KVM_MAX_MSR_ENTRIES)
            .map(|&index| kvm_msr_entry { index, ..Default::default() })
            .collect();
        let asked = entries.len();
        let mut msrs = Msrs::from_entries(&entries).map_err(|_| too_many_msrs())?;
        // KVM stops at the first MSR that this vCPU does not have; go on behind it.
        let read = vcpu.get_msrs(&mut msrs).map_err(ioctl("KVM_GET_MSRS"))?.min(asked);
        values.extend_from_slice(&msrs.as_slice()[..read]);
        rest = &rest[if read < asked { read + 1 } else { read }..];
    }
    Ok(values)
}

fn write_msrs(vcpu: &VcpuFd, values: &[kvm_msr_entry]) -> Result<(), KvmError> {
    let mut rest = values;
    while !rest.is_empty() {
        let asked = rest.len().min(kvm_bindings::KVM_MAX_MSR_ENTRIES);
        let msrs = Msrs::from_entries(&rest[..asked]).map_err(|_| too_many_msrs())?;
        // Read-only MSRs end a batch; their value cannot have changed.
        let written = vcpu.set_msrs(&msrs).map_err(ioctl("KVM_SET_MSRS"))?.min(asked);
        rest = &rest[if written < asked { written + 1 } else { written }..];
    }
    Ok(())
}

fn too_many_msrs() -> KvmError {
    KvmError::Ioctl { what: "KVM_GET_MSRS", source: std::io::Error::from_raw_os_error(libc::E2BIG) }
}
