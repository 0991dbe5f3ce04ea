//! The command line.

use std::{path::PathBuf, time::Duration};

use clap::{Args, Parser, Subcommand, ValueEnum};
use nestd::{config::Listen, units::parse_time};
use nestd_proto::{Label, v1};

use crate::{
    machine::{CpuSet, MachineArgs, NestedArg, parse_cpu_set, parse_vector},
    output::Output,
};

/// Virtual machines for people who write, test and run hypervisors.
///
/// nestctl shows and steers what a hypervisor does: mp_state and activity state of every vCPU, the VMCS12 field by
/// field, nested VM entries and exits, and the INIT and SIPI events in between.
///
/// Start with `nestctl demo`: an L1 hypervisor starts its L2's second processor. It needs no daemon, no root and no
/// /dev/kvm.
#[derive(Debug, Parser)]
#[command(name = "nestctl", version, propagate_version = true, max_term_width = 100)]
pub struct Cli {
    /// The daemon's socket. Without it, `demo` and `run` start a daemon of their own for as long as they run, and
    /// the other commands look where `nestd` listens by default.
    #[arg(long, global = true, env = "NESTD_SERVER", value_name = "unix:PATH")]
    pub server: Option<Listen>,
    /// Tables for people, or the API's JSON mapping: one object, or one a line for streams.
    #[arg(long, global = true, value_enum, default_value_t)]
    pub output: Output,
    #[command(subcommand)]
    pub command: Command,
}

// Where a command has arguments of its own, they carry its help.
#[derive(Debug, Subcommand)]
pub enum Command {
    Demo(DemoArgs),
    Run(RunArgs),
    /// Virtual machines of a daemon.
    #[command(subcommand)]
    Vm(VmCommand),
    /// The processors of a VM: state, INIT, SIPI, NMI, pinning.
    #[command(subcommand)]
    Vcpu(VcpuCommand),
    Vmcs12(Vmcs12Args),
    Events(EventsArgs),
    /// What this host can do, and which engine each kind of nesting gets.
    Host,
    /// Print a completion script: `nestctl completions bash > ~/.local/share/bash-completion/completions/nestctl`.
    Completions {
        shell: clap_complete::Shell,
    },
    /// Write the man pages into a directory.
    Man {
        directory: PathBuf,
    },
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum ApicArg {
    /// Through the memory-mapped page.
    Xapic,
    /// Through the MSR.
    X2apic,
    #[default]
    Both,
}

/// Watch an L1 hypervisor start its L2's second processor by INIT and SIPI VM exits.
///
/// L1 is a small hypervisor that does not monitor its guest's local APIC. When L2 sends INIT, SIPI, SIPI to its
/// second processor, L1 hears of it by two VM exits on that processor: 3 (INIT signal) and 4 (SIPI). The nine steps of
/// this handshake are printed as they happened, from the daemon's event stream.
///
/// With `--nested kernel` the host's kernel runs VMX. It tells nobody of VM entries and exits, so the steps are told
/// from L1's and L2's own console lines and from mp_state, and those that KVM hides are named.
///
/// Exit status: 0 if every step was seen and caused by the one before (with KVM: every step that it does not hide),
/// else 1 with the step that is missing.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  nestctl demo\n  nestctl demo --apic x2apic --output json\n  nestctl demo --nested kernel"
)]
pub struct DemoArgs {
    /// How L2 writes the local APIC's ICR.
    #[arg(long, value_enum, default_value_t)]
    pub apic: ApicArg,
    /// Who runs VMX for L1: `emulated`, or `kernel` on a host with kvm_intel and nested=1.
    #[arg(long, value_enum, value_name = "MODE", default_value = "emulated")]
    pub nested: NestedArg,
    /// Give up after this (host) time.
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = parse_time)]
    pub timeout: Duration,
    /// Write the two guests, l1.elf and l2.elf, into this directory and leave: to run them yourself.
    #[arg(long, value_name = "DIR")]
    pub images: Option<PathBuf>,
    /// Another L1 in place of the demo's own.
    #[arg(long, hide = true, value_name = "FILE")]
    pub l1: Option<PathBuf>,
    /// More words for L1's command line.
    #[arg(long, hide = true, value_name = "WORDS")]
    pub append: Option<String>,
}

/// Boot one machine, with its serial console on standard output.
///
/// The machine lives as long as this command. Its exit status is the guest's: a value written to the debug exit port
/// (0xf4) gives (value << 1) | 1, as with QEMU's isa-debug-exit. 0: the VM was stopped otherwise. 124: the timeout
/// passed. 126: the VM or nestctl failed. 130: interrupted.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  nestctl run --kernel test.elf --cpus 2 --nested emulated --timeout 60s\n  nestctl run --kernel boot.bin --flat 0x7c00"
)]
pub struct RunArgs {
    #[command(flatten)]
    pub machine: MachineArgs,
    /// Stop the machine after this (host) time, with exit status 124.
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    pub timeout: Option<Duration>,
}

#[derive(Debug, Subcommand)]
pub enum VmCommand {
    /// Create a VM; `vm start` lets it run.
    #[command(after_help = "Example:\n  nestctl vm create a --kernel test.elf --cpus 2 --nested emulated")]
    Create {
        name: String,
        #[command(flatten)]
        machine: Box<MachineArgs>,
    },
    /// Let a created VM run.
    Start { name: String },
    /// Stop its processors at an instruction boundary.
    Pause { name: String },
    /// Let a paused VM go on.
    Resume { name: String },
    /// RESET: boot again.
    Reset { name: String },
    /// End it; state, events and console stay readable.
    Stop { name: String },
    /// Forget it.
    Delete {
        name: String,
        /// Stop it first if it runs.
        #[arg(long)]
        force: bool,
    },
    /// All VMs.
    List,
    /// One VM.
    Show {
        name: String,
        /// Print it again at each change, until the VM ends.
        #[arg(long)]
        watch: bool,
    },
    /// The serial console: its output to standard output, and standard input to the guest.
    Console {
        name: String,
        /// Print what is there and leave; do not read standard input.
        #[arg(long)]
        no_follow: bool,
    },
}

/// A processor of a VM.
#[derive(Clone, Debug, Args)]
pub struct Target {
    /// The VM's name.
    pub vm: String,
    /// The vCPU's number, from 0.
    pub vcpu: u32,
}

#[derive(Debug, Subcommand)]
pub enum VcpuCommand {
    /// All processors of a VM, as last published.
    List { vm: String },
    /// One processor.
    Show {
        #[command(flatten)]
        target: Target,
        /// Ask the processor itself, and not what it published last.
        #[arg(long)]
        fresh: bool,
        /// Its registers too.
        #[arg(long)]
        registers: bool,
    },
    /// Send INIT.
    Init {
        #[command(flatten)]
        target: Target,
    },
    /// Send SIPI: a processor in wait-for-SIPI starts at vector << 12.
    #[command(after_help = "Example:\n  nestctl vcpu sipi a 1 --vector 0x9a")]
    Sipi {
        #[command(flatten)]
        target: Target,
        #[arg(long, value_name = "V", value_parser = parse_vector)]
        vector: u32,
    },
    /// Send NMI.
    Nmi {
        #[command(flatten)]
        target: Target,
    },
    /// Change the host CPUs that its thread may use.
    #[command(after_help = "Example:\n  nestctl vcpu pin a 1 2-3")]
    Pin {
        #[command(flatten)]
        target: Target,
        /// Host CPUs, such as 0 or 0-3,8.
        #[arg(value_parser = parse_cpu_set)]
        cpus: CpuSet,
    },
}

/// The VMCS that a guest hypervisor made current, field by field.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  nestctl vmcs12 a 1 --field guest_activity_state --field guest_rip")]
pub struct Vmcs12Args {
    #[command(flatten)]
    pub target: Target,
    /// Only this field; may be given again.
    #[arg(long, value_name = "NAME")]
    pub field: Vec<String>,
}

/// What happened on a VM's processors, causes before effects.
///
/// The daemon keeps the INIT and SIPI story of a VM, and the VM entries and exits around it. Other VM entries, VM exits
/// and ICR writes are frequent: they are recorded while a command names their kind with --kind.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  nestctl events a --follow\n  nestctl events a --kind VM_EXIT --kind VM_ENTRY --follow"
)]
pub struct EventsArgs {
    /// The VM's name.
    pub vm: String,
    /// Stay, and print what happens until the VM ends.
    #[arg(long, short)]
    pub follow: bool,
    /// Only events after this sequence number.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub since: u64,
    /// Only this kind; may be given again.
    #[arg(long, value_name = "KIND", value_parser = kind_parser())]
    pub kind: Vec<String>,
    /// Only this vCPU; may be given again.
    #[arg(long, value_name = "N")]
    pub vcpu: Vec<u32>,
}

fn kind_parser() -> impl clap::builder::TypedValueParser<Value = String> {
    clap::builder::PossibleValuesParser::new(v1::EventKind::labels())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }
}
