//! One virtual processor of L2: its VMCS, its registers, and the loop that runs it.

use core::arch::global_asm;
use rt::cpu::{IA32_APIC_BASE, cpuid, rdmsr};
use rt::{exit_code, fail};

use crate::memory::{INFO_GPA, PARK_GPA, Page};
use crate::vmx::{self, field, read, write};
use crate::{ept, exit};

const PRIMARY_IO_BITMAPS: u32 = 1 << 25;
const PRIMARY_MSR_BITMAPS: u32 = 1 << 28;
const PRIMARY_SECONDARY: u32 = 1 << 31;
const SECONDARY_EPT: u32 = 1 << 1;
const SECONDARY_VPID: u32 = 1 << 5;
const SECONDARY_UNRESTRICTED: u32 = 1 << 7;
const EXIT_HOST_64_BIT: u32 = 1 << 9;
const EXIT_SAVE_EFER: u32 = 1 << 20;
const EXIT_LOAD_EFER: u32 = 1 << 21;
const ENTRY_LOAD_EFER: u32 = 1 << 15;

pub const SECONDARY_CONTROLS: u32 = SECONDARY_EPT | SECONDARY_VPID | SECONDARY_UNRESTRICTED;

const IA32_EFER: u32 = 0xc000_0080;

static VMXON: [Page; 2] = [Page::zero(), Page::zero()];
static VMCS: [Page; 2] = [Page::zero(), Page::zero()];
static IO_BITMAPS: [Page; 2] = [Page::zero(), Page::zero()];
static MSR_BITMAP: Page = Page::zero();

/// L2's registers that the VMCS does not hold. The assembly below knows the order.
#[repr(C)]
#[derive(Default)]
pub struct Registers {
    pub rax: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rbx: u64,
    pub rbp: u64,
    pub rsi: u64,
    pub rdi: u64,
    pub r8_to_r15: [u64; 8],
}

pub struct Vcpu {
    /// Also the number of the processor that it runs on.
    pub number: u64,
    pub registers: Registers,
    launched: bool,
}

impl Vcpu {
    /// Enters VMX operation on the running processor and writes everything into the VMCS that stays.
    pub fn new(number: usize) -> Self {
        let (Some(vmxon), Some(vmcs)) = (VMXON.get(number), VMCS.get(number)) else {
            fail!(exit_code::UNSUPPORTED, "more than two processors")
        };
        vmx::enter_operation(vmxon, vmcs);
        if number == 0 {
            write_bitmaps();
        }
        write_controls(number as u64 + 1);
        write_host_state();
        Vcpu { number: number as u64, registers: Registers::default(), launched: false }
    }

    /// Starts L2 as a multiboot loader does: 32-bit protected mode, flat segments, no paging.
    pub fn enter_as_boot_loader(&mut self, entry_gpa: u64) {
        self.set_init_state();
        write(field::GUEST_CR0, vmx::CR0_PE | vmx::CR0_ET | vmx::CR0_NE);
        for segment in 0..6 {
            let code = segment == 1;
            write(field::GUEST_ES_SELECTOR + 2 * segment, if code { 0x08 } else { 0x10 });
            write(field::GUEST_ES_BASE + 2 * segment, 0);
            write(field::GUEST_ES_LIMIT + 2 * segment, 0xffff_ffff);
            write(field::GUEST_ES_RIGHTS + 2 * segment, if code { 0xc09b } else { 0xc093 });
        }
        write(field::GUEST_RIP, entry_gpa);
        self.registers.rax = rt::boot::LOADER_MAGIC.into();
        self.registers.rbx = INFO_GPA;
    }

    /// A processor that L2 has not started yet: halted with interrupts off. Not wait-for-SIPI, where INIT is blocked
    /// and L1 would not hear of it.
    pub fn park(&mut self) {
        self.set_init_state();
        self.set_real_mode_start(0, PARK_GPA);
        write(field::GUEST_ACTIVITY, vmx::ACTIVITY_HLT);
    }

    /// The state after INIT (SDM volume 3, table "IA-32 and Intel 64 Processor States Following Power-up, Reset, or
    /// INIT"), active. The local APIC is L2's own affair.
    pub fn set_init_state(&mut self) {
        self.registers = Registers { rdx: cpuid(1, 0).eax.into(), ..Registers::default() };
        // NE and VMXE stay 1 in VMX operation; L2 does not see them.
        write(field::GUEST_CR0, vmx::CR0_ET | vmx::CR0_NE);
        write(field::CR0_MASK, vmx::CR0_NE);
        write(field::CR0_SHADOW, 0);
        write(field::GUEST_CR3, 0);
        write(field::GUEST_CR4, vmx::CR4_VMXE);
        write(field::CR4_MASK, vmx::CR4_VMXE);
        write(field::CR4_SHADOW, 0);
        write(field::GUEST_EFER, 0);
        write(field::ENTRY_CONTROLS, vmx::controls("entry", vmx::IA32_VMX_TRUE_ENTRY_CTLS, ENTRY_LOAD_EFER));
        for segment in 0..6 {
            write(field::GUEST_ES_SELECTOR + 2 * segment, 0);
            write(field::GUEST_ES_BASE + 2 * segment, 0);
            write(field::GUEST_ES_LIMIT + 2 * segment, 0xffff);
            write(field::GUEST_ES_RIGHTS + 2 * segment, if segment == 1 { 0x9b } else { 0x93 });
        }
        for (segment, rights) in [(6, 0x82), (7, 0x8b)] {
            write(field::GUEST_ES_SELECTOR + 2 * segment, 0);
            write(field::GUEST_ES_BASE + 2 * segment, 0);
            write(field::GUEST_ES_LIMIT + 2 * segment, 0xffff);
            write(field::GUEST_ES_RIGHTS + 2 * segment, rights);
        }
        for table in [field::GUEST_GDTR_BASE, field::GUEST_IDTR_BASE] {
            write(table, 0);
        }
        for limit in [field::GUEST_GDTR_LIMIT, field::GUEST_IDTR_LIMIT] {
            write(limit, 0xffff);
        }
        self.set_real_mode_start(0xf000, 0xfff0);
        write(field::GUEST_CS_BASE, 0xffff_0000);
        write(field::GUEST_RSP, 0);
        write(field::GUEST_RFLAGS, 2);
        write(field::GUEST_DR7, 0x400);
        for zero in [
            field::GUEST_DEBUGCTL,
            field::GUEST_SYSENTER_CS,
            field::GUEST_SYSENTER_ESP,
            field::GUEST_SYSENTER_EIP,
            field::GUEST_PENDING_DEBUG,
            field::GUEST_INTERRUPTIBILITY,
            field::GUEST_ACTIVITY,
        ] {
            write(zero, 0);
        }
    }

    pub fn set_real_mode_start(&mut self, cs_selector: u64, rip: u64) {
        write(field::GUEST_CS_SELECTOR, cs_selector);
        write(field::GUEST_CS_BASE, cs_selector << 4);
        write(field::GUEST_RIP, rip);
    }

    pub fn run(&mut self) -> ! {
        loop {
            // SAFETY: the VMCS is complete; L2 reaches no memory but its own (ept.rs).
            if unsafe { l1_enter(&mut self.registers, self.launched) } != 0 {
                let error = read(field::VM_INSTRUCTION_ERROR);
                fail!(exit_code::VM_ENTRY_FAILED, "cpu ", self.number, ": VM entry failed, error ", error);
            }
            self.launched = true;
            exit::handle(self);
        }
    }
}

fn write_controls(vpid: u64) {
    write(field::PIN_CONTROLS, vmx::controls("pin-based", vmx::IA32_VMX_TRUE_PINBASED_CTLS, 0));
    let primary = PRIMARY_IO_BITMAPS | PRIMARY_MSR_BITMAPS | PRIMARY_SECONDARY;
    write(field::PRIMARY_CONTROLS, vmx::controls("primary", vmx::IA32_VMX_TRUE_PROCBASED_CTLS, primary));
    let secondary = vmx::controls("secondary", vmx::IA32_VMX_PROCBASED_CTLS2, SECONDARY_CONTROLS);
    write(field::SECONDARY_CONTROLS, secondary);
    let exit = EXIT_HOST_64_BIT | EXIT_SAVE_EFER | EXIT_LOAD_EFER;
    write(field::EXIT_CONTROLS, vmx::controls("exit", vmx::IA32_VMX_TRUE_EXIT_CTLS, exit));
    write(field::VPID, vpid);
    write(field::EPT_POINTER, ept::pointer());
    write(field::IO_BITMAP_A, IO_BITMAPS[0].hpa());
    write(field::IO_BITMAP_B, IO_BITMAPS[1].hpa());
    write(field::MSR_BITMAP, MSR_BITMAP.hpa());
    write(field::VMCS_LINK_POINTER, u64::MAX);
    // VMCLEAR leaves fields undefined: what is not used must say so.
    for unused in [
        field::EXCEPTION_BITMAP,
        field::PAGE_FAULT_MASK,
        field::PAGE_FAULT_MATCH,
        field::CR3_TARGET_COUNT,
        field::EXIT_MSR_STORE_COUNT,
        field::EXIT_MSR_LOAD_COUNT,
        field::ENTRY_MSR_LOAD_COUNT,
        field::ENTRY_INTERRUPTION_INFORMATION,
    ] {
        write(unused, 0);
    }
}

/// L2 has the serial port, debug exit, EFER and its local APIC. Everything else exits.
fn write_bitmaps() {
    // MSR bitmap: reads of low and of high MSRs, then writes (SDM volume 3, "MSR-Bitmap Address"), 1 KiB each.
    const READ_LOW: usize = 0;
    const READ_HIGH: usize = 8 * 1024;
    const WRITE_LOW: usize = 2 * 8 * 1024;
    const WRITE_HIGH: usize = 3 * 8 * 1024;

    IO_BITMAPS.iter().for_each(|bitmap| bitmap.fill(u64::MAX));
    (0x3f8..0x400).for_each(|port| IO_BITMAPS[0].clear_bit(port));
    IO_BITMAPS[0].clear_bit(exit_code::DEBUG_EXIT_PORT.into());

    MSR_BITMAP.fill(u64::MAX);
    MSR_BITMAP.clear_bit(READ_LOW + IA32_APIC_BASE as usize);
    for x2apic in 0x800..0x900 {
        MSR_BITMAP.clear_bit(READ_LOW + x2apic);
        MSR_BITMAP.clear_bit(WRITE_LOW + x2apic);
    }
    let efer = IA32_EFER as usize & 0x1fff;
    MSR_BITMAP.clear_bit(READ_HIGH + efer);
    MSR_BITMAP.clear_bit(WRITE_HIGH + efer);
}

/// An exit comes back into the running address space, at `l1_exited`.
fn write_host_state() {
    let table_base = |pointer: [u16; 5]| pointer[1..].iter().rev().fold(0, |base, word| base << 16 | u64::from(*word));
    let (mut gdtr, mut idtr) = ([0_u16; 5], [0_u16; 5]);
    // SAFETY: both store 10 bytes.
    unsafe {
        core::arch::asm!("sgdt [{}]", "sidt [{}]", in(reg) &raw mut gdtr, in(reg) &raw mut idtr, options(nostack));
    }
    write(field::HOST_CR0, vmx::read_cr0());
    write(field::HOST_CR3, vmx::read_cr3());
    write(field::HOST_CR4, vmx::read_cr4());
    write(field::HOST_EFER, rdmsr(IA32_EFER));
    write(field::HOST_CS_SELECTOR, 0x18);
    for data in [field::HOST_ES_SELECTOR, field::HOST_SS_SELECTOR, field::HOST_DS_SELECTOR] {
        write(data, 0x10);
    }
    // TR must not be null (SDM volume 3, "Checks on Host Segment and Descriptor-Table Registers"). An exit loads its
    // selector and base without reading a descriptor, and L1 never changes privilege level, so there is no TSS.
    write(field::HOST_TR_SELECTOR, 0x20);
    write(field::HOST_TR_BASE, 0);
    write(field::HOST_GDTR_BASE, table_base(gdtr));
    write(field::HOST_IDTR_BASE, table_base(idtr));
    for unused in [
        field::HOST_FS_SELECTOR,
        field::HOST_GS_SELECTOR,
        field::HOST_FS_BASE,
        field::HOST_GS_BASE,
        field::HOST_SYSENTER_CS,
        field::HOST_SYSENTER_ESP,
        field::HOST_SYSENTER_EIP,
    ] {
        write(unused, 0);
    }
    write(field::HOST_RIP, l1_exited as *const () as u64);
}

unsafe extern "C" {
    /// Runs L2 until its next exit; 0, or 1 if VMLAUNCH or VMRESUME failed.
    fn l1_enter(registers: &mut Registers, launched: bool) -> u32;
    fn l1_exited();
}

global_asm!(
    ".section .text.l1_enter, \"ax\", @progbits",
    ".global l1_enter, l1_exited",
    "l1_enter:",
    "push rbx",
    "push rbp",
    "push r12",
    "push r13",
    "push r14",
    "push r15",
    "push rdi",
    "mov eax, {host_rsp}",
    "vmwrite rax, rsp",
    "test sil, sil",
    "mov rax, [rdi]",
    "mov rcx, [rdi + 8]",
    "mov rdx, [rdi + 16]",
    "mov rbx, [rdi + 24]",
    "mov rbp, [rdi + 32]",
    "mov rsi, [rdi + 40]",
    "mov r8, [rdi + 56]",
    "mov r9, [rdi + 64]",
    "mov r10, [rdi + 72]",
    "mov r11, [rdi + 80]",
    "mov r12, [rdi + 88]",
    "mov r13, [rdi + 96]",
    "mov r14, [rdi + 104]",
    "mov r15, [rdi + 112]",
    "mov rdi, [rdi + 48]",
    "jnz 2f",
    "vmlaunch",
    "jmp 3f",
    "2: vmresume",
    "3: mov eax, 1",
    "pop rdi",
    "jmp 4f",
    "l1_exited:",
    "push rdi",
    "mov rdi, [rsp + 8]",
    "mov [rdi], rax",
    "mov [rdi + 8], rcx",
    "mov [rdi + 16], rdx",
    "mov [rdi + 24], rbx",
    "mov [rdi + 32], rbp",
    "mov [rdi + 40], rsi",
    "mov [rdi + 56], r8",
    "mov [rdi + 64], r9",
    "mov [rdi + 72], r10",
    "mov [rdi + 80], r11",
    "mov [rdi + 88], r12",
    "mov [rdi + 96], r13",
    "mov [rdi + 104], r14",
    "mov [rdi + 112], r15",
    "pop qword ptr [rdi + 48]",
    "pop rdi",
    "xor eax, eax",
    "4: pop r15",
    "pop r14",
    "pop r13",
    "pop r12",
    "pop rbp",
    "pop rbx",
    "ret",
    ".section .text",
    host_rsp = const field::HOST_RSP,
);
