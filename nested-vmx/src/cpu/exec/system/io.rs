//! IN, OUT, INS, OUTS.

use crate::bus::BusFlow;
use crate::cpu::access::Use;
use crate::cpu::decode::{Decoded, Selected, segment};
use crate::cpu::op::{Handler, Op, op_flags};
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
        self.bus.stand_at(self.retired);
        W::from_u64(self.bus.io_read(port, W::BYTES as u8).into())
    }

    pub(super) fn port_write<W: Word>(&mut self, port: u16, v: W) {
        self.bus.stand_at(self.retired);
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
    cpu.note_port_breakpoint(port, size);
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

/// One iteration: the count in rCX is the caller's business.
fn input_string<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let (port, size) = (cpu.regs.get(slot::RDX), W::BYTES as u8);
    cpu.check_port(port, size)?;
    let lin = cpu.string_destination(op, W::BYTES, Use::Write)?;
    cpu.intercept_io(op, IoAccess { port, size, input: true, immediate: false, string_lin: Some(lin) })?;
    // A fault comes before the port is read.
    cpu.modify(op, lin, false, |v: W| v)?;
    cpu.note_port_breakpoint(port, size);
    let v: W = cpu.port_read(port);
    cpu.store(lin, v)?;
    let delta = cpu.string_delta(W::BYTES);
    cpu.string_add(op, slot::RDI, delta);
    Ok(())
}

fn output_string<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let (port, size) = (cpu.regs.get(slot::RDX), W::BYTES as u8);
    cpu.check_port(port, size)?;
    let lin = cpu.string_source(op, W::BYTES)?;
    cpu.intercept_io(op, IoAccess { port, size, input: false, immediate: false, string_lin: Some(lin) })?;
    let v: W = cpu.load(lin)?;
    cpu.note_port_breakpoint(port, size);
    cpu.port_write(port, v);
    let delta = cpu.string_delta(W::BYTES);
    cpu.string_add(op, slot::RSI, delta);
    Ok(())
}

/// Each iteration ends with a look at what the device may have asked for.
fn string<W: Word, const INPUT: bool>(cpu: &mut Cpu, op: &Op) -> Flow {
    let repeated = op.has(op_flags::REP | op_flags::REPNE);
    let count = cpu.regs.r(slot::RCX) & op.address_mask();
    if repeated && count == 0 {
        return Ok(());
    }
    if INPUT {
        input_string::<W>(cpu, op)?
    } else {
        output_string::<W>(cpu, op)?
    }
    if repeated {
        cpu.string_add(op, slot::RCX, u64::MAX);
        if count > 1 {
            // Counts as an instruction, so that the budget bounds it.
            cpu.retired += 1;
            return Err(Stop::AGAIN);
        }
    }
    Err(Stop::COMPLETED)
}

fn select_string(d: &mut Decoded) -> Selected {
    let handler: Handler = match d.i.mnemonic() {
        Mnemonic::Insb => string::<u8, true>,
        Mnemonic::Insw => string::<u16, true>,
        Mnemonic::Insd => string::<u32, true>,
        Mnemonic::Outsb => string::<u8, false>,
        Mnemonic::Outsw => string::<u16, false>,
        Mnemonic::Outsd => string::<u32, false>,
        _ => return None,
    };
    d.ends = true;
    d.op.seg = segment(d.i.memory_segment());
    Some(handler)
}

pub(super) fn select(d: &mut Decoded) -> Selected {
    let (input_port, data) = match d.i.mnemonic() {
        Mnemonic::In => (1, 0),
        Mnemonic::Out => (0, 1),
        _ => return select_string(d),
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
