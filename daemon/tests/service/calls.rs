//! Refused calls: the status code, and what its details name.

use std::time::Duration;

use nestd::units::ByteSize;
use nestd_proto::v1;
use tonic::{Code, Status};
use tonic_types::StatusExt;

use crate::rig::{Rig, guest, refusal, request, request_with};

#[tokio::test]
async fn what_does_not_exist_is_not_found_in_every_service() {
    let rig = Rig::start().await;
    rig.create("a", guest::SPIN).await;
    let name = || "gone".to_owned();
    let statuses: [Status; 9] = [
        rig.get("gone").await.unwrap_err(),
        rig.vms().start(v1::StartVmRequest { name: name() }).await.unwrap_err(),
        rig.vms().delete(v1::DeleteVmRequest { name: name(), force: true }).await.unwrap_err(),
        rig.vms().watch(v1::WatchVmRequest { name: name() }).await.unwrap_err(),
        rig.vms().read_console(v1::ReadConsoleRequest { name: name(), ..Default::default() }).await.unwrap_err(),
        rig.vcpus().list(v1::ListVcpusRequest { vm: name() }).await.unwrap_err(),
        rig.nested().get(v1::GetNestedStateRequest { vm: name(), ..Default::default() }).await.unwrap_err(),
        rig.events().stream(v1::StreamEventsRequest { vm: name(), ..Default::default() }).await.unwrap_err(),
        rig.vcpu("gone", 0, true).await.unwrap_err(),
    ];
    for status in &statuses {
        assert_eq!(refusal(status, "vm"), (Code::NotFound, "NO_SUCH_VM".into(), "gone".into()));
    }
    for fresh in [false, true] {
        let status = rig.vcpu("a", 1, fresh).await.unwrap_err();
        assert_eq!(refusal(&status, "vcpu"), (Code::NotFound, "NO_SUCH_VCPU".into(), "1".into()));
    }
    rig.end().await;
}

#[tokio::test]
async fn a_name_in_use_is_already_exists() {
    let rig = Rig::start().await;
    rig.create("a", guest::SPIN).await;
    let status = rig.vms().create(request("a", guest::SPIN)).await.unwrap_err();
    assert_eq!(refusal(&status, "vm"), (Code::AlreadyExists, "NAME_TAKEN".into(), "a".into()));
    rig.end().await;
}

#[tokio::test]
async fn a_wrong_value_is_invalid_argument_and_names_its_field() {
    let rig = Rig::start().await;
    type Change = fn(&mut v1::CreateVmRequest);
    let wrong: [(&str, Change); 8] = [
        ("name", |r| r.name = "a b".into()),
        ("cpus", |r| r.spec.as_mut().unwrap().cpus = 1000),
        ("memory_bytes", |r| r.spec.as_mut().unwrap().memory_bytes = 5),
        ("nested", |r| r.spec.as_mut().unwrap().nested = 99),
        ("clock", |r| r.spec.as_mut().unwrap().clock = -1),
        ("pin", |r| r.spec.as_mut().unwrap().pin = vec![v1::CpuList { cpus: vec![4000] }]),
        ("cpu_model", |r| r.spec.as_mut().unwrap().cpu_model = "i486".into()),
        ("boot.image", |r| *r = request("a", &[])),
    ];
    for (field, change) in wrong {
        let mut request = request("a", guest::SPIN);
        change(&mut request);
        let status = rig.vms().create(request).await.unwrap_err();
        assert_eq!(refusal(&status, "field"), (Code::InvalidArgument, "FIELD".into(), field.into()));
        let violation = status.get_details_bad_request().unwrap().field_violations.remove(0);
        assert_eq!(violation.field, field);
        assert!(status.message().contains(field), "{}", status.message());
    }

    rig.create("a", guest::SPIN).await;
    let inject = |kind: i32, vector| v1::InjectRequest { vm: "a".into(), index: 0, kind, vector };
    for (field, request) in [
        ("kind", inject(0, None)),
        ("vector", inject(v1::InjectionKind::Sipi as i32, None)),
        ("vector", inject(v1::InjectionKind::Sipi as i32, Some(256))),
        ("vector", inject(v1::InjectionKind::Init as i32, Some(1))),
    ] {
        let status = rig.vcpus().inject(request).await.unwrap_err();
        assert_eq!(refusal(&status, "field"), (Code::InvalidArgument, "FIELD".into(), field.into()));
    }
    let timeout = |seconds| v1::GetVcpuRequest {
        vm: "a".into(),
        index: 0,
        fresh: true,
        timeout: Some(prost_types::Duration { seconds, nanos: 0 }),
    };
    let status = rig.vcpus().get(timeout(-1)).await.unwrap_err();
    assert_eq!(refusal(&status, "field"), (Code::InvalidArgument, "FIELD".into(), "timeout".into()));
    // Longer than any clock runs: cut to what the daemon allows.
    rig.vcpus().get(timeout(i64::MAX)).await.unwrap();
    let set = v1::SetAffinityRequest { vm: "a".into(), index: 0, host_cpus: vec![4000] };
    let status = rig.vcpus().set_affinity(set).await.unwrap_err();
    assert_eq!(refusal(&status, "field"), (Code::InvalidArgument, "FIELD".into(), "host_cpus".into()));
    let filter = v1::EventFilter { kinds: vec![999], vcpus: vec![] };
    let stream = v1::StreamEventsRequest { vm: "a".into(), filter: Some(filter), ..Default::default() };
    let status = rig.events().stream(stream).await.unwrap_err();
    assert_eq!(refusal(&status, "field").2, "filter.kinds");
    let get = v1::GetNestedStateRequest { vm: "a".into(), index: 0, fields: vec!["guest_ripp".into()] };
    let status = rig.nested().get(get).await.unwrap_err();
    assert_eq!(refusal(&status, "field"), (Code::InvalidArgument, "FIELD".into(), "fields".into()));
    rig.end().await;
}

#[tokio::test]
async fn a_call_in_the_wrong_state_is_failed_precondition_and_names_the_state() {
    let rig = Rig::start().await;
    rig.create("a", guest::SPIN).await;
    let name = || "a".to_owned();
    let wrong = |state: &str| (Code::FailedPrecondition, "WRONG_STATE".to_owned(), state.to_owned());
    let mut vms = rig.vms();
    assert_eq!(refusal(&vms.pause(v1::PauseVmRequest { name: name() }).await.unwrap_err(), "state"), wrong("created"));
    rig.start_vm("a").await;
    assert_eq!(refusal(&vms.start(v1::StartVmRequest { name: name() }).await.unwrap_err(), "state"), wrong("running"));
    assert_eq!(
        refusal(&vms.resume(v1::ResumeVmRequest { name: name() }).await.unwrap_err(), "state"),
        wrong("running")
    );
    let delete = v1::DeleteVmRequest { name: name(), force: false };
    assert_eq!(refusal(&vms.delete(delete).await.unwrap_err(), "state"), wrong("running"));
    rig.stop_vm("a").await.unwrap();
    let status = rig.stop_vm("a").await.unwrap_err();
    assert_eq!(refusal(&status, "state"), wrong("stopped"));
    assert!(status.message().contains("stopped") && !refusal(&status, "hint").2.is_empty());
    let write = v1::WriteConsoleRequest { name: name(), data: b"x".to_vec() };
    assert_eq!(refusal(&vms.write_console(write).await.unwrap_err(), "state"), wrong("stopped"));
    let inject = v1::InjectRequest { vm: name(), index: 0, kind: v1::InjectionKind::Nmi as i32, vector: None };
    assert_eq!(refusal(&rig.vcpus().inject(inject).await.unwrap_err(), "state"), wrong("stopped"));
    rig.end().await;
}

#[tokio::test]
async fn nesting_that_the_host_lacks_is_refused_with_what_is_missing_and_an_alternative() {
    let rig = Rig::start().await;
    let host = rig.host().preflight(v1::PreflightRequest {}).await.unwrap().into_inner();
    assert_eq!(host.engines.len(), 4);
    let kernel = host.engines.iter().find(|e| e.nested() == v1::Nested::Kernel).unwrap();
    if kernel.possible {
        println!("skipped: this host nests");
        return;
    }
    let kernel = request_with("a", guest::SPIN, |spec| spec.nested = v1::Nested::Kernel as i32);
    let status = rig.vms().create(kernel).await.unwrap_err();
    let (code, reason, alternative) = refusal(&status, "alternative");
    assert_eq!((code, reason.as_str(), alternative.as_str()), (Code::FailedPrecondition, "PREFLIGHT", "emulated"));
    assert!(!refusal(&status, "missing").2.is_empty());
    // The refused name is free.
    rig.create("a", guest::SPIN).await;
    rig.end().await;
}

#[tokio::test]
async fn past_a_limit_is_resource_exhausted_with_the_limits_name() {
    let rig = Rig::with(|config| {
        config.limits.max_vms = 2;
        config.limits.max_cpus_per_vm = 2;
        config.limits.max_memory_per_vm = ByteSize(8 << 20);
        config.limits.max_memory = ByteSize(9 << 20);
        config.limits.max_image = ByteSize(4096);
    })
    .await;
    let create = async |request| match rig.vms().create(request).await {
        Ok(_) => "created".to_owned(),
        Err(status) => {
            assert_eq!(status.code(), Code::ResourceExhausted);
            refusal(&status, "limit").2
        }
    };
    assert_eq!(create(request_with("a", guest::SPIN, |s| s.cpus = 3)).await, "max_cpus_per_vm");
    assert_eq!(create(request_with("a", guest::SPIN, |s| s.memory_bytes = 16 << 20)).await, "max_memory_per_vm");
    assert_eq!(create(request("a", &[0x90; 5000])).await, "max_image");
    assert_eq!(create(request_with("a", guest::SPIN, |s| s.memory_bytes = 6 << 20)).await, "created");
    assert_eq!(create(request_with("b", guest::SPIN, |s| s.memory_bytes = 4 << 20)).await, "max_memory");
    assert_eq!(create(request("b", guest::SPIN)).await, "created");
    rig.vms().delete(v1::DeleteVmRequest { name: "b".into(), force: false }).await.unwrap();
    assert_eq!(create(request("b", guest::SPIN)).await, "created");
    assert_eq!(create(request("c", guest::SPIN)).await, "max_vms");
    rig.end().await;
}

#[tokio::test]
async fn a_call_that_outlives_the_daemons_limit_is_deadline_exceeded() {
    let rig = Rig::with(|config| config.timeouts.unary = Duration::ZERO).await;
    let status = rig.vms().create(request("a", guest::SPIN)).await.unwrap_err();
    assert_eq!(status.code(), Code::DeadlineExceeded);
    rig.end().await;
}

#[tokio::test]
async fn what_reads_only_is_legal_in_every_state() {
    let rig = Rig::start().await;
    rig.create("a", guest::SPIN).await;
    for state in ["created", "running", "stopped"] {
        match state {
            "running" => drop(rig.start_vm("a").await),
            "stopped" => drop(rig.stop_vm("a").await.unwrap()),
            _ => {}
        }
        for fresh in [false, true] {
            rig.vcpu("a", 0, fresh).await.unwrap();
        }
        let get = v1::GetRegistersRequest { vm: "a".into(), index: 0 };
        let registers = rig.vcpus().get_registers(get).await.unwrap().into_inner();
        assert!(registers.cs.is_some() && registers.dr.len() == 8, "{state}");
        let get = v1::GetNestedStateRequest { vm: "a".into(), index: 0, fields: vec![] };
        let nested = rig.nested().get(get).await.unwrap().into_inner();
        assert_eq!((nested.vmx_mode(), nested.fields.len()), (v1::VmxMode::Off, 0), "{state}");
    }
    rig.end().await;
}
