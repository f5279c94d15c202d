//! What kind of image a file is.

use std::fs::File;
use std::io;
use std::iter;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use super::{OpenError, OpenOptions, SECTOR};
use crate::config::Format;
use crate::iov::{self, Out};

/// Opens the file or block device of that name: the image that the options are for, or one behind
/// it.
///
/// # Errors
/// The host says no, or it is something else.
pub(super) fn open(options: &OpenOptions, name: &Path, writes: bool) -> Result<File, OpenError> {
    let failed = |source| failed(name, source);
    let path = options.directory.join(name);
    // Before it is opened: opening a pipe would wait.
    let kind = path.metadata().map_err(failed)?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(OpenError::Kind(name.display().to_string()));
    }
    let direct = if options.is_direct { libc::O_DIRECT } else { 0 };
    File::options()
        .read(true)
        .write(writes)
        .custom_flags(direct)
        .open(path)
        .map_err(failed)
}

/// The same file once more, through the host's cache. Not by its name, which may be another's now.
///
/// # Errors
/// The host says no.
pub(super) fn buffered(file: &File, name: &Path, writes: bool) -> Result<File, OpenError> {
    let own = format!("/proc/self/fd/{}", file.as_raw_fd());
    let again = File::options().read(true).write(writes).open(own);
    again.map_err(|source| failed(name, source))
}

fn failed(name: &Path, source: std::io::Error) -> OpenError {
    let path = name.display().to_string();
    OpenError::Host { path, source }
}

/// The format of an image of which nobody has said it, in a file that is not past the cache.
///
/// # Errors
/// It can not be read, or is of a format that is not built.
pub(super) fn format(file: &File, name: &Path) -> Result<Format, OpenError> {
    let mut head = [0; SECTOR as usize];
    let mut known = 0;
    while known < head.len() {
        match file.read_at(&mut head[known..], known as u64) {
            Ok(0) => break,
            Ok(count) => known += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(source) => return Err(failed(name, source)),
        }
    }
    match mark(&head) {
        None => Ok(Format::Raw),
        Some(name) => Format::from_name(name).ok_or(OpenError::Format(name)),
    }
}

/// Bytes that a file has, in whole sectors, and bytes that it takes on the host.
pub(super) fn lengths(file: &File) -> [u64; 2] {
    file.metadata().map_or([0; 2], |metadata| {
        let len = metadata.len().next_multiple_of(SECTOR);
        [len, metadata.blocks() * SECTOR]
    })
}

/// The image format whose mark `head` bears.
pub(super) fn mark(head: &[u8]) -> Option<&'static str> {
    let known = MARKS
        .iter()
        .find(|(_, at, mark)| head.get(*at..at + mark.len()) == Some(mark));
    known.map(|(name, ..)| *name)
}

/// Writes to the first sector, and what follows, of an image of which nobody has said that it is raw:
/// the guest can not make another format of it. What is looked at and written is a copy, for a guest
/// can change its own bytes at any time. `offset` is in the first sector; a disk begins at 0.
///
/// # Errors
/// The sector would bear a mark; those of `write`.
pub(super) fn write_head(
    offset: u64,
    pieces: &mut Vec<Out<'_>>,
    write: impl FnOnce(&mut Vec<Out<'_>>) -> io::Result<()>,
) -> io::Result<()> {
    let mut head = vec![0; offset as usize];
    for piece in pieces.iter() {
        let room = SECTOR as usize - head.len();
        piece.first(piece.len().min(room)).copy_to(&mut head);
    }
    if let Some(name) = mark(&head) {
        let text = format!("the format was guessed to be raw, and this would make it {name}");
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, text));
    }
    let head = &head[offset as usize..];
    iov::advance(pieces, head.len(), Out::len, Out::skip);
    let all = iter::once(Out::from(head)).chain(pieces.drain(..));
    write(&mut all.filter(|piece| piece.len() > 0).collect())
}

/// Formats, and where their marks stand.
const MARKS: [(&str, usize, &[u8]); 13] = [
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
    use vm_memory::VolatileSlice;

    use super::*;

    #[test]
    fn what_is_written_is_what_was_looked_at() {
        let mut bytes = [7; 1300];
        let memory = VolatileSlice::from(&mut bytes[..]);
        let (one, other) = memory.split_at(100).unwrap();
        let mut pieces = vec![Out::from(&one), Out::from(&other)];
        write_head(0, &mut pieces, |pieces| {
            // Another processor of the guest is quick.
            memory.copy_from(b"QFI\xfb");
            let mut written = Vec::new();
            pieces.iter().for_each(|piece| piece.copy_to(&mut written));
            assert_eq!(written, [7; 1300]);
            assert_eq!((pieces.len(), pieces[0].len()), (2, SECTOR as usize));
            Ok(())
        })
        .unwrap();
        let mut pieces = vec![Out::from(&memory)];
        let error = write_head(0, &mut pieces, |_| panic!("the guest has made a qcow2"));
        assert_eq!(error.unwrap_err().kind(), io::ErrorKind::PermissionDenied);
    }
}
