//! The VMs that there are.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    path::PathBuf,
    sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard},
    time::SystemTime,
};

use nestd_vcpu::{
    host::{Choice, EngineKind, HostReport, choose_engine, preflight},
    spec::{Boot, Clock, Scheduler, VmConfig, VmSpec},
    vm::{Vm, VmError, VmOptions, VmState},
};
use tokio::sync::watch;

use crate::{config::Limits, error::Error};

/// A VM with what the service knows of it.
pub struct Hosted {
    pub vm: Arc<Vm>,
    /// What it boots, in words.
    pub boot: String,
    pub created: SystemTime,
    /// Moves on when there is something new to read.
    changes: watch::Sender<()>,
}

impl Hosted {
    pub fn name(&self) -> &str {
        &self.vm.spec().name
    }

    /// Resolves once there may be something new. Mark it unchanged before looking, then wait.
    pub fn changes(&self) -> watch::Receiver<()> {
        self.changes.subscribe()
    }

    /// Ended, with nothing more to come: no thread of it runs any more.
    pub fn is_quiet(&self) -> bool {
        self.vm.state().ended()
            && (0..self.vm.spec().cpus).all(|i| self.vm.vcpu_published(i).is_ok_and(|v| v.thread.ended()))
    }

    pub fn error(&self, error: VmError) -> Error {
        Error::of_vm(self.name(), error)
    }
}

/// What a client asks for.
pub struct NewVm {
    pub config: VmConfig,
    /// Left out: what suits the engine.
    pub clock: Option<Clock>,
}

struct Slot {
    memory_bytes: u64,
    /// Unset while it is being created: its name and memory are taken already.
    hosted: Option<Arc<Hosted>>,
}

#[derive(Default)]
struct Inner {
    slots: BTreeMap<String, Slot>,
    closed: bool,
}

pub struct Registry {
    pub limits: Limits,
    pub host: HostReport,
    /// Where dumps of failed VMs go.
    state_dir: PathBuf,
    inner: RwLock<Inner>,
}

impl Registry {
    pub fn new(limits: Limits, state_dir: PathBuf) -> Self {
        Self { limits, host: preflight(), state_dir, inner: RwLock::default() }
    }

    // Each write below is a single insert, remove or assignment: a panic leaves nothing half done.
    fn read(&self) -> RwLockReadGuard<'_, Inner> {
        self.inner.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Inner> {
        self.inner.write().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn get(&self, name: &str) -> Result<Arc<Hosted>, Error> {
        let hosted = self.read().slots.get(name).and_then(|slot| slot.hosted.clone());
        hosted.ok_or_else(|| Error::NoSuchVm { vm: name.into() })
    }

    /// By name.
    pub fn all(&self) -> Vec<Arc<Hosted>> {
        self.read().slots.values().filter_map(|slot| slot.hosted.clone()).collect()
    }

    /// The engine for this kind of nesting on this host.
    pub fn choose(&self, nested: nestd_vcpu::spec::Nested, scheduler: Scheduler) -> Result<Choice, Error> {
        choose_engine(nested, scheduler, &self.host).map_err(Error::Preflight)
    }

    /// Creates a VM. Blocks; call it on a thread that may, within a tokio runtime.
    pub fn create(&self, new: NewVm) -> Result<Arc<Hosted>, Error> {
        let NewVm { mut config, clock } = new;
        let choice = self.choose(config.nested, config.scheduler)?;
        config.clock = clock.unwrap_or(match (choice.engine, config.scheduler) {
            (EngineKind::Kvm, Scheduler::Parallel) => Clock::Realtime,
            (EngineKind::Emulated, _) | (_, Scheduler::Deterministic { .. }) => Clock::Virtual,
        });
        let boot = describe_boot(&config.boot);
        let image_bytes = image_bytes(&config.boot);
        let spec = VmSpec::new(config, &self.host.cpus)
            .map_err(|e| Error::Field { field: e.field().into(), reason: e.to_string() })?;
        self.check_limits(&spec, image_bytes)?;

        let name = spec.name.clone();
        self.reserve(&name, spec.memory_bytes)?;
        let options = VmOptions { host: Some(self.host.clone()) };
        let vm = match Vm::create(spec, options) {
            Ok(vm) => vm,
            Err(e) => {
                self.write().slots.remove(&name);
                return Err(Error::of_vm(&name, e));
            }
        };
        let (changes, _) = watch::channel(());
        let teller = changes.clone();
        vm.on_change(Box::new(move || {
            let _ = teller.send(());
        }));
        let hosted = Arc::new(Hosted { vm, boot, created: SystemTime::now(), changes });
        let closed = {
            let mut inner = self.write();
            if let Some(slot) = inner.slots.get_mut(&name) {
                slot.hosted = Some(hosted.clone());
            }
            inner.closed
        };
        if closed {
            // The daemon closed meanwhile and did not see this one.
            self.remove(&name, true)?;
            return Err(Error::Closing);
        }
        tokio::spawn(watch_over(hosted.clone(), self.state_dir.clone()));
        tracing::info!(vm = name, engine = ?choice.engine, reason = choice.reason, "VM created");
        Ok(hosted)
    }

    fn check_limits(&self, spec: &VmSpec, image_bytes: u64) -> Result<(), Error> {
        let limits = &self.limits;
        for (limit, allowed, wanted) in [
            ("max_cpus_per_vm", u64::from(limits.max_cpus_per_vm), u64::from(spec.cpus)),
            ("max_memory_per_vm", limits.max_memory_per_vm.0, spec.memory_bytes),
            ("max_image", limits.max_image.0, image_bytes),
        ] {
            if wanted > allowed {
                return Err(Error::Limit { limit, allowed, wanted });
            }
        }
        Ok(())
    }

    /// Takes the name and the memory, or says why not.
    fn reserve(&self, name: &str, memory_bytes: u64) -> Result<(), Error> {
        let mut inner = self.write();
        if inner.closed {
            return Err(Error::Closing);
        }
        let vms = inner.slots.len() as u64 + 1;
        let memory = inner.slots.values().map(|s| s.memory_bytes).sum::<u64>() + memory_bytes;
        match inner.slots.entry(name.to_owned()) {
            Entry::Occupied(_) => Err(Error::NameTaken { vm: name.into() }),
            Entry::Vacant(free) => {
                for (limit, allowed, wanted) in
                    [("max_vms", u64::from(self.limits.max_vms), vms), ("max_memory", self.limits.max_memory.0, memory)]
                {
                    if wanted > allowed {
                        return Err(Error::Limit { limit, allowed, wanted });
                    }
                }
                free.insert(Slot { memory_bytes, hosted: None });
                Ok(())
            }
        }
    }

    /// Ends a VM and forgets it. Blocks.
    pub fn remove(&self, name: &str, force: bool) -> Result<(), Error> {
        let hosted = self.get(name)?;
        let state = hosted.vm.state();
        if !force && matches!(state, VmState::Running | VmState::Paused) {
            return Err(Error::WrongState {
                vm: name.into(),
                state: state.name(),
                wanted: "delete without force",
                legal: "created, stopped or failed",
            });
        }
        match hosted.vm.stop() {
            // It may have ended already, or by itself just now.
            Ok(()) | Err(VmError::WrongState { .. }) => {}
            Err(e) => return Err(hosted.error(e)),
        }
        let mut inner = self.write();
        // Somebody else may have deleted it and created another of this name.
        if let Entry::Occupied(slot) = inner.slots.entry(name.to_owned())
            && slot.get().hosted.as_ref().is_some_and(|h| Arc::ptr_eq(h, &hosted))
        {
            slot.remove();
            tracing::info!(vm = name, "VM deleted");
        }
        Ok(())
    }

    /// No new VMs from now on; gives those to be stopped.
    pub fn close(&self) -> Vec<Arc<Hosted>> {
        self.write().closed = true;
        self.all()
    }
}

impl std::fmt::Debug for Registry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Registry").field("vms", &self.read().slots.len()).finish_non_exhaustive()
    }
}

/// Waits for the VM's end, logs it, and keeps the dump of one that failed.
async fn watch_over(hosted: Arc<Hosted>, state_dir: PathBuf) {
    let mut changes = hosted.changes();
    loop {
        changes.mark_unchanged();
        if hosted.vm.state().ended() || changes.changed().await.is_err() {
            break;
        }
    }
    let name = hosted.name();
    match hosted.vm.state() {
        VmState::Failed { reason, dump } => {
            let path = state_dir.join("dumps").join(format!("{name}-{}.txt", unix_seconds()));
            let text = format!("{reason}\n{dump:#?}\n");
            let written = match std::fs::create_dir_all(state_dir.join("dumps")) {
                Ok(()) => std::fs::write(&path, text),
                Err(e) => Err(e),
            };
            match written {
                Ok(()) => tracing::error!(vm = name, reason, dump = %path.display(), "the failed VM's dump is written"),
                Err(error) => {
                    tracing::error!(vm = name, reason, dump = %path.display(), %error, "the failed VM's dump could not be written")
                }
            }
        }
        VmState::Stopped { exit } => tracing::info!(vm = name, guest_exit = ?exit.map(|e| e.code), "VM stopped"),
        VmState::Created | VmState::Running | VmState::Paused => {}
    }
}

fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

fn image_bytes(boot: &Boot) -> u64 {
    let len = match boot {
        Boot::None => 0,
        Boot::Flat { image, .. } => image.len(),
        Boot::Kernel { image, modules, .. } => image.len() + modules.iter().map(|(m, _)| m.len()).sum::<usize>(),
    };
    len as u64
}

fn describe_boot(boot: &Boot) -> String {
    match boot {
        Boot::None => "nothing: it starts at the reset vector".into(),
        Boot::Flat { image, load_gpa, entry_gpa } => {
            let entry = entry_gpa.unwrap_or(*load_gpa);
            format!("a flat image of {} bytes at {load_gpa:#x}, entry {entry:#x}", image.len())
        }
        Boot::Kernel { image, append, modules } => {
            let mut text = format!("a kernel of {} bytes", image.len());
            if !modules.is_empty() {
                text += &format!(", {} module(s)", modules.len());
            }
            if !append.is_empty() {
                text += &format!(", command line `{append}`");
            }
            text
        }
    }
}
