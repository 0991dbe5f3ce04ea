//! What loaders leave in memory for a kernel: its tables and strings, a memory map, the modules.

use nested_vmx::cpu::seg::TableRegister;

use super::{BootError, GuestMemory, check_ram, write};
use crate::machine::LOW_RAM_END_GPA;

/// The tables lie in low memory, as GRUB's do: kernels take what follows them for free, and use the first 64 KiB for
/// the start of their other processors.
const INFO_GPA: u64 = 0x8_0000;
const INFO_END_GPA: u64 = LOW_END_GPA;
/// Where the extended BIOS data area would start.
const LOW_END_GPA: u64 = 0x9_fc00;
const BIOS_GPA: u64 = 0xf_0000;
const HIGH_GPA: u64 = 1 << 20;
/// I/O APIC, local APICs, and the reset vector.
const CHIPSET_GPA: u64 = 0xfec0_0000;
const PAGE: u64 = 4096;

/// Null, flat 32-bit code, flat data.
const GDT: [u64; 3] = [0, 0x00cf_9b00_0000_ffff, 0x00cf_9300_0000_ffff];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct MemoryRange {
    pub gpa: u64,
    pub len: u64,
    /// As E820 has it: 1 is RAM, 2 is reserved.
    pub kind: u32,
}

pub(super) const RAM: u32 = 1;
pub(super) const RESERVED: u32 = 2;

pub(super) fn memory_map(memory_bytes: u64) -> Vec<MemoryRange> {
    let range = |gpa: u64, end: u64, kind| MemoryRange { gpa, len: end.saturating_sub(gpa), kind };
    let low_end = memory_bytes.min(LOW_RAM_END_GPA);
    let high = memory_bytes - low_end;
    let map = [
        range(0, LOW_END_GPA, RAM),
        range(LOW_END_GPA, 0xa_0000, RESERVED),
        range(BIOS_GPA, HIGH_GPA, RESERVED),
        range(HIGH_GPA, low_end, RAM),
        range(CHIPSET_GPA, 4 << 30, RESERVED),
        range(4 << 30, (4 << 30) + high, RAM),
    ];
    map.into_iter().filter(|r| r.len != 0).collect()
}

/// KiB of memory below 640 KiB and above 1 MiB, as the BIOS counts.
pub(super) fn bios_memory_kib(memory_bytes: u64) -> (u32, u32) {
    let upper = memory_bytes.min(LOW_RAM_END_GPA).saturating_sub(HIGH_GPA) >> 10;
    ((LOW_END_GPA >> 10) as u32, upper as u32)
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Module {
    pub gpa: u32,
    pub end_gpa: u32,
}

/// A kernel may not lie where its loader's tables will be.
pub(super) fn check_free(gpa: u64, len: u64) -> Result<(), BootError> {
    let overlaps = gpa < INFO_END_GPA && gpa.saturating_add(len) > INFO_GPA;
    if overlaps { Err(BootError::OverlapsInfo { gpa, start_gpa: INFO_GPA, end_gpa: INFO_END_GPA }) } else { Ok(()) }
}

/// Puts the modules behind the kernel, each at a page boundary.
pub(super) fn load_modules(
    modules: &[(Vec<u8>, String)],
    kernel_end_gpa: u64,
    memory: &mut impl GuestMemory,
) -> Result<Vec<Module>, BootError> {
    let limit_gpa = memory.size().min(LOW_RAM_END_GPA);
    let mut next = kernel_end_gpa.max(HIGH_GPA);
    let mut loaded = Vec::with_capacity(modules.len());
    for (bytes, _) in modules {
        let len = bytes.len() as u64;
        let gpa = next.next_multiple_of(PAGE);
        next = gpa.saturating_add(len);
        if next > limit_gpa {
            return Err(BootError::NoRoomForModules { bytes: len, limit_gpa });
        }
        write(memory, "module", gpa, bytes)?;
        loaded.push(Module { gpa: gpa as u32, end_gpa: next as u32 });
    }
    Ok(loaded)
}

/// Collects the tables; they are written all at once when all of them fit.
pub(super) struct Info {
    bytes: Vec<u8>,
}

impl Info {
    /// Starts with the GDT that the boot state's segments are from.
    pub(super) fn new() -> Self {
        Self { bytes: GDT.iter().flat_map(|d| d.to_le_bytes()).collect() }
    }

    pub(super) fn gdtr() -> TableRegister {
        TableRegister { base: INFO_GPA, limit: size_of_val(&GDT) as u16 - 1 }
    }

    /// The address at which `bytes` will lie, a multiple of 8.
    pub(super) fn put(&mut self, bytes: &[u8]) -> Result<u32, BootError> {
        let at = self.bytes.len().next_multiple_of(8);
        let limit = (INFO_END_GPA - INFO_GPA) as usize;
        let end = at.saturating_add(bytes.len());
        if end > limit {
            return Err(BootError::TooMuchInfo { bytes: end, limit });
        }
        self.bytes.resize(at, 0);
        self.bytes.extend(bytes);
        Ok(INFO_GPA as u32 + at as u32)
    }

    pub(super) fn put_string(&mut self, text: &str) -> Result<u32, BootError> {
        if text.bytes().any(|b| b == 0) {
            return Err(BootError::Nul);
        }
        self.put(&[text.as_bytes(), &[0]].concat())
    }

    pub(super) fn put_words(&mut self, words: &[u32]) -> Result<u32, BootError> {
        self.put(&words.iter().flat_map(|w| w.to_le_bytes()).collect::<Vec<_>>())
    }

    pub(super) fn write(&self, memory: &mut impl GuestMemory) -> Result<(), BootError> {
        check_ram(memory.size(), "boot information", INFO_GPA, INFO_END_GPA - INFO_GPA)?;
        write(memory, "boot information", INFO_GPA, &self.bytes)
    }
}
