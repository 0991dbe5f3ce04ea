//! MSR and I/O accesses (SDM 3, "MSR-Bitmap Address", "I/O-Bitmap Addresses").

use crate::cpu::op::{Op, op_flags};
use crate::cpu::{Cpu, Flow};
use crate::vmx::exit::reasons::ExitReason;
use crate::vmx::vmcs12::Field;

/// An IN, OUT, INS or OUTS about to be done, after its privilege checks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct IoAccess {
    pub port: u16,
    /// 1, 2 or 4 bytes.
    pub size: u8,
    pub input: bool,
    /// The port is in the instruction, not in DX.
    pub immediate: bool,
    /// INS and OUTS: the linear address of the memory operand.
    pub string_lin: Option<u64>,
}

/// Offsets in the MSR bitmap.
const READ_LOW: u64 = 0;
const READ_HIGH: u64 = 0x400;
const WRITE_LOW: u64 = 0x800;
const WRITE_HIGH: u64 = 0xc00;

impl Cpu {
    pub(crate) fn intercept_rdmsr(&mut self, msr: u32) -> Flow {
        if self.in_non_root() && self.msr_exits(msr, READ_LOW, READ_HIGH) {
            return Err(self.exit_for(ExitReason::Rdmsr, 0, 0));
        }
        Ok(())
    }

    pub(crate) fn intercept_wrmsr(&mut self, msr: u32) -> Flow {
        if self.in_non_root() && self.msr_exits(msr, WRITE_LOW, WRITE_HIGH) {
            return Err(self.exit_for(ExitReason::Wrmsr, 0, 0));
        }
        Ok(())
    }

    fn msr_exits(&mut self, msr: u32, low: u64, high: u64) -> bool {
        if !self.vmx.controls.proc.use_msr_bitmaps() {
            return true;
        }
        let base = match msr {
            0..=0x1fff => low,
            0xc000_0000..=0xc000_1fff => high,
            _ => return true,
        };
        let bit = u64::from(msr & 0x1fff);
        self.bitmap_bit(Field::MsrBitmapGpa, base * 8 + bit)
    }

    fn bitmap_bit(&mut self, bitmap: Field, bit: u64) -> bool {
        let byte: u8 = self.load_physical(self.vmx.get(bitmap) + bit / 8);
        byte >> (bit & 7) & 1 != 0
    }

    pub(crate) fn intercept_io(&mut self, op: &Op, io: IoAccess) -> Flow {
        if !self.in_non_root() || !self.io_exits(io) {
            return Ok(());
        }
        let repeated = op.has(op_flags::REP) || op.has(op_flags::REPNE);
        let string = io.string_lin.is_some();
        let qualification = u64::from(io.size - 1)
            | u64::from(io.input) << 3
            | u64::from(string) << 4
            | u64::from(string && repeated) << 5
            | u64::from(io.immediate) << 6
            | u64::from(io.port) << 16;
        // Address size and segment only.
        let information = if string { super::memory_information(op) & (7 << 7 | 7 << 15) } else { 0 };
        let stop = self.exit_for(ExitReason::Io, qualification, information);
        self.exit.guest_linear = io.string_lin.unwrap_or(0);
        Err(stop)
    }

    /// The bitmaps count before "unconditional I/O exiting"; an access that wraps around the ports exits.
    fn io_exits(&mut self, io: IoAccess) -> bool {
        let proc = self.vmx.controls.proc;
        if !proc.use_io_bitmaps() {
            return proc.unconditional_io_exiting();
        }
        (0..u32::from(io.size)).any(|i| {
            let port = u32::from(io.port) + i;
            match port {
                0..=0x7fff => self.bitmap_bit(Field::IoBitmapAGpa, port.into()),
                0x8000..=0xffff => self.bitmap_bit(Field::IoBitmapBGpa, u64::from(port & 0x7fff)),
                _ => true,
            }
        })
    }
}
