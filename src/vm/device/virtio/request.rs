//! One request to a disk: virtio 1.0 §5.2.6, answered as QEMU answers it.

use vm_memory::Bytes;
use vm_memory::bitmap::Bitmap;

use super::config::MAX_RUN;
use super::ring::{Broken, Chain, Piece, Result};
use crate::block::{Backend, Fault, SECTOR};
use crate::config::OnError;
use crate::errno::Errno;
use crate::iov::{In, Out};

/// Lists for system calls, kept from request to request.
#[derive(Default)]
pub(super) struct Scratch<'a> {
    rooms: Vec<In<'a>>,
    pieces: Vec<Out<'a>>,
}

/// A disk as requests find it.
pub(super) struct Target<'t> {
    /// The image.
    pub(super) image: &'t dyn Backend,
    /// What the guest reads as the disk's serial number.
    pub(super) serial: &'t str,
    /// Whether what is written may stay in the host's cache until the guest flushes.
    pub(super) has_cache: bool,
    /// What becomes of reads that fail, and of writes and flushes.
    pub(super) on_error: [OnError; 2],
}

/// What became of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// It was answered with so many bytes.
    Answered(u32),
    /// It failed, and the guest is to stop before it finds out: it is executed again when the guest
    /// runs again.
    Kept(Fault),
}

/// The last byte of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Status {
    Ok = 0,
    IoError = 1,
    Unsupported = 2,
}

/// An answer, or why there is to be none yet.
type Verdict = std::result::Result<Status, Fault>;

const IN: u32 = 0;
const OUT: u32 = 1;
const SCSI: u32 = 2;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;
/// A flag that old guests set; it means nothing.
const BARRIER: u32 = 1 << 31;

/// Type, priority, sector.
const HEADER: usize = 16;
/// Sector, sectors, flags of a run to be discarded or made zero.
const RUN: usize = 16;
/// Longest serial number.
const SERIAL: usize = 20;
/// A run may be given back to the host.
const UNMAP: u32 = 1;
/// Most sectors of a request.
const SECTORS_MAX: u64 = (i32::MAX as u64) / SECTOR;

impl<'a> Scratch<'a> {
    /// Does what `chain` asks for.
    pub(super) fn execute(
        &mut self,
        chain: &mut Chain<'a>,
        target: &Target<'_>,
    ) -> Result<Outcome> {
        let Chain {
            readable, writable, ..
        } = chain;
        if readable.is_empty() || writable.is_empty() {
            return Err(Broken("virtio-blk missing headers".to_owned()));
        }
        let mut header = [0; HEADER];
        if take_front(readable, &mut header) < HEADER {
            return Err(Broken("virtio-blk request outhdr too short".to_owned()));
        }
        let answer = total(writable);
        let status = take_last(writable)?;
        let kind = u32::from_le_bytes(array(&header[..4]));
        let sector = u64::from_le_bytes(array(&header[8..]));
        let verdict = match kind & !BARRIER {
            IN => self.read(sector, writable, target),
            OUT => self.write(sector, readable, target),
            FLUSH | 5 => match target.image.flush() {
                Ok(()) => Ok(Status::Ok),
                Err(error) => failed("flush", &error, target),
            },
            GET_ID | 9 => Ok(identify(writable, target.serial)),
            SCSI | 3 => Ok(refuse_scsi(readable, writable)),
            DISCARD | WRITE_ZEROES => run(kind & !BARRIER, readable, target)?,
            _ => Ok(Status::Unsupported),
        };
        Ok(match verdict {
            Ok(verdict) => {
                write(&status, &[verdict as u8]);
                Outcome::Answered(u32::try_from(answer).unwrap_or(u32::MAX))
            }
            Err(fault) => Outcome::Kept(fault),
        })
    }

    fn read(&mut self, sector: u64, to: &[Piece<'a>], target: &Target<'_>) -> Verdict {
        let len = total(to);
        if !is_inside(sector, len, target) {
            return Ok(Status::IoError);
        }
        self.rooms.clear();
        self.rooms.extend(to.iter().map(In::from));
        let result = target.image.read(sector * SECTOR, &mut self.rooms);
        // After the bytes are there, and also if not all are.
        for piece in to {
            piece.bitmap().mark_dirty(0, piece.len());
        }
        result.map_or_else(|error| failed("read", &error, target), |()| Ok(Status::Ok))
    }

    fn write(&mut self, sector: u64, from: &[Piece<'a>], target: &Target<'_>) -> Verdict {
        if !is_inside(sector, total(from), target) {
            return Ok(Status::IoError);
        }
        self.pieces.clear();
        self.pieces.extend(from.iter().map(Out::from));
        let result = target.image.write(sector * SECTOR, &mut self.pieces);
        written(result, target)
    }
}

/// Discards a run of sectors, or makes it zero.
fn run(kind: u32, from: &mut Vec<Piece<'_>>, target: &Target<'_>) -> Result<Verdict> {
    let mut run = [0; RUN];
    if total(from) > RUN as u64 {
        return Ok(Ok(Status::Unsupported));
    }
    if take_front(from, &mut run) < RUN {
        let text = "virtio-blk request discard/write_zeroes header too short";
        return Err(Broken(text.to_owned()));
    }
    let sector = u64::from_le_bytes(array(&run[..8]));
    let sectors = u32::from_le_bytes(array(&run[8..12]));
    let flags = u32::from_le_bytes(array(&run[12..]));
    if flags & !UNMAP != 0 {
        return Ok(Ok(Status::Unsupported));
    }
    let len = u64::from(sectors) * SECTOR;
    if sectors > MAX_RUN || !is_inside(sector, len, target) {
        return Ok(Ok(Status::IoError));
    }
    if kind == DISCARD {
        return Ok(match flags {
            0 => written(target.image.discard(sector * SECTOR, len), target),
            _ => Ok(Status::Unsupported),
        });
    }
    let result = target.image.zero(sector * SECTOR, len, flags & UNMAP != 0);
    Ok(written(result, target))
}

fn written(result: std::io::Result<()>, target: &Target<'_>) -> Verdict {
    let flush = |()| match target.has_cache {
        true => Ok(()),
        false => target.image.flush(),
    };
    match result.and_then(flush) {
        Ok(()) => Ok(Status::Ok),
        Err(error) => failed("write", &error, target),
    }
}

/// The host can not do it.
fn failed(what: &str, error: &std::io::Error, target: &Target<'_>) -> Verdict {
    log::warn!("virtio-blk {what}: {}", Errno(error));
    if error.raw_os_error() == Some(libc::ENOMEDIUM) {
        // The image was taken out and does not come back: the guest would never run again.
        return Ok(Status::IoError);
    }
    let fault = Fault::of(error);
    let [on_read, on_write] = target.on_error;
    match (if what == "read" { on_read } else { on_write }, fault) {
        (OnError::Ignore, _) => Ok(Status::Ok),
        (OnError::Stop, _) | (OnError::Enospc, Fault::NoSpace) => Err(fault),
        (OnError::Report | OnError::Enospc, _) => Ok(Status::IoError),
    }
}

fn identify(to: &[Piece<'_>], serial: &str) -> Status {
    let mut id = [0; SERIAL];
    let len = serial.len().min(SERIAL);
    id[..len].copy_from_slice(&serial.as_bytes()[..len]);
    // The number ends with a zero if there is room for one.
    let mut rest = &id[..(len + 1).min(SERIAL)];
    for piece in to {
        let count = piece.len().min(rest.len());
        write(piece, &rest[..count]);
        rest = &rest[count..];
    }
    Status::Ok
}

/// There is nobody to understand the command; the driver finds an error number where it looks.
fn refuse_scsi(from: &[Piece<'_>], to: &[Piece<'_>]) -> Status {
    // Besides the header a command, besides the status an error word and a sense buffer.
    match to {
        [.., _, errors] if !from.is_empty() => {
            write(errors, &255u32.to_le_bytes());
            Status::Unsupported
        }
        _ => Status::IoError,
    }
}

fn is_inside(sector: u64, len: u64, target: &Target<'_>) -> bool {
    let (sectors, all) = (len / SECTOR, target.image.sectors());
    len.is_multiple_of(SECTOR) && sectors <= SECTORS_MAX && sector <= all && sectors <= all - sector
}

fn total(pieces: &[Piece<'_>]) -> u64 {
    pieces.iter().map(|piece| piece.len() as u64).sum()
}

/// Moves the first bytes of `pieces` to `to`; returns how many there were.
fn take_front(pieces: &mut Vec<Piece<'_>>, to: &mut [u8]) -> usize {
    let (mut done, mut whole) = (0, 0);
    while done < to.len()
        && let Some(piece) = pieces.get_mut(whole)
    {
        let count = piece.len().min(to.len() - done);
        piece.copy_to(&mut to[done..done + count]);
        done += count;
        match piece.offset(count) {
            Ok(rest) if !rest.is_empty() => *piece = rest,
            _ => whole += 1,
        }
    }
    pieces.drain(..whole);
    done
}

/// Splits the last byte off, the place of the status.
fn take_last<'a>(pieces: &mut Vec<Piece<'a>>) -> Result<Piece<'a>> {
    let split = pieces.pop().and_then(|piece| {
        let (data, status) = piece.split_at(piece.len().checked_sub(1)?).ok()?;
        if !data.is_empty() {
            pieces.push(data);
        }
        Some(status)
    });
    split.ok_or_else(|| Broken("virtio-blk request inhdr too short".to_owned()))
}

/// Writes the first bytes of a piece, as many as fit.
fn write(piece: &Piece<'_>, bytes: &[u8]) {
    // Fewer fit: that is the guest's wish.
    let _ = piece.write(bytes, 0);
}

fn array<const N: usize>(bytes: &[u8]) -> [u8; N] {
    let mut array = [0; N];
    array.copy_from_slice(bytes);
    array
}
