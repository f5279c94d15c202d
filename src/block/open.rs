//! Opening an image of any format.

use std::io;
use std::path::PathBuf;

use super::layered::Layered;
use super::source::Source;
use super::{Backend, Raw};
use crate::config::Format;
use crate::errno::Errno;

/// Which image, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpenOptions {
    /// The file or block device.
    pub path: PathBuf,
    /// From where a relative path leads there, now and later; empty: from where the process is.
    pub directory: PathBuf,
    /// Its format; without it the image is looked at.
    pub format: Option<Format>,
    /// Nothing is to be written.
    pub is_read_only: bool,
    /// The image is locked when it is claimed.
    pub locks: bool,
    /// Past the host's cache.
    pub is_direct: bool,
}

impl OpenOptions {
    /// The path, for messages.
    pub(super) fn name(&self) -> String {
        self.path.display().to_string()
    }
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
    /// It is not what it should be.
    #[error("Image is not in {0} format")]
    Other(&'static str),
    /// A name that stands for no driver that is built.
    #[error("Unknown driver '{0}'")]
    Driver(String),
    /// The image makes no sense.
    #[error("Could not open '{path}': {why}")]
    Image {
        /// The image.
        path: String,
        /// What is wrong with it.
        why: String,
    },
    /// The same of what is behind it.
    #[error("Could not open backing file: {0}")]
    Behind(Box<Self>),
}

/// Opens an image.
///
/// # Errors
/// It is not there, can not be opened, or is something else.
pub fn open(options: OpenOptions) -> Result<Box<dyn Backend>, OpenError> {
    let is_guessed = options.format.is_none();
    let is_writable = !options.is_read_only;
    let source = Source::open(&options, &options.path, is_writable)?;
    let found = source.format();
    let format = match options.format {
        None => found?,
        Some(Format::Qcow2) if !matches!(found, Ok(Format::Qcow2)) => {
            return Err(OpenError::Other("qcow2"));
        }
        Some(format) => format,
    };
    Ok(match format {
        Format::Raw if !options.is_direct => {
            Box::new(Raw::new(source.descriptor()?, options, is_guessed)?)
        }
        _ => Box::new(Layered::open(source, format, options, is_guessed)?),
    })
}
