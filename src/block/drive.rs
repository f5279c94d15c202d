//! A drive: an image under its name, as disks and migration share it, with a log of what is written,
//! and bitmaps of it.

use std::collections::BTreeSet;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use super::bitmap::{self, Bitmap, BitmapError, Bitmaps};
use super::stats::Stats;
use super::throttle::{Throttle, Way};
use super::{Backend, Layer, LockError, SECTOR};
use crate::config::{Cache, Zeroes};
use crate::iov::{In, Out};

/// An open image with a name, what QEMU calls a block backend.
pub struct Drive {
    id: String,
    image: RwLock<Box<dyn Backend>>,
    policy: Policy,
    /// The disk that uses it.
    disk: Option<String>,
    is_deleted: AtomicBool,
    /// Bytes of the image; 0 if there is none any more.
    len: AtomicU64,
    is_read_only: bool,
    log: Mutex<Option<BTreeSet<u64>>>,
    bitmaps: Bitmaps,
    stats: Stats,
    fault: Mutex<Option<Fault>>,
    throttle: Throttle,
}

/// How a drive is used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    /// `cache=`.
    pub cache: Cache,
    /// `discard=unmap`: what is discarded is given back to the host.
    pub discards: bool,
    /// `detect-zeroes=`: what becomes of zeros that are written.
    pub zeroes: Zeroes,
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
            len: AtomicU64::new(image.sectors() * SECTOR),
            is_read_only: image.is_read_only(),
            image: RwLock::new(image),
            policy: Policy::default(),
            disk: None,
            is_deleted: AtomicBool::new(false),
            log: Mutex::default(),
            bitmaps: Bitmaps::default(),
            stats: Stats::default(),
            fault: Mutex::default(),
            throttle: Throttle::default(),
        }
    }

    /// Used in that way.
    pub fn with_policy(mut self, policy: Policy) -> Self {
        self.policy = policy;
        self
    }

    /// Used by that disk.
    pub fn of_disk(mut self, disk: Option<String>) -> Self {
        self.disk = disk;
        self
    }

    /// The disk that uses it.
    pub fn disk(&self) -> Option<&str> {
        self.disk.as_deref()
    }

    /// How it is used.
    pub fn policy(&self) -> Policy {
        self.policy
    }

    /// The image itself, for whoever is not to be counted. Writes to it are not noted either.
    pub fn image(&self) -> RwLockReadGuard<'_, Box<dyn Backend>> {
        self.image.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does something with the image while it is ours: that of a drive without a disk nobody has
    /// claimed.
    ///
    /// # Errors
    /// It can not be claimed; nothing is done then.
    pub fn as_owner<T>(&self, act: impl FnOnce() -> T) -> Result<T, LockError> {
        let is_unused = self.disk.is_none();
        if is_unused {
            self.claim()?;
        }
        let done = act();
        if is_unused {
            self.release();
        }
        Ok(done)
    }

    /// The image, with no request under way.
    fn image_alone(&self) -> RwLockWriteGuard<'_, Box<dyn Backend>> {
        self.image.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes so many bytes of the image, and notes that.
    fn change(
        &self,
        offset: u64,
        len: u64,
        act: impl FnOnce(&dyn Backend) -> io::Result<()>,
    ) -> io::Result<()> {
        let image = self.image();
        // The disk has looked at that; the image may have become shorter while the request waited.
        if offset.checked_add(len).is_none_or(|end| end > self.len()) && !self.is_deleted() {
            let text = "the image ends before";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        let result = act(&**image);
        self.note(offset, len);
        result
    }

    /// Takes the image out when nobody uses it any more, and lets others use it. From here on every
    /// request fails, and nobody finds the drive by its name.
    pub fn delete(&self) {
        self.is_deleted.store(true, Ordering::SeqCst);
        self.throttle.set_hurry(true);
        let mut image = self.image_alone();
        image.release();
        *image = Box::new(NoMedium);
        self.len.store(0, Ordering::SeqCst);
        self.bitmaps.drop_all();
        drop(image);
        self.throttle.set_hurry(false);
    }

    /// Whether its image was taken out.
    pub fn is_deleted(&self) -> bool {
        self.is_deleted.load(Ordering::SeqCst)
    }

    /// What limits its requests.
    pub fn throttle(&self) -> &Throttle {
        &self.throttle
    }

    /// Why it has stopped the guest, which has not run since.
    pub fn fault(&self) -> Option<Fault> {
        *self.fault.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The guest stops because of that, or it runs again.
    pub fn set_fault(&self, fault: Option<Fault>) {
        *self.fault.lock().unwrap_or_else(PoisonError::into_inner) = fault;
    }

    /// What was done through the drive so far.
    pub fn stats(&self) -> &Stats {
        &self.stats
    }

    /// Its dirty bitmaps.
    pub fn bitmaps(&self) -> &Bitmaps {
        &self.bitmaps
    }

    /// Makes another bitmap of the disk; without a granularity, one that fits the image.
    ///
    /// # Errors
    /// There is one of that name, or name or granularity are none.
    pub fn add_bitmap(
        &self,
        name: &str,
        granularity: Option<u32>,
        change: impl FnOnce(&mut Bitmap),
    ) -> Result<(), BitmapError> {
        let granularity = granularity.unwrap_or_else(|| self.default_granularity());
        let mut bitmap = Bitmap::new(name, granularity, self.len())?;
        change(&mut bitmap);
        self.bitmaps.add(bitmap)?;
        // It may have become longer meanwhile.
        self.bitmaps.resize(self.len());
        Ok(())
    }

    /// Takes over bitmaps and limits of the drive that it stands in for.
    pub fn adopt(&self, other: &Self) {
        let limits = &other.throttle;
        self.throttle.set_limits(limits.limits(), &limits.group());
        self.bitmaps.adopt(&other.bitmaps);
        self.bitmaps.resize(self.len());
    }

    /// The granularity of a bitmap for which none was said.
    fn default_granularity(&self) -> u32 {
        let layers = self.layers();
        let cluster = layers.first().and_then(|top| Some(top.facts?.cluster_size));
        bitmap::default_granularity(cluster)
    }

    /// Whether a migration has it, or bitmaps of it.
    pub fn is_busy(&self) -> bool {
        self.is_logged() || self.bitmaps.is_busy()
    }

    /// Its name.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.len.load(Ordering::SeqCst)
    }

    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Length in chunks of [`CHUNK`] bytes, of which the last may be shorter.
    pub fn chunks(&self) -> u64 {
        self.len().div_ceil(CHUNK)
    }

    /// Whether a migration sends it: what is written is noted.
    pub fn is_logged(&self) -> bool {
        self.log().is_some()
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

    /// The same of those in front of that chunk.
    pub fn dirty_below(&self, chunk: u64) -> u64 {
        let log = self.log();
        log.as_ref()
            .map_or(0, |log| log.range(..chunk).count() as u64)
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
        self.bitmaps.mark(offset, len);
    }

    fn set_len(&self, len: u64) {
        self.len.store(len, Ordering::SeqCst);
        self.bitmaps.resize(len);
    }

    fn log(&self) -> MutexGuard<'_, Option<BTreeSet<u64>>> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Backend for Drive {
    fn sectors(&self) -> u64 {
        self.len() / SECTOR
    }

    fn layers(&self) -> Vec<Layer> {
        self.image().layers()
    }

    fn is_read_only(&self) -> bool {
        self.is_read_only
    }

    fn read(&self, offset: u64, rooms: &mut Vec<In<'_>>) -> io::Result<()> {
        let len = rooms.iter().map(|room| room.len() as u64).sum();
        self.throttle.pass(Way::Read, len);
        let read = || self.image().read(offset, rooms);
        self.stats.reads.time(len, read)
    }

    fn write(&self, offset: u64, pieces: &mut Vec<Out<'_>>) -> io::Result<()> {
        let len = pieces.iter().map(|piece| piece.len() as u64).sum();
        let zeroes = self.policy.zeroes;
        if zeroes != Zeroes::Off && pieces.iter().all(Out::is_zero) {
            return self.zero(offset, len, zeroes == Zeroes::Unmap);
        }
        self.throttle.pass(Way::Write, len);
        let write = || self.change(offset, len, |image| image.write(offset, pieces));
        self.stats.writes.time(len, write)
    }

    fn zero(&self, offset: u64, len: u64, may_unmap: bool) -> io::Result<()> {
        self.throttle.pass(Way::Write, len);
        let may_unmap = may_unmap && self.policy.discards;
        let zero = || self.change(offset, len, |image| image.zero(offset, len, may_unmap));
        self.stats.writes.time(len, zero)
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        if !self.policy.discards {
            return Ok(());
        }
        self.change(offset, len, |image| image.discard(offset, len))
    }

    fn resize(&self, len: u64) -> io::Result<()> {
        // A write under way to what is cut off would make a file longer again.
        let image = self.image_alone();
        image.resize(len)?;
        self.set_len(len);
        Ok(())
    }

    fn commit(&self) -> io::Result<()> {
        self.image().commit()
    }

    fn hurry(&self, is_hurry: bool) {
        self.throttle.set_hurry(is_hurry);
    }

    fn claim(&self) -> Result<(), LockError> {
        let image = self.image();
        image.claim()?;
        // Whoever had it may have changed that.
        self.set_len(image.sectors() * SECTOR);
        Ok(())
    }

    fn release(&self) {
        self.image().release();
    }

    fn settle(&self) -> io::Result<()> {
        self.image().settle()
    }

    fn flush(&self) -> io::Result<()> {
        let is_ignored = self.policy.cache.ignores_flushes;
        self.stats.flushes.time(0, || match is_ignored {
            // It is not on the disk then, but with the host: this process may end.
            true => self.image().settle(),
            false => self.image().flush(),
        })
    }
}

/// The image of a drive that has none any more.
struct NoMedium;

impl NoMedium {
    fn fail() -> io::Result<()> {
        Err(io::Error::from_raw_os_error(libc::ENOMEDIUM))
    }
}

impl Backend for NoMedium {
    fn sectors(&self) -> u64 {
        0
    }

    fn is_read_only(&self) -> bool {
        false
    }

    fn read(&self, _: u64, _: &mut Vec<In<'_>>) -> io::Result<()> {
        Self::fail()
    }

    fn write(&self, _: u64, _: &mut Vec<Out<'_>>) -> io::Result<()> {
        Self::fail()
    }

    fn zero(&self, _: u64, _: u64, _: bool) -> io::Result<()> {
        Self::fail()
    }

    fn flush(&self) -> io::Result<()> {
        Self::fail()
    }
}

/// Bytes of a chunk, the unit of the log and of block migration.
pub const CHUNK: u64 = 1 << 20;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::{Limits, Memory, OpenOptions, open};
    use crate::config::Format;

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
    fn what_waits_while_the_image_becomes_shorter_does_not_make_it_longer() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(CHUNK).unwrap();
        let options = OpenOptions {
            path: file.path().to_owned(),
            directory: std::path::PathBuf::new(),
            format: Some(Format::Raw),
            is_read_only: false,
            locks: true,
            is_direct: false,
        };
        let drive = Drive::new("d0".to_owned(), open(options).unwrap());
        drive.claim().unwrap();
        drive.start_log();
        let limits = Limits {
            bytes: [1, 0, 0],
            ..Limits::default()
        };
        drive.throttle().set_limits(limits, "d0");
        let bytes = [1; 512];
        let write = |at| drive.write(at, &mut vec![Out::from(&bytes[..])]);
        // Nobody waits for this one.
        write(0).unwrap();
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| write(CHUNK - 512));
            std::thread::sleep(std::time::Duration::from_millis(20));
            assert!(!waiting.is_finished());
            drive.resize(CHUNK / 2).unwrap();
            drive.throttle().set_limits(Limits::default(), "d0");
            let error = waiting.join().unwrap().unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        });
        assert!(drive.zero(CHUNK / 2, 512, false).is_err());
        assert_eq!(drive.dirty(), 1);
        assert_eq!(file.path().metadata().unwrap().len(), CHUNK / 2);
    }

    #[test]
    fn bitmaps_note_what_is_written_in_any_way() {
        let drive = drive(CHUNK);
        drive.add_bitmap("b", Some(512), |_| ()).unwrap();
        let dirty = || drive.bitmaps().info()[0].dirty;
        drive
            .write(1023, &mut vec![Out::from(&[1; 2][..])])
            .unwrap();
        assert_eq!(dirty(), 1024);
        drive.zero(4096, 512, true).unwrap();
        assert_eq!(dirty(), 1536);
        // What is not done changes nothing; what fails may have.
        drive.discard(8192, 512).unwrap();
        assert_eq!((dirty(), drive.default_granularity()), (1536, 65536));
        assert!(!drive.is_busy());
        drive
            .bitmaps()
            .with("b", |bitmap| bitmap.is_busy = true)
            .unwrap();
        assert!(drive.is_busy());
        drive.delete();
        assert!(drive.bitmaps().info().is_empty());
    }

    #[test]
    fn zeros_that_are_written_can_be_found() {
        let image = Memory::new(CHUNK);
        let drive = Drive::new("d0".to_owned(), Box::new(image.clone()));
        let drive = drive.with_policy(Policy {
            zeroes: Zeroes::On,
            ..Policy::default()
        });
        let write = |bytes: &[u8]| {
            let (one, other) = bytes.split_at(512);
            let mut pieces = vec![Out::from(one), Out::from(other)];
            drive.write(0, &mut pieces).unwrap();
        };
        write(&[7; 1024]);
        let mut mixed = [0; 1024];
        mixed[1023] = 1;
        write(&mixed);
        assert_eq!(image.zeroed(), 0);
        write(&[0; 1024]);
        assert_eq!((image.zeroed(), image.bytes()[1023]), (1, 0));
    }

    #[test]
    fn a_drive_whose_image_was_taken_out_is_empty() {
        let drive = drive(CHUNK);
        drive.delete();
        assert!(drive.is_empty() && drive.is_deleted());
        let error = drive.write(0, &mut vec![Out::from(&[1; 512][..])]);
        assert_eq!(error.unwrap_err().raw_os_error(), Some(libc::ENOMEDIUM));
    }

    #[test]
    fn a_write_that_fails_may_have_changed_something() {
        let image = Memory::new(CHUNK);
        image.fail_writes(0);
        let drive = Drive::new("d0".to_owned(), Box::new(image));
        drive.start_log();
        drive.add_bitmap("b", Some(512), |_| ()).unwrap();
        let bytes = [1; 512];
        assert!(drive.write(0, &mut vec![Out::from(&bytes[..])]).is_err());
        assert_eq!(drive.take_dirty(0), Some(0));
        assert_eq!(drive.bitmaps().info()[0].dirty, 512);
    }
}
