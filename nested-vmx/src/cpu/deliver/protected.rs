//! Protected mode outside long mode (SDM 3, "Exception and Interrupt Handling" and SDM 2, "INT n").

use super::Vectored;
use crate::arch::descriptor::{Descriptor, Selector};
use crate::arch::segment::system;
use crate::cpu::seg::{Segment, reg};
use crate::cpu::{Cpu, Stop, flags, slot};

impl Cpu {
    pub(super) fn deliver_protected(&mut self, event: &Vectored) -> Result<(), Stop> {
        let at = u64::from(event.vector) * 8;
        // Index and the IDT flag.
        let error = u32::from(event.vector) << 3 | 2;
        if at + 7 > u64::from(self.idtr.limit) {
            return Err(Stop::gp(error));
        }
        let lower = self.load_system(self.idtr.base.wrapping_add(at) & 0xffff_ffff)?;
        let gate = Descriptor { lower, upper: 0 };
        let known = matches!(
            gate.kind(),
            system::TASK_GATE
                | system::INTERRUPT_GATE16
                | system::TRAP_GATE16
                | system::INTERRUPT_GATE
                | system::TRAP_GATE
        );
        if gate.s() || !known || event.by_program() && gate.dpl() < self.cpl {
            return Err(Stop::gp(error));
        }
        if !gate.p() {
            return Err(Stop::np(error));
        }
        if gate.kind() == system::TASK_GATE {
            let return_ip = self.return_rip(event);
            return self.deliver_to_task(event, gate.gate_selector(), return_ip);
        }
        let bits = if matches!(gate.kind(), system::INTERRUPT_GATE | system::TRAP_GATE) { 32 } else { 16 };
        let interrupt_gate = matches!(gate.kind(), system::INTERRUPT_GATE | system::INTERRUPT_GATE16);
        let selector = gate.gate_selector();
        if selector.is_null() {
            return Err(Stop::GP0);
        }
        let mut code = self.find_descriptor(selector, Stop::gp)?;
        let (d, error) = (code.descriptor, selector.error());
        if !d.is_code() || d.dpl() > self.cpl {
            return Err(Stop::gp(error));
        }
        if !d.p() {
            return Err(Stop::np(error));
        }
        let cpl = if d.is_conforming_code() { self.cpl } else { d.dpl() };
        let v86 = self.virtual_8086();
        if v86 && cpl != 0 {
            return Err(Stop::gp(error));
        }
        let inner = cpl < self.cpl;
        let mut frame = if inner {
            let (ss, esp) = self.tss_stack(cpl)?;
            let ss = self.inner_stack_segment(ss, cpl)?;
            self.inner_frame(ss, esp, cpl)
        } else {
            self.current_frame()
        };
        if v86 {
            for n in [reg::GS, reg::FS, reg::DS, reg::ES] {
                self.push_to(&mut frame, bits, self.segment(n).selector.into())?;
            }
        }
        if inner {
            self.push_to(&mut frame, bits, self.segment(reg::SS).selector.into())?;
            self.push_to(&mut frame, bits, self.regs.r(slot::RSP))?;
        }
        self.push_to(&mut frame, bits, self.pushed_flags(event))?;
        self.push_to(&mut frame, bits, self.segment(reg::CS).selector.into())?;
        self.push_to(&mut frame, bits, self.return_rip(event))?;
        if let Some(error) = event.error {
            self.push_to(&mut frame, bits, error.into())?;
        }
        let eip = gate.gate_offset(bits);
        let cs = self.code_segment(selector, &mut code, cpl)?;
        if eip > u64::from(cs.limit) {
            return Err(Stop::GP0);
        }
        if v86 {
            for n in [reg::GS, reg::FS, reg::DS, reg::ES] {
                self.set_segment(n, Segment::null(0, 0));
            }
        }
        self.use_frame(&frame);
        self.set_segment(reg::CS, cs);
        self.cpl = cpl;
        self.regs.set_rip(eip);
        self.enter_handler_flags(interrupt_gate);
        Ok(())
    }

    /// SS and ESP of an inner privilege level, from the 16-bit or 32-bit TSS.
    pub(crate) fn tss_stack(&mut self, cpl: u8) -> Result<(Selector, u64), Stop> {
        let tr = *self.segment(reg::TR);
        let wide = tr.ar.kind() & 8 != 0;
        let (at, len) = if wide { (4 + 8 * u64::from(cpl), 6) } else { (2 + 4 * u64::from(cpl), 4) };
        if at + len - 1 > u64::from(tr.limit) {
            return Err(Stop::ts(u32::from(tr.selector & !3)));
        }
        let lin = |offset: u64| tr.base.wrapping_add(offset) & 0xffff_ffff;
        if wide {
            let esp: u32 = self.load_system(lin(at))?;
            let ss: u16 = self.load_system(lin(at + 4))?;
            Ok((Selector(ss), esp.into()))
        } else {
            let sp: u16 = self.load_system(lin(at))?;
            let ss: u16 = self.load_system(lin(at + 2))?;
            Ok((Selector(ss), sp.into()))
        }
    }

    /// A stack segment that a TSS names, for code of privilege `cpl`.
    pub(crate) fn inner_stack_segment(&mut self, selector: Selector, cpl: u8) -> Result<Segment, Stop> {
        if selector.is_null() {
            return Err(Stop::ts(0));
        }
        self.checked_stack_segment(selector, cpl, Stop::ts)
    }

    /// The I/O privilege level.
    pub(crate) fn iopl(&self) -> u8 {
        (self.flags.bits() >> flags::IOPL.trailing_zeros()) as u8 & 3
    }
}
