//! The widths in which memory is accessed.

use std::arch::asm;
use std::fmt::Debug;
use std::ops::{BitAnd, BitOr, BitXor, Not};

/// An unsigned integer of an operand's width.
///
/// # Safety
/// `load`, `store` and `cas` access exactly `BYTES` bytes at `p` and nothing else.
pub unsafe trait Word:
    Copy
    + Eq
    + Default
    + Debug
    + BitAnd<Output = Self>
    + BitOr<Output = Self>
    + BitXor<Output = Self>
    + Not<Output = Self>
    + 'static
{
    const BYTES: u64;
    const BITS: u32 = Self::BYTES as u32 * 8;
    fn from_u64(v: u64) -> Self;
    fn to_u64(self) -> u64;
    /// Sign-extended.
    fn to_i64(self) -> i64;
    /// Little-endian, zero-extended to 16 bytes.
    fn to_bytes16(self) -> [u8; 16];
    fn from_bytes16(bytes: [u8; 16]) -> Self;
    /// # Safety
    /// `p` is valid for `BYTES` bytes; it need not be aligned.
    unsafe fn load(p: *const u8) -> Self;
    /// # Safety
    /// As for [`Word::load`].
    unsafe fn store(p: *mut u8, v: Self);
    /// LOCK CMPXCHG: Ok(old) when it was `old`, else Err(what it was).
    /// # Safety
    /// As for [`Word::load`].
    unsafe fn cas(p: *mut u8, old: Self, new: Self) -> Result<Self, Self>;
}

macro_rules! word {
    ($t:ty, $s:ty, $bytes:literal, via $via:ty, $reg:ident, $mov:literal, $load:literal, $cas:literal, $acc:tt) => {
        // SAFETY: each instruction accesses $bytes bytes at the pointer.
        unsafe impl Word for $t {
            const BYTES: u64 = $bytes;
            #[inline(always)]
            fn from_u64(v: u64) -> Self {
                v as $t
            }
            #[inline(always)]
            fn to_u64(self) -> u64 {
                self as u64
            }
            #[inline(always)]
            fn to_i64(self) -> i64 {
                self as $s as i64
            }
            fn to_bytes16(self) -> [u8; 16] {
                (self as u128).to_le_bytes()
            }
            fn from_bytes16(bytes: [u8; 16]) -> Self {
                u128::from_le_bytes(bytes) as $t
            }
            #[inline(always)]
            unsafe fn load(p: *const u8) -> Self {
                let v: $via;
                // SAFETY: the caller vouches for p.
                unsafe { asm!($load, in(reg) p, out(reg) v, options(nostack, preserves_flags, readonly)) }
                v as $t
            }
            #[inline(always)]
            unsafe fn store(p: *mut u8, v: Self) {
                // SAFETY: the caller vouches for p.
                unsafe { asm!($mov, in(reg) p, in($reg) v, options(nostack, preserves_flags)) }
            }
            #[inline(always)]
            unsafe fn cas(p: *mut u8, old: Self, new: Self) -> Result<Self, Self> {
                let seen: $t;
                // SAFETY: the caller vouches for p.
                unsafe { asm!($cas, in(reg) p, in($reg) new, inout($acc) old => seen, options(nostack)) }
                if seen == old { Ok(old) } else { Err(seen) }
            }
        }
    };
}

word!(u8, i8, 1, via u32, reg_byte, "mov byte ptr [{0}], {1}", "movzx {1:e}, byte ptr [{0}]", "lock cmpxchg byte ptr [{0}], {1}", "al");
word!(u16, i16, 2, via u32, reg, "mov word ptr [{0}], {1:x}", "movzx {1:e}, word ptr [{0}]", "lock cmpxchg word ptr [{0}], {1:x}", "ax");
word!(u32, i32, 4, via u32, reg, "mov dword ptr [{0}], {1:e}", "mov {1:e}, dword ptr [{0}]", "lock cmpxchg dword ptr [{0}], {1:e}", "eax");
word!(u64, i64, 8, via u64, reg, "mov qword ptr [{0}], {1:r}", "mov {1:r}, qword ptr [{0}]", "lock cmpxchg qword ptr [{0}], {1:r}", "rax");

// SAFETY: MOVUPS accesses 16 bytes; CMPXCHG16B the same, which must be 16-byte aligned (callers check; else two
// halves would not be atomic and the host faults).
unsafe impl Word for u128 {
    const BYTES: u64 = 16;
    fn from_u64(v: u64) -> Self {
        v.into()
    }
    fn to_u64(self) -> u64 {
        self as u64
    }
    fn to_i64(self) -> i64 {
        self as i64
    }
    fn to_bytes16(self) -> [u8; 16] {
        self.to_le_bytes()
    }
    fn from_bytes16(bytes: [u8; 16]) -> Self {
        u128::from_le_bytes(bytes)
    }
    #[inline(always)]
    unsafe fn load(p: *const u8) -> Self {
        let v: std::arch::x86_64::__m128i;
        // SAFETY: the caller vouches for p; __m128i and u128 have the same bytes.
        unsafe {
            asm!("movups {1}, xmmword ptr [{0}]", in(reg) p, out(xmm_reg) v, options(nostack, preserves_flags, readonly));
            std::mem::transmute(v)
        }
    }
    #[inline(always)]
    unsafe fn store(p: *mut u8, v: Self) {
        // SAFETY: the caller vouches for p; __m128i and u128 have the same bytes.
        unsafe {
            let v: std::arch::x86_64::__m128i = std::mem::transmute(v);
            asm!("movups xmmword ptr [{0}], {1}", in(reg) p, in(xmm_reg) v, options(nostack, preserves_flags));
        }
    }
    unsafe fn cas(p: *mut u8, old: Self, new: Self) -> Result<Self, Self> {
        let (lo, hi): (u64, u64);
        // SAFETY: the caller vouches for p and its alignment; rbx is saved by hand because LLVM reserves it.
        unsafe {
            asm!(
                "xchg {b}, rbx", "lock cmpxchg16b xmmword ptr [{p}]", "mov rbx, {b}",
                p = in(reg) p, b = inout(reg) new as u64 => _, in("rcx") (new >> 64) as u64,
                inout("rax") old as u64 => lo, inout("rdx") (old >> 64) as u64 => hi, options(nostack)
            );
        }
        let seen = u128::from(lo) | u128::from(hi) << 64;
        if seen == old { Ok(old) } else { Err(seen) }
    }
}
