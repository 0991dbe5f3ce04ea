//! L2's memory, and what L1 puts there before L2 runs.

use core::ptr::copy_nonoverlapping;
use rt::boot::{INFO_COMMAND_LINE, Info};
use rt::{exit_code, fail};

/// L2's address 0.
pub const L2_BASE_HPA: u64 = 16 << 20;
pub const L2_SIZE: u64 = 16 << 20;

/// Where a parked processor of L2 waits for INIT.
pub const PARK_GPA: u64 = 0x6000;
pub const INFO_GPA: u64 = 0x7000;
const COMMAND_LINE_GPA: u64 = 0x7800;
const COMMAND_LINE_MAX: usize = 0x7ff;

/// A page of memory that hardware reads: VMX regions, bitmaps, page tables.
#[repr(C, align(4096))]
pub struct Page(core::cell::UnsafeCell<[u64; 512]>);

// SAFETY: each page is written by one processor, before any processor's VM entry that uses it.
unsafe impl Sync for Page {}

impl Page {
    pub const fn zero() -> Self {
        Page(core::cell::UnsafeCell::new([0; 512]))
    }

    /// Identity-mapped: virtual is physical.
    pub fn hpa(&self) -> u64 {
        self.0.get() as u64
    }

    pub fn set(&self, index: usize, value: u64) {
        // SAFETY: one writer (above), inside the page.
        unsafe { self.0.get().cast::<u64>().add(index & 511).write_volatile(value) }
    }

    pub fn fill(&self, value: u64) {
        (0..512).for_each(|index| self.set(index, value));
    }

    /// Clears one bit of a bitmap.
    pub fn clear_bit(&self, bit: usize) {
        // SAFETY: as for `set`.
        let word = unsafe { self.0.get().cast::<u64>().add((bit / 64) & 511).read_volatile() };
        self.set(bit / 64, word & !(1 << (bit % 64)));
    }
}

fn l2_memory(gpa: u64) -> *mut u8 {
    (L2_BASE_HPA + gpa) as *mut u8
}

/// Copies a multiboot1 image to where its header wants it, as its loader, and returns its entry point.
pub fn load_l2(image: &'static [u8], command_line: &[u8]) -> u64 {
    let start_hpa = image.as_ptr() as u64;
    if start_hpa < L2_BASE_HPA + L2_SIZE && start_hpa + image.len() as u64 > L2_BASE_HPA {
        fail!(exit_code::UNSUPPORTED, "the module lies in L2's memory");
    }
    let Some(entry_gpa) = copy_image(image) else {
        fail!(exit_code::UNSUPPORTED, "the module is no multiboot image with load addresses below 16 MiB")
    };

    let hlt_forever = [0xf4, 0xeb, 0xfd];
    // SAFETY: L2's memory is nobody's yet, and these addresses are inside it.
    unsafe { copy_nonoverlapping(hlt_forever.as_ptr(), l2_memory(PARK_GPA), hlt_forever.len()) };

    let length = command_line.len().min(COMMAND_LINE_MAX);
    let info = Info {
        flags: INFO_COMMAND_LINE,
        memory_kib: [0; 2],
        boot_device: 0,
        command_line_gpa: COMMAND_LINE_GPA as u32,
        module_count: 0,
        modules_gpa: 0,
    };
    // SAFETY: as above.
    unsafe {
        l2_memory(INFO_GPA).cast::<Info>().write(info);
        copy_nonoverlapping(command_line.as_ptr(), l2_memory(COMMAND_LINE_GPA), length);
        l2_memory(COMMAND_LINE_GPA + length as u64).write(0);
    }
    entry_gpa
}

/// By the address fields of the multiboot header (Multiboot 0.6.96, 3.1.3).
fn copy_image(image: &[u8]) -> Option<u64> {
    const MAGIC: u32 = 0x1bad_b002;
    const FLAG_ADDRESSES: u32 = 1 << 16;

    let word = |offset: usize| Some(u32::from_le_bytes(image.get(offset..)?.first_chunk().copied()?));
    let header = (0..8192).step_by(4).find(|offset| {
        word(*offset) == Some(MAGIC)
            && matches!((word(offset + 4), word(offset + 8)), (Some(flags), Some(sum))
                if flags & FLAG_ADDRESSES != 0 && MAGIC.wrapping_add(flags).wrapping_add(sum) == 0)
    })?;
    let [header_gpa, load_gpa, load_end_gpa, bss_end_gpa, entry_gpa] =
        [word(header + 12)?, word(header + 16)?, word(header + 20)?, word(header + 24)?, word(header + 28)?];

    let offset = header.checked_sub(header_gpa.checked_sub(load_gpa)? as usize)?;
    let bytes = image.get(offset..)?.get(..load_end_gpa.checked_sub(load_gpa)? as usize)?;
    let bss = bss_end_gpa.checked_sub(load_end_gpa)? as usize;
    if u64::from(bss_end_gpa) > L2_SIZE {
        return None;
    }
    // SAFETY: the image ends inside L2's memory, which is nobody's yet and does not overlap the module.
    unsafe {
        copy_nonoverlapping(bytes.as_ptr(), l2_memory(load_gpa.into()), bytes.len());
        l2_memory(load_end_gpa.into()).write_bytes(0, bss);
    }
    Some(entry_gpa.into())
}
