//! The layers of an image: the file itself, and what its header says is behind it.

use std::io;
use std::path::{Path, PathBuf};

use imago::file::File as Storage;
use imago::qcow2::Qcow2;
use imago::raw::Raw;
use imago::{FormatAccess, StorageOpenOptions};

use super::snapshots::{self, Error, Facts};
use super::source::Source;
use super::{Layer, OpenError, OpenOptions, probe};
use crate::config::Format;

/// An image with all its layers open.
pub(super) struct Chain {
    pub(super) image: FormatAccess<Storage>,
    /// The image itself first.
    pub(super) layers: Vec<Layer>,
    /// Files behind it.
    pub(super) behind: Vec<Source>,
}

/// Most layers of an image. (QEMU has no limit but its stack.)
const DEPTH: usize = 64;

/// Opens `top` as an image of that format, and what is behind it for reading; files that are `known`
/// are not looked for by their names again.
///
/// # Errors
/// A layer is not there, can not be opened, or is not of its format.
pub(super) fn open(
    top: &Source,
    format: Format,
    options: &OpenOptions,
    known: &[Source],
    is_writable: bool,
) -> Result<Chain, OpenError> {
    let mut opener = Opener {
        options,
        known,
        layers: Vec::new(),
        behind: Vec::new(),
    };
    let image = opener.open(top, format, is_writable)?;
    Ok(Chain {
        image,
        layers: opener.layers,
        behind: opener.behind,
    })
}

struct Opener<'a> {
    options: &'a OpenOptions,
    known: &'a [Source],
    layers: Vec<Layer>,
    behind: Vec<Source>,
}

impl Opener<'_> {
    fn open(
        &mut self,
        source: &Source,
        format: Format,
        is_writable: bool,
    ) -> Result<FormatAccess<Storage>, OpenError> {
        let name = source.text();
        let failed = |error: io::Error| OpenError::Image {
            path: name.clone(),
            why: error.to_string(),
        };
        let [file_len, allocated] = probe::lengths(source.file());
        let facts = match format {
            Format::Raw => None,
            Format::Qcow2 => facts(source).map_err(failed)?,
        };
        let storage = StorageOpenOptions::new()
            .filename(source.name())
            .write(is_writable)
            .direct(self.options.is_direct);
        let storage = Storage::from_open_file(source.descriptor()?, storage).map_err(failed)?;
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
                    Some(behind) => {
                        Some(self.open_behind(source.name(), &behind, format.as_deref())?)
                    }
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
        let source = match self.known.iter().find(|known| known.name() == place) {
            Some(known) => known.clone(),
            None => Source::open(self.options, &place, false).map_err(inner)?,
        };
        let said = format
            .map(|name| Format::from_name(name).ok_or_else(|| OpenError::Driver(name.to_owned())))
            .transpose()
            .map_err(inner)?;
        let format = match said {
            Some(format) => format,
            None => source.format().map_err(inner)?,
        };
        let last = self.layers.len() - 1;
        self.layers[last].behind = Some((name.to_owned(), said));
        self.behind.push(source.clone());
        self.open(&source, format, false).map_err(inner)
    }
}

/// What the header says, if that makes sense. If not imago says why, but it takes an encrypted image
/// for a plain one.
fn facts(source: &Source) -> io::Result<Option<Facts>> {
    match snapshots::facts(source.buffered()) {
        Err(error @ (Error::Encryption | Error::Host { .. })) => Err(error.into()),
        other => Ok(other.ok()),
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
