//! CPUID, RDMSR, WRMSR, RDTSC, RDTSCP, RDPMC, PAUSE.

use crate::cpu::decode::{Decoded, Selected};
use crate::cpu::op::{Handler, Op};
use crate::cpu::{Cpu, Flow, Stop, slot};
use crate::vmx::exit::reasons::ExitReason;
use iced_x86::Mnemonic;

impl Cpu {
    /// EDX:EAX.
    fn put_edx_eax(&mut self, v: u64) {
        self.regs.set_r(slot::RAX, v & 0xffff_ffff);
        self.regs.set_r(slot::RDX, v >> 32);
    }

    fn edx_eax(&self) -> u64 {
        self.regs.r(slot::RDX) << 32 | self.regs.r(slot::RAX) & 0xffff_ffff
    }

    fn ecx(&self) -> u32 {
        self.regs.get(slot::RCX)
    }
}

fn cpuid(cpu: &mut Cpu, _: &Op) -> Flow {
    cpu.intercept_always(ExitReason::Cpuid)?;
    let leaf = cpu.cpuid(cpu.regs.get(slot::RAX), cpu.ecx());
    for (n, v) in [slot::RAX, slot::RBX, slot::RCX, slot::RDX].into_iter().zip(leaf) {
        cpu.regs.set_r(n, v.into());
    }
    Ok(())
}

fn rdmsr(cpu: &mut Cpu, _: &Op) -> Flow {
    cpu.require_cpl0()?;
    cpu.intercept_rdmsr(cpu.ecx())?;
    let v = cpu.read_msr(cpu.ecx())?;
    cpu.put_edx_eax(v);
    Ok(())
}

fn wrmsr(cpu: &mut Cpu, _: &Op) -> Flow {
    cpu.require_cpl0()?;
    cpu.intercept_wrmsr(cpu.ecx())?;
    cpu.write_msr(cpu.ecx(), cpu.edx_eax())?;
    cpu.mode_changed();
    Err(Stop::COMPLETED)
}

/// The checks of RDTSC and RDTSCP. `imm` is the operation's place in its block: time passes inside a block too.
fn tsc(cpu: &mut Cpu, op: &Op, intercept: fn(&mut Cpu) -> Flow) -> Result<u64, Stop> {
    if cpu.cpl > 0 && cpu.cr4.tsd() {
        return Err(Stop::GP0);
    }
    intercept(cpu)?;
    let vm_tsc = cpu.bus.tsc(cpu.retired + op.imm);
    Ok(vm_tsc.wrapping_add(cpu.msrs.tsc_offset).wrapping_add(cpu.tsc_offset()))
}

fn rdtsc(cpu: &mut Cpu, op: &Op) -> Flow {
    let v = tsc(cpu, op, Cpu::intercept_rdtsc)?;
    cpu.put_edx_eax(v);
    Ok(())
}

fn rdtscp(cpu: &mut Cpu, op: &Op) -> Flow {
    let v = tsc(cpu, op, Cpu::intercept_rdtscp)?;
    cpu.put_edx_eax(v);
    cpu.regs.set_r(slot::RCX, cpu.msrs.tsc_aux & 0xffff_ffff);
    Ok(())
}

/// There is no performance counter.
fn rdpmc(cpu: &mut Cpu, _: &Op) -> Flow {
    if cpu.cpl > 0 && !cpu.cr4.pce() {
        return Err(Stop::GP0);
    }
    cpu.intercept_rdpmc()?;
    Err(Stop::GP0)
}

fn pause(cpu: &mut Cpu, _: &Op) -> Flow {
    cpu.intercept_pause()?;
    Ok(())
}

pub(super) fn select(d: &mut Decoded) -> Selected {
    let handler: Handler = match d.i.mnemonic() {
        Mnemonic::Cpuid => cpuid,
        Mnemonic::Rdmsr => {
            // IA32_TIME_STAMP_COUNTER counts from a block's start.
            d.ends = true;
            rdmsr
        }
        Mnemonic::Wrmsr => {
            d.ends = true;
            wrmsr
        }
        Mnemonic::Rdtsc => {
            d.op.imm = d.index.into();
            rdtsc
        }
        Mnemonic::Rdtscp => {
            d.op.imm = d.index.into();
            rdtscp
        }
        Mnemonic::Rdpmc => rdpmc,
        Mnemonic::Pause => pause,
        _ => return None,
    };
    Some(handler)
}
