//! The nestd daemon.

use std::path::PathBuf;

use clap::Parser;
use nestd::{
    Daemon, Socket,
    config::{Config, Listen, LogFormat, Metrics},
    logging,
};
use tokio::signal::unix::{SignalKind, signal};

/// Hosts virtual machines for people who write, test and run hypervisors.
///
/// It needs no configuration: nestctl finds it where it listens by default. SIGTERM and SIGINT stop its VMs and end it.
#[derive(Debug, Parser)]
#[command(name = "nestd", version, max_term_width = 100)]
struct Args {
    /// Configuration, in TOML. Flags go before it.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Where gRPC is served. Default: nestd/nestd.sock in the user's runtime directory, /run/nestd/nestd.sock for root.
    #[arg(long, value_name = "unix:PATH")]
    listen: Option<Listen>,
    /// Where /metrics is served: a loopback address with a port (0: any), or off. Default: 127.0.0.1:9641.
    #[arg(long, value_name = "127.0.0.1:PORT")]
    metrics: Option<Metrics>,
    /// Where dumps of failed VMs are written. Default: nestd in the user's state directory, /var/lib/nestd for root.
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// Logs for people or for programs, on standard error.
    #[arg(long, value_enum, value_name = "FORMAT")]
    log_format: Option<LogFormat>,
    /// Which logs: a level, or target=level pairs.
    #[arg(long, value_name = "FILTER", env = "NESTD_LOG")]
    log: Option<String>,
}

impl Args {
    fn into_config(self) -> anyhow::Result<Config> {
        let mut config = self.config.as_deref().map(Config::read).transpose()?.unwrap_or_default();
        config.listen = self.listen.unwrap_or(config.listen);
        config.metrics = self.metrics.unwrap_or(config.metrics);
        config.state_dir = self.state_dir.unwrap_or(config.state_dir);
        config.log.format = self.log_format.unwrap_or(config.log.format);
        config.log.filter = self.log.unwrap_or(config.log.filter);
        Ok(config)
    }
}

fn main() -> anyhow::Result<()> {
    let config = Args::parse().into_config()?;
    logging::init(&config.log)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        let end = terminated()?;
        let socket = Socket::bind(&config.listen.0).await?;
        let mut daemon = Daemon::new(config);
        if let Some(address) = daemon.bind_metrics().await? {
            tracing::info!(url = format!("http://{address}/metrics"), "metrics");
        }
        daemon.serve(socket, end).await?;
        Ok(())
    })
}

/// Resolves at SIGTERM or SIGINT. From this call on they no longer kill the process.
fn terminated() -> std::io::Result<impl Future<Output = ()>> {
    let mut term = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    Ok(async move {
        let name = tokio::select! {
            _ = term.recv() => "SIGTERM",
            _ = interrupt.recv() => "SIGINT",
        };
        tracing::info!(signal = name, "told to end");
    })
}
