//! VMs and vCPUs: read from their own atomics when scraped, so that counting costs a vCPU nothing.

use std::{fmt, sync::Arc};

use nestd_vcpu::{
    counters::{FateCounts, VcpuCounts},
    thread::VcpuReport,
};
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, MetricEncoder},
    metrics::MetricType,
    registry::Unit,
};

use crate::{
    api::names,
    registry::{Hosted, Registry},
};

#[derive(Debug)]
pub struct VmCollector(pub Arc<Registry>);

/// One vCPU at the time of the scrape.
struct VcpuSample {
    vm: String,
    vcpu: String,
    counts: VcpuCounts,
    report: Option<VcpuReport>,
}

struct VmSample {
    name: String,
    state: &'static str,
    events: u64,
    events_lost: u64,
}

fn sample(hosted: &Hosted) -> (VmSample, Vec<VcpuSample>) {
    let counters = hosted.vm.counters();
    let name = hosted.name().to_owned();
    let vcpus = counters.vcpus.into_iter().zip(0u32..).map(|(counts, index)| VcpuSample {
        vm: name.clone(),
        vcpu: index.to_string(),
        counts,
        report: hosted.vm.vcpu_published(index).ok(),
    });
    let vcpus = vcpus.collect();
    let state = hosted.vm.state().name();
    (VmSample { name, state, events: counters.events, events_lost: counters.events_lost }, vcpus)
}

/// One metric family: its head, then one value for each set of labels.
struct Family<'a>(MetricEncoder<'a>);

impl Family<'_> {
    fn gauge(&mut self, labels: &impl EncodeLabelSet, value: u64) -> fmt::Result {
        self.0.encode_family(labels)?.encode_gauge(&(value as i64))
    }

    fn count(&mut self, labels: &impl EncodeLabelSet, value: u64) -> fmt::Result {
        self.0.encode_family(labels)?.encode_counter::<[(String, String); 0], _, u64>(&value, None)
    }

    fn seconds(&mut self, labels: &impl EncodeLabelSet, ns: u64) -> fmt::Result {
        self.0.encode_family(labels)?.encode_counter::<[(String, String); 0], _, u64>(&(ns as f64 / 1e9), None)
    }
}

impl Collector for VmCollector {
    fn encode(&self, mut encoder: DescriptorEncoder) -> fmt::Result {
        let (vms, vcpus): (Vec<_>, Vec<_>) = self.0.all().iter().map(|hosted| sample(hosted)).unzip();
        let vcpus: Vec<VcpuSample> = vcpus.into_iter().flatten().collect();
        encode_vms(&mut encoder, &vms)?;
        encode_states(&mut encoder, &vcpus)?;
        encode_counts(&mut encoder, &vcpus)
    }
}

fn encode_vms(encoder: &mut DescriptorEncoder, vms: &[VmSample]) -> fmt::Result {
    let mut head = encoder.encode_descriptor("nestd_vms", "VMs that exist", None, MetricType::Gauge)?;
    head.encode_gauge(&(vms.len() as i64))?;

    let head = encoder.encode_descriptor("nestd_vm_state", "1 for the state a VM is in", None, MetricType::Gauge)?;
    let mut family = Family(head);
    for vm in vms {
        family.gauge(&[("vm", vm.name.as_str()), ("state", vm.state)], 1)?;
    }

    let head = encoder.encode_descriptor("nestd_vm_events", "Events recorded", None, MetricType::Counter)?;
    let mut family = Family(head);
    for vm in vms {
        family.count(&[("vm", vm.name.as_str())], vm.events)?;
    }

    let help = "Events recorded that are no longer kept";
    let head = encoder.encode_descriptor("nestd_vm_events_lost", help, None, MetricType::Counter)?;
    let mut family = Family(head);
    for vm in vms {
        family.count(&[("vm", vm.name.as_str())], vm.events_lost)?;
    }
    Ok(())
}

fn encode_states(encoder: &mut DescriptorEncoder, vcpus: &[VcpuSample]) -> fmt::Result {
    let help = "1 for the state a vCPU published last";
    let head = encoder.encode_descriptor("nestd_vcpu_state", help, None, MetricType::Gauge)?;
    let mut family = Family(head);
    for v in vcpus {
        let Some(report) = &v.report else { continue };
        let labels = [
            ("vm", v.vm.as_str()),
            ("vcpu", v.vcpu.as_str()),
            ("mp_state", names::mp_state(report.state.mp_state)),
            ("activity_state", names::activity(report.state.activity)),
            ("vmx_mode", names::vmx_mode(report.state.vmx_mode)),
            ("thread", names::thread(report.thread)),
        ];
        family.gauge(&labels, 1)?;
    }
    Ok(())
}

fn encode_counts(encoder: &mut DescriptorEncoder, vcpus: &[VcpuSample]) -> fmt::Result {
    type Get = fn(&VcpuCounts) -> u64;
    let counts: [(&str, &str, Get); 5] = [
        ("nestd_vcpu_instructions", "Instructions retired", |c| c.instructions),
        ("nestd_vcpu_vm_entries", "VM entries by the guest's hypervisor", |c| c.vm_entries),
        ("nestd_vcpu_vm_entry_failures", "VM entries that failed a check", |c| c.vm_entry_failures),
        ("nestd_vcpu_host_exits", "Returns from the engine to the vCPU's thread", |c| c.host_exits),
        ("nestd_vcpu_wakeups", "Times the vCPU's thread woke up", |c| c.wakeups),
    ];
    for (name, help, get) in counts {
        let mut family = Family(encoder.encode_descriptor(name, help, None, MetricType::Counter)?);
        for v in vcpus {
            family.count(&[("vm", v.vm.as_str()), ("vcpu", v.vcpu.as_str())], get(&v.counts))?;
        }
    }

    let help = "CPU time of the vCPU's thread";
    let head = encoder.encode_descriptor("nestd_vcpu_thread_cpu", help, Some(&Unit::Seconds), MetricType::Counter)?;
    let mut family = Family(head);
    for v in vcpus {
        family.seconds(&[("vm", v.vm.as_str()), ("vcpu", v.vcpu.as_str())], v.counts.thread_cpu_ns)?;
    }

    let help = "VM exits to the guest's hypervisor, by basic exit reason";
    let mut family = Family(encoder.encode_descriptor("nestd_vcpu_vm_exits", help, None, MetricType::Counter)?);
    for v in vcpus {
        for (&reason, &exits) in &v.counts.exits {
            let number = reason.to_string();
            let labels = [
                ("vm", v.vm.as_str()),
                ("vcpu", v.vcpu.as_str()),
                ("reason", number.as_str()),
                ("name", names::exit_reason(reason)),
            ];
            family.count(&labels, exits)?;
        }
    }

    let help = "What became of INIT, SIPI and NMI at their receiver";
    let mut family = Family(encoder.encode_descriptor("nestd_vcpu_signals", help, None, MetricType::Counter)?);
    for v in vcpus {
        for (kind, FateCounts { latched, delivered, dropped }) in
            [("init", v.counts.init), ("sipi", v.counts.sipi), ("nmi", v.counts.nmi)]
        {
            for (fate, n) in [("latched", latched), ("delivered", delivered), ("dropped", dropped)] {
                let labels = [("vm", v.vm.as_str()), ("vcpu", v.vcpu.as_str()), ("kind", kind), ("fate", fate)];
                family.count(&labels, n)?;
            }
        }
    }

    let help = "Host time with the guest in an activity state";
    let head = encoder.encode_descriptor("nestd_vcpu_activity", help, Some(&Unit::Seconds), MetricType::Counter)?;
    let mut family = Family(head);
    for v in vcpus {
        for (state, ns) in names::ACTIVITIES.into_iter().zip(v.counts.activity_ns) {
            family.seconds(&[("vm", v.vm.as_str()), ("vcpu", v.vcpu.as_str()), ("state", state)], ns)?;
        }
    }
    Ok(())
}
