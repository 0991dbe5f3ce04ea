//! Loading host state (SDM 3, "Loading Host State").

use super::Abort;
use crate::arch::cr::{Cr0, Cr4, dr, rflags};
use crate::arch::efer::Efer;
use crate::arch::segment::{AccessRights, system};
use crate::cpu::seg::{Segment, TableRegister, reg};
use crate::cpu::{Cpu, slot};
use crate::event::{ActivityState, VmxMode};
use crate::vmx::vmcs12::Field;

/// CR0 bits that VM entries and VM exits leave alone: ET, NW, CD and the reserved ones.
pub(in crate::vmx) const CR0_KEPT: u64 = {
    let kept = Cr0::new().with_et(true).with_nw(true).with_cd(true).into_bits();
    kept | 0xffc0 | 1 << 17 | 0x1ff8_0000 | 0xffff_ffff_0000_0000
};

impl Cpu {
    /// Host state, then the MSR list; root operation resumes active, with INIT blocked again (R18).
    pub(super) fn load_host(&mut self) {
        self.leave_guest_translations();
        self.vmx_mode = VmxMode::Root;
        self.vmx.mtf_pending = false;
        self.vmx.virtual_nmi_blocked = false;
        self.vmx.preemption_deadline = None;
        self.delivering = None;
        self.special &= !crate::cpu::special::MTF;
        self.load_host_registers();
        self.load_host_segments();
        self.shadow = 0;
        self.new_shadow = 0;
        self.pending_debug = 0;
        self.set_activity(ActivityState::Active);
        self.mode_changed();
        self.enter_host_translations();
        if !self.load_host_pdptes() {
            return self.vmx_abort(Abort::HostPdptes);
        }
        if self.load_msr_list(Field::ExitMsrLoadCount, Field::ExitMsrLoadGpa).is_err() {
            self.vmx_abort(Abort::LoadingMsrs);
        }
    }

    fn load_host_registers(&mut self) {
        let vmcs = &self.vmx.vmcs;
        let exit = vmcs.exit_controls();
        let long = exit.host_address_space_size();
        self.cr0 = Cr0::from_bits(self.cr0.into_bits() & CR0_KEPT | vmcs.get(Field::HostCr0) & !CR0_KEPT);
        self.cr3 = vmcs.get(Field::HostCr3);
        let cr4 = Cr4::from_bits(vmcs.get(Field::HostCr4));
        self.cr4 = if long { cr4.with_pae(true) } else { cr4.with_pcide(false) };
        self.dr7 = dr::DR7_RESET;
        self.msrs.debugctl = 0;
        self.msrs.sysenter_cs = vmcs.get(Field::HostSysenterCs);
        self.msrs.sysenter_esp = vmcs.get(Field::HostSysenterEsp);
        self.msrs.sysenter_eip = vmcs.get(Field::HostSysenterEip);
        self.efer = if exit.load_efer() {
            Efer::from_bits(vmcs.get(Field::HostEfer))
        } else {
            self.efer.with_lme(long).with_lma(long)
        };
        if exit.load_pat() {
            self.msrs.pat = vmcs.get(Field::HostPat);
        }
        self.regs.set_rip(vmcs.get(Field::HostRip));
        self.regs.set_r(slot::RSP, vmcs.get(Field::HostRsp));
        self.flags.set_bits(rflags::FIXED1);
    }

    fn load_host_segments(&mut self) {
        let vmcs = &self.vmx.vmcs;
        let long = vmcs.exit_controls().host_address_space_size();
        let flat = AccessRights::new().with_s(true).with_p(true).with_g(true);
        let code = flat.with_kind(0xb).with_l(long).with_db(!long);
        let data = flat.with_kind(0x3).with_db(true);
        let segment = |selector: Field, base: u64, rights: AccessRights| {
            let selector = vmcs.get16(selector);
            let usable = selector != 0 || rights == code;
            let ar = if usable { rights } else { rights.with_unusable(true) };
            Segment { selector, base, limit: u32::MAX, ar }
        };
        let mut seg = self.seg;
        seg[usize::from(reg::CS)] = segment(Field::HostCsSelector, 0, code);
        seg[usize::from(reg::SS)] = segment(Field::HostSsSelector, 0, data);
        seg[usize::from(reg::DS)] = segment(Field::HostDsSelector, 0, data);
        seg[usize::from(reg::ES)] = segment(Field::HostEsSelector, 0, data);
        seg[usize::from(reg::FS)] = segment(Field::HostFsSelector, vmcs.get(Field::HostFsBase), data);
        seg[usize::from(reg::GS)] = segment(Field::HostGsSelector, vmcs.get(Field::HostGsBase), data);
        seg[usize::from(reg::LDTR)] = Segment { selector: 0, base: 0, limit: 0, ar: AccessRights::UNUSABLE };
        seg[usize::from(reg::TR)] = Segment {
            selector: vmcs.get16(Field::HostTrSelector),
            base: vmcs.get(Field::HostTrBase),
            limit: 0x67,
            ar: AccessRights::new().with_kind(system::TSS_BUSY).with_p(true),
        };
        self.gdtr = TableRegister { base: vmcs.get(Field::HostGdtrBase), limit: 0xffff };
        self.idtr = TableRegister { base: vmcs.get(Field::HostIdtrBase), limit: 0xffff };
        self.seg = seg;
        self.cpl = 0;
    }

    /// "Checking and Loading Host Page-Directory-Pointer-Table Entries": false is a VMX abort.
    fn load_host_pdptes(&mut self) -> bool {
        if !self.cr4.pae() || self.efer.lma() {
            return true;
        }
        self.load_pdptes_from_memory()
    }
}
