//! Completions and man pages, from the command line's own definition.

use std::{io, path::Path};

use clap::CommandFactory;

use crate::{args::Cli, error::Failure, output::write_bytes};

pub fn completions(shell: clap_complete::Shell) {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "nestctl", &mut script);
    write_bytes(&script);
}

pub fn man_pages(directory: &Path) -> Result<(), Failure> {
    let failed = |e: io::Error| Failure::new(format!("cannot write man pages to {}: {e}", directory.display()));
    std::fs::create_dir_all(directory).map_err(failed)?;
    clap_mangen::generate_to(Cli::command(), directory).map_err(failed)
}
