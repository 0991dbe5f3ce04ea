//! A VM's RAM and what is known of its pages.

use super::Word;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use std::arch::asm;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering, fence};

pub const PAGE_SIZE: u64 = 4096;

/// RAM lies below this and, what does not fit, from [`HIGH_GPA`] on; devices have the hole between.
const LOW_END_GPA: u64 = 3 << 30;
const HIGH_GPA: u64 = 4 << 30;

/// Decoded blocks of the page exist: stores to it take the slow path.
const CODE: u8 = 1 << 0;
/// Some processor has, or had, a fast-write TLB entry for the page.
const WRITE_MAPPED: u8 = 1 << 1;

/// An address range that is not RAM.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("guest-physical range {gpa:#x}..+{len:#x} is not in RAM")]
pub struct OutOfRange {
    pub gpa: u64,
    pub len: u64,
}

/// Guest RAM: a memfd mapped once. Inside nestd it is addressed by offset into the mapping.
pub struct Ram {
    base: *mut u8,
    size: u64,
    fd: OwnedFd,
    pages: Box<[AtomicU8]>,
    /// Bumped when code on the page changes; a block is stale when its page's generation moved on.
    generations: Box<[AtomicU32]>,
    write_epoch: AtomicU64,
}

// SAFETY: `base` is a shared mapping that lives as long as the struct; all accesses are single asm instructions
// on bytes that both guest processors and devices may race on, as on real hardware.
unsafe impl Send for Ram {}
// SAFETY: as for Send.
unsafe impl Sync for Ram {}

impl std::fmt::Debug for Ram {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ram").field("size", &self.size).finish_non_exhaustive()
    }
}

impl Drop for Ram {
    fn drop(&mut self) {
        // SAFETY: mapped in `new` with this size, and nothing outlives self.
        let _ = unsafe { munmap(self.base.cast(), self.size as usize) };
    }
}

impl Ram {
    /// `size` bytes, rounded up to whole pages.
    pub fn new(size: u64) -> io::Result<Self> {
        let size = size.max(1).next_multiple_of(PAGE_SIZE);
        let fd = memfd_create("nestd-ram", MemfdFlags::CLOEXEC)?;
        ftruncate(&fd, size)?;
        // SAFETY: a new mapping at an address the kernel chooses.
        let base = unsafe {
            mmap(
                std::ptr::null_mut(),
                size as usize,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED | MapFlags::NORESERVE,
                &fd,
                0,
            )?
        };
        let pages = (size / PAGE_SIZE) as usize;
        Ok(Self {
            base: base.cast(),
            size,
            fd,
            pages: (0..pages).map(|_| AtomicU8::new(0)).collect(),
            generations: (0..pages).map(|_| AtomicU32::new(0)).collect(),
            write_epoch: AtomicU64::new(0),
        })
    }

    pub fn size(&self) -> u64 {
        self.size
    }

    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// (guest-physical start, size, offset in the memfd) of each piece.
    pub fn regions(&self) -> impl Iterator<Item = (u64, u64, u64)> {
        let low = self.size.min(LOW_END_GPA);
        [(0, low, 0), (HIGH_GPA, self.size - low, low)].into_iter().filter(|r| r.1 != 0)
    }

    /// The mapping's address, for engines that hand it to the kernel.
    pub fn host_address(&self) -> *mut u8 {
        self.base
    }

    /// The offset of `gpa`, when it is RAM.
    #[inline]
    pub fn offset_of(&self, gpa: u64) -> Option<u64> {
        let offset = if gpa < LOW_END_GPA {
            gpa
        } else if gpa >= HIGH_GPA {
            gpa - HIGH_GPA + LOW_END_GPA
        } else {
            return None;
        };
        (offset < self.size).then_some(offset)
    }

    #[inline(always)]
    fn at(&self, offset: u64, len: u64) -> *mut u8 {
        assert!(offset <= self.size.wrapping_sub(len) && len <= self.size, "offset outside RAM");
        // SAFETY: inside the mapping, as just checked.
        unsafe { self.base.add(offset as usize) }
    }

    #[inline(always)]
    pub fn load<W: Word>(&self, offset: u64) -> W {
        let p = self.at(offset, W::BYTES);
        // SAFETY: `at` checked the range.
        unsafe { W::load(p) }
    }

    /// Stores without looking at the page's state: for callers that own a write TLB entry, or checked.
    #[inline(always)]
    pub fn store<W: Word>(&self, offset: u64, v: W) {
        let p = self.at(offset, W::BYTES);
        // SAFETY: `at` checked the range.
        unsafe { W::store(p, v) }
    }

    /// LOCK CMPXCHG. A u128 must be 16-byte aligned.
    #[inline]
    pub fn cas<W: Word>(&self, offset: u64, old: W, new: W) -> Result<W, W> {
        let p = self.at(offset, W::BYTES);
        assert!(W::BYTES != 16 || offset.is_multiple_of(16), "CMPXCHG16B needs alignment");
        // SAFETY: `at` checked the range.
        unsafe { W::cas(p, old, new) }
    }

    /// `count` words from lower to higher addresses, one after the other, also where the ranges overlap: REP MOVS.
    pub fn copy<W: Word>(&self, from: u64, to: u64, count: u64) {
        let len = count.saturating_mul(W::BYTES);
        let (src, dst) = (self.at(from, len), self.at(to, len));
        macro_rules! rep {
            ($instruction:literal) => {
                // SAFETY: `at` checked both ranges; the ABI says DF=0.
                unsafe {
                    asm!($instruction, inout("rcx") count => _, inout("rsi") src => _, inout("rdi") dst => _,
                        options(nostack, preserves_flags));
                }
            };
        }
        match W::BYTES {
            1 => rep!("rep movsb"),
            2 => rep!("rep movsw"),
            4 => rep!("rep movsd"),
            _ => rep!("rep movsq"),
        }
    }

    /// `count` times the word: REP STOS.
    pub fn fill<W: Word>(&self, to: u64, count: u64, word: W) {
        let dst = self.at(to, count.saturating_mul(W::BYTES));
        macro_rules! rep {
            ($instruction:literal) => {
                // SAFETY: `at` checked the range; the ABI says DF=0.
                unsafe {
                    asm!($instruction, inout("rcx") count => _, inout("rdi") dst => _, in("rax") word.to_u64(),
                        options(nostack, preserves_flags));
                }
            };
        }
        match W::BYTES {
            1 => rep!("rep stosb"),
            2 => rep!("rep stosw"),
            4 => rep!("rep stosd"),
            _ => rep!("rep stosq"),
        }
    }

    pub fn read_offset(&self, offset: u64, out: &mut [u8]) {
        let src = self.at(offset, out.len() as u64);
        // SAFETY: `at` checked the source; `out` is ours.
        unsafe {
            asm!("rep movsb", inout("rcx") out.len() => _, inout("rsi") src => _, inout("rdi") out.as_mut_ptr() => _,
                options(nostack, preserves_flags));
        }
    }

    pub fn write_offset(&self, offset: u64, data: &[u8]) {
        let dst = self.at(offset, data.len() as u64);
        // SAFETY: `at` checked the destination; `data` is ours.
        unsafe {
            asm!("rep movsb", inout("rcx") data.len() => _, inout("rsi") data.as_ptr() => _, inout("rdi") dst => _,
                options(nostack, preserves_flags));
        }
    }

    fn range(&self, gpa: u64, len: u64) -> Result<u64, OutOfRange> {
        let bad = OutOfRange { gpa, len };
        let Some(last) = len.checked_sub(1) else { return Ok(0) };
        let first = self.offset_of(gpa).ok_or(bad)?;
        let end = gpa.checked_add(last).and_then(|g| self.offset_of(g));
        if end == first.checked_add(last) { Ok(first) } else { Err(OutOfRange { gpa, len }) }
    }

    /// For loaders and tools.
    pub fn read(&self, gpa: u64, out: &mut [u8]) -> Result<(), OutOfRange> {
        let offset = self.range(gpa, out.len() as u64)?;
        if !out.is_empty() {
            self.read_offset(offset, out);
        }
        Ok(())
    }

    /// For loaders, devices and tools: decoded code on the pages becomes stale.
    pub fn write(&self, gpa: u64, data: &[u8]) -> Result<(), OutOfRange> {
        let offset = self.range(gpa, data.len() as u64)?;
        if !data.is_empty() {
            self.write_offset(offset, data);
            self.code_changed(offset, data.len() as u64);
        }
        Ok(())
    }

    /// Tells that bytes were stored: code on these pages gets a new generation. True if any page holds code.
    pub fn code_changed(&self, offset: u64, len: u64) -> bool {
        // A decoder marks the page (a locked access), then reads it; this stored to it, then looks at the mark. Without
        // a fence the store may come after both, and neither would know of the other (SDM 3, "Stores Followed by Loads").
        fence(Ordering::SeqCst);
        let mut any = false;
        for page in offset / PAGE_SIZE..=(offset + len - 1) / PAGE_SIZE {
            if self.pages[page as usize].load(Ordering::Acquire) & CODE != 0 {
                self.generations[page as usize].fetch_add(1, Ordering::AcqRel);
                any = true;
            }
        }
        any
    }

    /// A processor is about to get a fast-write TLB entry for the page at `offset`; false: it holds code.
    pub fn map_for_write(&self, offset: u64) -> bool {
        self.pages[(offset / PAGE_SIZE) as usize].fetch_or(WRITE_MAPPED, Ordering::AcqRel) & CODE == 0
    }

    /// The page is about to be decoded. True: others may hold fast-write TLB entries for it, which have to be
    /// revoked (all processors stopped, their entries flushed) before its bytes are read.
    pub fn mark_code(&self, offset: u64) -> bool {
        let old = self.pages[(offset / PAGE_SIZE) as usize].fetch_or(CODE, Ordering::AcqRel);
        old & CODE == 0 && old & WRITE_MAPPED != 0
    }

    /// Moves on whenever fast-write TLB entries have to go; each processor compares it when it starts to run.
    pub fn write_epoch(&self) -> u64 {
        self.write_epoch.load(Ordering::Acquire)
    }

    pub fn revoke_fast_writes(&self) {
        self.write_epoch.fetch_add(1, Ordering::AcqRel);
    }

    #[inline(always)]
    pub fn generation(&self, page: u32) -> u32 {
        self.generations[page as usize].load(Ordering::Acquire)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_round_trip_unaligned_and_cas_tells_what_it_saw() {
        let ram = Ram::new(2 * PAGE_SIZE).unwrap();
        ram.store::<u64>(4093, 0x1122_3344_5566_7788);
        assert_eq!(ram.load::<u64>(4093), 0x1122_3344_5566_7788);
        assert_eq!(ram.load::<u8>(4094), 0x77);
        assert_eq!(ram.cas::<u32>(4093, 0x5566_7788, 1), Ok(0x5566_7788));
        assert_eq!(ram.cas::<u32>(4093, 0x5566_7788, 2), Err(1));
        ram.store::<u128>(32, u128::MAX - 5);
        assert_eq!(ram.cas::<u128>(32, u128::MAX - 5, 7 << 64 | 3), Ok(u128::MAX - 5));
        assert_eq!(ram.load::<u128>(32), 7 << 64 | 3);
        assert_eq!(ram.cas::<u128>(32, 0, 1), Err(7 << 64 | 3));
    }

    #[test]
    fn ranges_end_with_ram_and_stop_at_the_hole() {
        let ram = Ram::new(LOW_END_GPA + PAGE_SIZE).unwrap();
        assert!(ram.write(LOW_END_GPA - 1, &[1]).is_ok());
        assert!(ram.write(LOW_END_GPA - 1, &[1, 2]).is_err());
        assert!(ram.write(HIGH_GPA + PAGE_SIZE - 1, &[1]).is_ok());
        assert!(ram.write(HIGH_GPA + PAGE_SIZE - 1, &[1, 2]).is_err());
        assert!(ram.read(u64::MAX, &mut [0; 8]).is_err());
        assert!(ram.read(u64::MAX, &mut []).is_ok());
    }

    #[test]
    fn a_store_to_a_code_page_moves_its_generation_and_no_other() {
        let ram = Ram::new(3 * PAGE_SIZE).unwrap();
        assert!(ram.map_for_write(PAGE_SIZE));
        assert!(ram.mark_code(PAGE_SIZE), "a write mapping may exist");
        assert!(!ram.mark_code(PAGE_SIZE), "marked already");
        assert!(!ram.map_for_write(PAGE_SIZE));
        ram.write(PAGE_SIZE - 1, &[0; 2]).unwrap();
        assert_eq!((ram.generation(0), ram.generation(1), ram.generation(2)), (0, 1, 0));
    }
}
