//! NestedService.

use nestd_proto::v1::{self, nested_service_server::NestedService};
use nestd_vcpu::spec::Nested;
use nested_vmx::{
    event::ActivityState,
    vmx::vmcs12::{Field, Role, Width},
};
use tonic::{Request, Response, Status};

use super::{Api, blocking, convert, names};
use crate::error::Error;

#[tonic::async_trait]
impl NestedService for Api {
    async fn get(&self, request: Request<v1::GetNestedStateRequest>) -> Result<Response<v1::NestedState>, Status> {
        let v1::GetNestedStateRequest { vm, index, fields } = request.into_inner();
        let wanted: Vec<Field> = fields.iter().map(|name| field_by_name(name)).collect::<Result<_, Error>>()?;
        let hosted = self.registry.get(&vm)?;
        if hosted.vm.choice().nested == Nested::None {
            return Err(Error::NotNested { vm }.into());
        }
        let report = blocking(move || hosted.vm.nested_state(index).map_err(|e| hosted.error(e))).await?;
        let fields = report.fields.iter().filter_map(|&(encoding, value)| {
            let (field, _) = Field::lookup(encoding.into())?;
            (wanted.is_empty() || wanted.contains(&field)).then(|| describe(field, value))
        });
        let fields = fields.collect();
        Ok(Response::new(v1::NestedState {
            vm,
            index,
            vmx_mode: convert::vmx_mode(report.mode) as i32,
            vmxon_gpa: report.vmxon_gpa,
            current_vmcs_gpa: report.current_vmcs_gpa,
            fields,
            revision_id: report.revision_id,
        }))
    }
}

fn field_by_name(name: &str) -> Result<Field, Error> {
    Field::from_name(&name.to_ascii_lowercase()).ok_or_else(|| {
        let near = Field::ALL.iter().map(|f| f.name()).filter(|n| n.contains(&name.to_ascii_lowercase())).take(5);
        let near: Vec<_> = near.collect();
        let hint = if near.is_empty() { String::new() } else { format!("; did you mean {}?", near.join(", ")) };
        Error::field("fields", format!("`{name}` is not a VMCS field{hint}"))
    })
}

fn describe(field: Field, value: u64) -> v1::VmcsField {
    let width = match field.width() {
        Width::W16 => v1::VmcsWidth::VmcsWidth16,
        Width::W32 => v1::VmcsWidth::VmcsWidth32,
        Width::W64 => v1::VmcsWidth::VmcsWidth64,
        Width::Natural => v1::VmcsWidth::Natural,
    };
    let role = match field.role() {
        Role::Control => v1::VmcsRole::Control,
        Role::ExitInfo => v1::VmcsRole::ExitInformation,
        Role::Guest => v1::VmcsRole::GuestState,
        Role::Host => v1::VmcsRole::HostState,
    };
    let meaning = match field {
        Field::GuestActivityState => ActivityState::from_u64(value).map_or("not an activity state", names::activity),
        Field::ExitReason => names::exit_reason(value as u32 & 0xffff),
        _ => "",
    };
    v1::VmcsField {
        name: field.name().into(),
        encoding: field.encoding().into(),
        width: width as i32,
        role: role as i32,
        value,
        meaning: meaning.into(),
        sdm_name: field.info().text.into(),
    }
}
