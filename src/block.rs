//! Floor 2: what is behind a disk. A [`Backend`] has bytes at offsets; image formats are its
//! implementations, disk devices its users.

mod drive;
mod lock;
#[cfg(test)]
mod memory;
mod raw;
mod stats;

use std::io;

pub use self::drive::{CHUNK, Drive, Fault};
pub use self::lock::LockError;
#[cfg(test)]
pub(crate) use self::memory::{Memory, words};
pub use self::raw::{OpenError, Raw};
pub use self::stats::{Operations, Stats};
use crate::iov::{In, Out};

/// Bytes of a sector, the unit in which disks count.
pub const SECTOR: u64 = 512;

/// An open image. Its users stay within [`Backend::sectors`]; all methods block.
pub trait Backend: Send + Sync {
    /// Length in sectors of [`SECTOR`] bytes; a last one that the image has only in part counts.
    fn sectors(&self) -> u64;

    /// Name of its format.
    fn format(&self) -> &'static str {
        "raw"
    }

    /// Bytes that the image takes on the host.
    fn allocated(&self) -> u64 {
        0
    }

    /// Whether nothing may be written.
    fn is_read_only(&self) -> bool;

    /// Fills all of `rooms` from `offset` (bytes) on; what lies behind the image's end is zero.
    /// `rooms` may be used up.
    ///
    /// # Errors
    /// Of the host; the rooms may have been filled in part.
    fn read(&self, offset: u64, rooms: &mut Vec<In<'_>>) -> io::Result<()>;

    /// Writes all of `pieces` at `offset` (bytes). `pieces` may be used up.
    ///
    /// # Errors
    /// Of the host, or the image is read-only; some may have been written.
    fn write(&self, offset: u64, pieces: &mut Vec<Out<'_>>) -> io::Result<()>;

    /// Makes `len` bytes from `offset` on zero. With `may_unmap` they need not have room in the image
    /// any more.
    ///
    /// # Errors
    /// As for [`Self::write`].
    fn zero(&self, offset: u64, len: u64, may_unmap: bool) -> io::Result<()>;

    /// Keeps others, who ask for the lock, from using the image as well. Once is enough.
    ///
    /// # Errors
    /// Somebody else uses it, or the host does not lock.
    fn claim(&self) -> Result<(), LockError> {
        Ok(())
    }

    /// Lets others use it.
    fn release(&self) {}

    /// Makes sure that what was written survives a loss of power.
    ///
    /// # Errors
    /// Of the host.
    fn flush(&self) -> io::Result<()>;
}
