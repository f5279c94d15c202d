//! Why something was not done with a snapshot.

use std::io;

use crate::errno::Errno;

/// Why something was not done, in QEMU's words where it has some.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The host says no.
    #[error("Failed to {what}: {}", Errno(.source))]
    Host {
        /// What failed: `read the L1 table`.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The file is something else.
    #[error("Image is not in qcow2 format")]
    Format,
    /// A qcow2 of the future.
    #[error("Unsupported qcow2 version {0}")]
    Version(u32),
    /// The image has what these functions can not handle.
    #[error("Unsupported qcow2 feature(s): {0}")]
    Feature(String),
    /// It is encrypted.
    #[error("Unsupported qcow2 feature(s): encryption")]
    Encryption,
    /// The image contradicts itself. Nothing was changed.
    #[error("Image is corrupt: {0}")]
    Corrupt(String),
    /// Something is larger than QEMU would have it.
    #[error("{0} too large")]
    TooLarge(&'static str),
    /// There is no snapshot with that ID.
    #[error("Snapshot '{0}' does not exist")]
    NotFound(String),
    /// A snapshot can not have that name.
    #[error("'{0}' can not be the name of a snapshot: it must have 1 to 255 bytes, none of them 0")]
    Name(String),
    /// There are 65536 snapshots, or no higher ID.
    #[error("Too many snapshots")]
    TooMany,
    /// A cluster is used as often as its reference count can tell.
    #[error("Reference count of the cluster at {offset:#x} can not be more than {max}")]
    Overflow {
        /// Where in the file.
        offset: u64,
        /// The highest count.
        max: u64,
    },
    /// The disk is to get another size, and snapshots may not know theirs.
    #[error("Can't resize a v2 image which has snapshots")]
    Resize,
    /// The writer of a VM state did not write all of it.
    #[error("The VM state was not written completely")]
    Incomplete,
}

/// With a result of the host what was tried.
pub(super) fn to<T>(what: &'static str, result: io::Result<T>) -> Result<T, Error> {
    result.map_err(|source| Error::Host { what, source })
}

impl From<Error> for io::Error {
    fn from(error: Error) -> Self {
        Self::other(error)
    }
}
