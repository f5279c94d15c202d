//! Floor 2: what is behind a disk. A [`Backend`] has bytes at offsets; image formats are its
//! implementations, disk devices its users.

mod bitmap;
mod chain;
mod drive;
mod layered;
mod lock;
#[cfg(test)]
mod memory;
mod open;
mod probe;
mod raw;
pub mod snapshots;
mod source;
mod stats;
mod throttle;

use std::fs::File;
use std::io;

pub use self::bitmap::{Bitmap, BitmapError, BitmapInfo, Bitmaps};
pub use self::drive::{CHUNK, Drive, Fault, Policy};
pub use self::lock::LockError;
#[cfg(test)]
pub(crate) use self::memory::{Memory, words};
pub use self::open::{OpenError, OpenOptions, open};
pub use self::raw::Raw;
pub use self::stats::{Operations, Stats};
pub use self::throttle::{Limits, Throttle};
use crate::config::Format;
use crate::iov::{In, Out};

/// Bytes of a sector, the unit in which disks count.
pub const SECTOR: u64 = 512;

/// A file of an image, for whoever wants to know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layer {
    /// Its path.
    pub file: String,
    /// Its format.
    pub format: Format,
    /// Bytes of the disk in it.
    pub len: u64,
    /// Bytes of the file.
    pub file_len: u64,
    /// Bytes that it takes on the host.
    pub allocated: u64,
    /// What its header says is behind it, and of which format.
    pub behind: Option<(String, Option<Format>)>,
    /// What else its header says.
    pub facts: Option<snapshots::Facts>,
}

/// An open image. Its users stay within [`Backend::sectors`]; all methods block.
pub trait Backend: Send + Sync {
    /// Length in sectors of [`SECTOR`] bytes; a last one that the image has only in part counts.
    fn sectors(&self) -> u64;

    /// The image and what is behind it.
    fn layers(&self) -> Vec<Layer> {
        Vec::new()
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
    /// Of the host, or the image is read-only or not claimed; some may have been written.
    fn write(&self, offset: u64, pieces: &mut Vec<Out<'_>>) -> io::Result<()>;

    /// Makes `len` bytes from `offset` on zero. With `may_unmap` they need not have room in the image
    /// any more.
    ///
    /// # Errors
    /// As for [`Self::write`].
    fn zero(&self, offset: u64, len: u64, may_unmap: bool) -> io::Result<()>;

    /// Says that nobody wants to know any more what `len` bytes from `offset` on hold.
    ///
    /// # Errors
    /// As for [`Self::write`].
    fn discard(&self, _offset: u64, _len: u64) -> io::Result<()> {
        Ok(())
    }

    /// Whether what is at `offset` is in the image itself, not behind it or nowhere; and for how many
    /// bytes from there on, at least one and perhaps more than `len`, the answer is the same.
    ///
    /// # Errors
    /// Of the host.
    fn is_allocated(&self, _offset: u64, len: u64) -> io::Result<(bool, u64)> {
        Ok((true, len))
    }

    /// Makes it `len` bytes long, a multiple of [`SECTOR`].
    ///
    /// # Errors
    /// Of the host, or the image's length can not be changed.
    fn resize(&self, _len: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Does something with its file, of which nothing is only in memory meanwhile; nobody else uses the
    /// image. With `is_changed` its metadata are read anew afterwards.
    ///
    /// # Errors
    /// Those of `act`, of the host, or it is not that kind of image.
    fn with_file(
        &self,
        _is_changed: bool,
        _act: &mut dyn FnMut(&File) -> io::Result<()>,
    ) -> io::Result<()> {
        Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP))
    }

    /// Moves what the image has into what is behind it, and empties it.
    ///
    /// # Errors
    /// Of the host, or there is nothing behind it; what was not moved is where it was.
    fn commit(&self) -> io::Result<()> {
        Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP))
    }

    /// Somebody waits for all requests: from here on (`true`) until (`false`) none is held up.
    fn hurry(&self, _is_hurry: bool) {}

    /// Keeps others, who ask for the lock, from using the image as well. Once is enough.
    ///
    /// # Errors
    /// Somebody else uses it, or the host does not lock.
    fn claim(&self) -> Result<(), LockError> {
        Ok(())
    }

    /// Lets others use it.
    fn release(&self) {}

    /// Makes sure that what was written survives the end of this process.
    ///
    /// # Errors
    /// Of the host.
    fn settle(&self) -> io::Result<()> {
        Ok(())
    }

    /// Makes sure that what was written survives a loss of power.
    ///
    /// # Errors
    /// Of the host.
    fn flush(&self) -> io::Result<()>;
}
