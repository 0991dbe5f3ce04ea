//! What a VM is made of, checked once at the edge: a [`VmSpec`] cannot be written with an illegal value.

use std::collections::BTreeSet;
use std::fmt;
use std::ops::Deref;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

pub const MAX_CPUS: u32 = 64;
pub const MAX_NAME_LEN: usize = 63;
/// The guest needs its first megabyte for the BIOS area and real-mode code.
pub const MIN_MEMORY_BYTES: u64 = 2 << 20;
pub const MAX_MEMORY_BYTES: u64 = 64 << 30;
/// The command line and the modules travel in guest memory too; this keeps a request within reason.
pub const MAX_APPEND_LEN: usize = 4096;
/// The one CPU model there is today; the emulated processor documents it.
pub const CPU_MODEL: &str = "nestd-v1";

/// How VMX inside the VM is provided (design.md, "The two engines").
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Nested {
    None,
    Kernel,
    Emulated,
    #[default]
    Auto,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Clock {
    /// TSC and timers follow retired instructions; idle time is skipped.
    #[default]
    Virtual,
    /// TSC and timers follow the host's clock.
    Realtime,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Scheduler {
    /// The vCPU threads run at the same time.
    #[default]
    Parallel,
    /// One token, passed between the vCPU threads by quanta drawn from `seed`: one seed, one run.
    Deterministic { seed: u64 },
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Boot {
    /// A kernel image whose protocol (multiboot1, PVH, ELF64) is found by its headers.
    Kernel { image: Vec<u8>, append: String, modules: Vec<(Vec<u8>, String)> },
    /// A flat image, started in real mode at `entry_gpa` (by default `load_gpa`).
    Flat { image: Vec<u8>, load_gpa: u64, entry_gpa: Option<u64> },
    /// Nothing is loaded: the processors leave RESET as hardware does.
    #[default]
    None,
}

/// What a caller asks for; [`VmSpec::new`] checks it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmConfig {
    pub name: String,
    pub cpus: u32,
    pub memory_bytes: u64,
    pub nested: Nested,
    pub clock: Clock,
    pub scheduler: Scheduler,
    /// Host CPUs for each vCPU. Empty: all by the `spread` policy; an empty list: that vCPU by the policy.
    pub pin: Vec<Vec<usize>>,
    pub cpu_model: String,
    /// The debug-exit port and the test devices.
    pub testdev: bool,
    pub boot: Boot,
}

impl Default for VmConfig {
    fn default() -> Self {
        Self {
            name: String::new(),
            cpus: 1,
            memory_bytes: 128 << 20,
            nested: Nested::Auto,
            clock: Clock::Virtual,
            scheduler: Scheduler::Parallel,
            pin: Vec::new(),
            cpu_model: CPU_MODEL.into(),
            testdev: true,
            boot: Boot::None,
        }
    }
}

/// A checked [`VmConfig`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmSpec(VmConfig);

impl Deref for VmSpec {
    type Target = VmConfig;
    fn deref(&self) -> &VmConfig {
        &self.0
    }
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SpecError {
    #[error(
        "name: {value:?} must be 1 to {MAX_NAME_LEN} letters, digits, '.', '_' or '-', starting with a letter or digit"
    )]
    Name { value: String },
    #[error("cpus: {value} is outside 1..={MAX_CPUS}")]
    Cpus { value: u32 },
    #[error("memory_bytes: {value} must be a multiple of 4096 between {MIN_MEMORY_BYTES} and {MAX_MEMORY_BYTES}")]
    Memory { value: u64 },
    #[error("scheduler: deterministic needs the virtual clock, not realtime: host time cannot be replayed")]
    DeterministicRealtime,
    #[error("scheduler: {what} exists only on the emulated processor, but nested = {nested} runs on KVM")]
    NeedsEmulated { what: &'static str, nested: Nested },
    #[error("pin: {lists} lists for {cpus} vCPUs; give one list per vCPU or none")]
    PinCount { lists: usize, cpus: u32 },
    #[error("pin: vCPU {vcpu} names host CPU {cpu}, which this process may not use (allowed: {allowed})")]
    PinCpu { vcpu: usize, cpu: usize, allowed: CpuList },
    #[error("cpu_model: {value:?} is unknown; the one model is {CPU_MODEL:?}")]
    CpuModel { value: String },
    #[error("boot.append: {len} bytes, at most {MAX_APPEND_LEN}")]
    AppendTooLong { len: usize },
    #[error("boot.append: contains a NUL byte")]
    AppendNul,
    #[error("boot.image: is empty")]
    EmptyImage,
    #[error("boot.image: {len} bytes at {load_gpa:#x} do not fit into {memory_bytes} bytes of memory")]
    ImageTooLarge { len: usize, load_gpa: u64, memory_bytes: u64 },
    #[error("boot.entry_gpa: {entry_gpa:#x} must lie below 1 MiB, where real mode reaches")]
    FlatEntry { entry_gpa: u64 },
    #[error("{field}: {value:?} is not one of {allowed}")]
    Unknown { field: &'static str, value: String, allowed: &'static str },
}

impl SpecError {
    /// The field of [`VmConfig`] that is wrong.
    pub fn field(&self) -> &'static str {
        match self {
            Self::Name { .. } => "name",
            Self::Cpus { .. } => "cpus",
            Self::Memory { .. } => "memory_bytes",
            Self::DeterministicRealtime | Self::NeedsEmulated { .. } => "scheduler",
            Self::PinCount { .. } | Self::PinCpu { .. } => "pin",
            Self::CpuModel { .. } => "cpu_model",
            Self::AppendTooLong { .. } | Self::AppendNul => "boot.append",
            Self::EmptyImage | Self::ImageTooLarge { .. } => "boot.image",
            Self::FlatEntry { .. } => "boot.entry_gpa",
            Self::Unknown { field, .. } => field,
        }
    }
}

impl VmSpec {
    /// Checks everything that can be wrong without touching the host, except that pins must name CPUs in
    /// `allowed_cpus` (see [`crate::host::allowed_cpus`]).
    pub fn new(config: VmConfig, allowed_cpus: &[usize]) -> Result<Self, SpecError> {
        check_name(&config.name)?;
        if !(1..=MAX_CPUS).contains(&config.cpus) {
            return Err(SpecError::Cpus { value: config.cpus });
        }
        let memory = config.memory_bytes;
        if !(MIN_MEMORY_BYTES..=MAX_MEMORY_BYTES).contains(&memory) || !memory.is_multiple_of(4096) {
            return Err(SpecError::Memory { value: memory });
        }
        if let Scheduler::Deterministic { .. } = config.scheduler {
            if config.clock == Clock::Realtime {
                return Err(SpecError::DeterministicRealtime);
            }
            if matches!(config.nested, Nested::None | Nested::Kernel) {
                return Err(SpecError::NeedsEmulated { what: "deterministic", nested: config.nested });
            }
        }
        if config.cpu_model != CPU_MODEL {
            return Err(SpecError::CpuModel { value: config.cpu_model });
        }
        if !config.pin.is_empty() && config.pin.len() != config.cpus as usize {
            return Err(SpecError::PinCount { lists: config.pin.len(), cpus: config.cpus });
        }
        for (vcpu, cpus) in config.pin.iter().enumerate() {
            check_pin(vcpu, cpus, allowed_cpus)?;
        }
        check_boot(&config.boot, memory)?;
        Ok(Self(config))
    }
}

fn check_name(name: &str) -> Result<(), SpecError> {
    let ok = (1..=MAX_NAME_LEN).contains(&name.len())
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c));
    if ok { Ok(()) } else { Err(SpecError::Name { value: name.into() }) }
}

pub(crate) fn check_pin(vcpu: usize, cpus: &[usize], allowed: &[usize]) -> Result<(), SpecError> {
    match cpus.iter().find(|c| !allowed.contains(c)) {
        None => Ok(()),
        Some(&cpu) => Err(SpecError::PinCpu { vcpu, cpu, allowed: CpuList(allowed.to_vec()) }),
    }
}

fn check_boot(boot: &Boot, memory_bytes: u64) -> Result<(), SpecError> {
    let (image, load_gpa) = match boot {
        Boot::None => return Ok(()),
        Boot::Kernel { image, append, .. } => {
            if append.len() > MAX_APPEND_LEN {
                return Err(SpecError::AppendTooLong { len: append.len() });
            }
            if append.contains('\0') {
                return Err(SpecError::AppendNul);
            }
            (image, 0)
        }
        Boot::Flat { image, load_gpa, entry_gpa } => {
            let entry_gpa = entry_gpa.unwrap_or(*load_gpa);
            if entry_gpa >= 1 << 20 {
                return Err(SpecError::FlatEntry { entry_gpa });
            }
            (image, *load_gpa)
        }
    };
    if image.is_empty() {
        return Err(SpecError::EmptyImage);
    }
    if load_gpa.checked_add(image.len() as u64).is_none_or(|end| end > memory_bytes) {
        return Err(SpecError::ImageTooLarge { len: image.len(), load_gpa, memory_bytes });
    }
    Ok(())
}

/// Host CPUs as Linux writes them: `0-3,8`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuList(pub Vec<usize>);

impl fmt::Display for CpuList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let cpus: Vec<usize> = self.0.iter().copied().collect::<BTreeSet<_>>().into_iter().collect();
        for (i, run) in cpus.chunk_by(|a, b| a + 1 == *b).enumerate() {
            let comma = if i == 0 { "" } else { "," };
            match run {
                [one] => write!(f, "{comma}{one}")?,
                [first, .., last] => write!(f, "{comma}{first}-{last}")?,
                [] => {}
            }
        }
        Ok(())
    }
}

macro_rules! words {
    ($type:ty, $field:literal, $allowed:literal, $($word:literal => $value:path),+) => {
        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(match self { $($value => $word),+ })
            }
        }
        impl FromStr for $type {
            type Err = SpecError;
            fn from_str(s: &str) -> Result<Self, SpecError> {
                match s {
                    $($word => Ok($value),)+
                    _ => Err(SpecError::Unknown { field: $field, value: s.into(), allowed: $allowed }),
                }
            }
        }
    };
}
words!(Nested, "nested", "none, kernel, emulated, auto",
    "none" => Nested::None, "kernel" => Nested::Kernel, "emulated" => Nested::Emulated, "auto" => Nested::Auto);
words!(Clock, "clock", "virtual, realtime", "virtual" => Clock::Virtual, "realtime" => Clock::Realtime);

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> VmConfig {
        VmConfig { name: "a".into(), ..VmConfig::default() }
    }

    fn refused(change: impl Fn(&mut VmConfig)) -> &'static str {
        let mut c = config();
        change(&mut c);
        VmSpec::new(c, &[0, 1]).unwrap_err().field()
    }

    #[test]
    fn each_illegal_value_is_refused_by_the_name_of_its_field() {
        assert!(VmSpec::new(config(), &[0]).is_ok());
        for name in ["", "-a", "a b", "a/b", &"a".repeat(64)] {
            assert_eq!(refused(|c| c.name = name.into()), "name", "{name:?}");
        }
        assert_eq!(refused(|c| c.cpus = 0), "cpus");
        assert_eq!(refused(|c| c.cpus = 65), "cpus");
        assert_eq!(refused(|c| c.memory_bytes = MIN_MEMORY_BYTES - 4096), "memory_bytes");
        assert_eq!(refused(|c| c.memory_bytes = MIN_MEMORY_BYTES + 1), "memory_bytes");
        assert_eq!(refused(|c| c.cpu_model = "i486".into()), "cpu_model");
        assert_eq!(refused(|c| c.pin = vec![vec![0], vec![1]]), "pin");
        assert_eq!(refused(|c| c.pin = vec![vec![2]]), "pin");
        assert_eq!(refused(|c| c.boot = Boot::Flat { image: vec![], load_gpa: 0, entry_gpa: None }), "boot.image");
        let flat = |load_gpa, entry_gpa| Boot::Flat { image: vec![0x90], load_gpa, entry_gpa };
        assert_eq!(refused(|c| c.boot = flat(u64::MAX, Some(0))), "boot.image");
        assert_eq!(refused(|c| c.boot = flat(0, Some(1 << 20))), "boot.entry_gpa");
        assert_eq!(
            refused(|c| c.boot = Boot::Kernel { image: vec![1], append: "a\0".into(), modules: vec![] }),
            "boot.append"
        );
        assert_eq!(
            refused(|c| {
                c.scheduler = Scheduler::Deterministic { seed: 1 };
                c.clock = Clock::Realtime;
            }),
            "scheduler"
        );
    }

    #[test]
    fn cpu_lists_read_as_linux_writes_them() {
        assert_eq!(CpuList(vec![3, 0, 1, 2, 8, 10, 11, 8]).to_string(), "0-3,8,10-11");
        assert_eq!(CpuList(vec![]).to_string(), "");
    }
}
