//! INVLPG, INVD, WBINVD.

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
        Mnemonic::Wbinvd | Mnemonic::Wbnoinvd => wbinvd,
        Mnemonic::Invd => invd,
        _ => return None,
    };
    d.ends = d.i.mnemonic() == Mnemonic::Invlpg;
    Some(handler)
}
