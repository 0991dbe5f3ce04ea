//! Boot protocols: multiboot1, PVH, and flat images.
//!
//! Images come from clients: whatever is in one, the answer is a state to start from or a [`BootError`].

mod elf_image;
mod info;
mod load;
mod multiboot;
mod pvh;

#[cfg(test)]
mod tests;

use nested_vmx::cpu::BootState;
use nested_vmx::mem::Ram;

pub use load::{clear, load};

use crate::machine::LOW_RAM_END_GPA;

/// Guest memory as boot protocols need it.
pub trait GuestMemory {
    /// RAM is `[0, 3 GiB)`, and the rest of it from 4 GiB up.
    fn size(&self) -> u64;
    fn write(&mut self, gpa: u64, bytes: &[u8]) -> Result<(), OutsideRam>;
}

/// A write that is not all RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{len} bytes at {gpa:#x} are not all RAM")]
pub struct OutsideRam {
    pub gpa: u64,
    pub len: u64,
}

impl GuestMemory for &Ram {
    fn size(&self) -> u64 {
        Ram::size(self)
    }
    fn write(&mut self, gpa: u64, bytes: &[u8]) -> Result<(), OutsideRam> {
        Ram::write(self, gpa, bytes).map_err(|_| OutsideRam { gpa, len: bytes.len() as u64 })
    }
}

/// A kernel with what its loader passes on.
#[derive(Clone, Copy, Debug)]
pub struct Kernel<'a> {
    pub image: &'a [u8],
    pub append: &'a str,
    /// Contents and command line of each.
    pub modules: &'a [(Vec<u8>, String)],
}

/// Why an image does not boot.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BootError {
    #[error(
        "the image has neither a multiboot1 header in its first 8 KiB nor an ELF note for PVH entry; \
         a flat image needs a load address"
    )]
    UnknownProtocol,
    #[error(
        "the ELF image has neither a multiboot1 header nor a note for PVH entry (Linux: CONFIG_PVH); \
         the bare 64-bit entry of vmlinux is not supported"
    )]
    ElfWithoutProtocol,
    #[error("ELF: {0}")]
    Elf(String),
    #[error("ELF: the machine type is {0}, not x86 (3) or x86-64 (62)")]
    ElfMachine(u16),
    #[error("ELF: no segment to load")]
    ElfEmpty,
    #[error("ELF: {file_bytes} bytes of segment {index} do not fit into its {memory_bytes} bytes of memory")]
    ElfSegment { index: usize, file_bytes: u64, memory_bytes: u64 },
    #[error("multiboot: the kernel requires features that are not there (flags {flags:#x}, of which {unknown:#x})")]
    MultibootFlags { flags: u32, unknown: u32 },
    #[error("multiboot: the header's address fields contradict each other or the file: {what}")]
    MultibootAddresses { what: &'static str },
    #[error("the entry point {entry:#x} lies outside the kernel or above 4 GiB")]
    Entry { entry: u64 },
    #[error("{what}: {source}")]
    Memory { what: &'static str, source: OutsideRam },
    #[error("modules: no room for {bytes} bytes below {limit_gpa:#x}")]
    NoRoomForModules { bytes: u64, limit_gpa: u64 },
    #[error("the kernel's part at {gpa:#x} overlaps {start_gpa:#x} to {end_gpa:#x}, where the loader's tables lie")]
    OverlapsInfo { gpa: u64, start_gpa: u64, end_gpa: u64 },
    #[error("command lines and module list: {bytes} bytes, at most {limit} fit")]
    TooMuchInfo { bytes: usize, limit: usize },
    #[error("a command line contains a NUL byte")]
    Nul,
    #[error("entry address {entry_gpa:#x} of the flat image must lie below 1 MiB, where real mode reaches")]
    FlatEntry { entry_gpa: u64 },
}

/// Loads a kernel by the protocol that its headers name.
pub fn load_kernel(kernel: &Kernel<'_>, memory: &mut impl GuestMemory) -> Result<BootState, BootError> {
    if let Some(header) = multiboot::find_header(kernel.image) {
        return multiboot::load(kernel, &header, memory);
    }
    if !elf_image::is_elf(kernel.image) {
        return Err(BootError::UnknownProtocol);
    }
    pvh::load(kernel, memory)
}

/// Loads a flat image, to be started in real mode at `entry_gpa`: CS:IP is 0:entry in the first 64 KiB, as boot
/// sectors expect, and above them the segment that starts at the 64 KiB boundary before it.
pub fn load_flat(
    image: &[u8],
    load_gpa: u64,
    entry_gpa: Option<u64>,
    memory: &mut impl GuestMemory,
) -> Result<BootState, BootError> {
    let entry_gpa = entry_gpa.unwrap_or(load_gpa);
    if entry_gpa >= 1 << 20 {
        return Err(BootError::FlatEntry { entry_gpa });
    }
    write(memory, "flat image", load_gpa, image)?;
    Ok(BootState::real_mode((entry_gpa >> 4 & 0xf000) as u16, entry_gpa as u16))
}

fn write(memory: &mut impl GuestMemory, what: &'static str, gpa: u64, bytes: &[u8]) -> Result<(), BootError> {
    check_ram(memory.size(), what, gpa, bytes.len() as u64)?;
    memory.write(gpa, bytes).map_err(|source| BootError::Memory { what, source })
}

fn write_zeros(memory: &mut impl GuestMemory, what: &'static str, gpa: u64, len: u64) -> Result<(), BootError> {
    const ZEROS: [u8; 4096] = [0; 4096];
    // Checked as a whole first, so that the loop is bounded by the size of RAM.
    check_ram(memory.size(), what, gpa, len)?;
    for done in (0..len).step_by(ZEROS.len()) {
        let chunk = (len - done).min(ZEROS.len() as u64) as usize;
        write(memory, what, gpa + done, &ZEROS[..chunk])?;
    }
    Ok(())
}

fn check_ram(size: u64, what: &'static str, gpa: u64, len: u64) -> Result<(), BootError> {
    let high_end = (4u64 << 30).saturating_add(size.saturating_sub(LOW_RAM_END_GPA));
    let inside = match gpa.checked_add(len) {
        Some(end) if gpa < 4 << 30 => end <= size.min(LOW_RAM_END_GPA),
        Some(end) => end <= high_end,
        None => false,
    };
    if inside { Ok(()) } else { Err(BootError::Memory { what, source: OutsideRam { gpa, len } }) }
}
