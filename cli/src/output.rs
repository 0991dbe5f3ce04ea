//! Tables for people, the proto's JSON mapping for programs.

use std::{
    fmt,
    io::{self, Write},
};

use clap::builder::styling::{AnsiColor, Style};
use comfy_table::{Cell, ContentArrangement, Table, presets};
use nestd_proto::{Label, json, v1};
use prost::{Message, Name};

use crate::error::{FAILED, Failure};

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Output {
    #[default]
    Table,
    Json,
}

pub const BOLD: Style = Style::new().bold();
pub const GOOD: Style = AnsiColor::Green.on_default().bold();
pub const BAD: Style = AnsiColor::Red.on_default().bold();
pub const HINT: Style = AnsiColor::Cyan.on_default();

/// Prints a line to standard output, like `println!`, but ends quietly when nobody reads any more (`| head`).
macro_rules! say {
    ($($part:tt)*) => {
        $crate::output::write_line(format_args!($($part)*))
    };
}

pub fn write_line(line: fmt::Arguments) {
    written(writeln!(anstream::stdout(), "{line}"));
}

/// Bytes as they are, at once.
pub fn write_bytes(bytes: &[u8]) {
    let mut stdout = io::stdout().lock();
    written(stdout.write_all(bytes).and_then(|()| stdout.flush()));
}

fn written(result: io::Result<()>) {
    if let Err(error) = result {
        let quiet = error.kind() == io::ErrorKind::BrokenPipe;
        if !quiet {
            anstream::eprintln!("cannot write to standard output: {error}");
        }
        std::process::exit(if quiet { 0 } else { FAILED.into() });
    }
}

impl Output {
    /// One object: indented JSON, or what `text` prints.
    pub fn show<M: Message + Name>(self, message: &M, text: impl FnOnce(&M)) -> Result<(), Failure> {
        match self {
            Self::Json => say!("{}", json::to_text(message)?),
            Self::Table => text(message),
        }
        Ok(())
    }

    /// One element of a stream: a line of JSON, or what `text` prints.
    pub fn show_line<M: Message + Name>(self, message: &M, text: impl FnOnce(&M)) -> Result<(), Failure> {
        match self {
            Self::Json => say!("{}", json::to_line(message)?),
            Self::Table => text(message),
        }
        Ok(())
    }
}

/// A table without lines, that a shell's tools can cut too.
pub fn table<const N: usize>(header: [&str; N], rows: impl IntoIterator<Item = [String; N]>) -> String {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(header.map(Cell::new));
    for row in rows {
        table.add_row(row);
    }
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    table.trim_fmt()
}

/// Name and value, one a line.
pub fn list<const N: usize>(rows: [(&str, String); N]) {
    let width = rows.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    for (name, value) in rows.iter().filter(|(_, value)| !value.is_empty()) {
        say!("{BOLD}{name:width$}{BOLD:#}  {value}");
    }
}

pub fn hex(value: u64) -> String {
    format!("{value:#x}")
}

pub fn opt_hex(value: Option<u64>) -> String {
    value.map_or_else(|| "-".into(), hex)
}

/// Host CPUs as Linux writes them: `0-3,8`.
pub fn cpu_list(cpus: &[u32]) -> String {
    let mut sorted = cpus.to_vec();
    sorted.sort_unstable();
    sorted.dedup();
    let runs = sorted.chunk_by(|a, b| a + 1 == *b).map(|run| match run {
        [first, .., last] => format!("{first}-{last}"),
        [one] => one.to_string(),
        [] => String::new(),
    });
    runs.collect::<Vec<_>>().join(",")
}

/// Guest time, in the unit that people read INIT and SIPI in.
pub fn guest_time(time_ns: u64) -> String {
    format!("{}.{:03} us", time_ns / 1000, time_ns % 1000)
}

/// `latched`, `VM exit 3`, `dropped (R4)`.
pub fn fate(fate: Option<&v1::Fate>) -> String {
    use v1::Disposition as D;
    let Some(fate) = fate else { return "unknown".into() };
    match fate.disposition() {
        D::VmExit => format!("VM exit {}", fate.exit_reason.unwrap_or_default()),
        D::Dropped if !fate.rule.is_empty() => format!("dropped ({})", fate.rule),
        D::Overwrote => format!("latched, replacing the one of cause {}", fate.overwrote_cause_id.unwrap_or_default()),
        D::AcceptedFateNotObservable => "accepted, fate not observable".into(),
        other => other.label().to_lowercase().replace('_', " "),
    }
}

/// One event in words.
pub fn describe(event: &v1::Event) -> String {
    use v1::event::Detail as D;
    let Some(detail) = &event.detail else { return event.kind().label().into() };
    match detail {
        D::IcrWrite(w) => match w.delivery_mode() {
            v1::DeliveryMode::Startup => {
                format!("writes ICR: SIPI, vector {:#04x}, to {} (id {})", w.vector, w.destination, w.id)
            }
            mode => format!("writes ICR: {} to {} (id {})", mode.label().replace('_', " "), w.destination, w.id),
        },
        D::Init(e) => format!("INIT {}", fate(e.fate.as_ref())),
        D::Sipi(e) => format!("SIPI, vector {:#04x}, {}", e.vector, fate(e.fate.as_ref())),
        D::Nmi(e) => format!("NMI {}", fate(e.fate.as_ref())),
        D::StateChange(c) => {
            let states = |mp: i32, activity: i32| {
                format!("{}/{}", v1::MpState::label_of(mp), v1::ActivityState::label_of(activity))
            };
            let from = states(c.from_mp_state, c.from_activity_state);
            format!("{from} -> {}", states(c.to_mp_state, c.to_activity_state))
        }
        D::VmxOn(e) => format!("VMXON, region {:#x}", e.region_gpa),
        D::VmxOff(_) => "VMXOFF".into(),
        D::VmEntry(e) => {
            let injected = if e.injected == 0 { String::new() } else { format!(", injects {:#x}", e.injected) };
            format!("VM entry, activity {}, RIP {:#x}{injected}", e.activity_state().label(), e.rip)
        }
        D::VmEntryFailed(e) => format!("VM entry failed: check {} ({})", e.check_id, e.check_name),
        D::VmExit(e) => {
            format!("VM exit {} ({}), qualification {:#x}, RIP {:#x}", e.reason, e.reason_name, e.qualification, e.rip)
        }
        D::VmxAbort(e) => format!("VMX abort, indicator {}", e.indicator),
        D::TripleFault(_) => "triple fault".into(),
        D::Reset(_) => "reset".into(),
        D::Injected(e) => match e.vector {
            Some(vector) => format!("client injects {}, vector {vector:#04x} (id {})", e.kind().label(), e.id),
            None => format!("client injects {} (id {})", e.kind().label(), e.id),
        },
        D::VmState(e) => format!("VM {}", e.change().label().to_lowercase()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_lists_read_as_linux_writes_them() {
        assert_eq!(cpu_list(&[3, 0, 1, 8]), "0-1,3,8");
        assert_eq!(cpu_list(&[]), "");
    }

    #[test]
    fn a_dropped_event_is_described_with_its_rule() {
        let dropped =
            v1::Fate { disposition: v1::Disposition::Dropped as i32, rule: "R4".into(), ..Default::default() };
        let event = v1::Event {
            detail: Some(v1::event::Detail::Sipi(v1::SipiEvent { vector: 0x9a, fate: Some(dropped) })),
            ..Default::default()
        };
        assert_eq!(describe(&event), "SIPI, vector 0x9a, dropped (R4)");
    }
}
