//! What L1 does about each exit.

use rt::console::Hex;
use rt::cpu::cpuid;
use rt::{exit_code, fail, say};

use crate::vcpu::Vcpu;
use crate::vmx::{self, field, read, write};

/// Basic exit reasons (SDM volume 3, appendix C).
const INIT_SIGNAL: u64 = 3;
const SIPI: u64 = 4;
const CPUID: u64 = 10;
const VMCALL: u64 = 18;
const ENTRY_FAILURE: u64 = 1 << 31;

const CPUID_1_ECX_VMX: u32 = 1 << 5;

pub fn handle(vcpu: &mut Vcpu) {
    match read(field::EXIT_REASON) {
        INIT_SIGNAL => init_signal(vcpu),
        SIPI => sipi(vcpu),
        CPUID => {
            let registers = &mut vcpu.registers;
            let leaf = registers.rax as u32;
            let result = cpuid(leaf, registers.rcx as u32);
            let hidden = if leaf == 1 { CPUID_1_ECX_VMX } else { 0 };
            registers.rax = result.eax.into();
            registers.rbx = result.ebx.into();
            registers.rcx = (result.ecx & !hidden).into();
            registers.rdx = result.edx.into();
            skip_instruction();
        }
        // No calls are defined: the benchmark measures the way here and back.
        VMCALL => skip_instruction(),
        reason => unexpected(vcpu, reason),
    }
}

/// L2 sent INIT to this processor. The real one did nothing of INIT's work, nor touched its local APIC: exit 3 is
/// all there is, and what INIT does to L2's processor is for L1 to do.
fn init_signal(vcpu: &mut Vcpu) {
    if cfg!(mutant = "stays-active") {
        say!("cpu ", vcpu.number, ": exit 3 (INIT signal), mutant: resuming active");
        write(field::GUEST_ACTIVITY, vmx::ACTIVITY_ACTIVE);
        return;
    }
    say!("cpu ", vcpu.number, ": exit 3 (INIT signal), resuming in wait-for-SIPI");
    vcpu.set_init_state();
    write(field::GUEST_ACTIVITY, vmx::ACTIVITY_WAIT_FOR_SIPI);
}

/// L2 sent a SIPI to this processor, which was in wait-for-SIPI.
fn sipi(vcpu: &mut Vcpu) {
    let vector = read(field::EXIT_QUALIFICATION) & 0xff;
    if cfg!(mutant = "ignores-sipi") {
        say!("cpu ", vcpu.number, ": exit 4 (SIPI), vector ", Hex(vector), ", mutant: resuming as it was");
        return;
    }
    say!("cpu ", vcpu.number, ": exit 4 (SIPI), vector ", Hex(vector), ", starting at ", Hex(vector << 12));
    vcpu.set_real_mode_start(vector << 8, 0);
    write(field::GUEST_ACTIVITY, vmx::ACTIVITY_ACTIVE);
}

fn skip_instruction() {
    write(field::GUEST_RIP, read(field::GUEST_RIP) + read(field::EXIT_INSTRUCTION_LENGTH));
}

fn unexpected(vcpu: &Vcpu, reason: u64) -> ! {
    fail!(
        if reason & ENTRY_FAILURE != 0 { exit_code::VM_ENTRY_FAILED } else { exit_code::UNEXPECTED_EXIT },
        "cpu ",
        vcpu.number,
        if reason & ENTRY_FAILURE != 0 { ": VM entry failed, reason " } else { ": unexpected exit " },
        reason & 0xffff,
        ", qualification ",
        Hex(read(field::EXIT_QUALIFICATION)),
        ", rip ",
        Hex(read(field::GUEST_RIP))
    )
}
