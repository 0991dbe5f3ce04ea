//! A processor on a bench: for unit tests.

use crate::apic::ApicIdentity;
use crate::arch::cr::{Cr0, Cr4};
use crate::arch::efer::Efer;
use crate::arch::segment::AccessRights;
use crate::bus::{Bus, BusFlow, IpiMessage};
use crate::cpu::seg::{Segment, reg};
use crate::cpu::{Cpu, CpuConfig, RunExit};
use crate::event::{Event, EventKind};
use crate::mailbox::Mailbox;
use crate::mem::Ram;
use iced_x86::code_asm::CodeAssembler;
use std::sync::{Arc, Mutex};

/// What the bus saw, shared with the test.
#[derive(Default)]
pub struct World {
    pub events: Vec<Event>,
    pub ipis: Vec<IpiMessage>,
    /// (port, size, value) of each OUT.
    pub outs: Vec<(u16, u8, u32)>,
    /// What IN reads next; all ones when empty.
    pub ins: Vec<u32>,
    pub mmio_writes: Vec<(u64, u8, u64)>,
    pub extint: Option<u8>,
    /// What another processor does while this one waits to be alone.
    pub before_exclusive: Option<Box<dyn FnOnce() + Send>>,
    next_cause: u64,
}

pub struct TestBus(pub Arc<Mutex<World>>);

impl Bus for TestBus {
    fn io_read(&mut self, _port: u16, _size: u8) -> u32 {
        self.0.lock().unwrap().ins.pop().unwrap_or(u32::MAX)
    }
    fn io_write(&mut self, port: u16, size: u8, value: u32) -> BusFlow {
        self.0.lock().unwrap().outs.push((port, size, value));
        if port == 0xf4 { BusFlow::Stop } else { BusFlow::Continue }
    }
    fn mmio_read(&mut self, _gpa: u64, _size: u8) -> u64 {
        u64::MAX
    }
    fn mmio_write(&mut self, gpa: u64, size: u8, value: u64) -> BusFlow {
        self.0.lock().unwrap().mmio_writes.push((gpa, size, value));
        BusFlow::Continue
    }
    fn acknowledge_extint(&mut self) -> Option<u8> {
        self.0.lock().unwrap().extint.take()
    }
    fn send_ipi(&mut self, message: IpiMessage) {
        self.0.lock().unwrap().ipis.push(message);
    }
    fn eoi_broadcast(&mut self, _vector: u8) {}
    fn apic_changed(&mut self, _identity: ApicIdentity) {}
    fn tsc(&mut self, retired: u64) -> u64 {
        retired
    }
    fn instructions_until(&mut self, retired: u64, deadline_tsc: u64) -> u64 {
        deadline_tsc.saturating_sub(retired)
    }
    fn new_cause(&mut self) -> u64 {
        let mut w = self.0.lock().unwrap();
        w.next_cause += 1;
        w.next_cause
    }
    fn expand_cause(&mut self, low: u32) -> u64 {
        low.into()
    }
    fn wants(&self, _kind: EventKind) -> bool {
        true
    }
    fn event(&mut self, event: Event) {
        self.0.lock().unwrap().events.push(event);
    }
    fn exclusive(&mut self, f: &mut dyn FnMut()) {
        let before = self.0.lock().unwrap().before_exclusive.take();
        if let Some(before) = before {
            before();
        }
        f();
    }
}

/// One processor with 16 MiB of RAM and its world.
pub struct Rig {
    pub cpu: Cpu,
    pub ram: Arc<Ram>,
    pub mailbox: Arc<Mailbox>,
    pub world: Arc<Mutex<World>>,
}

/// Where [`Rig::code`] puts code, and where its stack begins.
pub const CODE: u64 = 0x10_0000;
pub const STACK: u64 = 0x20_0000;
/// Free for the test.
pub const DATA: u64 = 0x30_0000;

/// Page tables of [`Rig::long`]: 4 KiB pages for the first 2 MiB, 2 MiB pages up to 1 GiB, identity, user-accessible.
pub const PML4: u64 = 0x1000;
pub const PDPT: u64 = 0x2000;
pub const PD: u64 = 0x3000;
pub const PT: u64 = 0x4000;

fn segment(selector: u16, kind: u8, l: bool, db: bool, dpl: u8) -> Segment {
    let ar =
        AccessRights::new().with_kind(kind).with_s(true).with_p(true).with_l(l).with_db(db).with_g(true).with_dpl(dpl);
    Segment { selector, base: 0, limit: u32::MAX, ar }
}

impl Rig {
    /// In the state that RESET leaves, bootstrap processor.
    pub fn reset() -> Self {
        let ram = Arc::new(Ram::new(16 << 20).unwrap());
        let mailbox = Arc::new(Mailbox::default());
        let world = Arc::new(Mutex::new(World::default()));
        let bus = Box::new(TestBus(Arc::clone(&world)));
        let cpu = Cpu::new(
            CpuConfig { apic_id: 0, bsp: true, count: 1, random_seed: 0 },
            Arc::clone(&ram),
            Arc::clone(&mailbox),
            bus,
        );
        Self { cpu, ram, mailbox, world }
    }

    /// Real mode at `CODE`, CS.base = `CODE`, the data segments at 0, stack at 0x8000.
    pub fn real() -> Self {
        let mut rig = Self::reset();
        let c = &mut rig.cpu;
        c.seg[usize::from(reg::CS)] = Segment { base: CODE, ..Segment::real(0x1000, true) };
        c.regs.set_rip(0);
        c.regs.set_r(crate::cpu::slot::RSP, 0x8000);
        c.mode_changed();
        rig
    }

    /// 64-bit mode, CPL `cpl`.
    pub fn long_at(cpl: u8) -> Self {
        let mut rig = Self::reset();
        let w = |gpa: u64, v: u64| rig.ram.write(gpa, &v.to_le_bytes()).unwrap();
        w(PML4, PDPT | 7);
        w(PDPT, PD | 7);
        w(PD, PT | 7);
        for i in 0..512 {
            w(PT + 8 * i, i << 12 | 7);
            if i > 0 {
                w(PD + 8 * i, i << 21 | 0x87);
            }
        }
        let c = &mut rig.cpu;
        c.cr0 = Cr0::new().with_pe(true).with_pg(true).with_ne(true).with_wp(true).with_et(true);
        c.cr4 = Cr4::new().with_pae(true).with_osfxsr(true).with_osxmmexcpt(true);
        c.efer = Efer::new().with_lme(true).with_lma(true).with_nxe(true).with_sce(true);
        c.cr3 = PML4;
        c.seg[usize::from(reg::CS)] = segment(0x8 | u16::from(cpl), 0xb, true, false, cpl);
        for s in [reg::SS, reg::DS, reg::ES, reg::FS, reg::GS] {
            c.seg[usize::from(s)] = segment(0x10 | u16::from(cpl), 0x3, false, true, cpl);
        }
        c.cpl = cpl;
        c.regs.set_rip(CODE);
        c.regs.set_r(crate::cpu::slot::RSP, STACK);
        c.mode_changed();
        rig
    }

    pub fn long() -> Self {
        Self::long_at(0)
    }

    /// 32-bit protected mode without paging, CPL 0, flat segments.
    pub fn protected() -> Self {
        let mut rig = Self::reset();
        let c = &mut rig.cpu;
        c.cr0 = Cr0::new().with_pe(true).with_ne(true).with_et(true);
        c.seg[usize::from(reg::CS)] = segment(0x8, 0xb, false, true, 0);
        for s in [reg::SS, reg::DS, reg::ES, reg::FS, reg::GS] {
            c.seg[usize::from(s)] = segment(0x10, 0x3, false, true, 0);
        }
        c.regs.set_rip(CODE);
        c.regs.set_r(crate::cpu::slot::RSP, STACK);
        c.mode_changed();
        rig
    }

    pub fn bits(&self) -> u32 {
        self.cpu.mode.code_bits.into()
    }

    /// Puts assembled code at `CODE`.
    pub fn code(&mut self, f: impl FnOnce(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>) -> &mut Self {
        let mut a = CodeAssembler::new(self.bits()).unwrap();
        f(&mut a).unwrap();
        // Branch targets are relative to RIP, which counts from CS.base.
        let bytes = a.assemble(CODE - self.cpu.mode.cs_base).unwrap();
        self.ram.write(CODE, &bytes).unwrap();
        self
    }

    /// The `n`th operation of the block at `CODE`, for tests of one handler. RIP must be at `CODE`.
    pub fn op(&mut self, n: usize) -> crate::cpu::Op {
        let mut bytes = [0; 64];
        self.ram.read(CODE, &mut bytes).unwrap();
        self.cpu.decode_for_test(&bytes)[n]
    }

    pub fn run(&mut self, instructions: u64) -> RunExit {
        self.cpu.run(instructions)
    }

    pub fn r(&self, n: u8) -> u64 {
        self.cpu.regs.r(n)
    }

    pub fn set_r(&mut self, n: u8, v: u64) -> &mut Self {
        self.cpu.regs.set_r(n, v);
        self
    }

    pub fn read_u64(&self, gpa: u64) -> u64 {
        let mut b = [0; 8];
        self.ram.read(gpa, &mut b).unwrap();
        u64::from_le_bytes(b)
    }

    pub fn write_u64(&self, gpa: u64, v: u64) {
        self.ram.write(gpa, &v.to_le_bytes()).unwrap();
    }
}
