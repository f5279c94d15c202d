//! What kind of image a file is.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use super::{OpenError, SECTOR};
use crate::config::Format;

/// Opens the file or block device of an image; with `is_direct` past the host's cache.
///
/// # Errors
/// The host says no, or it is something else.
pub(super) fn open(path: &Path, writes: bool, is_direct: bool) -> Result<File, OpenError> {
    let name = || path.display().to_string();
    let failed = |source| OpenError::Host {
        path: name(),
        source,
    };
    // Before it is opened: opening a pipe would wait.
    let kind = path.metadata().map_err(failed)?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(OpenError::Kind(name()));
    }
    let direct = if is_direct { libc::O_DIRECT } else { 0 };
    OpenOptions::new()
        .read(true)
        .write(writes)
        .custom_flags(direct)
        .open(path)
        .map_err(failed)
}

/// The format of an image of which nobody has said it.
///
/// # Errors
/// It can not be read, or is of a format that is not built.
pub(super) fn format(path: &Path) -> Result<Format, OpenError> {
    // Not past the cache, which would want the bytes at a place of its own.
    let file = open(path, false, false)?;
    let mut head = [0; SECTOR as usize];
    let mut known = 0;
    while known < head.len() {
        match file.read_at(&mut head[known..], known as u64) {
            Ok(0) => break,
            Ok(count) => known += count,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(source) => {
                let path = path.display().to_string();
                return Err(OpenError::Host { path, source });
            }
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
