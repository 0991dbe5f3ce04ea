//! What VMs do when they are told.

use nestd_proto::v1::{self, VmState};
use tonic::Code;

use crate::rig::{Rig, guest, in_time, request_with};

#[tokio::test]
async fn a_vm_is_created_listed_started_and_ends_with_its_guests_value() {
    let rig = Rig::start().await;
    let vm = rig.create("a", guest::HELLO).await;
    assert_eq!((vm.state(), vm.engine()), (VmState::Created, v1::Engine::Emulated));
    assert!(!vm.engine_reason.is_empty() && vm.boot.contains("0x7c00") && vm.create_time.is_some());
    let spec = vm.spec.unwrap();
    assert_eq!((spec.clock(), spec.cpu_model.is_empty()), (v1::Clock::Virtual, false));
    rig.create("b", guest::SPIN).await;
    let list = rig.vms().list(v1::ListVmsRequest {}).await.unwrap().into_inner();
    assert_eq!(list.vms.iter().map(|vm| vm.name.as_str()).collect::<Vec<_>>(), ["a", "b"]);

    rig.start_vm("a").await;
    let vm = rig.ended("a").await;
    assert_eq!((vm.state(), vm.guest_exit.unwrap().code), (VmState::Stopped, 0x10));
    assert_eq!(rig.console("a", false).await, "hi\n");
    rig.vms().delete(v1::DeleteVmRequest { name: "a".into(), force: false }).await.unwrap();
    assert_eq!(rig.get("a").await.unwrap_err().code(), Code::NotFound);
    // The name is free again.
    rig.create("a", guest::HELLO).await;
    rig.end().await;
}

#[tokio::test]
async fn pause_stands_still_resume_goes_on_and_reset_boots_again() {
    let rig = Rig::start().await;
    rig.create("a", guest::SPIN).await;
    rig.start_vm("a").await;
    let name = || "a".to_owned();
    let vm = rig.vms().pause(v1::PauseVmRequest { name: name() }).await.unwrap().into_inner();
    assert_eq!(vm.state(), VmState::Paused);
    let first = rig.vcpu("a", 0, true).await.unwrap();
    let second = rig.vcpu("a", 0, true).await.unwrap();
    assert_eq!((first.rip, first.instructions), (second.rip, second.instructions));
    let vm = rig.vms().resume(v1::ResumeVmRequest { name: name() }).await.unwrap().into_inner();
    assert_eq!(vm.state(), VmState::Running);
    let vm = rig.vms().reset(v1::ResetVmRequest { name: name() }).await.unwrap().into_inner();
    assert_eq!(vm.state(), VmState::Running);
    assert_eq!(rig.stop_vm("a").await.unwrap().state(), VmState::Stopped);
    // Its state stays readable.
    assert_eq!(rig.vcpu("a", 0, false).await.unwrap().thread_state, "stopped");
    rig.end().await;
}

#[tokio::test]
async fn console_input_reaches_the_guest_and_the_follower_sees_the_answer() {
    let rig = Rig::start().await;
    rig.create("a", guest::ECHO).await;
    rig.start_vm("a").await;
    let write = v1::WriteConsoleRequest { name: "a".into(), data: b"ping q".to_vec() };
    assert_eq!(rig.vms().write_console(write).await.unwrap().into_inner().written_bytes, 6);
    assert_eq!(rig.console("a", true).await, "ping q");
    assert_eq!(rig.get("a").await.unwrap().guest_exit.unwrap().code, 0);
    rig.end().await;
}

#[tokio::test]
async fn vcpus_are_pinned_as_the_spec_says_and_as_they_are_told_later() {
    let rig = Rig::start().await;
    let host = rig.host().preflight(v1::PreflightRequest {}).await.unwrap().into_inner();
    let (first, last) = (host.cpus[0], *host.cpus.last().unwrap());
    let pinned = request_with("a", guest::SPIN, |spec| {
        spec.cpus = 2;
        spec.pin = vec![v1::CpuList { cpus: vec![first] }, v1::CpuList { cpus: vec![last] }];
    });
    rig.vms().create(pinned).await.unwrap();
    rig.start_vm("a").await;
    let vcpus = rig.vcpus().list(v1::ListVcpusRequest { vm: "a".into() }).await.unwrap().into_inner().vcpus;
    assert_eq!(vcpus.iter().map(|v| v.host_cpus.clone()).collect::<Vec<_>>(), [vec![first], vec![last]]);
    let allowed = |tid: u32| {
        let status = std::fs::read_to_string(format!("/proc/self/task/{tid}/status")).unwrap();
        status.lines().find_map(|l| l.strip_prefix("Cpus_allowed_list:")).unwrap().trim().to_owned()
    };
    assert_eq!(allowed(rig.vcpu("a", 1, true).await.unwrap().thread_id), last.to_string());
    let set = v1::SetAffinityRequest { vm: "a".into(), index: 1, host_cpus: vec![first] };
    let vcpu = rig.vcpus().set_affinity(set).await.unwrap().into_inner();
    assert_eq!(vcpu.host_cpus, [first]);
    assert_eq!(allowed(vcpu.thread_id), first.to_string());
    rig.end().await;
}

#[tokio::test]
async fn an_injected_init_and_sipi_start_the_second_processor() {
    let rig = Rig::start().await;
    // The second processor starts at 0x7000: its code is the image's head, the first one's comes behind.
    let mut image = guest::HELLO.to_vec();
    image.extend(guest::SLEEP);
    let mut request = request_with("a", &image, |spec| spec.cpus = 2);
    let entry_gpa = Some(0x7000 + guest::HELLO.len() as u64);
    let flat = v1::FlatBoot { image, load_gpa: 0x7000, entry_gpa };
    request.boot = Some(v1::Boot { kind: Some(v1::boot::Kind::Flat(flat)) });
    rig.vms().create(request).await.unwrap();
    rig.start_vm("a").await;
    let inject =
        |kind: v1::InjectionKind, vector| v1::InjectRequest { vm: "a".into(), index: 1, kind: kind as i32, vector };
    // R2: a processor in wait-for-SIPI drops INIT.
    let init = rig.vcpus().inject(inject(v1::InjectionKind::Init, None)).await.unwrap().into_inner();
    let fate = init.fate.unwrap();
    assert_eq!((fate.disposition(), fate.rule.as_str()), (v1::Disposition::Dropped, "R2"));
    let sipi = rig.vcpus().inject(inject(v1::InjectionKind::Sipi, Some(0x07))).await.unwrap().into_inner();
    assert_eq!(sipi.fate.unwrap().disposition(), v1::Disposition::Started);
    assert_eq!(in_time(rig.ended("a")).await.guest_exit.unwrap().code, 0x10);
    assert_eq!(rig.console("a", false).await, "hi\n");

    let request = v1::StreamEventsRequest { vm: "a".into(), ..Default::default() };
    let mut stream = rig.events().stream(request).await.unwrap().into_inner();
    let mut started = None;
    while let Some(response) = in_time(stream.message()).await.unwrap() {
        if let Some(v1::stream_events_response::Item::Event(e)) = response.item
            && e.kind() == v1::EventKind::VcpuStarted
        {
            started = Some(e);
        }
    }
    let started = started.expect("VCPU_STARTED is recorded");
    assert_eq!((started.vcpu, started.cause_id), (Some(1), sipi.injection_id));
    rig.end().await;
}

#[tokio::test]
async fn one_vm_that_crashes_leaves_the_others_alone() {
    let rig = Rig::start().await;
    rig.create("good", guest::ECHO).await;
    rig.start_vm("good").await;
    rig.create("bad", guest::TRIPLE_FAULT).await;
    rig.start_vm("bad").await;
    let bad = rig.ended("bad").await;
    assert_eq!(bad.state(), VmState::Failed);
    let failure = bad.failure.unwrap();
    assert!(!failure.reason.is_empty() && failure.dump.contains("rip"), "{failure:?}");
    let write = v1::WriteConsoleRequest { name: "good".into(), data: b"q".to_vec() };
    rig.vms().write_console(write).await.unwrap();
    assert_eq!(rig.ended("good").await.guest_exit.unwrap().code, 0);
    rig.end().await;
}
