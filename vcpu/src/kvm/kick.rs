//! How another thread gets a vCPU out of `KVM_RUN`.
//!
//! `immediate_exit` in the vCPU's kvm_run page closes the race with a vCPU that is about to enter; a real-time
//! signal ends a `KVM_RUN` that is under way. Everything else that wants something from a vCPU (a fresh read, a
//! pause) kicks it and lets its own thread do the ioctl: from another thread most vCPU ioctls block until the
//! vCPU leaves `KVM_RUN` by itself, which may be never.

use std::io;
use std::mem::offset_of;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use kvm_bindings::kvm_run;
use kvm_ioctls::VcpuFd;
use rustix::mm::{MapFlags, ProtFlags};

/// The signal that kicks. Its handler does nothing: the interruption is the message.
fn kick_signal() -> libc::c_int {
    libc::SIGRTMIN() + 5
}

extern "C" fn on_kick(_: libc::c_int) {}

/// Installs the kick signal's handler, once per process.
pub(super) fn install_handler() -> io::Result<()> {
    static DONE: OnceLock<Option<i32>> = OnceLock::new();
    let failed = *DONE.get_or_init(|| {
        // SAFETY: all-zero is a valid sigaction (no flags, empty mask, default handler).
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = on_kick as extern "C" fn(libc::c_int) as usize;
        // SAFETY: `action` is valid and its handler, which does nothing, is async-signal-safe. The signal is a
        // real-time one that nothing else in this process uses.
        let rc = unsafe { libc::sigaction(kick_signal(), &action, std::ptr::null_mut()) };
        (rc != 0).then(|| io::Error::last_os_error().raw_os_error().unwrap_or(libc::EINVAL))
    });
    match failed {
        None => Ok(()),
        Some(errno) => Err(io::Error::from_raw_os_error(errno)),
    }
}

/// A second mapping of a vCPU's kvm_run page, so that a kicker may outlive the `VcpuFd`.
struct RunPage {
    page: NonNull<kvm_run>,
    len: usize,
}

// SAFETY: the mapping is owned, stays until drop, and is only reached by atomic and volatile accesses.
unsafe impl Send for RunPage {}
// SAFETY: as above.
unsafe impl Sync for RunPage {}

impl RunPage {
    fn map(vcpu: &VcpuFd, len: usize) -> io::Result<Self> {
        use std::os::fd::{AsRawFd, BorrowedFd};
        // SAFETY: `vcpu` keeps the descriptor open for the length of this call.
        let fd = unsafe { BorrowedFd::borrow_raw(vcpu.as_raw_fd()) };
        // SAFETY: a new mapping at an address of the kernel's choice; KVM lets the kvm_run area of `len` bytes
        // (KVM_GET_VCPU_MMAP_SIZE) be mapped any number of times.
        let page = unsafe {
            rustix::mm::mmap(std::ptr::null_mut(), len, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, fd, 0)?
        };
        let page = NonNull::new(page.cast()).ok_or_else(|| io::Error::from_raw_os_error(libc::ENOMEM))?;
        Ok(Self { page, len })
    }

    fn immediate_exit(&self) -> &AtomicU8 {
        // SAFETY: the byte lies inside the mapping, which lives as long as `self`. The kernel and other mappings
        // of the page change it too, always as one byte.
        unsafe { AtomicU8::from_ptr(self.page.as_ptr().cast::<u8>().add(offset_of!(kvm_run, immediate_exit))) }
    }

    /// The size of one item of the port access that `KVM_RUN` just returned.
    fn io_item_bytes(&self) -> u8 {
        // SAFETY: inside the mapping; any bit pattern is a valid `io`, and KVM does not write the page while the
        // vCPU is outside KVM_RUN, as it is when its own thread calls this.
        unsafe { (&raw const (*self.page.as_ptr()).__bindgen_anon_1.io).read_volatile().size }
    }
}

impl Drop for RunPage {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `map` with this length, and nothing refers to it any more.
        let _ = unsafe { rustix::mm::munmap(self.page.as_ptr().cast(), self.len) };
    }
}

#[derive(Default)]
struct Target {
    /// The thread that runs the vCPU, while there is one.
    thread: Option<libc::pthread_t>,
    kicked: bool,
}

/// Gets one vCPU out of `KVM_RUN`, from any thread, at any time.
pub struct Kicker {
    run: RunPage,
    target: Mutex<Target>,
    changed: Condvar,
}

impl Kicker {
    pub(super) fn new(vcpu: &VcpuFd, run_bytes: usize) -> io::Result<Self> {
        Ok(Self { run: RunPage::map(vcpu, run_bytes)?, target: Mutex::default(), changed: Condvar::new() })
    }

    fn lock(&self) -> MutexGuard<'_, Target> {
        self.target.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The vCPU leaves `KVM_RUN` now, or its next `KVM_RUN` returns at once. Never blocks on the vCPU.
    pub fn kick(&self) {
        let mut target = self.lock();
        // A kick that was not answered yet does for both. Real-time signals queue: one for each kick would keep the
        // vCPU from running for as long as somebody kicks faster than it takes them.
        if std::mem::replace(&mut target.kicked, true) {
            return;
        }
        self.run.immediate_exit().store(1, Ordering::SeqCst);
        if let Some(thread) = target.thread {
            // SAFETY: the thread deregisters itself under this lock before it ends, so the handle is alive. The
            // only error is an invalid signal number.
            let _ = unsafe { libc::pthread_kill(thread, kick_signal()) };
        }
        drop(target);
        self.changed.notify_all();
    }

    /// Makes the calling thread the one that kicks interrupt, until the guard goes.
    pub(super) fn adopt_thread(self: &Arc<Self>) -> Adopted {
        // SAFETY: `set` is initialised by sigemptyset before use; unblocking the kick signal affects this thread
        // alone.
        unsafe {
            let mut set: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&mut set);
            libc::sigaddset(&mut set, kick_signal());
            libc::pthread_sigmask(libc::SIG_UNBLOCK, &set, std::ptr::null_mut());
            self.lock().thread = Some(libc::pthread_self());
        }
        Adopted(Arc::clone(self))
    }

    /// Called by the vCPU's thread after `KVM_RUN` returned EINTR and before it looks at what it was kicked for.
    pub(super) fn answer(&self) {
        let mut target = self.lock();
        target.kicked = false;
        self.run.immediate_exit().store(0, Ordering::SeqCst);
    }

    /// Makes the next `KVM_RUN` only complete what the last exit left open.
    pub(super) fn arm(&self) {
        self.run.immediate_exit().store(1, Ordering::SeqCst);
    }

    /// Ends what [`Kicker::arm`] began, unless somebody has kicked meanwhile.
    pub(super) fn disarm(&self) {
        let target = self.lock();
        if !target.kicked {
            self.run.immediate_exit().store(0, Ordering::SeqCst);
        }
    }

    /// Waits until somebody kicks, at most `timeout`.
    pub(super) fn sleep(&self, timeout: Duration) {
        let _ = self
            .changed
            .wait_timeout_while(self.lock(), timeout, |t| !t.kicked)
            .map_err(|poisoned| drop(poisoned.into_inner()));
    }

    pub(super) fn io_item_bytes(&self) -> u8 {
        self.run.io_item_bytes()
    }
}

/// The calling thread is the one that kicks interrupt, until this goes.
pub struct Adopted(Arc<Kicker>);

impl Drop for Adopted {
    fn drop(&mut self) {
        self.0.lock().thread = None;
    }
}
