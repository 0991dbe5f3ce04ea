//! Instructions of the host on two vector registers.

use std::arch::x86_64::__m128i;

pub(super) fn to_host(v: u128) -> __m128i {
    // SAFETY: both are 16 bytes of plain data.
    unsafe { std::mem::transmute(v) }
}

pub(super) fn from_host(v: __m128i) -> u128 {
    // SAFETY: both are 16 bytes of plain data.
    unsafe { std::mem::transmute(v) }
}

/// `a = instruction(a, b)` in vector registers, for instructions that neither read nor change MXCSR.
macro_rules! on_vectors {
    ($instruction:expr, $a:expr, $b:expr) => {{
        let mut a = $crate::cpu::fp::vector::to_host($a);
        let b = $crate::cpu::fp::vector::to_host($b);
        // SAFETY: the instruction works on the two registers only; select() checked that the host has it.
        unsafe {
            std::arch::asm!(concat!($instruction, " {0}, {1}"), inout(xmm_reg) a, in(xmm_reg) b,
                options(nostack, nomem, pure, preserves_flags));
        }
        $crate::cpu::fp::vector::from_host(a)
    }};
}
pub(super) use on_vectors;

/// The same in MMX registers. EMMS leaves the x87 stack empty, as compiled code expects it.
macro_rules! on_mmx {
    ($instruction:expr, $a:expr, $b:expr) => {{
        let mut a: u64 = $a;
        // SAFETY: the instruction works on two registers, which are declared as changed; select() checked that the
        // host has it.
        unsafe {
            std::arch::asm!("movq mm0, {0}", "movq mm1, {1}", concat!($instruction, " mm0, mm1"), "movq {0}, mm0", "emms",
                inout(reg) a, in(reg) $b, out("mm0") _, out("mm1") _,
                options(nostack, nomem, pure, preserves_flags));
        }
        a
    }};
}
pub(super) use on_mmx;

/// What the host's MXCSR is outside these blocks: compiled code expects the default.
pub(super) static HOST_MXCSR: u32 = super::state::MXCSR_DEFAULT;

/// `a = instruction(a, b)` under the MXCSR in `$csr`, which must mask all exceptions and gets the flags.
macro_rules! with_mxcsr {
    ($csr:ident, $instruction:expr, $a:expr, $b:expr) => {
        $crate::cpu::fp::vector::with_mxcsr!($csr, $instruction, "", $a, $b)
    };
    ($csr:ident, $instruction:expr, $tail:expr, $a:expr, $b:expr) => {{
        let mut a = $crate::cpu::fp::vector::to_host($a);
        let b = $crate::cpu::fp::vector::to_host($b);
        // SAFETY: the instruction works on two registers; its exceptions are masked, and the host's MXCSR is put back.
        unsafe {
            std::arch::asm!("ldmxcsr dword ptr [{c}]", concat!($instruction, " {a}, {b}", $tail),
                "stmxcsr dword ptr [{c}]", "ldmxcsr dword ptr [{h}]",
                a = inout(xmm_reg) a, b = in(xmm_reg) b, c = in(reg) &mut $csr,
                h = in(reg) &$crate::cpu::fp::vector::HOST_MXCSR, options(nostack, preserves_flags));
        }
        $crate::cpu::fp::vector::from_host(a)
    }};
}
pub(super) use with_mxcsr;

/// The same with a general register (of the width that `$modifier` names) as the source or destination.
macro_rules! with_mxcsr_general {
    ($csr:ident, $instruction:expr, to $modifier:literal, $b:expr) => {{
        let g: u64;
        let b = $crate::cpu::fp::vector::to_host($b);
        // SAFETY: as in with_mxcsr.
        unsafe {
            std::arch::asm!("ldmxcsr dword ptr [{c}]", concat!($instruction, " {g:", $modifier, "}, {b}"),
                "stmxcsr dword ptr [{c}]", "ldmxcsr dword ptr [{h}]",
                g = out(reg) g, b = in(xmm_reg) b, c = in(reg) &mut $csr,
                h = in(reg) &$crate::cpu::fp::vector::HOST_MXCSR, options(nostack, preserves_flags));
        }
        g
    }};
    ($csr:ident, $instruction:expr, from $modifier:literal, $a:expr, $g:expr) => {{
        let mut a = $crate::cpu::fp::vector::to_host($a);
        // SAFETY: as in with_mxcsr.
        unsafe {
            std::arch::asm!("ldmxcsr dword ptr [{c}]", concat!($instruction, " {a}, {g:", $modifier, "}"),
                "stmxcsr dword ptr [{c}]", "ldmxcsr dword ptr [{h}]",
                a = inout(xmm_reg) a, g = in(reg) $g, c = in(reg) &mut $csr,
                h = in(reg) &$crate::cpu::fp::vector::HOST_MXCSR, options(nostack, preserves_flags));
        }
        $crate::cpu::fp::vector::from_host(a)
    }};
}
pub(super) use with_mxcsr_general;

/// The status flags that a comparison sets, under the MXCSR in `$csr`.
macro_rules! compare_with_mxcsr {
    ($csr:ident, $instruction:expr, $a:expr, $b:expr) => {{
        let a = $crate::cpu::fp::vector::to_host($a);
        let b = $crate::cpu::fp::vector::to_host($b);
        let flags: u64;
        // SAFETY: as in with_mxcsr; the stack is used as a stack.
        unsafe {
            std::arch::asm!("ldmxcsr dword ptr [{c}]", concat!($instruction, " {a}, {b}"), "pushfq", "pop {f}",
                "stmxcsr dword ptr [{c}]", "ldmxcsr dword ptr [{h}]",
                a = in(xmm_reg) a, b = in(xmm_reg) b, c = in(reg) &mut $csr, f = out(reg) flags,
                h = in(reg) &$crate::cpu::fp::vector::HOST_MXCSR);
        }
        flags
    }};
}
pub(super) use compare_with_mxcsr;

/// The x87 status word of an instruction on ST(0) = `$x` and `{y}` in memory, under a control word with all exceptions
/// masked.
macro_rules! on_x87 {
    ($instruction:literal, $control:expr, $x:expr, $y:expr) => {{
        let status: u16;
        // SAFETY: FNINIT leaves the x87 unit as compiled code expects it; both pointers are to 8 bytes.
        unsafe {
            std::arch::asm!("fninit", "fldcw word ptr [{c}]", "fld qword ptr [{x}]", $instruction, "fnstsw ax", "fninit",
                c = in(reg) &$control, x = in(reg) &$x, y = in(reg) &$y, out("ax") status,
                out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _,
                out("st(4)") _, out("st(5)") _, out("st(6)") _, out("st(7)") _, options(nostack, preserves_flags));
        }
        status
    }};
}
pub(super) use on_x87;
