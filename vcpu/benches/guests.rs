//! `cargo bench`: the loops of `nestd-guests` on the emulated processor, directly (L1) and under the demo's hypervisor
//! (L2), beside QEMU TCG where `qemu-system-x86_64` is installed. All figures are per second of CPU time of the process
//! that runs the guest; runs are interleaved and their medians compared, because machines are noisy.

use nestd_guests::L1;
use nestd_vcpu::host::allowed_cpus;
use nestd_vcpu::spec::{Boot, Nested, VmConfig, VmSpec};
use nestd_vcpu::vm::{Vm, VmOptions, VmState};
use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

const ROUNDS: usize = 5;
const PATIENCE: Duration = Duration::from_secs(120);

/// A loop of the benchmark guest, with iterations for some tenths of a second.
struct Work {
    name: &'static str,
    iterations: u64,
    what: Unit,
}

enum Unit {
    /// Million instructions a second.
    Instructions,
    /// Bytes copied by an iteration; printed as GB/s.
    Bytes(u64),
    /// Microseconds an iteration.
    RoundTrip,
}

const WORK: [Work; 6] = [
    Work { name: "alu", iterations: 20_000_000, what: Unit::Instructions },
    Work { name: "copy", iterations: 20_000_000, what: Unit::Instructions },
    Work { name: "mix", iterations: 8_000_000, what: Unit::Instructions },
    Work { name: "movsq", iterations: 2_000_000, what: Unit::Bytes(4096) },
    Work { name: "cpuid", iterations: 400_000, what: Unit::RoundTrip },
    Work { name: "vmcall", iterations: 400_000, what: Unit::RoundTrip },
];

/// CPU time that a process has used, its ended threads included; in clock ticks of 10 ms.
fn cpu_seconds(pid: u32) -> Option<f64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // utime and stime are the 12th and 13th field behind the name, which is in parentheses.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
    let mut next = || fields.next()?.parse::<f64>().ok();
    Some((next()? + next()?) / 100.0)
}

/// One run of a loop: CPU time between its two lines, and the instructions that it says it ran.
#[derive(Clone, Copy)]
struct Run {
    seconds: f64,
    instructions: f64,
}

fn main() {
    // `cargo test --benches` and `cargo bench -- --list` only ask whether it starts.
    if std::env::args().any(|a| a == "--test" || a == "--list") {
        return;
    }
    let qemu = Qemu::find();
    println!("guest loops per second of CPU time, median of {ROUNDS} interleaved rounds");
    println!(
        "{:8} {:>12} {:>12} {:>8} {:>12} {:>10}  unit",
        "loop", "nestd L1", "nestd L2", "L2/L1", "QEMU TCG", "nestd/QEMU"
    );
    for work in &WORK {
        let (mut l1, mut l2, mut tcg) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            if work.name != "vmcall" {
                l1.push(nestd(work, false));
                if let Some(q) = &qemu {
                    tcg.extend(q.run(work));
                }
            }
            l2.push(nestd(work, true));
        }
        let [l1, l2, tcg] = [l1, l2, tcg].map(|runs| median(&runs, work));
        // Instructions and bytes a second: more is better; time: less is.
        let faster = |a: Option<f64>, b: Option<f64>| match work.what {
            Unit::RoundTrip => Some(b? / a?),
            _ => Some(a? / b?),
        };
        println!(
            "{:8} {:>12} {:>12} {:>8} {:>12} {:>10}  {}",
            work.name,
            show(l1),
            show(l2),
            show(faster(l2, l1)),
            show(tcg),
            show(faster(l1, tcg)),
            match work.what {
                Unit::Instructions => "million instructions/s",
                Unit::Bytes(_) => "GB/s copied",
                Unit::RoundTrip => "us an iteration",
            }
        );
    }
    if qemu.is_none() {
        println!("QEMU: qemu-system-x86_64 is not installed");
    }
    busy_vcpus();
}

fn show(v: Option<f64>) -> String {
    v.map_or("-".into(), |v| format!("{v:.3}"))
}

fn median(runs: &[Run], work: &Work) -> Option<f64> {
    let mut values: Vec<f64> = runs
        .iter()
        .map(|r| match work.what {
            Unit::Instructions => r.instructions / r.seconds / 1e6,
            Unit::Bytes(n) => work.iterations as f64 * n as f64 / r.seconds / 1e9,
            Unit::RoundTrip => r.seconds / work.iterations as f64 * 1e6,
        })
        .collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}

/// Runs QEMU and nestd alike.
fn command_line(work: &Work) -> String {
    format!("cpus=1 loop={} n={}", work.name, work.iterations)
}

/// The instructions that the loop's last line tells.
fn parse(line: &str, work: &Work) -> Option<f64> {
    let rest = line.split_once(&format!("{} iterations=", work.name))?.1;
    rest.split_once("instructions=")?.1.split(' ').next()?.trim().parse().ok()
}

fn nestd(work: &Work, under_l1: bool) -> Run {
    let bench = nestd_guests::bench().to_vec();
    let (image, modules) = if under_l1 {
        (nestd_guests::l1(L1::Demo).to_vec(), vec![(bench, String::new())])
    } else {
        (bench, Vec::new())
    };
    let config = VmConfig {
        name: "bench".into(),
        memory_bytes: 64 << 20,
        nested: Nested::Emulated,
        boot: Boot::Kernel { image, append: command_line(work), modules },
        ..VmConfig::default()
    };
    let vm = create(config);
    vm.start().expect("a created VM starts");
    let console = || String::from_utf8_lossy(&vm.console().read(0, 1 << 16).bytes).into_owned();
    let cpu_ns = || vm.counters().vcpus.iter().map(|v| v.thread_cpu_ns).sum::<u64>();
    let begins = format!("{} begins", work.name);
    let start = vm.wait_for(PATIENCE, || console().contains(&begins).then(&cpu_ns));
    let ended = vm.wait_for(PATIENCE, || vm.state().ended().then(&cpu_ns));
    let instructions = console().lines().find_map(|l| parse(l, work));
    match (start, ended, instructions) {
        (Some(start), Some(end), Some(instructions)) => Run { seconds: (end - start) as f64 / 1e9, instructions },
        _ => panic!("{} did not end: {:?}\n{}", work.name, vm.state(), console()),
    }
}

fn create(config: VmConfig) -> Arc<Vm> {
    let spec = VmSpec::new(config, &allowed_cpus()).expect("the spec is valid");
    Vm::create(spec, VmOptions::default()).expect("the emulated engine runs everywhere")
}

struct Qemu {
    image: std::path::PathBuf,
}

impl Qemu {
    fn find() -> Option<Self> {
        Command::new("qemu-system-x86_64")
            .arg("--version")
            .stdout(Stdio::null())
            .status()
            .ok()
            .filter(|s| s.success())?;
        let image = std::env::temp_dir().join(format!("nestd-bench-{}.elf", std::process::id()));
        std::fs::File::create(&image).and_then(|mut f| f.write_all(nestd_guests::bench())).ok()?;
        Some(Self { image })
    }

    fn run(&self, work: &Work) -> Option<Run> {
        let mut child = Command::new("qemu-system-x86_64")
            .args(["-accel", "tcg", "-m", "64", "-display", "none", "-serial", "stdio", "-no-reboot", "-nodefaults"])
            .args(["-device", "isa-debug-exit,iobase=0xf4,iosize=4", "-kernel"])
            .arg(&self.image)
            .args(["-append", &command_line(work)])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .ok()?;
        let mut output = BufReader::new(child.stdout.take()?);
        let begins = format!("{} begins", work.name);
        let (mut start, mut instructions, mut line) = (None, None, String::new());
        while output.read_line(&mut line).ok()? > 0 {
            if line.contains(&begins) {
                start = cpu_seconds(child.id());
            }
            instructions = instructions.or_else(|| parse(&line, work));
            line.clear();
        }
        // The output ends with the process, which is there to be looked at until it is waited for.
        let end = cpu_seconds(child.id());
        child.wait().ok()?;
        Some(Run { seconds: end? - start?, instructions: instructions? })
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.image);
    }
}

/// Instructions per second of thread CPU time, of one busy vCPU and of two.
fn busy_vcpus() {
    let rate = |cpus: u32| -> f64 {
        // add eax, ebx; inc ecx; xor edx, eax; jmp back
        let code = vec![0x66, 0x01, 0xd8, 0x41, 0x66, 0x31, 0xc2, 0xeb, 0xf7];
        let vm = create(VmConfig {
            name: "busy".into(),
            cpus,
            nested: Nested::Emulated,
            boot: Boot::Flat { image: code, load_gpa: 0x8000, entry_gpa: None },
            ..VmConfig::default()
        });
        vm.start().expect("a created VM starts");
        for vcpu in 1..cpus {
            vm.inject(vcpu, nestd_vcpu::engine::Injection::Sipi { vector: 8 })
                .expect("the second vCPU waits for a SIPI");
        }
        // Nothing that the guest does is a change to wait for.
        let reached = |n: u64| loop {
            let now = vm.counters();
            if now.vcpus.iter().all(|v| v.instructions > n) {
                return now;
            }
            assert_eq!(vm.state(), VmState::Running);
            std::thread::sleep(Duration::from_millis(1));
        };
        let first = reached(20_000_000);
        let last = reached(400_000_000);
        let rates: Vec<f64> = first
            .vcpus
            .iter()
            .zip(&last.vcpus)
            .map(|(a, b)| (b.instructions - a.instructions) as f64 * 1e3 / (b.thread_cpu_ns - a.thread_cpu_ns) as f64)
            .collect();
        rates.iter().sum::<f64>() / rates.len() as f64
    };
    let pairs: Vec<(f64, f64)> = (0..3).map(|_| (rate(1), rate(2))).collect();
    let middle = |mut v: Vec<f64>| {
        v.sort_by(f64::total_cmp);
        v[v.len() / 2]
    };
    let (one, two) = (middle(pairs.iter().map(|p| p.0).collect()), middle(pairs.iter().map(|p| p.1).collect()));
    let ratio = middle(pairs.iter().map(|p| p.1 / p.0).collect());
    println!(
        "busy vCPUs: {one:.0} million instructions per second of thread CPU time alone, {two:.0} each of two, ratio {ratio:.2}"
    );
}
