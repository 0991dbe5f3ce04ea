//! What both engines do at creation and at a reset of the machine: fill RAM as the spec says.

use nested_vmx::cpu::BootState;
use nested_vmx::mem::Ram;
use rustix::fs::{FallocateFlags, fallocate};

use super::{BootError, Kernel, load_flat, load_kernel};
use crate::spec::Boot;

/// Loads what the spec boots; the state that the bootstrap processor starts in, or `None` if it starts from RESET.
pub fn load(boot: &Boot, ram: &Ram) -> Result<Option<BootState>, BootError> {
    let memory = &mut &*ram;
    match boot {
        Boot::None => Ok(None),
        Boot::Kernel { image, append, modules } => load_kernel(&Kernel { image, append, modules }, memory).map(Some),
        Boot::Flat { image, load_gpa, entry_gpa } => load_flat(image, *load_gpa, *entry_gpa, memory).map(Some),
    }
}

/// Makes all of RAM zero, as at creation, by giving its pages back to the host. No processor may run.
pub fn clear(ram: &Ram) -> std::io::Result<()> {
    fallocate(ram.fd(), FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, 0, ram.size())?;
    Ok(())
}
