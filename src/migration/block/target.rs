//! A drive at the destination, as the section `block` fills it.

use std::sync::Arc;

use crate::block::{Backend, CHUNK, Drive, SECTOR};
use crate::errno::Errno;
use crate::iov::{In, Out};
use crate::migration::Error;
use crate::migration::manifest;

/// A drive that may be filled.
pub(super) struct Target {
    drive: Arc<Drive>,
    /// What the source has said of it beforehand.
    announced: Option<manifest::Disk>,
    filling: Option<Filling>,
}

/// From the first word about a drive to the hand-over: its image is locked, and the drive is busy.
struct Filling {
    /// Bytes of the image.
    len: u64,
    /// A bit for each chunk that came.
    came: Vec<u64>,
    has_some: bool,
    /// The last chunk came before the end of the section began.
    has_ended: bool,
    /// There was something behind the end of the image.
    is_cut: bool,
}

/// What a record brings.
pub(super) struct Piece<'a> {
    pub sector: u64,
    /// A chunk; for zeros it is room for one.
    pub bytes: &'a mut [u8],
    pub is_zero: bool,
    /// The source's guest stands still.
    pub is_end: bool,
}

impl Target {
    pub(super) fn new(drive: Arc<Drive>) -> Self {
        Self {
            drive,
            announced: None,
            filling: None,
        }
    }

    pub(super) fn drive(&self) -> &Arc<Drive> {
        &self.drive
    }

    pub(super) fn is_filled(&self) -> bool {
        self.filling.is_some()
    }

    /// Whether something has come for it.
    pub(super) fn has_some(&self) -> bool {
        self.filling.as_ref().is_some_and(|it| it.has_some)
    }

    /// Prepares for a disk that will come; the text says why that can not be.
    pub(super) fn announce(&mut self, disk: &manifest::Disk) -> Result<(), String> {
        let id = &disk.id;
        if self.drive.is_read_only() {
            return Err(format!("Disk '{id}' can not be written at the destination"));
        }
        self.begin()?;
        super::check_len(&self.drive, disk.len)?;
        if disk.is_partial && !super::has_behind(&self.drive) {
            return Err(format!(
                "Disk '{id}' is sent without what is behind its image (-i), and there is nothing \
                 behind the image at the destination"
            ));
        }
        self.announced = Some(disk.clone());
        Ok(())
    }

    /// Locks the image, once, and keeps everybody else from changing the drive.
    fn begin(&mut self) -> Result<&mut Filling, String> {
        if self.filling.is_none() {
            // A drive with a log is busy. Nothing else is done with it: nobody writes yet.
            self.drive.start_log();
            if let Err(error) = self.drive.claim() {
                self.drive.stop_log();
                let id = self.drive.id();
                return Err(format!("Disk '{id}' at the destination: {}", error.line()));
            }
        }
        let len = self.drive.len();
        Ok(self.filling.get_or_insert_with(|| Filling {
            len,
            came: vec![0; len.div_ceil(CHUNK).div_ceil(64) as usize],
            has_some: false,
            has_ended: false,
            is_cut: false,
        }))
    }

    /// Puts a chunk into the image; how many bytes of it were.
    pub(super) fn write(&mut self, piece: Piece<'_>) -> Result<u64, Error> {
        let id = self.drive.id().to_owned();
        if self.drive.is_read_only() {
            let text = format!("Disk '{id}' can not be written here, and the source sends it");
            return Err(Error::Stream(text));
        }
        let drive = Arc::clone(&self.drive);
        let filling = self.begin().map_err(Error::Stream)?;
        if drive.len() != filling.len {
            let text = format!("Disk '{id}' has changed its length while it was filled");
            return Err(Error::Stream(text));
        }
        let sector = piece.sector;
        let offset = sector.saturating_mul(SECTOR);
        if offset >= filling.len {
            let here = filling.len / SECTOR;
            return Err(Error::Stream(format!(
                "Disk '{id}' is too small: it has {here} sectors here, and the source sends \
                 sector {sector}"
            )));
        }
        if !offset.is_multiple_of(CHUNK) {
            let text = format!("Sector {sector} of disk '{id}' is not where a chunk begins");
            return Err(Error::Stream(text));
        }
        // The last one may be shorter; what a QEMU sends behind it means nothing.
        let len = (filling.len - offset).min(CHUNK);
        let (bytes, rest) = piece.bytes.split_at_mut(len as usize);
        filling.is_cut |= !piece.is_zero && rest.iter().any(|byte| *byte != 0);
        let is_last = offset + len == filling.len;
        filling.has_ended |= is_last && !piece.is_end;
        filling.has_some = true;
        let number = offset / CHUNK;
        if let Some(word) = filling.came.get_mut((number / 64) as usize) {
            *word |= 1 << (number % 64);
        }
        let written = match piece.is_zero {
            true => zero(&drive, offset, bytes),
            false => drive.image().write(offset, &mut vec![Out::from(&*bytes)]),
        };
        // The guest's disk is another one now, for whoever asked to be told.
        drive.bitmaps().mark(offset, len);
        written.map_err(|error| {
            let why = Errno(&error);
            Error::Stream(format!(
                "Writing disk '{id}' from sector {sector} on: {why}"
            ))
        })?;
        Ok(len)
    }

    /// The source's guest may have been told that all of this is safe.
    pub(super) fn settle(&self) -> Result<(), Error> {
        let Some(filling) = &self.filling else {
            return Ok(());
        };
        let id = self.drive.id();
        if self.drive.len() != filling.len {
            let text = format!("Disk '{id}' has changed its length while it was filled");
            return Err(Error::Stream(text));
        }
        let settled = self.drive.settle();
        settled.map_err(|error| {
            let why = Errno(&error);
            Error::Stream(format!("Writing disk '{id}': {why}"))
        })
    }

    /// What is missing of a disk that was announced. Of one that comes in part nobody can say.
    pub(super) fn gap_announced(&self) -> Option<String> {
        let disk = self.announced.as_ref().filter(|disk| !disk.is_partial)?;
        self.gap(disk.len)
    }

    /// What may be missing of a disk of a QEMU that has not said that it has sent all. Chunks go in
    /// order, so once the last one is here only those are missing that it left out (`-i`).
    pub(super) fn gap_in_doubt(&self) -> Option<String> {
        let has_ended = self.filling.as_ref().is_some_and(|it| it.has_ended);
        if self.drive.is_read_only() || (has_ended && super::has_behind(&self.drive)) {
            return None;
        }
        self.gap(self.drive.len())
    }

    /// From where to where chunks of a disk of `len` bytes have not come.
    fn gap(&self, len: u64) -> Option<String> {
        let came = self.filling.as_ref().map_or(&[][..], |it| &it.came);
        let is_missing = |number: &u64| {
            let word = came.get((*number / 64) as usize).copied();
            word.unwrap_or(0) >> (number % 64) & 1 == 0
        };
        let mut missing = (0..len.div_ceil(CHUNK)).filter(is_missing);
        let first = missing.next()?;
        let last = missing.next_back().unwrap_or(first);
        let (from, to) = (first * CHUNK, ((last + 1) * CHUNK).min(len) - 1);
        let id = self.drive.id();
        Some(format!(
            "of '{id}' bytes {from:#x} to {to:#x} are not all there"
        ))
    }

    /// Why a disk of a source that sends zeros behind the end is too small here.
    pub(super) fn cut(&self) -> Option<String> {
        self.filling.as_ref().filter(|it| it.is_cut)?;
        let (id, here) = (self.drive.id(), self.drive.sectors());
        Some(format!(
            "Disk '{id}' is too small: it has {here} sectors here, and the source's goes on"
        ))
    }

    /// Nothing more comes, or it is of no use: the drive is as all others are.
    pub(super) fn leave(&mut self) {
        if self.filling.take().is_some() {
            self.drive.stop_log();
            // Those that a disk uses are the guest's.
            if self.drive.disk().is_none() {
                self.drive.release();
            }
        }
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        self.leave();
    }
}

/// Makes a part of the disk zero, of which `room` has the length. Where it is zero already, as in an
/// image that has just been made, nothing is written: it would take room in one that has holes, or
/// make holes in one that was to have none.
fn zero(drive: &Drive, offset: u64, room: &mut [u8]) -> std::io::Result<()> {
    let image = drive.image();
    let read = image.read(offset, &mut vec![In::from(&mut *room)]);
    if read.is_ok() && super::is_zero(room) {
        return Ok(());
    }
    image.zero(offset, room.len() as u64, drive.policy().discards)
}
