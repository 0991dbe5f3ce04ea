//! `nestctl demo`.

mod chain;
mod observed;
mod timeline;

use std::{path::Path, process::ExitCode};

use nestd::config::Listen;
use nestd_proto::v1::{self, stream_events_response::Item};

use crate::{
    args::{ApicArg, DemoArgs},
    client::{Client, interrupted, with_daemon},
    error::{Failure, INTERRUPTED, vm_failed},
    machine,
    output::{BAD, GOOD, Output},
};
use chain::{Missing, Story};
use observed::Account;

/// What L1 and L2 need (nestd-guests, "Memory"), and room to spare.
const MEMORY_BYTES: u64 = 128 << 20;

/// How the guest ended, beside what it did.
struct Run {
    events: Vec<v1::Event>,
    /// Events that the daemon no longer had.
    lost: u64,
    vm: v1::Vm,
    console: Vec<u8>,
    timed_out: bool,
}

pub async fn run(args: DemoArgs, server: Option<&Listen>, output: Output) -> Result<ExitCode, Failure> {
    if let Some(directory) = &args.images {
        write_images(directory)?;
        return Ok(ExitCode::SUCCESS);
    }
    let modes: &[&str] = match args.apic {
        ApicArg::Xapic => &["xapic"],
        ApicArg::X2apic => &["x2apic"],
        ApicArg::Both => &["xapic", "x2apic"],
    };
    let l1 = match &args.l1 {
        Some(file) => machine::read(file)?,
        None => nestd_guests::l1(nestd_guests::L1::Demo).to_vec(),
    };
    with_daemon(server, |client| async move {
        for mode in modes {
            let run = watch(&client, mode, &l1, &args, output).await?;
            judge(&run, mode, output)?;
        }
        Ok(())
    })
    .await?;
    if output == Output::Table {
        where_to_go_next();
    }
    Ok(ExitCode::SUCCESS)
}

fn write_images(directory: &Path) -> Result<(), Failure> {
    std::fs::create_dir_all(directory)
        .map_err(|e| Failure::new(format!("cannot make the directory {}: {e}", directory.display())))?;
    for (name, image) in [("l1.elf", nestd_guests::l1(nestd_guests::L1::Demo)), ("l2.elf", nestd_guests::l2())] {
        let file = directory.join(name);
        std::fs::write(&file, image).map_err(|e| Failure::new(format!("cannot write {}: {e}", file.display())))?;
    }
    Ok(())
}

/// Runs L1 with its L2 from creation to deletion, and keeps what the daemon told of it.
async fn watch(client: &Client, mode: &str, l1: &[u8], args: &DemoArgs, output: Output) -> Result<Run, Failure> {
    let name = format!("demo-{mode}-{}", std::process::id());
    client.vms().create(request(&name, mode, l1, args)).await?;
    let result = tokio::select! {
        told = tell(client, &name, args, output) => told,
        () = interrupted() => Err(Failure::new("interrupted").exit(INTERRUPTED)),
    };
    let deleted = client.vms().delete(v1::DeleteVmRequest { name, force: true }).await;
    let run = result?;
    deleted?;
    Ok(run)
}

fn request(name: &str, mode: &str, l1: &[u8], args: &DemoArgs) -> v1::CreateVmRequest {
    let spec = v1::VmSpec {
        cpus: 2,
        memory_bytes: MEMORY_BYTES,
        nested: v1::Nested::from(args.nested) as i32,
        debug_exit: true,
        ..Default::default()
    };
    let kernel = v1::KernelBoot {
        image: l1.to_vec(),
        append: match &args.append {
            Some(more) => format!("apic={mode} {more}"),
            None => format!("apic={mode}"),
        },
        modules: vec![v1::BootModule { image: nestd_guests::l2().to_vec(), append: String::new() }],
    };
    let boot = v1::Boot { kind: Some(v1::boot::Kind::Kernel(kernel)) };
    v1::CreateVmRequest { name: name.into(), spec: Some(spec), boot: Some(boot) }
}

async fn tell(client: &Client, name: &str, args: &DemoArgs, output: Output) -> Result<Run, Failure> {
    let request = v1::StreamEventsRequest { vm: name.into(), follow: true, ..Default::default() };
    let mut stream = client.events().stream(request).await?.into_inner();
    client.vms().start(v1::StartVmRequest { name: name.into() }).await?;
    let (mut events, mut lost) = (Vec::new(), 0);
    let collect = async {
        while let Some(response) = stream.message().await? {
            match response.item {
                Some(Item::Event(event)) => {
                    output.show_line(&event, |_| ())?;
                    events.push(event);
                }
                Some(Item::Gap(gap)) => lost += gap.lost,
                None => {}
            }
        }
        Ok::<(), Failure>(())
    };
    let vm = client.vms().get(v1::GetVmRequest { name: name.into() }).await?.into_inner();
    let by_kvm = vm.engine() == v1::Engine::Kvm;
    let watched = async {
        tokio::select! {
            ended = collect => ended,
            Err(failure) = look_when_it_waits(client, name), if by_kvm => Err(failure),
        }
    };
    let timed_out = match tokio::time::timeout(args.timeout, watched).await {
        Ok(ended) => {
            ended?;
            false
        }
        Err(_) => true,
    };
    let request = v1::ReadConsoleRequest { name: name.into(), offset: 0, follow: false };
    let mut stream = client.vms().read_console(request).await?.into_inner();
    let mut console = Vec::new();
    while let Some(part) = stream.message().await? {
        console.extend(part.data);
    }
    let vm = client.vms().get(v1::GetVmRequest { name: name.into() }).await?.into_inner();
    Ok(Run { events, lost, vm, console, timed_out })
}

/// A vCPU under KVM says nothing when it enters wait-for-SIPI in L2. L1 announces it on the console just before: ask
/// the vCPU then. What it answers is recorded as an event. A read that comes too late or fails is no fault of the guest.
async fn look_when_it_waits(client: &Client, name: &str) -> Result<std::convert::Infallible, Failure> {
    const TARGET: u32 = 1;
    let request = v1::ReadConsoleRequest { name: name.into(), offset: 0, follow: true };
    let mut stream = client.vms().read_console(request).await?.into_inner();
    let mut text = String::new();
    while let Some(part) = stream.message().await? {
        text += &String::from_utf8_lossy(&part.data);
        if text.contains(&format!("{}\n", observed::WAITS)) {
            let request = v1::GetVcpuRequest { vm: name.into(), index: TARGET, fresh: true, timeout: None };
            let _ = client.vcpus().get(request).await;
            break;
        }
    }
    std::future::pending().await
}

/// What came of a run.
struct Told {
    timeline: String,
    /// If nothing is missing.
    praise: String,
    missing: Option<Missing>,
}

fn told(run: &Run, mode: &str) -> Told {
    let success = run.vm.guest_exit.is_some_and(|e| e.code == u32::from(nestd_guests::exit_code::SUCCESS));
    if run.vm.engine() == v1::Engine::Kvm {
        let account = Account::of(&String::from_utf8_lossy(&run.console), &run.events, success);
        let praise = format!(
            "Every step that KVM shows was seen, in order; {} of the nine are not observable on KVM.",
            account.hidden()
        );
        return Told { timeline: account.render(mode), praise, missing: account.missing };
    }
    let story = Story::follow(&run.events, success);
    let praise = "All nine steps were seen, each caused by the one before.".into();
    Told { timeline: timeline::render(&story, mode, &run.vm), praise, missing: story.missing }
}

/// Prints the story, and fails if it is not the whole one.
fn judge(run: &Run, mode: &str, output: Output) -> Result<(), Failure> {
    let told = told(run, mode);
    if output == Output::Table {
        say!("{}", told.timeline);
    }
    let Some(missing) = &told.missing else {
        if output == Output::Table {
            say!("{GOOD}{}{GOOD:#}\n", told.praise);
        }
        return Ok(());
    };
    if output == Output::Table {
        say!("{BAD}Step {} is missing.{BAD:#}\n", missing.step);
        let console = String::from_utf8_lossy(&run.console);
        say!("The guest's console:\n{}", console.trim_end());
    }
    if run.vm.state() == v1::VmState::Failed {
        return Err(Failure { exit: 1, ..vm_failed(&run.vm) });
    }
    let mut message = format!("{mode}: step {} is missing: {}", missing.step, missing.what);
    if run.timed_out {
        message += &format!("; the VM was given up after --timeout, {}", run.vm.state().as_str_name());
    }
    if run.lost > 0 {
        message += &format!("; {} events were lost", run.lost);
    }
    let failure = Failure::new(message);
    Err(match (&missing.rule, run.timed_out) {
        (Some(rule), _) => {
            failure.hint(format!("rule {rule} says what became of it; `nestctl demo --output json` shows every event"))
        }
        (None, true) => failure.hint("on a slow host give it more time with --timeout"),
        (None, false) => failure.hint("`nestctl demo --output json` shows every event"),
    })
}

fn where_to_go_next() {
    say!(
        "\
Where to go next:
  nestctl demo --output json                       every event, one a line
  nestd &                                          a daemon that stays; nestctl finds it
  nestctl demo --images DIR                        the two guests as files; or take your own hypervisor
  nestctl vm create a --kernel DIR/l1.elf --initrd DIR/l2.elf --cpus 2 --nested emulated
  nestctl vm start a; nestctl events a --follow    its story
  nestctl vcpu list a                              mp_state, activity state, VMX mode of each vCPU
  nestctl vmcs12 a 1                               the VMCS it made current, field by field
  nestctl vcpu init a 1; nestctl vcpu sipi a 1 --vector 0x10
  nestctl run --help                               one machine, one command, the guest's exit status"
    );
}
