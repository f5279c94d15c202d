//! Locks on an image, by which QEMU and hmpsh keep each other from writing to one that is in use.
//!
//! Read locks of open file descriptions, on single bytes far in front of anything that matters: byte
//! 100 + n says that permission n is used, byte 200 + n that nobody else may use it. Whether another
//! has such a byte is asked afterwards, so of two that come at once at least one sees the other.
//! QEMU: `raw_apply_lock_bytes` and `raw_check_lock_bytes`.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;

use nix::errno::Errno as Failed;
use nix::fcntl::{FcntlArg, fcntl};

use super::OpenError;
use crate::errno::Errno;

/// Why an image could not be locked, in QEMU's words.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Somebody else uses the image.
    #[error("Failed to get {lock} lock\nIs another process using the image [{path}]?")]
    Held {
        /// The lock that is in the way.
        lock: &'static str,
        /// The image.
        path: String,
    },
    /// The host does not lock.
    #[error("Failed to lock byte {byte}: {}", Errno(.source))]
    Host {
        /// Which byte.
        byte: i64,
        /// Why.
        source: io::Error,
    },
    /// What is in the image now can not be used.
    #[error(transparent)]
    Image(#[from] OpenError),
}

impl LockError {
    /// In one line.
    pub fn line(&self) -> String {
        self.to_string().replace('\n', ". ")
    }
}

/// What an image is locked for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Use {
    /// It is written, not only read.
    pub(super) writes: bool,
    /// Its length is a matter of who has it: the file grows with its format, or is behind another.
    pub(super) resizes: bool,
}

impl Use {
    /// Permissions that are used.
    fn used(self) -> impl Iterator<Item = i64> {
        let all = [
            (READ, true),
            (WRITE, self.writes),
            (RESIZE, self.writes && self.resizes),
        ];
        all.into_iter()
            .filter(|(_, is)| *is)
            .map(|(permission, _)| permission)
    }

    /// Permissions that nobody else may use.
    fn unshared(self) -> impl Iterator<Item = i64> {
        let all = [(WRITE, true), (RESIZE, self.resizes)];
        all.into_iter()
            .filter(|(_, is)| *is)
            .map(|(permission, _)| permission)
    }
}

/// Locks an image that nobody else may write.
///
/// # Errors
/// Then nothing is locked.
pub(super) fn take(file: &File, path: &str, wanted: Use) -> Result<(), LockError> {
    let used = wanted.used().map(|permission| USED + permission);
    let unshared = wanted.unshared().map(|permission| UNSHARED + permission);
    let result = used
        .chain(unshared)
        .try_for_each(|byte| lock(file, byte))
        .and_then(|()| check(file, path, wanted));
    result.inspect_err(|_| leave(file))
}

/// Unlocks it.
pub(super) fn leave(file: &File) {
    // Of a lock that is not held nothing is left either.
    let _ = fcntl(
        file.as_fd(),
        FcntlArg::F_OFD_SETLK(&at(libc::F_UNLCK, USED, WHOLE)),
    );
}

/// Why nothing is written to an image that is not locked, or need not be, for this process.
pub(super) fn not_ours() -> io::Error {
    let text = "the image belongs to whoever runs the guest";
    io::Error::new(io::ErrorKind::PermissionDenied, text)
}

fn check(file: &File, path: &str, wanted: Use) -> Result<(), LockError> {
    let held = |lock| LockError::Held {
        lock,
        path: path.to_owned(),
    };
    for permission in wanted.used() {
        if is_held(file, UNSHARED + permission)? {
            return Err(held(match permission {
                WRITE => "\"write\"",
                RESIZE => "\"resize\"",
                _ => "\"consistent read\"",
            }));
        }
    }
    for permission in wanted.unshared() {
        if is_held(file, USED + permission)? {
            return Err(held(match permission {
                WRITE => "shared \"write\"",
                _ => "shared \"resize\"",
            }));
        }
    }
    Ok(())
}

fn lock(file: &File, byte: i64) -> Result<(), LockError> {
    let result = fcntl(
        file.as_fd(),
        FcntlArg::F_OFD_SETLK(&at(libc::F_RDLCK, byte, 1)),
    );
    result.map(drop).map_err(|error| failed(byte, error))
}

/// Whether another has a lock there.
fn is_held(file: &File, byte: i64) -> Result<bool, LockError> {
    let mut query = at(libc::F_WRLCK, byte, 1);
    let result = fcntl(file.as_fd(), FcntlArg::F_OFD_GETLK(&mut query));
    result.map_err(|error| failed(byte, error))?;
    Ok(query.l_type != libc::F_UNLCK as libc::c_short)
}

fn failed(byte: i64, error: Failed) -> LockError {
    LockError::Host {
        byte,
        source: error.into(),
    }
}

fn at(kind: libc::c_int, byte: i64, len: i64) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: byte,
        l_len: len,
        l_pid: 0,
    }
}

/// Permissions.
const READ: i64 = 0;
const WRITE: i64 = 1;
const RESIZE: i64 = 3;
/// Where the bytes of permissions in use begin.
const USED: i64 = 100;
/// Where the bytes of permissions that are not shared begin.
const UNSHARED: i64 = 200;
/// From the one to the other and beyond.
const WHOLE: i64 = 200;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_writes_or_many_read() {
        let image = tempfile::NamedTempFile::new().unwrap();
        let open = || {
            File::options()
                .read(true)
                .write(true)
                .open(image.path())
                .unwrap()
        };
        let (a, b, c) = (open(), open(), open());
        let take = |file: &File, writes| {
            let resizes = false;
            super::take(file, "x.img", Use { writes, resizes })
        };
        let refused = |file: &File, writes| take(file, writes).unwrap_err().line();
        take(&a, true).unwrap();
        // What one has does not keep it from asking again.
        take(&a, true).unwrap();
        assert_eq!(
            refused(&b, true),
            "Failed to get \"write\" lock. Is another process using the image [x.img]?"
        );
        assert!(refused(&b, false).starts_with("Failed to get shared \"write\" lock. "));
        leave(&a);
        take(&b, false).unwrap();
        take(&c, false).unwrap();
        assert!(refused(&a, true).starts_with("Failed to get \"write\" lock. "));
        leave(&b);
        drop(c);
        take(&a, true).unwrap();
    }
}
