//! The CPUID a guest sees: what KVM supports on this host, with this VM's topology.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

const LEAF1_ECX_VMX: u32 = 1 << 5;
const LEAF1_ECX_X2APIC: u32 = 1 << 21;
const LEAF1_ECX_TSC_DEADLINE: u32 = 1 << 24;
const LEAF1_ECX_HYPERVISOR: u32 = 1 << 31;
const LEAF1_EDX_HTT: u32 = 1 << 28;
const EXT1_ECX_SVM: u32 = 1 << 2;

/// `supported` for the vCPU with `apic_id` in a VM of `cpus` (one package, one thread a core). With `vmx`, the guest
/// sees VMX if KVM has it for guests: the IA32_VMX_* MSRs are then those that KVM gives a new vCPU.
pub(super) fn for_vcpu(
    supported: &CpuId,
    apic_id: u32,
    cpus: u32,
    tsc_deadline: bool,
    vmx: bool,
) -> Vec<kvm_cpuid_entry2> {
    // The x2APIC ID's bits below the package (SDM 2A, CPUID leaf 0BH).
    let core_bits = cpus.next_power_of_two().trailing_zeros();
    let mut entries: Vec<_> = supported
        .as_slice()
        .iter()
        // Topology (0BH, 1FH) is this VM's, not the host's; 8000000AH is SVM's.
        .filter(|e| !matches!(e.function, 0xb | 0x1f | 0x8000_000a))
        .copied()
        .collect();
    for e in &mut entries {
        match e.function {
            0 => e.eax = e.eax.max(0xb),
            1 => {
                e.ebx = e.ebx & 0xffff | cpus.min(0xff) << 16 | apic_id << 24;
                e.ecx &= !LEAF1_ECX_TSC_DEADLINE;
                if !vmx {
                    e.ecx &= !LEAF1_ECX_VMX;
                }
                e.ecx |= LEAF1_ECX_X2APIC | LEAF1_ECX_HYPERVISOR;
                if tsc_deadline {
                    e.ecx |= LEAF1_ECX_TSC_DEADLINE;
                }
                e.edx &= !LEAF1_EDX_HTT;
                if cpus > 1 {
                    e.edx |= LEAF1_EDX_HTT;
                }
            }
            // Deterministic cache parameters: cores in the package, caches not shared (EAX bits 31:26, 25:14).
            4 if e.eax & 0x1f != 0 => e.eax = e.eax & 0x3fff | (((1 << core_bits) - 1).min(0x3f)) << 26,
            0x8000_0001 => e.ecx &= !EXT1_ECX_SVM,
            0x8000_0008 => e.ecx = e.ecx & !0xf0ff | core_bits << 12 | (cpus - 1).min(0xff),
            _ => {}
        }
    }
    let level = |index: u32, kind: u32, shift: u32, processors: u32| kvm_cpuid_entry2 {
        function: 0xb,
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: shift,
        ebx: processors,
        ecx: index | kind << 8,
        edx: apic_id,
        ..Default::default()
    };
    entries.extend([level(0, 1, 0, 1), level(1, 2, core_bits, cpus), level(2, 0, 0, 0)]);
    entries
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(entries: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
        *entries.iter().find(|e| e.function == function && e.index == index).expect("leaf")
    }

    fn host() -> CpuId {
        let entry =
            |function, eax, ebx, ecx, edx| kvm_cpuid_entry2 { function, eax, ebx, ecx, edx, ..Default::default() };
        CpuId::from_entries(&[
            entry(0, 7, 0, 0, 0),
            entry(1, 0, 0x0903_0800, u32::MAX, u32::MAX),
            entry(0xb, 5, 6, 7, 8),
            entry(0x8000_0001, 0, 0, u32::MAX, 0),
            entry(0x8000_000a, 1, 1, 1, 1),
        ])
        .expect("few entries")
    }

    #[test]
    fn each_vcpu_sees_its_apic_id_and_the_vms_topology() {
        let entries = for_vcpu(&host(), 2, 3, false, false);
        assert_eq!(leaf(&entries, 1, 0).ebx, 0x0203_0800);
        assert_eq!(leaf(&entries, 0xb, 0).edx, 2);
        let core = leaf(&entries, 0xb, 1);
        assert_eq!((core.eax, core.ebx, core.ecx, core.edx), (2, 3, 0x201, 2));
        assert!(leaf(&entries, 0, 0).eax >= 0xb);
    }

    #[test]
    fn a_guest_without_nesting_sees_neither_vmx_nor_svm() {
        let entries = for_vcpu(&host(), 0, 1, true, false);
        assert_eq!(leaf(&entries, 1, 0).ecx & LEAF1_ECX_VMX, 0);
        assert_eq!(leaf(&entries, 0x8000_0001, 0).ecx & EXT1_ECX_SVM, 0);
        assert!(!entries.iter().any(|e| e.function == 0x8000_000a));
        assert_ne!(leaf(&entries, 1, 0).ecx & LEAF1_ECX_TSC_DEADLINE, 0);
    }

    #[test]
    fn a_guest_with_nesting_sees_vmx_and_no_svm() {
        let entries = for_vcpu(&host(), 0, 1, true, true);
        assert_ne!(leaf(&entries, 1, 0).ecx & LEAF1_ECX_VMX, 0);
        assert_eq!(leaf(&entries, 0x8000_0001, 0).ecx & EXT1_ECX_SVM, 0);
    }
}
