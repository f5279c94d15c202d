//! Disks on their way in. Chunks are written as they come; what came is kept in mind, because a
//! QEMU 7.2 may say that it has sent everything when it has not.

use std::sync::Arc;

use super::{IDSTR, Record, VERSION};
use crate::block::{Backend, CHUNK, Drive, SECTOR};
use crate::errno::Errno;
use crate::iov::Out;
use crate::migration::Error;
use crate::migration::stats::DiskStats;
use crate::migration::stream::Reader;
use crate::vm::guest::SectionHeader;

/// The live section `block`.
pub struct BlockLoad {
    disks: Vec<Disk>,
    section_id: Option<u32>,
    is_complete: bool,
    /// What the source said last in front of the end.
    percent: u64,
    chunk: Vec<u8>,
    /// What came, and the length of the disks it is for; none before the section. What is still to
    /// come is not known.
    pub stats: Option<DiskStats>,
}

/// A drive being filled; its image is locked from the first chunk on.
struct Disk {
    drive: Arc<Drive>,
    /// A bit for each chunk that came; empty if none did.
    came: Vec<u64>,
}

impl BlockLoad {
    /// Ready for a section that fills some of these drives.
    pub fn new(drives: Vec<Arc<Drive>>) -> Self {
        let disk = |drive| Disk {
            drive,
            came: Vec::new(),
        };
        Self {
            disks: drives.into_iter().map(disk).collect(),
            section_id: None,
            is_complete: false,
            percent: 0,
            chunk: Vec::new(),
            stats: None,
        }
    }

    /// START: its header has been read.
    pub fn setup(
        &mut self,
        reader: &mut Reader,
        header: &SectionHeader,
        id: u32,
    ) -> Result<(), Error> {
        let version = header.version;
        if version > VERSION {
            let text = format!("savevm: unsupported version {version} for '{IDSTR}' v{VERSION}");
            return Err(Error::Stream(text));
        }
        if self.section_id.replace(id).is_some() {
            return Err(Error::stream("Section 'block' was started twice"));
        }
        self.chunk = vec![0; CHUNK as usize];
        self.stats = Some(DiskStats::default());
        self.records(reader)
    }

    /// Whether PARTs and ENDs with that id are this section's.
    pub fn is(&self, id: u32) -> bool {
        self.section_id == Some(id)
    }

    /// PART or END.
    pub fn load(&mut self, reader: &mut Reader, is_end: bool) -> Result<(), Error> {
        if self.is_complete {
            return Err(Error::stream("Section 'block' goes on after its end"));
        }
        let before = self.percent;
        self.records(reader)?;
        if is_end {
            self.is_complete = true;
            self.chunk = Vec::new();
            self.settle()?;
            // The end says 100 in any case, and with -i chunks are left out.
            if before < 100 {
                return self.check_all_came();
            }
        }
        Ok(())
    }

    /// What is missing of the section, for the operator.
    pub fn missing(&self) -> Option<&'static str> {
        (self.section_id.is_some() && !self.is_complete).then_some("end of section 'block'")
    }

    fn records(&mut self, reader: &mut Reader) -> Result<(), Error> {
        reader.set_ahead(0);
        let result = self.chunks(reader);
        reader.set_ahead(usize::MAX);
        result
    }

    fn chunks(&mut self, reader: &mut Reader) -> Result<(), Error> {
        loop {
            match Record::parse(reader.be64()?).map_err(Error::Stream)? {
                Record::Eos => return Ok(()),
                Record::Progress(percent) => self.percent = percent,
                Record::Chunk(sector) => {
                    let index = self.find(&reader.cstr()?)?;
                    reader.bulk(&mut self.chunk)?;
                    let is_zero = super::is_zero(&self.chunk);
                    self.write(index, sector, is_zero)?;
                }
                Record::Zero(sector) => {
                    let index = self.find(&reader.cstr()?)?;
                    self.write(index, sector, true)?;
                }
            }
        }
    }

    fn find(&self, name: &str) -> Result<usize, Error> {
        let found = self.disks.iter().position(|disk| disk.drive.id() == name);
        found.ok_or_else(|| {
            let name = name.escape_default();
            Error::Stream(format!("Error unknown block device {name}"))
        })
    }

    fn write(&mut self, index: usize, sector: u64, is_zero: bool) -> Result<(), Error> {
        let disk = &mut self.disks[index];
        let (drive, id) = (&disk.drive, disk.drive.id());
        if drive.is_read_only() {
            let text = format!("Disk '{id}' can not be written here, and the source sends it");
            return Err(Error::Stream(text));
        }
        let offset = sector.saturating_mul(SECTOR);
        if offset >= drive.len() {
            let here = drive.sectors();
            return Err(Error::Stream(format!(
                "Disk '{id}' is too small: it has {here} sectors here, and the source sends \
                 sector {sector}"
            )));
        }
        if !offset.is_multiple_of(CHUNK) {
            let text = format!("Sector {sector} of disk '{id}' is not where a chunk begins");
            return Err(Error::Stream(text));
        }
        if disk.came.is_empty() {
            // The image may be the source's own.
            super::claim(drive).map_err(Error::Stream)?;
            disk.came = vec![0; drive.chunks().div_ceil(64) as usize];
            if let Some(stats) = &mut self.stats {
                stats.total += drive.len();
            }
        }
        // The last one may be shorter; what is behind it means nothing.
        let len = (drive.len() - offset).min(CHUNK);
        let written = match is_zero {
            true => drive.image().zero(offset, len, true),
            false => drive
                .image()
                .write(offset, &mut vec![Out::from(&self.chunk[..len as usize])]),
        };
        written.map_err(|error| {
            let why = Errno(&error);
            Error::Stream(format!(
                "Writing disk '{id}' from sector {sector} on: {why}"
            ))
        })?;
        let number = offset / CHUNK;
        disk.came[(number / 64) as usize] |= 1 << (number % 64);
        if let Some(stats) = &mut self.stats {
            stats.transferred += len;
        }
        Ok(())
    }

    /// The source's guest may have been told that all of this is safe.
    fn settle(&self) -> Result<(), Error> {
        for disk in self.disks.iter().filter(|disk| !disk.came.is_empty()) {
            let settled = disk.drive.settle();
            settled.map_err(|error| {
                let (id, why) = (disk.drive.id(), Errno(&error));
                Error::Stream(format!("Writing disk '{id}': {why}"))
            })?;
        }
        Ok(())
    }

    /// The source has ended in front of the end of the bulk, or with the rest of it.
    fn check_all_came(&self) -> Result<(), Error> {
        let writable = self.disks.iter().filter(|disk| !disk.drive.is_read_only());
        let gaps: Vec<String> = writable.filter_map(Disk::gap).collect();
        if gaps.is_empty() {
            return Ok(());
        }
        Err(Error::Stream(format!(
            "The source has ended before it had sent the disks: {}. QEMU 7.2 does that when what \
             is left of RAM is little; with `migrate_set_parameter downtime-limit 0` and \
             max-bandwidth 100g it does not",
            gaps.join(", ")
        )))
    }
}

impl Disk {
    /// From where to where chunks are missing.
    fn gap(&self) -> Option<String> {
        let is_missing = |number: &u64| {
            let word = self.came.get((*number / 64) as usize).copied();
            word.unwrap_or(0) >> (number % 64) & 1 == 0
        };
        let mut missing = (0..self.drive.chunks()).filter(is_missing);
        let first = missing.next()?;
        let last = missing.next_back().unwrap_or(first);
        let (from, to) = (
            first * CHUNK,
            ((last + 1) * CHUNK).min(self.drive.len()) - 1,
        );
        let id = self.drive.id();
        Some(format!(
            "of '{id}' bytes {from:#x} to {to:#x} are not all there"
        ))
    }
}
