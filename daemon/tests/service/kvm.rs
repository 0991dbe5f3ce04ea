//! The same service over the KVM engine, where the host has one.

use nestd_proto::v1;

use crate::rig::{Rig, guest, request_with};

fn has_kvm() -> bool {
    let there = std::fs::File::options().read(true).write(true).open("/dev/kvm").is_ok();
    if !there {
        println!("skipped: no /dev/kvm");
    }
    there
}

#[tokio::test]
async fn a_vm_without_nesting_runs_on_kvm_and_takes_init_and_sipi() {
    if !has_kvm() {
        return;
    }
    let rig = Rig::start().await;
    // The second processor starts at 0x7000: its code is the image's head, the first one's comes behind.
    let mut image = guest::HELLO.to_vec();
    image.extend(guest::SPIN);
    let mut request = request_with("a", &image, |spec| {
        spec.cpus = 2;
        spec.nested = v1::Nested::None as i32;
    });
    let entry_gpa = Some(0x7000 + guest::HELLO.len() as u64);
    let flat = v1::FlatBoot { image, load_gpa: 0x7000, entry_gpa };
    request.boot = Some(v1::Boot { kind: Some(v1::boot::Kind::Flat(flat)) });
    let vm = rig.vms().create(request).await.unwrap().into_inner();
    assert_eq!((vm.engine(), vm.spec.unwrap().clock()), (v1::Engine::Kvm, v1::Clock::Realtime));
    rig.start_vm("a").await;
    for (kind, vector) in [(v1::InjectionKind::Init, None), (v1::InjectionKind::Sipi, Some(0x07))] {
        let inject = v1::InjectRequest { vm: "a".into(), index: 1, kind: kind as i32, vector };
        let answer = rig.vcpus().inject(inject).await.unwrap().into_inner();
        assert!(answer.injection_id > 0 && answer.fate.is_some());
    }
    let vm = rig.ended("a").await;
    assert_eq!(vm.guest_exit.map(|e| e.code), Some(0x10), "{vm:?}");
    assert_eq!(rig.console("a", false).await, "hi\n");

    let get = v1::GetNestedStateRequest { vm: "a".into(), index: 0, fields: vec![] };
    let status = rig.nested().get(get).await.unwrap_err();
    assert_eq!(status.code(), tonic::Code::FailedPrecondition);
    rig.end().await;
}
