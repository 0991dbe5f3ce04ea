//! Far JMP and CALL through call gates, task gates and TSSs (SDM 3, "Call Gates"; SDM 2, "CALL").

use crate::arch::descriptor::{Descriptor, Selector};
use crate::arch::segment::system;
use crate::cpu::op::Op;
use crate::cpu::seg::{Segment, reg};
use crate::cpu::segload::Found;
use crate::cpu::{Cpu, Flow, Stop, slot};
use crate::vmx::TaskSwitchSource;

impl Cpu {
    pub(super) fn far_system(&mut self, op: &Op, selector: Selector, mut target: Found, call: bool) -> Flow {
        let error = selector.error();
        let d = target.descriptor;
        let long = self.long_mode();
        let gate = d.kind() == system::CALL_GATE || d.kind() == system::CALL_GATE16 && !long;
        let task = matches!(d.kind(), system::TASK_GATE | system::TSS_AVAILABLE | system::TSS16_AVAILABLE) && !long;
        if !gate && !task || d.dpl() < self.cpl.max(selector.rpl()) {
            return Err(Stop::gp(error));
        }
        if !d.p() {
            return Err(Stop::np(error));
        }
        if gate {
            let bits = match d.kind() {
                system::CALL_GATE16 => 16,
                _ if long => 64,
                _ => 32,
            };
            if long {
                self.find_upper_half(selector, &mut target, Stop::gp)?;
            }
            return self.through_call_gate(op, &target.descriptor, bits, call);
        }
        let how = if call { TaskSwitchSource::Call } else { TaskSwitchSource::Jump };
        if d.kind() == system::TASK_GATE {
            let tss = d.gate_selector();
            let found = self.available_task(tss)?;
            return self.switch_task_by(op, tss, found, how);
        }
        if selector.local() {
            return Err(Stop::gp(error));
        }
        self.switch_task_by(op, selector, target, how)
    }

    fn through_call_gate(&mut self, op: &Op, gate: &Descriptor, bits: u32, call: bool) -> Flow {
        let selector = gate.gate_selector();
        if selector.is_null() {
            return Err(Stop::GP0);
        }
        let error = selector.error();
        let mut code = self.find_descriptor(selector, Stop::gp)?;
        let d = code.descriptor;
        let not_long = bits == 64 && (!d.ar().l() || d.ar().db());
        let inner = call && !d.is_conforming_code() && d.dpl() < self.cpl;
        let privilege = d.is_conforming_code() && d.dpl() <= self.cpl || d.dpl() == self.cpl || inner;
        if !d.is_code() || not_long || !privilege {
            return Err(Stop::gp(error));
        }
        if !d.p() {
            return Err(Stop::np(error));
        }
        let rip = gate.gate_offset(bits);
        let next = self.next_rip(op);
        let old_cs = u64::from(self.segment(reg::CS).selector);
        let cpl = if inner { d.dpl() } else { self.cpl };
        let mut frame = match (inner, bits) {
            (false, _) => self.current_frame(),
            (true, 64) => {
                let rsp = self.tss_stack_64(4 + 8 * u64::from(cpl))?;
                self.long_frame(Segment::null(cpl.into(), cpl), rsp, cpl)
            }
            (true, _) => {
                let (ss, esp) = self.tss_stack(cpl)?;
                let ss = self.inner_stack_segment(ss, cpl)?;
                self.inner_frame(ss, esp, cpl)
            }
        };
        if inner {
            self.push_to(&mut frame, bits, self.segment(reg::SS).selector.into())?;
            self.push_to(&mut frame, bits, self.regs.r(slot::RSP))?;
            let parameters = if bits == 64 { 0 } else { gate.gate_parameters() };
            for i in (0..parameters).rev() {
                let v = self.peek_wide(bits, u64::from(i) * u64::from(bits / 8))?;
                self.push_to(&mut frame, bits, v)?;
            }
        }
        if call {
            self.push_to(&mut frame, bits, old_cs)?;
            self.push_to(&mut frame, bits, next)?;
        }
        self.check_new_rip(&d, rip)?;
        let cs = self.code_segment(selector, &mut code, cpl)?;
        self.use_frame(&frame);
        self.cpl = cpl;
        self.jump_far(cs, rip)
    }
}
