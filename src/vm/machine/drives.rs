//! Drives while the machine is there: added, taken out, made longer.

use std::sync::{Arc, PoisonError, RwLockReadGuard, RwLockWriteGuard};

use super::{Machine, disks};
use crate::block::{Backend, Drive, SECTOR};
use crate::config::{DriveConfig, MachineConfig};
use crate::errno::Errno;
use crate::vm::guest::Error;

impl Machine {
    /// All drives, in the order they were given.
    pub(super) fn all_drives(&self) -> Vec<Arc<Drive>> {
        self.read_drives().clone()
    }

    /// The drive of that name, if there is one.
    pub fn drive(&self, id: &str) -> Option<Arc<Drive>> {
        let drives = self.read_drives();
        let found = drives
            .iter()
            .find(|drive| drive.id() == id && !drive.is_deleted());
        found.cloned()
    }

    /// Opens another drive, which no disk uses.
    ///
    /// # Errors
    /// There is one of that name, or its image can not be opened.
    pub fn add_drive(&self, config: &DriveConfig) -> Result<(), Error> {
        let id = &config.id;
        if self.drive(id).is_some() {
            return Err(Error::State(format!("Duplicate ID '{id}' for drive")));
        }
        let drive = disks::open_drive(config, None).map_err(Error::State)?;
        self.write_drives().push(drive);
        Ok(())
    }

    /// The drives for another machine of that configuration, which takes the place of this one.
    /// Images that disks use are opened anew: they may be other files now.
    ///
    /// # Errors
    /// One can not be opened.
    pub fn reopen_drives(&self, config: &MachineConfig) -> Result<Vec<Arc<Drive>>, Error> {
        let reopened = self.all_drives().into_iter().map(|drive| {
            let of_same_disk = |index: &usize| {
                drive.disk().is_some() && config.disk_of(*index).as_deref() == drive.disk()
            };
            let found = (0..config.drives.len()).find(of_same_disk);
            let Some(index) = found.filter(|_| !drive.is_deleted()) else {
                return Ok(drive);
            };
            let anew = disks::open_drive(&config.drives[index], config.disk_of(index));
            let anew = anew.map_err(Error::State)?;
            anew.adopt(&drive);
            Ok(anew)
        });
        reopened.collect()
    }

    /// Takes a drive's image out. The disk that uses it stays, and fails.
    ///
    /// # Errors
    /// There is none of that name, or a migration sends it.
    pub fn delete_drive(&self, id: &str) -> Result<(), Error> {
        let drive = self.idle_drive(id, |id| format!("Device '{id}' not found"))?;
        drive.delete();
        if drive.disk().is_none() {
            self.write_drives()
                .retain(|other| !Arc::ptr_eq(other, &drive));
        }
        Ok(())
    }

    /// Makes a drive `len` bytes long, and tells the guest.
    ///
    /// # Errors
    /// There is none of that name, a migration sends it, or its image can not be so long.
    pub fn resize_drive(&self, id: &str, len: u64) -> Result<(), Error> {
        let missing = |id: &str| format!("Cannot find device='{id}' nor node-name=''");
        let drive = self.idle_drive(id, missing)?;
        if drive.is_read_only() {
            return Err(Error::State("Image is read-only".to_owned()));
        }
        let resized = drive.as_owner(|| drive.resize(len.next_multiple_of(SECTOR)));
        let resized = resized.map_err(|error| Error::State(error.to_string()))?;
        resized.map_err(|error| Error::State(format!("Failed to resize: {}", Errno(&error))))?;
        let users = self.attached.iter().zip(&self.bus.disks);
        for (_, disk) in users.filter(|((other, _), _)| Arc::ptr_eq(other, &drive)) {
            disk.config_changed();
        }
        Ok(())
    }

    /// Moves what a drive's image has into what is behind it.
    ///
    /// # Errors
    /// There is none of that name, a migration sends it, or as [`Backend::commit`].
    pub fn commit_drive(&self, id: &str) -> Result<(), Error> {
        let drive = self.idle_drive(id, |id| format!("Device '{id}' not found"))?;
        let failed = |why: String| Error::State(format!("'commit' error for '{id}': {why}"));
        let done = drive.as_owner(|| drive.commit());
        let done = done.map_err(|error| failed(error.line()))?;
        done.map_err(|error| failed(Errno(&error).to_string()))
    }

    /// The drive of that name, which no migration sends.
    fn idle_drive(&self, id: &str, missing: impl Fn(&str) -> String) -> Result<Arc<Drive>, Error> {
        let drive = self.drive(id);
        let drive = drive.ok_or_else(|| Error::State(missing(id)))?;
        if drive.is_busy() {
            return Err(Error::State(format!(
                "Node '{id}' is busy: block device is in use by migration"
            )));
        }
        Ok(drive)
    }

    fn read_drives(&self) -> RwLockReadGuard<'_, Vec<Arc<Drive>>> {
        self.drives.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_drives(&self) -> RwLockWriteGuard<'_, Vec<Arc<Drive>>> {
        self.drives.write().unwrap_or_else(PoisonError::into_inner)
    }
}
