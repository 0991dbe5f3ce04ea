//! The words for what the VM layer reports, shared by metrics and the services.

use nestd_vcpu::thread::ThreadState;
use nested_vmx::{
    event::{ActivityState, MpState, VmxMode},
    vmx::exit::reasons::ExitReason,
};

/// By VMCS encoding.
pub const ACTIVITIES: [&str; 4] = ["active", "hlt", "shutdown", "wait_for_sipi"];

pub fn activity(state: ActivityState) -> &'static str {
    ACTIVITIES[state as usize]
}

pub fn mp_state(state: MpState) -> &'static str {
    match state {
        MpState::Runnable => "runnable",
        MpState::Uninitialized => "uninitialized",
        MpState::InitReceived => "init_received",
        MpState::Halted => "halted",
        MpState::SipiReceived => "sipi_received",
    }
}

pub fn vmx_mode(mode: VmxMode) -> &'static str {
    match mode {
        VmxMode::Off => "off",
        VmxMode::Root => "root",
        VmxMode::NonRoot => "non_root",
    }
}

pub fn thread(state: ThreadState) -> &'static str {
    match state {
        ThreadState::Created => "created",
        ThreadState::Running => "running",
        ThreadState::Idle => "idle",
        ThreadState::Paused => "paused",
        ThreadState::Resetting => "resetting",
        ThreadState::Stopped => "stopped",
        ThreadState::Failed => "failed",
    }
}

/// The name of a basic exit reason (bits 15:0).
pub fn exit_reason(reason: u32) -> &'static str {
    ExitReason::from_number(reason as u16).map_or("unknown", ExitReason::name)
}
