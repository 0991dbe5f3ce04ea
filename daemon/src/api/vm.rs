//! VmService.

use std::sync::Arc;

use nestd_proto::v1::{self, vm_service_server::VmService};
use nestd_vcpu::vm::{Vm, VmError};
use tonic::{Request, Response, Status};

use super::{
    Api, blocking, convert,
    stream::{BoxStream, feed, follow},
};
use crate::{error::Error, registry::Hosted};

const CONSOLE_CHUNK: usize = 64 << 10;

impl Api {
    /// Finds a VM, has `command` done to it, and answers with what it then is.
    async fn command(&self, name: String, command: fn(&Vm) -> Result<(), VmError>) -> Result<Response<v1::Vm>, Status> {
        let hosted = self.registry.get(&name)?;
        let vm = blocking(move || {
            command(&hosted.vm).map_err(|e| hosted.error(e))?;
            Ok(convert::vm(&hosted))
        });
        Ok(Response::new(vm.await?))
    }
}

#[tonic::async_trait]
impl VmService for Api {
    async fn create(&self, request: Request<v1::CreateVmRequest>) -> Result<Response<v1::Vm>, Status> {
        let new = convert::new_vm(request.into_inner())?;
        let registry = self.registry.clone();
        let hosted = blocking(move || registry.create(new)).await?;
        Ok(Response::new(convert::vm(&hosted)))
    }

    async fn get(&self, request: Request<v1::GetVmRequest>) -> Result<Response<v1::Vm>, Status> {
        let hosted = self.registry.get(&request.into_inner().name)?;
        Ok(Response::new(convert::vm(&hosted)))
    }

    async fn list(&self, _: Request<v1::ListVmsRequest>) -> Result<Response<v1::ListVmsResponse>, Status> {
        let vms = self.registry.all().iter().map(|hosted| convert::vm(hosted)).collect();
        Ok(Response::new(v1::ListVmsResponse { vms }))
    }

    async fn start(&self, request: Request<v1::StartVmRequest>) -> Result<Response<v1::Vm>, Status> {
        self.command(request.into_inner().name, Vm::start).await
    }

    async fn pause(&self, request: Request<v1::PauseVmRequest>) -> Result<Response<v1::Vm>, Status> {
        self.command(request.into_inner().name, Vm::pause).await
    }

    async fn resume(&self, request: Request<v1::ResumeVmRequest>) -> Result<Response<v1::Vm>, Status> {
        self.command(request.into_inner().name, Vm::resume).await
    }

    async fn reset(&self, request: Request<v1::ResetVmRequest>) -> Result<Response<v1::Vm>, Status> {
        self.command(request.into_inner().name, Vm::reset).await
    }

    async fn stop(&self, request: Request<v1::StopVmRequest>) -> Result<Response<v1::Vm>, Status> {
        self.command(request.into_inner().name, Vm::stop).await
    }

    async fn delete(&self, request: Request<v1::DeleteVmRequest>) -> Result<Response<()>, Status> {
        let v1::DeleteVmRequest { name, force } = request.into_inner();
        let registry = self.registry.clone();
        blocking(move || registry.remove(&name, force)).await?;
        Ok(Response::new(()))
    }

    type WatchStream = BoxStream<v1::Vm>;

    async fn watch(&self, request: Request<v1::WatchVmRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let hosted = self.registry.get(&request.into_inner().name)?;
        let mut closed = self.closed.clone();
        Ok(feed(move |feed| async move {
            let mut changes = hosted.changes();
            let mut last = None;
            loop {
                changes.mark_unchanged();
                let vm = convert::vm(&hosted);
                let ended = matches!(vm.state(), v1::VmState::Stopped | v1::VmState::Failed);
                if last.as_ref() != Some(&vm) {
                    feed.send(vm.clone()).await?;
                    last = Some(vm);
                }
                if ended {
                    return Ok(());
                }
                feed.wait(&mut changes, &mut closed).await?;
            }
        }))
    }

    type ReadConsoleStream = BoxStream<v1::ReadConsoleResponse>;

    async fn read_console(
        &self,
        request: Request<v1::ReadConsoleRequest>,
    ) -> Result<Response<Self::ReadConsoleStream>, Status> {
        let v1::ReadConsoleRequest { name, offset, follow: stay } = request.into_inner();
        let hosted = self.registry.get(&name)?;
        let closed = self.closed.clone();
        Ok(feed(move |feed| async move {
            let mut at = offset;
            let (feed, hosted) = (&feed, &hosted);
            follow(feed, hosted, closed, stay, || {
                let read = hosted.vm.read_console(at, CONSOLE_CHUNK);
                let found = !read.bytes.is_empty();
                if found {
                    at = read.next_offset;
                }
                async move {
                    if found {
                        let offset = read.next_offset - read.bytes.len() as u64;
                        let part = v1::ReadConsoleResponse { offset, data: read.bytes, lost_bytes: read.lost };
                        feed.send(part).await?;
                    }
                    Ok(found)
                }
            })
            .await
        }))
    }

    async fn write_console(
        &self,
        request: Request<v1::WriteConsoleRequest>,
    ) -> Result<Response<v1::WriteConsoleResponse>, Status> {
        let v1::WriteConsoleRequest { name, data } = request.into_inner();
        if data.len() > CONSOLE_CHUNK {
            return Err(Error::field("data", format!("{} bytes, at most {CONSOLE_CHUNK}", data.len())).into());
        }
        let hosted: Arc<Hosted> = self.registry.get(&name)?;
        let state = hosted.vm.state();
        if state.ended() {
            let legal = "created, running or paused";
            return Err(Error::WrongState { vm: name, state: state.name(), wanted: "console input", legal }.into());
        }
        let written = blocking(move || Ok(hosted.vm.write_console(&data))).await?;
        Ok(Response::new(v1::WriteConsoleResponse { written_bytes: written as u32 }))
    }
}
