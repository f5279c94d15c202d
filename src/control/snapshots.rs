//! Snapshots of the whole machine: its disks in qcow2, its state beside the first one's.
//!
//! QEMU: `migration/savevm.c`. The state is a migration stream, so that what is true of one is true
//! of the other: hashes, refusals, two phases. A snapshot is loaded into a second machine; the
//! running one is let go only when that has all of it.

mod images;
mod revert;
mod still;
mod tape;

use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, RwLockWriteGuard, TryLockError};
use std::time::{SystemTime, UNIX_EPOCH};

use self::images::{can_have, find, kept_file, list, loadable, on_file, remove, writable};
use self::revert::{Failed, revert};
use super::job::IN_PROGRESS;
use super::{Control, Error, lock};
use crate::block::snapshots::{self, New, Snapshot};
use crate::block::{Backend, Drive};
use crate::calendar::Date;
use crate::config::BackendKind;
use crate::vm::guest::Guest;
use crate::vm::machine::Machine;
use crate::vm::run_state::RunState;

/// What `info snapshots` shows.
#[derive(Clone, Debug, Default)]
pub struct SnapshotList {
    /// Those that every disk has, as the first disk has them.
    pub whole: Vec<Snapshot>,
    /// The others, by drive.
    pub partial: Vec<(String, Vec<Snapshot>)>,
}

/// Why something can not be done now.
pub(super) const UNDER_WAY: &str = "A snapshot is being taken or loaded";
/// Why a guest must not run on disks that could neither go back nor stay.
pub(super) const AT_ODDS: &str = "loadvm has failed half-way: some disks are what they were then, \
                                  others are not. Load a snapshot (cont -f runs the guest on them)";

impl Control {
    /// Takes a snapshot; those of the same name are removed when it is there.
    ///
    /// # Errors
    /// There is none then, and the guest goes on; or the text says that it is there, or that the
    /// guest does not go on.
    pub fn save_snapshot(&self, name: Option<&str>) -> Result<(), Error> {
        let _alone = self.alone_with_drives()?;
        let drives = writable(&*self.machine_at_home()?)?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let now = now.map_err(Error::new)?;
        let seconds = u32::try_from(now.as_secs()).map_err(Error::new)?;
        let name = name.map_or_else(|| unnamed(seconds.into()), str::to_owned);
        let old = find(&drives, &name)?;
        let (machine, before) = self.halt(RunState::SaveVm)?;
        let vm_clock = machine.clock();
        let saved = vm_clock.map_err(Error::from).and_then(|vm_clock| {
            let new = New {
                name: &name,
                seconds,
                nanoseconds: now.subsec_nanos(),
                vm_clock,
            };
            self.save(&machine, before, &drives, &new)
        });
        let removed = saved.and_then(|()| {
            remove(&old).map_err(|error| {
                Error(format!(
                    "Snapshot '{name}' was taken, but the older one of that name is still there: \
                     {error}"
                ))
            })
        });
        both(removed, self.resume(&machine, before))
    }

    /// Makes machine and disks what they were. A guest that did not run is `paused` then.
    ///
    /// # Errors
    /// The guest goes on as it is. Only if a disk could neither be made what it was nor be left as it
    /// is does the guest stay stopped, in run state `internal-error`.
    pub fn load_snapshot(&self, name: &str) -> Result<(), Error> {
        let _alone = self.alone_with_drives()?;
        let found = loadable(&writable(&*self.machine_before_load()?)?, name)?;
        let with_state = found.iter().find_map(|(drive, snapshot)| {
            let state = snapshot.state()?;
            Some((drive, snapshot, state.len))
        });
        let Some((drive, snapshot, len)) = with_state else {
            return Err(Error::new(
                "This is a disk-only snapshot. Revert to it  offline using qemu-img",
            ));
        };
        self.check_room(len)?;
        found.iter().try_for_each(images::check)?;
        let (machine, before) = self.halt(RunState::RestoreVm)?;
        let loaded = self.load(&machine, drive, snapshot).map_err(Failed::whole);
        match loaded.and_then(|fresh| revert(&found).map(|()| fresh)) {
            Ok(fresh) => {
                self.at_odds.store(false, Ordering::SeqCst);
                // Nobody starts it before it is known what it did.
                fresh.set_run_state(RunState::RestoreVm);
                *lock(&self.machine) = Arc::clone(&fresh);
                let after = match before {
                    RunState::Running => RunState::Running,
                    // Whatever was wrong is not, in there.
                    _ => RunState::Paused,
                };
                self.resume(&fresh, after)
            }
            Err(failed) => self.stay(&machine, before, failed),
        }
    }

    /// Removes a snapshot from all disks.
    ///
    /// # Errors
    /// No disk has it, or it could not be removed from all.
    pub fn delete_snapshot(&self, name: &str) -> Result<(), Error> {
        let _alone = self.alone_with_drives()?;
        let found = find(&writable(&*self.machine_at_home()?)?, name)?;
        if found.is_empty() {
            return Err(Error(format!("Snapshot '{name}' does not exist")));
        }
        remove(&found)
    }

    /// All snapshots.
    ///
    /// # Errors
    /// No disk can have any, or an image can not be read.
    pub fn snapshots(&self) -> Result<SnapshotList, Error> {
        // Not held: whoever looks must not keep another from taking one.
        drop(self.changed_drives()?);
        let machine = self.machine();
        let drives: Vec<_> = machine
            .drives()
            .into_iter()
            .filter(|drive| !drive.is_read_only() && can_have(drive))
            .collect();
        let lists = drives.iter().map(list).collect::<Result<Vec<_>, _>>()?;
        let Some(first) = lists.first() else {
            return Err(Error::new("No block device supports snapshots"));
        };
        let is_whole = |snapshot: &Snapshot| {
            let mut all = lists.iter();
            all.all(|list| list.iter().any(|other| other.name() == snapshot.name()))
        };
        let whole = first.iter().filter(|one| is_whole(one)).cloned().collect();
        let partial = drives.iter().zip(&lists).filter_map(|(drive, list)| {
            let rest: Vec<_> = list.iter().filter(|one| !is_whole(one)).cloned().collect();
            (!rest.is_empty()).then(|| (drive.id().to_owned(), rest))
        });
        let partial = partial.collect();
        Ok(SnapshotList { whole, partial })
    }

    /// Keeps another monitor from doing the same, and from changing drives.
    fn alone_with_drives(&self) -> Result<RwLockWriteGuard<'_, ()>, Error> {
        if self.is_ending() {
            return Err(Error::new(ENDING));
        }
        match self.drives.try_write() {
            Ok(alone) => Ok(alone),
            Err(TryLockError::Poisoned(alone)) => Ok(alone.into_inner()),
            Err(TryLockError::WouldBlock) => {
                Err(Error(format!("{UNDER_WAY}, or a drive is being changed")))
            }
        }
    }

    /// The machine, if the guest is here, stays here and is well.
    fn machine_at_home(&self) -> Result<Arc<Machine>, Error> {
        match self.run_state() {
            RunState::InternalError => Err(Error::new("KVM could not go on with the guest")),
            _ => self.machine_before_load(),
        }
    }

    /// The machine, if the guest is here and stays here.
    fn machine_before_load(&self) -> Result<Arc<Machine>, Error> {
        if self.board.read().status.is_running() {
            return Err(Error::new(IN_PROGRESS));
        }
        match self.run_state() {
            RunState::InMigrate => Err(Error::new("Guest is waiting for an incoming migration")),
            RunState::PostMigrate => Err(Error::new("The guest is elsewhere")),
            _ => Ok(self.machine()),
        }
    }

    /// Stops the guest, unless it is about to leave. Returns what it was doing.
    fn halt(&self, state: RunState) -> Result<(Arc<Machine>, RunState), Error> {
        // Held, so that no migration begins in between; that state keeps it from beginning later.
        let _job = self.job();
        let machine = self.machine_before_load()?;
        let before = machine.stop(state)?;
        Ok((machine, before))
    }

    /// The guest does what it did before.
    fn resume(&self, machine: &Machine, before: RunState) -> Result<(), Error> {
        match before {
            RunState::Running if !self.is_ending() => machine.start().map_err(|error| {
                // So that `cont` tries again.
                machine.set_run_state(RunState::Paused);
                Error(format!("The guest could not go on, and is paused: {error}"))
            }),
            RunState::Running => {
                machine.set_run_state(RunState::Paused);
                Ok(())
            }
            other => {
                machine.set_run_state(other);
                Ok(())
            }
        }
    }

    /// A snapshot was not loaded: the machine is what it was, if that can be.
    fn stay(&self, machine: &Machine, before: RunState, failed: Failed) -> Result<(), Error> {
        machine.listen();
        let Failed { error, is_half } = failed;
        if !is_half {
            // The second machine may have let go of them.
            let claimed = machine.claim_drives().map_err(Error::from);
            return both(both(Err(error), claimed), self.resume(machine, before));
        }
        self.at_odds.store(true, Ordering::SeqCst);
        machine.set_run_state(RunState::InternalError);
        Err(Error(format!(
            "{error}. Some disks are what they were then, others are not, and the guest stays \
             stopped: load a snapshot again. What each disk was before is its snapshot '{}'",
            revert::PRESENT_NAME
        )))
    }

    fn is_ending(&self) -> bool {
        self.exit_status().is_some()
    }

    /// For what takes long.
    fn check_ending(&self) -> io::Result<()> {
        match self.is_ending() {
            true => Err(io::Error::other(ENDING)),
            false => Ok(()),
        }
    }

    /// Of a guest that stands still: the disks first, the one with the state last.
    fn save(
        &self,
        machine: &Machine,
        before: RunState,
        drives: &[Arc<Drive>],
        new: &New<'_>,
    ) -> Result<(), Error> {
        let mut made: Vec<(&Arc<Drive>, String)> = Vec::new();
        let created = drives.iter().rev().try_for_each(|drive| {
            let has_state = Arc::ptr_eq(drive, &drives[0]);
            let mut id = String::new();
            let done = on_file(drive, true, |file| {
                let mut creation = snapshots::create(file, new)?;
                if has_state {
                    let go_on = || self.check_ending();
                    tape::record(machine, before, &self.settings, &mut creation, &go_on)?;
                }
                id = creation.commit()?;
                Ok(())
            });
            // It is there even if the image could not be opened again.
            if !id.is_empty() {
                made.push((drive, id));
            }
            done
        });
        created.inspect_err(|_| {
            for (drive, id) in &made {
                let undone = on_file(drive, true, |file| Ok(snapshots::delete(file, id)?));
                if let Err(error) = undone {
                    log::error!("{error}");
                }
            }
        })
    }

    /// A second machine around the same drives, in the state that a snapshot has.
    fn load(
        &self,
        machine: &Machine,
        drive: &Drive,
        snapshot: &Snapshot,
    ) -> Result<Arc<Machine>, Error> {
        let fresh = self.rebuild_machine(machine.drives())?;
        // The machine that reads it claims the image meanwhile.
        let file = kept_file(drive)?;
        let state = snapshots::vm_state(&file, &snapshot.id()).map_err(io::Error::from);
        let played = state.and_then(|state| {
            let mut state = state.ok_or(io::ErrorKind::NotFound)?;
            let go_on = || self.check_ending();
            tape::play(&mut state, &*fresh, &self.settings, self.uuid(), &go_on)
        });
        played.map_err(|error| Error(format!("Device '{}': {error}", drive.id())))?;
        Ok(fresh)
    }

    /// The second machine's memory must be another one than the first one's, and must have room.
    fn check_room(&self, len: u64) -> Result<(), Error> {
        if let Some(backend) = &self.config.machine.memory_backend
            && backend.share
            && matches!(backend.kind, BackendKind::File(_))
        {
            return Err(Error::new(
                "A snapshot is loaded beside the running guest, and guest memory in a file that is \
                 shared (share=on) can not be there twice",
            ));
        }
        let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let available = text.lines().find_map(|line| {
            let rest = line.strip_prefix("MemAvailable:")?;
            rest.trim().strip_suffix(" kB")?.parse::<u64>().ok()
        });
        match available.map(|kib| kib << 10) {
            Some(available) if available < len => Err(Error(format!(
                "A snapshot is loaded beside the running guest: that takes {} MiB of memory, and \
                 the host has {}",
                len >> 20,
                available >> 20
            ))),
            _ => Ok(()),
        }
    }
}

/// QEMU's name of a snapshot that was given none, of the time it is taken (UTC).
fn unnamed(seconds: i64) -> String {
    let Date {
        year,
        month,
        day,
        hour,
        minute,
        second,
        ..
    } = Date::at(seconds);
    format!("vm-{year:04}{month:02}{day:02}{hour:02}{minute:02}{second:02}")
}

/// Both errors, if there are two.
fn both(first: Result<(), Error>, second: Result<(), Error>) -> Result<(), Error> {
    match (first, second) {
        (Err(first), Err(second)) => Err(Error(format!("{first}; and then: {second}"))),
        (first, second) => first.and(second),
    }
}

const ENDING: &str = "The program is about to end";
