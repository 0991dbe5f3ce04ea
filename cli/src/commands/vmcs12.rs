//! `nestctl vmcs12`.

use nestd::config::Listen;
use nestd_proto::{Label, v1};

use crate::{
    args::Vmcs12Args,
    client::Client,
    error::Failure,
    output::{Output, hex, list, opt_hex, table},
};

pub async fn run(args: Vmcs12Args, server: Option<&Listen>, output: Output) -> Result<(), Failure> {
    let client = Client::connect(server).await?;
    let request = v1::GetNestedStateRequest { vm: args.target.vm, index: args.target.vcpu, fields: args.field };
    let state = client.nested().get(request).await?.into_inner();
    output.show(&state, print)
}

fn print(state: &v1::NestedState) {
    list([
        ("VMX mode", state.vmx_mode().label().into()),
        ("VMXON region", opt_hex(state.vmxon_gpa)),
        ("current VMCS", opt_hex(state.current_vmcs_gpa)),
    ]);
    if state.fields.is_empty() {
        return;
    }
    let rows = state.fields.iter().map(|f| {
        [
            f.name.clone(),
            hex(f.value),
            f.meaning.clone(),
            f.width().label().to_lowercase(),
            f.role().label().to_lowercase().replace('_', " "),
            hex(f.encoding.into()),
        ]
    });
    say!("\n{}", table(["FIELD", "VALUE", "MEANING", "WIDTH", "ROLE", "ENCODING"], rows));
}
