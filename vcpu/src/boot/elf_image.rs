//! ELF32 and ELF64 kernels.

use elf::ElfBytes;
use elf::abi::{EM_386, EM_X86_64, PT_LOAD, PT_NOTE};
use elf::endian::LittleEndian;
use elf::note::{Note, NoteIterator};
use elf::segment::ProgramHeader;

use super::info::check_free;
use super::{BootError, GuestMemory, write, write_zeros};

/// The Xen ELF note that holds the 32-bit PVH entry point (XEN_ELFNOTE_PHYS32_ENTRY).
const NOTE_PHYS32_ENTRY: u64 = 18;
const NOTE_NAME: &[u8] = b"Xen\0";

pub(super) struct ElfImage<'a> {
    file: ElfBytes<'a, LittleEndian>,
    load: Vec<ProgramHeader>,
}

/// What was loaded.
pub(super) struct Loaded {
    /// The entry point, as a physical address.
    pub entry_gpa: u64,
    /// The end of the highest segment below 4 GiB.
    pub end_gpa: u64,
}

pub(super) fn is_elf(image: &[u8]) -> bool {
    image.starts_with(b"\x7fELF")
}

impl<'a> ElfImage<'a> {
    pub(super) fn parse(image: &'a [u8]) -> Result<Self, BootError> {
        let file = ElfBytes::<LittleEndian>::minimal_parse(image).map_err(|e| BootError::Elf(e.to_string()))?;
        if !matches!(file.ehdr.e_machine, EM_386 | EM_X86_64) {
            return Err(BootError::ElfMachine(file.ehdr.e_machine));
        }
        let headers = file.segments().into_iter().flat_map(|table| table.iter());
        // At most 65535, each of which lies in the file.
        let load: Vec<_> = headers.filter(|h| h.p_type == PT_LOAD && h.p_memsz != 0).collect();
        if load.is_empty() {
            return Err(BootError::ElfEmpty);
        }
        Ok(Self { file, load })
    }

    /// Copies the segments to their physical addresses and clears the rest of them.
    pub(super) fn load(&self, memory: &mut impl GuestMemory) -> Result<Loaded, BootError> {
        let mut end_gpa = 0;
        // Segments may overlap: without a bound a small file could ask for many gigabytes of writes.
        let mut left = memory.size();
        for (index, header) in self.load.iter().enumerate() {
            let (file_bytes, memory_bytes) = (header.p_filesz, header.p_memsz);
            left = match left.checked_sub(memory_bytes) {
                Some(left) if file_bytes <= memory_bytes => left,
                _ => return Err(BootError::ElfSegment { index, file_bytes, memory_bytes }),
            };
            let data = self.file.segment_data(header).map_err(|e| BootError::Elf(e.to_string()))?;
            check_free(header.p_paddr, memory_bytes)?;
            write(memory, "ELF segment", header.p_paddr, data)?;
            // In RAM: `write` checked it.
            let data_end = header.p_paddr + file_bytes;
            write_zeros(memory, "ELF segment", data_end, memory_bytes - file_bytes)?;
            let end = header.p_paddr + memory_bytes;
            if end <= 4 << 30 {
                end_gpa = end_gpa.max(end);
            }
        }
        Ok(Loaded { entry_gpa: self.entry_gpa()?, end_gpa })
    }

    /// The header has a virtual address; loaders run without paging.
    fn entry_gpa(&self) -> Result<u64, BootError> {
        let entry = self.file.ehdr.e_entry;
        let inside = |base: u64, h: &ProgramHeader| entry.checked_sub(base).filter(|offset| *offset < h.p_memsz);
        let by_virtual = self.load.iter().find_map(|h| Some(inside(h.p_vaddr, h)? + h.p_paddr));
        let by_physical = || self.load.iter().find_map(|h| Some(inside(h.p_paddr, h)? + h.p_paddr));
        by_virtual.or_else(by_physical).filter(|e| *e < 4 << 30).ok_or(BootError::Entry { entry })
    }

    /// Whether a segment has this physical address.
    pub(super) fn covers(&self, gpa: u64) -> bool {
        self.load.iter().any(|h| gpa.checked_sub(h.p_paddr).is_some_and(|offset| offset < h.p_memsz))
    }

    pub(super) fn pvh_entry(&self) -> Option<u64> {
        let headers = self.file.segments()?;
        headers.iter().filter(|h| h.p_type == PT_NOTE).find_map(|h| {
            let data = self.file.segment_data(&h).ok()?;
            // Notes are padded to 4 bytes; only an alignment of exactly 8 means 8.
            let align = if h.p_align == 8 { 8 } else { 4 };
            NoteIterator::new(LittleEndian, self.file.ehdr.class, align, data).find_map(|note| match note {
                Note::Unknown(n) if n.name == NOTE_NAME && n.n_type == NOTE_PHYS32_ENTRY => match *n.desc {
                    [a, b, c, d] => Some(u32::from_le_bytes([a, b, c, d]).into()),
                    [a, b, c, d, e, f, g, h] => Some(u64::from_le_bytes([a, b, c, d, e, f, g, h])),
                    _ => None,
                },
                _ => None,
            })
        })
    }
}
