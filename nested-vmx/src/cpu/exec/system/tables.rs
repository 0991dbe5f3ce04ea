//! LGDT, LIDT, SGDT, SIDT, LLDT, LTR, SLDT, STR.

use crate::arch::descriptor::{Descriptor, Selector};
use crate::arch::is_canonical;
use crate::arch::segment::system;
use crate::cpu::access::Use;
use crate::cpu::decode::{Decoded, Selected};
use crate::cpu::op::Op;
use crate::cpu::seg::{TableRegister, reg};
use crate::cpu::segload::system_segment;
use crate::cpu::{Cpu, Flow, Stop};
use crate::mem::Word;
use crate::vmx::{DescriptorTable, SystemSegment};
use iced_x86::{Mnemonic, OpKind};

fn load_table(cpu: &mut Cpu, op: &Op, which: DescriptorTable) -> Result<TableRegister, Stop> {
    cpu.require_cpl0()?;
    cpu.intercept_descriptor_table(op, which)?;
    let long = cpu.code64();
    let lin = cpu.linear(op, if long { 10 } else { 6 }, Use::Read)?;
    let limit = cpu.load(lin)?;
    let base = if long {
        cpu.load::<u64>(lin.wrapping_add(2))?
    } else {
        let base = cpu.load::<u32>(lin.wrapping_add(2) & 0xffff_ffff)?;
        u64::from(if op.operand_bits() == 16 { base & 0xff_ffff } else { base })
    };
    if !is_canonical(base) { Err(Stop::GP0) } else { Ok(TableRegister { base, limit }) }
}

fn store_table(cpu: &mut Cpu, op: &Op, table: TableRegister, which: DescriptorTable) -> Flow {
    cpu.check_umip()?;
    cpu.intercept_descriptor_table(op, which)?;
    let long = cpu.code64();
    let lin = cpu.linear(op, if long { 10 } else { 6 }, Use::Write)?;
    cpu.store(lin, table.limit)?;
    if long {
        cpu.store(lin.wrapping_add(2), table.base)
    } else {
        cpu.store(lin.wrapping_add(2) & 0xffff_ffff, table.base as u32)
    }
}

fn lgdt(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.gdtr = load_table(cpu, op, DescriptorTable::Lgdt)?;
    Ok(())
}

fn lidt(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.idtr = load_table(cpu, op, DescriptorTable::Lidt)?;
    Ok(())
}

fn sgdt(cpu: &mut Cpu, op: &Op) -> Flow {
    store_table(cpu, op, cpu.gdtr, DescriptorTable::Sgdt)
}

fn sidt(cpu: &mut Cpu, op: &Op) -> Flow {
    store_table(cpu, op, cpu.idtr, DescriptorTable::Sidt)
}

/// The selector operand of LLDT and LTR, with the checks before it.
fn selector_operand(cpu: &mut Cpu, op: &Op, which: SystemSegment) -> Result<Selector, Stop> {
    if !cpu.protected() {
        return Err(Stop::UD);
    }
    cpu.require_cpl0()?;
    cpu.intercept_system_segment(op, which, op.imm == 0)?;
    let selector = if op.imm != 0 { cpu.load_operand(op)? } else { cpu.regs.get(op.dst) };
    Ok(Selector(selector))
}

fn lldt(cpu: &mut Cpu, op: &Op) -> Flow {
    let selector = selector_operand(cpu, op, SystemSegment::Lldt)?;
    let ldt = cpu.checked_ldt(selector, Stop::gp)?;
    cpu.set_segment(reg::LDTR, ldt);
    Ok(())
}

fn ltr(cpu: &mut Cpu, op: &Op) -> Flow {
    let selector = selector_operand(cpu, op, SystemSegment::Ltr)?;
    if selector.is_null() {
        return Err(Stop::GP0);
    }
    let error = selector.error();
    if selector.local() {
        return Err(Stop::gp(error));
    }
    let mut f = cpu.find_descriptor(selector, Stop::gp)?;
    let available = match f.descriptor.kind() {
        system::TSS_AVAILABLE => true,
        system::TSS16_AVAILABLE => !cpu.long_mode(),
        _ => false,
    };
    if f.descriptor.s() || !available {
        return Err(Stop::gp(error));
    }
    if !f.descriptor.p() {
        return Err(Stop::np(error));
    }
    if cpu.long_mode() {
        cpu.find_upper_half(selector, &mut f, Stop::gp)?;
        if !is_canonical(f.descriptor.base64()) {
            return Err(Stop::gp(error));
        }
    }
    cpu.set_bits_system(f.lin, Descriptor::BUSY)?;
    f.descriptor.lower |= Descriptor::BUSY;
    cpu.set_segment(reg::TR, system_segment(selector, &f.descriptor));
    Ok(())
}

/// SLDT and STR: `src` is the register that is stored.
fn store_selector_checked(cpu: &mut Cpu, op: &Op, register: bool) -> Result<u16, Stop> {
    if !cpu.protected() {
        return Err(Stop::UD);
    }
    cpu.check_umip()?;
    let which = if op.src == reg::LDTR { SystemSegment::Sldt } else { SystemSegment::Str };
    cpu.intercept_system_segment(op, which, register)?;
    Ok(cpu.segment(op.src).selector)
}

fn store_selector_r<W: Word>(cpu: &mut Cpu, op: &Op) -> Flow {
    let selector = store_selector_checked(cpu, op, true)?;
    cpu.regs.put(op.dst, W::from_u64(selector.into()));
    Ok(())
}

fn store_selector_m(cpu: &mut Cpu, op: &Op) -> Flow {
    let selector = store_selector_checked(cpu, op, false)?;
    cpu.store_operand(op, selector)
}

pub(super) fn select(d: &mut Decoded) -> Selected {
    let memory = d.i.op0_kind() == OpKind::Memory;
    let handler: crate::cpu::op::Handler = match d.i.mnemonic() {
        Mnemonic::Lgdt => lgdt,
        Mnemonic::Lidt => lidt,
        Mnemonic::Sgdt => sgdt,
        Mnemonic::Sidt => sidt,
        m @ (Mnemonic::Lldt | Mnemonic::Ltr) => {
            d.op.imm = memory.into();
            if m == Mnemonic::Lldt { lldt } else { ltr }
        }
        m @ (Mnemonic::Sldt | Mnemonic::Str) => {
            d.op.src = if m == Mnemonic::Sldt { reg::LDTR } else { reg::TR };
            if !memory {
                return sized!(d.operand_bits, store_selector_r);
            }
            store_selector_m
        }
        _ => return None,
    };
    Some(handler)
}
