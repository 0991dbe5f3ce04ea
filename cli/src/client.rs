//! A connection to a daemon: the one that was named, or one of our own on a private socket.

use std::time::Duration;

use nestd::{
    Daemon, Socket,
    config::{Config, Listen, Metrics, default_socket},
};
use nestd_proto::v1::{
    event_service_client::EventServiceClient, host_service_client::HostServiceClient,
    nested_service_client::NestedServiceClient, vcpu_service_client::VcpuServiceClient,
    vm_service_client::VmServiceClient,
};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::oneshot,
    task::JoinHandle,
};
use tonic::transport::{Channel, Endpoint};

use crate::error::Failure;

#[derive(Clone, Debug)]
pub struct Client {
    channel: Channel,
    max_message: usize,
}

impl Client {
    /// The daemon that `server` names, or the one at the default place.
    pub async fn connect(server: Option<&Listen>) -> Result<Self, Failure> {
        let default = Listen(default_socket());
        let listen = server.unwrap_or(&default);
        let refuse = |error: &dyn std::error::Error| {
            let mut cause = error;
            while let Some(source) = cause.source() {
                cause = source;
            }
            let how = match server {
                None => "start the daemon with `nestd`, or name another with --server unix:PATH or NESTD_SERVER",
                Some(_) => "is this the path that nestd listens on? `nestd --listen` and --server take the same one",
            };
            Failure::new(format!("cannot reach nestd at {listen}: {cause}")).hint(how)
        };
        let endpoint = Endpoint::from_shared(format!("unix://{}", listen.0.display()))
            .map_err(|e| refuse(&e))?
            .connect_timeout(Duration::from_secs(5))
            .http2_keep_alive_interval(Duration::from_secs(20))
            .keep_alive_while_idle(true);
        let channel = endpoint.connect().await.map_err(|e| refuse(&e))?;
        Ok(Self { channel, max_message: 64 << 20 })
    }

    pub fn vms(&self) -> VmServiceClient<Channel> {
        VmServiceClient::new(self.channel.clone()).max_decoding_message_size(self.max_message)
    }

    pub fn vcpus(&self) -> VcpuServiceClient<Channel> {
        VcpuServiceClient::new(self.channel.clone())
    }

    pub fn nested(&self) -> NestedServiceClient<Channel> {
        NestedServiceClient::new(self.channel.clone())
    }

    pub fn events(&self) -> EventServiceClient<Channel> {
        EventServiceClient::new(self.channel.clone())
    }

    pub fn host(&self) -> HostServiceClient<Channel> {
        HostServiceClient::new(self.channel.clone())
    }
}

/// A daemon inside this process. `end` it: its VMs end with it.
pub struct Embedded {
    end: oneshot::Sender<()>,
    daemon: JoinHandle<Result<(), nestd::ServeError>>,
    // Removed last: the socket lives here.
    _directory: tempfile::TempDir,
}

impl Embedded {
    pub async fn start() -> Result<(Self, Client), Failure> {
        let directory = tempfile::Builder::new().prefix("nestctl-").tempdir()?;
        let listen = Listen(directory.path().join("nestd.sock"));
        let failed = |e: &dyn std::error::Error| Failure::new(format!("cannot start the embedded daemon: {e}"));
        let socket = Socket::bind(&listen.0).await.map_err(|e| failed(&e))?;
        let config = Config { metrics: Metrics(None), state_dir: directory.path().join("state"), ..Config::default() };
        let daemon = Daemon::new(config);
        let (end, ended) = oneshot::channel();
        let daemon = tokio::spawn(daemon.serve(socket, async move {
            let _ = ended.await;
        }));
        let client = Client::connect(Some(&listen)).await?;
        Ok((Self { end, daemon, _directory: directory }, client))
    }

    pub async fn end(self) -> Result<(), Failure> {
        let _ = self.end.send(());
        match self.daemon.await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(e)) => Err(Failure::new(format!("the embedded daemon failed: {e}"))),
            Err(e) => Err(Failure::new(format!("the embedded daemon panicked: {e}"))),
        }
    }
}

/// Runs `work` with the daemon that `server` names, or with an embedded one.
pub async fn with_daemon<T, F>(server: Option<&Listen>, work: impl FnOnce(Client) -> F) -> Result<T, Failure>
where
    F: Future<Output = Result<T, Failure>>,
{
    match server {
        Some(_) => work(Client::connect(server).await?).await,
        None => {
            let (embedded, client) = Embedded::start().await?;
            let result = work(client).await;
            let ended = embedded.end().await;
            result.and_then(|value| ended.map(|()| value))
        }
    }
}

/// Resolves at SIGINT or SIGTERM, so that a command can take its machine and its daemon down with it.
pub async fn interrupted() {
    let Ok(mut term) = signal(SignalKind::terminate()) else { return std::future::pending().await };
    tokio::select! {
        _ = tokio::signal::ctrl_c() => {}
        _ = term.recv() => {}
    }
}
