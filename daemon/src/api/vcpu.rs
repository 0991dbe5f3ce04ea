//! VcpuService.

use std::{sync::Arc, time::Duration};

use nestd_proto::v1::{self, vcpu_service_server::VcpuService};
use nestd_vcpu::engine::Injection;
use tonic::{Request, Response, Status};

use super::{Api, blocking, convert};
use crate::{error::Error, registry::Hosted};

const FRESH_TIMEOUT: Duration = Duration::from_secs(1);
/// A fresh read holds a thread of the daemon for as long as it waits.
const LONGEST_FRESH_TIMEOUT: Duration = Duration::from_secs(60);

#[tonic::async_trait]
impl VcpuService for Api {
    async fn list(&self, request: Request<v1::ListVcpusRequest>) -> Result<Response<v1::ListVcpusResponse>, Status> {
        let hosted = self.registry.get(&request.into_inner().vm)?;
        let vcpus = (0..hosted.vm.spec().cpus).map(|index| published(&hosted, index));
        Ok(Response::new(v1::ListVcpusResponse { vcpus: vcpus.collect::<Result<_, Error>>()? }))
    }

    async fn get(&self, request: Request<v1::GetVcpuRequest>) -> Result<Response<v1::Vcpu>, Status> {
        let v1::GetVcpuRequest { vm, index, fresh, timeout } = request.into_inner();
        let hosted = self.registry.get(&vm)?;
        if !fresh {
            return Ok(Response::new(published(&hosted, index)?));
        }
        let timeout = match timeout {
            None => FRESH_TIMEOUT,
            Some(timeout) => {
                let timeout = Duration::try_from(timeout);
                timeout.map_err(|_| Error::field("timeout", "must not be negative"))?.min(LONGEST_FRESH_TIMEOUT)
            }
        };
        let vcpu = blocking(move || {
            let report = hosted.vm.vcpu_fresh(index, timeout).map_err(|e| hosted.error(e))?;
            Ok(convert::vcpu(&hosted, report))
        });
        Ok(Response::new(vcpu.await?))
    }

    async fn inject(&self, request: Request<v1::InjectRequest>) -> Result<Response<v1::InjectResponse>, Status> {
        let v1::InjectRequest { vm, index, kind, vector } = request.into_inner();
        let injection = injection(kind, vector)?;
        let hosted = self.registry.get(&vm)?;
        let injected = blocking(move || hosted.vm.inject(index, injection).map_err(|e| hosted.error(e))).await?;
        Ok(Response::new(v1::InjectResponse {
            injection_id: injected.id,
            fate: Some(convert::disposition(injected.disposition)),
        }))
    }

    async fn set_affinity(&self, request: Request<v1::SetAffinityRequest>) -> Result<Response<v1::Vcpu>, Status> {
        let v1::SetAffinityRequest { vm, index, host_cpus } = request.into_inner();
        let cpus: Vec<usize> = host_cpus.into_iter().map(|c| c as usize).collect();
        let hosted = self.registry.get(&vm)?;
        let vcpu = blocking(move || {
            hosted.vm.set_affinity(index, &cpus).map_err(|e| match hosted.error(e) {
                Error::Field { reason, .. } => Error::Field { field: "host_cpus".into(), reason },
                other => other,
            })?;
            published(&hosted, index)
        });
        Ok(Response::new(vcpu.await?))
    }

    async fn get_registers(
        &self,
        request: Request<v1::GetRegistersRequest>,
    ) -> Result<Response<v1::Registers>, Status> {
        let v1::GetRegistersRequest { vm, index } = request.into_inner();
        let hosted = self.registry.get(&vm)?;
        let registers = blocking(move || hosted.vm.registers(index).map_err(|e| hosted.error(e))).await?;
        Ok(Response::new(convert::registers(&registers)))
    }
}

fn published(hosted: &Arc<Hosted>, index: u32) -> Result<v1::Vcpu, Error> {
    let report = hosted.vm.vcpu_published(index).map_err(|e| hosted.error(e))?;
    Ok(convert::vcpu(hosted, report))
}

fn injection(kind: i32, vector: Option<u32>) -> Result<Injection, Error> {
    let without_vector = |injection| match vector {
        None => Ok(injection),
        Some(_) => Err(Error::field("vector", "only a SIPI has one")),
    };
    match v1::InjectionKind::try_from(kind) {
        Ok(v1::InjectionKind::Init) => without_vector(Injection::Init),
        Ok(v1::InjectionKind::Nmi) => without_vector(Injection::Nmi),
        Ok(v1::InjectionKind::Sipi) => {
            let vector = vector.ok_or_else(|| Error::field("vector", "a SIPI needs one, 0 to 255"))?;
            let vector = u8::try_from(vector)
                .map_err(|_| Error::field("vector", format!("{vector} is too large, at most 255")))?;
            Ok(Injection::Sipi { vector })
        }
        Ok(v1::InjectionKind::Unspecified) | Err(_) => Err(Error::field("kind", "must be INIT, SIPI or NMI")),
    }
}
