//! Guests for the tests, in baseline integer code: at CPL 0 kvm_pvm emulates every instruction.

use iced_x86::IcedError;
use iced_x86::code_asm::*;
use nested_vmx::mem::Ram;

pub const SERIAL: i32 = 0x3f8;
pub const DEBUG_EXIT: i32 = 0xf4;

/// Where [`place`] puts the BSP's code; real mode reaches it with CS=0.
pub const BSP_GPA: u64 = 0x7000;
/// The AP's code, and the SIPI vector that starts it there.
pub const AP_GPA: u64 = 0x8000;
pub const AP_VECTOR: u8 = 0x08;
/// A word that guest and test change for each other.
pub const FLAG_GPA: u64 = 0x6000;

/// Assembles for `bits` and puts the code at `gpa`.
pub fn place(ram: &Ram, gpa: u64, bits: u32, code: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) {
    place_with_ip(ram, gpa, gpa, bits, code);
}

/// As [`place`], for code that runs at another offset of its segment.
pub fn place_with_ip(
    ram: &Ram,
    gpa: u64,
    ip: u64,
    bits: u32,
    code: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
) {
    let mut a = CodeAssembler::new(bits).expect("a valid bitness");
    code(&mut a).expect("encodable");
    ram.write(gpa, &a.assemble(ip).expect("assembles")).expect("in RAM");
}

pub fn print(a: &mut CodeAssembler, text: &str) -> Result<(), IcedError> {
    a.mov(dx, SERIAL)?;
    for byte in text.bytes() {
        a.mov(al, i32::from(byte))?;
        a.out(dx, al)?;
    }
    Ok(())
}

pub fn exit(a: &mut CodeAssembler, code: i32) -> Result<(), IcedError> {
    a.mov(al, code)?;
    a.out(DEBUG_EXIT, al)
}

/// Spins until the byte at FLAG is not `value`, with interrupts on as all loops here: Bochs, as a host of kvm_intel,
/// hangs when a guest spins with them off. No interrupt is on its way.
pub fn spin_while_flag_is(a: &mut CodeAssembler, value: i32) -> Result<(), IcedError> {
    let mut again = a.create_label();
    a.sti()?;
    a.set_label(&mut again)?;
    a.cmp(byte_ptr(FLAG_GPA as i32), value)?;
    a.je(again)
}

pub fn hlt_forever(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut again = a.create_label();
    a.set_label(&mut again)?;
    a.hlt()?;
    a.jmp(again)
}

/// The GDT at 0x5000: 0x08 32-bit code, 0x10 data, 0x18 64-bit code.
pub fn place_gdt(ram: &Ram) {
    let gdt: [u64; 4] = [0, 0x00cf_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x00af_9b00_0000_ffff];
    for (i, d) in gdt.iter().enumerate() {
        ram.write(0x5000 + 8 * i as u64, &d.to_le_bytes()).expect("in RAM");
    }
    let mut gdtr = [0; 6];
    gdtr[..2].copy_from_slice(&31u16.to_le_bytes());
    gdtr[2..].copy_from_slice(&0x5000u32.to_le_bytes());
    ram.write(0x5100, &gdtr).expect("in RAM");
}

/// Real mode at BSP_GPA switches to flat 32-bit protected mode and goes on with `code` at 0x7800.
pub fn place_protected(ram: &Ram, code: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) {
    place_gdt(ram);
    place(ram, BSP_GPA, 16, |a| {
        a.cli()?;
        a.lgdt(fword_ptr(0x5100))?;
        a.mov(eax, cr0)?;
        a.or(eax, 1)?;
        a.mov(cr0, eax)?;
        // jmp far 0x08:0x7800
        a.db(&[0xea, 0x00, 0x78, 0x08, 0x00])
    });
    place(ram, 0x7800, 32, |a| {
        a.mov(eax, 0x10)?;
        a.mov(ds, eax)?;
        a.mov(es, eax)?;
        a.mov(ss, eax)?;
        a.mov(esp, 0x7000)?;
        code(a)
    });
}

/// As [`place_protected`], but on to long mode: `code` runs at 0x7c00 with the low GiB mapped.
pub fn place_long(ram: &Ram, code: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) {
    const PML4: u64 = 0x1000;
    const PDPT: u64 = 0x2000;
    const PD: u64 = 0x3000;
    const PRESENT_WRITABLE_USER: u64 = 7;
    const LARGE: u64 = 1 << 7;
    ram.write(PML4, &(PDPT | PRESENT_WRITABLE_USER).to_le_bytes()).expect("in RAM");
    ram.write(PDPT, &(PD | PRESENT_WRITABLE_USER).to_le_bytes()).expect("in RAM");
    for i in 0..512u64 {
        ram.write(PD + 8 * i, &(i << 21 | LARGE | PRESENT_WRITABLE_USER).to_le_bytes()).expect("in RAM");
    }
    place_protected(ram, |a| {
        a.mov(eax, cr4)?;
        a.or(eax, 1 << 5)?;
        a.mov(cr4, eax)?;
        a.mov(eax, PML4 as i32)?;
        a.mov(cr3, eax)?;
        a.mov(ecx, 0xc000_0080u32 as i32)?;
        a.rdmsr()?;
        a.or(eax, 1 << 8)?;
        a.wrmsr()?;
        a.mov(eax, cr0)?;
        a.or(eax, 0x8000_0000u32 as i32)?;
        a.mov(cr0, eax)?;
        // jmp far 0x18:0x7c00
        a.db(&[0xea, 0x00, 0x7c, 0x00, 0x00, 0x18, 0x00])
    });
    place(ram, 0x7c00, 64, code);
}
