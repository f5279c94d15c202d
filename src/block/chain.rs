//! The layers of an image: the file itself, and what its header says is behind it.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use imago::file::File as Storage;
use imago::qcow2::Qcow2;
use imago::raw::Raw;
use imago::{FormatAccess, StorageOpenOptions};

use super::{Layer, OpenError, OpenOptions, probe, snapshots};
use crate::config::Format;

/// An image with all its layers open.
pub(super) struct Chain {
    pub(super) image: FormatAccess<Storage>,
    /// The image itself first.
    pub(super) layers: Vec<Layer>,
    /// Files behind it, and their names.
    pub(super) behind: Vec<(File, String)>,
}

/// Most layers of an image. (QEMU has no limit but its stack.)
const DEPTH: usize = 64;

/// Opens `file` as an image of that format, and what is behind it for reading.
///
/// # Errors
/// A layer is not there, can not be opened, or is not of its format.
pub(super) fn open(
    file: File,
    format: Format,
    options: &OpenOptions,
    is_writable: bool,
) -> Result<Chain, OpenError> {
    let mut opener = Opener {
        is_direct: options.is_direct,
        layers: Vec::new(),
        behind: Vec::new(),
    };
    let image = opener.open(file, &options.path, format, is_writable)?;
    Ok(Chain {
        image,
        layers: opener.layers,
        behind: opener.behind,
    })
}

struct Opener {
    is_direct: bool,
    layers: Vec<Layer>,
    behind: Vec<(File, String)>,
}

impl Opener {
    fn open(
        &mut self,
        file: File,
        path: &Path,
        format: Format,
        is_writable: bool,
    ) -> Result<FormatAccess<Storage>, OpenError> {
        let name = path.display().to_string();
        let failed = |error: io::Error| OpenError::Image {
            path: name.clone(),
            why: error.to_string(),
        };
        let [file_len, allocated] = probe::lengths(&file);
        let facts = match format {
            Format::Raw => None,
            // A file past the cache is not read in small pieces.
            Format::Qcow2 => snapshots::facts(&probe::open(path, false, false)?).ok(),
        };
        let storage = StorageOpenOptions::new()
            .filename(path)
            .write(is_writable)
            .direct(self.is_direct);
        let storage = Storage::from_open_file(file, storage).map_err(failed)?;
        let depth = self.layers.len();
        if depth >= DEPTH {
            return Err(failed(io::Error::other("too many layers")));
        }
        self.layers.push(Layer {
            file: name.clone(),
            format,
            len: 0,
            file_len,
            allocated,
            behind: None,
            facts,
        });
        let image = match format {
            Format::Raw => {
                FormatAccess::new(Raw::open_image(storage, is_writable).map_err(failed)?)
            }
            Format::Qcow2 => {
                let mut image = Qcow2::open_image(storage, is_writable).map_err(failed)?;
                if image.requires_external_data_file() {
                    let text = "an external data file: not built in this version";
                    return Err(failed(io::Error::other(text)));
                }
                image.set_data_file(None);
                let behind = image.implicit_backing_file().cloned();
                let format = image.implicit_backing_format().cloned();
                let behind = match behind {
                    Some(behind) => Some(self.open_behind(path, &behind, format.as_deref())?),
                    None => None,
                };
                image.set_backing(behind);
                FormatAccess::new(image)
            }
        };
        self.layers[depth].len = image.size();
        Ok(image)
    }

    /// Opens what the header of the image at `path` names.
    fn open_behind(
        &mut self,
        path: &Path,
        name: &str,
        format: Option<&str>,
    ) -> Result<FormatAccess<Storage>, OpenError> {
        let inner = |source: OpenError| OpenError::Behind(Box::new(source));
        let place = resolve(path, name).map_err(inner)?;
        let file = probe::open(&place, false, self.is_direct).map_err(inner)?;
        let said = format
            .map(|name| Format::from_name(name).ok_or_else(|| OpenError::Driver(name.to_owned())))
            .transpose()
            .map_err(inner)?;
        let format = match said {
            Some(format) => format,
            None => probe::format(&place).map_err(inner)?,
        };
        let last = self.layers.len() - 1;
        self.layers[last].behind = Some((name.to_owned(), said));
        let copy = file.try_clone().map_err(|source| {
            inner(OpenError::Host {
                path: name.to_owned(),
                source,
            })
        })?;
        self.behind.push((copy, place.display().to_string()));
        self.open(file, &place, format, false).map_err(inner)
    }
}

/// Where a name in the header of the image at `path` leads.
fn resolve(path: &Path, name: &str) -> Result<PathBuf, OpenError> {
    let plain = name.strip_prefix("file:").unwrap_or(name);
    let before = plain.split('/').next().unwrap_or_default();
    if before.contains(':') {
        let protocol = before.split(':').next().unwrap_or_default();
        return Err(OpenError::Driver(protocol.to_owned()));
    }
    let directory = path.parent().unwrap_or(Path::new(""));
    Ok(directory.join(plain))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_relative_to_the_image() {
        let leads =
            |name| resolve(Path::new("/a/b.qcow2"), name).map(|path| path.display().to_string());
        assert_eq!(leads("c.raw").unwrap(), "/a/c.raw");
        assert_eq!(leads("/d/c:e.raw").unwrap(), "/d/c:e.raw");
        assert_eq!(leads("file:../c.raw").unwrap(), "/a/../c.raw");
        assert_eq!(
            leads("nbd:host:1").unwrap_err().to_string(),
            "Unknown driver 'nbd'"
        );
        assert!(leads("json:{}").is_err());
    }
}
