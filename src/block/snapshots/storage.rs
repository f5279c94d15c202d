//! Where an image's bytes are: a file, or in tests something that fails when it is told to.

use std::fs::File;
use std::io::{self, ErrorKind, Seek, SeekFrom};
use std::os::unix::fs::FileExt;

use rustix::fs::{SeekFrom as Position, seek};
use rustix::io::Errno;

use super::error::{Error, to};

/// Bytes at offsets, with the meaning of the system calls of these names.
pub trait Storage {
    /// Reads some bytes at `offset`; 0 are read at the end only.
    ///
    /// # Errors
    /// Of the host.
    fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<usize>;

    /// Whether so many bytes at `offset` are known to be zero without being read.
    fn is_hole(&self, _offset: u64, _len: u64) -> bool {
        false
    }

    /// Writes some bytes at `offset`.
    ///
    /// # Errors
    /// Of the host.
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<usize>;

    /// Returns when everything written so far survives a loss of power.
    ///
    /// # Errors
    /// Of the host.
    fn flush(&self) -> io::Result<()>;

    /// Length in bytes.
    ///
    /// # Errors
    /// Of the host.
    fn size(&self) -> io::Result<u64>;

    /// Cuts off what is behind that length in bytes.
    ///
    /// # Errors
    /// Of the host.
    fn set_size(&self, size: u64) -> io::Result<()>;
}

impl Storage for File {
    fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<usize> {
        FileExt::read_at(self, bytes, offset)
    }

    fn is_hole(&self, offset: u64, len: u64) -> bool {
        match seek(self, Position::Data(offset)) {
            Ok(data) => data >= offset + len,
            // Nothing but holes up to the end.
            Err(error) => error == Errno::NXIO,
        }
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<usize> {
        FileExt::write_at(self, bytes, offset)
    }

    fn flush(&self) -> io::Result<()> {
        self.sync_data()
    }

    fn size(&self) -> io::Result<u64> {
        // What the metadata say of a block device is 0.
        let mut file = self;
        file.seek(SeekFrom::End(0))
    }

    fn set_size(&self, size: u64) -> io::Result<()> {
        self.set_len(size)
    }
}

/// Fills `bytes`; what is behind the file's end is zero. `what` is what fails if this fails.
pub(super) fn read(
    storage: &impl Storage,
    bytes: &mut [u8],
    offset: u64,
    what: &'static str,
) -> Result<(), Error> {
    let mut done = 0;
    while done < bytes.len() {
        match storage.read_at(&mut bytes[done..], offset + done as u64) {
            Ok(0) => break,
            Ok(count) => done += count,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return to(what, Err(error)),
        }
    }
    bytes[done..].fill(0);
    Ok(())
}

/// Writes all of `bytes`.
pub(super) fn write(
    storage: &impl Storage,
    bytes: &[u8],
    offset: u64,
    what: &'static str,
) -> Result<(), Error> {
    let mut done = 0;
    while done < bytes.len() {
        match storage.write_at(&bytes[done..], offset + done as u64) {
            Ok(0) => return to(what, Err(ErrorKind::WriteZero.into())),
            Ok(count) => done += count,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return to(what, Err(error)),
        }
    }
    Ok(())
}

/// The big-endian words of `bytes`.
pub(super) fn words(bytes: &[u8]) -> Vec<u64> {
    let words = bytes.as_chunks().0.iter();
    words.map(|word| u64::from_be_bytes(*word)).collect()
}

/// `words` as big-endian bytes.
pub(super) fn bytes(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_be_bytes()).collect()
}
