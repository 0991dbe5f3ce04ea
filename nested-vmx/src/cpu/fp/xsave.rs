//! XSAVE, XSAVEOPT, XSAVEC, XRSTOR, XGETBV, XSETBV (SDM 1, "Managing State Using the XSAVE Feature Set"). The
//! components are x87 and SSE, which both lie in the legacy area: the compacted format differs in the header only.

use super::area::{Legacy, XMM_AT};
use super::state::{CONTROL_DEFAULT, MXCSR_DEFAULT, MXCSR_MASK};
use crate::cpu::access::Use;
use crate::cpu::decode::{Decoded, Selected};
use crate::cpu::op::Op;
use crate::cpu::{Cpu, Flow, Stop, slot};
use iced_x86::Mnemonic as M;

const X87: u64 = 1 << 0;
const SSE: u64 = 1 << 1;
/// What XCR0 may hold.
pub(in crate::cpu) const XCR0_MASK: u64 = X87 | SSE;
/// Bytes of an XSAVE area with everything.
pub(in crate::cpu) const XSAVE_AREA_SIZE: u32 = 576;
/// Where XSTATE_BV, XCOMP_BV and 48 reserved bytes are.
const HEADER_AT: u64 = 512;
const COMPACT: u64 = 1 << 63;

impl Cpu {
    /// What all of the family check first.
    fn xsave_ready(&self) -> Flow {
        if !self.cr4.osxsave() {
            return Err(Stop::UD);
        }
        if self.cr0.ts() { Err(Stop::NM) } else { Ok(()) }
    }

    /// The components that EDX:EAX asks for, of those enabled.
    fn requested(&self) -> u64 {
        (self.regs.r(slot::RAX) & 0xffff_ffff | self.regs.r(slot::RDX) << 32) & self.xcr0
    }

    /// XINUSE: the components that are not in their initial state. XGETBV and XSAVEC count MXCSR to SSE.
    fn in_use(&self, with_mxcsr: bool) -> u64 {
        let fp = &self.fp;
        let x87 = fp.control != CONTROL_DEFAULT
            || fp.status | fp.opcode != 0
            || fp.full != 0
            || fp.instruction | fp.data != 0
            || fp.r.iter().any(|&r| r != 0);
        let sse = fp.xmm.iter().any(|&x| x != 0) || with_mxcsr && fp.mxcsr != MXCSR_DEFAULT;
        let component = |used: bool, bit| if used { bit } else { 0 };
        component(x87, X87) | component(sse, SSE)
    }

    fn xsave_area(&self, op: &Op, how: Use) -> Result<u64, Stop> {
        let lin = self.linear(op, u64::from(XSAVE_AREA_SIZE), how)?;
        if lin & 63 != 0 { Err(Stop::GP0) } else { Ok(lin) }
    }

    /// Writes the components `write`, and MXCSR if `mxcsr`.
    fn store_components(&mut self, lin: u64, write: u64, mxcsr: bool, wide: bool) -> Flow {
        let mut area = Legacy::zeroed();
        if write & X87 != 0 {
            self.legacy_x87(&mut area, wide);
            self.store_bytes(lin, &area.0[..24])?;
            self.store_bytes(lin.wrapping_add(32), &area.0[32..XMM_AT])?;
        }
        if mxcsr {
            self.legacy_mxcsr(&mut area);
            self.store_bytes(lin.wrapping_add(24), &area.0[24..32])?;
        }
        if write & SSE != 0 {
            self.legacy_xmm(&mut area);
            let end = self.legacy_end();
            self.store_bytes(lin.wrapping_add(XMM_AT as u64), &area.0[XMM_AT..end])?;
        }
        Ok(())
    }
}

/// XSAVE, and with `OPTIMIZED` XSAVEOPT, which leaves initial components out.
fn xsave<const WIDE: bool, const OPTIMIZED: bool>(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.xsave_ready()?;
    let lin = cpu.xsave_area(op, Use::Write)?;
    cpu.probe(op, lin, XSAVE_AREA_SIZE.into(), Use::Write)?;
    let (wanted, used) = (cpu.requested(), cpu.in_use(false));
    let header = lin.wrapping_add(HEADER_AT);
    let old: u64 = cpu.load(header)?;
    let write = if OPTIMIZED { wanted & used } else { wanted };
    cpu.store_components(lin, write, wanted & SSE != 0, WIDE)?;
    cpu.store(header, old & !wanted | wanted & used)
}

fn xsavec<const WIDE: bool>(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.xsave_ready()?;
    let lin = cpu.xsave_area(op, Use::Write)?;
    cpu.probe(op, lin, XSAVE_AREA_SIZE.into(), Use::Write)?;
    let wanted = cpu.requested();
    let write = wanted & cpu.in_use(true);
    cpu.store_components(lin, write, write & SSE != 0, WIDE)?;
    let header = lin.wrapping_add(HEADER_AT);
    cpu.store(header, write)?;
    cpu.store(header.wrapping_add(8), wanted | COMPACT)
}

fn xrstor<const WIDE: bool>(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.xsave_ready()?;
    let lin = cpu.xsave_area(op, Use::Read)?;
    let mut header = [0; 64];
    cpu.load_bytes(op, lin.wrapping_add(HEADER_AT), &mut header)?;
    let word = |n: usize| u64::from_le_bytes(std::array::from_fn(|i| header[8 * n + i]));
    let (present, compact) = (word(0), word(1));
    let is_compact = compact & COMPACT != 0;
    // SDM 1, "Standard Form of XRSTOR" and "Compacted Form of XRSTOR".
    let bad = if is_compact {
        compact & !COMPACT & !cpu.xcr0 != 0 || present & !compact != 0 || (2..8).any(|n| word(n) != 0)
    } else {
        present & !cpu.xcr0 != 0 || compact != 0 || word(2) != 0
    };
    if bad {
        return Err(Stop::GP0);
    }
    let wanted = cpu.requested();
    let mut area = Legacy::zeroed();
    cpu.load_bytes(op, lin, &mut area.0)?;
    // The standard form loads MXCSR even when SSE itself is initialized.
    let mxcsr = match () {
        _ if wanted & SSE == 0 => cpu.fp.mxcsr,
        _ if is_compact && present & SSE == 0 => MXCSR_DEFAULT,
        _ => area.mxcsr(),
    };
    if mxcsr & !MXCSR_MASK != 0 {
        return Err(Stop::GP0);
    }
    cpu.fp.mxcsr = mxcsr;
    if wanted & X87 != 0 {
        if present & X87 != 0 {
            cpu.take_x87(&area, WIDE);
        } else {
            cpu.fp.init_x87();
            cpu.fp.r = [0; 8];
        }
    }
    if wanted & SSE != 0 {
        if present & SSE != 0 {
            cpu.take_xmm(&area);
        } else {
            cpu.init_xmm();
        }
    }
    Ok(())
}

fn xgetbv(cpu: &mut Cpu, _: &Op) -> Flow {
    if !cpu.cr4.osxsave() {
        return Err(Stop::UD);
    }
    let v = match cpu.regs.r(slot::RCX) as u32 {
        0 => cpu.xcr0,
        1 => cpu.xcr0 & cpu.in_use(true),
        _ => return Err(Stop::GP0),
    };
    cpu.regs.set_r(slot::RAX, v & 0xffff_ffff);
    cpu.regs.set_r(slot::RDX, v >> 32);
    Ok(())
}

fn xsetbv(cpu: &mut Cpu, _: &Op) -> Flow {
    if !cpu.cr4.osxsave() {
        return Err(Stop::UD);
    }
    if cpu.cpl != 0 {
        return Err(Stop::GP0);
    }
    cpu.intercept_xsetbv()?;
    let v = cpu.regs.r(slot::RAX) & 0xffff_ffff | cpu.regs.r(slot::RDX) << 32;
    if cpu.regs.r(slot::RCX) as u32 != 0 || v & !XCR0_MASK != 0 || v & X87 == 0 {
        return Err(Stop::GP0);
    }
    cpu.xcr0 = v;
    Ok(())
}

pub(super) fn select(d: &mut Decoded) -> Selected {
    Some(match d.i.mnemonic() {
        M::Xsave => xsave::<false, false>,
        M::Xsave64 => xsave::<true, false>,
        M::Xsaveopt => xsave::<false, true>,
        M::Xsaveopt64 => xsave::<true, true>,
        M::Xsavec => xsavec::<false>,
        M::Xsavec64 => xsavec::<true>,
        M::Xrstor => xrstor::<false>,
        M::Xrstor64 => xrstor::<true>,
        M::Xgetbv => xgetbv,
        M::Xsetbv => xsetbv,
        _ => return None,
    })
}
