//! Dirty bitmaps of drives.

use std::sync::Arc;

use super::{Control, Error};
use crate::block::{Bitmap, BitmapInfo, Drive};
use crate::vm::guest::Guest;

impl Control {
    /// Makes a bitmap of a drive; without a granularity, one that fits its image.
    pub fn add_bitmap(
        &self,
        drive: &str,
        name: &str,
        granularity: Option<u32>,
        is_enabled: bool,
    ) -> Result<(), Error> {
        let _changed = self.changed_drives()?;
        let found = self.machine().drive(drive);
        let found = found.ok_or_else(|| match name {
            // Looked at first.
            "" => Error::new("Bitmap name cannot be empty"),
            _ => Error(format!(
                "Cannot find device='{drive}' nor node-name='{drive}'"
            )),
        })?;
        let added = found.add_bitmap(name, granularity, |bitmap| bitmap.is_enabled = is_enabled);
        added.map_err(Error::new)
    }

    /// Removes a bitmap.
    pub fn remove_bitmap(&self, drive: &str, name: &str) -> Result<(), Error> {
        let drive = self.bitmaps_drive(drive)?;
        drive.bitmaps().remove(name).map_err(Error::new)
    }

    /// Nothing is dirty in it any more.
    pub fn clear_bitmap(&self, drive: &str, name: &str) -> Result<(), Error> {
        self.change_bitmap(drive, name, Bitmap::clear)
    }

    /// Writes are noted in it, or no longer.
    pub fn enable_bitmap(&self, drive: &str, name: &str, is_enabled: bool) -> Result<(), Error> {
        self.change_bitmap(drive, name, |bitmap| bitmap.is_enabled = is_enabled)
    }

    /// All bitmaps, by the names of their drives.
    pub fn bitmaps(&self) -> Vec<(String, BitmapInfo)> {
        let machine = self.machine();
        let drives = machine.drives().into_iter();
        let of_drive = |drive: Arc<Drive>| {
            let infos = drive.bitmaps().info().into_iter();
            infos.map(move |info| (drive.id().to_owned(), info))
        };
        drives.flat_map(of_drive).collect()
    }

    fn change_bitmap(
        &self,
        drive: &str,
        name: &str,
        change: impl FnOnce(&mut Bitmap),
    ) -> Result<(), Error> {
        let drive = self.bitmaps_drive(drive)?;
        drive.bitmaps().change(name, change).map_err(Error::new)
    }

    fn bitmaps_drive(&self, id: &str) -> Result<Arc<Drive>, Error> {
        let drive = self.machine().drive(id);
        drive.ok_or_else(|| Error(format!("Node '{id}' not found")))
    }
}
