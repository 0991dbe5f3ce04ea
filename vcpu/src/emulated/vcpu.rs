//! One emulated processor on its thread.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed, Ordering::SeqCst};

use nested_vmx::cpu::{BootState, Cpu, CpuConfig, RunExit};
use nested_vmx::event::{ActivityState, Detail, VmxMode};
use nested_vmx::mailbox::attention;
use nested_vmx::vmx::vmcs12::REVISION_ID;

use super::RandomSeeds;
use super::bus::{Desk, MachineBus};
use super::schedule::Turn;
use super::wiring::{KEEPER, Wiring};
use crate::engine::{
    DescriptorTable, EngineError, NestedReport, Registers, RunOutcome, Segment, Vcpu, VcpuPort, VcpuState,
};
use crate::event::EventWriter;

/// Runs of the processor between publications, when nothing happens that asks for one.
const RUNS_PER_PUBLICATION: u32 = 64;

pub struct EmulatedVcpu {
    i: usize,
    cpu: Cpu,
    wiring: Arc<Wiring>,
    desk: Arc<Desk>,
    kicked: Arc<AtomicBool>,
    boot: Option<Arc<BootState>>,
    realtime: bool,
    seeds: RandomSeeds,
    /// Instructions of the processors that resets have replaced.
    before_reset: u64,
    /// What the processor had retired when the schedule was last told.
    told: u64,
    runs: u32,
}

impl EmulatedVcpu {
    pub fn new(
        port: VcpuPort,
        wiring: Arc<Wiring>,
        kicked: Arc<AtomicBool>,
        boot: Option<Arc<BootState>>,
        realtime: bool,
        seeds: RandomSeeds,
    ) -> Result<Self, EngineError> {
        let i = port.index as usize;
        let desk = Arc::new(Desk::default());
        let cpu = processor(i, &wiring, &desk, port.events, boot.as_deref(), realtime, seeds)?;
        Ok(Self { i, cpu, wiring, desk, kicked, boot, realtime, seeds, before_reset: 0, told: 0, runs: 0 })
    }

    fn now(&self) -> u64 {
        match self.realtime {
            true => self.wiring.schedule.now(),
            false => self.cpu.retired().wrapping_add(self.desk.offset.load(Relaxed)),
        }
    }

    /// Instructions since the schedule was last told.
    fn ran(&mut self) -> u64 {
        let retired = self.cpu.retired();
        retired - std::mem::replace(&mut self.told, retired)
    }

    /// Runs guest code once; what to do next, if it is not to ask for another turn.
    fn run_once(&mut self, now: u64, budget: u64) -> RunExit {
        if !self.realtime {
            self.desk.offset.store(now.wrapping_sub(self.cpu.retired()), Relaxed);
        }
        let budget = match self.wiring.device_deadline() {
            Some(deadline) if self.i == KEEPER => budget.min(deadline.saturating_sub(now)).max(1),
            _ => budget,
        };
        let _inside = self.wiring.gate.enter(self.i);
        self.cpu.run(budget)
    }
}

/// A processor after RESET, or where the boot protocol starts it.
fn processor(
    i: usize,
    wiring: &Arc<Wiring>,
    desk: &Arc<Desk>,
    mut events: EventWriter,
    boot: Option<&BootState>,
    realtime: bool,
    seeds: RandomSeeds,
) -> Result<Cpu, EngineError> {
    let bsp = i == KEEPER;
    events.set_at(if bsp { ActivityState::Active } else { ActivityState::WaitForSipi });
    let bus = MachineBus::new(i, wiring.clone(), desk.clone(), events, realtime);
    let config = CpuConfig { apic_id: i as u32, bsp, count: wiring.mailboxes.len() as u32, random_seed: seeds.of(i) };
    let mut cpu = Cpu::new(config, wiring.ram.clone(), wiring.mailboxes[i].clone(), Box::new(bus));
    if let Some(boot) = boot {
        cpu.set_boot_state(boot);
    }
    wiring.routes.publish(i, cpu.apic_identity());
    Ok(cpu)
}

impl Vcpu for EmulatedVcpu {
    fn attach(&mut self) -> Result<(), EngineError> {
        Ok(())
    }

    fn run(&mut self) -> RunOutcome {
        let mut idle = None;
        loop {
            let now = self.now();
            if self.i == KEEPER {
                self.wiring.keep(now);
            }
            let ran = self.ran();
            if self.kicked.load(SeqCst) {
                self.wiring.schedule.rest(self.i, now, ran);
                return RunOutcome::Kicked;
            }
            let turn = match idle.take() {
                None => self.wiring.schedule.turn(self.i, now, ran),
                Some(deadline) => {
                    let deadline: Option<u64> = deadline;
                    let devices = self.wiring.device_deadline().filter(|_| self.i == KEEPER);
                    let first = [deadline, devices].into_iter().flatten().min();
                    self.wiring.schedule.idle(self.i, now, ran, first)
                }
            };
            let exit = match turn {
                Turn::Run { now, budget } => self.run_once(now, budget),
                Turn::Wait => return RunOutcome::Park { halted: false, until: None },
                Turn::Sleep { until } => return RunOutcome::Park { halted: true, until },
            };
            if let Some(outcome) = self.desk.take_outcome() {
                let (now, ran) = (self.now(), self.ran());
                self.wiring.schedule.rest(self.i, now, ran);
                return outcome;
            }
            if let RunExit::Idle { deadline_tsc } = exit {
                idle = Some(deadline_tsc);
            }
            self.runs += 1;
            if self.runs >= RUNS_PER_PUBLICATION || self.desk.news.load(Relaxed) {
                self.runs = 0;
                self.desk.news.store(false, Relaxed);
                let (now, ran) = (self.now(), self.ran());
                self.wiring.schedule.rest(self.i, now, ran);
                return RunOutcome::Publish;
            }
        }
    }

    fn clear_kick(&mut self) {
        self.kicked.store(false, SeqCst);
    }

    fn reset(&mut self) -> Result<(), EngineError> {
        self.before_reset += self.cpu.retired();
        self.told = 0;
        let mut events = self.wiring.events.writer(self.i as u32);
        let now = self.wiring.schedule.now();
        events.record(now, 0, VmxMode::Off, Detail::Reset);
        self.cpu =
            processor(self.i, &self.wiring, &self.desk, events, self.boot.as_deref(), self.realtime, self.seeds)?;
        // Until the schedule says the time with its next turn.
        self.desk.offset.store(now, Relaxed);
        self.desk.take_outcome();
        Ok(())
    }

    fn state(&mut self) -> VcpuState {
        let registers = self.cpu.registers();
        let posted = self.wiring.mailboxes[self.i].peek_events();
        let (activity, vmx) = (self.cpu.activity(), self.cpu.vmx());
        let time_ns = self.now();
        VcpuState {
            mp_state: activity.mp_state(),
            activity,
            vmx_mode: self.cpu.vmx_mode(),
            vmxon_gpa: vmx.vmxon_gpa(),
            current_vmcs_gpa: vmx.current_vmcs_gpa(),
            init_latched: posted.init.is_some() || vmx.init_latched(),
            pending_sipi: posted.sipi.map(|s| s.vector),
            rip: registers.rip,
            cr0: registers.cr0,
            cr3: registers.cr3,
            cr4: registers.cr4,
            efer: registers.efer,
            instructions: self.before_reset + self.cpu.retired(),
            tsc: time_ns,
            time_ns,
        }
    }

    fn registers(&mut self) -> Registers {
        let r = self.cpu.registers();
        let table = |t: nested_vmx::cpu::seg::TableRegister| DescriptorTable { base: t.base, limit: t.limit };
        Registers {
            gprs: r.general,
            rip: r.rip,
            rflags: r.rflags,
            segments: r.segments.map(|s| Segment {
                selector: s.selector,
                base: s.base,
                limit: s.limit,
                access_rights: s.ar.into(),
            }),
            gdtr: table(r.gdtr),
            idtr: table(r.idtr),
            cr0: r.cr0,
            cr2: r.cr2,
            cr3: r.cr3,
            cr4: r.cr4,
            cr8: r.cr8,
            efer: r.efer,
            dr: [r.dr[0], r.dr[1], r.dr[2], r.dr[3], 0, 0, r.dr6, r.dr7],
            apic_base: self.cpu.save().apic.base,
        }
    }

    fn nested(&mut self) -> NestedReport {
        let vmx = self.cpu.vmx();
        NestedReport {
            mode: self.cpu.vmx_mode(),
            vmxon_gpa: vmx.vmxon_gpa(),
            current_vmcs_gpa: vmx.current_vmcs_gpa(),
            revision_id: REVISION_ID,
            fields: vmx.fields().map(|(field, value)| (field.encoding().into(), value)).collect(),
        }
    }
}

/// Ends a wait for this vCPU's turn, and its run.
pub fn kick(kicked: &AtomicBool, wiring: &Wiring, i: usize) {
    kicked.store(true, SeqCst);
    wiring.mailboxes[i].call(attention::STOP);
}
