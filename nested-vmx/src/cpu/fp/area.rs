//! FXSAVE, FXRSTOR, LDMXCSR, STMXCSR, and the 512-byte legacy area that the XSAVE family shares (SDM 1, "FXSAVE Area").

use super::state::{MXCSR_MASK, status};
use super::xsave;
use crate::cpu::access::Use;
use crate::cpu::decode::{Decoded, Selected};
use crate::cpu::op::Op;
use crate::cpu::{Cpu, Flow, Stop};
use iced_x86::Mnemonic as M;

/// Bytes of the legacy area that hold registers; the rest is left alone.
pub(super) const LEGACY_USED: usize = 416;
const MXCSR_AT: usize = 24;
const ST_AT: usize = 32;
pub(super) const XMM_AT: usize = 160;

pub(super) struct Legacy(pub [u8; LEGACY_USED]);

impl Legacy {
    pub fn zeroed() -> Self {
        Self([0; LEGACY_USED])
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn get<const N: usize>(&self, at: usize) -> [u8; N] {
        std::array::from_fn(|i| self.0[at + i])
    }

    pub fn mxcsr(&self) -> u32 {
        u32::from_le_bytes(self.get(MXCSR_AT))
    }
}

/// XMM registers that code of this width can name.
fn xmm_count(code64: bool) -> usize {
    if code64 { 16 } else { 8 }
}

impl Cpu {
    /// With `wide` the instruction and data pointers have 64 bits.
    pub(super) fn legacy_x87(&self, area: &mut Legacy, wide: bool) {
        let fp = &self.fp;
        area.put(0, &fp.control.to_le_bytes());
        area.put(2, &fp.status.to_le_bytes());
        area.put(4, &[fp.full, 0]);
        area.put(6, &fp.opcode.to_le_bytes());
        let mask = if wide { u64::MAX } else { 0xffff_ffff };
        area.put(8, &(fp.instruction & mask).to_le_bytes());
        area.put(16, &(fp.data & mask).to_le_bytes());
        for n in 0..8 {
            area.put(ST_AT + 16 * n, &fp.st(n).to_le_bytes());
        }
    }

    pub(super) fn legacy_mxcsr(&self, area: &mut Legacy) {
        area.put(MXCSR_AT, &self.fp.mxcsr.to_le_bytes());
        area.put(MXCSR_AT + 4, &MXCSR_MASK.to_le_bytes());
    }

    pub(super) fn legacy_xmm(&self, area: &mut Legacy) {
        for n in 0..xmm_count(self.code64()) {
            area.put(XMM_AT + 16 * n, &self.fp.xmm[n].to_le_bytes());
        }
    }

    /// Bytes of the area that stores touch in this mode.
    pub(super) fn legacy_end(&self) -> usize {
        XMM_AT + 16 * xmm_count(self.code64())
    }

    pub(super) fn take_x87(&mut self, area: &Legacy, wide: bool) {
        let mask = if wide { u64::MAX } else { 0xffff_ffff };
        let fp = &mut self.fp;
        fp.control = 0;
        fp.status = u16::from_le_bytes(area.get(2)) & !status::SUMMARY;
        fp.full = area.0[4];
        fp.opcode = u16::from_le_bytes(area.get(6)) & 0x7ff;
        fp.instruction = u64::from_le_bytes(area.get(8)) & mask;
        fp.data = u64::from_le_bytes(area.get(16)) & mask;
        for n in 0..8 {
            fp.set_st(n, u128::from_le_bytes(area.get(ST_AT + 16 * n)));
        }
        fp.set_control(u16::from_le_bytes(area.get(0)));
    }

    pub(super) fn take_xmm(&mut self, area: &Legacy) {
        for n in 0..xmm_count(self.code64()) {
            self.fp.xmm[n] = u128::from_le_bytes(area.get(XMM_AT + 16 * n));
        }
    }

    pub(super) fn init_xmm(&mut self) {
        let n = xmm_count(self.code64());
        self.fp.xmm[..n].fill(0);
    }
}

/// For the tests that load and look at everything.
#[cfg(test)]
impl Cpu {
    pub(in crate::cpu) fn set_fx(&mut self, fx: &[u8; 512]) {
        let mut area = Legacy::zeroed();
        area.put(0, &fx[..LEGACY_USED]);
        self.take_x87(&area, true);
        self.take_xmm(&area);
        self.fp.mxcsr = area.mxcsr();
    }

    pub(in crate::cpu) fn fx(&self) -> [u8; LEGACY_USED] {
        let mut area = Legacy::zeroed();
        self.legacy_x87(&mut area, true);
        self.legacy_mxcsr(&mut area);
        self.legacy_xmm(&mut area);
        area.0
    }
}

fn area_operand(cpu: &Cpu, op: &Op, len: u64, align: u64, how: Use) -> Result<u64, Stop> {
    let lin = cpu.linear(op, len, how)?;
    if lin & (align - 1) != 0 { Err(Stop::GP0) } else { Ok(lin) }
}

/// FXSAVE does not look at pending x87 exceptions.
fn fxsave<const WIDE: bool>(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.x87_available()?;
    let lin = area_operand(cpu, op, 512, 16, Use::Write)?;
    let mut area = Legacy::zeroed();
    cpu.legacy_x87(&mut area, WIDE);
    cpu.legacy_mxcsr(&mut area);
    cpu.legacy_xmm(&mut area);
    cpu.probe(op, lin, 512, Use::Write)?;
    let end = cpu.legacy_end();
    cpu.store_bytes(lin, &area.0[..end])
}

fn fxrstor<const WIDE: bool>(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.x87_available()?;
    let lin = area_operand(cpu, op, 512, 16, Use::Read)?;
    let mut area = Legacy::zeroed();
    cpu.load_bytes(op, lin, &mut area.0)?;
    if area.mxcsr() & !MXCSR_MASK != 0 {
        return Err(Stop::GP0);
    }
    cpu.take_x87(&area, WIDE);
    cpu.fp.mxcsr = area.mxcsr();
    cpu.take_xmm(&area);
    Ok(())
}

fn ldmxcsr(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.sse_ready()?;
    let v: u32 = cpu.load_operand(op)?;
    if v & !MXCSR_MASK != 0 {
        return Err(Stop::GP0);
    }
    cpu.fp.mxcsr = v;
    Ok(())
}

fn stmxcsr(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.sse_ready()?;
    let v = cpu.fp.mxcsr;
    cpu.store_operand(op, v)
}

pub(super) fn select(d: &mut Decoded) -> Selected {
    Some(match d.i.mnemonic() {
        M::Fxsave => fxsave::<false>,
        M::Fxsave64 => fxsave::<true>,
        M::Fxrstor => fxrstor::<false>,
        M::Fxrstor64 => fxrstor::<true>,
        M::Ldmxcsr => ldmxcsr,
        M::Stmxcsr => stmxcsr,
        _ => return xsave::select(d),
    })
}
