//! A file of an image, open: it is that file from then on, whatever becomes of its name.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{OpenError, OpenOptions, probe};
use crate::config::Format;

/// The file of an image, or of one behind it. Clones share the descriptors, and the locks.
#[derive(Clone, Debug)]
pub(super) struct Source {
    name: PathBuf,
    file: Arc<File>,
    /// The same file through the host's cache, if `file` is past it.
    buffered: Option<Arc<File>>,
}

impl Source {
    /// Opens the file of that name.
    ///
    /// # Errors
    /// The host says no, or it is neither a file nor a block device.
    pub(super) fn open(
        options: &OpenOptions,
        name: &Path,
        writes: bool,
    ) -> Result<Self, OpenError> {
        Self::new(probe::open(options, name, writes)?, options, name, writes)
    }

    /// That file, which was opened for these options.
    ///
    /// # Errors
    /// The host says no.
    pub(super) fn new(
        file: File,
        options: &OpenOptions,
        name: &Path,
        writes: bool,
    ) -> Result<Self, OpenError> {
        let buffered = match options.is_direct {
            true => Some(Arc::new(probe::buffered(&file, name, writes)?)),
            false => None,
        };
        Ok(Self {
            name: name.to_owned(),
            file: Arc::new(file),
            buffered,
        })
    }

    /// What it is called, which need not be where it is.
    pub(super) fn name(&self) -> &Path {
        &self.name
    }

    /// The name, for messages.
    pub(super) fn text(&self) -> String {
        self.name.display().to_string()
    }

    /// The file as it is to be read and written, and what is locked.
    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// The file as one that is read in any pieces.
    pub(super) fn buffered(&self) -> &File {
        self.buffered.as_ref().unwrap_or(&self.file)
    }

    /// Another descriptor of [`Self::file`].
    ///
    /// # Errors
    /// There are too many.
    pub(super) fn descriptor(&self) -> Result<File, OpenError> {
        self.file.try_clone().map_err(|source| self.failed(source))
    }

    /// Its format, of which nobody has said it.
    ///
    /// # Errors
    /// It can not be read, or is of a format that is not built.
    pub(super) fn format(&self) -> Result<Format, OpenError> {
        probe::format(self.buffered(), &self.name)
    }

    /// What the host said of it.
    pub(super) fn failed(&self, source: io::Error) -> OpenError {
        OpenError::Host {
            path: self.text(),
            source,
        }
    }
}
