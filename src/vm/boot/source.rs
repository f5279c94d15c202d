//! A file that is loaded into guest memory, as often as the machine is reset.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;

use crate::vm::guest::Error;

/// An open file and its length when it was opened.
pub(super) struct Source {
    file: File,
    name: String,
    len: u64,
}

impl Source {
    /// Opens a file; `what` it is stands in the error.
    pub(super) fn open(path: &Path, what: &str) -> Result<Self, Error> {
        let name = path.display().to_string();
        let open = || {
            let file = File::open(path)?;
            let metadata = file.metadata()?;
            if metadata.is_dir() {
                return Err(io::Error::from(io::ErrorKind::IsADirectory));
            }
            Ok((file, metadata.len()))
        };
        match open() {
            Ok((file, len)) => Ok(Self { file, name, len }),
            Err(source) => Err(Error::System {
                what: format!("could not open {what} '{name}'"),
                source,
            }),
        }
    }

    /// The path it was opened with.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Bytes in it.
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// The file itself.
    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// At most `max` bytes from its start.
    pub(super) fn head(&self, max: u64) -> Result<Vec<u8>, Error> {
        let mut head = Vec::new();
        self.at(0)?
            .take(max)
            .read_to_end(&mut head)
            .map_err(|source| self.unreadable(source))?;
        Ok(head)
    }

    /// A descriptor at that offset; the position is shared, so users take turns (resets do).
    pub(super) fn at(&self, offset: u64) -> Result<File, Error> {
        let open = || {
            let mut file = self.file.try_clone()?;
            file.seek(SeekFrom::Start(offset))?;
            Ok(file)
        };
        open().map_err(|source| self.unreadable(source))
    }

    fn unreadable(&self, source: io::Error) -> Error {
        Error::System {
            what: format!("could not read '{}'", self.name),
            source,
        }
    }
}
