//! Runs one instruction on the host's processor: all registers, flags and FXSAVE state in, the same out, faults caught.
//! 64-bit code, or 32-bit code in compatibility mode.
#![allow(unsafe_code)]

use super::State;
use iced_x86::code_asm::*;
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard};

/// Everything lies below 2 GiB, so that absolute addresses fit 32 bits, and at the same linear addresses in the guest.
const CONTEXT: u64 = 0x3000_0000;
pub const SCRATCH: u64 = 0x3010_0000;
pub const SCRATCH_LEN: usize = 0x2000;
pub const CODE: u64 = 0x3020_0000;
const CODE_LEN: u64 = 0x1000;
/// Where the tested instruction is; behind it a jump to the exit.
pub const INSN: u64 = CODE + 0x200;
/// Where tested branches go.
pub const PAD: u64 = CODE + 0x240;
const EXIT: u64 = CODE + 0x300;
const RESTORE: u64 = CODE + 0x500;
const ENTRY_32: u64 = CODE + 0x600;
const LOAD_32: u64 = CODE + 0x700;
const EXIT_32: u64 = CODE + 0x800;
/// A stack for 32-bit code to load and store flags.
const STACK_32: u64 = CONTEXT + 0xff0;
/// Linux' selectors of user code and data.
const CODE_64_SELECTOR: u64 = 0x33;
const CODE_32_SELECTOR: u64 = 0x23;
const DATA_SELECTOR: u64 = 0x2b;

#[repr(C, align(64))]
struct Context {
    fx_host: [u8; 512],
    fx_in: [u8; 512],
    fx_out: [u8; 512],
    regs: [u64; 16],
    out: [u64; 16],
    flags_in: u64,
    flags_out: u64,
    host_rsp: u64,
    taken: u64,
    signal: u64,
    running: u64,
    /// Offset and selector of the 32-bit code.
    far_32: [u32; 2],
}

/// Which signal stopped the instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Signal(pub i32);

/// The one place where host instructions run; holds a lock.
pub struct Host {
    _alone: MutexGuard<'static, ()>,
}

static LOCK: Mutex<()> = Mutex::new(());
static READY: AtomicBool = AtomicBool::new(false);

const GPR: [AsmRegister64; 16] = [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15];
const GPR_32: [AsmRegister32; 8] = [eax, ecx, edx, ebx, esp, ebp, esi, edi];
/// glibc's order of `gregs` for the sixteen registers in the processor's order.
const GREGS: [i32; 16] = [
    libc::REG_RAX,
    libc::REG_RCX,
    libc::REG_RDX,
    libc::REG_RBX,
    libc::REG_RSP,
    libc::REG_RBP,
    libc::REG_RSI,
    libc::REG_RDI,
    libc::REG_R8,
    libc::REG_R9,
    libc::REG_R10,
    libc::REG_R11,
    libc::REG_R12,
    libc::REG_R13,
    libc::REG_R14,
    libc::REG_R15,
];

fn at(field: usize) -> u64 {
    CONTEXT + field as u64
}

macro_rules! field {
    ($name:ident) => {
        at(std::mem::offset_of!(Context, $name))
    };
}

fn assemble(bits: u32, ip: u64, f: impl FnOnce(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>) -> Vec<u8> {
    let mut a = CodeAssembler::new(bits).unwrap();
    f(&mut a).unwrap();
    a.assemble(ip).unwrap()
}

fn context() -> *mut Context {
    CONTEXT as *mut Context
}

fn put(address: u64, bytes: &[u8]) {
    // SAFETY: only called with addresses in the mappings of `set_up`, which hold `bytes`.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), address as *mut u8, bytes.len()) }
}

/// Goes on at RESTORE when the tested instruction faults; other faults are none of ours.
extern "C" fn on_signal(signal: i32, _: *mut libc::siginfo_t, context_of_signal: *mut libc::c_void) {
    // SAFETY: the kernel passes a ucontext; the Context page is mapped before the handler is installed.
    unsafe {
        let gregs = &mut (*context_of_signal.cast::<libc::ucontext_t>()).uc_mcontext.gregs;
        let c = &mut *context();
        if c.running == 0 {
            libc::signal(signal, libc::SIG_DFL);
            return;
        }
        for (out, n) in c.out.iter_mut().zip(GREGS) {
            *out = gregs[n as usize] as u64;
        }
        c.flags_out = gregs[libc::REG_EFL as usize] as u64;
        c.signal = signal as u64;
        let fx = (*context_of_signal.cast::<libc::ucontext_t>()).uc_mcontext.fpregs;
        std::ptr::copy_nonoverlapping(fx.cast::<u8>(), c.fx_out.as_mut_ptr(), c.fx_out.len());
        gregs[libc::REG_RIP as usize] = RESTORE as i64;
        let selectors = &mut gregs[libc::REG_CSGSFS as usize];
        *selectors = *selectors & !0xffff | CODE_64_SELECTOR as i64;
        // Without DF, TF and AC.
        gregs[libc::REG_EFL as usize] = 0x202;
    }
}

fn set_up() {
    let rw = ProtFlags::READ | ProtFlags::WRITE;
    for (address, len, prot) in
        [(CONTEXT, 0x1000, rw), (SCRATCH, SCRATCH_LEN as u64, rw), (CODE, CODE_LEN, rw | ProtFlags::EXEC)]
    {
        let flags = MapFlags::PRIVATE | MapFlags::FIXED_NOREPLACE;
        // SAFETY: a new mapping; NOREPLACE fails rather than touch an existing one.
        let p =
            unsafe { mmap_anonymous(address as *mut _, len as usize, prot, flags) }.expect("mapping the test's pages");
        assert_eq!(p as u64, address);
    }
    put(
        CODE,
        &assemble(64, CODE, |a| {
            for r in [rbx, rbp, r12, r13, r14, r15] {
                a.push(r)?;
            }
            a.mov(qword_ptr(field!(host_rsp)), rsp)?;
            a.fxsave64(ptr(field!(fx_host)))?;
            a.fxrstor64(ptr(field!(fx_in)))?;
            a.push(qword_ptr(field!(flags_in)))?;
            a.popfq()?;
            for (n, r) in GPR.into_iter().enumerate() {
                a.mov(r, qword_ptr(field!(regs) + 8 * n as u64))?;
            }
            a.jmp(INSN)
        }),
    );
    put(
        EXIT,
        &assemble(64, EXIT, |a| {
            for (n, r) in GPR.into_iter().enumerate() {
                a.mov(qword_ptr(field!(out) + 8 * n as u64), r)?;
            }
            a.mov(rsp, qword_ptr(field!(host_rsp)))?;
            a.pushfq()?;
            a.pop(qword_ptr(field!(flags_out)))?;
            a.fxsave64(ptr(field!(fx_out)))?;
            a.jmp(RESTORE)
        }),
    );
    put(
        RESTORE,
        &assemble(64, RESTORE, |a| {
            a.mov(rsp, qword_ptr(field!(host_rsp)))?;
            a.push(0x202)?;
            a.popfq()?;
            a.xor(eax, eax)?;
            a.mov(ds, eax)?;
            a.mov(es, eax)?;
            a.fxrstor64(ptr(field!(fx_host)))?;
            for r in [r15, r14, r13, r12, rbp, rbx] {
                a.pop(r)?;
            }
            a.ret()
        }),
    );
    put(
        ENTRY_32,
        &assemble(64, ENTRY_32, |a| {
            for r in [rbx, rbp, r12, r13, r14, r15] {
                a.push(r)?;
            }
            a.mov(qword_ptr(field!(host_rsp)), rsp)?;
            a.fxsave64(ptr(field!(fx_host)))?;
            a.fxrstor64(ptr(field!(fx_in)))?;
            a.mov(eax, DATA_SELECTOR as u32)?;
            a.mov(ds, eax)?;
            a.mov(es, eax)?;
            // JMP m16:32 with an absolute address.
            let [b0, b1, b2, b3] = (field!(far_32) as u32).to_le_bytes();
            a.db(&[0xff, 0x2c, 0x25, b0, b1, b2, b3])
        }),
    );
    put(field!(far_32), &(CODE_32_SELECTOR << 32 | LOAD_32).to_le_bytes());
    put(
        LOAD_32,
        &assemble(32, LOAD_32, |a| {
            a.mov(esp, STACK_32 as u32)?;
            a.push(dword_ptr(field!(flags_in)))?;
            a.popfd()?;
            for (n, r) in GPR_32.into_iter().enumerate() {
                a.mov(r, dword_ptr(field!(regs) + 8 * n as u64))?;
            }
            a.jmp(INSN)
        }),
    );
    put(
        EXIT_32,
        &assemble(32, EXIT_32, |a| {
            for (n, r) in GPR_32.into_iter().enumerate() {
                a.mov(dword_ptr(field!(out) + 8 * n as u64), r)?;
            }
            a.mov(esp, STACK_32 as u32)?;
            a.pushfd()?;
            a.pop(dword_ptr(field!(flags_out)))?;
            a.fxsave(ptr(field!(fx_out)))?;
            // JMP ptr16:32.
            let [b0, b1, b2, b3] = (RESTORE as u32).to_le_bytes();
            a.db(&[0xea, b0, b1, b2, b3, CODE_64_SELECTOR as u8, 0])
        }),
    );
    // SAFETY: installs a handler that is async-signal-safe; see `on_signal`.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_signal as extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void) as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
        for signal in [libc::SIGSEGV, libc::SIGILL, libc::SIGFPE, libc::SIGBUS, libc::SIGTRAP] {
            assert_eq!(libc::sigaction(signal, &action, std::ptr::null_mut()), 0);
        }
    }
}

impl Host {
    pub fn new() -> Self {
        let guard = LOCK.lock().unwrap_or_else(|e| e.into_inner());
        if !READY.swap(true, Ordering::SeqCst) {
            set_up();
        }
        // The tested instruction may have any RSP: signals need a stack of their own.
        let stack = vec![0u8; 1 << 17].leak();
        let alternative = libc::stack_t { ss_sp: stack.as_mut_ptr().cast(), ss_flags: 0, ss_size: stack.len() };
        // SAFETY: the leaked stack lives forever.
        assert_eq!(unsafe { libc::sigaltstack(&alternative, std::ptr::null_mut()) }, 0);
        Self { _alone: guard }
    }

    /// Places the instruction that the next runs execute.
    pub fn place(&mut self, bits: u32, insn: &[u8]) {
        let exit = if bits == 64 { EXIT } else { EXIT_32 };
        put(INSN, insn);
        let behind = INSN + insn.len() as u64;
        put(behind, &assemble(bits, behind, |a| a.jmp(exit)));
        assert!(behind + 5 <= PAD);
        put(
            PAD,
            &assemble(bits, PAD, |a| {
                a.mov(dword_ptr(field!(taken)), 1)?;
                a.jmp(exit)
            }),
        );
    }

    /// What the guest needs to see at [`CODE`].
    pub fn code(&self) -> &[u8] {
        // SAFETY: mapped in `set_up` for good; nobody writes while the slice lives, as `place` needs &mut.
        unsafe { std::slice::from_raw_parts(CODE as *const u8, CODE_LEN as usize) }
    }

    /// Runs the placed instruction on `s`, whose memory is that of [`SCRATCH`]. After a fault the registers, flags and
    /// memory are what the fault left.
    pub fn run(&mut self, bits: u32, s: &mut State) -> Result<(), Signal> {
        put(SCRATCH, &s.memory[..]);
        // SAFETY: mapped in `set_up`; this thread holds the lock. The entry saves and restores what the ABI says is the
        // callee's. The tested instruction touches its operands only, which the caller keeps inside the scratch memory;
        // elsewhere it faults.
        unsafe {
            let c = &mut *context();
            c.fx_in = s.fx;
            c.regs = s.regs;
            c.flags_in = s.flags;
            c.taken = 0;
            c.signal = 0;
            c.running = 1;
            let start = if bits == 64 { CODE } else { ENTRY_32 };
            let entry: extern "sysv64" fn() = std::mem::transmute(start as *const ());
            entry();
            let c = &mut *context();
            c.running = 0;
            s.regs = c.out;
            s.flags = c.flags_out;
            if bits == 32 {
                // Signal frames have 64 bits, the code stored 32.
                s.regs = std::array::from_fn(|n| if n < 8 { c.out[n] & 0xffff_ffff } else { 0 });
                s.flags &= 0xffff_ffff;
            }
            s.taken = c.taken != 0;
            std::ptr::copy_nonoverlapping(SCRATCH as *const u8, s.memory.as_mut_ptr(), SCRATCH_LEN);
            s.fx = c.fx_out;
            if c.signal != 0 {
                return Err(Signal(c.signal as i32));
            }
        }
        Ok(())
    }
}
