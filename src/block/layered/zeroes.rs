//! Making parts of an image zero, by nobody else at the image meanwhile.

use std::fs::File;
use std::io;

use imago::file::File as Storage;
use imago::format::PreallocateMode;
use imago::{FormatAccess, Mapping};
use rustix::fs::{FallocateFlags, fallocate};

/// Makes `len` bytes from `offset` on zero; with `may_unmap` they need have no room in the image.
pub(super) fn make(
    image: &mut FormatAccess<Storage>,
    [offset, len]: [u64; 2],
    may_unmap: bool,
) -> io::Result<()> {
    let made = match may_unmap {
        true => image.discard_to_zero(offset, len),
        false => image.write_zeroes(offset, len),
    };
    or_else_unsupported(made, || write(image, [offset, len]))
}

/// The same of a raw image, whose room stays. imago would make a hole.
pub(super) fn keep(
    image: &FormatAccess<Storage>,
    file: &File,
    [offset, len]: [u64; 2],
) -> io::Result<()> {
    let end = offset.saturating_add(len);
    let (first, last) = (offset.next_multiple_of(BLOCK), end / BLOCK * BLOCK);
    let is_made = end <= image.size()
        && first < last
        && fallocate(file, FallocateFlags::ZERO_RANGE, first, last - first).is_ok();
    if !is_made {
        // Not every file system can; all can write.
        return write(image, [offset, len]);
    }
    write(image, [offset, first - offset])?;
    write(image, [last, end - last])
}

/// Makes an image longer, or shorter, with zeros where what is behind it would show.
pub(super) fn grow(image: &mut FormatAccess<Storage>, len: u64) -> io::Result<()> {
    let before = image.size();
    let grown = image.resize(len, PreallocateMode::Zero);
    or_else_unsupported(grown, || {
        image.resize(len, PreallocateMode::None)?;
        let written = write(image, [before, len - before]);
        if written.is_err() {
            image.resize(before, PreallocateMode::None)?;
        }
        written
    })
}

/// qcow2 has clusters of zeros from its version 3 on.
fn or_else_unsupported(
    done: io::Result<()>,
    other: impl FnOnce() -> io::Result<()>,
) -> io::Result<()> {
    match done {
        Err(error) if error.kind() == io::ErrorKind::Unsupported => other(),
        done => done,
    }
}

/// Writes zeros where it does not read as zero anyway.
fn write(image: &FormatAccess<Storage>, [mut offset, len]: [u64; 2]) -> io::Result<()> {
    let end = offset.saturating_add(len);
    let zeros = vec![0; len.min(MOST) as usize];
    while offset < end {
        let (mapping, count) = image.get_mapping(offset, (end - offset).min(MOST))?;
        match mapping {
            Mapping::Zero { .. } => {}
            Mapping::Eof { .. } => return Err(io::ErrorKind::UnexpectedEof.into()),
            _ => image.write(&zeros[..count as usize], offset)?,
        }
        offset += count;
    }
    Ok(())
}

/// What no file system and no device has in parts.
const BLOCK: u64 = 4096;
/// Most zeros written at once.
const MOST: u64 = 1 << 20;
