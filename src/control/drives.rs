//! Drives while the machine is there.

use std::sync::{RwLockReadGuard, TryLockError};

use super::snapshots::UNDER_WAY;
use super::{Control, Error};
use crate::block::{Backend, Limits};
use crate::config::DriveConfig;
use crate::vm::guest::Guest;

impl Control {
    /// Opens another drive; see [`crate::vm::machine::Machine::add_drive`].
    pub fn add_drive(&self, config: &DriveConfig) -> Result<(), Error> {
        let _changed = self.changed_drives()?;
        Ok(self.machine().add_drive(config)?)
    }

    /// Takes a drive's image out.
    pub fn delete_drive(&self, id: &str) -> Result<(), Error> {
        let _changed = self.changed_drives()?;
        Ok(self.machine().delete_drive(id)?)
    }

    /// Makes a drive `len` bytes long.
    pub fn resize_drive(&self, id: &str, len: u64) -> Result<(), Error> {
        let _changed = self.changed_drives()?;
        Ok(self.machine().resize_drive(id, len)?)
    }

    /// Moves what a drive's image has into what is behind it.
    pub fn commit_drive(&self, id: &str) -> Result<(), Error> {
        let _changed = self.changed_drives()?;
        Ok(self.machine().commit_drive(id)?)
    }

    /// The same of every drive whose image has something behind it.
    pub fn commit_all(&self) -> Result<(), Error> {
        let _changed = self.changed_drives()?;
        let machine = self.machine();
        let drives = machine.drives();
        let mut layered = drives.iter().filter(|drive| drive.layers().len() > 1);
        layered.try_for_each(|drive| Ok(machine.commit_drive(drive.id())?))
    }

    /// Limits the drive of that name, or of the disk of that name.
    pub fn limit_drive(&self, device: &str, limits: Limits) -> Result<(), Error> {
        let machine = self.machine();
        let of_disk = || {
            let mut drives = machine.drives().into_iter();
            drives.find(|drive| drive.disk() == Some(device))
        };
        let drive = machine.drive(device).or_else(of_disk);
        let drive = drive.ok_or_else(|| Error(format!("Device '{device}' not found")))?;
        limits.check().map_err(Error::new)?;
        drive.throttle().set_limits(limits, device);
        Ok(())
    }

    /// Held while drives are changed: no snapshot is taken or loaded meanwhile.
    pub(super) fn changed_drives(&self) -> Result<RwLockReadGuard<'_, ()>, Error> {
        match self.drives.try_read() {
            Ok(changed) => Ok(changed),
            Err(TryLockError::Poisoned(changed)) => Ok(changed.into_inner()),
            Err(TryLockError::WouldBlock) => Err(Error::new(UNDER_WAY)),
        }
    }
}
