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
use crate::migration::section::{END, PART, START, put_cstr, put_header, put_piece};
use crate::migration::stream::Writer;

/// The live section `block`.
pub struct BlockSave<'a> {
    clock: &'a dyn Clock,
    dialect: Dialect,
    disks: Vec<Disk>,
    options: Options,
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
        let disk = |drive: Arc<Drive>| Disk {
            bulk: 0,
            dirty: 0,
            is_partial: options.is_partial(&drive),
            drive,
        };
        let disks: Vec<_> = sent(drives).map(disk).collect();
        disks.iter().for_each(|disk| disk.drive.start_log());
        Self {
            clock,
            dialect,
            disks,
            options,
            percent: None,
            chunk: vec![0; CHUNK as usize],
        }
    }

    /// Queues START.
    pub fn setup(&mut self, writer: &mut Writer<'a>) {
        writer.put(|to| {
            put_header(START, SECTION_ID, &header(), to);
            to.extend(Record::Eos.compose().to_be_bytes());
            self.dialect.put_footer(SECTION_ID, to);
        });
        writer.mark();
        let disk = writer.progress.disk.get_or_insert_default();
        disk.total = self.disks.iter().map(|disk| disk.drive.len()).sum();
        self.note(writer);
    }

    /// Bytes of chunks that have not been sent, or not since they were written to.
    pub fn pending(&self) -> u64 {
        let pending = |disk: &Disk| {
            let len = disk.drive.len();
            len.saturating_sub(disk.bulk * CHUNK) + (disk.drive.dirty() * CHUNK).min(len)
        };
        self.disks.iter().map(pending).sum()
    }

    /// Whether some chunk has never been sent.
    pub fn is_bulk(&self) -> bool {
        self.disks
            .iter()
            .any(|disk| disk.bulk < disk.drive.chunks())
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
        let is_left = |disk: &Disk| disk.bulk < disk.drive.chunks();
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
        let mut disks = self.disks.iter().enumerate();
        let dirty =
            disks.find_map(|(index, disk)| Some((index, disk.drive.take_dirty(disk.dirty)?)));
        let Some((index, number)) = dirty else {
            return Ok(false);
        };
        self.disks[index].dirty = number + 1;
        self.send(writer, index, number)?;
        Ok(true)
    }

    /// Chunks of the bulk that were sent, and all.
    fn bulk(&self) -> (u64, u64) {
        let done = self.disks.iter().map(|disk| disk.bulk).sum();
        let all = self.disks.iter().map(|disk| disk.drive.chunks()).sum();
        (done, all)
    }

    fn tell(&mut self, writer: &mut Writer<'a>, percent: u64) {
        if self.percent.replace(percent) != Some(percent) {
            writer.put(|to| to.extend(Record::Progress(percent).compose().to_be_bytes()));
        }
    }

    fn send(&mut self, writer: &mut Writer<'a>, index: usize, number: u64) -> Result<(), Error> {
        let drive = Arc::clone(&self.disks[index].drive);
        let (offset, sector) = (number * CHUNK, number * CHUNK / SECTOR);
        let len = (drive.len() - offset).min(CHUNK) as usize;
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
    /// Whether the image itself has anything of that chunk. QEMU 7.2 asks for 32 MiB at once and
    /// then sends from the beginning of the chunk on; the chunks are the same.
    fn has(&self, number: u64) -> Result<bool, Error> {
        let end = ((number + 1) * CHUNK).min(self.drive.len());
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
