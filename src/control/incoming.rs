//! Waiting for a guest to arrive.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, PoisonError};

use super::job::Brake;
use super::{Control, Error, NamedFds, lock};
use crate::migration::channel::{self, Channel, Fault, Listener};
use crate::migration::clock::HostClock;
use crate::migration::dest::Incoming;
use crate::migration::handover::PointOfNoReturn;
use crate::migration::stats::{Direction, Snapshot, Status};
use crate::migration::uri::Uri;
use crate::vm::run_state::RunState;

impl Control {
    /// Listens for a migration (`-incoming defer`); `fds` are the calling monitor's.
    pub fn migrate_incoming(self: &Arc<Self>, uri: &str, fds: &mut NamedFds) -> Result<(), Error> {
        if self.config.incoming.is_none() {
            return Err(Error::new(
                "'-incoming' was not specified on the command line",
            ));
        }
        self.listen(uri, fds)
    }

    /// Binds and waits on a thread of its own; binding errors are found at once.
    pub(super) fn listen(self: &Arc<Self>, uri: &str, fds: &mut NamedFds) -> Result<(), Error> {
        let uri: Uri = uri.parse().map_err(Error::new)?;
        // Held to the end: of two monitors one is first.
        let mut job = self.job();
        if job.thread.is_some() || self.run_state() != RunState::InMigrate {
            return Err(Error::new(
                "The incoming migration has already been started",
            ));
        }
        self.lend_inherited(&uri, fds);
        let brake = Brake::new()?;
        let listener = channel::listen(&uri, fds, &brake.cancel).map_err(Error::new)?;
        self.board.update(|snapshot| {
            *snapshot = Snapshot {
                status: Status::Setup,
                direction: Direction::Incoming,
                socket_address: listener.address(),
                ..Snapshot::default()
            };
        });
        job.brake = Some(brake.clone());
        let spawned = self.spawn(&mut job, "incoming", move |control| {
            control.await_guest(listener, &brake);
        });
        if let Err(error) = &spawned {
            self.leave_failed(error.to_string());
        }
        spawned
    }

    /// The migration thread of the destination: one connection after the other until a guest has
    /// arrived.
    fn await_guest(&self, mut listener: Box<dyn Listener>, brake: &Brake) {
        loop {
            let channel = match listener.accept() {
                Ok(channel) => channel,
                Err(Fault::Cancelled) => return,
                Err(fault) => {
                    log::error!("Failed to accept an incoming migration: {fault}");
                    return self.quit_with(1);
                }
            };
            match self.receive(channel, &brake.point) {
                Ok(state) => return log::debug!("the guest has arrived: {}", state.name()),
                Err(_) if brake.cancel.is_cancelled() => return,
                Err(error) => log::error!("load of migration failed: {error}"),
            }
            if !listener.can_repeat() || self.settings.exit_on_error() {
                return self.quit_with(1);
            }
            // Before looking: whoever wants to quit either is seen here or can cancel again.
            brake.point.reopen();
            if self.exit_status().is_some() {
                return;
            }
            if let Err(error) = self.renew_machine() {
                log::error!("Failed to rebuild the machine: {error}");
                return self.quit_with(1);
            }
        }
    }

    fn receive(
        &self,
        channel: Box<dyn Channel>,
        point: &PointOfNoReturn,
    ) -> Result<RunState, Error> {
        let machine = self.machine();
        let incoming = Incoming {
            guest: &*machine,
            board: &self.board,
            clock: &HostClock::new(),
            autostart: &self.autostart,
            point,
            uuid: self.config.machine.uuid,
            is_patient: false,
            dialect: self.settings.dialect(),
        };
        let run = || incoming.run(channel).map_err(Error::new);
        catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|_| {
            let why = "internal error in the migration thread";
            self.board.update(|snapshot| {
                snapshot.status = Status::Failed;
                snapshot.error = Some(why.to_owned());
            });
            Err(Error::new(why))
        })
    }

    /// Whatever arrived in part is thrown away with the machine it arrived in.
    fn renew_machine(&self) -> Result<(), Error> {
        let _alone = self.drives.write().unwrap_or_else(PoisonError::into_inner);
        let drives = self.machine().reopen_drives(&self.config.machine)?;
        *lock(&self.machine) = self.rebuild_machine(drives)?;
        Ok(())
    }
}
