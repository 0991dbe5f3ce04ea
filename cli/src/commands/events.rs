//! `nestctl events`.

use anstream::eprintln;
use nestd::config::Listen;
use nestd_proto::{Label, v1};
use v1::stream_events_response::Item;

use crate::{
    args::EventsArgs,
    client::Client,
    error::Failure,
    output::{BOLD, Output, describe, guest_time},
};

pub async fn run(args: EventsArgs, server: Option<&Listen>, output: Output) -> Result<(), Failure> {
    let client = Client::connect(server).await?;
    let kinds = args.kind.iter().filter_map(|k| v1::EventKind::from_label(k)).map(i32::from);
    let filter = v1::EventFilter { kinds: kinds.collect(), vcpus: args.vcpu };
    let request =
        v1::StreamEventsRequest { vm: args.vm, since_sequence: args.since, filter: Some(filter), follow: args.follow };
    let mut stream = client.events().stream(request).await?.into_inner();
    if output == Output::Table {
        say!(
            "{BOLD}{:>8}  {:>18}  {:4}  {:5}  {:15}  {:13}  {:13}  WHAT{BOLD:#}",
            "SEQUENCE",
            "GUEST TIME",
            "VCPU",
            "LEVEL",
            "KIND",
            "MP_STATE",
            "ACTIVITY"
        );
    }
    while let Some(response) = stream.message().await? {
        match response.item {
            Some(Item::Event(event)) => output.show_line(&event, print)?,
            Some(Item::Gap(gap)) => output.show_line(&gap, |g| {
                eprintln!("{BOLD}-- {} events are gone; the next one is {} --{BOLD:#}", g.lost, g.next_sequence);
            })?,
            None => {}
        }
    }
    Ok(())
}

fn print(event: &v1::Event) {
    let cause = if event.cause_id == 0 { String::new() } else { format!(" <- {}", event.cause_id) };
    say!(
        "{:>8}  {:>18}  {:>4}  {:5}  {:15}  {:13}  {:13}  {}{cause}",
        event.sequence,
        guest_time(event.time_ns),
        event.vcpu.map_or_else(|| "-".into(), |n| n.to_string()),
        event.level().label(),
        event.kind().label(),
        state(event.mp_state()),
        state(event.activity_state()),
        describe(event),
    );
}

/// Events of the VM as a whole have none.
fn state<L: Label + Default + PartialEq>(state: L) -> &'static str {
    if state == L::default() { "-" } else { state.label() }
}
