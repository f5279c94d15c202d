//! Disks on their way out: setup, pending, iterate, complete, cleanup.
//!
//! First every chunk goes once (the bulk), then those that were written to meanwhile. A chunk is
//! taken out of the log before it is read, so a write that comes later is either in what we send or
//! notes the chunk again.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use super::{Record, header, is_zero, sent};
use crate::block::{CHUNK, Drive, SECTOR};
use crate::errno::Errno;
use crate::iov::In;
use crate::migration::Error;
use crate::migration::clock::Clock;
use crate::migration::dialect::Dialect;
use crate::migration::manifest;
use crate::migration::section::{END, PART, START, put_cstr, put_header, put_piece};
use crate::migration::stream::Writer;

/// The live section `block`.
pub struct BlockSave<'a> {
    clock: &'a dyn Clock,
    dialect: Dialect,
    disks: Vec<Disk>,
    options: Options,
    /// Behind the disk of which a chunk was sent again last.
    turn: usize,
    /// What was told last.
    percent: Option<u64>,
    chunk: Vec<u8>,
}

/// What is sent, and how.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// A chunk of zeros goes as a record without bytes.
    pub zeros: bool,
    /// What is only behind an image stays here: the destination has it too.
    pub incremental: bool,
}

impl Options {
    /// Whether something of that drive stays here. Where nothing is behind an image, all of it goes:
    /// who knows what the destination's image holds where this one holds nothing.
    pub fn is_partial(self, drive: &Drive) -> bool {
        self.incremental && super::has_behind(drive)
    }
}

/// A drive being sent.
struct Disk {
    drive: Arc<Drive>,
    /// Bytes of it, as long as it is sent.
    len: u64,
    /// The next chunk of the bulk.
    bulk: u64,
    /// Behind the chunk that was sent again last.
    dirty: u64,
    /// What is only behind its image is not sent.
    is_partial: bool,
}

impl<'a> BlockSave<'a> {
    /// All drives that can be written and are not empty; their writes are noted from here on.
    pub fn new(
        drives: Vec<Arc<Drive>>,
        clock: &'a dyn Clock,
        dialect: Dialect,
        options: Options,
    ) -> Self {
        let disk = |drive: Arc<Drive>| {
            // First: a drive with a log keeps its length.
            drive.start_log();
            Disk {
                len: drive.len(),
                bulk: 0,
                dirty: 0,
                is_partial: options.is_partial(&drive),
                drive,
            }
        };
        Self {
            clock,
            dialect,
            disks: sent(drives).map(disk).collect(),
            options,
            turn: 0,
            percent: None,
            chunk: vec![0; CHUNK as usize],
        }
    }

    /// For the manifest.
    pub fn announced(&self) -> Vec<manifest::Disk> {
        let disk = |disk: &Disk| manifest::Disk {
            id: disk.drive.id().to_owned(),
            len: disk.len,
            is_partial: disk.is_partial,
        };
        self.disks.iter().map(disk).collect()
    }

    /// Queues START. Another hmpsh takes zeros as such in any case.
    pub fn setup(&mut self, writer: &mut Writer<'a>, is_hmpsh: bool) {
        self.options.zeros |= is_hmpsh;
        writer.put(|to| {
            put_header(START, SECTION_ID, &header(), to);
            to.extend(Record::Eos.compose().to_be_bytes());
            self.dialect.put_footer(SECTION_ID, to);
        });
        writer.mark();
        let disk = writer.progress.disk.get_or_insert_default();
        disk.total = self.disks.iter().map(|disk| disk.len).sum();
        self.note(writer);
    }

    /// Bytes of chunks that have not been sent, or not since they were written to.
    pub fn pending(&self) -> u64 {
        self.disks.iter().map(Disk::pending).sum()
    }

    /// Whether some chunk has never been sent.
    pub fn is_bulk(&self) -> bool {
        self.disks.iter().any(|disk| disk.bulk < disk.chunks())
    }

    /// Sends one PART of about `allowance` bytes, or what 50 ms are enough for, or what there is.
    pub fn iterate(&mut self, writer: &mut Writer<'a>, allowance: u64) -> Result<(), Error> {
        let limit = writer.total().saturating_add(allowance);
        let until = self.clock.now() + PART_TIME;
        self.piece(writer, PART, &|writer, now| {
            writer.total() < limit && now <= until
        })
    }

    /// Sends everything that is left, as END. The guest stands still.
    pub fn complete(&mut self, writer: &mut Writer<'a>) -> Result<(), Error> {
        self.percent = None;
        self.disks.iter().try_for_each(Disk::check)?;
        self.piece(writer, END, &|_, _| true)
    }

    /// Sends chunks while there are any and `more` says so. If one can not be read the piece ends
    /// properly all the same, so that the destination can be told.
    fn piece(
        &mut self,
        writer: &mut Writer<'a>,
        kind: u8,
        more: &dyn Fn(&Writer<'a>, Duration) -> bool,
    ) -> Result<(), Error> {
        writer.put(|to| put_piece(kind, SECTION_ID, to));
        let sent = loop {
            match self.next(writer) {
                Ok(true) if more(writer, self.clock.now()) => {}
                Ok(_) => break Ok(()),
                Err(error) => break Err(error),
            }
        };
        if writer.is_torn() {
            return sent;
        }
        if kind == END && sent.is_ok() {
            self.tell(writer, 100);
        }
        writer.put(|to| {
            to.extend(Record::Eos.compose().to_be_bytes());
            self.dialect.put_footer(SECTION_ID, to);
        });
        if kind == END {
            writer.mark();
        }
        writer.flush()?;
        self.note(writer);
        sent
    }

    /// Sends one chunk; false if there was none left.
    fn next(&mut self, writer: &mut Writer<'a>) -> Result<bool, Error> {
        let is_left = |disk: &Disk| disk.bulk < disk.chunks();
        if let Some(index) = self.disks.iter().position(is_left) {
            let (done, all) = self.bulk();
            self.tell(writer, done * 100 / all);
            let disk = &mut self.disks[index];
            let number = disk.bulk;
            disk.bulk += 1;
            if !disk.is_partial || disk.has(number)? {
                // What was written before now is in what is read now.
                disk.drive.clear_dirty(number);
                self.send(writer, index, number)?;
            }
            if !self.is_bulk() {
                self.tell(writer, 100);
            }
            return Ok(true);
        }
        let Some((index, number)) = self.next_dirty() else {
            return Ok(false);
        };
        self.send(writer, index, number)?;
        Ok(true)
    }

    /// Takes a chunk that was written to since it was sent. The disks take turns: one that is written
    /// to all the time does not keep the others from coming to an end.
    fn next_dirty(&mut self) -> Option<(usize, u64)> {
        let count = self.disks.len();
        let mut order = (0..count).map(|step| (self.turn + step) % count);
        let (index, number) = order.find_map(|index| {
            let disk = &self.disks[index];
            Some((index, disk.drive.take_dirty(disk.dirty)?))
        })?;
        self.disks[index].dirty = number + 1;
        self.turn = index + 1;
        Some((index, number))
    }

    /// Chunks of the bulk that were sent, and all.
    fn bulk(&self) -> (u64, u64) {
        let done = self.disks.iter().map(|disk| disk.bulk).sum();
        let all = self.disks.iter().map(Disk::chunks).sum();
        (done, all)
    }

    fn tell(&mut self, writer: &mut Writer<'a>, percent: u64) {
        if self.percent.replace(percent) != Some(percent) {
            writer.put(|to| to.extend(Record::Progress(percent).compose().to_be_bytes()));
        }
    }

    fn send(&mut self, writer: &mut Writer<'a>, index: usize, number: u64) -> Result<(), Error> {
        let disk = &self.disks[index];
        disk.check()?;
        let drive = Arc::clone(&disk.drive);
        let (offset, sector) = (number * CHUNK, number * CHUNK / SECTOR);
        let len = disk.len.saturating_sub(offset).min(CHUNK) as usize;
        let (content, rest) = self.chunk.split_at_mut(len);
        rest.fill(0);
        let read = drive.image().read(offset, &mut vec![In::from(content)]);
        read.map_err(|error| unreadable(&drive, offset, &error))?;
        let is_zero = self.options.zeros && is_zero(&self.chunk);
        let record = match is_zero {
            true => Record::Zero(sector),
            false => Record::Chunk(sector),
        };
        writer.put(|to| {
            to.extend(record.compose().to_be_bytes());
            put_cstr(drive.id(), to);
        });
        if !is_zero {
            writer.bulk(&self.chunk)?;
        }
        writer.progress.disk.get_or_insert_default().transferred += len as u64;
        self.note(writer);
        writer.progress.tick(writer.sent());
        Ok(())
    }

    fn note(&self, writer: &mut Writer<'a>) {
        writer.progress.disk.get_or_insert_default().remaining = self.pending();
    }
}

impl Disk {
    fn chunks(&self) -> u64 {
        self.len.div_ceil(CHUNK)
    }

    /// Bytes that have not been sent, or not since they were written to. What is written to in front
    /// of the bulk is sent only once.
    fn pending(&self) -> u64 {
        let ahead = self.len.saturating_sub(self.bulk * CHUNK);
        let again = match ahead {
            0 => self.drive.dirty(),
            _ => self.drive.dirty_below(self.bulk),
        };
        ahead + (again * CHUNK).min(self.len - ahead)
    }

    /// Whoever had begun to change the drive before it was noted what is written to it is not held up.
    fn check(&self) -> Result<(), Error> {
        if self.drive.len() == self.len {
            return Ok(());
        }
        let id = self.drive.id();
        Err(Error::Stream(match self.drive.is_deleted() {
            true => format!("Disk '{id}' was taken out while it was sent"),
            false => format!("Disk '{id}' has changed its length while it was sent"),
        }))
    }

    /// Whether the image itself has anything of that chunk. QEMU 7.2 asks for 32 MiB at once and
    /// then sends from the beginning of the chunk on; the chunks are the same.
    fn has(&self, number: u64) -> Result<bool, Error> {
        let end = ((number + 1) * CHUNK).min(self.len);
        let mut offset = number * CHUNK;
        while offset < end {
            let asked = self.drive.image().is_allocated(offset, end - offset);
            let (is_here, count) =
                asked.map_err(|error| unreadable(&self.drive, offset, &error))?;
            if is_here {
                return Ok(true);
            }
            offset += count;
        }
        Ok(false)
    }
}

fn unreadable(drive: &Drive, offset: u64, error: &io::Error) -> Error {
    let (id, sector, why) = (drive.id(), offset / SECTOR, Errno(error));
    Error::Stream(format!(
        "Reading disk '{id}' from sector {sector} on: {why}"
    ))
}

impl Drop for BlockSave<'_> {
    fn drop(&mut self) {
        self.disks.iter().for_each(|disk| disk.drive.stop_log());
    }
}

/// "blk": a number that no other section of ours has. (0 is that of every section that a QEMU has not
/// been told of yet.)
const SECTION_ID: u32 = 0x62_6c6b;
/// A PART lasts no longer, so that the way back and the operator are heard.
const PART_TIME: Duration = Duration::from_millis(50);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::{Backend, Memory};
    use crate::migration::clock::HostClock;

    fn drives(chunks: &[u64]) -> Vec<Arc<Drive>> {
        let drive = |(number, chunks): (usize, &u64)| {
            let image = Memory::new(chunks * CHUNK);
            Arc::new(Drive::new(format!("d{number}"), Box::new(image)))
        };
        chunks.iter().enumerate().map(drive).collect()
    }

    fn save<'a>(drives: &[Arc<Drive>], clock: &'a HostClock) -> BlockSave<'a> {
        let (dialect, options) = (Dialect::default(), Options::default());
        BlockSave::new(drives.to_vec(), clock, dialect, options)
    }

    #[test]
    fn a_disk_that_never_rests_does_not_keep_the_others_waiting() {
        let clock = HostClock::new();
        let drives = drives(&[3, 1, 2]);
        let mut save = save(&drives, &clock);
        let taken: Vec<_> = (0..6)
            .map(|_| {
                (0..3).for_each(|chunk| drives[0].zero(chunk * CHUNK, 512, false).unwrap());
                drives[2].zero(CHUNK, 512, false).unwrap();
                save.next_dirty().unwrap()
            })
            .collect();
        assert_eq!(taken, [(0, 0), (2, 1), (0, 1), (2, 1), (0, 2), (2, 1)]);
    }

    #[test]
    fn what_is_pending_is_never_more_than_there_is() {
        let clock = HostClock::new();
        let drives = drives(&[3]);
        let mut save = save(&drives, &clock);
        let write = |chunk| drives[0].zero(chunk * CHUNK, 512, false).unwrap();
        write(2);
        assert_eq!(save.pending(), 3 * CHUNK);
        save.disks[0].bulk = 2;
        assert_eq!(save.pending(), CHUNK);
        write(0);
        assert_eq!(save.pending(), 2 * CHUNK);
        save.disks[0].bulk = 3;
        assert_eq!(save.pending(), 2 * CHUNK);
    }

    #[test]
    fn a_drive_that_went_away_is_named() {
        let clock = HostClock::new();
        let drives = drives(&[3, 3]);
        let save = save(&drives, &clock);
        assert_eq!(save.announced()[0].len, 3 * CHUNK);
        drives[0].delete();
        drives[1].resize(CHUNK).unwrap_err();
        let why = save.disks[0].check().unwrap_err().to_string();
        assert_eq!(why, "Disk 'd0' was taken out while it was sent");
        assert!(save.disks[1].check().is_ok() && save.is_bulk());
    }
}
