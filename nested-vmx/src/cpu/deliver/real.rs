//! Real-address mode: the interrupt vector table (SDM 3, "Interrupt and Exception Handling in Real-Address Mode").

use super::Vectored;
use crate::cpu::seg::{Segment, reg};
use crate::cpu::{Cpu, Stop, flags};

impl Cpu {
    pub(super) fn deliver_real(&mut self, event: &Vectored) -> Result<(), Stop> {
        let at = u64::from(event.vector) * 4;
        if at + 3 > u64::from(self.idtr.limit) {
            return Err(Stop::GP0);
        }
        let entry: u32 = self.load_system(self.idtr.base.wrapping_add(at) & 0xffff_ffff)?;
        let (ip, selector) = (u64::from(entry & 0xffff), (entry >> 16) as u16);
        let cs = *self.segment(reg::CS);
        let mut frame = self.current_frame();
        self.push_to(&mut frame, 16, self.flags.bits())?;
        self.push_to(&mut frame, 16, cs.selector.into())?;
        self.push_to(&mut frame, 16, self.return_rip(event))?;
        let new = Segment { limit: cs.limit.max(0xffff), ..Segment::real(selector, true) };
        self.use_frame(&frame);
        self.set_segment(reg::CS, new);
        self.regs.set_rip(ip);
        self.enter_handler_flags(true);
        self.flags.set(flags::AC, false);
        Ok(())
    }
}
