//! Loading segment registers from descriptor tables (SDM 3, "Protection").

use super::seg::{Segment, reg};
use super::{Cpu, Stop};
use crate::arch::descriptor::{Descriptor, Selector};
use crate::arch::is_canonical;
use crate::arch::segment::{AccessRights, system};

/// A descriptor and where it lies.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Found {
    pub lin: u64,
    pub descriptor: Descriptor,
}

/// The exception that a bad selector raises, with its error code: #GP mostly, #TS for what a TSS holds.
pub(crate) type Fault = fn(u32) -> Stop;

impl Segment {
    /// What a register holds after it was loaded with a null selector; the DPL of SS stays what CPL is.
    pub fn null(selector: u16, dpl: u8) -> Self {
        Self { selector, base: 0, limit: 0, ar: AccessRights::UNUSABLE.with_dpl(dpl) }
    }

    /// As virtual-8086 mode has it.
    pub fn v8086(selector: u16) -> Self {
        Self { selector, base: u64::from(selector) << 4, limit: 0xffff, ar: AccessRights::V8086 }
    }

    /// A code or data segment.
    pub fn from_descriptor(selector: Selector, d: &Descriptor) -> Self {
        Self { selector: selector.0, base: d.base32(), limit: d.limit(), ar: d.ar() }
    }
}

impl Cpu {
    #[inline(always)]
    pub(crate) fn segment(&self, n: u8) -> &Segment {
        &self.seg[usize::from(n & 7)]
    }

    #[inline(always)]
    pub(crate) fn set_segment(&mut self, n: u8, s: Segment) {
        self.seg[usize::from(n & 7)] = s;
    }

    /// The address of `bytes` of a selector's descriptor, when they are inside its table's limit.
    fn descriptor_address(&self, selector: Selector, bytes: u64) -> Option<u64> {
        let (base, limit) = if selector.local() {
            let ldtr = self.segment(reg::LDTR);
            if ldtr.ar.unusable() {
                return None;
            }
            (ldtr.base, u64::from(ldtr.limit))
        } else {
            (self.gdtr.base, u64::from(self.gdtr.limit))
        };
        let lin = base.wrapping_add(selector.offset());
        let lin = if self.long_mode() { lin } else { lin & 0xffff_ffff };
        (selector.offset() + bytes - 1 <= limit).then_some(lin)
    }

    /// Reads the descriptor of a selector that is not null.
    pub(crate) fn find_descriptor(&mut self, selector: Selector, fault: Fault) -> Result<Found, Stop> {
        let lin = self.descriptor_address(selector, 8).ok_or(fault(selector.error()))?;
        let lower = self.load_system(lin)?;
        Ok(Found { lin, descriptor: Descriptor { lower, upper: 0 } })
    }

    /// The upper half of a system descriptor, which has 16 bytes in long mode; its type field must be 0.
    pub(crate) fn find_upper_half(&mut self, selector: Selector, f: &mut Found, fault: Fault) -> Result<(), Stop> {
        self.descriptor_address(selector, 16).ok_or(fault(selector.error()))?;
        let upper: u64 = self.load_system(f.lin.wrapping_add(8))?;
        if upper >> 40 & 0x1f != 0 {
            return Err(fault(selector.error()));
        }
        f.descriptor.upper = upper;
        Ok(())
    }

    /// Sets the accessed flag in memory and in the copy.
    pub(crate) fn mark_accessed(&mut self, f: &mut Found) -> Result<(), Stop> {
        if f.descriptor.lower & Descriptor::ACCESSED == 0 {
            self.set_bits_system(f.lin, Descriptor::ACCESSED)?;
            f.descriptor.lower |= Descriptor::ACCESSED;
        }
        Ok(())
    }

    /// Real and virtual-8086 mode: no descriptor. Real mode keeps limit and rights, which is what makes big real mode.
    pub(crate) fn real_segment(&self, n: u8, selector: u16) -> Segment {
        if self.virtual_8086() {
            return Segment::v8086(selector);
        }
        let old = self.segment(n);
        let base = u64::from(selector) << 4;
        if old.ar.unusable() || n == reg::CS {
            let new = Segment::real(selector, n == reg::CS);
            return Segment { limit: old.limit.max(0xffff), ..new };
        }
        Segment { selector, base, ..*old }
    }

    /// MOV, POP, LDS and their like: loads a segment register other than CS.
    pub(crate) fn load_segment(&mut self, n: u8, selector: u16) -> Result<(), Stop> {
        let s = if !self.protected() {
            self.real_segment(n, selector)
        } else if n == reg::SS {
            self.checked_stack_segment(Selector(selector), self.cpl, Stop::gp)?
        } else {
            self.checked_data_segment(Selector(selector), self.cpl, Stop::gp)?
        };
        self.set_segment(n, s);
        if n == reg::SS {
            self.mode_changed();
        }
        Ok(())
    }

    /// DS, ES, FS or GS for code of privilege `cpl`.
    pub(crate) fn checked_data_segment(&mut self, selector: Selector, cpl: u8, fault: Fault) -> Result<Segment, Stop> {
        if selector.is_null() {
            return Ok(Segment::null(selector.0, 0));
        }
        let mut f = self.find_descriptor(selector, fault)?;
        let d = &f.descriptor;
        let error = selector.error();
        if !d.s() || !d.ar().is_readable() {
            return Err(fault(error));
        }
        if !d.is_conforming_code() && selector.rpl().max(cpl) > d.dpl() {
            return Err(fault(error));
        }
        if !d.p() {
            return Err(Stop::np(error));
        }
        self.mark_accessed(&mut f)?;
        Ok(Segment::from_descriptor(selector, &f.descriptor))
    }

    /// SS for code of privilege `cpl`. A null SS is only for 64-bit code below privilege 3.
    pub(crate) fn checked_stack_segment(&mut self, selector: Selector, cpl: u8, fault: Fault) -> Result<Segment, Stop> {
        if selector.is_null() {
            if self.code64() && cpl != 3 && selector.rpl() == cpl {
                return Ok(Segment::null(selector.0, cpl));
            }
            return Err(fault(0));
        }
        let mut f = self.find_descriptor(selector, fault)?;
        let d = &f.descriptor;
        let error = selector.error();
        if selector.rpl() != cpl || !d.is_writable_data() || d.dpl() != cpl {
            return Err(fault(error));
        }
        if !d.p() {
            return Err(Stop::ss(error));
        }
        self.mark_accessed(&mut f)?;
        Ok(Segment::from_descriptor(selector, &f.descriptor))
    }

    /// CS at privilege `cpl`; the descriptor has been checked.
    pub(crate) fn code_segment(&mut self, selector: Selector, f: &mut Found, cpl: u8) -> Result<Segment, Stop> {
        self.mark_accessed(f)?;
        Ok(Segment::from_descriptor(selector.with_rpl(cpl), &f.descriptor))
    }

    /// After a return to less privilege: data segments that it may not use become null (SDM 2, "RET", "IRET").
    pub(crate) fn drop_privileged_segments(&mut self) {
        for n in [reg::ES, reg::DS, reg::FS, reg::GS] {
            let s = *self.segment(n);
            let conforming = s.ar.is_code() && s.ar.is_conforming();
            if s.ar.usable() && !conforming && s.ar.dpl() < self.cpl {
                // Only the selector and the segment's usability go: 64-bit code goes on with the base of FS and GS.
                self.set_segment(n, Segment { selector: 0, ar: s.ar.with_unusable(true), ..s });
            }
        }
    }

    /// LLDT, or the LDT of a task.
    pub(crate) fn checked_ldt(&mut self, selector: Selector, fault: Fault) -> Result<Segment, Stop> {
        if selector.is_null() {
            return Ok(Segment::null(selector.0, 0));
        }
        let error = selector.error();
        if selector.local() {
            return Err(fault(error));
        }
        let mut f = self.find_descriptor(selector, fault)?;
        if f.descriptor.s() || f.descriptor.kind() != system::LDT {
            return Err(fault(error));
        }
        if !f.descriptor.p() {
            return Err(if fault(0) == Stop::ts(0) { Stop::ts(error) } else { Stop::np(error) });
        }
        if self.long_mode() {
            self.find_upper_half(selector, &mut f, fault)?;
            if !is_canonical(f.descriptor.base64()) {
                return Err(fault(error));
            }
        }
        Ok(system_segment(selector, &f.descriptor))
    }
}

/// LDTR or TR.
pub(crate) fn system_segment(selector: Selector, d: &Descriptor) -> Segment {
    Segment { selector: selector.0, base: d.base64(), limit: d.limit(), ar: d.ar() }
}
