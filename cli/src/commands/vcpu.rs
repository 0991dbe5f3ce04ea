//! `nestctl vcpu`.

use nestd::config::Listen;
use nestd_proto::{Label, json, v1};

use crate::{
    args::{Target, VcpuCommand},
    client::Client,
    error::Failure,
    output::{Output, cpu_list, fate, hex, list, opt_hex, table},
};

pub async fn run(command: VcpuCommand, server: Option<&Listen>, output: Output) -> Result<(), Failure> {
    let client = Client::connect(server).await?;
    match command {
        VcpuCommand::List { vm } => {
            let vcpus = client.vcpus().list(v1::ListVcpusRequest { vm }).await?.into_inner();
            output.show(&vcpus, print_list)
        }
        VcpuCommand::Show { target: Target { vm, vcpu: index }, fresh, registers } => {
            let request = v1::GetVcpuRequest { vm: vm.clone(), index, fresh, timeout: None };
            let vcpu = client.vcpus().get(request).await?.into_inner();
            if !registers {
                return output.show(&vcpu, print_one);
            }
            let request = v1::GetRegistersRequest { vm, index };
            let registers = client.vcpus().get_registers(request).await?.into_inner();
            match output {
                Output::Json => {
                    let (vcpu, registers) = (json::to_value(&vcpu)?, json::to_value(&registers)?);
                    say!("{:#}", serde_json::json!({ "vcpu": vcpu, "registers": registers }));
                }
                Output::Table => {
                    print_one(&vcpu);
                    print_registers(&registers);
                }
            }
            Ok(())
        }
        VcpuCommand::Init { target } => inject(&client, target, v1::InjectionKind::Init, None, output).await,
        VcpuCommand::Sipi { target, vector } => {
            inject(&client, target, v1::InjectionKind::Sipi, Some(vector), output).await
        }
        VcpuCommand::Nmi { target } => inject(&client, target, v1::InjectionKind::Nmi, None, output).await,
        VcpuCommand::Pin { target: Target { vm, vcpu: index }, cpus } => {
            let request = v1::SetAffinityRequest { vm, index, host_cpus: cpus.0 };
            let vcpu = client.vcpus().set_affinity(request).await?.into_inner();
            output.show(&vcpu, |v| say!("vCPU {} runs on host CPUs {}", v.index, cpu_list(&v.host_cpus)))
        }
    }
}

async fn inject(
    client: &Client,
    target: Target,
    kind: v1::InjectionKind,
    vector: Option<u32>,
    output: Output,
) -> Result<(), Failure> {
    let Target { vm, vcpu } = target;
    let request = v1::InjectRequest { vm: vm.clone(), index: vcpu, kind: kind as i32, vector };
    let response = client.vcpus().inject(request).await?.into_inner();
    output.show(&response, |r| {
        say!("{} to vCPU {vcpu}: {} (injection {})", kind.label(), fate(r.fate.as_ref()), r.injection_id);
        if r.fate.as_ref().is_some_and(|f| f.disposition() == v1::Disposition::Latched) {
            say!("`nestctl events {vm}` shows what becomes of it");
        }
    })
}

fn latched(vcpu: &v1::Vcpu) -> String {
    let init = vcpu.init_latched.then(|| "INIT".to_owned());
    let sipi = vcpu.pending_sipi.map(|v| format!("SIPI {v:#04x}"));
    let latched: Vec<_> = init.into_iter().chain(sipi).collect();
    if latched.is_empty() { "-".into() } else { latched.join(", ") }
}

fn age(vcpu: &v1::Vcpu) -> String {
    format!("{} us", vcpu.age_ns / 1000)
}

fn print_list(response: &v1::ListVcpusResponse) {
    let rows = response.vcpus.iter().map(|v| {
        [
            v.index.to_string(),
            v.mp_state().label().into(),
            v.activity_state().label().into(),
            v.vmx_mode().label().into(),
            latched(v),
            hex(v.rip),
            v.instructions.to_string(),
            cpu_list(&v.host_cpus),
            v.thread_state.clone(),
            age(v),
        ]
    });
    let header =
        ["VCPU", "MP_STATE", "ACTIVITY", "VMX", "LATCHED", "RIP", "INSTRUCTIONS", "HOST CPUS", "THREAD", "AGE"];
    say!("{}", table(header, rows));
}

fn print_one(vcpu: &v1::Vcpu) {
    list([
        ("vCPU", format!("{} of {}", vcpu.index, vcpu.vm)),
        ("mp_state", vcpu.mp_state().label().into()),
        ("activity state", vcpu.activity_state().label().into()),
        ("VMX mode", vcpu.vmx_mode().label().into()),
        ("VMXON region", opt_hex(vcpu.vmxon_gpa)),
        ("current VMCS", opt_hex(vcpu.current_vmcs_gpa)),
        ("latched", latched(vcpu)),
        ("RIP", hex(vcpu.rip)),
        ("CR0, CR3, CR4", format!("{:#x}, {:#x}, {:#x}", vcpu.cr0, vcpu.cr3, vcpu.cr4)),
        ("EFER", hex(vcpu.efer)),
        ("instructions", vcpu.instructions.to_string()),
        ("TSC", vcpu.tsc.to_string()),
        ("host CPUs", cpu_list(&vcpu.host_cpus)),
        ("thread", format!("{} ({})", vcpu.thread_id, vcpu.thread_state)),
        ("age", age(vcpu)),
    ]);
}

fn print_registers(r: &v1::Registers) {
    say!("");
    let words = [
        ("RAX", r.rax),
        ("RBX", r.rbx),
        ("RCX", r.rcx),
        ("RDX", r.rdx),
        ("RSI", r.rsi),
        ("RDI", r.rdi),
        ("RBP", r.rbp),
        ("RSP", r.rsp),
        ("R8", r.r8),
        ("R9", r.r9),
        ("R10", r.r10),
        ("R11", r.r11),
        ("R12", r.r12),
        ("R13", r.r13),
        ("R14", r.r14),
        ("R15", r.r15),
        ("RIP", r.rip),
        ("RFLAGS", r.rflags),
        ("CR0", r.cr0),
        ("CR2", r.cr2),
        ("CR3", r.cr3),
        ("CR4", r.cr4),
        ("CR8", r.cr8),
        ("EFER", r.efer),
        ("APICBASE", r.apic_base),
        ("DR7", r.dr.get(7).copied().unwrap_or_default()),
    ];
    for row in words.chunks(4) {
        let row: Vec<_> = row.iter().map(|(name, value)| format!("{name:8} {value:016x}")).collect();
        say!("{}", row.join("  "));
    }
    let segments = [
        ("CS", r.cs),
        ("SS", r.ss),
        ("DS", r.ds),
        ("ES", r.es),
        ("FS", r.fs),
        ("GS", r.gs),
        ("LDTR", r.ldtr),
        ("TR", r.tr),
    ];
    let rows = segments.into_iter().map(|(name, segment)| {
        let s = segment.unwrap_or_default();
        [name.into(), hex(s.selector.into()), hex(s.base), hex(s.limit.into()), hex(s.access_rights.into())]
    });
    say!("{}", table(["SEGMENT", "SELECTOR", "BASE", "LIMIT", "ACCESS"], rows));
    for (name, t) in [("GDTR", r.gdtr), ("IDTR", r.idtr)] {
        let t = t.unwrap_or_default();
        say!("{name}  base {:#x}, limit {:#x}", t.base, t.limit);
    }
}
