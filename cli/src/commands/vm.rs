//! `nestctl vm`.

use std::time::Duration;

use nestd::{config::Listen, units::ByteSize};
use nestd_proto::{Label, v1};
use tokio::io::AsyncReadExt;

use crate::{
    args::VmCommand,
    client::Client,
    error::Failure,
    output::{Output, list, table, write_bytes},
};

/// How long to wait for a guest that does not take its console input.
const INPUT_RETRY: Duration = Duration::from_millis(20);

pub async fn run(command: VmCommand, server: Option<&Listen>, output: Output) -> Result<(), Failure> {
    // Files are read before the daemon is asked: their errors need no daemon.
    let create = match &command {
        VmCommand::Create { name, machine } => Some(machine.to_request(name)?),
        _ => None,
    };
    let client = Client::connect(server).await?;
    let mut vms = client.vms();
    let vm = match command {
        VmCommand::Create { .. } => vms.create(create.unwrap_or_default()).await?,
        VmCommand::Start { name } => vms.start(v1::StartVmRequest { name }).await?,
        VmCommand::Pause { name } => vms.pause(v1::PauseVmRequest { name }).await?,
        VmCommand::Resume { name } => vms.resume(v1::ResumeVmRequest { name }).await?,
        VmCommand::Reset { name } => vms.reset(v1::ResetVmRequest { name }).await?,
        VmCommand::Stop { name } => vms.stop(v1::StopVmRequest { name }).await?,
        VmCommand::Delete { name, force } => {
            vms.delete(v1::DeleteVmRequest { name: name.clone(), force }).await?;
            if output == Output::Table {
                say!("VM `{name}` is deleted");
            }
            return Ok(());
        }
        VmCommand::List => {
            let response = vms.list(v1::ListVmsRequest {}).await?.into_inner();
            return output.show(&response, print_list);
        }
        VmCommand::Show { name, watch: false } => {
            let vm = vms.get(v1::GetVmRequest { name }).await?.into_inner();
            return output.show(&vm, print_one);
        }
        VmCommand::Show { name, watch: true } => {
            let mut stream = vms.watch(v1::WatchVmRequest { name }).await?.into_inner();
            while let Some(vm) = stream.message().await? {
                output.show_line(&vm, |vm| say!("{}", state(vm)))?;
            }
            return Ok(());
        }
        VmCommand::Console { name, no_follow } => return console(&client, name, !no_follow).await,
    };
    output.show(vm.get_ref(), |vm| say!("VM `{}` is {}", vm.name, state(vm)))
}

async fn console(client: &Client, name: String, follow: bool) -> Result<(), Failure> {
    let request = v1::ReadConsoleRequest { name: name.clone(), offset: 0, follow };
    let mut stream = client.vms().read_console(request).await?.into_inner();
    let mut vms = client.vms();
    let input = async move {
        let mut stdin = tokio::io::stdin();
        let mut buffer = [0; 4096];
        loop {
            let n = stdin.read(&mut buffer).await?;
            if n == 0 {
                return Ok::<(), Failure>(());
            }
            let mut rest = &buffer[..n];
            while !rest.is_empty() {
                let request = v1::WriteConsoleRequest { name: name.clone(), data: rest.to_vec() };
                let written = vms.write_console(request).await?.into_inner().written_bytes as usize;
                rest = rest.get(written..).unwrap_or_default();
                if written == 0 {
                    // The guest is busy; it reads at its own pace.
                    tokio::time::sleep(INPUT_RETRY).await;
                }
            }
        }
    };
    let input = async {
        if follow {
            input.await?;
        }
        // At the end of the input the output goes on.
        std::future::pending::<Result<(), Failure>>().await
    };
    let output = async {
        while let Some(part) = stream.message().await? {
            write_console(&part);
        }
        Ok(())
    };
    tokio::select! {
        ended = output => ended,
        failed = input => failed,
    }
}

/// The guest's bytes as they are; what is lost is said on standard error.
pub fn write_console(part: &v1::ReadConsoleResponse) {
    if part.lost_bytes > 0 {
        anstream::eprintln!("-- {} bytes of console output are gone --", part.lost_bytes);
    }
    write_bytes(&part.data);
}

/// The state, with how the VM ended.
fn state(vm: &v1::Vm) -> String {
    let state = vm.state().label();
    match (&vm.guest_exit, &vm.failure) {
        (Some(exit), _) => format!("{state} (guest exit {:#x})", exit.code),
        (_, Some(failure)) => format!("{state} ({})", failure.reason),
        _ => state.into(),
    }
}

fn print_list(response: &v1::ListVmsResponse) {
    let rows = response.vms.iter().map(|vm| {
        let spec = vm.spec.clone().unwrap_or_default();
        [
            vm.name.clone(),
            state(vm),
            spec.cpus.to_string(),
            ByteSize(spec.memory_bytes).to_string(),
            spec.nested().label().to_lowercase(),
            vm.engine().label().to_lowercase(),
        ]
    });
    say!("{}", table(["NAME", "STATE", "VCPUS", "MEMORY", "NESTED", "ENGINE"], rows));
}

fn print_one(vm: &v1::Vm) {
    let spec = vm.spec.clone().unwrap_or_default();
    let pin: Vec<_> = spec.pin.iter().map(|l| crate::output::cpu_list(&l.cpus)).collect();
    let scheduler = match spec.scheduler.as_ref().and_then(|s| s.kind) {
        Some(v1::scheduler::Kind::Deterministic(d)) => format!("deterministic, seed {}", d.seed),
        _ => "parallel".into(),
    };
    list([
        ("name", vm.name.clone()),
        ("state", state(vm)),
        ("vCPUs", spec.cpus.to_string()),
        ("memory", ByteSize(spec.memory_bytes).to_string()),
        ("boots", vm.boot.clone()),
        ("nested", spec.nested().label().to_lowercase()),
        ("engine", vm.engine().label().to_lowercase()),
        ("because", vm.engine_reason.clone()),
        ("clock", spec.clock().label().to_lowercase()),
        ("scheduler", scheduler),
        ("pinned to", pin.join(", ")),
        ("CPU model", spec.cpu_model.clone()),
        ("failure", vm.failure.as_ref().map(|f| f.reason.clone()).unwrap_or_default()),
        ("dump", vm.failure.as_ref().map(|f| f.dump.clone()).unwrap_or_default()),
    ]);
}
