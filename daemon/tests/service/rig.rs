//! A daemon in this process, a client of it, and guests of a few bytes.

use std::{net::SocketAddr, time::Duration};

use nestd::{
    Daemon, ServeError, Socket,
    config::{Config, Metrics},
};
use nestd_proto::v1::{
    self, event_service_client::EventServiceClient, host_service_client::HostServiceClient,
    nested_service_client::NestedServiceClient, vcpu_service_client::VcpuServiceClient,
    vm_service_client::VmServiceClient,
};
use tokio::{sync::oneshot, task::JoinHandle};
use tonic::{
    Code, Status,
    transport::{Channel, Endpoint},
};
use tonic_types::StatusExt;

/// No test waits for time; this only turns a hang into a failure.
pub const HANG: Duration = Duration::from_secs(60);

/// Real-mode guests, position independent.
pub mod guest {
    /// Writes `hi` and a line feed to the serial port, then 0x10 to the debug exit port.
    pub const HELLO: &[u8] = &[
        0xba, 0xf8, 0x03, // mov dx, 0x3f8
        0xb0, b'h', 0xee, // out dx, 'h'
        0xb0, b'i', 0xee, //
        0xb0, b'\n', 0xee, //
        0xb0, 0x10, 0xe6, 0xf4, // out 0xf4, 0x10
        0xeb, 0xfe, // jmp $
    ];
    /// Runs for ever.
    pub const SPIN: &[u8] = &[0xeb, 0xfe];
    /// Sleeps for ever.
    pub const SLEEP: &[u8] = &[0xfa, 0xf4, 0xeb, 0xfc];
    /// lidt with a limit of 0, then int3: there is no handler for that, nor for what follows.
    pub const TRIPLE_FAULT: &[u8] = &[0x0f, 0x01, 0x1e, 0x00, 0x06, 0xcc];
    /// Writes back what it reads from the serial port, and exits with 0 after a `q`.
    pub const ECHO: &[u8] = &[
        0xba, 0xfd, 0x03, 0xec, // in al, 0x3fd
        0xa8, 0x01, 0x74, 0xf8, // until there is data
        0xba, 0xf8, 0x03, 0xec, 0xee, // in al, 0x3f8; out 0x3f8, al
        0x3c, b'q', 0x75, 0xef, // until 'q'
        0xb0, 0x00, 0xe6, 0xf4, // out 0xf4, 0
        0xeb, 0xfe,
    ];
}

pub struct Rig {
    pub channel: Channel,
    pub metrics: SocketAddr,
    end: Option<oneshot::Sender<()>>,
    daemon: JoinHandle<Result<(), ServeError>>,
    _directory: tempfile::TempDir,
}

impl Rig {
    pub async fn start() -> Self {
        Self::with(|_| ()).await
    }

    pub async fn with(change: impl FnOnce(&mut Config)) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("nestd.sock");
        let mut config = Config {
            metrics: Metrics(Some(([127, 0, 0, 1], 0).into())),
            state_dir: directory.path().join("state"),
            ..Config::default()
        };
        change(&mut config);
        let socket = Socket::bind(&path).await.unwrap();
        let mut daemon = Daemon::new(config);
        let metrics = daemon.bind_metrics().await.unwrap().unwrap();
        let (end, ended) = oneshot::channel();
        let daemon = tokio::spawn(daemon.serve(socket, async move {
            let _ = ended.await;
        }));
        let channel = connect(&path).await;
        Self { channel, metrics, end: Some(end), daemon, _directory: directory }
    }

    /// Tells the daemon to end, and waits until it has.
    pub async fn end(mut self) {
        drop(self.end.take());
        in_time(self.daemon).await.unwrap().unwrap();
    }

    /// Tells it, without waiting.
    pub fn tell_to_end(&mut self) {
        drop(self.end.take());
    }

    pub fn vms(&self) -> VmServiceClient<Channel> {
        VmServiceClient::new(self.channel.clone()).max_decoding_message_size(64 << 20)
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

    pub async fn create(&self, name: &str, image: &[u8]) -> v1::Vm {
        self.vms().create(request(name, image)).await.unwrap().into_inner()
    }

    pub async fn start_vm(&self, name: &str) -> v1::Vm {
        self.vms().start(v1::StartVmRequest { name: name.into() }).await.unwrap().into_inner()
    }

    pub async fn get(&self, name: &str) -> Result<v1::Vm, Status> {
        Ok(self.vms().get(v1::GetVmRequest { name: name.into() }).await?.into_inner())
    }

    pub async fn stop_vm(&self, name: &str) -> Result<v1::Vm, Status> {
        Ok(self.vms().stop(v1::StopVmRequest { name: name.into() }).await?.into_inner())
    }

    pub async fn vcpu(&self, vm: &str, index: u32, fresh: bool) -> Result<v1::Vcpu, Status> {
        let request = v1::GetVcpuRequest { vm: vm.into(), index, fresh, timeout: None };
        Ok(self.vcpus().get(request).await?.into_inner())
    }

    /// Waits, over the Watch stream, until the VM has ended.
    pub async fn ended(&self, name: &str) -> v1::Vm {
        let mut stream = self.vms().watch(v1::WatchVmRequest { name: name.into() }).await.unwrap().into_inner();
        let mut last = None;
        while let Some(vm) = in_time(stream.message()).await.unwrap() {
            last = Some(vm);
        }
        last.expect("a watch begins with the VM")
    }

    pub async fn console(&self, name: &str, follow: bool) -> String {
        let request = v1::ReadConsoleRequest { name: name.into(), offset: 0, follow };
        let mut stream = self.vms().read_console(request).await.unwrap().into_inner();
        let mut bytes = Vec::new();
        while let Some(part) = in_time(stream.message()).await.unwrap() {
            bytes.extend(part.data);
        }
        String::from_utf8(bytes).unwrap()
    }
}

pub async fn connect(path: &std::path::Path) -> Channel {
    let endpoint = Endpoint::from_shared(format!("unix://{}", path.display())).unwrap();
    endpoint.connect().await.unwrap()
}

pub async fn in_time<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(HANG, what).await.expect("hangs")
}

/// A VM of one vCPU on the emulated processor, which every host can run.
pub fn request(name: &str, image: &[u8]) -> v1::CreateVmRequest {
    let spec = v1::VmSpec {
        cpus: 1,
        memory_bytes: 2 << 20,
        nested: v1::Nested::Emulated as i32,
        debug_exit: true,
        ..Default::default()
    };
    let flat = v1::FlatBoot { image: image.into(), load_gpa: 0x7c00, entry_gpa: None };
    let boot = v1::Boot { kind: Some(v1::boot::Kind::Flat(flat)) };
    v1::CreateVmRequest { name: name.into(), spec: Some(spec), boot: Some(boot) }
}

/// [`request`] with another spec.
pub fn request_with(name: &str, image: &[u8], change: impl FnOnce(&mut v1::VmSpec)) -> v1::CreateVmRequest {
    let mut request = request(name, image);
    change(request.spec.as_mut().unwrap());
    request
}

/// The code and ErrorInfo's reason of a refusal, and the value of a key of its metadata.
pub fn refusal(status: &Status, key: &str) -> (Code, String, String) {
    let info = status.get_details_error_info().expect("every error has an ErrorInfo");
    (status.code(), info.reason, info.metadata.get(key).cloned().unwrap_or_default())
}
