//! A raw image: a file or a block device whose bytes are the disk's.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::Path;

use rustix::fs::{FallocateFlags, fallocate};

use super::lock::{self, LockError};
use super::{Backend, SECTOR};
use crate::errno::Errno;
use crate::iov::{self, In, Out};

/// A raw image, open.
#[derive(Debug)]
pub struct Raw {
    file: File,
    /// As it was given, for messages.
    name: String,
    /// Whether it is locked at all.
    locks: bool,
    sectors: u64,
    is_read_only: bool,
    /// Nobody has said that the image is raw: it was found not to be anything else.
    is_guessed: bool,
}

/// Why an image was not opened, in QEMU's words.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The host says no.
    #[error("Could not open '{path}': {}", Errno(.source))]
    Host {
        /// The image.
        path: String,
        /// Why.
        source: io::Error,
    },
    /// A directory, a pipe, a socket.
    #[error("'file' driver requires '{0}' to be a regular file")]
    Kind(String),
    /// It was not said that the image is raw, and it is not.
    #[error("format={0}: not built in this version")]
    Format(&'static str),
}

impl Raw {
    /// Opens an image; with `locks` it is locked when it is claimed. With `is_guessed` it is looked
    /// at first, because nobody has said that it is raw, and the guest can not make another format of it by what it writes to its beginning.
    ///
    /// # Errors
    /// It is not there, can not be opened, or is something else.
    pub fn open(
        path: &Path,
        is_read_only: bool,
        is_guessed: bool,
        locks: bool,
    ) -> Result<Self, OpenError> {
        let name = path.display().to_string();
        let failed = |source| OpenError::Host {
            path: name.clone(),
            source,
        };
        // Before it is opened: opening a pipe would wait.
        let kind = path.metadata().map_err(failed)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(OpenError::Kind(name));
        }
        let mut file = OpenOptions::new()
            .read(true)
            .write(!is_read_only)
            .open(path)
            .map_err(failed)?;
        let len = file.seek(SeekFrom::End(0)).map_err(failed)?;
        if is_guessed {
            let mut head = [0; SECTOR as usize];
            let known = &mut head[..len.min(SECTOR) as usize];
            file.read_exact_at(known, 0).map_err(failed)?;
            if let Some(format) = format_of(&head) {
                return Err(OpenError::Format(format));
            }
        }
        Ok(Self {
            file,
            name,
            locks,
            sectors: len.div_ceil(SECTOR),
            is_read_only,
            is_guessed,
        })
    }

    fn check_write(&self) -> io::Result<()> {
        if self.is_read_only {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        Ok(())
    }

    /// Whether these bytes may be written at the beginning of the image.
    fn check_head(&self, pieces: &[Out<'_>]) -> io::Result<()> {
        let mut head = Vec::new();
        for piece in pieces {
            if head.len() < SECTOR as usize {
                piece.copy_to(&mut head);
            }
        }
        head.resize(SECTOR as usize, 0);
        match format_of(&head) {
            None => Ok(()),
            Some(_) => Err(io::ErrorKind::PermissionDenied.into()),
        }
    }
}

impl Backend for Raw {
    fn sectors(&self) -> u64 {
        self.sectors
    }

    fn allocated(&self) -> u64 {
        self.file
            .metadata()
            .map_or(0, |metadata| metadata.blocks() * SECTOR)
    }

    fn is_read_only(&self) -> bool {
        self.is_read_only
    }

    fn read(&self, offset: u64, rooms: &mut Vec<In<'_>>) -> io::Result<()> {
        let mut offset = offset;
        while !rooms.is_empty() {
            let count = match iov::read_at(self.file.as_fd(), rooms, offset) {
                Ok(0) => {
                    rooms.iter_mut().for_each(In::zero);
                    return Ok(());
                }
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            offset += count as u64;
            let mut rest = count;
            let done = rooms
                .iter()
                .take_while(|room| {
                    let fits = room.len() <= rest;
                    rest -= if fits { room.len() } else { 0 };
                    fits
                })
                .count();
            rooms.drain(..done);
            if rest > 0 && !rooms.is_empty() {
                let room = rooms.remove(0);
                rooms.insert(0, room.skip(rest));
            }
        }
        Ok(())
    }

    fn write(&self, offset: u64, pieces: &mut Vec<Out<'_>>) -> io::Result<()> {
        self.check_write()?;
        if self.is_guessed && offset < SECTOR {
            self.check_head(pieces)?;
        }
        let mut offset = offset;
        while !pieces.is_empty() {
            let count = match iov::write_at(self.file.as_fd(), pieces, offset) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            offset += count as u64;
            let mut rest = count;
            let done = pieces
                .iter()
                .take_while(|piece| {
                    let fits = piece.len() <= rest;
                    rest -= if fits { piece.len() } else { 0 };
                    fits
                })
                .count();
            pieces.drain(..done);
            if rest > 0 && !pieces.is_empty() {
                pieces[0] = pieces[0].skip(rest);
            }
        }
        Ok(())
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

    fn claim(&self) -> Result<(), LockError> {
        match self.locks {
            true => lock::take(&self.file, &self.name, !self.is_read_only),
            false => Ok(()),
        }
    }

    fn release(&self) {
        if self.locks {
            lock::leave(&self.file);
        }
    }

    fn flush(&self) -> io::Result<()> {
        // There is nothing to be flushed.
        if self.is_read_only {
            return Ok(());
        }
        self.file.sync_data()
    }
}

/// Most zeros written at once.
const ZEROS: u64 = 1 << 20;

/// The image format whose mark `head` bears.
fn format_of(head: &[u8]) -> Option<&'static str> {
    let known = FORMATS
        .iter()
        .find(|(_, at, mark)| head.get(*at..at + mark.len()) == Some(mark));
    known.map(|(name, ..)| *name)
}

/// Formats, and where their marks stand.
const FORMATS: [(&str, usize, &[u8]); 13] = [
    ("qcow2", 0, b"QFI\xfb"),
    ("qed", 0, b"QED\0"),
    ("vmdk", 0, b"KDMV"),
    ("vmdk", 0, b"COWD"),
    ("vmdk", 0, b"# Disk DescriptorFile"),
    ("vpc", 0, b"conectix"),
    ("vhdx", 0, b"vhdxfile"),
    ("vdi", 0x40, b"\x7f\x10\xda\xbe"),
    ("luks", 0, b"LUKS\xba\xbe"),
    ("parallels", 0, b"WithoutFreeSpace"),
    ("parallels", 0, b"WithouFreSpacExt"),
    ("bochs", 0, b"Bochs Virtual HD Image"),
    ("cloop", 0, b"#!/bin/sh\n#V2.0 Format\n"),
];

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn image(bytes: &[u8]) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    #[test]
    fn a_last_sector_in_part_counts_and_reads_as_zero() {
        let file = image(&[7; 1000]);
        let raw = Raw::open(file.path(), false, false, true).unwrap();
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
        let raw = Raw::open(file.path(), false, false, true).unwrap();
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
            Raw::open(Path::new(path), true, true, true)
                .unwrap_err()
                .to_string()
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
        let file = image(b"QFI\xfb and more");
        let error = Raw::open(file.path(), false, true, true).unwrap_err();
        assert_eq!(error.to_string(), "format=qcow2: not built in this version");
        Raw::open(file.path(), false, false, true).unwrap();

        let file = image(&[0; 1024]);
        let raw = Raw::open(file.path(), false, true, true).unwrap();
        let qcow = b"QFI\xfb";
        let refused = raw.write(0, &mut vec![Out::from(&qcow[..])]);
        assert_eq!(refused.unwrap_err().kind(), io::ErrorKind::PermissionDenied);
        raw.write(512, &mut vec![Out::from(&qcow[..])]).unwrap();
        let raw = Raw::open(file.path(), true, false, true).unwrap();
        assert!(raw.write(512, &mut vec![Out::from(&qcow[..])]).is_err());
        assert!(raw.zero(512, 4, false).is_err());
        raw.flush().unwrap();
    }
}
