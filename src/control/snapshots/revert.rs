//! Making disks what they were: all of them, or none.

use std::sync::Arc;

use super::super::Error;
use super::images::{Found, on_file};
use crate::block::snapshots::{self, New};
use crate::block::{Backend, Drive};

/// Why disks were not made what they were.
pub(super) struct Failed {
    pub(super) error: Error,
    /// Some are what they were then, others are not: nobody can run on that.
    pub(super) is_half: bool,
}

impl Failed {
    /// All disks are as they were before.
    pub(super) fn whole(error: Error) -> Self {
        Self {
            error,
            is_half: false,
        }
    }
}

/// Makes all disks what they were, or leaves all as they are.
///
/// They are claimed then.
pub(super) fn revert(found: &[Found]) -> Result<(), Failed> {
    let reverted = match found {
        // That is all or nothing by itself.
        [(drive, snapshot)] => own(drive)
            .and_then(|()| apply(drive, &snapshot.id()))
            .map_err(Failed::whole),
        _ => revert_all(found),
    };
    // Only a disk keeps its image locked.
    let unused = found.iter().filter(|(drive, _)| drive.disk().is_none());
    unused.for_each(|(drive, _)| drive.release());
    reverted
}

/// Each has a snapshot of its present meanwhile, to come back to.
fn revert_all(found: &[Found]) -> Result<(), Failed> {
    let mut present: Vec<(&Arc<Drive>, String)> = Vec::new();
    let mut tried = 0;
    let noted = found.iter().try_for_each(|(drive, _)| {
        own(drive)?;
        let mut id = String::new();
        let noted = on_file(drive, true, |file| {
            id = snapshots::create(file, &PRESENT)?.commit()?;
            Ok(())
        });
        if !id.is_empty() {
            present.push((drive, id));
        }
        noted
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
                error: Error(format!("{error}; and then: {second}")),
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

fn own(drive: &Drive) -> Result<(), Error> {
    let claimed = drive.claim();
    claimed.map_err(|error| Error(format!("Device '{}': {}", drive.id(), error.line())))
}

/// Makes one disk what it was.
fn apply(drive: &Drive, id: &str) -> Result<(), Error> {
    on_file(drive, true, |file| Ok(snapshots::apply(file, id)?))?;
    // Its length may be another one.
    own(drive)
}

/// What a disk's present is called while an older snapshot is loaded.
const PRESENT: New<'static> = New {
    name: PRESENT_NAME,
    seconds: 0,
    nanoseconds: 0,
    vm_clock: 0,
};

/// Its name.
pub(super) const PRESENT_NAME: &str = "before-loadvm";
