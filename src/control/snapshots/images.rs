//! The images that snapshots are in, and those that each has.

use std::fs::File;
use std::io;
use std::sync::Arc;

use super::super::Error;
use crate::block::snapshots::{self, Snapshot};
use crate::block::{Backend, Drive};
use crate::config::Format;
use crate::vm::guest::Guest;
use crate::vm::machine::Machine;

/// A snapshot of one drive's.
pub(super) type Found = (Arc<Drive>, Snapshot);

/// The drives that a snapshot is of, at least one; the first has the machine's state.
pub(super) fn writable(machine: &Machine) -> Result<Vec<Arc<Drive>>, Error> {
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

/// Whether its image can have snapshots.
pub(super) fn can_have(drive: &Arc<Drive>) -> bool {
    let layers = drive.layers();
    let top = layers.first();
    top.is_some_and(|top| top.format == Format::Qcow2)
}

/// Does something with the file of a drive's image.
pub(super) fn on_file(
    drive: &Drive,
    is_changed: bool,
    mut act: impl FnMut(&File) -> io::Result<()>,
) -> Result<(), Error> {
    let failed = |why: String| Error(format!("Device '{}': {why}", drive.id()));
    let mut done = || drive.image().with_file(is_changed, &mut act);
    let done = match is_changed {
        true => drive.as_owner(done).map_err(|error| failed(error.line()))?,
        false => done(),
    };
    done.map_err(|error| failed(error.to_string()))
}

/// All that a drive has.
pub(super) fn list(drive: &Arc<Drive>) -> Result<Vec<Snapshot>, Error> {
    let mut list = Vec::new();
    on_file(drive, false, |file| {
        list = snapshots::list(file)?;
        Ok(())
    })?;
    Ok(list)
}

/// Snapshots of that name, each drive's latest first.
pub(super) fn find(drives: &[Arc<Drive>], name: &str) -> Result<Vec<Found>, Error> {
    let mut found = Vec::new();
    for drive in drives {
        let its = list(drive)?.into_iter().rev();
        let its = its.filter(|snapshot| snapshot.name() == name);
        found.extend(its.map(|snapshot| (Arc::clone(drive), snapshot)));
    }
    Ok(found)
}

/// The latest of that name on every drive.
pub(super) fn loadable(drives: &[Arc<Drive>], name: &str) -> Result<Vec<Found>, Error> {
    let mut found = find(drives, name)?;
    found.dedup_by(|other, first| Arc::ptr_eq(&other.0, &first.0));
    if found.len() < drives.len() {
        return Err(Error(format!(
            "Snapshot '{name}' does not exist in one or more devices"
        )));
    }
    if let Some((noted, _)) = found
        .iter()
        .find(|(drive, _)| !drive.bitmaps().info().is_empty())
    {
        return Err(Error(format!(
            "Could not load snapshot '{name}' on '{}': Device has active dirty bitmaps",
            noted.id()
        )));
    }
    Ok(found)
}

/// All of it is there and well. The guest's disk waits only for the tables.
pub(super) fn check((drive, snapshot): &Found) -> Result<(), Error> {
    let id = snapshot.id();
    on_file(drive, false, |file| Ok(snapshots::check(file, &id)?))?;
    let well = snapshots::check_state(&kept_file(drive)?, &id);
    well.map_err(|error| Error(format!("Device '{}': {error}", drive.id())))
}

/// The file of a drive's image, for what nobody changes: the states of snapshots.
pub(super) fn kept_file(drive: &Drive) -> Result<File, Error> {
    let mut kept = None;
    on_file(drive, false, |file| {
        kept = Some(file.try_clone()?);
        Ok(())
    })?;
    kept.ok_or_else(|| Error(format!("Device '{}' has no file", drive.id())))
}

/// Removes them.
pub(super) fn remove(found: &[Found]) -> Result<(), Error> {
    found.iter().try_for_each(|(drive, snapshot)| {
        on_file(drive, true, |file| {
            Ok(snapshots::delete(file, &snapshot.id())?)
        })
    })
}
