//! A raw image: a file or a block device whose bytes are the disk's.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use rustix::fs::{FallocateFlags, fallocate};

use super::lock::{self, LockError, Use};
use super::{Backend, Layer, OpenError, OpenOptions, SECTOR, probe};
use crate::config::Format;
use crate::iov::{self, In, Out};

/// A raw image, open.
#[derive(Debug)]
pub struct Raw {
    file: File,
    options: OpenOptions,
    /// Bytes of the file.
    len: AtomicU64,
    /// Nobody has said that the image is raw: it was found not to be anything else.
    is_guessed: bool,
    /// It is ours to change, from [`Backend::claim`] to [`Backend::release`].
    is_claimed: AtomicBool,
}

impl Raw {
    /// An image in that file. With `is_guessed` nobody has said that it is raw, and the guest can not
    /// make another format of it by what it writes to its beginning.
    ///
    /// # Errors
    /// Its length can not be found.
    pub(super) fn new(
        file: File,
        options: OpenOptions,
        is_guessed: bool,
    ) -> Result<Self, OpenError> {
        let image = Self {
            file,
            options,
            len: AtomicU64::new(0),
            is_guessed,
            is_claimed: AtomicBool::new(false),
        };
        image.measure()?;
        Ok(image)
    }

    /// Finds out how long it is.
    fn measure(&self) -> Result<(), OpenError> {
        let len = (&self.file).seek(SeekFrom::End(0));
        let len = len.map_err(|source| OpenError::Host {
            path: self.options.name(),
            source,
        })?;
        self.len.store(len, Ordering::SeqCst);
        Ok(())
    }

    fn lock(&self) -> Result<(), LockError> {
        let wanted = Use {
            writes: !self.options.is_read_only,
            resizes: false,
        };
        match self.options.locks {
            true => lock::take(&self.file, &self.options.name(), wanted),
            false => Ok(()),
        }
    }

    fn check_write(&self) -> io::Result<()> {
        if self.options.is_read_only {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        match self.is_claimed.load(Ordering::Relaxed) {
            true => Ok(()),
            false => Err(lock::not_ours()),
        }
    }

    fn write_all(&self, mut offset: u64, pieces: &mut Vec<Out<'_>>) -> io::Result<()> {
        while !pieces.is_empty() {
            let count = match iov::write_at(self.file.as_fd(), pieces, offset) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            offset += count as u64;
            iov::advance(pieces, count, Out::len, Out::skip);
        }
        Ok(())
    }
}

impl Backend for Raw {
    fn sectors(&self) -> u64 {
        self.len.load(Ordering::SeqCst).div_ceil(SECTOR)
    }

    fn layers(&self) -> Vec<Layer> {
        let [_, allocated] = probe::lengths(&self.file);
        vec![Layer {
            file: self.options.name(),
            format: Format::Raw,
            len: self.sectors() * SECTOR,
            file_len: self.sectors() * SECTOR,
            allocated,
            behind: None,
            facts: None,
        }]
    }

    fn is_read_only(&self) -> bool {
        self.options.is_read_only
    }

    fn read(&self, offset: u64, rooms: &mut Vec<In<'_>>) -> io::Result<()> {
        let mut offset = offset;
        while !rooms.is_empty() {
            let count = match iov::read_at(self.file.as_fd(), rooms, offset) {
                // Somebody has cut the file off: what was there is lost, not zero.
                Ok(0) if offset < self.len.load(Ordering::SeqCst) => {
                    let text = "the image is shorter than it was";
                    return Err(io::Error::new(io::ErrorKind::UnexpectedEof, text));
                }
                Ok(0) => {
                    rooms.iter_mut().for_each(In::zero);
                    return Ok(());
                }
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            offset += count as u64;
            iov::advance(rooms, count, In::len, In::skip);
        }
        Ok(())
    }

    fn write(&self, offset: u64, pieces: &mut Vec<Out<'_>>) -> io::Result<()> {
        self.check_write()?;
        match self.is_guessed && offset < SECTOR {
            true => probe::write_head(offset, pieces, |pieces| self.write_all(offset, pieces)),
            false => self.write_all(offset, pieces),
        }
    }

    fn zero(&self, offset: u64, len: u64, may_unmap: bool) -> io::Result<()> {
        self.check_write()?;
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        if may_unmap && fallocate(&self.file, hole, offset, len).is_ok() {
            return Ok(());
        }
        if fallocate(&self.file, FallocateFlags::ZERO_RANGE, offset, len).is_ok() {
            return Ok(());
        }
        // Not every file system can; all can write.
        let zeros = vec![0; len.min(ZEROS) as usize];
        let mut done = 0;
        while done < len {
            let count = (len - done).min(ZEROS);
            self.file
                .write_all_at(&zeros[..count as usize], offset + done)?;
            done += count;
        }
        Ok(())
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.check_write()?;
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        // What can not be given back stays.
        let _ = fallocate(&self.file, hole, offset, len);
        Ok(())
    }

    fn resize(&self, len: u64) -> io::Result<()> {
        self.check_write()?;
        self.file.set_len(len)?;
        self.len.store(len, Ordering::SeqCst);
        Ok(())
    }

    fn claim(&self) -> Result<(), LockError> {
        self.lock()?;
        if self.is_claimed.load(Ordering::Relaxed) {
            return Ok(());
        }
        // Whoever had it may have made it longer.
        if let Err(error) = self.measure() {
            self.release();
            return Err(error.into());
        }
        self.is_claimed.store(true, Ordering::Relaxed);
        Ok(())
    }

    fn release(&self) {
        self.is_claimed.store(false, Ordering::Relaxed);
        if self.options.locks {
            lock::leave(&self.file);
        }
    }

    fn flush(&self) -> io::Result<()> {
        // There is nothing to be flushed.
        if self.options.is_read_only {
            return Ok(());
        }
        self.file.sync_data()
    }
}

/// Most zeros written at once.
const ZEROS: u64 = 1 << 20;

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::path::Path;

    use super::*;
    use crate::block::open;

    fn image(bytes: &[u8]) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    fn options(path: &Path, format: Option<Format>) -> OpenOptions {
        OpenOptions {
            path: path.to_owned(),
            directory: std::path::PathBuf::new(),
            format,
            is_read_only: false,
            locks: true,
            is_direct: false,
        }
    }

    fn raw(path: &Path) -> Box<dyn Backend> {
        claimed(options(path, Some(Format::Raw)))
    }

    fn claimed(options: OpenOptions) -> Box<dyn Backend> {
        let image = open(options).unwrap();
        image.claim().unwrap();
        image
    }

    fn reader(path: &Path) -> Box<dyn Backend> {
        let options = options(path, Some(Format::Raw));
        open(OpenOptions {
            is_read_only: true,
            ..options
        })
        .unwrap()
    }

    #[test]
    fn a_last_sector_in_part_counts_and_reads_as_zero() {
        let file = image(&[7; 1000]);
        let raw = raw(file.path());
        assert_eq!(raw.sectors(), 2);
        let (mut a, mut b) = ([1; 100], [1; 924]);
        let mut rooms = vec![In::from(&mut a[..]), In::from(&mut b[..])];
        raw.read(0, &mut rooms).unwrap();
        assert_eq!(a, [7; 100]);
        assert_eq!((&b[..900], &b[900..]), (&[7; 900][..], &[0; 24][..]));

        let (a, b) = ([1; 12], [2; 500]);
        let mut pieces = vec![Out::from(&a[..]), Out::from(&b[..])];
        raw.write(512, &mut pieces).unwrap();
        raw.zero(516, 6, false).unwrap();
        raw.flush().unwrap();
        let bytes = std::fs::read(file.path()).unwrap();
        assert_eq!(bytes.len(), 1024);
        assert_eq!(
            bytes[510..526],
            [7, 7, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 1, 1, 2, 2]
        );
    }

    #[test]
    fn many_pieces_take_several_calls() {
        let file = image(&[]);
        let raw = raw(file.path());
        let bytes: Vec<u8> = (0..3000u32).map(|n| n as u8).collect();
        let mut pieces: Vec<Out<'_>> = bytes.chunks(1).map(Out::from).collect();
        raw.write(0, &mut pieces).unwrap();
        let mut read = vec![0; 3000];
        let mut rooms: Vec<In<'_>> = read.chunks_mut(1).map(In::from).collect();
        raw.read(0, &mut rooms).unwrap();
        assert_eq!(read, bytes);
    }

    #[test]
    fn what_can_not_be_opened_is_named() {
        let refused = |path: &str| {
            let refused = open(options(Path::new(path), None)).err();
            refused.unwrap().to_string()
        };
        assert_eq!(
            refused("/proc/self/none"),
            "Could not open '/proc/self/none': No such file or directory"
        );
        assert_eq!(
            refused("/proc"),
            "'file' driver requires '/proc' to be a regular file"
        );
        assert_eq!(
            refused("/dev/null"),
            "'file' driver requires '/dev/null' to be a regular file"
        );
    }

    #[test]
    fn a_guessed_image_stays_what_it_was_taken_for() {
        let file = image(b"QED\0 and more");
        let error = open(options(file.path(), None)).err().unwrap();
        assert_eq!(error.to_string(), "format=qed: not built in this version");
        raw(file.path());

        // Through the cache and past it; not every file system has both.
        let file = tempfile::NamedTempFile::new_in(".").unwrap();
        file.as_file().set_len(1024).unwrap();
        let mut qcow = [0; 512];
        qcow[..4].copy_from_slice(b"QFI\xfb");
        for is_direct in [false, true] {
            let raw = claimed(OpenOptions {
                is_direct,
                ..options(file.path(), None)
            });
            let refused = raw.write(0, &mut vec![Out::from(&qcow[..])]);
            assert_eq!(refused.unwrap_err().kind(), io::ErrorKind::PermissionDenied);
            raw.write(512, &mut vec![Out::from(&qcow[..])]).unwrap();
            let both = [[is_direct as u8; 512], [3; 512]].concat();
            raw.write(0, &mut both.chunks(300).map(Out::from).collect())
                .unwrap();
            assert!(std::fs::read(file.path()).unwrap() == both);
        }
        let raw = reader(file.path());
        assert!(raw.write(512, &mut vec![Out::from(&qcow[..])]).is_err());
        assert!(raw.zero(512, 4, false).is_err());
        raw.flush().unwrap();
    }

    #[test]
    fn only_who_has_claimed_it_changes_it() {
        let file = image(&[7; 1024]);
        let image = open(options(file.path(), Some(Format::Raw))).unwrap();
        let changes = |is_ours: bool| {
            let mut pieces = vec![Out::from(&[1; 512][..])];
            let changed = [
                image.write(0, &mut pieces),
                image.zero(0, 512, false),
                image.discard(0, 512),
                image.resize(4096),
            ];
            assert!(
                changed.iter().all(|done| done.is_ok() == is_ours),
                "{changed:?}"
            );
        };
        changes(false);
        assert_eq!(std::fs::read(file.path()).unwrap(), [7; 1024]);
        image.claim().unwrap();
        changes(true);
        image.release();
        changes(false);
        // Whoever has it meanwhile makes it longer.
        file.as_file().set_len(8192).unwrap();
        assert_eq!(image.sectors(), 8);
        image.claim().unwrap();
        assert_eq!(image.sectors(), 16);
    }

    #[test]
    fn what_was_cut_off_is_lost_and_not_zero() {
        let file = image(&[7; 2048]);
        let raw = raw(file.path());
        file.as_file().set_len(1024).unwrap();
        let mut bytes = [0; 1024];
        let mut read = |at| raw.read(at, &mut vec![In::from(&mut bytes[..])]);
        read(0).unwrap();
        let error = read(512).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        raw.resize(4096).unwrap();
        assert_eq!(raw.sectors(), 8);
        read(3072).unwrap();
    }
}
