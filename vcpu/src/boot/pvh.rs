//! PVH: the x86/HVM direct boot ABI, with hvm_start_info version 1.

use nested_vmx::cpu::BootState;

use super::elf_image::ElfImage;
use super::info::{Info, load_modules, memory_map};
use super::{BootError, GuestMemory, Kernel};

const START_INFO_MAGIC: u32 = 0x336e_c578;
const VERSION: u32 = 1;
const RBX: usize = 3;

pub(super) fn load(kernel: &Kernel<'_>, memory: &mut impl GuestMemory) -> Result<BootState, BootError> {
    let image = ElfImage::parse(kernel.image)?;
    let entry = image.pvh_entry().ok_or(BootError::ElfWithoutProtocol)?;
    let entry_gpa =
        u32::try_from(entry).ok().filter(|e| image.covers((*e).into())).ok_or(BootError::Entry { entry })?;
    let end_gpa = image.load(memory)?.end_gpa;

    let mut info = Info::new();
    let mut modules = Vec::new();
    for (module, (bytes, line)) in load_modules(kernel.modules, end_gpa, memory)?.iter().zip(kernel.modules) {
        let line_gpa = info.put_string(line)?;
        for field in [u64::from(module.gpa), bytes.len() as u64, line_gpa.into(), 0] {
            modules.extend(field.to_le_bytes());
        }
    }
    let modules_gpa = info.put(&modules)?;
    let command_line_gpa = info.put_string(kernel.append)?;
    let map = memory_map(memory.size());
    let mut map_bytes = Vec::new();
    for range in &map {
        map_bytes.extend(range.gpa.to_le_bytes());
        map_bytes.extend(range.len.to_le_bytes());
        map_bytes.extend(range.kind.to_le_bytes());
        map_bytes.extend([0; 4]);
    }
    let map_gpa = info.put(&map_bytes)?;

    let mut start_info = Vec::new();
    for word in [START_INFO_MAGIC, VERSION, 0, kernel.modules.len() as u32] {
        start_info.extend(word.to_le_bytes());
    }
    // No ACPI tables: the address of the RSDP is 0.
    for gpa in [u64::from(modules_gpa), command_line_gpa.into(), 0, map_gpa.into()] {
        start_info.extend(gpa.to_le_bytes());
    }
    for word in [map.len() as u32, 0] {
        start_info.extend(word.to_le_bytes());
    }
    let start_info_gpa = info.put(&start_info)?;
    info.write(memory)?;

    let mut state = BootState::flat_protected_mode(entry_gpa, Info::gdtr());
    state.gprs[RBX] = start_info_gpa.into();
    Ok(state)
}
