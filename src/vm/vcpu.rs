//! One thread per vCPU: runs the guest, rests, and does what others ask of its registers.
//!
//! Only this thread touches the vCPU's descriptor. Others hand it jobs; a running guest is kicked
//! out for them and goes on afterwards. Before a job and before a rest the I/O instruction under
//! way, if there is one, is completed: KVM finishes it at the next entry, which is made to return
//! at once. Otherwise a port or memory read would be lost when the state is saved.

use std::collections::VecDeque;
use std::io;
use std::sync::mpsc::{self, SyncSender};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use kvm_ioctls::VcpuFd;

use super::device::bus::Bus;
use super::guest::Error;
use super::kvm::{self, Exit, Kickable};

/// What a vCPU tells its machine, from its own thread; it rests until it is resumed. Or a disk, of
/// whose requests none is executed until then.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Report {
    /// The guest shut down (triple fault).
    Shutdown,
    /// KVM can not go on.
    Failed(String),
    /// A disk's request failed, and the guest is to stop.
    IoError,
}

/// Told of reports; must not wait for any vCPU.
pub(super) type Reporter = Arc<dyn Fn(Report) + Send + Sync>;

/// A vCPU, seen from other threads.
pub(super) struct Vcpu {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
    thread_id: i32,
}

#[derive(Default)]
struct Shared {
    inner: Mutex<Inner>,
    changed: Condvar,
}

#[derive(Default)]
struct Inner {
    wanted: Wanted,
    resting: bool,
    jobs: VecDeque<Job>,
    ended: bool,
}

#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Wanted {
    #[default]
    Rest,
    Run,
    End,
}

type Job = Box<dyn FnOnce(&mut VcpuFd) + Send>;

impl Vcpu {
    /// Starts the thread of a vCPU, at rest.
    pub(super) fn spawn(
        index: usize,
        vcpu: VcpuFd,
        bus: Arc<Bus>,
        reporter: Reporter,
    ) -> Result<Self, Error> {
        let shared = Arc::new(Shared::default());
        let (ready, started) = mpsc::sync_channel(1);
        let runner = Runner {
            vcpu,
            bus,
            reporter,
            shared: Arc::clone(&shared),
            owes: false,
        };
        let failed = |source| Error::System {
            what: format!("vCPU {index} thread"),
            source,
        };
        let thread = std::thread::Builder::new()
            .name(format!("CPU {index}/KVM"))
            .spawn(move || runner.run(&ready))
            .map_err(failed)?;
        let mut vcpu = Self {
            shared,
            thread: Some(thread),
            thread_id: 0,
        };
        vcpu.thread_id = match started.recv() {
            Ok(result) => result.map_err(failed)?,
            Err(_) => return Err(failed(io::Error::other("it ended at once"))),
        };
        Ok(vcpu)
    }

    /// Kernel id of the thread.
    pub(super) fn thread_id(&self) -> i32 {
        self.thread_id
    }

    /// Lets the guest run.
    pub(super) fn resume(&self) {
        let mut inner = self.shared.lock();
        if inner.wanted == Wanted::Rest {
            inner.wanted = Wanted::Run;
            inner.resting = false;
            self.shared.changed.notify_all();
        }
    }

    /// Tells the guest to rest; [`Self::wait`] waits until it does. Returns whether it ran.
    pub(super) fn pause(&self) -> bool {
        let mut inner = self.shared.lock();
        let ran = inner.wanted == Wanted::Run;
        if ran {
            inner.wanted = Wanted::Rest;
            drop(inner);
            self.kick();
        }
        ran
    }

    /// Waits until the vCPU rests, its pending I/O completed.
    pub(super) fn wait(&self) {
        let mut inner = self.shared.lock();
        while !inner.resting && !inner.ended {
            inner = self
                .shared
                .changed
                .wait(inner)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Runs `job` on the vCPU's thread and waits for its result. A running guest is interrupted
    /// for it, briefly.
    pub(super) fn with<T: Send + 'static>(
        &self,
        job: impl FnOnce(&mut VcpuFd) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        let (send, result) = mpsc::sync_channel(1);
        let ended = || Err(Error::State("the vCPU's thread has ended".to_owned()));
        let mut inner = self.shared.lock();
        if inner.ended {
            return ended();
        }
        inner.jobs.push_back(Box::new(move |vcpu| {
            // The receiver waits below; it can not have gone.
            let _ = send.send(job(vcpu));
        }));
        self.shared.changed.notify_all();
        drop(inner);
        self.kick();
        result.recv().unwrap_or_else(|_| ended())
    }

    fn kick(&self) {
        if let Some(thread) = &self.thread {
            kvm::kick(thread);
        }
    }
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        self.shared.lock().wanted = Wanted::End;
        self.shared.changed.notify_all();
        self.kick();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("a vCPU thread panicked");
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The thread's side.
struct Runner {
    vcpu: VcpuFd,
    bus: Arc<Bus>,
    reporter: Reporter,
    shared: Arc<Shared>,
    /// An I/O instruction has been answered and not completed.
    owes: bool,
}

/// Tells those who wait for this thread when it ends, by a panic too.
struct Ending(Arc<Shared>);

impl Drop for Ending {
    fn drop(&mut self) {
        let mut inner = self.0.lock();
        inner.ended = true;
        inner.jobs.clear();
        self.0.changed.notify_all();
    }
}

/// What to do next.
enum Next {
    Enter,
    Settle,
    Work(Job),
    End,
}

impl Runner {
    fn run(mut self, ready: &SyncSender<io::Result<i32>>) {
        let started = Kickable::new(&mut self.vcpu);
        let id = rustix::thread::gettid().as_raw_nonzero().get();
        // Whoever spawned this thread waits for the message.
        let _ = ready.send(
            started
                .as_ref()
                .map(|_| id)
                .map_err(|e| io::Error::other(e.to_string())),
        );
        let _ending = Ending(Arc::clone(&self.shared));
        if started.is_ok() {
            self.serve();
        }
    }

    fn serve(&mut self) {
        loop {
            // Cleared before looking at what is wanted: a kick after the look sets it again.
            self.vcpu.set_kvm_immediate_exit(0);
            match self.next() {
                Next::Enter => self.enter(),
                Next::Settle => self.settle(),
                Next::Work(job) => job(&mut self.vcpu),
                Next::End => return,
            }
        }
    }

    fn next(&self) -> Next {
        let mut inner = self.shared.lock();
        loop {
            if inner.wanted == Wanted::End {
                return Next::End;
            }
            if self.owes && (inner.wanted == Wanted::Rest || !inner.jobs.is_empty()) {
                return Next::Settle;
            }
            if let Some(job) = inner.jobs.pop_front() {
                return Next::Work(job);
            }
            if inner.wanted == Wanted::Run {
                return Next::Enter;
            }
            inner.resting = true;
            self.shared.changed.notify_all();
            inner = self
                .shared
                .changed
                .wait(inner)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn enter(&mut self) {
        match kvm::run(&mut self.vcpu) {
            Exit::Interrupted => {}
            Exit::In { port, size, data } => {
                self.bus.input(port, size, data);
                self.owes = true;
                return;
            }
            Exit::Out { port, size, data } => {
                self.bus.output(port, size, data);
                self.owes = true;
                return;
            }
            Exit::MmioRead { address, data } => {
                self.bus.read_memory(address, data);
                self.owes = true;
                return;
            }
            Exit::MmioWrite { address, data } => {
                self.bus.write_memory(address, data);
                self.owes = true;
                return;
            }
            Exit::Shutdown => self.report(Report::Shutdown),
            Exit::Failed(what) => self.report(Report::Failed(what)),
        }
        self.owes = false;
    }

    /// Completes the instruction under way: enters with the order to come out at once, until
    /// nothing more is asked for (a wide access may come in pieces).
    fn settle(&mut self) {
        self.vcpu.set_kvm_immediate_exit(1);
        self.enter();
    }

    fn report(&self, report: Report) {
        let mut inner = self.shared.lock();
        if inner.wanted == Wanted::Run {
            inner.wanted = Wanted::Rest;
        }
        drop(inner);
        (self.reporter)(report);
    }
}
