//! `nestctl run`.

use std::{process::ExitCode, time::Duration};

use nestd::config::Listen;
use nestd_proto::v1;

use crate::{
    args::RunArgs,
    client::{Client, interrupted, with_daemon},
    commands::vm::write_console,
    error::{FAILED, Failure, INTERRUPTED, vm_failed},
    output::Output,
};

const TIMED_OUT: u8 = 124;

pub async fn run(args: RunArgs, server: Option<&Listen>, output: Output) -> Result<ExitCode, Failure> {
    let name = format!("run-{}", std::process::id());
    // From here on 1 is what a guest may say.
    let request = args.machine.to_request(&name).map_err(|f| f.exit(FAILED))?;
    if request.boot.is_none() {
        let failure = Failure::new("nothing to boot");
        return Err(failure
            .hint("name an image with --kernel FILE; `nestctl run --help` lists the kinds")
            .exit(FAILED));
    }
    let result = with_daemon(server, |client| async move { machine(&client, request, args.timeout, output).await });
    result.await.map(ExitCode::from).map_err(|f| f.exit(FAILED))
}

/// The machine from its creation to its end.
async fn machine(
    client: &Client,
    request: v1::CreateVmRequest,
    timeout: Option<Duration>,
    output: Output,
) -> Result<u8, Failure> {
    let name = request.name.clone();
    client.vms().create(request).await?;
    let deadline = async {
        match timeout {
            Some(timeout) => tokio::time::sleep(timeout).await,
            None => std::future::pending().await,
        }
    };
    let result = tokio::select! {
        ended = until_end(client, &name) => ended,
        () = deadline => {
            anstream::eprintln!("nestctl: the timeout passed; the machine is stopped");
            Ok((TIMED_OUT, None))
        }
        () = interrupted() => Ok((INTERRUPTED, None)),
    };
    client.vms().delete(v1::DeleteVmRequest { name, force: true }).await?;
    let (exit, vm) = result?;
    if let (Output::Json, Some(vm)) = (output, vm) {
        anstream::eprintln!("{}", nestd_proto::json::to_line(&vm)?);
    }
    Ok(exit)
}

/// Starts it, copies its console, and says how it ended.
async fn until_end(client: &Client, name: &str) -> Result<(u8, Option<v1::Vm>), Failure> {
    let console = v1::ReadConsoleRequest { name: name.into(), offset: 0, follow: true };
    let mut console = client.vms().read_console(console).await?.into_inner();
    client.vms().start(v1::StartVmRequest { name: name.into() }).await?;
    while let Some(part) = console.message().await? {
        write_console(&part);
    }
    let vm = client.vms().get(v1::GetVmRequest { name: name.into() }).await?.into_inner();
    match (vm.state(), vm.guest_exit) {
        (v1::VmState::Failed, _) => Err(vm_failed(&vm)),
        (_, Some(exit)) => Ok((debug_exit_status(exit.code), Some(vm))),
        _ => Ok((0, Some(vm))),
    }
}

/// QEMU's isa-debug-exit, cut to the 8 bits that a process has.
fn debug_exit_status(code: u32) -> u8 {
    ((code << 1) | 1) as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_exits_follow_qemus_debug_exit() {
        assert_eq!(debug_exit_status(0), 1);
        assert_eq!(debug_exit_status(0x10), 33);
        assert_eq!(debug_exit_status(0x7f), 255);
        assert_eq!(debug_exit_status(u32::MAX), 255);
    }
}
