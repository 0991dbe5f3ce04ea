//! Between the contract's messages and the VM layer's types.

use nestd_proto::v1::{self, event::Detail as Proto};
use nestd_vcpu::{
    engine::{self, Disposition, Injection, Registers},
    event::{EventRecord, Level, VmChange, WHOLE_VM, What},
    host::EngineKind,
    spec::{Boot, CPU_MODEL, Clock, Nested, Scheduler, VmConfig},
    thread::VcpuReport,
    vm::VmState,
};
use nested_vmx::{
    bus::{Delivery, Destination},
    event::{ActivityState, Detail, EventKind, Fate, MpState, Rule, VmxMode},
    vmx::entry::check_by_id,
};

use super::names;
use crate::{
    error::Error,
    registry::{Hosted, NewVm},
};

// From the client.

pub fn new_vm(request: v1::CreateVmRequest) -> Result<NewVm, Error> {
    let spec = request.spec.unwrap_or_default();
    let default = VmConfig::default();
    let nested = match v1::Nested::try_from(spec.nested) {
        Ok(v1::Nested::Unspecified | v1::Nested::Auto) => Nested::Auto,
        Ok(v1::Nested::None) => Nested::None,
        Ok(v1::Nested::Kernel) => Nested::Kernel,
        Ok(v1::Nested::Emulated) => Nested::Emulated,
        Err(_) => return Err(Error::field("nested", format!("{} is not a kind of nesting", spec.nested))),
    };
    let clock = match v1::Clock::try_from(spec.clock) {
        Ok(v1::Clock::Unspecified) => None,
        Ok(v1::Clock::Virtual) => Some(Clock::Virtual),
        Ok(v1::Clock::Realtime) => Some(Clock::Realtime),
        Err(_) => return Err(Error::field("clock", format!("{} is not a clock", spec.clock))),
    };
    let scheduler = match spec.scheduler.and_then(|s| s.kind) {
        None | Some(v1::scheduler::Kind::Parallel(_)) => Scheduler::Parallel,
        Some(v1::scheduler::Kind::Deterministic(d)) => Scheduler::Deterministic { seed: d.seed },
    };
    let cpus = if spec.cpus == 0 { default.cpus } else { spec.cpus };
    let mut pin: Vec<Vec<usize>> =
        spec.pin.into_iter().map(|list| list.cpus.into_iter().map(|c| c as usize).collect()).collect();
    if let [one] = &pin[..]
        && cpus <= nestd_vcpu::spec::MAX_CPUS
    {
        pin = vec![one.clone(); cpus as usize];
    }
    let config = VmConfig {
        name: request.name,
        cpus,
        memory_bytes: if spec.memory_bytes == 0 { default.memory_bytes } else { spec.memory_bytes },
        nested,
        clock: Clock::default(),
        scheduler,
        pin,
        cpu_model: if spec.cpu_model.is_empty() { CPU_MODEL.into() } else { spec.cpu_model },
        testdev: spec.debug_exit,
        boot: boot(request.boot),
    };
    Ok(NewVm { config, clock })
}

fn boot(boot: Option<v1::Boot>) -> Boot {
    match boot.and_then(|b| b.kind) {
        None => Boot::None,
        Some(v1::boot::Kind::Kernel(k)) => Boot::Kernel {
            image: k.image,
            append: k.append,
            modules: k.modules.into_iter().map(|m| (m.image, m.append)).collect(),
        },
        Some(v1::boot::Kind::Flat(f)) => Boot::Flat { image: f.image, load_gpa: f.load_gpa, entry_gpa: f.entry_gpa },
    }
}

// To the client: VMs and vCPUs.

pub fn nested(nested: Nested) -> v1::Nested {
    match nested {
        Nested::None => v1::Nested::None,
        Nested::Kernel => v1::Nested::Kernel,
        Nested::Emulated => v1::Nested::Emulated,
        Nested::Auto => v1::Nested::Auto,
    }
}

pub fn engine(engine: EngineKind) -> v1::Engine {
    match engine {
        EngineKind::Kvm => v1::Engine::Kvm,
        EngineKind::Emulated => v1::Engine::Emulated,
    }
}

pub fn cpus(cpus: &[usize]) -> Vec<u32> {
    cpus.iter().map(|&c| c as u32).collect()
}

pub fn vm(hosted: &Hosted) -> v1::Vm {
    let (spec, choice) = (hosted.vm.spec(), hosted.vm.choice());
    let clock = match spec.clock {
        Clock::Virtual => v1::Clock::Virtual,
        Clock::Realtime => v1::Clock::Realtime,
    };
    let scheduler = match spec.scheduler {
        Scheduler::Parallel => v1::scheduler::Kind::Parallel(v1::scheduler::Parallel {}),
        Scheduler::Deterministic { seed } => v1::scheduler::Kind::Deterministic(v1::scheduler::Deterministic { seed }),
    };
    let (state, guest_exit, failure) = match hosted.vm.state() {
        VmState::Created => (v1::VmState::Created, None, None),
        VmState::Running => (v1::VmState::Running, None, None),
        VmState::Paused => (v1::VmState::Paused, None, None),
        VmState::Stopped { exit } => (v1::VmState::Stopped, exit.map(|e| v1::GuestExit { code: e.code }), None),
        VmState::Failed { reason, dump } => {
            (v1::VmState::Failed, None, Some(v1::VmFailure { reason, dump: format!("{dump:#?}") }))
        }
    };
    v1::Vm {
        name: spec.name.clone(),
        spec: Some(v1::VmSpec {
            cpus: spec.cpus,
            memory_bytes: spec.memory_bytes,
            nested: nested(choice.nested) as i32,
            clock: clock as i32,
            scheduler: Some(v1::Scheduler { kind: Some(scheduler) }),
            pin: spec.pin.iter().map(|list| v1::CpuList { cpus: cpus(list) }).collect(),
            cpu_model: spec.cpu_model.clone(),
            debug_exit: spec.testdev,
        }),
        state: state as i32,
        engine: engine(choice.engine) as i32,
        engine_reason: choice.reason.clone(),
        boot: hosted.boot.clone(),
        create_time: Some(hosted.created.into()),
        guest_exit,
        failure,
    }
}

pub fn vcpu(hosted: &Hosted, report: VcpuReport) -> v1::Vcpu {
    let s = report.state;
    v1::Vcpu {
        vm: hosted.name().into(),
        index: report.index,
        mp_state: mp_state(s.mp_state) as i32,
        activity_state: activity(s.activity) as i32,
        vmx_mode: vmx_mode(s.vmx_mode) as i32,
        vmxon_gpa: s.vmxon_gpa,
        current_vmcs_gpa: s.current_vmcs_gpa,
        init_latched: s.init_latched,
        pending_sipi: s.pending_sipi.map(u32::from),
        rip: s.rip,
        cr0: s.cr0,
        cr3: s.cr3,
        cr4: s.cr4,
        efer: s.efer,
        instructions: s.instructions,
        tsc: s.tsc,
        age_ns: report.age_ns,
        host_cpus: cpus(&report.host_cpus),
        thread_id: report.tid.unwrap_or(0),
        thread_state: names::thread(report.thread).into(),
    }
}

pub fn registers(r: &Registers) -> v1::Registers {
    let [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15] = r.gprs;
    let [es, cs, ss, ds, fs, gs, ldtr, tr] = r.segments.map(|s: engine::Segment| {
        Some(v1::Segment { selector: s.selector.into(), base: s.base, limit: s.limit, access_rights: s.access_rights })
    });
    let table = |t: engine::DescriptorTable| Some(v1::DescriptorTable { base: t.base, limit: t.limit.into() });
    v1::Registers {
        rax,
        rcx,
        rdx,
        rbx,
        rsp,
        rbp,
        rsi,
        rdi,
        r8,
        r9,
        r10,
        r11,
        r12,
        r13,
        r14,
        r15,
        rip: r.rip,
        rflags: r.rflags,
        cs,
        ss,
        ds,
        es,
        fs,
        gs,
        tr,
        ldtr,
        gdtr: table(r.gdtr),
        idtr: table(r.idtr),
        cr0: r.cr0,
        cr2: r.cr2,
        cr3: r.cr3,
        cr4: r.cr4,
        cr8: r.cr8,
        efer: r.efer,
        dr: r.dr.to_vec(),
        apic_base: r.apic_base,
    }
}

pub fn mp_state(state: MpState) -> v1::MpState {
    match state {
        MpState::Runnable => v1::MpState::Runnable,
        MpState::Uninitialized => v1::MpState::Uninitialized,
        MpState::InitReceived => v1::MpState::InitReceived,
        MpState::Halted => v1::MpState::Halted,
        MpState::SipiReceived => v1::MpState::SipiReceived,
    }
}

fn activity(state: ActivityState) -> v1::ActivityState {
    match state {
        ActivityState::Active => v1::ActivityState::Active,
        ActivityState::Hlt => v1::ActivityState::Hlt,
        ActivityState::Shutdown => v1::ActivityState::Shutdown,
        ActivityState::WaitForSipi => v1::ActivityState::WaitForSipi,
    }
}

pub fn vmx_mode(mode: VmxMode) -> v1::VmxMode {
    match mode {
        VmxMode::Off => v1::VmxMode::Off,
        VmxMode::Root => v1::VmxMode::Root,
        VmxMode::NonRoot => v1::VmxMode::NonRoot,
    }
}

// To the client: events.

pub fn disposition(disposition: Disposition) -> v1::Fate {
    use v1::Disposition as D;
    let mut fate = v1::Fate::default();
    let disposition = match disposition {
        Disposition::Latched => D::Latched,
        Disposition::Delivered => D::Delivered,
        Disposition::Started => D::Started,
        Disposition::VmExit(reason) => {
            fate.exit_reason = Some(reason.into());
            D::VmExit
        }
        Disposition::Reset => D::Reset,
        Disposition::Coalesced => D::Coalesced,
        Disposition::Overwrote { previous_cause } => {
            fate.overwrote_cause_id = Some(previous_cause);
            D::Overwrote
        }
        Disposition::Dropped(rule) => {
            fate.rule = rule_name(rule);
            D::Dropped
        }
        Disposition::AcceptedFateNotObservable => D::AcceptedFateNotObservable,
    };
    fate.disposition = disposition as i32;
    fate
}

/// As semantics numbers them: the variants are called like the rules.
fn rule_name(rule: Rule) -> String {
    format!("{rule:?}")
}

fn fate(fate: Fate) -> Option<v1::Fate> {
    Some(disposition(fate.into()))
}

pub fn event_kind(kind: EventKind) -> v1::EventKind {
    match kind {
        EventKind::IcrWrite => v1::EventKind::IcrWrite,
        EventKind::InitLatched => v1::EventKind::InitLatched,
        EventKind::InitTaken => v1::EventKind::InitTaken,
        EventKind::InitDropped => v1::EventKind::InitDropped,
        EventKind::SipiLatched => v1::EventKind::SipiLatched,
        EventKind::SipiTaken => v1::EventKind::SipiTaken,
        EventKind::SipiDropped => v1::EventKind::SipiDropped,
        EventKind::Nmi => v1::EventKind::Nmi,
        EventKind::MpState => v1::EventKind::MpState,
        EventKind::VmxOn => v1::EventKind::VmxOn,
        EventKind::VmxOff => v1::EventKind::VmxOff,
        EventKind::VmEntry => v1::EventKind::VmEntry,
        EventKind::VmEntryFailed => v1::EventKind::VmEntryFailed,
        EventKind::VmExit => v1::EventKind::VmExit,
        EventKind::VmxAbort => v1::EventKind::VmxAbort,
        EventKind::TripleFault => v1::EventKind::TripleFault,
        EventKind::Reset => v1::EventKind::Reset,
    }
}

pub fn event(vm: &str, record: &EventRecord) -> v1::Event {
    let (kind, detail) = match record.what {
        What::Processor(detail) => {
            let kind = match detail {
                Detail::Sipi { fate: Fate::Started, .. } => v1::EventKind::VcpuStarted,
                other => event_kind(other.kind()),
            };
            (kind, processor_detail(detail))
        }
        What::MpState { from, to } => {
            let change = state_change(from, to, nestd_vcpu::kvm::activity(from, false), record.activity);
            (v1::EventKind::MpState, Proto::StateChange(change))
        }
        What::Injected { id, injection } => {
            let (kind, vector) = match injection {
                Injection::Init => (v1::InjectionKind::Init, None),
                Injection::Sipi { vector } => (v1::InjectionKind::Sipi, Some(vector.into())),
                Injection::Nmi => (v1::InjectionKind::Nmi, None),
            };
            (v1::EventKind::Injected, Proto::Injected(v1::Injected { id, kind: kind as i32, vector }))
        }
        What::Vm(change) => {
            let change = match change {
                VmChange::Started => v1::VmChange::Started,
                VmChange::Paused => v1::VmChange::Paused,
                VmChange::Resumed => v1::VmChange::Resumed,
                VmChange::Reset => v1::VmChange::Reset,
                VmChange::Stopped => v1::VmChange::Stopped,
                VmChange::Failed => v1::VmChange::Failed,
            };
            (v1::EventKind::VmState, Proto::VmState(v1::VmStateEvent { change: change as i32 }))
        }
    };
    let level = match record.level {
        Level::L0 => v1::Level::L0,
        Level::L1 => v1::Level::L1,
        Level::L2 => v1::Level::L2,
    };
    let cause_id = match record.what {
        // An ICR write's own id is in its detail; nothing caused it.
        What::Processor(Detail::IcrWrite { id, .. }) if id == record.cause => 0,
        _ => record.cause,
    };
    let vcpu = (record.vcpu != WHOLE_VM).then_some(record.vcpu);
    let (mp, active) = match vcpu {
        Some(_) => (mp_state(record.mp_state), activity(record.activity)),
        None => Default::default(),
    };
    v1::Event {
        sequence: record.seq,
        vcpu,
        local_sequence: record.local_seq,
        time_ns: record.time_ns,
        level: level as i32,
        kind: kind as i32,
        cause_id,
        mp_state: mp as i32,
        activity_state: active as i32,
        vm: vm.into(),
        detail: Some(detail),
    }
}

fn state_change(
    from_mp_state: MpState,
    to_mp_state: MpState,
    from_activity: ActivityState,
    to_activity: ActivityState,
) -> v1::StateChange {
    v1::StateChange {
        from_mp_state: mp_state(from_mp_state) as i32,
        to_mp_state: mp_state(to_mp_state) as i32,
        from_activity_state: activity(from_activity) as i32,
        to_activity_state: activity(to_activity) as i32,
    }
}

fn processor_detail(detail: Detail) -> Proto {
    match detail {
        Detail::IcrWrite { id, message } => {
            let mode = match message.delivery {
                Delivery::Fixed => v1::DeliveryMode::Fixed,
                Delivery::LowestPriority => v1::DeliveryMode::LowestPriority,
                Delivery::Smi => v1::DeliveryMode::Smi,
                Delivery::Nmi => v1::DeliveryMode::Nmi,
                Delivery::Init => v1::DeliveryMode::Init,
                Delivery::InitDeassert => v1::DeliveryMode::InitDeassert,
                Delivery::StartUp => v1::DeliveryMode::Startup,
                Delivery::ExtInt => v1::DeliveryMode::Extint,
            };
            let destination = match message.destination {
                Destination::SelfOnly => "self".into(),
                Destination::AllIncludingSelf => "all".into(),
                Destination::AllExcludingSelf => "all but self".into(),
                Destination::Physical(id) => format!("physical {id}"),
                Destination::Logical(id) => format!("logical {id}"),
            };
            Proto::IcrWrite(v1::IcrWrite { id, delivery_mode: mode as i32, vector: message.vector.into(), destination })
        }
        Detail::Init(f) => Proto::Init(v1::InitEvent { fate: fate(f) }),
        Detail::Sipi { vector, fate: f } => Proto::Sipi(v1::SipiEvent { vector: vector.into(), fate: fate(f) }),
        Detail::Nmi(f) => Proto::Nmi(v1::NmiEvent { fate: fate(f) }),
        Detail::Activity { from, to } => Proto::StateChange(state_change(from.mp_state(), to.mp_state(), from, to)),
        Detail::VmxOn { region_gpa } => Proto::VmxOn(v1::VmxOn { region_gpa }),
        Detail::VmxOff => Proto::VmxOff(v1::VmxOff {}),
        Detail::VmEntry { vmcs_gpa, activity: state, rip, injected } => {
            Proto::VmEntry(v1::VmEntry { vmcs_gpa, activity_state: activity(state) as i32, rip, injected })
        }
        Detail::VmEntryFailed { vmcs_gpa, check, exit_reason, instruction_error } => {
            let check_info = check_by_id(check);
            Proto::VmEntryFailed(v1::VmEntryFailed {
                vmcs_gpa,
                check_id: check.into(),
                check_name: check_info.map_or_else(String::new, |c| c.name.into()),
                exit_reason,
                instruction_error,
                fields: check_info.iter().flat_map(|c| c.fields).map(|f| f.name().into()).collect(),
                sdm_section: check_info.map_or_else(String::new, |c| c.section.into()),
            })
        }
        Detail::VmExit { vmcs_gpa, reason, qualification, rip, activity: state } => Proto::VmExit(v1::VmExit {
            vmcs_gpa,
            reason,
            reason_name: names::exit_reason(reason & 0xffff).into(),
            qualification,
            rip,
            activity_state: activity(state) as i32,
        }),
        Detail::VmxAbort { indicator } => Proto::VmxAbort(v1::VmxAbort { indicator }),
        Detail::TripleFault => Proto::TripleFault(v1::TripleFault {}),
        Detail::Reset => Proto::Reset(v1::ResetEvent {}),
    }
}
