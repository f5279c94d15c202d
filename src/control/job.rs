//! The one migration that can be under way: how to interrupt it, who waits for it, where the
//! guest went.

use std::sync::{Arc, MutexGuard};
use std::thread::JoinHandle;
use std::time::{SystemTime, UNIX_EPOCH};

use super::{Control, Error, lock};
use crate::migration::channel::Cancel;
use crate::migration::handover::PointOfNoReturn;
use crate::migration::stats::{Direction, Snapshot, Status};

const DOUBTFUL: &str = "the source of this VM may have resumed it: look with `info status` there; \
                        if it has not, use cont -f";
/// QEMU's answer to a second migration.
pub(super) const IN_PROGRESS: &str = "There's a migration process in progress";

/// The present or last migration as the verbs see it.
#[derive(Default)]
pub(super) struct Job {
    pub(super) brake: Option<Brake>,
    pub(super) thread: Option<JoinHandle<()>>,
    pub(super) waiters: Vec<Box<dyn FnOnce() + Send>>,
    /// Where the guest went, while somebody there may be running it.
    pub(super) gone: Option<Gone>,
    /// Where it is going; it is there for all we know once the point of no return is passed.
    pub(super) leaving: Option<Gone>,
}

impl Job {
    /// Why the guest must not be run here without force, if somebody else may be running it.
    pub(super) fn whereabouts(&self, snapshot: &Snapshot) -> Option<String> {
        let has_passed = self
            .brake
            .as_ref()
            .is_some_and(|brake| brake.point.is_passed());
        let leaving = self.leaving.as_ref().filter(|_| has_passed);
        if let Some(gone) = leaving.or(self.gone.as_ref()) {
            return Some(gone.refusal());
        }
        let is_doubtful = snapshot.direction == Direction::Incoming && snapshot.handover_unknown;
        is_doubtful.then(|| DOUBTFUL.to_owned())
    }

    /// The operator vouches for it: nobody else runs the guest.
    pub(super) fn forget(&mut self) {
        (self.gone, self.leaving) = (None, None);
    }

    /// A migration has ended: notes where the guest is.
    pub(super) fn note(&mut self, snapshot: &Snapshot) {
        let Some(mut leaving) = self.leaving.take() else {
            return;
        };
        let is_certain = snapshot.status == Status::Completed;
        if is_certain || snapshot.handover_unknown {
            leaving.is_certain = is_certain;
            leaving.since = SystemTime::now();
            self.gone = Some(leaving);
        }
    }
}

/// What interrupts a migration, as long as it may be interrupted.
#[derive(Clone)]
pub(super) struct Brake {
    pub(super) cancel: Arc<Cancel>,
    pub(super) point: Arc<PointOfNoReturn>,
}

impl Brake {
    pub(super) fn new() -> Result<Self, Error> {
        let cancel = Cancel::new()
            .map_err(|error| Error(format!("Failed to create an event descriptor: {error}")))?;
        Ok(Self {
            cancel: Arc::new(cancel),
            point: Arc::default(),
        })
    }

    /// Cancels; false if the guest has been let go already.
    fn pull(&self) -> bool {
        self.point.cancel(&self.cancel)
    }
}

/// A guest that left.
pub(super) struct Gone {
    pub(super) uri: String,
    pub(super) since: SystemTime,
    /// Whether the other side said that it runs it.
    pub(super) is_certain: bool,
}

impl Gone {
    /// Why `cont` is refused.
    pub(super) fn refusal(&self) -> String {
        let seconds = self
            .since
            .duration_since(UNIX_EPOCH)
            .map_or(0, |since| since.as_secs());
        let (hours, minutes, seconds) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
        let since = format!("{hours:02}:{minutes:02}:{seconds:02} UTC");
        let uri = &self.uri;
        if self.is_certain {
            format!("this VM runs at {uri} since {since} (use cont -f to run it here as well)")
        } else {
            format!(
                "this VM may be running at {uri} since {since}: the connection was lost during \
                 the hand-over. Make sure that it does not, then use cont -f"
            )
        }
    }
}

impl Control {
    pub(super) fn job(&self) -> MutexGuard<'_, Job> {
        lock(&self.job)
    }

    /// Cancels the migration. `Some` is the line for the operator when it is too late.
    pub fn migrate_cancel(&self) -> Option<String> {
        let snapshot = self.board.read();
        if !snapshot.status.is_running() || self.is_awaiting(&snapshot) {
            return None;
        }
        let brake = self.job().brake.clone()?;
        let too_late = !brake.pull();
        if !too_late {
            self.board.update(|snapshot| {
                if snapshot.status.is_running() && snapshot.direction == Direction::Outgoing {
                    snapshot.status = Status::Cancelling;
                }
            });
        }
        too_late.then(|| "Too late to cancel: the guest is being handed over".to_owned())
    }

    /// Calls `done` once, when no migration is under way any more (at once if that is so already).
    pub fn when_migration_ends(&self, done: Box<dyn FnOnce() + Send>) {
        let mut job = self.job();
        if job.thread.is_some() && self.board.read().status.is_running() {
            job.waiters.push(done);
        } else {
            drop(job);
            done();
        }
    }

    /// Runs `body` on the migration's thread; whoever waits is told when it is over.
    pub(super) fn spawn(
        self: &Arc<Self>,
        job: &mut Job,
        name: &str,
        body: impl FnOnce(&Arc<Self>) + Send + 'static,
    ) -> Result<(), Error> {
        let control = Arc::clone(self);
        let run = move || {
            body(&control);
            let waiters = std::mem::take(&mut control.job().waiters);
            waiters.into_iter().for_each(|done| done());
        };
        let thread = std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(run)
            .map_err(|error| Error(format!("Failed to start the migration thread: {error}")))?;
        job.thread = Some(thread);
        Ok(())
    }

    /// Lets the thread of a migration that is over, by its status, end: what it still does is
    /// about that migration and must not meet the next one's.
    pub(super) fn join_last(&self) {
        let last = self.job().thread.take();
        if let Some(thread) = last
            && thread.thread().id() != std::thread::current().id()
            && thread.join().is_err()
        {
            log::error!("the migration thread panicked");
        }
    }

    /// Ends a migration at the end of the program: cancelled before the guest was let go, brought
    /// to its end after.
    pub(super) fn end_job(&self) {
        let (brake, thread) = {
            let mut job = self.job();
            (job.brake.take(), job.thread.take())
        };
        if let Some(brake) = brake {
            // Too late is fine: what has begun is brought to its end.
            brake.pull();
        }
        if let Some(thread) = thread
            && thread.join().is_err()
        {
            log::error!("the migration thread panicked");
        }
    }

    /// Whether this side waits for a guest to come: nothing there to cancel.
    pub(super) fn is_awaiting(&self, snapshot: &Snapshot) -> bool {
        snapshot.direction == Direction::Incoming
    }
}
