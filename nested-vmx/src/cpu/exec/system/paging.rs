//! INVLPG, INVPCID, INVD, WBINVD.

use crate::arch::is_canonical;
use crate::cpu::access::Use;
use crate::cpu::decode::{Decoded, Selected};
use crate::cpu::op::{Handler, Op};
use crate::cpu::{Cpu, Flow, Stop};
use crate::vmx::exit::reasons::ExitReason;
use iced_x86::Mnemonic;

fn invlpg(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.require_cpl0()?;
    let lin = cpu.unchecked_linear(op);
    cpu.intercept_invlpg(lin)?;
    cpu.tlb.flush_page(lin);
    // What follows may have to be fetched anew.
    Err(Stop::COMPLETED)
}

/// Types of INVPCID.
mod invalidate {
    pub const ADDRESS: u64 = 0;
    pub const CONTEXT: u64 = 1;
    pub const ALL: u64 = 2;
    pub const ALL_BUT_GLOBALS: u64 = 3;
}

fn invpcid(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.require_cpl0()?;
    cpu.intercept_invpcid(op)?;
    let kind = if cpu.code64() { cpu.regs.r(op.dst) } else { cpu.regs.r(op.dst) & 0xffff_ffff };
    let at = cpu.linear(op, 16, Use::Read)?;
    let pcid: u64 = cpu.load(at)?;
    let lin: u64 = cpu.load(if cpu.code64() { at.wrapping_add(8) } else { at.wrapping_add(8) & 0xffff_ffff })?;
    let one_pcid = matches!(kind, invalidate::ADDRESS | invalidate::CONTEXT);
    let bad = kind > invalidate::ALL_BUT_GLOBALS
        || pcid >> 12 != 0
        || one_pcid && pcid != 0 && !cpu.cr4.pcide()
        || kind == invalidate::ADDRESS && !is_canonical(lin);
    if bad {
        return Err(Stop::GP0);
    }
    let vpid = cpu.tlb.key().vpid;
    match kind {
        invalidate::ADDRESS => cpu.tlb.flush_page(lin),
        invalidate::CONTEXT => cpu.tlb.flush_contexts(false, |k| k.vpid == vpid && u64::from(k.pcid) == pcid),
        invalidate::ALL => cpu.flush_own(true),
        _ => cpu.flush_own(false),
    }
    Err(Stop::COMPLETED)
}

/// There is no cache to write back.
fn wbinvd(cpu: &mut Cpu, _: &Op) -> Flow {
    cpu.require_cpl0()?;
    cpu.intercept_wbinvd()
}

fn invd(cpu: &mut Cpu, _: &Op) -> Flow {
    cpu.require_cpl0()?;
    cpu.intercept_always(ExitReason::Invd)
}

impl Cpu {
    /// A linear address that is named but not accessed: no limit, no rights.
    fn unchecked_linear(&self, op: &Op) -> u64 {
        let offset = self.effective_address(op);
        let base = self.segment(op.seg).base;
        match (self.code64(), op.seg >= crate::cpu::seg::reg::FS) {
            (true, true) => base.wrapping_add(offset),
            (true, false) => offset,
            (false, _) => base.wrapping_add(offset) & 0xffff_ffff,
        }
    }
}

pub(super) fn select(d: &mut Decoded) -> Selected {
    let handler: Handler = match d.i.mnemonic() {
        Mnemonic::Invlpg => invlpg,
        Mnemonic::Invpcid => invpcid,
        Mnemonic::Wbinvd | Mnemonic::Wbnoinvd => wbinvd,
        Mnemonic::Invd => invd,
        _ => return None,
    };
    d.ends = matches!(d.i.mnemonic(), Mnemonic::Invlpg | Mnemonic::Invpcid);
    Some(handler)
}
