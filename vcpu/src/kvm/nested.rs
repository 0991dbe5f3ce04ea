//! A guest's VMX operation as KVM tells it: the header of KVM_GET_NESTED_STATE.
//!
//! The VMCS12 that follows the header has a layout of KVM's own and is not read. VM entries and exits leave no trace
//! in userspace; what shows is the mode a vCPU is in when it is read.

use kvm_bindings::nested::KvmNestedStateBuffer;
use kvm_bindings::{
    KVM_STATE_NESTED_FORMAT_VMX, KVM_STATE_NESTED_GUEST_MODE, kvm_nested_state, kvm_nested_state__bindgen_ty_1,
    kvm_vmx_nested_state_hdr,
};
use kvm_ioctls::VcpuFd;
use nested_vmx::event::VmxMode;

/// What KVM writes where there is no VMXON region or no current VMCS.
const NONE_GPA: u64 = u64::MAX;

/// The VMX side of a vCPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VmxState {
    pub mode: VmxMode,
    pub vmxon_gpa: Option<u64>,
    pub current_vmcs_gpa: Option<u64>,
}

pub(super) fn read(vcpu: &VcpuFd) -> Result<VmxState, kvm_ioctls::Error> {
    // With room for the VMCS12: KVM refuses a buffer that is too small for all of it.
    let mut state = KvmNestedStateBuffer::empty();
    vcpu.nested_state(&mut state)?;
    if u32::from(state.format) != KVM_STATE_NESTED_FORMAT_VMX {
        return Ok(VmxState::default());
    }
    // SAFETY: the format says that `vmx` is the live member; it is made of plain numbers.
    let header = unsafe { state.hdr.vmx };
    Ok(of_header(state.flags, &header))
}

fn of_header(flags: u16, header: &kvm_vmx_nested_state_hdr) -> VmxState {
    let some = |gpa| (gpa != NONE_GPA).then_some(gpa);
    let vmxon_gpa = some(header.vmxon_pa);
    let mode = match vmxon_gpa {
        None => VmxMode::Off,
        Some(_) if u32::from(flags) & KVM_STATE_NESTED_GUEST_MODE != 0 => VmxMode::NonRoot,
        Some(_) => VmxMode::Root,
    };
    VmxState { mode, vmxon_gpa, current_vmcs_gpa: some(header.vmcs12_pa) }
}

/// Takes a vCPU out of VMX operation, as RESET does.
pub(super) fn leave(vcpu: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
    let mut state = KvmNestedStateBuffer::empty();
    state.format = KVM_STATE_NESTED_FORMAT_VMX as u16;
    state.size = size_of::<kvm_nested_state>() as u32;
    let vmx = kvm_vmx_nested_state_hdr { vmxon_pa: NONE_GPA, vmcs12_pa: NONE_GPA, ..Default::default() };
    state.hdr = kvm_nested_state__bindgen_ty_1 { vmx };
    vcpu.set_nested_state(&state)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_header_of_each_vmx_mode_is_understood() {
        let header = |vmxon_pa, vmcs12_pa| kvm_vmx_nested_state_hdr { vmxon_pa, vmcs12_pa, ..Default::default() };
        assert_eq!(of_header(0, &header(NONE_GPA, NONE_GPA)), VmxState::default());
        let on = of_header(0, &header(0x1000, NONE_GPA));
        assert_eq!(on, VmxState { mode: VmxMode::Root, vmxon_gpa: Some(0x1000), current_vmcs_gpa: None });
        let inside = of_header(KVM_STATE_NESTED_GUEST_MODE as u16, &header(0x1000, 0x2000));
        assert_eq!((inside.mode, inside.current_vmcs_gpa), (VmxMode::NonRoot, Some(0x2000)));
    }
}
