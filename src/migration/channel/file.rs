//! Channels to and from a file. A saved machine is either whole or not there.
//!
//! Outgoing to a regular or absent path: a temporary file beside it, synced and renamed over it in
//! the end, so that no crash leaves half a machine under the name. With an offset, or to a device:
//! in place, synced, and cut back when the migration fails.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use super::descriptor::{Descriptor, Kind};
use super::{Cancel, Channel, Error, Fault};
use crate::errno::Errno;
use crate::iov::{In, Out};

/// A file that is open for the outgoing stream.
#[derive(Debug)]
pub(super) struct Outgoing {
    file: File,
    fate: Fate,
}

/// What becomes of the file. Dropped before it is settled, it undoes what was done.
#[derive(Debug)]
struct Fate(Ending);

#[derive(Debug)]
enum Ending {
    /// Renamed to `path` in the end, removed on failure.
    Temporary { temporary: PathBuf, path: PathBuf },
    /// Cut back to `length` bytes on failure.
    CutBack { file: File, length: u64 },
    /// Was not there before: removed on failure.
    Removed { path: PathBuf },
    /// A device, or settled: what was written is written.
    Kept,
}

impl Outgoing {
    /// Creates the temporary file, or opens the path itself and cuts it at `offset`.
    pub(super) fn create(path: &Path, offset: Option<u64>) -> Result<Self, Error> {
        let failed = |source| Error::Create {
            path: path.display().to_string(),
            source,
        };
        let unfit = |why: String| Error::UnfitFile {
            path: path.display().to_string(),
            why,
        };
        let kind = match fs::symlink_metadata(path) {
            Ok(metadata) => Some(metadata.file_type()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(failed(error)),
        };
        if kind.is_some_and(|kind| kind.is_dir()) {
            return Err(failed(io::Error::from_raw_os_error(libc::EISDIR)));
        }
        if kind.is_some_and(|kind| kind.is_symlink()) {
            return Err(unfit("is a symbolic link; name the file itself".to_owned()));
        }
        let is_file = kind.is_none_or(|kind| kind.is_file());
        let Some(offset) = offset.or((!is_file).then_some(0)) else {
            return Self::temporary(path).map_err(failed);
        };
        let mut file = open_in_place(path).map_err(failed)?;
        if is_kernel_file(&file) {
            return Err(unfit("is not a file to save to".to_owned()));
        }
        let ending = match kind {
            None => Ending::Removed {
                path: path.to_owned(),
            },
            Some(_) if is_file => Ending::CutBack {
                length: file.metadata().map_err(failed)?.len().min(offset),
                file: file.try_clone().map_err(failed)?,
            },
            Some(_) => Ending::Kept,
        };
        if is_file {
            file.set_len(offset).map_err(|error| {
                let why = Errno(&error);
                unfit(format!(
                    "failed to truncate migration file to offset {offset:x}: {why}"
                ))
            })?;
        }
        if offset > 0 {
            file.seek(SeekFrom::Start(offset)).map_err(failed)?;
        }
        Ok(Self {
            file,
            fate: Fate(ending),
        })
    }

    fn temporary(path: &Path) -> io::Result<Self> {
        if path.file_name().is_none() {
            return Err(io::Error::from_raw_os_error(libc::ENOENT));
        }
        let mut number = 0u64;
        loop {
            let name = format!(".hmpsh-{}-{number}.part", std::process::id());
            let temporary = path.with_file_name(name);
            let mut options = OpenOptions::new();
            options.write(true).create_new(true).mode(0o600);
            match options.open(&temporary) {
                Ok(file) => {
                    if let Ok(existing) = fs::metadata(path) {
                        // The new file should be as readable as the old one; failing is no harm.
                        let mode = existing.permissions().mode() & 0o777;
                        let _ = file.set_permissions(Permissions::from_mode(mode));
                    }
                    let ending = Ending::Temporary {
                        temporary,
                        path: path.to_owned(),
                    };
                    return Ok(Self {
                        file,
                        fate: Fate(ending),
                    });
                }
                // Another one of ours, or left behind by a killed process of the same number.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => number += 1,
                Err(error) => return Err(error),
            }
        }
    }

    /// The channel over it.
    pub(super) fn open(self, cancel: &Arc<Cancel>) -> FileChannel {
        let wire = Descriptor::new(self.file.into(), Kind::File, cancel);
        FileChannel {
            wire,
            fate: self.fate,
            is_source: false,
        }
    }
}

impl Fate {
    /// Makes what was written, and synced, last under its name.
    fn settle(&mut self) -> io::Result<()> {
        match &self.0 {
            Ending::Temporary { temporary, path } => {
                fs::rename(temporary, path)?;
                sync_directory(path)?;
            }
            Ending::Removed { path } => sync_directory(path)?,
            Ending::CutBack { .. } | Ending::Kept => {}
        }
        self.0 = Ending::Kept;
        Ok(())
    }

    fn undo(&mut self) {
        // Best effort: the migration has failed already, and its reason is what the operator needs.
        let _ = match std::mem::replace(&mut self.0, Ending::Kept) {
            Ending::Temporary {
                temporary: path, ..
            }
            | Ending::Removed { path } => fs::remove_file(path),
            Ending::CutBack { file, length } => file.set_len(length),
            Ending::Kept => Ok(()),
        };
    }
}

impl Drop for Fate {
    fn drop(&mut self) {
        self.undo();
    }
}

/// A file as a channel.
#[derive(Debug)]
pub(super) struct FileChannel {
    wire: Descriptor,
    fate: Fate,
    /// Whether the stream comes from it.
    is_source: bool,
}

impl Channel for FileChannel {
    fn write(&mut self, pieces: &[Out<'_>], patience: Duration) -> Result<usize, Fault> {
        self.wire.write(pieces, patience)
    }

    fn read(&mut self, rooms: &mut [In<'_>], patience: Duration) -> Result<usize, Fault> {
        self.wire.read(rooms, patience)
    }

    fn is_duplex(&self) -> bool {
        false
    }

    fn settle(&mut self) -> Result<(), Fault> {
        if self.is_source {
            return Ok(());
        }
        match rustix::fs::fsync(&self.wire) {
            // Character devices and pipes have nothing to sync.
            Ok(()) | Err(rustix::io::Errno::INVAL) => Ok(()),
            Err(error) => Err(unsaved(error.into())),
        }
    }

    fn commit(&mut self) -> Result<(), Fault> {
        self.fate.settle().map_err(|source| {
            self.fate.undo();
            unsaved(source)
        })
    }

    fn abandon(&mut self) {
        self.fate.undo();
    }

    fn drain(&mut self, _patience: Duration) -> bool {
        true
    }
}

/// Opens a file for the incoming stream, which begins at `offset`.
///
/// # Errors
/// [`Error::Open`], [`Error::UnfitFile`] when the file ends before the offset.
pub(super) fn read(
    path: &Path,
    offset: Option<u64>,
    cancel: &Arc<Cancel>,
) -> Result<Box<dyn Channel>, Error> {
    let failed = |source| Error::Open {
        path: path.display().to_string(),
        source,
    };
    let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
    let mut file = OpenOptions::new()
        .read(true)
        .custom_flags(flags)
        .open(path)
        .map_err(failed)?;
    let metadata = file.metadata().map_err(failed)?;
    if metadata.is_dir() {
        return Err(failed(io::Error::from_raw_os_error(libc::EISDIR)));
    }
    if let Some(offset) = offset {
        if metadata.is_file() && metadata.len() < offset {
            let why = format!(
                "offset {offset} is beyond its end, it has {} bytes",
                metadata.len()
            );
            return Err(Error::UnfitFile {
                path: path.display().to_string(),
                why,
            });
        }
        file.seek(SeekFrom::Start(offset)).map_err(failed)?;
    }
    let mut wire = Descriptor::new(file.into(), Kind::File, cancel);
    if metadata.file_type().is_fifo() {
        wire = wire.waiting_first();
    }
    Ok(Box::new(FileChannel {
        wire,
        fate: Fate(Ending::Kept),
        is_source: true,
    }))
}

fn unsaved(source: io::Error) -> Fault {
    Fault::Io {
        what: "Unable to save file".to_owned(),
        source,
    }
}

fn open_in_place(path: &Path) -> io::Result<File> {
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_NOCTTY;
    OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(flags)
        .open(path)
}

/// Whether writing would change the kernel or a process (`/proc/self/mem`).
fn is_kernel_file(file: &File) -> bool {
    const PROC: i64 = 0x9fa0;
    const SYSFS: i64 = 0x6265_6572;
    rustix::fs::fstatfs(file.as_fd()).is_ok_and(|system| [PROC, SYSFS].contains(&system.f_type))
}

/// Makes a new name last.
fn sync_directory(path: &Path) -> io::Result<()> {
    let directory = path
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty());
    File::open(directory.unwrap_or(Path::new(".")))?.sync_all()
}
