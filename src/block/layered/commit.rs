//! `commit`: what an image has goes into what is behind it, and the image is empty then.

use std::io;
use std::os::unix::fs::MetadataExt;

use imago::FormatAccess;
use imago::file::File as Storage;
use imago::format::drivers::ShallowMapping;

use super::{Access, Layered};
use crate::block::{Backend, CHUNK, Layer, OpenOptions, SECTOR, lock, open};
use crate::iov::Out;

impl Layered {
    /// With nobody else at the image.
    pub(super) fn commit_alone(&self, access: &mut Option<Access>) -> io::Result<()> {
        let [_, behind, ..] = &*self.layers() else {
            return Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP));
        };
        let Some(mut own) = access.take() else {
            return Err(super::not_ours());
        };
        // Our own locks on what is behind would keep us from writing there.
        let behind_it = own.behind.iter();
        behind_it.for_each(|source| lock::leave(source.file()));
        let moved = self
            .check_name(&own, behind)
            .and_then(|()| self.move_behind(&own.image, behind));
        let emptied = moved.and_then(|()| {
            own.image.discard_to_backing(0, own.image.size())?;
            own.image.flush()
        });
        if let Err(error) = own.image.flush() {
            // What is in memory only must not be lost.
            if let Err(error) = self.lock(&own.behind) {
                log::error!("{}: {}", self.options.name(), error.line());
            }
            *access = Some(own);
            return Err(error);
        }
        drop(own);
        // What was read of the file behind may be another now.
        let anew = self.read_metadata(true).map_err(io::Error::other)?;
        let locked = self.lock(&anew.behind);
        *access = Some(anew);
        emptied.and(locked.map_err(io::Error::other))
    }

    /// What is behind the image is opened for writing by its name, which must still be its.
    fn check_name(&self, own: &Access, behind: &Layer) -> io::Result<()> {
        let named = std::fs::metadata(self.options.directory.join(&behind.file))?;
        let known = own.behind.first().map(|source| source.file().metadata());
        let Some(known) = known.transpose()? else {
            return Ok(());
        };
        if (named.dev(), named.ino()) == (known.dev(), known.ino()) {
            return Ok(());
        }
        let text = format!("'{}' is another file than was opened", behind.file);
        Err(io::Error::other(text))
    }

    fn move_behind(&self, from: &FormatAccess<Storage>, behind: &Layer) -> io::Result<()> {
        let to = open(OpenOptions {
            path: behind.file.clone().into(),
            format: Some(behind.format),
            is_read_only: false,
            ..self.options.clone()
        });
        let to = to.map_err(io::Error::other)?;
        to.claim().map_err(|error| io::Error::other(error.line()))?;
        let moved = copy(from, &*to);
        to.release();
        moved
    }
}

/// Copies what `from` has itself to `to`, and makes it safe there.
fn copy(from: &FormatAccess<Storage>, to: &dyn Backend) -> io::Result<()> {
    if to.sectors() * SECTOR < from.size() {
        to.resize(from.size())?;
    }
    let mut bytes = vec![0; CHUNK as usize];
    let mut offset = 0;
    while offset < from.size() {
        let wanted = (from.size() - offset).min(CHUNK);
        let (mapping, len) = from.get_shallow_mapping(offset, wanted)?;
        let len = len.min(wanted).max(1);
        match mapping {
            ShallowMapping::Indirect { .. }
            | ShallowMapping::Zero {
                explicit: false, ..
            } => {}
            ShallowMapping::Zero { .. } => to.zero(offset, len, true)?,
            _ => {
                let piece = &mut bytes[..len as usize];
                from.read(&mut *piece, offset)?;
                to.write(offset, &mut vec![Out::from(&*piece)])?;
            }
        }
        offset += len;
    }
    to.flush()
}
