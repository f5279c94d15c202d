//! Sending the guest away.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::SystemTime;

use super::job::{Brake, Gone, IN_PROGRESS};
use super::{Control, Error, NamedFds};
use crate::migration::block;
use crate::migration::channel::{self, Prepared};
use crate::migration::clock::{Clock, HostClock};
use crate::migration::source::{Limits, Outgoing};
use crate::migration::stats::{Direction, Snapshot, Status};
use crate::migration::uri::Uri;
use crate::vm::run_state::RunState;

/// Options of `migrate`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MigrateOptions {
    /// `-b`.
    pub block: bool,
    /// `-i`.
    pub incremental: bool,
    /// `-r`.
    pub resume: bool,
    /// Where to.
    pub uri: String,
}

impl Control {
    /// Starts an outgoing migration and returns once it is under way; `fds` are the calling
    /// monitor's (an `fd:` URI takes its descriptor out).
    pub fn migrate(
        self: &Arc<Self>,
        options: &MigrateOptions,
        fds: &mut NamedFds,
    ) -> Result<(), Error> {
        self.check_may_leave(options)?;
        self.join_last();
        let mut job = self.job();
        // Another monitor may have been quicker.
        self.check_may_leave(options)?;
        self.check_block(options)?;
        let uri: Uri = options.uri.parse().map_err(Error::new)?;
        self.lend_inherited(&uri, fds);
        let prepared = channel::prepare(&uri, fds).map_err(Error::new)?;
        let brake = Brake::new()?;
        job.brake = Some(brake.clone());
        self.board.update(|snapshot| {
            *snapshot = Snapshot {
                status: Status::Setup,
                direction: Direction::Outgoing,
                ..Snapshot::default()
            };
        });
        let text = options.uri.clone();
        let with_disks = options.block || options.incremental;
        if with_disks {
            self.settings.switch_block(true, options.incremental);
        }
        let spawned = self.spawn(&mut job, "migration", move |control| {
            let run = || control.leave(prepared, &text, &brake);
            if catch_unwind(AssertUnwindSafe(run)).is_err() {
                control.leave_failed("internal error in the migration thread".to_owned());
            }
            if with_disks {
                control.settings.switch_block(false, false);
            }
        });
        if let Err(error) = &spawned {
            if with_disks {
                self.settings.switch_block(false, false);
            }
            self.leave_failed(error.to_string());
        }
        spawned
    }

    /// Reasons why the machine can not be migrated now.
    pub fn migration_blockers(&self) -> Vec<String> {
        let mut reasons = Vec::new();
        if self.run_state() == RunState::InternalError {
            reasons.push("KVM could not go on with the guest (internal-error)".to_owned());
        }
        reasons
    }

    fn check_may_leave(&self, options: &MigrateOptions) -> Result<(), Error> {
        if options.resume {
            return Err(Error::new("Cannot resume if there is no paused migration"));
        }
        if self.exit_status().is_some() {
            return Err(Error::new("The program is about to end"));
        }
        match self.run_state() {
            RunState::InMigrate => Err(Error::new("Guest is waiting for an incoming migration")),
            _ if self.board.read().status.is_running() => Err(Error::new(IN_PROGRESS)),
            RunState::SaveVm | RunState::RestoreVm => Err(Error::new(super::snapshots::UNDER_WAY)),
            RunState::PostMigrate => Err(Error::new(
                "Can't migrate the vm that was paused due to previous migration",
            )),
            _ => self
                .migration_blockers()
                .into_iter()
                .next()
                .map_or(Ok(()), |why| Err(Error(why))),
        }
    }

    /// Whether disks can be asked for so. The last migration sets that back when it has ended for
    /// whoever looks at it, so it must have ended indeed.
    fn check_block(&self, options: &MigrateOptions) -> Result<(), Error> {
        let is_asked = options.block || options.incremental;
        match is_asked && (self.settings.block() || self.settings.block_incremental()) {
            true => Err(Error::new(
                "Command options are incompatible with current migration capabilities",
            )),
            false => Ok(()),
        }
    }

    /// The migration thread of the source.
    fn leave(&self, prepared: Prepared, uri: &str, brake: &Brake) {
        let clock = HostClock::new();
        let started = clock.now();
        let channel = match prepared.connect(&brake.cancel) {
            Ok(channel) => channel,
            Err(_) if brake.cancel.is_cancelled() => {
                return self
                    .board
                    .update(|snapshot| snapshot.status = Status::Cancelled);
            }
            Err(error) => return self.leave_failed(error.to_string()),
        };
        if channel.is_duplex() {
            // Noted before the guest can be elsewhere: `cont` looks at it from then on.
            self.job().leaving = Some(Gone {
                uri: uri.to_owned(),
                since: SystemTime::now(),
                is_certain: false,
            });
        }
        let machine = self.machine();
        let outgoing = Outgoing {
            guest: &*machine,
            limits: &|| self.limits(),
            block: self.settings.block().then(|| block::Options {
                zeros: self.settings.zero_blocks(),
                incremental: self.settings.block_incremental(),
            }),
            bitmaps: self.settings.dirty_bitmaps(),
            return_path: self.settings.return_path(),
            is_patient: false,
            dialect: self.settings.dialect(),
            board: &self.board,
            clock: &clock,
            started,
            cancel: &brake.cancel,
            point: &brake.point,
        };
        let result = outgoing.run(channel);
        self.job().note(&self.board.read());
        if let Err(error) = result {
            log::info!("migration to {uri} ended: {error}");
        }
    }

    fn limits(&self) -> Limits {
        Limits {
            max_bandwidth: self.settings.max_bandwidth(),
            downtime_limit: self.settings.downtime_limit(),
            avail_switchover_bandwidth: self.settings.avail_switchover_bandwidth(),
        }
    }

    /// A migration that failed before, or outside of, the engine.
    pub(super) fn leave_failed(&self, why: String) {
        self.board.update(|snapshot| {
            snapshot.status = Status::Failed;
            snapshot.error = Some(why);
        });
    }
}
