//! Multiboot 0.6.96.

use nested_vmx::cpu::BootState;

use super::elf_image::ElfImage;
use super::info::{Info, bios_memory_kib, check_free, load_modules, memory_map};
use super::{BootError, GuestMemory, Kernel, write, write_zeros};

const HEADER_MAGIC: u32 = 0x1bad_b002;
const LOADER_MAGIC: u64 = 0x2bad_b002;
/// The header lies in the first 8 KiB, 4-byte aligned.
const SEARCH_BYTES: usize = 8192;

/// Modules page-aligned, memory information wanted, and the video mode table: a loader may lack a display.
const KNOWN_REQUIREMENTS: u32 = 0b111;
const REQUIREMENTS: u32 = 0xffff;
const ADDRESSES: u32 = 1 << 16;

const INFO_MEMORY: u32 = 1 << 0;
const INFO_COMMAND_LINE: u32 = 1 << 2;
const INFO_MODULES: u32 = 1 << 3;
const INFO_MEMORY_MAP: u32 = 1 << 6;
const INFO_LOADER_NAME: u32 = 1 << 9;

const RBX: usize = 3;

pub(super) struct Header {
    /// In the file.
    offset: usize,
    flags: u32,
    /// header, load, load end, bss end, entry; with [`ADDRESSES`].
    addresses: [u32; 5],
}

pub(super) fn find_header(image: &[u8]) -> Option<Header> {
    let word = |at: usize| Some(u32::from_le_bytes(*image.get(at..)?.first_chunk()?));
    (0..SEARCH_BYTES.min(image.len())).step_by(4).find_map(|offset| {
        let (magic, flags, sum) = (word(offset)?, word(offset + 4)?, word(offset + 8)?);
        if magic != HEADER_MAGIC || magic.wrapping_add(flags).wrapping_add(sum) != 0 || offset + 12 > SEARCH_BYTES {
            return None;
        }
        let mut addresses = [0; 5];
        if flags & ADDRESSES != 0 {
            for (i, address) in addresses.iter_mut().enumerate() {
                *address = word(offset + 12 + 4 * i)?;
            }
        }
        Some(Header { offset, flags, addresses })
    })
}

pub(super) fn load(
    kernel: &Kernel<'_>,
    header: &Header,
    memory: &mut impl GuestMemory,
) -> Result<BootState, BootError> {
    let unknown = header.flags & REQUIREMENTS & !KNOWN_REQUIREMENTS;
    if unknown != 0 {
        return Err(BootError::MultibootFlags { flags: header.flags, unknown });
    }
    let (entry_gpa, end_gpa) = if header.flags & ADDRESSES != 0 {
        load_by_addresses(kernel.image, header, memory)?
    } else {
        let loaded = ElfImage::parse(kernel.image)?.load(memory)?;
        (loaded.entry_gpa as u32, loaded.end_gpa)
    };

    let mut info = Info::new();
    let mut modules = Vec::new();
    for (module, (_, line)) in load_modules(kernel.modules, end_gpa, memory)?.iter().zip(kernel.modules) {
        modules.extend([module.gpa, module.end_gpa, info.put_string(line)?, 0]);
    }
    let modules_gpa = info.put_words(&modules)?;
    // The first word is the kernel's name: kernels skip it.
    let command_line_gpa = info.put_string(format!("kernel {}", kernel.append).trim_end())?;
    let loader_name_gpa = info.put_string("nestd")?;
    let map = map_bytes(memory.size());
    let map_gpa = info.put(&map)?;
    let (lower_kib, upper_kib) = bios_memory_kib(memory.size());
    let mut fields = [0u32; 29];
    fields[0] = INFO_MEMORY | INFO_COMMAND_LINE | INFO_MODULES | INFO_MEMORY_MAP | INFO_LOADER_NAME;
    fields[1] = lower_kib;
    fields[2] = upper_kib;
    fields[4] = command_line_gpa;
    fields[5] = kernel.modules.len() as u32;
    fields[6] = modules_gpa;
    fields[11] = map.len() as u32;
    fields[12] = map_gpa;
    fields[16] = loader_name_gpa;
    let info_gpa = info.put_words(&fields)?;
    info.write(memory)?;

    let mut state = BootState::flat_protected_mode(entry_gpa, Info::gdtr());
    state.gprs[0] = LOADER_MAGIC;
    state.gprs[RBX] = info_gpa.into();
    Ok(state)
}

/// Loads by the header's address fields, which come before an ELF header's ("The address fields of Multiboot header");
/// returns the entry and the kernel's end.
fn load_by_addresses(image: &[u8], header: &Header, memory: &mut impl GuestMemory) -> Result<(u32, u64), BootError> {
    let wrong = |what| BootError::MultibootAddresses { what };
    let [header_gpa, load_gpa, load_end_gpa, bss_end_gpa, entry_gpa] = header.addresses;
    let before_header = header_gpa.checked_sub(load_gpa).ok_or(wrong("header_addr is below load_addr"))?;
    let start =
        header.offset.checked_sub(before_header as usize).ok_or(wrong("the image would start before the file"))?;
    // The header is in the file, so its start is too.
    let available = image.get(start..).unwrap_or_default();
    // 0: text and data are the whole file.
    let data = if load_end_gpa == 0 {
        available
    } else {
        let len = load_end_gpa.checked_sub(load_gpa).ok_or(wrong("load_end_addr is below load_addr"))?;
        available.get(..len as usize).ok_or(wrong("load_end_addr lies behind the end of the file"))?
    };
    let data_end = u64::from(load_gpa) + data.len() as u64;
    // 0: no bss.
    let end = if bss_end_gpa == 0 { data_end } else { bss_end_gpa.into() };
    let bss = end.checked_sub(data_end).ok_or(wrong("bss_end_addr lies inside the loaded data"))?;
    if !(u64::from(load_gpa)..data_end).contains(&entry_gpa.into()) {
        return Err(BootError::Entry { entry: entry_gpa.into() });
    }
    check_free(load_gpa.into(), end - u64::from(load_gpa))?;
    write(memory, "kernel", load_gpa.into(), data)?;
    write_zeros(memory, "kernel's bss", data_end, bss)?;
    Ok((entry_gpa, end))
}

/// Entries of 20 bytes, each preceded by that size.
fn map_bytes(memory_bytes: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    for range in memory_map(memory_bytes) {
        bytes.extend(20u32.to_le_bytes());
        bytes.extend(range.gpa.to_le_bytes());
        bytes.extend(range.len.to_le_bytes());
        bytes.extend(range.kind.to_le_bytes());
    }
    bytes
}
