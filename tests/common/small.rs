//! A file system with little room.

use std::path::Path;
use std::process::Command;

/// A tmpfs of its own; gone when dropped. Only root can have one.
pub(crate) struct SmallDisk {
    place: tempfile::TempDir,
}

impl SmallDisk {
    /// One with those mount options, such as `size=32k`.
    pub(crate) fn new(options: &str) -> Self {
        let place = tempfile::tempdir().unwrap();
        let disk = Self { place };
        disk.mount(options);
        disk
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        self.place.path()
    }

    /// Mounts it with other options (`remount,…`).
    pub(crate) fn mount(&self, options: &str) {
        let mut mount = Command::new("mount");
        let mount = mount.args(["-t", "tmpfs", "-o", options, "none"]);
        assert!(mount.arg(self.path()).status().unwrap().success());
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.path()).status();
    }
}
