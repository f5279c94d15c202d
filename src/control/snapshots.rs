//! Snapshots of the whole machine: its disks in qcow2, its state beside the first one's.
//!
//! QEMU: `migration/savevm.c`. The state is a migration stream, so that what is true of one is true
//! of the other: hashes, refusals, two phases. A snapshot is loaded into a second machine; the
//! running one is let go only when that has all of it.

mod still;
mod tape;

use std::fs::File;
use std::io;
use std::sync::{Arc, MutexGuard, TryLockError};
use std::time::{SystemTime, UNIX_EPOCH};

use super::job::IN_PROGRESS;
use super::{Control, Error, build_machine, lock};
use crate::block::snapshots::{self, New, Snapshot};
use crate::block::{Backend, Drive};
use crate::calendar::Date;
use crate::config::{BackendKind, Format};
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

/// A snapshot of one drive's.
type Found = (Arc<Drive>, Snapshot);

impl Control {
    /// Takes a snapshot; those of the same name are removed when it is there.
    ///
    /// # Errors
    /// There is none then, and the guest goes on.
    pub fn save_snapshot(&self, name: Option<&str>) -> Result<(), Error> {
        let _only = self.only_snapshot()?;
        let machine = self.machine_at_home()?;
        let drives = writable(&machine)?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let now = now.map_err(Error::new)?;
        let seconds = u32::try_from(now.as_secs()).map_err(Error::new)?;
        let name = name.map_or_else(|| unnamed(seconds.into()), str::to_owned);
        let old = find(&drives, &name)?;
        let before = machine.stop(RunState::SaveVm)?;
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
        let removed = saved.and_then(|()| remove(&old));
        let back = self.resume(&machine, before);
        removed.and(back)
    }

    /// Makes machine and disks what they were.
    ///
    /// # Errors
    /// The guest goes on as it is. Only if a disk could neither be made what it was nor be left as it
    /// is does the guest stay stopped, in run state `internal-error`.
    pub fn load_snapshot(&self, name: &str) -> Result<(), Error> {
        let _only = self.only_snapshot()?;
        let machine = self.machine_at_home()?;
        let drives = writable(&machine)?;
        let mut found = find(&drives, name)?;
        found.dedup_by(|other, first| Arc::ptr_eq(&other.0, &first.0));
        let missing = drives
            .iter()
            .any(|drive| !found.iter().any(|(with, _)| Arc::ptr_eq(with, drive)));
        if missing {
            return Err(Error(format!(
                "Snapshot '{name}' does not exist in one or more devices"
            )));
        }
        let state = found.iter().find_map(|(drive, snapshot)| {
            let state = snapshot.state()?;
            Some((drive, snapshot, state.len))
        });
        let Some((drive, snapshot, len)) = state else {
            return Err(Error::new(
                "This is a disk-only snapshot. Revert to it  offline using qemu-img",
            ));
        };
        if let Some((noted, _)) = found
            .iter()
            .find(|(drive, _)| !drive.bitmaps().info().is_empty())
        {
            return Err(Error(format!(
                "Could not load snapshot '{name}' on '{}': Device has active dirty bitmaps",
                noted.id()
            )));
        }
        self.check_room(len)?;
        for (drive, snapshot) in &found {
            on_file(drive, false, |file| {
                Ok(snapshots::check(file, &snapshot.id())?)
            })?;
        }
        let before = machine.stop(RunState::RestoreVm)?;
        let loaded = self.load(&machine, drive, snapshot).map_err(Failed::whole);
        let failed = match loaded.and_then(|fresh| self.exchange(&machine, fresh, &found)) {
            Ok(fresh) => return self.resume(&fresh, before),
            Err(failed) => failed,
        };
        machine.listen();
        if failed.is_half {
            machine.set_run_state(RunState::InternalError);
            return Err(failed.error);
        }
        let back = machine.claim_drives().map_err(Error::from);
        back.and_then(|()| self.resume(&machine, before))
            .map_err(|second| Error(format!("{}; and then: {second}", failed.error)))?;
        Err(failed.error)
    }

    /// Removes a snapshot from all disks.
    ///
    /// # Errors
    /// No disk has it, or it could not be removed from all.
    pub fn delete_snapshot(&self, name: &str) -> Result<(), Error> {
        let _only = self.only_snapshot()?;
        let machine = self.machine_at_home()?;
        let found = find(&writable(&machine)?, name)?;
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

    /// Keeps another monitor from doing the same.
    fn only_snapshot(&self) -> Result<MutexGuard<'_, ()>, Error> {
        match self.snapshots.try_lock() {
            Ok(only) => Ok(only),
            Err(TryLockError::Poisoned(only)) => Ok(only.into_inner()),
            Err(TryLockError::WouldBlock) => Err(Error::new(UNDER_WAY)),
        }
    }

    /// The machine, if the guest is here and stays here.
    fn machine_at_home(&self) -> Result<Arc<Machine>, Error> {
        if self.board.read().status.is_running() {
            return Err(Error::new(IN_PROGRESS));
        }
        match self.run_state() {
            RunState::InMigrate => Err(Error::new("Guest is waiting for an incoming migration")),
            RunState::PostMigrate => Err(Error::new("The guest is elsewhere")),
            RunState::InternalError => Err(Error::new("KVM could not go on with the guest")),
            _ => Ok(self.machine()),
        }
    }

    /// The guest runs if it ran before.
    fn resume(&self, machine: &Machine, before: RunState) -> Result<(), Error> {
        match before {
            RunState::Running => Ok(machine.start()?),
            other => Ok(machine.stop(other).map(drop)?),
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
            on_file(drive, true, |file| {
                let mut creation = snapshots::create(file, new)?;
                if has_state {
                    tape::record(machine, before, &self.settings, &mut creation)?;
                }
                id = creation.commit()?;
                Ok(())
            })?;
            made.push((drive, id));
            Ok(())
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

    /// A second machine in the state that a snapshot has. The first one's images are let go.
    fn load(
        &self,
        machine: &Machine,
        drive: &Drive,
        snapshot: &Snapshot,
    ) -> Result<Arc<Machine>, Error> {
        machine.release_drives(true)?;
        let fresh = build_machine(&self.config, &self.chardevs, &self.events, true)?;
        fresh.set_run_state(RunState::InMigrate);
        let played = on_file(drive, false, |file| {
            let Some(mut state) = snapshots::vm_state(file, &snapshot.id())? else {
                return Err(io::ErrorKind::NotFound.into());
            };
            tape::play(&mut state, &*fresh, &self.settings, self.uuid())
        });
        match played {
            Ok(()) => Ok(fresh),
            Err(error) => {
                fresh.release_drives(false)?;
                Err(error)
            }
        }
    }

    /// The disks become what they were, and the second machine takes the place of the first.
    fn exchange(
        &self,
        machine: &Machine,
        fresh: Arc<Machine>,
        found: &[Found],
    ) -> Result<Arc<Machine>, Failed> {
        fresh.adopt_drives(machine);
        let own = found.iter().map(|(drive, snapshot)| {
            let id = drive.id();
            let own = fresh.drive(id);
            let own = own.ok_or_else(|| Error(format!("Drive '{id}' is not there any more")))?;
            Ok((own, snapshot.clone()))
        });
        let own = own.collect::<Result<Vec<Found>, Error>>();
        let reverted = own.map_err(Failed::whole).and_then(|own| {
            let reverted = revert(&own);
            // Only a disk keeps its image locked.
            let unused = own.iter().filter(|(drive, _)| drive.disk().is_none());
            unused.for_each(|(drive, _)| drive.release());
            reverted
        });
        if let Err(failed) = reverted {
            return Err(match fresh.release_drives(false) {
                Ok(()) => failed,
                Err(error) => failed.and(&error.into()),
            });
        }
        *lock(&self.machine) = Arc::clone(&fresh);
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

/// Why a snapshot was not loaded.
struct Failed {
    error: Error,
    /// Some disks are what they were then, others are not: nobody can run on that.
    is_half: bool,
}

impl Failed {
    /// All disks are as they were before.
    fn whole(error: Error) -> Self {
        Self {
            error,
            is_half: false,
        }
    }

    /// Something else went wrong too.
    fn and(self, second: &Error) -> Self {
        Self {
            error: Error(format!("{}; and then: {second}", self.error)),
            ..self
        }
    }
}

/// Makes all disks what they were, or leaves all as they are: each has a snapshot of its present
/// meanwhile, to come back to.
fn revert(found: &[Found]) -> Result<(), Failed> {
    let mut present: Vec<(&Arc<Drive>, String)> = Vec::new();
    let mut tried = 0;
    let noted = found.iter().try_for_each(|(drive, _)| {
        drive.claim().map_err(|error| Error(error.line()))?;
        let mut id = String::new();
        on_file(drive, true, |file| {
            id = snapshots::create(file, &PRESENT)?.commit()?;
            Ok(())
        })?;
        present.push((drive, id));
        Ok(())
    });
    let reverted = noted.and_then(|()| {
        found.iter().try_for_each(|(drive, snapshot)| {
            tried += 1;
            apply(drive, &snapshot.id())
        })
    });
    let result = reverted.map_err(|error| {
        let mut touched = present.iter().take(tried);
        match touched.try_for_each(|(drive, id)| apply(drive, id)) {
            Ok(()) => Failed::whole(error),
            Err(second) => Failed {
                is_half: true,
                ..Failed::whole(error).and(&second)
            },
        }
    });
    if result.as_ref().is_err_and(|failed| failed.is_half) {
        // Whoever mends that needs them.
        return result;
    }
    for (drive, id) in &present {
        if let Err(error) = on_file(drive, true, |file| Ok(snapshots::delete(file, id)?)) {
            log::error!("{error}");
        }
    }
    result
}

/// Makes one disk what it was.
fn apply(drive: &Drive, id: &str) -> Result<(), Error> {
    on_file(drive, true, |file| Ok(snapshots::apply(file, id)?))?;
    // Its length may be another one.
    drive.claim().map_err(|error| Error(error.line()))
}

/// What a disk's present is called while an older snapshot is loaded.
const PRESENT: New<'static> = New {
    name: "before-loadvm",
    seconds: 0,
    nanoseconds: 0,
    vm_clock: 0,
};

/// The drives that a snapshot is of, at least one; the first has the machine's state.
fn writable(machine: &Machine) -> Result<Vec<Arc<Drive>>, Error> {
    let all = machine.drives().into_iter();
    let drives: Vec<_> = all
        .filter(|drive| !drive.is_read_only() && !drive.is_deleted())
        .collect();
    if let Some(unfit) = drives.iter().find(|drive| !can_have(drive)) {
        return Err(Error(format!(
            "Device '{}' is writable but does not support snapshots",
            unfit.id()
        )));
    }
    if drives.is_empty() {
        return Err(Error::new("No block device can accept snapshots"));
    }
    Ok(drives)
}

fn can_have(drive: &Arc<Drive>) -> bool {
    let layers = drive.layers();
    let top = layers.first();
    top.is_some_and(|top| top.format == Format::Qcow2)
}

/// Does something with the file of a drive's image.
fn on_file(
    drive: &Drive,
    is_changed: bool,
    mut act: impl FnMut(&File) -> io::Result<()>,
) -> Result<(), Error> {
    // No disk that uses it would have claimed it.
    let is_unused = is_changed && drive.disk().is_none();
    let failed = |why: String| Error(format!("Device '{}': {why}", drive.id()));
    if is_unused {
        drive.claim().map_err(|error| failed(error.line()))?;
    }
    let done = drive.image().with_file(is_changed, &mut act);
    if is_unused {
        drive.release();
    }
    done.map_err(|error| failed(error.to_string()))
}

fn list(drive: &Arc<Drive>) -> Result<Vec<Snapshot>, Error> {
    let mut list = Vec::new();
    on_file(drive, false, |file| {
        list = snapshots::list(file)?;
        Ok(())
    })?;
    Ok(list)
}

/// Snapshots of that name, each drive's latest first.
fn find(drives: &[Arc<Drive>], name: &str) -> Result<Vec<Found>, Error> {
    let mut found = Vec::new();
    for drive in drives {
        let its = list(drive)?.into_iter().rev();
        let its = its.filter(|snapshot| snapshot.name() == name);
        found.extend(its.map(|snapshot| (Arc::clone(drive), snapshot)));
    }
    Ok(found)
}

fn remove(found: &[Found]) -> Result<(), Error> {
    found.iter().try_for_each(|(drive, snapshot)| {
        on_file(drive, true, |file| {
            Ok(snapshots::delete(file, &snapshot.id())?)
        })
    })
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
