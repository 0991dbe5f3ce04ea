//! IN and OUT.

use crate::bus::BusFlow;
use crate::cpu::decode::{Decoded, Selected};
use crate::cpu::op::{Handler, Op};
use crate::cpu::seg::reg;
use crate::cpu::{Cpu, Flow, Stop, slot};
use crate::mem::Word;
use crate::vmx::IoAccess;
use iced_x86::{Mnemonic, OpKind};

/// Where the 32-bit TSS holds the offset of its I/O permission bit map.
const TSS_IO_MAP: u64 = 102;

impl Cpu {
    /// SDM 1, "I/O Permission Bit Map".
    pub(super) fn check_port(&mut self, port: u16, size: u8) -> Flow {
        if !self.cr0.pe() || self.io_privileged() && !self.virtual_8086() {
            return Ok(());
        }
        let tr = *self.segment(reg::TR);
        let limit = u64::from(tr.limit);
        // Only the 32-bit and 64-bit TSS have a map.
        if tr.ar.kind() & 8 == 0 || TSS_IO_MAP + 1 > limit {
            return Err(Stop::GP0);
        }
        let map: u16 = self.load_system(tr.base.wrapping_add(TSS_IO_MAP))?;
        let at = u64::from(map) + u64::from(port >> 3);
        // Two bytes are always read.
        if at + 1 > limit {
            return Err(Stop::GP0);
        }
        let bits: u16 = self.load_system(tr.base.wrapping_add(at))?;
        let mask = (1u16 << size) - 1;
        if bits >> (port & 7) & mask != 0 { Err(Stop::GP0) } else { Ok(()) }
    }

    pub(super) fn port_read<W: Word>(&mut self, port: u16) -> W {
        W::from_u64(self.bus.io_read(port, W::BYTES as u8).into())
    }

    pub(super) fn port_write<W: Word>(&mut self, port: u16, v: W) {
        if self.bus.io_write(port, W::BYTES as u8, v.to_u64() as u32) == BusFlow::Stop {
            self.bus_stop = true;
        }
    }
}

/// `src` tells whether the port is in DX; else it is `imm`.
fn port(cpu: &Cpu, op: &Op) -> u16 {
    if op.src == slot::RDX { cpu.regs.get(slot::RDX) } else { op.imm as u16 }
}

fn access<W: Word>(cpu: &mut Cpu, op: &Op, write: bool) -> Result<u16, Stop> {
    let port = port(cpu, op);
    let size = W::BYTES as u8;
    cpu.check_port(port, size)?;
    let immediate = op.src != slot::RDX;
    cpu.intercept_io(op, IoAccess { port, size, input: !write, immediate, string_lin: None })?;
    Ok(port)
}

fn input<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let port = access::<W>(cpu, op, false)?;
    let v: W = cpu.port_read(port);
    cpu.regs.put(slot::RAX, v);
    // The device may have changed its interrupt line.
    Err(Stop::COMPLETED)
}

fn output<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let port = access::<W>(cpu, op, true)?;
    let v: W = cpu.regs.get(slot::RAX);
    cpu.port_write(port, v);
    Err(Stop::COMPLETED)
}

pub(super) fn select(d: &mut Decoded) -> Selected {
    let (input_port, data) = match d.i.mnemonic() {
        Mnemonic::In => (1, 0),
        Mnemonic::Out => (0, 1),
        _ => return None,
    };
    let bytes = d.i.op_register(data).size();
    d.op.src = if d.i.op_kind(input_port) == OpKind::Register { slot::RDX } else { slot::ZERO };
    d.ends = true;
    let handler: Handler = match (input_port, bytes) {
        (1, 1) => input::<u8>,
        (1, 2) => input::<u16>,
        (1, _) => input::<u32>,
        (_, 1) => output::<u8>,
        (_, 2) => output::<u16>,
        _ => output::<u32>,
    };
    Some(handler)
}
