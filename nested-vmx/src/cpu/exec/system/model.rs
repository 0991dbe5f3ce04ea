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

/// `imm` is the operation's place in its block: time passes inside a block too, and must not seem to go back.
fn at_own_time<T>(cpu: &mut Cpu, op: &Op, f: impl FnOnce(&mut Cpu) -> T) -> T {
    cpu.retired += op.imm;
    let result = f(cpu);
    cpu.retired -= op.imm;
    result
}

fn rdmsr(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.require_cpl0()?;
    cpu.intercept_rdmsr(cpu.ecx())?;
    let v = at_own_time(cpu, op, |cpu| cpu.read_msr(cpu.ecx()))?;
    cpu.put_edx_eax(v);
    Ok(())
}

fn wrmsr(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.require_cpl0()?;
    cpu.intercept_wrmsr(cpu.ecx())?;
    at_own_time(cpu, op, |cpu| cpu.write_msr(cpu.ecx(), cpu.edx_eax()))?;
    cpu.mode_changed();
    Err(Stop::COMPLETED)
}

/// The checks of RDTSC and RDTSCP.
fn tsc(cpu: &mut Cpu, op: &Op, intercept: fn(&mut Cpu) -> Flow) -> Result<u64, Stop> {
    if cpu.cpl > 0 && cpu.cr4.tsd() {
        return Err(Stop::GP0);
    }
    intercept(cpu)?;
    let own = at_own_time(cpu, op, Cpu::tsc);
    Ok(own.wrapping_add(cpu.tsc_offset()))
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
        Mnemonic::Rdmsr => rdmsr,
        Mnemonic::Wrmsr => wrmsr,
        Mnemonic::Rdtsc => rdtsc,
        Mnemonic::Rdtscp => rdtscp,
        Mnemonic::Rdpmc => rdpmc,
        Mnemonic::Pause => pause,
        _ => return None,
    };
    d.op.imm = d.index.into();
    d.ends = d.i.mnemonic() == Mnemonic::Wrmsr;
    Some(handler)
}
