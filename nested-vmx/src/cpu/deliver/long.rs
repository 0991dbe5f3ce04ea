//! 64-bit handlers (SDM 3, "Exception and Interrupt Handling in 64-bit Mode").

use super::Vectored;
use crate::arch::descriptor::Descriptor;
use crate::arch::is_canonical;
use crate::arch::segment::system;
use crate::cpu::seg::{Segment, reg};
use crate::cpu::{Cpu, Stop, slot};

/// Offsets in the 64-bit TSS.
const TSS_RSP0: u64 = 4;
const TSS_IST0: u64 = 0x1c;

impl Cpu {
    pub(super) fn deliver_long(&mut self, event: &Vectored) -> Result<(), Stop> {
        let at = u64::from(event.vector) * 16;
        // Index and the IDT flag.
        let error = u32::from(event.vector) << 3 | 2;
        if at + 15 > u64::from(self.idtr.limit) {
            return Err(Stop::gp(error));
        }
        let lin = self.idtr.base.wrapping_add(at);
        let gate = Descriptor { lower: self.load_system(lin)?, upper: self.load_system(lin.wrapping_add(8))? };
        if gate.s() || !matches!(gate.kind(), system::INTERRUPT_GATE | system::TRAP_GATE) {
            return Err(Stop::gp(error));
        }
        if event.by_program() && gate.dpl() < self.cpl {
            return Err(Stop::gp(error));
        }
        if !gate.p() {
            return Err(Stop::np(error));
        }
        let selector = gate.gate_selector();
        if selector.is_null() {
            return Err(Stop::GP0);
        }
        let mut code = self.find_descriptor(selector, Stop::gp)?;
        let (d, error) = (code.descriptor, selector.error());
        if !d.is_code() || d.dpl() > self.cpl || !d.ar().l() || d.ar().db() {
            return Err(Stop::gp(error));
        }
        if !d.p() {
            return Err(Stop::np(error));
        }
        let cpl = if d.is_conforming_code() { self.cpl } else { d.dpl() };
        let inner = cpl < self.cpl;
        let ss = if inner { Segment::null(cpl.into(), cpl) } else { *self.segment(reg::SS) };
        let old_ss = self.segment(reg::SS).selector;
        let old_rsp = self.regs.r(slot::RSP);
        let rsp = match gate.gate_ist() {
            0 if inner => self.tss_stack_64(TSS_RSP0 + 8 * u64::from(cpl))?,
            0 => old_rsp,
            n => self.tss_stack_64(TSS_IST0 + 8 * u64::from(n))?,
        };
        let offset = gate.gate_offset(64);
        if !is_canonical(offset) {
            return Err(Stop::GP0);
        }
        let mut frame = self.long_frame(ss, rsp & !0xf, cpl);
        self.push_to(&mut frame, 64, old_ss.into())?;
        self.push_to(&mut frame, 64, old_rsp)?;
        self.push_to(&mut frame, 64, self.pushed_flags(event))?;
        self.push_to(&mut frame, 64, self.segment(reg::CS).selector.into())?;
        self.push_to(&mut frame, 64, self.return_rip(event))?;
        if let Some(error) = event.error {
            self.push_to(&mut frame, 64, error.into())?;
        }
        let cs = self.code_segment(selector, &mut code, cpl)?;
        self.use_frame(&frame);
        self.set_segment(reg::CS, cs);
        self.cpl = cpl;
        self.regs.set_rip(offset);
        self.enter_handler_flags(gate.kind() == system::INTERRUPT_GATE);
        Ok(())
    }

    /// A stack pointer of the 64-bit TSS.
    pub(crate) fn tss_stack_64(&mut self, at: u64) -> Result<u64, Stop> {
        let tr = *self.segment(reg::TR);
        if at + 7 > u64::from(tr.limit) {
            return Err(Stop::ts(u32::from(tr.selector & !3)));
        }
        let rsp = self.load_system(tr.base.wrapping_add(at))?;
        if is_canonical(rsp) { Ok(rsp) } else { Err(Stop::SS0) }
    }
}
