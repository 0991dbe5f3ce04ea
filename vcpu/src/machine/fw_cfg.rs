//! QEMU's firmware configuration as far as test suites ask it: a 16-bit selector at 0x510, the bytes of the selected
//! item one after the other at 0x511.

use serde::{Deserialize, Serialize};

use super::MachineConfig;

pub(super) const SELECTOR: u16 = 0x510;
pub(super) const DATA: u16 = 0x511;

const KEY_SIGNATURE: u16 = 0;
const KEY_RAM_SIZE: u16 = 3;
const KEY_CPUS: u16 = 5;
const KEY_MAX_CPUS: u16 = 0x0f;

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct FwCfg {
    key: u16,
    /// How many bytes of the item were read; beyond its end it stays there.
    offset: u8,
}

impl FwCfg {
    pub(super) fn select(&mut self, key: u16) {
        *self = Self { key, offset: 0 };
    }

    /// The item's next byte; 0 beyond its end, and of items that do not exist.
    pub(super) fn read(&mut self, config: &MachineConfig) -> u8 {
        let item: u64 = match self.key {
            KEY_SIGNATURE => u32::from_le_bytes(*b"QEMU").into(),
            KEY_RAM_SIZE => config.memory_bytes,
            KEY_CPUS | KEY_MAX_CPUS => config.cpus.min(u16::MAX.into()).into(),
            _ => 0,
        };
        let Some(&byte) = item.to_le_bytes().get(usize::from(self.offset)) else { return 0 };
        self.offset += 1;
        byte
    }
}
