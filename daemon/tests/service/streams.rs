//! Streams: what they carry, and when they end.

use nestd_proto::v1::{self, stream_events_response::Item};

use crate::rig::{Rig, guest, in_time, request, request_with};

/// Sends SIPIs that nobody receives, by the x2APIC's ICR, 100,000 times, and then exits with 0.
const SIPI_STORM: &[u8] = &[
    0x66, 0xb9, 0x1b, 0x00, 0x00, 0x00, // mov ecx, IA32_APIC_BASE
    0x0f, 0x32, // rdmsr
    0x66, 0x0d, 0x00, 0x04, 0x00, 0x00, // or eax, EXTD
    0x0f, 0x30, // wrmsr
    0x66, 0xb9, 0x30, 0x08, 0x00, 0x00, // mov ecx, ICR
    0x66, 0xba, 0x07, 0x00, 0x00, 0x00, // mov edx, 7: no such APIC
    0x66, 0xb8, 0x10, 0x46, 0x00, 0x00, // mov eax, SIPI, vector 0x10
    0x66, 0xbb, 0xa0, 0x86, 0x01, 0x00, // mov ebx, 100000
    0x0f, 0x30, // wrmsr
    0x66, 0x4b, // dec ebx
    0x75, 0xfa, // jnz
    0xb0, 0x00, 0xe6, 0xf4, // out 0xf4, 0
    0xeb, 0xfe,
];

fn stream(vm: &str, follow: bool) -> v1::StreamEventsRequest {
    v1::StreamEventsRequest { vm: vm.into(), follow, ..Default::default() }
}

async fn all(mut stream: tonic::Streaming<v1::StreamEventsResponse>) -> (Vec<v1::Event>, Vec<v1::Gap>) {
    let (mut events, mut gaps) = (Vec::new(), Vec::new());
    while let Some(response) = in_time(stream.message()).await.unwrap() {
        match response.item.unwrap() {
            Item::Event(event) => events.push(event),
            Item::Gap(gap) => gaps.push(gap),
        }
    }
    (events, gaps)
}

#[tokio::test]
async fn a_watch_tells_each_state_and_ends_with_the_vm() {
    let rig = Rig::start().await;
    rig.create("a", guest::SPIN).await;
    let mut watch = rig.vms().watch(v1::WatchVmRequest { name: "a".into() }).await.unwrap().into_inner();
    let mut next = async || in_time(watch.message()).await.unwrap().map(|vm| vm.state());
    assert_eq!(next().await, Some(v1::VmState::Created));
    rig.start_vm("a").await;
    assert_eq!(next().await, Some(v1::VmState::Running));
    rig.vms().delete(v1::DeleteVmRequest { name: "a".into(), force: true }).await.unwrap();
    assert_eq!(next().await, Some(v1::VmState::Stopped));
    assert_eq!(next().await, None);
    rig.end().await;
}

#[tokio::test]
async fn followed_events_end_with_the_vm_and_can_be_read_on_from_any_place() {
    let rig = Rig::start().await;
    rig.create("a", guest::HELLO).await;
    let followed = rig.events().stream(stream("a", true)).await.unwrap().into_inner();
    rig.start_vm("a").await;
    let (events, gaps) = all(followed).await;
    assert!(gaps.is_empty());
    assert!(events.windows(2).all(|w| w[0].sequence < w[1].sequence));
    let changes: Vec<_> = events
        .iter()
        .filter_map(|e| match &e.detail {
            Some(v1::event::Detail::VmState(change)) => Some(change.change()),
            _ => None,
        })
        .collect();
    assert_eq!(changes, [v1::VmChange::Started, v1::VmChange::Stopped]);

    let since = events[0].sequence;
    let rest = v1::StreamEventsRequest { since_sequence: since, ..stream("a", false) };
    let (rest, _) = all(rig.events().stream(rest).await.unwrap().into_inner()).await;
    assert_eq!(rest, events[1..]);

    let filter = v1::EventFilter { kinds: vec![v1::EventKind::VmState as i32], vcpus: vec![] };
    let filtered = v1::StreamEventsRequest { filter: Some(filter), ..stream("a", false) };
    let (filtered, _) = all(rig.events().stream(filtered).await.unwrap().into_inner()).await;
    assert_eq!(filtered.len(), 2);
    rig.end().await;
}

#[tokio::test]
async fn frequent_exits_are_recorded_only_while_a_stream_names_their_kind() {
    let rig = Rig::start().await;
    for (name, kinds) in [("named", vec![v1::EventKind::VmExit as i32]), ("not-named", vec![])] {
        let mut create = request_with(name, guest::SPIN, |spec| {
            spec.cpus = 2;
            spec.memory_bytes = 64 << 20;
        });
        let module = v1::BootModule { image: nestd_guests::l2().into(), append: String::new() };
        let l1 = nestd_guests::l1(nestd_guests::L1::Demo).into();
        let kernel = v1::KernelBoot { image: l1, append: String::new(), modules: vec![module] };
        create.boot = Some(v1::Boot { kind: Some(v1::boot::Kind::Kernel(kernel)) });
        rig.vms().create(create).await.unwrap();
        let filter = v1::EventFilter { kinds, vcpus: vec![] };
        let request = v1::StreamEventsRequest { filter: Some(filter), ..stream(name, true) };
        let followed = rig.events().stream(request).await.unwrap().into_inner();
        rig.start_vm(name).await;
        let (events, _) = all(followed).await;
        let reasons: Vec<u32> = events
            .iter()
            .filter_map(|e| match &e.detail {
                Some(v1::event::Detail::VmExit(exit)) => Some(exit.reason),
                _ => None,
            })
            .collect();
        // INIT and SIPI always are; CPUID is frequent.
        assert!(reasons.contains(&3) && reasons.contains(&4), "{name}: {reasons:?}");
        assert_eq!(reasons.contains(&10), name == "named", "{name}: {reasons:?}");
    }
    rig.end().await;
}

#[tokio::test]
async fn a_slow_reader_sees_a_gap_with_its_count_and_the_vm_does_not_wait() {
    let rig = Rig::start().await;
    rig.vms().create(request("a", SIPI_STORM)).await.unwrap();
    // Opened before the storm and not read until it is over.
    let slow = rig.events().stream(stream("a", true)).await.unwrap().into_inner();
    rig.start_vm("a").await;
    assert_eq!(rig.ended("a").await.guest_exit.unwrap().code, 0);
    let (events, gaps) = all(slow).await;
    assert!(!gaps.is_empty() && gaps.iter().all(|gap| gap.signals_lost), "{gaps:?}");
    let lost: u64 = gaps.iter().map(|gap| gap.lost).sum();
    // Every place in the order is accounted for.
    assert_eq!(events.len() as u64 + lost, events.last().unwrap().sequence);
    assert!(lost > 0 && events.len() as u64 + lost >= 100_000);
    rig.end().await;
}

#[tokio::test]
async fn streams_end_when_the_daemon_does() {
    let mut rig = Rig::start().await;
    rig.create("a", guest::SPIN).await;
    rig.start_vm("a").await;
    let events = rig.events().stream(stream("a", true)).await.unwrap().into_inner();
    let console = v1::ReadConsoleRequest { name: "a".into(), offset: 0, follow: true };
    let mut console = rig.vms().read_console(console).await.unwrap().into_inner();
    rig.tell_to_end();
    let (events, _) = all(events).await;
    assert_eq!(events.last().map(v1::Event::kind), Some(v1::EventKind::VmState));
    assert!(in_time(console.message()).await.unwrap().is_none());
    rig.end().await;
}
