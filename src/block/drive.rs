//! A drive: an image under its name, as disks and migration share it, with a log of what is written.

use std::collections::BTreeSet;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::stats::Stats;
use super::{Backend, LockError, SECTOR};
use crate::iov::{In, Out};

/// An open image with a name, what QEMU calls a block backend.
pub struct Drive {
    id: String,
    image: Box<dyn Backend>,
    log: Mutex<Option<BTreeSet<u64>>>,
    stats: Stats,
    fault: Mutex<Option<Fault>>,
}

/// Why a guest was stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// There was no room on the host.
    NoSpace,
    /// Anything else.
    Failed,
}

impl Fault {
    /// What an error means.
    pub fn of(error: &io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::StorageFull => Self::NoSpace,
            _ => Self::Failed,
        }
    }

    /// QEMU's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::NoSpace => "nospace",
            Self::Failed => "failed",
        }
    }
}

impl Drive {
    /// The image under that name, `id=` of `-drive`.
    pub fn new(id: String, image: Box<dyn Backend>) -> Self {
        Self {
            id,
            image,
            log: Mutex::default(),
            stats: Stats::default(),
            fault: Mutex::default(),
        }
    }

    /// Why it has stopped the guest, which has not run since.
    pub fn fault(&self) -> Option<Fault> {
        *self.fault.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The guest stops because of that, or it runs again.
    pub fn set_fault(&self, fault: Option<Fault>) {
        *self.fault.lock().unwrap_or_else(PoisonError::into_inner) = fault;
    }

    /// The image itself, for whoever is not to be counted. Writes to it are not noted either.
    pub fn image(&self) -> &dyn Backend {
        &*self.image
    }

    /// What was done through the drive so far.
    pub fn stats(&self) -> &Stats {
        &self.stats
    }

    /// Its name.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.image.sectors() * SECTOR
    }

    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Length in chunks of [`CHUNK`] bytes, of which the last may be shorter.
    pub fn chunks(&self) -> u64 {
        self.len().div_ceil(CHUNK)
    }

    /// From here on every chunk that is written to is noted. Nothing is noted yet.
    pub fn start_log(&self) {
        *self.log() = Some(BTreeSet::new());
    }

    /// Nothing is noted any more.
    pub fn stop_log(&self) {
        *self.log() = None;
    }

    /// How many chunks were written to and not taken.
    pub fn dirty(&self) -> u64 {
        self.log().as_ref().map_or(0, |log| log.len() as u64)
    }

    /// Takes the next chunk that was written to, from number `from` on and then from the beginning.
    /// A write that comes later, or is under way, notes it again.
    pub fn take_dirty(&self, from: u64) -> Option<u64> {
        let mut log = self.log();
        let log = log.as_mut()?;
        let next = log.range(from..).next().or_else(|| log.first()).copied()?;
        log.remove(&next);
        Some(next)
    }

    /// Takes that chunk, written to or not.
    pub fn clear_dirty(&self, chunk: u64) {
        if let Some(log) = &mut *self.log() {
            log.remove(&chunk);
        }
    }

    /// After the bytes are in the image: noted before, they could be read too early.
    fn note(&self, offset: u64, len: u64) {
        if let Some(log) = &mut *self.log()
            && len > 0
        {
            log.extend(offset / CHUNK..=(offset + len - 1) / CHUNK);
        }
    }

    fn log(&self) -> MutexGuard<'_, Option<BTreeSet<u64>>> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Backend for Drive {
    fn sectors(&self) -> u64 {
        self.image.sectors()
    }

    fn is_read_only(&self) -> bool {
        self.image.is_read_only()
    }

    fn read(&self, offset: u64, rooms: &mut Vec<In<'_>>) -> io::Result<()> {
        let len = rooms.iter().map(|room| room.len() as u64).sum();
        self.stats
            .reads
            .time(len, || self.image.read(offset, rooms))
    }

    fn write(&self, offset: u64, pieces: &mut Vec<Out<'_>>) -> io::Result<()> {
        let len = pieces.iter().map(|piece| piece.len() as u64).sum();
        let write = || self.image.write(offset, pieces);
        let result = self.stats.writes.time(len, write);
        self.note(offset, len);
        result
    }

    fn zero(&self, offset: u64, len: u64, may_unmap: bool) -> io::Result<()> {
        let zero = || self.image.zero(offset, len, may_unmap);
        let result = self.stats.writes.time(len, zero);
        self.note(offset, len);
        result
    }

    fn claim(&self) -> Result<(), LockError> {
        self.image.claim()
    }

    fn release(&self) {
        self.image.release();
    }

    fn flush(&self) -> io::Result<()> {
        self.stats.flushes.time(0, || self.image.flush())
    }
}

/// Bytes of a chunk, the unit of the log and of block migration.
pub const CHUNK: u64 = 1 << 20;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::Memory;

    fn drive(len: u64) -> Drive {
        Drive::new("d0".to_owned(), Box::new(Memory::new(len)))
    }

    #[test]
    fn writes_are_noted_by_chunk_and_taken_once() {
        let drive = drive(3 * CHUNK + 512);
        assert_eq!((drive.len(), drive.chunks()), (3 * CHUNK + 512, 4));
        let bytes = [1; 1024];
        let write = |at| drive.write(at, &mut vec![Out::from(&bytes[..])]).unwrap();
        write(0);
        assert_eq!((drive.dirty(), drive.take_dirty(0)), (0, None));
        drive.start_log();
        assert_eq!(drive.dirty(), 0);
        // Over the border of two.
        write(CHUNK - 512);
        drive.zero(3 * CHUNK, 512, false).unwrap();
        drive.zero(5, 0, false).unwrap();
        assert_eq!(drive.dirty(), 3);
        assert_eq!(drive.take_dirty(1), Some(1));
        write(CHUNK);
        assert_eq!(drive.take_dirty(2), Some(3));
        drive.clear_dirty(1);
        assert_eq!(drive.take_dirty(2), Some(0));
        assert_eq!(drive.take_dirty(0), None);
        drive.stop_log();
        write(0);
        assert_eq!(drive.dirty(), 0);
    }

    #[test]
    fn a_write_that_fails_may_have_changed_something() {
        let image = Memory::new(CHUNK);
        image.fail_writes(0);
        let drive = Drive::new("d0".to_owned(), Box::new(image));
        drive.start_log();
        let bytes = [1; 512];
        assert!(drive.write(0, &mut vec![Out::from(&bytes[..])]).is_err());
        assert_eq!(drive.take_dirty(0), Some(0));
    }
}
