//! A VM of KVM: memory slots, the in-kernel interrupt controllers, vCPUs, and events sent to them.

use std::os::fd::{AsRawFd, BorrowedFd, IntoRawFd};
use std::sync::Arc;

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, KVM_PIT_SPEAKER_DUMMY, kvm_irqchip, kvm_msi, kvm_pit_config, kvm_pit_state2,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use nested_vmx::cpu::BootState;
use nested_vmx::mem::Ram;

use super::boot;
use super::cpuid;
use super::failure::{KvmError, ioctl};
use super::kick::{self, Kicker};
use super::reset::ResetState;
use super::vcpu::KvmVcpu;
use crate::counters::VcpuCounters;

/// Pages that kvm_intel without unrestricted guest needs for itself, in the hole below 4 GiB.
const IDENTITY_MAP_GPA: u64 = 0xfeff_c000;
const TSS_GPA: usize = 0xfeff_d000;

/// xAPIC IDs are 8 bits in a KVM_SIGNAL_MSI address, and 0xff is the broadcast.
pub const MAX_CPUS: u32 = 255;

/// What is sent to a vCPU's local APIC from outside the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Message {
    Init,
    Sipi { vector: u8 },
    Nmi,
}

impl Message {
    /// The MSI data: delivery mode in bits 10:8, level assert in bit 14 (SDM 3, "Message Data Register Format").
    /// There is no de-assert (0x8500): kvm_pvm takes it for an INIT.
    fn msi_data(self) -> u32 {
        match self {
            Self::Init => 0x4500,
            Self::Sipi { vector } => 0x4600 | u32::from(vector),
            Self::Nmi => 0x400,
        }
    }
}

/// What KVM says about a message. What became of an accepted one it does not say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivery {
    Accepted,
    /// No local APIC took it: the target's is globally disabled (R22).
    NobodyTookIt,
}

struct ChipState {
    chips: Vec<kvm_irqchip>,
    pit: kvm_pit_state2,
}

/// What all threads share: ioctls on the VM never wait for a vCPU.
pub struct KvmVm {
    /// A descriptor of each vCPU that only a reset uses, and what it puts back.
    resets: Vec<(VcpuFd, ResetState)>,
    vm: VmFd,
    cpus: u32,
    chips: ChipState,
    // Behind `vm`: KVM maps it until the last descriptor of the VM is closed.
    ram: Arc<Ram>,
}

/// A new VM and its vCPUs, each to be moved to its thread.
pub struct Created {
    pub vm: Arc<KvmVm>,
    pub vcpus: Vec<KvmVcpu>,
    pub kickers: Vec<Arc<Kicker>>,
}

impl KvmVm {
    /// A VM with a vCPU for each of `counters`. The BSP (vCPU 0) is as `bsp` says, or at its reset vector; the APs are
    /// UNINITIALIZED. With `vmx` the guest has VMX, run by KVM.
    pub fn create(
        ram: Arc<Ram>,
        bsp: Option<&BootState>,
        vmx: bool,
        counters: Vec<Arc<VcpuCounters>>,
    ) -> Result<Created, KvmError> {
        let cpus = u32::try_from(counters.len()).unwrap_or(u32::MAX);
        let kvm = super::open().map_err(KvmError::Open)?;
        check_capabilities(&kvm)?;
        let limit = (kvm.get_max_vcpus() as u32).min(MAX_CPUS);
        if cpus == 0 || cpus > limit {
            return Err(KvmError::TooManyVcpus { asked: cpus, limit });
        }
        kick::install_handler().map_err(ioctl("installing the kick signal's handler"))?;
        let vm = create_vm(&kvm)?;
        vm.set_identity_map_address(IDENTITY_MAP_GPA).map_err(ioctl("KVM_SET_IDENTITY_MAP_ADDR"))?;
        vm.set_tss_address(TSS_GPA).map_err(ioctl("KVM_SET_TSS_ADDR"))?;
        vm.create_irq_chip().map_err(ioctl("KVM_CREATE_IRQCHIP"))?;
        let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
        vm.create_pit2(pit).map_err(ioctl("KVM_CREATE_PIT2"))?;
        for (slot, (gpa, size, offset)) in (0..).zip(ram.regions()) {
            let region = kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr: gpa,
                memory_size: size,
                userspace_addr: ram.host_address() as u64 + offset,
            };
            // SAFETY: the range is part of the RAM's mapping, which `KvmVm` keeps until after `vm` is closed; all
            // of nestd's own accesses to it are made for memory that changes underneath them.
            unsafe { vm.set_user_memory_region(region) }.map_err(ioctl("KVM_SET_USER_MEMORY_REGION"))?;
        }
        let supported = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(ioctl("KVM_GET_SUPPORTED_CPUID"))?;
        let tsc_deadline = kvm.check_extension(Cap::TscDeadlineTimer);
        let run_bytes = vm.run_size();

        let mut fds = Vec::new();
        let mut kickers = Vec::new();
        for apic_id in 0..cpus {
            let fd = vm.create_vcpu(u64::from(apic_id)).map_err(ioctl("KVM_CREATE_VCPU"))?;
            let entries = cpuid::for_vcpu(&supported, apic_id, cpus, tsc_deadline, vmx);
            let entries = CpuId::from_entries(&entries).map_err(|_| KvmError::Ioctl {
                what: "KVM_SET_CPUID2",
                source: std::io::Error::from_raw_os_error(libc::E2BIG),
            })?;
            fd.set_cpuid2(&entries).map_err(ioctl("KVM_SET_CPUID2"))?;
            kickers.push(Arc::new(Kicker::new(&fd, run_bytes).map_err(KvmError::Memory)?));
            fds.push(fd);
        }
        // Right after their creation no local APIC is in KVM's destination map and a first MSI goes to none.
        // Setting each one's state to what it is enters it.
        for fd in &fds {
            let lapic = fd.get_lapic().map_err(ioctl("KVM_GET_LAPIC"))?;
            fd.set_lapic(&lapic).map_err(ioctl("KVM_SET_LAPIC"))?;
        }
        let chips = ChipState { chips: read_chips(&vm)?, pit: vm.get_pit2().map_err(ioctl("KVM_GET_PIT2"))? };
        if let (Some(state), Some(fd)) = (bsp, fds.first()) {
            boot::load(fd, state)?;
        }
        let resets = fds
            .iter()
            .map(|fd| Ok((second_descriptor(&vm, fd)?, ResetState::capture(&kvm, fd, vmx)?)))
            .collect::<Result<Vec<_>, KvmError>>()?;
        let vm = Arc::new(Self { resets, vm, cpus, chips, ram });
        let vcpus = (0..).zip(fds).zip(kickers.iter().zip(counters)).map(|((index, fd), (kicker, counters))| {
            KvmVcpu::new(index, fd, vmx, Arc::clone(kicker), counters, Arc::clone(&vm))
        });
        let vcpus = vcpus.collect();
        Ok(Created { vm, vcpus, kickers })
    }

    pub fn ram(&self) -> &Arc<Ram> {
        &self.ram
    }

    /// Sends a message to one vCPU's local APIC; from any thread, never waits.
    pub fn send(&self, vcpu: u32, message: Message) -> Result<Delivery, KvmError> {
        if vcpu >= self.cpus {
            return Err(KvmError::NoSuchVcpu { index: vcpu, count: self.cpus });
        }
        let msi = kvm_msi { address_lo: 0xfee0_0000 | vcpu << 12, data: message.msi_data(), ..Default::default() };
        match self.vm.signal_msi(msi).map_err(ioctl("KVM_SIGNAL_MSI"))? {
            0 => Ok(Delivery::NobodyTookIt),
            _ => Ok(Delivery::Accepted),
        }
    }

    /// Sets the level of an interrupt line of the in-kernel PIC and I/O APIC.
    pub fn set_irq_line(&self, gsi: u32, active: bool) -> Result<(), KvmError> {
        self.vm.set_irq_line(gsi, active).map_err(ioctl("KVM_IRQ_LINE"))
    }

    /// Puts all vCPUs and interrupt controllers back to their state after creation. No vCPU may be in `KVM_RUN` or
    /// have an access open ([`KvmVcpu::stand`]) before this is over.
    pub fn reset(&self) -> Result<(), KvmError> {
        for (fd, state) in &self.resets {
            state.restore(fd)?;
        }
        for chip in &self.chips.chips {
            self.vm.set_irqchip(chip).map_err(ioctl("KVM_SET_IRQCHIP"))?;
        }
        self.vm.set_pit2(&self.chips.pit).map_err(ioctl("KVM_SET_PIT2"))
    }
}

fn second_descriptor(vm: &VmFd, vcpu: &VcpuFd) -> Result<VcpuFd, KvmError> {
    // SAFETY: `vcpu` keeps the descriptor open for the length of this call.
    let fd = unsafe { BorrowedFd::borrow_raw(vcpu.as_raw_fd()) };
    let second = fd.try_clone_to_owned().map_err(ioctl("duplicating a vCPU's descriptor"))?;
    // SAFETY: the descriptor is a vCPU's of this VM, and owned: it moves into the new `VcpuFd`.
    unsafe { vm.create_vcpu_from_rawfd(second.into_raw_fd()) }.map_err(ioctl("mapping a vCPU's kvm_run area"))
}

fn check_capabilities(kvm: &Kvm) -> Result<(), KvmError> {
    let needed = [
        (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
        (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
        (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
        (Cap::SignalMsi, "KVM_CAP_SIGNAL_MSI"),
        (Cap::MpState, "KVM_CAP_MP_STATE"),
        (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS"),
        (Cap::Pit2, "KVM_CAP_PIT2"),
        (Cap::InternalErrorData, "KVM_CAP_INTERNAL_ERROR_DATA"),
    ];
    match needed.into_iter().find(|&(cap, _)| !kvm.check_extension(cap)) {
        Some((_, name)) => Err(KvmError::MissingCapability { name }),
        None => Ok(()),
    }
}

/// KVM_CREATE_VM is interrupted by signals that have nothing to do with it.
fn create_vm(kvm: &Kvm) -> Result<VmFd, KvmError> {
    loop {
        match kvm.create_vm() {
            Err(e) if e.errno() == libc::EINTR => {}
            result => return result.map_err(ioctl("KVM_CREATE_VM")),
        }
    }
}

fn read_chips(vm: &VmFd) -> Result<Vec<kvm_irqchip>, KvmError> {
    use kvm_bindings::{KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE};
    [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC]
        .into_iter()
        .map(|chip_id| {
            let mut chip = kvm_irqchip { chip_id, ..Default::default() };
            vm.get_irqchip(&mut chip).map_err(ioctl("KVM_GET_IRQCHIP"))?;
            Ok(chip)
        })
        .collect()
}
