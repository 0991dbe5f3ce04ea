//! The gRPC services: the only place of the daemon that knows tonic.
//!
//! A handler turns its request into typed values, asks the VM, and turns the answer back; what can wait for a vCPU
//! runs on a thread of its own.

mod convert;
mod events;
mod host;
mod layer;
pub mod names;
mod nested;
mod status;
mod stream;
mod vcpu;
mod vm;

use std::{error::Error as StdError, future::Future, sync::Arc};

use nestd_proto::{
    DESCRIPTORS,
    v1::{
        event_service_server::EventServiceServer, host_service_server::HostServiceServer,
        nested_service_server::NestedServiceServer, vcpu_service_server::VcpuServiceServer,
        vm_service_server::VmServiceServer,
    },
};
use tokio::{net::UnixListener, sync::watch};
use tokio_stream::wrappers::UnixListenerStream;
use tonic::{Status, service::Routes, transport::Server};
use tonic_health::{ServingStatus, server::HealthReporter};

use crate::{config::Timeouts, error::Error, metrics::RequestMetrics, registry::Registry};

pub use layer::code_name;

/// Room in a message beside the images that it carries.
const MESSAGE_OVERHEAD: usize = 16 << 20;

/// What every service works on.
#[derive(Clone)]
pub struct Api {
    pub registry: Arc<Registry>,
    /// Becomes true when streams shall end.
    pub closed: watch::Receiver<bool>,
}

/// Runs what may wait for a vCPU or the host, off the threads that serve.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T, Error> + Send + 'static) -> Result<T, Status> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result.map_err(Status::from),
        Err(error) => {
            tracing::error!(%error, "a call panicked");
            Err(Status::internal("the daemon failed; its log says more"))
        }
    }
}

/// The services whose health is told, by the names that health checks use; the empty one is the whole daemon.
const SERVICES: [&str; 6] = [
    "",
    "nestd.v1.VmService",
    "nestd.v1.VcpuService",
    "nestd.v1.NestedService",
    "nestd.v1.EventService",
    "nestd.v1.HostService",
];

pub struct Health(HealthReporter);

impl Health {
    pub async fn not_serving(&self) {
        for service in SERVICES {
            self.0.set_service_status(service, ServingStatus::NotServing).await;
        }
    }
}

/// Says SERVING from the start, since whoever can ask can also call.
pub async fn health() -> (Health, Routes) {
    let (reporter, service) = tonic_health::server::health_reporter();
    for name in SERVICES {
        reporter.set_service_status(name, ServingStatus::Serving).await;
    }
    (Health(reporter), Routes::new(service))
}

/// Serves until `end`, then until open calls are done.
pub async fn serve(
    listener: UnixListener,
    api: Api,
    health: Routes,
    requests: Arc<RequestMetrics>,
    timeouts: Timeouts,
    end: impl Future<Output = ()>,
) -> Result<(), Box<dyn StdError + Send + Sync>> {
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(DESCRIPTORS)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1()?;
    let max_message = usize::try_from(api.registry.limits.max_image.0).unwrap_or(usize::MAX);
    let vms = VmServiceServer::new(api.clone()).max_decoding_message_size(max_message.saturating_add(MESSAGE_OVERHEAD));
    let routes = health
        .add_service(reflection)
        .add_service(vms)
        .add_service(VcpuServiceServer::new(api.clone()))
        .add_service(NestedServiceServer::new(api.clone()))
        .add_service(EventServiceServer::new(api.clone()))
        .add_service(HostServiceServer::new(api));
    Server::builder()
        .layer(layer::Calls { metrics: requests, longest: timeouts.unary })
        .http2_keepalive_interval(Some(timeouts.keepalive))
        .http2_keepalive_timeout(Some(timeouts.keepalive))
        .add_routes(routes)
        .serve_with_incoming_shutdown(UnixListenerStream::new(listener), end)
        .await?;
    Ok(())
}
