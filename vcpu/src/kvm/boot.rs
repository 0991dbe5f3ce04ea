//! KVM's register structs from a boot state, and to the engine's.

use kvm_bindings::{kvm_debugregs, kvm_dtable, kvm_lapic_state, kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuFd;
use nested_vmx::arch::segment::AccessRights;
use nested_vmx::cpu::{BootState, seg};

use super::failure::{KvmError, ioctl};
use crate::engine::{DescriptorTable, Registers, Segment};

/// Loads what a boot protocol wants into a vCPU after RESET.
pub(super) fn load(vcpu: &VcpuFd, state: &BootState) -> Result<(), KvmError> {
    let mut sregs = vcpu.get_sregs().map_err(ioctl("KVM_GET_SREGS"))?;
    let [es, cs, ss, ds, fs, gs, ldtr, tr] = state.segments.map(to_kvm);
    (sregs.es, sregs.cs, sregs.ss, sregs.ds) = (es, cs, ss, ds);
    (sregs.fs, sregs.gs, sregs.ldt, sregs.tr) = (fs, gs, ldtr, tr);
    sregs.gdt = kvm_dtable { base: state.gdtr.base, limit: state.gdtr.limit, ..Default::default() };
    sregs.idt = kvm_dtable { base: state.idtr.base, limit: state.idtr.limit, ..Default::default() };
    (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (state.cr0, state.cr3, state.cr4, state.efer);
    vcpu.set_sregs(&sregs).map_err(ioctl("KVM_SET_SREGS"))?;
    let [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15] = state.gprs;
    let (rip, rflags) = (state.rip, state.rflags);
    let regs = kvm_regs { rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8, r9, r10, r11, r12, r13, r14, r15, rip, rflags };
    vcpu.set_regs(&regs).map_err(ioctl("KVM_SET_REGS"))?;
    if state.virtual_wire {
        let mut lapic = vcpu.get_lapic().map_err(ioctl("KVM_GET_LAPIC"))?;
        set_virtual_wire(&mut lapic);
        vcpu.set_lapic(&lapic).map_err(ioctl("KVM_SET_LAPIC"))?;
    }
    Ok(())
}

/// The local APIC as firmware leaves it: enabled, LINT0 takes the 8259's interrupts, LINT1 NMI (SDM 3, "Local
/// Vector Table").
fn set_virtual_wire(lapic: &mut kvm_lapic_state) {
    const SVR: usize = 0xf0;
    const LINT0: usize = 0x350;
    const LINT1: usize = 0x360;
    let mut put = |at: usize, value: u32| {
        for (byte, new) in lapic.regs[at..at + 4].iter_mut().zip(value.to_le_bytes()) {
            *byte = new as _;
        }
    };
    put(SVR, 0x1ff);
    put(LINT0, 0x700);
    put(LINT1, 0x400);
}

fn to_kvm(s: seg::Segment) -> kvm_segment {
    kvm_segment {
        base: s.base,
        limit: s.limit,
        selector: s.selector,
        type_: s.ar.kind(),
        present: s.ar.p().into(),
        dpl: s.ar.dpl(),
        db: s.ar.db().into(),
        s: s.ar.s().into(),
        l: s.ar.l().into(),
        g: s.ar.g().into(),
        avl: s.ar.avl().into(),
        unusable: s.ar.unusable().into(),
        padding: 0,
    }
}

fn from_kvm(s: &kvm_segment) -> Segment {
    let rights = AccessRights::new()
        .with_kind(s.type_ & 0xf)
        .with_p(s.present != 0)
        .with_dpl(s.dpl & 3)
        .with_db(s.db != 0)
        .with_s(s.s != 0)
        .with_l(s.l != 0)
        .with_g(s.g != 0)
        .with_avl(s.avl != 0)
        .with_unusable(s.unusable != 0);
    Segment { selector: s.selector, base: s.base, limit: s.limit, access_rights: rights.into_bits() }
}

pub(super) fn registers(r: &kvm_regs, s: &kvm_sregs, d: &kvm_debugregs) -> Registers {
    let [d0, d1, d2, d3] = d.db;
    Registers {
        gprs: [
            r.rax, r.rcx, r.rdx, r.rbx, r.rsp, r.rbp, r.rsi, r.rdi, r.r8, r.r9, r.r10, r.r11, r.r12, r.r13, r.r14,
            r.r15,
        ],
        rip: r.rip,
        rflags: r.rflags,
        segments: [&s.es, &s.cs, &s.ss, &s.ds, &s.fs, &s.gs, &s.ldt, &s.tr].map(from_kvm),
        gdtr: DescriptorTable { base: s.gdt.base, limit: s.gdt.limit },
        idtr: DescriptorTable { base: s.idt.base, limit: s.idt.limit },
        cr0: s.cr0,
        cr2: s.cr2,
        cr3: s.cr3,
        cr4: s.cr4,
        cr8: s.cr8,
        efer: s.efer,
        // DR4 and DR5 are other names of DR6 and DR7 (SDM 3, "Debug Registers DR4 and DR5").
        dr: [d0, d1, d2, d3, d.dr6, d.dr7, d.dr6, d.dr7],
        apic_base: s.apic_base,
    }
}
