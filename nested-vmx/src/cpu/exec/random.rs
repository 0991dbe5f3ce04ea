//! RDRAND and RDSEED: a generator of the processor's own, so that a run can be repeated. Not for secrets.

use crate::cpu::decode::{Decoded, Selected, by_width};
use crate::cpu::flags::CF;
use crate::cpu::op::Op;
use crate::cpu::{Cpu, Flow};
use crate::mem::Word;
use iced_x86::Mnemonic;

impl Cpu {
    /// SplitMix64.
    fn next_random(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.random ^ self.random >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }
}

fn rdrand<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.intercept_rdrand(op)?;
    random::<W>(cpu, op)
}

fn rdseed<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.intercept_rdseed(op)?;
    random::<W>(cpu, op)
}

/// Always succeeds: CF is 1, the other status flags 0.
fn random<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let v = cpu.next_random();
    cpu.regs.put(op.dst, W::from_u64(v));
    cpu.flags.set_status(CF);
    Ok(())
}

pub(in crate::cpu) fn select(d: &mut Decoded) -> Selected {
    match d.i.mnemonic() {
        Mnemonic::Rdrand => by_width!(d.width(0), rdrand),
        Mnemonic::Rdseed => by_width!(d.width(0), rdseed),
        _ => None,
    }
}
