//! The nestd command line.

#[macro_use]
mod output;

mod args;
mod client;
mod commands;
mod demo;
mod error;
mod machine;

use std::process::ExitCode;

use anstream::eprintln;
use clap::Parser;
use nestd::config::Log;

use crate::{
    args::{Cli, Command},
    error::Failure,
    output::{BAD, HINT, Output},
};

fn main() -> ExitCode {
    let cli = Cli::parse();
    let output = cli.output;
    match run(cli) {
        Ok(code) => code,
        Err(failure) => {
            report(&failure, output);
            ExitCode::from(failure.exit)
        }
    }
}

fn run(cli: Cli) -> Result<ExitCode, Failure> {
    // An embedded daemon logs only for those who ask.
    if let Ok(filter) = std::env::var("NESTD_LOG") {
        let log = Log { filter, ..Log::default() };
        nestd::logging::init(&log).map_err(|e| Failure::new(format!("NESTD_LOG: {e}")))?;
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let result = runtime.block_on(dispatch(cli));
    // A read of standard input cannot be called off; do not wait for it.
    runtime.shutdown_background();
    result
}

async fn dispatch(cli: Cli) -> Result<ExitCode, Failure> {
    let (server, output) = (cli.server.as_ref(), cli.output);
    match cli.command {
        Command::Demo(args) => return demo::run(args, server, output).await,
        Command::Run(args) => return commands::run::run(args, server, output).await,
        Command::Vm(command) => commands::vm::run(command, server, output).await?,
        Command::Vcpu(command) => commands::vcpu::run(command, server, output).await?,
        Command::Vmcs12(args) => commands::vmcs12::run(args, server, output).await?,
        Command::Events(args) => commands::events::run(args, server, output).await?,
        Command::Host => commands::host::run(server, output).await?,
        Command::Completions { shell } => commands::generate::completions(shell),
        Command::Man { directory } => {
            commands::generate::man_pages(&directory)?;
            say!("man pages written to {}", directory.display());
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn report(failure: &Failure, output: Output) {
    if output == Output::Json {
        eprintln!("{}", failure.to_json());
        return;
    }
    eprintln!("{BAD}error:{BAD:#} {failure}");
    if let Some(hint) = &failure.hint {
        eprintln!("{HINT}hint:{HINT:#} {hint}");
    }
}
