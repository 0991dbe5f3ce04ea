//! The daemon as a library: what the binary runs, and what nestctl embeds.

use std::{future::Future, net::SocketAddr, sync::Arc, time::Duration};

use prometheus_client::registry::Registry as MetricsRegistry;
use tokio::{net::TcpListener, sync::watch, time::Instant};

use crate::{
    api,
    config::{Config, Metrics},
    metrics::{self, RequestMetrics},
    registry::Registry,
    socket::Socket,
};

#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    #[error("cannot serve metrics on {address}; name another address with --metrics, or off")]
    Metrics { address: SocketAddr, source: std::io::Error },
    #[error("the gRPC server failed")]
    Grpc(#[source] Box<dyn std::error::Error + Send + Sync>),
}

pub struct Daemon {
    config: Config,
    registry: Arc<Registry>,
    requests: Arc<RequestMetrics>,
    metrics: Arc<MetricsRegistry>,
    metrics_listener: Option<TcpListener>,
}

impl Daemon {
    pub fn new(config: Config) -> Self {
        let registry = Arc::new(Registry::new(config.limits, config.state_dir.clone()));
        let mut metrics = MetricsRegistry::default();
        let requests = RequestMetrics::register(&mut metrics);
        metrics.register_collector(Box::new(metrics::VmCollector(registry.clone())));
        Self { config, registry, requests, metrics: Arc::new(metrics), metrics_listener: None }
    }

    /// Listens where the configuration wants metrics served. Separate from `serve`, so that a caller that asked
    /// for any port learns which one it got.
    pub async fn bind_metrics(&mut self) -> Result<Option<SocketAddr>, ServeError> {
        let Metrics(Some(address)) = self.config.metrics else { return Ok(None) };
        let failed = |source| ServeError::Metrics { address, source };
        let listener = TcpListener::bind(address).await.map_err(failed)?;
        let bound = listener.local_addr().map_err(failed)?;
        self.metrics_listener = Some(listener);
        Ok(Some(bound))
    }

    /// Serves until `end` resolves; then stops the VMs, lets calls finish, and returns.
    pub async fn serve(mut self, socket: Socket, end: impl Future<Output = ()> + Send) -> Result<(), ServeError> {
        tracing::info!(listen = %socket.path().display(), "nestd {} serves", env!("CARGO_PKG_VERSION"));
        let (closing, closed) = watch::channel(false);
        let (listener, socket_file) = socket.into_parts();
        let scrape = self.metrics_listener.take().map(|listener| {
            let closed = closed.clone();
            tokio::spawn(metrics::serve(listener, self.metrics.clone(), until_true(closed)))
        });
        let api = api::Api { registry: self.registry.clone(), closed: closed.clone() };
        let (health, service) = api::health().await;
        let server =
            api::serve(listener, api, service, self.requests.clone(), self.config.timeouts, until_true(closed));
        let mut server = tokio::spawn(server);

        let ended_early = tokio::select! {
            result = &mut server => Some(result),
            () = end => None,
        };
        let deadline = Instant::now() + self.config.timeouts.drain;
        health.not_serving().await;
        self.stop_vms(deadline).await;
        let _ = closing.send(true);
        let result = match ended_early {
            Some(result) => result,
            None => match tokio::time::timeout_at(deadline.max(Instant::now() + Duration::from_secs(1)), &mut server)
                .await
            {
                Ok(result) => result,
                Err(_) => {
                    tracing::warn!("calls are still open; their connections are cut");
                    server.abort();
                    Ok(Ok(()))
                }
            },
        };
        if let Some(scrape) = scrape {
            scrape.abort();
        }
        drop(socket_file);
        tracing::info!("nestd ends");
        match result {
            Ok(result) => result.map_err(ServeError::Grpc),
            Err(panicked) => Err(ServeError::Grpc(panicked.into())),
        }
    }

    async fn stop_vms(&self, deadline: Instant) {
        let stops: Vec<_> = self
            .registry
            .close()
            .into_iter()
            .filter(|hosted| !hosted.vm.state().ended())
            .map(|hosted| {
                let name = hosted.name().to_owned();
                (name, tokio::task::spawn_blocking(move || hosted.vm.stop()))
            })
            .collect();
        tracing::info!(vms = stops.len(), "stopping VMs");
        for (vm, stop) in stops {
            match tokio::time::timeout_at(deadline, stop).await {
                Ok(Ok(Ok(()))) => tracing::debug!(vm, "VM stopped"),
                // It ended by itself meanwhile.
                Ok(Ok(Err(error))) => tracing::debug!(vm, %error, "VM not stopped"),
                Ok(Err(error)) => tracing::error!(vm, %error, "stopping a VM panicked"),
                Err(_) => tracing::error!(vm, "VM did not stop in time"),
            }
        }
    }
}

async fn until_true(mut flag: watch::Receiver<bool>) {
    // An error means that the sender is gone: nobody keeps us either.
    let _ = flag.wait_for(|set| *set).await;
}
