//! The flags that describe a machine, shared by `run` and `vm create`.

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use nestd::units::ByteSize;
use nestd_proto::v1;

use crate::error::Failure;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum NestedArg {
    /// No VMX in the guest; runs on the host's KVM.
    None,
    /// The host's kernel runs VMX: needs kvm_intel with nested=1.
    Kernel,
    /// nestd's own processor: needs nothing of the host.
    Emulated,
    /// kernel where the host nests, else emulated.
    #[default]
    Auto,
}

impl From<NestedArg> for v1::Nested {
    fn from(arg: NestedArg) -> Self {
        match arg {
            NestedArg::None => Self::None,
            NestedArg::Kernel => Self::Kernel,
            NestedArg::Emulated => Self::Emulated,
            NestedArg::Auto => Self::Auto,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ClockArg {
    /// Guest time follows retired instructions.
    Virtual,
    /// Guest time follows the host's clock.
    Realtime,
}

#[derive(Clone, Debug, Args)]
pub struct MachineArgs {
    /// Kernel: multiboot1, or ELF64 with a PVH entry. With --flat, any image.
    #[arg(long, value_name = "FILE", help_heading = "Boot")]
    pub kernel: Option<PathBuf>,
    /// Command line of the kernel.
    #[arg(long, value_name = "TEXT", help_heading = "Boot", requires = "kernel", conflicts_with = "flat")]
    pub append: Option<String>,
    /// Initial RAM disk: the first module of a multiboot kernel.
    #[arg(long, value_name = "FILE", help_heading = "Boot", requires = "kernel", conflicts_with = "flat")]
    pub initrd: Option<PathBuf>,
    /// A further multiboot module; may be given again.
    #[arg(long, value_name = "FILE", help_heading = "Boot", requires = "kernel", conflicts_with = "flat")]
    pub module: Vec<PathBuf>,
    /// Copy the kernel to this address as it is, and start it in real mode.
    #[arg(long, value_name = "LOAD_ADDR", help_heading = "Boot", value_parser = parse_address, requires = "kernel")]
    pub flat: Option<u64>,
    /// Where a flat image starts, if not at its beginning.
    #[arg(long, value_name = "ADDR", help_heading = "Boot", value_parser = parse_address, requires = "flat")]
    pub entry: Option<u64>,

    /// Number of vCPUs.
    #[arg(long, value_name = "N", default_value_t = 1, help_heading = "Machine")]
    pub cpus: u32,
    /// Guest memory: a number with K, M or G.
    #[arg(long, value_name = "SIZE", default_value = "512M", help_heading = "Machine")]
    pub memory: ByteSize,
    /// Who runs VMX instructions for the guest.
    #[arg(long, value_enum, value_name = "MODE", default_value_t, help_heading = "Machine")]
    pub nested: NestedArg,
    /// What the guest's time follows. Left out: virtual on the emulated processor, realtime on KVM.
    #[arg(long, value_enum, value_name = "CLOCK", help_heading = "Machine")]
    pub clock: Option<ClockArg>,
    /// Replay: one vCPU at a time in an order that this seed decides. Emulated processor only.
    #[arg(long, value_name = "SEED", help_heading = "Machine")]
    pub deterministic: Option<u64>,
    /// Host CPUs of each vCPU, separated by commas: `0,1` pins vCPU 0 to CPU 0 and vCPU 1 to CPU 1; `0-3,0-3`
    /// gives both a range; one entry holds for all. Left out: the daemon spreads them.
    #[arg(long, value_name = "CPUS", help_heading = "Machine", value_parser = parse_pin)]
    pub pin: Option<Pin>,
    /// CPU model of the guest.
    #[arg(long, value_name = "NAME", help_heading = "Machine")]
    pub cpu_model: Option<String>,
}

/// Host CPUs for each vCPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pin(pub Vec<Vec<u32>>);

impl MachineArgs {
    pub fn to_request(&self, name: &str) -> Result<v1::CreateVmRequest, Failure> {
        let pin = self.pin.iter().flat_map(|Pin(lists)| lists);
        let clock = match self.clock {
            None => v1::Clock::Unspecified,
            Some(ClockArg::Virtual) => v1::Clock::Virtual,
            Some(ClockArg::Realtime) => v1::Clock::Realtime,
        };
        let spec = v1::VmSpec {
            cpus: self.cpus,
            memory_bytes: self.memory.0,
            nested: v1::Nested::from(self.nested) as i32,
            clock: clock as i32,
            scheduler: self.deterministic.map(|seed| v1::Scheduler {
                kind: Some(v1::scheduler::Kind::Deterministic(v1::scheduler::Deterministic { seed })),
            }),
            pin: pin.map(|cpus| v1::CpuList { cpus: cpus.clone() }).collect(),
            cpu_model: self.cpu_model.clone().unwrap_or_default(),
            debug_exit: true,
        };
        Ok(v1::CreateVmRequest { name: name.into(), spec: Some(spec), boot: self.boot()? })
    }

    fn boot(&self) -> Result<Option<v1::Boot>, Failure> {
        let Some(kernel) = &self.kernel else { return Ok(None) };
        let image = read(kernel)?;
        let kind = match self.flat {
            Some(load_gpa) => v1::boot::Kind::Flat(v1::FlatBoot { image, load_gpa, entry_gpa: self.entry }),
            None => {
                let modules = self.initrd.iter().chain(&self.module);
                let modules = modules.map(|file| Ok(v1::BootModule { image: read(file)?, append: String::new() }));
                v1::boot::Kind::Kernel(v1::KernelBoot {
                    image,
                    append: self.append.clone().unwrap_or_default(),
                    modules: modules.collect::<Result<_, Failure>>()?,
                })
            }
        };
        Ok(Some(v1::Boot { kind: Some(kind) }))
    }
}

pub fn read(file: &Path) -> Result<Vec<u8>, Failure> {
    std::fs::read(file).map_err(|e| Failure::new(format!("cannot read {}: {e}", file.display())))
}

/// Decimal, or hexadecimal with `0x`.
pub fn parse_address(text: &str) -> Result<u64, String> {
    let number = match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => text.parse(),
    };
    number.map_err(|_| "write a number, such as 4096 or 0x1000".into())
}

/// A SIPI vector.
pub fn parse_vector(text: &str) -> Result<u32, String> {
    let vector = parse_address(text).ok().filter(|&v| v <= 0xff);
    vector.map(|v| v as u32).ok_or_else(|| "write a number from 0 to 0xff; the processor starts at vector << 12".into())
}

fn parse_range(text: &str) -> Option<Vec<u32>> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let (first, last): (u32, u32) = (first.parse().ok()?, last.parse().ok()?);
    // More CPUs than any host has: a slip of the finger, and not to be expanded.
    (first <= last && last < 4096).then(|| (first..=last).collect())
}

/// One entry for each vCPU.
fn parse_pin(text: &str) -> Result<Pin, String> {
    let lists: Option<_> = text.split(',').map(parse_range).collect();
    lists.map(Pin).ok_or_else(|| "write one CPU or range for each vCPU, such as 0,1 or 0-3,4-7".into())
}

/// Host CPUs of one vCPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CpuSet(pub Vec<u32>);

pub fn parse_cpu_set(text: &str) -> Result<CpuSet, String> {
    let lists: Option<Vec<_>> = text.split(',').map(parse_range).collect();
    lists.map(|l| CpuSet(l.concat())).ok_or_else(|| "write CPUs and ranges, such as 0 or 0-3,8".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pins_name_one_entry_for_each_vcpu() {
        assert_eq!(parse_pin("0,1"), Ok(Pin(vec![vec![0], vec![1]])));
        assert_eq!(parse_pin("0-2"), Ok(Pin(vec![vec![0, 1, 2]])));
        assert_eq!(parse_cpu_set("0-1,4"), Ok(CpuSet(vec![0, 1, 4])));
        for wrong in ["", "a", "3-1", "0,,1", "0-99999999"] {
            assert!(parse_pin(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn numbers_are_decimal_or_hexadecimal() {
        assert_eq!(parse_address("0x7c00"), Ok(0x7c00));
        assert_eq!(parse_address("4096"), Ok(4096));
        assert_eq!(parse_vector("0x9a"), Ok(0x9a));
        assert!(parse_vector("256").is_err() && parse_vector("-1").is_err());
    }
}
