//! `-pidfile`: a file with our process id, locked while we run, removed at the end.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};

use crate::errno::Errno;

/// Why there is no pid file.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The path can not be opened or written.
    #[error("cannot create PID file: Could not create '{path}': {}", Errno(.source))]
    Create {
        /// The path.
        path: String,
        /// Why.
        source: io::Error,
    },
    /// Another process runs with it.
    #[error(
        "cannot create PID file: Cannot lock pid file: Resource temporarily unavailable{}",
        held_by(.0)
    )]
    Locked(String),
}

/// The file, ours until it is dropped.
#[derive(Debug)]
pub struct Pidfile {
    file: File,
    path: PathBuf,
}

impl Pidfile {
    /// Creates the file, or takes over one whose process is gone.
    ///
    /// # Errors
    /// [`Error::Create`], [`Error::Locked`].
    pub fn create(path: &Path) -> Result<Self, Error> {
        let failed = |source| Error::Create {
            path: path.display().to_string(),
            source,
        };
        loop {
            let mut file = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .open(path)
                .map_err(failed)?;
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {}
                Err(rustix::io::Errno::WOULDBLOCK) => {
                    let mut holder = String::new();
                    // Who holds it is a help, no more.
                    let _ = Read::by_ref(&mut file).take(20).read_to_string(&mut holder);
                    return Err(Error::Locked(holder.trim().to_owned()));
                }
                Err(error) => return Err(failed(error.into())),
            }
            // Its last owner may have removed it between our opening and our locking it.
            if !is_same(&file, path) {
                continue;
            }
            file.set_len(0).map_err(failed)?;
            writeln!(file, "{}", std::process::id()).map_err(failed)?;
            return Ok(Self {
                file,
                // Removed by this name, wherever the process stands then.
                path: std::path::absolute(path).map_err(failed)?,
            });
        }
    }
}

impl Drop for Pidfile {
    fn drop(&mut self) {
        if is_same(&self.file, &self.path) {
            // Gone already is as good.
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn is_same(file: &File, path: &Path) -> bool {
    let identity = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
    match (file.metadata(), fs::metadata(path)) {
        (Ok(ours), Ok(theirs)) => identity(ours) == identity(theirs),
        _ => false,
    }
}

fn held_by(holder: &str) -> String {
    if holder.is_empty() {
        String::new()
    } else {
        format!(" (process {holder} holds it)")
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn one_process_holds_it_and_takes_it_along() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pid");
        fs::write(&path, "99999999 and more\n").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        let first = Pidfile::create(&path).unwrap();
        let own = std::process::id();
        assert_eq!(fs::read_to_string(&path).unwrap(), format!("{own}\n"));
        assert_eq!(
            Pidfile::create(&path).unwrap_err().to_string(),
            format!(
                "cannot create PID file: Cannot lock pid file: Resource temporarily unavailable \
                 (process {own} holds it)"
            )
        );
        drop(first);
        assert!(!path.exists());
        let second = Pidfile::create(&path).unwrap();
        assert_eq!(
            fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o600
        );
        fs::remove_file(&path).unwrap();
        fs::write(&path, "someone else's").unwrap();
        drop(second);
        assert!(path.exists());
        assert_eq!(
            Pidfile::create(Path::new("/no/dir/pid"))
                .unwrap_err()
                .to_string(),
            "cannot create PID file: Could not create '/no/dir/pid': No such file or directory"
        );
    }
}
