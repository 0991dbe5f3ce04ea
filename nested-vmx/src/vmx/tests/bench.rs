//! An L1 in VMX root operation with a VMCS that is ready to launch.

use crate::arch::msr::feature_control;
use crate::arch::segment::{AccessRights, system};
use crate::arch::vmx::{EventType, InterruptionInfo, PinControls, Proc2Controls, ProcControls};
use crate::cpu::seg::{Segment, TableRegister, reg};
use crate::cpu::{Cpu, slot};
use crate::event::{ActivityState, Detail, Event, Fate, VmxMode};
use crate::testing::{CODE, DATA, PML4, Rig, STACK};
use crate::vmx::exit::reasons::{ExitReason, InstructionError};
use crate::vmx::vmcs12::{Field, GuestSegment, REVISION_ID};
use iced_x86::code_asm::{CodeAssembler, qword_ptr};

pub const VMXON_GPA: u64 = DATA;
pub const VMCS_GPA: u64 = DATA + 0x1000;
/// Where the instructions of [`Bench`] take pointers from.
const POINTERS: u64 = DATA + 0x2000;
pub const MSR_LIST: u64 = DATA + 0x3000;
pub const BITMAP: u64 = DATA + 0x4000;
const GDT: u64 = DATA + 0x1_0000;
const IDT: u64 = DATA + 0x1_1000;
const TSS: u64 = DATA + 0x1_2000;
/// Handler of vector v: HANDLERS + 16 * v.
pub const HANDLERS: u64 = DATA + 0x1_3000;
pub const HOST_RIP: u64 = CODE + 0x800;
pub const GUEST_RIP: u64 = CODE + 0x1000;
pub const GUEST_RSP: u64 = STACK - 0x1000;

const GUEST_SELECTORS: [(usize, u16); 5] = [(0, 16), (2, 16), (3, 16), (4, 16), (5, 16)];

pub struct Bench {
    pub rig: Rig,
}

impl Bench {
    /// 64-bit mode outside VMX operation, with a GDT, a TSS and an IDT of interrupt gates.
    pub fn off() -> Self {
        let mut rig = Rig::long();
        let gates = |v: u64| {
            let handler = HANDLERS + 16 * v;
            let low = handler & 0xffff | 8 << 16 | 0x8e00 << 32 | (handler & 0xffff_0000) << 32;
            (low, handler >> 32)
        };
        for v in 0..256 {
            let (low, high) = gates(v);
            rig.write_u64(IDT + 16 * v, low);
            rig.write_u64(IDT + 16 * v + 8, high);
        }
        rig.write_u64(GDT + 8, 0x00af_9b00_0000_ffff);
        rig.write_u64(GDT + 16, 0x00cf_9300_0000_ffff);
        rig.ram.write(HANDLERS, &[0x90; 0x1000]).unwrap();
        let c = &mut rig.cpu;
        c.gdtr = TableRegister { base: GDT, limit: 0x2f };
        c.idtr = TableRegister { base: IDT, limit: 0xfff };
        let busy = AccessRights::new().with_kind(system::TSS_BUSY).with_p(true);
        c.seg[usize::from(reg::TR)] = Segment { selector: 24, base: TSS, limit: 0x67, ar: busy };
        c.cr4 = c.cr4.with_vmxe(true);
        c.msrs.feature_control = feature_control::LOCK | feature_control::VMXON_OUTSIDE_SMX;
        // What sends INIT also works with the APIC as firmware leaves it.
        c.apic.set_virtual_wire();
        rig.ram.write(VMXON_GPA, &REVISION_ID.to_le_bytes()).unwrap();
        rig.ram.write(VMCS_GPA, &REVISION_ID.to_le_bytes()).unwrap();
        rig.write_u64(POINTERS, VMXON_GPA);
        rig.write_u64(POINTERS + 8, VMCS_GPA);
        // Idle loops of L1 and L2.
        rig.ram.write(HOST_RIP, &[0x90, 0xeb, 0xfd]).unwrap();
        rig.ram.write(GUEST_RIP, &[0x90, 0xeb, 0xfd]).unwrap();
        Self { rig }
    }

    /// In root operation, with a current VMCS whose guest is like the host.
    pub fn root() -> Self {
        let mut b = Self::off();
        b.vmxon();
        b.execute(|a| a.vmclear(qword_ptr(POINTERS + 8)));
        b.execute(|a| a.vmptrld(qword_ptr(POINTERS + 8)));
        b.fill_vmcs();
        b
    }

    /// In non-root operation, in the given activity state.
    pub fn guest(state: ActivityState) -> Self {
        let mut b = Self::root();
        b.enter(state);
        b
    }

    pub fn cpu(&mut self) -> &mut Cpu {
        &mut self.rig.cpu
    }

    pub fn get(&self, field: Field) -> u64 {
        self.rig.cpu.vmx.get(field)
    }

    pub fn set(&mut self, field: Field, value: u64) -> &mut Self {
        self.rig.cpu.vmx.set(field, value);
        self
    }

    pub fn pin(&mut self, c: PinControls) -> &mut Self {
        self.or(Field::PinControls, c.into_bits())
    }

    pub fn proc(&mut self, c: ProcControls) -> &mut Self {
        self.or(Field::ProcControls, c.into_bits())
    }

    pub fn proc2(&mut self, c: Proc2Controls) -> &mut Self {
        self.proc(ProcControls::new().with_secondary_controls(true)).or(Field::Proc2Controls, c.into_bits())
    }

    pub fn or(&mut self, field: Field, bits: u32) -> &mut Self {
        let value = self.get(field) | u64::from(bits);
        self.set(field, value)
    }

    pub fn inject(&mut self, event: EventType, vector: u8, error: Option<u32>) -> &mut Self {
        let info = InterruptionInfo::new()
            .with_valid(true)
            .with_event_type(event)
            .with_vector(vector)
            .with_error_code(error.is_some());
        self.set(Field::EntryErrorCode, error.unwrap_or(0).into());
        self.set(Field::EntryInterruptionInfo, info.into_bits().into())
    }

    fn fill_vmcs(&mut self) {
        let caps = self.rig.cpu.vmx.caps;
        let c = &self.rig.cpu;
        let (cr0, cr4, efer) = (c.cr0.into_bits(), c.cr4.into_bits(), c.efer.into_bits());
        for (field, value) in [
            (Field::PinControls, caps.pin.must),
            (Field::ProcControls, caps.proc.must),
            (Field::ExitControls, caps.exit.must | 1 << 9 | 1 << 2 | 1 << 20 | 1 << 21),
            (Field::EntryControls, caps.entry.must | 1 << 9 | 1 << 2 | 1 << 15),
        ] {
            self.set(field, value.into());
        }
        for (field, value) in [
            (Field::HostCsSelector, 8),
            (Field::HostSsSelector, 16),
            (Field::HostDsSelector, 16),
            (Field::HostEsSelector, 16),
            (Field::HostTrSelector, 24),
            (Field::HostTrBase, TSS),
            (Field::HostGdtrBase, GDT),
            (Field::HostIdtrBase, IDT),
            (Field::HostCr0, cr0),
            (Field::HostCr3, PML4),
            (Field::HostCr4, cr4),
            (Field::HostEfer, efer),
            (Field::HostRip, HOST_RIP),
            (Field::HostRsp, STACK),
            (Field::GuestCr0, cr0),
            (Field::GuestCr3, PML4),
            (Field::GuestCr4, cr4),
            (Field::GuestEfer, efer),
            (Field::GuestDr7, 0x400),
            (Field::GuestGdtrBase, GDT),
            (Field::GuestGdtrLimit, 0x2f),
            (Field::GuestIdtrBase, IDT),
            (Field::GuestIdtrLimit, 0xfff),
            (Field::GuestRip, GUEST_RIP),
            (Field::GuestRsp, GUEST_RSP),
            (Field::GuestRflags, 2),
            (Field::VmcsLinkGpa, u64::MAX),
        ] {
            self.set(field, value);
        }
        let vmcs = &mut self.rig.cpu.vmx.vmcs;
        let code = GuestSegment { selector: 8, base: 0, limit: u32::MAX, rights: AccessRights::from_bits(0xa09b) };
        let data = GuestSegment { rights: AccessRights::from_bits(0xc093), ..code };
        vmcs.set_guest_segment(1, code);
        for (s, selector) in GUEST_SELECTORS {
            vmcs.set_guest_segment(s, GuestSegment { selector, ..data });
        }
        vmcs.set_guest_segment(6, GuestSegment { rights: AccessRights::UNUSABLE, ..GuestSegment::default() });
        let tr = GuestSegment { selector: 24, base: TSS, limit: 0x67, rights: AccessRights::from_bits(0x8b) };
        vmcs.set_guest_segment(7, tr);
    }

    /// Runs one instruction of L1, at `CODE`; no event is looked at behind it.
    pub fn execute(&mut self, f: impl FnOnce(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>) -> &mut Self {
        self.rig.code(f);
        self.rig.cpu.regs.set_rip(CODE);
        self.rig.run(1);
        self
    }

    pub fn vmxon(&mut self) -> &mut Self {
        self.execute(|a| a.vmxon(qword_ptr(POINTERS)))
    }

    pub fn vmxoff(&mut self) -> &mut Self {
        self.execute(|a| a.vmxoff())
    }

    pub fn pointer(&mut self, n: u64, gpa: u64) -> u64 {
        self.rig.write_u64(POINTERS + 8 * n, gpa);
        POINTERS + 8 * n
    }

    /// VMLAUNCH or VMRESUME, whichever the launch state asks for. No event is looked at behind it.
    pub fn launch(&mut self) -> &mut Self {
        if self.rig.cpu.vmx.vmcs.launched { self.execute(|a| a.vmresume()) } else { self.execute(|a| a.vmlaunch()) }
    }

    /// An entry that succeeds, into `state`.
    pub fn enter(&mut self, state: ActivityState) -> &mut Self {
        self.set(Field::GuestActivityState, state as u64).launch();
        assert_eq!(self.rig.cpu.vmx_mode(), VmxMode::NonRoot, "entry failed: {:?}", self.events().last());
        self
    }

    /// Looks for events, as the boundary before the next instruction does.
    pub fn boundary(&mut self) -> &mut Self {
        self.rig.cpu.check_events();
        self
    }

    /// Takes the one event with the highest priority.
    pub fn boundary_once(&mut self) -> &mut Self {
        self.rig.cpu.check_events_at_most(1);
        self
    }

    pub fn init(&mut self, cause: u64) -> &mut Self {
        self.rig.mailbox.post_init(cause);
        self.boundary()
    }

    pub fn sipi(&mut self, vector: u8, cause: u64) -> &mut Self {
        self.rig.mailbox.post_sipi(vector, cause);
        self.boundary()
    }

    pub fn nmi(&mut self, cause: u64) -> &mut Self {
        self.rig.mailbox.post_nmi(cause);
        self.boundary()
    }

    pub fn interrupt(&mut self, vector: u8) -> &mut Self {
        self.rig.mailbox.post_interrupt(vector, false);
        self.boundary()
    }

    pub fn events(&self) -> Vec<Event> {
        self.rig.world.lock().unwrap().events.clone()
    }

    pub fn clear_events(&mut self) -> &mut Self {
        self.rig.world.lock().unwrap().events.clear();
        self
    }

    /// The fates of the INIT or SIPI with this cause, in order.
    pub fn fates(&self, cause: u64) -> Vec<Fate> {
        let fate = |e: &Event| match e.detail {
            Detail::Init(fate) | Detail::Sipi { fate, .. } | Detail::Nmi(fate) if e.cause == cause => Some(fate),
            _ => None,
        };
        self.events().iter().filter_map(fate).collect()
    }

    pub fn mode(&self) -> VmxMode {
        self.rig.cpu.vmx_mode()
    }

    pub fn activity(&self) -> ActivityState {
        self.rig.cpu.activity()
    }

    pub fn rip(&self) -> u64 {
        self.rig.cpu.regs.rip()
    }

    /// The handler that RIP is at.
    pub fn handler(&self) -> Option<u64> {
        let rip = self.rip().checked_sub(HANDLERS)?;
        (rip < 0x1000 && rip.is_multiple_of(16)).then_some(rip / 16)
    }

    /// That the last thing that happened is a VM exit to L1 for `reason`.
    #[track_caller]
    pub fn assert_exit(&self, reason: ExitReason) {
        assert_eq!(ExitReason::from_number(self.get(Field::ExitReason) as u16), Some(reason));
        assert_eq!((self.mode(), self.rip(), self.activity()), (VmxMode::Root, HOST_RIP, ActivityState::Active));
        assert_eq!(self.rig.r(slot::RSP), STACK);
        assert_eq!(self.get(Field::EntryInterruptionInfo) >> 31, 0, "R18: no longer valid");
        assert_eq!(self.get(Field::GuestInterruptibility) & 4, 0, "R18: no SMI blocking");
    }

    #[track_caller]
    pub fn assert_entry_failure(&self, check: u16) {
        let failed = self.events().iter().rev().find_map(|e| match e.detail {
            Detail::VmEntryFailed { check, exit_reason, .. } => Some((check, exit_reason)),
            _ => None,
        });
        assert_eq!(failed, Some((check, 33 | 1 << 31)));
        assert_eq!(self.get(Field::ExitReason), 33 | 1 << 31);
        assert_eq!((self.mode(), self.rip()), (VmxMode::Root, HOST_RIP));
    }

    #[track_caller]
    pub fn assert_vm_fail(&self, error: InstructionError) {
        let status = self.rig.cpu.flags.bits() & crate::arch::cr::rflags::ARITHMETIC;
        assert_eq!(status, crate::arch::cr::rflags::ZF);
        let found = InstructionError::from_number(self.get(Field::InstructionError) as u16);
        assert_eq!((found, self.mode()), (Some(error), VmxMode::Root));
    }
}

impl Bench {
    /// The same, with the RIP that was saved.
    #[track_caller]
    pub fn assert_exit_at(&self, reason: ExitReason, guest_rip: u64) {
        // L1 may have gone on.
        assert_eq!(ExitReason::from_number(self.get(Field::ExitReason) as u16), Some(reason));
        assert_eq!((self.mode(), self.get(Field::GuestRip)), (VmxMode::Root, guest_rip));
    }
}
