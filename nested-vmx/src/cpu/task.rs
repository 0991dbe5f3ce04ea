//! Task switches by hardware (SDM 3, "Task Management").

use super::deliver::Vectored;
use super::op::Op;
use super::seg::{Segment, reg};
use super::segload::{Found, system_segment};
use super::{Cpu, Flow, Stop, StopKind, flags};
use crate::arch::cr::dr;
use crate::arch::descriptor::{Descriptor, Selector};
use crate::arch::segment::system;
use crate::vmx::TaskSwitchSource;

/// Where the dynamic fields of a TSS are.
struct Layout {
    wide: bool,
    ip: u64,
    segments: u64,
    /// ES, CS, SS, DS, and FS and GS in the 32-bit TSS.
    count: u64,
    ldt: u64,
    /// The smallest limit.
    limit: u32,
}

const TSS32: Layout = Layout { wide: true, ip: 32, segments: 72, count: 6, ldt: 96, limit: 103 };
const TSS16: Layout = Layout { wide: false, ip: 14, segments: 34, count: 4, ldt: 42, limit: 43 };
const TSS32_CR3: u64 = 28;
const TSS32_TRAP: u64 = 100;
/// DR7's local enables end with the task.
const DR7_LOCAL: u64 = 0x155;

/// What a TSS holds of a task.
#[derive(Default)]
struct Task {
    cr3: Option<u32>,
    ip: u64,
    flags: u64,
    general: [u64; 8],
    selectors: [u16; 6],
    ldt: u16,
    trap: bool,
}

/// A fault of a task switch. Once the new task is committed, it belongs to the new task's first instruction.
pub(crate) enum TaskFault {
    Old(Stop),
    New(Stop),
}

impl From<Stop> for TaskFault {
    fn from(stop: Stop) -> Self {
        Self::Old(stop)
    }
}

fn layout(kind: u8) -> &'static Layout {
    if kind & 8 != 0 { &TSS32 } else { &TSS16 }
}

impl Cpu {
    fn load_tss(&mut self, base: u64, at: u64, wide: bool) -> Result<u64, Stop> {
        let lin = base.wrapping_add(at) & 0xffff_ffff;
        if wide { self.load_system::<u32>(lin).map(u64::from) } else { self.load_system::<u16>(lin).map(u64::from) }
    }

    fn store_tss(&mut self, base: u64, at: u64, wide: bool, v: u64) -> Result<(), Stop> {
        let lin = base.wrapping_add(at) & 0xffff_ffff;
        if wide { self.store_system(lin, v as u32) } else { self.store_system(lin, v as u16) }
    }

    fn read_task(&mut self, base: u64, l: &Layout) -> Result<Task, Stop> {
        let step = if l.wide { 4 } else { 2 };
        let mut t = Task { ip: self.load_tss(base, l.ip, l.wide)?, ..Task::default() };
        t.flags = self.load_tss(base, l.ip + step, l.wide)?;
        for (i, r) in t.general.iter_mut().enumerate() {
            *r = self.load_tss(base, l.ip + step * (2 + i as u64), l.wide)?;
        }
        for i in 0..l.count {
            t.selectors[i as usize] = self.load_tss(base, l.segments + step * i, false)? as u16;
        }
        t.ldt = self.load_tss(base, l.ldt, false)? as u16;
        if l.wide {
            t.cr3 = Some(self.load_tss(base, TSS32_CR3, true)? as u32);
            t.trap = self.load_tss(base, TSS32_TRAP, false)? & 1 != 0;
        }
        Ok(t)
    }

    fn write_task(&mut self, base: u64, l: &Layout, ip: u64, flags: u64) -> Result<(), Stop> {
        let step = if l.wide { 4 } else { 2 };
        self.store_tss(base, l.ip, l.wide, ip)?;
        self.store_tss(base, l.ip + step, l.wide, flags)?;
        for i in 0..8 {
            let v = self.regs.r(i);
            self.store_tss(base, l.ip + step * (2 + u64::from(i)), l.wide, v)?;
        }
        for i in 0..l.count {
            let selector = self.segment(i as u8).selector;
            self.store_tss(base, l.segments + step * i, false, selector.into())?;
        }
        Ok(())
    }

    /// Switches to the task of a TSS whose descriptor has been checked for type and privilege. `return_ip` is where the
    /// old task goes on.
    pub(crate) fn switch_task(
        &mut self,
        selector: Selector,
        mut found: Found,
        source: TaskSwitchSource,
        return_ip: u64,
        error: Option<u32>,
    ) -> Result<(), TaskFault> {
        if !found.descriptor.p() {
            return Err(Stop::np(selector.error()).into());
        }
        self.intercept_task_switch(selector.0, source)?;
        let l = layout(found.descriptor.kind());
        if found.descriptor.limit() < l.limit {
            return Err(Stop::ts(selector.error()).into());
        }
        let base = found.descriptor.base32();
        let mut task = self.read_task(base, l)?;
        let old = *self.segment(reg::TR);
        let nested = matches!(source, TaskSwitchSource::Call | TaskSwitchSource::IdtGate);
        let mut saved = self.flags.bits();
        if source == TaskSwitchSource::Iret {
            saved &= !flags::NT;
        }
        self.write_task(old.base, layout(old.ar.kind()), return_ip, saved)?;
        if nested {
            self.store_tss(base, 0, false, old.selector.into())?;
            task.flags |= flags::NT;
        } else {
            let lin = self.gdtr.base.wrapping_add(Selector(old.selector).offset()) & 0xffff_ffff;
            self.clear_bits_system(lin, Descriptor::BUSY)?;
        }
        if source != TaskSwitchSource::Iret {
            self.set_bits_system(found.lin, Descriptor::BUSY)?;
        }
        found.descriptor.lower |= Descriptor::BUSY;
        // Committed: faults from here on are the new task's.
        self.set_segment(reg::TR, system_segment(selector, &found.descriptor));
        self.enter_task(&task).and_then(|()| self.finish_task(&task, l, error)).map_err(TaskFault::New)
    }

    /// Loads what cannot fault, and leaves all segments null.
    fn enter_task(&mut self, t: &Task) -> Result<(), Stop> {
        self.cr0.set_ts(true);
        self.dr7 &= !DR7_LOCAL;
        self.regs.set_rip(t.ip);
        self.flags.set_bits(t.flags);
        for (i, v) in t.general.iter().enumerate() {
            self.regs.set_r(i as u8, *v);
        }
        for (i, selector) in t.selectors.iter().enumerate() {
            self.set_segment(i as u8, Segment::null(*selector, 0));
        }
        self.set_segment(reg::LDTR, Segment::null(t.ldt, 0));
        self.cpl = if self.virtual_8086() { 3 } else { Selector(t.selectors[usize::from(reg::CS)]).rpl() };
        self.mode_changed();
        match t.cr3 {
            Some(cr3) if self.cr0.pg() => self.write_cr3(cr3.into()),
            _ => Ok(()),
        }
    }

    /// Loads the segments, with their checks.
    fn finish_task(&mut self, t: &Task, l: &Layout, error: Option<u32>) -> Result<(), Stop> {
        let ldt = self.checked_ldt(Selector(t.ldt), Stop::ts)?;
        self.set_segment(reg::LDTR, ldt);
        if self.virtual_8086() {
            for (i, selector) in t.selectors.iter().enumerate() {
                self.set_segment(i as u8, Segment::v8086(*selector));
            }
        } else {
            let cs = self.task_code(Selector(t.selectors[usize::from(reg::CS)]))?;
            self.set_segment(reg::CS, cs);
            let ss = self.checked_stack_segment(Selector(t.selectors[usize::from(reg::SS)]), self.cpl, Stop::ts)?;
            self.set_segment(reg::SS, ss);
            for n in [reg::DS, reg::ES, reg::FS, reg::GS] {
                let s = self.checked_data_segment(Selector(t.selectors[usize::from(n)]), self.cpl, Stop::ts)?;
                self.set_segment(n, s);
            }
        }
        self.mode_changed();
        if let Some(error) = error {
            let mut frame = self.current_frame();
            self.push_to(&mut frame, if l.wide { 32 } else { 16 }, error.into())?;
            self.use_frame(&frame);
        }
        if t.trap {
            self.pending_debug |= dr::DR6_BT;
        }
        if t.ip > u64::from(self.segment(reg::CS).limit) { Err(Stop::GP0) } else { Ok(()) }
    }

    fn task_code(&mut self, selector: Selector) -> Result<Segment, Stop> {
        if selector.is_null() {
            return Err(Stop::ts(0));
        }
        let error = selector.error();
        let mut f = self.find_descriptor(selector, Stop::ts)?;
        let (d, rpl) = (&f.descriptor, selector.rpl());
        let privilege = if d.is_conforming_code() { d.dpl() <= rpl } else { d.dpl() == rpl };
        if !d.is_code() || !privilege {
            return Err(Stop::ts(error));
        }
        if !d.p() {
            return Err(Stop::np(error));
        }
        self.code_segment(selector, &mut f, rpl)
    }

    /// A TSS that a task gate or a far transfer names: in the GDT and available.
    pub(crate) fn available_task(&mut self, selector: Selector) -> Result<Found, Stop> {
        let error = selector.error();
        if selector.local() {
            return Err(Stop::gp(error));
        }
        let found = self.find_descriptor(selector, Stop::gp)?;
        let available = matches!(found.descriptor.kind(), system::TSS_AVAILABLE | system::TSS16_AVAILABLE);
        if found.descriptor.s() || !available { Err(Stop::gp(error)) } else { Ok(found) }
    }

    /// An instruction switches tasks; nothing of it is left to do after.
    pub(crate) fn switch_task_by(&mut self, op: &Op, selector: Selector, found: Found, how: TaskSwitchSource) -> Flow {
        let next = self.next_rip(op);
        match self.switch_task(selector, found, how, next, None) {
            Ok(()) => Err(Stop::DELIVERED),
            Err(TaskFault::Old(stop)) => Err(stop),
            Err(TaskFault::New(stop)) => {
                self.mode_changed();
                match stop.kind() {
                    StopKind::Exception { vector, error } => self.raise_exception(vector, error),
                    _ => self.vm_exit_of_instruction(0),
                }
                Err(Stop::DELIVERED)
            }
        }
    }

    /// IRET with NT set.
    pub(crate) fn return_to_task(&mut self, op: &Op) -> Flow {
        if self.long_mode() {
            return Err(Stop::GP0);
        }
        let base = self.segment(reg::TR).base;
        let selector = Selector(self.load_tss(base, 0, false)? as u16);
        let error = selector.error();
        if selector.local() || selector.is_null() {
            return Err(Stop::ts(error));
        }
        let found = self.find_descriptor(selector, Stop::ts)?;
        if found.descriptor.s() || !matches!(found.descriptor.kind(), system::TSS_BUSY | system::TSS16_BUSY) {
            return Err(Stop::ts(error));
        }
        self.switch_task_by(op, selector, found, TaskSwitchSource::Iret)
    }

    /// An event whose gate is a task gate.
    pub(crate) fn deliver_to_task(&mut self, event: &Vectored, selector: Selector, return_ip: u64) -> Result<(), Stop> {
        let found = self.available_task(selector)?;
        match self.switch_task(selector, found, TaskSwitchSource::IdtGate, return_ip, event.error) {
            Ok(()) => Ok(()),
            Err(TaskFault::Old(stop)) => Err(stop),
            Err(TaskFault::New(stop)) => {
                self.mode_changed();
                Err(stop)
            }
        }
    }
}
