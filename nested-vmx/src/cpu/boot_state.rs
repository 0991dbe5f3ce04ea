//! How a boot protocol starts a processor: what both engines load after RESET.

use serde::{Deserialize, Serialize};

use super::Cpu;
use super::seg::{Segment, TableRegister, reg};
use crate::arch::cr::{Cr0, Cr4};
use crate::arch::efer::Efer;
use crate::arch::segment::{AccessRights, system};
use crate::event::ActivityState;

/// CR0.PE and ET.
const CR0_PROTECTED: u64 = 0x11;
const CR0_REAL: u64 = 0x10;
/// Bit 1 of RFLAGS is always set.
const RFLAGS_CLEAR: u64 = 2;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BootState {
    /// In the order of their encoding: RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8 to R15.
    pub gprs: [u64; 16],
    pub rip: u64,
    pub rflags: u64,
    /// ES, CS, SS, DS, FS, GS, LDTR, TR.
    pub segments: [Segment; 8],
    pub gdtr: TableRegister,
    pub idtr: TableRegister,
    pub cr0: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub efer: u64,
    /// The local APIC as firmware leaves it ([`crate::apic::LocalApic::set_virtual_wire`]).
    pub virtual_wire: bool,
}

impl BootState {
    /// Real mode with caches on, at CS:0 + `ip`.
    pub fn real_mode(code_selector: u16, ip: u16) -> Self {
        let mut segments = std::array::from_fn(|i| Segment::real(0, i == usize::from(reg::CS)));
        segments[usize::from(reg::CS)] = Segment::real(code_selector, true);
        segments[usize::from(reg::LDTR)] = system_segment(system::LDT, 0xffff);
        segments[usize::from(reg::TR)] = system_segment(system::TSS_BUSY, 0xffff);
        Self {
            gprs: [0; 16],
            rip: ip.into(),
            rflags: RFLAGS_CLEAR,
            segments,
            gdtr: TableRegister { base: 0, limit: 0xffff },
            idtr: TableRegister { base: 0, limit: 0x3ff },
            cr0: CR0_REAL,
            cr3: 0,
            cr4: 0,
            efer: 0,
            virtual_wire: true,
        }
    }

    /// 32-bit protected mode without paging, flat segments, interrupts off: how multiboot1 and PVH start. `gdtr`
    /// names a table that has these segments at 0x08 and 0x10.
    pub fn flat_protected_mode(entry_gpa: u32, gdtr: TableRegister) -> Self {
        let flat = |selector, kind| Segment {
            selector,
            base: 0,
            limit: 0xffff_ffff,
            ar: AccessRights::new().with_kind(kind).with_s(true).with_p(true).with_db(true).with_g(true),
        };
        let mut segments = [flat(0x10, 0x3); 8];
        segments[usize::from(reg::CS)] = flat(0x08, 0xb);
        segments[usize::from(reg::LDTR)] = system_segment(system::LDT, 0xffff);
        // PVH wants a 32-bit TSS at 0 with this limit.
        segments[usize::from(reg::TR)] = system_segment(system::TSS_BUSY, 0x67);
        Self {
            rip: entry_gpa.into(),
            segments,
            gdtr,
            idtr: TableRegister::default(),
            cr0: CR0_PROTECTED,
            ..Self::real_mode(0, 0)
        }
    }
}

impl Cpu {
    /// Starts a processor that RESET left as a boot protocol wants it.
    pub fn set_boot_state(&mut self, s: &BootState) {
        self.regs.set_general(&s.gprs);
        self.regs.set_rip(s.rip);
        self.flags.set_bits(s.rflags);
        self.seg = s.segments;
        self.gdtr = s.gdtr;
        self.idtr = s.idtr;
        (self.cr0, self.cr4, self.efer) = (Cr0::from_bits(s.cr0), Cr4::from_bits(s.cr4), Efer::from_bits(s.efer));
        self.cr3 = s.cr3;
        self.cpl = 0;
        self.activity = ActivityState::Active;
        if s.virtual_wire {
            self.apic.set_virtual_wire();
            self.bus.apic_changed(self.apic.identity());
        }
        self.tlb.flush();
        self.mode_changed();
    }
}

fn system_segment(kind: u8, limit: u32) -> Segment {
    Segment { selector: 0, base: 0, limit, ar: AccessRights::new().with_kind(kind).with_p(true) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_processor_runs_from_its_boot_state() {
        let mut rig = crate::testing::Rig::reset();
        let mut boot = BootState::flat_protected_mode(0x1000, TableRegister { base: 0x500, limit: 23 });
        boot.gprs[3] = 0x1234_5678;
        rig.cpu.set_boot_state(&boot);
        assert!(rig.cpu.apic_identity().software_enabled);
        // mov eax, ebx
        rig.ram.write(0x1000, &[0x89, 0xd8]).unwrap();
        rig.cpu.run(1);
        let r = rig.cpu.registers();
        assert_eq!((r.general[0], r.rip, r.cr0), (0x1234_5678, 0x1002, 0x11));
        assert_eq!((r.segments, r.gdtr), (boot.segments, boot.gdtr));
    }

    #[test]
    fn protected_mode_segments_are_flat_and_accessed() {
        let s = BootState::flat_protected_mode(0x10_0000, TableRegister::default());
        assert_eq!(u32::from(s.segments[1].ar), 0xc09b);
        assert_eq!(u32::from(s.segments[2].ar), 0xc093);
        assert_eq!((u32::from(s.segments[6].ar), u32::from(s.segments[7].ar)), (0x82, 0x8b));
    }
}
