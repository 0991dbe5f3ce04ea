//! `/metrics`, health and reflection.

use std::net::SocketAddr;

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};
use tonic_reflection::pb::v1::{
    ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
    server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
};

use crate::rig::{Rig, guest, in_time};

pub async fn scrape(address: SocketAddr) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let request = "GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    in_time(stream.read_to_string(&mut answer)).await.unwrap();
    answer
}

#[tokio::test]
async fn a_scrape_is_openmetrics_and_tells_of_vms_vcpus_and_requests() {
    let rig = Rig::start().await;
    rig.create("a", guest::HELLO).await;
    rig.start_vm("a").await;
    rig.ended("a").await;
    rig.get("gone").await.unwrap_err();
    let answer = scrape(rig.metrics).await;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 200"), "{head}");
    assert!(head.contains("application/openmetrics-text; version=1.0.0"), "{head}");
    assert!(body.trim_end().ends_with("# EOF"));
    for line in [
        "# TYPE nestd_vcpu_vm_exits counter",
        "# UNIT nestd_vcpu_thread_cpu_seconds seconds",
        "nestd_vms 1",
        "nestd_vm_state{vm=\"a\",state=\"stopped\"} 1",
        "nestd_vcpu_signals_total{vm=\"a\",vcpu=\"0\",kind=\"sipi\",fate=\"dropped\"} 0",
        "nestd_vcpu_activity_seconds_total{vm=\"a\",vcpu=\"0\",state=\"active\"}",
        "nestd_vcpu_thread_cpu_seconds_total{vm=\"a\",vcpu=\"0\"}",
        "nestd_requests_answered_total{service=\"nestd.v1.VmService\",method=\"Get\",code=\"NOT_FOUND\"} 1",
        "nestd_requests_latency_seconds_count{service=\"nestd.v1.VmService\",method=\"Create\"} 1",
    ] {
        assert!(body.contains(line), "{line} is not in:\n{body}");
    }
    let state = body.lines().find(|l| l.starts_with("nestd_vcpu_state{")).unwrap();
    for label in ["mp_state=\"runnable\"", "activity_state=\"active\"", "vmx_mode=\"off\"", "thread=\"stopped\""] {
        assert!(state.contains(label), "{state}");
    }
    let instructions = "nestd_vcpu_instructions_total{vm=\"a\",vcpu=\"0\"} ";
    let retired = body.lines().find_map(|l| l.strip_prefix(instructions)).unwrap();
    assert_ne!(retired, "0");
    rig.end().await;
}

#[tokio::test]
async fn health_says_serving_for_the_daemon_and_each_service() {
    let rig = Rig::start().await;
    let mut health = HealthClient::new(rig.channel.clone());
    for service in ["", "nestd.v1.VmService", "nestd.v1.EventService"] {
        let answer = health.check(HealthCheckRequest { service: service.into() }).await.unwrap().into_inner();
        assert_eq!(answer.status(), ServingStatus::Serving, "{service}");
    }
    let unknown = health.check(HealthCheckRequest { service: "other".into() }).await.unwrap_err();
    assert_eq!(unknown.code(), tonic::Code::NotFound);
    rig.end().await;
}

#[tokio::test]
async fn reflection_lists_the_services_and_gives_their_files() {
    let rig = Rig::start().await;
    let ask = async |message_request| {
        let request = ServerReflectionRequest { host: String::new(), message_request: Some(message_request) };
        let mut client = ServerReflectionClient::new(rig.channel.clone());
        let mut answers = client.server_reflection_info(tokio_stream::iter([request])).await.unwrap().into_inner();
        in_time(answers.message()).await.unwrap().unwrap().message_response.unwrap()
    };
    let MessageResponse::ListServicesResponse(list) = ask(MessageRequest::ListServices(String::new())).await else {
        panic!("not a list of services");
    };
    let names: Vec<_> = list.service.into_iter().map(|s| s.name).collect();
    for name in ["nestd.v1.VmService", "nestd.v1.NestedService", "grpc.health.v1.Health"] {
        assert!(names.iter().any(|n| n == name), "{name} is not in {names:?}");
    }
    let symbol = MessageRequest::FileContainingSymbol("nestd.v1.EventService".into());
    assert!(
        matches!(ask(symbol).await, MessageResponse::FileDescriptorResponse(f) if !f.file_descriptor_proto.is_empty())
    );
    rig.end().await;
}
