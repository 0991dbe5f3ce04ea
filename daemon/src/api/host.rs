//! HostService.

use nestd_proto::v1::{self, host_service_server::HostService};
use nestd_vcpu::{
    host::KvmKind,
    spec::{Nested, Scheduler},
};
use tonic::{Request, Response, Status};

use super::{Api, convert};

#[tonic::async_trait]
impl HostService for Api {
    async fn preflight(&self, _: Request<v1::PreflightRequest>) -> Result<Response<v1::Host>, Status> {
        let host = &self.registry.host;
        let limits = &self.registry.limits;
        let (kvm, kvm_detail) = match &host.kvm {
            KvmKind::Absent { reason } => (v1::KvmKind::Absent, reason.clone()),
            KvmKind::Intel => (v1::KvmKind::Intel, String::new()),
            KvmKind::Amd => (v1::KvmKind::Amd, String::new()),
            KvmKind::Pvm => (v1::KvmKind::Pvm, String::new()),
        };
        let engines = [Nested::None, Nested::Kernel, Nested::Emulated, Nested::Auto].map(|nested| {
            let choice = self.registry.choose(nested, Scheduler::Parallel);
            v1::EngineChoice {
                nested: convert::nested(nested) as i32,
                possible: choice.is_ok(),
                engine: choice.as_ref().map_or(v1::Engine::Unspecified, |c| convert::engine(c.engine)) as i32,
                reason: choice.map_or_else(|e| e.to_string(), |c| c.reason),
            }
        });
        Ok(Response::new(v1::Host {
            kvm: kvm as i32,
            kvm_detail,
            kernel_nesting: host.kernel_nesting,
            kernel_nesting_detail: host.kernel_nesting_reason.clone(),
            cpus: convert::cpus(&host.cpus),
            engines: engines.into(),
            limits: Some(v1::Limits {
                max_vms: limits.max_vms,
                max_cpus_per_vm: limits.max_cpus_per_vm,
                max_memory_bytes_per_vm: limits.max_memory_per_vm.0,
                max_memory_bytes: limits.max_memory.0,
                max_image_bytes: limits.max_image.0,
            }),
            version: env!("CARGO_PKG_VERSION").into(),
            memory_bytes: host.limits.host_memory_bytes,
        }))
    }
}
