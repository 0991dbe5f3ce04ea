//! Everything a processor is.

use super::block::BlockCache;
use super::deliver::Vectored;
use super::flags::Flags;
use super::fp::FpState;
use super::mmu::tlb::{Access, Tlb};
use super::mode::Mode;
use super::msr::Msrs;
use super::regs::Regs;
use super::seg::{Segment, TableRegister};
use crate::apic::LocalApic;
use crate::arch::apic::DEFAULT_BASE_GPA;
use crate::arch::cr::{Cr0, Cr4};
use crate::arch::efer::Efer;
use crate::bus::Bus;
use crate::event::{ActivityState, Detail, Event, VmxMode};
use crate::mailbox::Mailbox;
use crate::mem::Ram;
use crate::vmx::{ExitInfo, Vmx};
use std::sync::Arc;

#[derive(Clone, Debug)]
pub struct CpuConfig {
    pub apic_id: u32,
    /// The bootstrap processor starts at the reset vector, the others in wait-for-SIPI (R22).
    pub bsp: bool,
    /// Processors in the VM, for the topology that CPUID shows.
    pub count: u32,
    /// Where RDRAND's and RDSEED's generator starts.
    pub random_seed: u64,
}

/// Why instructions run one at a time, in [`Cpu::special`].
pub mod special {
    /// RFLAGS.TF, or RF to be cleared.
    pub const TRAP: u8 = 1 << 0;
    /// Blocking by STI or MOV SS ends with the next instruction.
    pub const SHADOW: u8 = 1 << 1;
    /// DR7 enables a breakpoint.
    pub const BREAKPOINTS: u8 = 1 << 2;
    /// The monitor trap flag.
    pub const MTF: u8 = 1 << 3;
}

/// Blocking of interrupts for one instruction, as the VMCS's interruptibility state encodes it.
pub mod shadow {
    pub const STI: u8 = 1 << 0;
    pub const MOV_SS: u8 = 1 << 1;
}

pub struct Cpu {
    // Hot: what nearly every operation touches.
    pub(crate) regs: Regs,
    pub(crate) flags: Flags,
    pub(crate) tlb: Tlb,
    /// Whose TLB entries explicit data accesses use now; kept by [`Cpu::mode_changed`].
    pub(crate) data_access: Access,
    /// End the block after the running operation although it returns Ok.
    pub(crate) stop_after: bool,
    /// [`super::op::Op::end`] of the operation that stopped a chain.
    pub(crate) stopped_end: u16,
    pub(crate) special: u8,
    pub(crate) mode: Mode,
    /// Instructions retired before the running block.
    pub(crate) retired: u64,
    pub(crate) ram: Arc<Ram>,
    pub(crate) mailbox: Arc<Mailbox>,

    pub(crate) seg: [Segment; 8],
    pub(crate) cpl: u8,
    pub(crate) gdtr: TableRegister,
    pub(crate) idtr: TableRegister,
    pub(crate) cr0: Cr0,
    pub(crate) cr2: u64,
    pub(crate) cr3: u64,
    pub(crate) cr4: Cr4,
    pub(crate) efer: Efer,
    pub(crate) xcr0: u64,
    pub(crate) fp: FpState,
    pub(crate) dr: [u64; 4],
    pub(crate) dr6: u64,
    pub(crate) dr7: u64,
    /// The PDPTEs of PAE paging, loaded with CR3 (SDM 3, "PDPTE Registers").
    pub(crate) pdpte: [u64; 4],
    /// The address of the page fault being raised; CR2 gets it on delivery only.
    pub(crate) fault_address: u64,

    pub(crate) activity: ActivityState,
    pub(crate) shadow: u8,
    /// The shadow that the running instruction leaves for the next one.
    pub(crate) new_shadow: u8,
    pub(crate) nmi_blocked: bool,
    /// The running IRET ended blocking by NMI: a VM exit that it causes says so (SDM 3, "NMI unblocking due to IRET").
    pub(crate) nmi_unblocked_by_iret: bool,
    /// Debug traps to take at the next boundary, as DR6 bits (SDM 3, "Pending debug exceptions").
    pub(crate) pending_debug: u64,
    /// The event whose delivery is under way.
    pub(crate) delivering: Option<Vectored>,

    pub(crate) msrs: Msrs,
    /// The state of RDRAND's and RDSEED's generator.
    pub(crate) random: u64,
    pub(crate) apic: LocalApic,
    /// The page of the xAPIC's registers; [`super::apic::NO_APIC_PAGE`] when the APIC has none.
    pub(crate) apic_page_gpa: u64,
    pub(crate) vmx_mode: VmxMode,
    /// The EPT pointer in force: in non-root operation, with EPT enabled.
    pub(crate) eptp: Option<u64>,
    pub(crate) vmx: Box<Vmx>,
    /// The VM exit being made, when a handler returns [`super::Stop::VM_EXIT`].
    pub(crate) exit: ExitInfo,

    pub(crate) config: CpuConfig,
    pub(crate) bus: Box<dyn Bus>,
    /// Taken out while it is run from; making an empty one costs microseconds.
    pub(crate) cache: Option<Box<BlockCache>>,
    /// The [`Ram::write_epoch`] that the TLB's write entries are from.
    pub(crate) write_epoch: u64,
    /// The bus asked to leave `run`.
    pub(crate) bus_stop: bool,
}

impl Cpu {
    /// A processor as RESET leaves it.
    pub fn new(config: CpuConfig, ram: Arc<Ram>, mailbox: Arc<Mailbox>, bus: Box<dyn Bus>) -> Self {
        let mut cpu = Self {
            regs: Regs::default(),
            flags: Flags::default(),
            tlb: Tlb::default(),
            data_access: Access::Supervisor,
            stop_after: false,
            stopped_end: 0,
            special: 0,
            mode: Mode::default(),
            retired: 0,
            ram,
            mailbox,
            seg: [Segment::default(); 8],
            cpl: 0,
            gdtr: TableRegister::default(),
            idtr: TableRegister::default(),
            cr0: Cr0::new(),
            cr2: 0,
            cr3: 0,
            cr4: Cr4::new(),
            efer: Efer::new(),
            xcr0: 1,
            fp: FpState::default(),
            dr: [0; 4],
            dr6: 0,
            dr7: 0,
            pdpte: [0; 4],
            fault_address: 0,
            activity: if config.bsp { ActivityState::Active } else { ActivityState::WaitForSipi },
            shadow: 0,
            new_shadow: 0,
            nmi_blocked: false,
            nmi_unblocked_by_iret: false,
            pending_debug: 0,
            delivering: None,
            msrs: Msrs::default(),
            random: config.random_seed,
            apic: LocalApic::new(config.apic_id, config.bsp),
            apic_page_gpa: DEFAULT_BASE_GPA,
            vmx_mode: VmxMode::Off,
            eptp: None,
            vmx: Box::default(),
            exit: ExitInfo::default(),
            config,
            bus,
            cache: Some(Box::default()),
            write_epoch: 0,
            bus_stop: false,
        };
        cpu.reset_registers();
        cpu.cr0 = Cr0::new().with_et(true).with_cd(true).with_nw(true);
        cpu.mode_changed();
        cpu
    }

    /// Instructions retired since creation, at the last boundary.
    pub fn retired(&self) -> u64 {
        self.retired
    }

    #[inline(always)]
    pub(crate) fn in_non_root(&self) -> bool {
        self.vmx_mode == VmxMode::NonRoot
    }

    pub(crate) fn report(&mut self, cause: u64, detail: Detail) {
        let event = Event { retired: self.retired, cause, mode: self.vmx_mode, detail };
        self.bus.event(event);
    }
}
