//! `nestctl host`.

use nestd::{config::Listen, units::ByteSize};
use nestd_proto::{Label, v1};

use crate::{
    client::{Client, with_daemon},
    error::Failure,
    output::{BOLD, Output, cpu_list, list, table},
};

/// Asks the daemon that was named, else the one at the default place; where none runs, an embedded one answers for
/// this machine.
pub async fn run(server: Option<&Listen>, output: Output) -> Result<(), Failure> {
    let host = match Client::connect(server).await {
        Ok(client) => ask(client).await?,
        Err(failure) if server.is_some() => return Err(failure),
        Err(_) => with_daemon(None, ask).await?,
    };
    output.show(&host, print)
}

async fn ask(client: Client) -> Result<v1::Host, Failure> {
    Ok(client.host().preflight(v1::PreflightRequest {}).await?.into_inner())
}

fn print(host: &v1::Host) {
    let nesting = format!("{}: {}", if host.kernel_nesting { "yes" } else { "no" }, host.kernel_nesting_detail);
    let limits = host.limits.unwrap_or_default();
    list([
        ("kvm", format!("{} {}", host.kvm().label(), host.kvm_detail).trim_end().to_owned()),
        ("nesting in the kernel", nesting),
        ("host CPUs", cpu_list(&host.cpus)),
        ("memory", ByteSize(host.memory_bytes).to_string()),
        ("VMs", format!("at most {}", limits.max_vms)),
        ("vCPUs", format!("at most {} a VM", limits.max_cpus_per_vm)),
        ("guest memory", format!("at most {} a VM", ByteSize(limits.max_memory_bytes_per_vm))),
        ("version", host.version.clone()),
    ]);
    say!("\n{BOLD}What a VM gets{BOLD:#}");
    let rows = host.engines.iter().map(|choice| {
        let engine = if choice.possible { choice.engine().label() } else { "-" };
        [choice.nested().label().to_lowercase(), engine.to_lowercase(), choice.reason.clone()]
    });
    say!("{}", table(["NESTED", "ENGINE", "WHY"], rows));
}
