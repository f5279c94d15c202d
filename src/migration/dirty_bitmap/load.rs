//! Bitmaps on their way in. The guest does not run yet: what it writes here is noted once all bits
//! have come.
//!
//! What a QEMU can not use of them costs it the bitmaps and not the guest, so it is here, too, when a
//! QEMU sends. Another hmpsh can be told, and keeps guest and bitmaps.

use std::sync::Arc;

use super::{
    ALIGN, AUTOLOAD, Body, ENABLED, IDSTR, LONGEST, PERSISTENT, Record, VERSION, exists, find,
};
use crate::block::{Bitmap, BitmapError, Drive, SECTOR};
use crate::migration::Error;
use crate::migration::stream::Reader;
use crate::vm::guest::SectionHeader;

/// The live section `dirty-bitmap`.
pub struct BitmapLoad {
    drives: Vec<Arc<Drive>>,
    section_id: Option<u32>,
    is_complete: bool,
    /// What records without a drive are about.
    drive: Option<Arc<Drive>>,
    /// What records without a name are about.
    current: Current,
    started: Vec<Started>,
    /// Bytes of memory that more bitmaps may take.
    room: u64,
    /// Why the bitmaps stay behind, if they do.
    pub lost: Option<String>,
    /// Whether such a thing ends the migration: the source can be told.
    pub is_strict: bool,
}

/// The bitmap that was named last.
enum Current {
    /// None yet.
    Unknown,
    /// One that is not there, to be started by the same record.
    New(String),
    /// This one of those that were started.
    Started(usize),
}

/// A bitmap that is being filled. It is busy, and notes nothing.
struct Started {
    drive: Arc<Drive>,
    name: String,
    is_enabled: bool,
    is_complete: bool,
}

impl BitmapLoad {
    /// Ready for a section with bitmaps of some of these drives.
    pub fn new(drives: Vec<Arc<Drive>>) -> Self {
        Self {
            drives,
            section_id: None,
            is_complete: false,
            drive: None,
            current: Current::Unknown,
            started: Vec::new(),
            room: MOST,
            lost: None,
            is_strict: false,
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
        if version != VERSION {
            let text = format!("savevm: unsupported version {version} for '{IDSTR}' v{VERSION}");
            return Err(Error::Stream(text));
        }
        if self.section_id.replace(id).is_some() {
            return Err(Error::stream("Section 'dirty-bitmap' was started twice"));
        }
        self.records(reader)
    }

    /// Whether PARTs and ENDs with that id are this section's.
    pub fn is(&self, id: u32) -> bool {
        self.section_id == Some(id)
    }

    /// PART or END.
    pub fn load(&mut self, reader: &mut Reader, is_end: bool) -> Result<(), Error> {
        if self.is_complete {
            return Err(Error::stream(
                "Section 'dirty-bitmap' goes on after its end",
            ));
        }
        self.records(reader)?;
        if is_end {
            self.is_complete = true;
            if let Some(part) = self.started.iter().find(|part| !part.is_complete) {
                let name = part.name.escape_default();
                let text = format!("Dirty bitmap '{name}' has not come whole");
                return self.give_up(text);
            }
        }
        Ok(())
    }

    /// What is missing of the section, for the operator. (A QEMU without bitmaps begins it and does
    /// not end it.)
    pub fn missing(&self) -> Option<&'static str> {
        let is_under_way = !self.started.is_empty() && !self.is_complete;
        is_under_way.then_some("end of section 'dirty-bitmap'")
    }

    /// The guest is about to run here: what it writes is noted.
    pub fn enable(&self) {
        for part in &self.started {
            let enable = |bitmap: &mut Bitmap| bitmap.is_enabled = part.is_enabled;
            if let Err(error) = part.drive.bitmaps().with(&part.name, enable) {
                log::error!("{error}");
            }
        }
    }

    /// The guest is here, and the bitmaps stay.
    pub fn keep(&mut self) {
        self.started.clear();
    }

    fn records(&mut self, reader: &mut Reader) -> Result<(), Error> {
        loop {
            let record = Record::read(reader)?;
            let is_last = record.is_last;
            if self.lost.is_none()
                && let Err(trouble) = self.take(record)
            {
                match trouble {
                    Trouble::Fatal(text) => return Err(Error::Stream(text)),
                    Trouble::Lost(text) => self.give_up(text)?,
                }
            }
            if is_last {
                return Ok(());
            }
        }
    }

    /// No bitmap will be there.
    fn give_up(&mut self, text: String) -> Result<(), Error> {
        self.drop_started();
        if self.is_strict {
            return Err(Error::Stream(text));
        }
        log::warn!("The guest comes without its dirty bitmaps: {text}");
        self.lost = Some(text);
        Ok(())
    }

    fn drop_started(&mut self) {
        for part in self.started.drain(..) {
            part.drive.bitmaps().drop_any(&part.name);
        }
    }

    fn take(&mut self, record: Record) -> Result<(), Trouble> {
        let is_about_something =
            record.body != Body::Nothing || record.drive.is_some() || record.name.is_some();
        if let Some(id) = &record.drive {
            let found = find(&self.drives, id).cloned();
            self.drive = Some(found.ok_or_else(|| {
                let id = id.escape_default();
                Trouble::Lost(format!("Cannot find device='{id}' nor node-name='{id}'"))
            })?);
        }
        if !is_about_something {
            return Ok(());
        }
        let drive = self.drive.clone().ok_or_else(unnamed)?;
        if let Some(name) = record.name {
            let is_it = |part: &Started| Arc::ptr_eq(&part.drive, &drive) && part.name == name;
            self.current = match self.started.iter().position(is_it) {
                Some(index) => Current::Started(index),
                None => Current::New(name),
            };
        }
        match (&self.current, record.body) {
            (Current::Unknown, _) => Err(unnamed()),
            (Current::New(name), Body::Start { granularity, flags }) => {
                let name = name.clone();
                self.start(drive, name, granularity, flags)
            }
            (Current::New(name), _) => {
                let (name, id) = (name.escape_default(), drive.id());
                Err(Trouble::Lost(format!(
                    "Error: unknown dirty bitmap '{name}' for block device '{id}'"
                )))
            }
            (Current::Started(index), body) => self.proceed(*index, body),
        }
    }

    fn start(
        &mut self,
        drive: Arc<Drive>,
        name: String,
        granularity: u32,
        flags: u8,
    ) -> Result<(), Trouble> {
        if flags & !(ENABLED | PERSISTENT | AUTOLOAD) != 0 {
            return Err(Trouble::Fatal(format!(
                "Unknown flags in migrated dirty bitmap header: {flags:x}"
            )));
        }
        let needed = Bitmap::bytes(granularity, drive.len()) + OVERHEAD;
        let rest = self.room.checked_sub(needed);
        self.room = rest.ok_or_else(|| {
            let (name, id) = (name.escape_default(), drive.id());
            Trouble::Lost(format!(
                "With dirty bitmap '{name}' of '{id}' the bitmaps would take more than {} MiB",
                MOST >> 20
            ))
        })?;
        let is_persistent = flags & PERSISTENT != 0;
        let added = drive.add_bitmap(&name, Some(granularity), |bitmap| {
            bitmap.is_enabled = false;
            bitmap.is_busy = true;
            bitmap.is_persistent = is_persistent;
        });
        added.map_err(|error| {
            Trouble::Fatal(match error {
                BitmapError::Exists(name) => exists(&name),
                other => other.to_string(),
            })
        })?;
        if is_persistent {
            log::warn!(
                "Dirty bitmap '{}' of '{}' is persistent; here it is kept until the program ends",
                name.escape_default(),
                drive.id()
            );
        }
        self.current = Current::Started(self.started.len());
        self.started.push(Started {
            drive,
            name,
            is_enabled: flags & ENABLED != 0,
            is_complete: false,
        });
        Ok(())
    }

    /// Further records about a bitmap.
    fn proceed(&mut self, index: usize, body: Body) -> Result<(), Trouble> {
        let part = &mut self.started[index];
        let change = part.drive.bitmaps();
        let gone = |error: BitmapError| Trouble::Lost(error.to_string());
        match body {
            Body::Nothing => Ok(()),
            Body::Start { .. } => Err(Trouble::Fatal(exists(&part.name))),
            Body::Complete => {
                part.is_complete = true;
                let free = |bitmap: &mut Bitmap| bitmap.is_busy = false;
                change.with(&part.name, free).map_err(gone)
            }
            Body::Bits { .. } if part.is_complete => Err(Trouble::Lost(format!(
                "Bits of dirty bitmap '{}' come after its end",
                part.name.escape_default()
            ))),
            Body::Bits {
                sector,
                count,
                words,
            } => {
                let put = |bitmap: &mut Bitmap| put(bitmap, sector, count, words.as_deref());
                let done = change.with(&part.name, put).map_err(gone)?;
                done.map_err(Trouble::Lost)
            }
        }
    }
}

impl Drop for BitmapLoad {
    /// The guest has not come.
    fn drop(&mut self) {
        self.drop_started();
    }
}

/// What is wrong with a record that could be read.
enum Trouble {
    /// What QEMU gives the guest up for.
    Fatal(String),
    /// What it gives only the bitmaps up for.
    Lost(String),
}

fn unnamed() -> Trouble {
    Trouble::Lost("Error: block device name is not set".to_owned())
}

/// Puts bits of `count` sectors from `sector` on into a bitmap; without words they are 0.
fn put(bitmap: &mut Bitmap, sector: u64, count: u32, bytes: Option<&[u8]>) -> Result<(), String> {
    let name = bitmap.name().escape_default().to_string();
    let outside = || format!("Bits of dirty bitmap '{name}' lie outside the disk");
    let per_word = 64 * (u64::from(bitmap.granularity()) / SECTOR);
    let end = sector.checked_add(u64::from(count)).ok_or_else(outside)?;
    if end > bitmap.len() / SECTOR {
        return Err(outside());
    }
    if !sector.is_multiple_of(per_word) {
        return Err(format!("Bits of dirty bitmap '{name}' begin within a word"));
    }
    let needed = match count {
        0 => 0,
        _ => 8 * (end.div_ceil(per_word) - sector / per_word),
    };
    // Bits that are not sent could be so many that only zeros would need all memory there is.
    if needed > LONGEST {
        return Err(format!(
            "Too many bits of dirty bitmap '{name}' in one record"
        ));
    }
    let needed = needed as usize;
    let bytes = match bytes {
        None => &vec![0; needed],
        Some(bytes) => bytes,
    };
    if !(needed..=needed.next_multiple_of(ALIGN)).contains(&bytes.len()) {
        return Err(format!(
            "Migrated bitmap granularity doesn't match the destination bitmap '{name}' granularity"
        ));
    }
    let (numbers, _) = bytes[..needed].as_chunks();
    let numbers: Vec<u64> = numbers
        .iter()
        .map(|word| u64::from_le_bytes(*word))
        .collect();
    // The disk may be longer here. What follows its end there stands for nothing.
    let used = (end % per_word).div_ceil(per_word / 64);
    let is_in_part = (1..64).contains(&used);
    if is_in_part && numbers.last().is_some_and(|word| word >> used != 0) {
        return Err(outside());
    }
    match bitmap.load((sector / per_word) as usize, &numbers) {
        true => Ok(()),
        false => Err(outside()),
    }
}

/// Bytes of memory for all bitmaps of a migration; each sector of a disk of 4 TiB is one bit.
const MOST: u64 = 1 << 30;
/// What a bitmap takes without its bits, by a generous measure: it bounds their number.
const OVERHEAD: u64 = 256 << 10;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::{Backend, Memory};
    use crate::migration::dirty_bitmap::header;
    use crate::migration::memory_channel::Recording;
    use proptest::prelude::*;

    const LEN: u64 = 1 << 20;

    fn drive() -> Arc<Drive> {
        Arc::new(Drive::new("d0".to_owned(), Box::new(Memory::new(LEN))))
    }

    fn record(name: Option<&str>, body: Body, is_last: bool) -> Record {
        Record {
            drive: name.map(|_| "d0".to_owned()),
            name: name.map(str::to_owned),
            body,
            is_last,
        }
    }

    fn start(flags: u8) -> Body {
        let granularity = 4096;
        Body::Start { granularity, flags }
    }

    fn bits(sector: u64, count: u32, words: Option<&[u64]>) -> Body {
        let words = words.map(|words| words.iter().flat_map(|word| word.to_le_bytes()).collect());
        Body::Bits {
            sector,
            count,
            words,
        }
    }

    /// All in one piece, as the END.
    fn load(
        drive: &Arc<Drive>,
        records: &[Record],
        is_strict: bool,
    ) -> (BitmapLoad, Result<(), String>) {
        let mut load = BitmapLoad::new(vec![Arc::clone(drive)]);
        load.is_strict = is_strict;
        let mut bytes = vec![1];
        records.iter().for_each(|record| record.put(&mut bytes));
        let mut reader = Recording::reader(&bytes);
        load.setup(&mut reader, &header(), 7).unwrap();
        let result = load
            .load(&mut reader, true)
            .map_err(|error| error.to_string());
        (load, result)
    }

    #[test]
    fn a_bitmap_is_noted_into_once_it_is_there() {
        for (flags, is_enabled) in [(ENABLED, true), (AUTOLOAD | PERSISTENT, false)] {
            let drive = drive();
            let (mut load, result) = load(
                &drive,
                &[
                    record(Some("b"), start(flags), false),
                    record(None, bits(0, 2048, Some(&[5, 0, 0, 1])), false),
                    record(None, Body::Complete, true),
                ],
                false,
            );
            assert_eq!(
                (result, load.lost.take(), load.missing()),
                (Ok(()), None, None)
            );
            let info = || drive.bitmaps().info().remove(0);
            assert_eq!((info().dirty, info().is_enabled), (3 * 4096, false));
            load.enable();
            load.keep();
            drop(load);
            assert_eq!((info().is_enabled, info().is_busy), (is_enabled, false));
            assert_eq!(info().is_persistent, flags & PERSISTENT != 0);
        }
    }

    #[test]
    fn what_makes_no_sense_costs_the_bitmaps_or_the_migration() {
        let named = |body, is_last| record(Some("b"), body, is_last);
        let first = || named(start(ENABLED), false);
        let other = Record {
            drive: Some("d9".to_owned()),
            ..first()
        };
        let outside = "Bits of dirty bitmap 'b' lie outside the disk";
        let within = "Bits of dirty bitmap 'b' begin within a word";
        let granularity =
            "Migrated bitmap granularity doesn't match the destination bitmap 'b' granularity";
        let cases = [
            (vec![other], "Cannot find device='d9' nor node-name='d9'"),
            (
                vec![record(None, start(0), false)],
                "Error: block device name is not set",
            ),
            (
                vec![named(Body::Complete, false)],
                "Error: unknown dirty bitmap 'b' for block device 'd0'",
            ),
            (vec![first(), named(bits(2048, 1, None), false)], outside),
            (
                vec![first(), named(bits(u64::MAX, u32::MAX, None), false)],
                outside,
            ),
            (vec![first(), named(bits(1, 8, None), false)], within),
            // The second granule begins with sector 8.
            (vec![first(), named(bits(0, 8, Some(&[2])), false)], outside),
            (
                vec![first(), named(bits(0, 2048, Some(&[0; 3])), false)],
                granularity,
            ),
            (
                vec![first(), named(bits(0, 2048, Some(&[0; 5])), false)],
                granularity,
            ),
            (
                vec![
                    first(),
                    named(Body::Complete, false),
                    named(bits(0, 2048, None), false),
                ],
                "Bits of dirty bitmap 'b' come after its end",
            ),
        ];
        for (records, why) in cases {
            // What follows is read over.
            let all = [
                records,
                vec![record(None, bits(5, 5, None), false), Record::EOS],
            ]
            .concat();
            let quiet = drive();
            let (load_, result) = load(&quiet, &all, false);
            assert_eq!(result, Ok(()), "{why}");
            assert_eq!(load_.lost.as_deref(), Some(why));
            assert!(quiet.bitmaps().info().is_empty(), "{why}");
            // A source that can be told keeps all of it.
            let (load_, result) = load(&quiet, &all, true);
            assert_eq!(result, Err(why.to_owned()));
            drop(load_);
            assert!(quiet.bitmaps().info().is_empty(), "{why}");
        }
    }

    /// From a disk that is shorter, and ends within a word and a granule.
    #[test]
    fn a_disk_may_be_longer_here() {
        let drive = drive();
        let records = [
            record(Some("b"), start(ENABLED), false),
            record(None, bits(0, 1025, Some(&[1, 0, 1])), false),
            record(None, Body::Complete, true),
        ];
        let (load, result) = load(&drive, &records, true);
        assert_eq!(result, Ok(()));
        load.enable();
        assert_eq!(drive.bitmaps().info()[0].dirty, 2 * 4096);
        drive.zero(LEN - 512, 512, false).unwrap();
        assert_eq!(drive.bitmaps().info()[0].dirty, 3 * 4096);
    }

    /// The last granule of a word is there even if the disk ends within it.
    #[test]
    fn a_disk_may_end_anywhere_in_a_word() {
        for (count, words, fits) in [
            (504, Some(&[1 << 63][..]), false),
            (505, Some(&[1 << 63]), true),
            (511, Some(&[1 << 63]), true),
            (511, None, true),
            (512, Some(&[1 << 63]), true),
        ] {
            let drive = drive();
            let records = [
                record(Some("b"), start(ENABLED), false),
                record(None, bits(0, count, words), false),
                record(None, Body::Complete, true),
            ];
            let (load, result) = load(&drive, &records, true);
            assert_eq!(result.is_ok(), fits, "{count}: {result:?}");
            drop(load);
        }
    }

    /// A disk of the longest kind, of which nothing is there.
    struct Endless;

    impl Backend for Endless {
        fn sectors(&self) -> u64 {
            1 << 32
        }

        fn is_read_only(&self) -> bool {
            false
        }

        fn read(&self, _: u64, _: &mut Vec<crate::iov::In<'_>>) -> std::io::Result<()> {
            Ok(())
        }

        fn write(&self, _: u64, _: &mut Vec<crate::iov::Out<'_>>) -> std::io::Result<()> {
            Ok(())
        }

        fn zero(&self, _: u64, _: u64, _: bool) -> std::io::Result<()> {
            Ok(())
        }

        fn flush(&self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_source_does_not_take_all_memory() {
        let drive = || Arc::new(Drive::new("d0".to_owned(), Box::new(Endless)));
        let granularity = 512;
        let start = |name| {
            let flags = 0;
            let body = Body::Start { granularity, flags };
            record(Some(name), body, false)
        };
        // Each has a bit for each of 2^32 sectors.
        let many = [start("a"), start("b"), Record::EOS];
        let why = "With dirty bitmap 'b' of 'd0' the bitmaps would take more than 1024 MiB";
        assert_eq!(load(&drive(), &many, true).1, Err(why.to_owned()));
        let long = [
            start("a"),
            record(None, bits(0, u32::MAX, None), false),
            Record::EOS,
        ];
        let why = "Too many bits of dirty bitmap 'a' in one record";
        assert_eq!(load(&drive(), &long, true).1, Err(why.to_owned()));
        let drive = Arc::new(Drive::new("d0".to_owned(), Box::new(Memory::new(512))));
        let names: Vec<String> = (0..5000).map(|number| number.to_string()).collect();
        let mut many: Vec<Record> = names.iter().map(|name| start(name)).collect();
        many.push(Record::EOS);
        let (load, result) = load(&drive, &many, false);
        assert_eq!(result, Ok(()));
        assert!(
            load.lost
                .as_ref()
                .is_some_and(|why| why.contains("of 'd0'"))
        );
    }

    #[test]
    fn a_bitmap_in_part_is_none() {
        let drive = drive();
        let part = [record(Some("b"), start(ENABLED), false), Record::EOS];
        let (load, result) = load(&drive, &part, false);
        let why = "Dirty bitmap 'b' has not come whole";
        assert_eq!((result, load.lost.as_deref()), (Ok(()), Some(why)));
        assert!(drive.bitmaps().info().is_empty());
    }

    #[test]
    fn what_qemu_ends_for_ends_the_migration() {
        let text = "Bitmap with the same name ('b') already exists on destination";
        let granularity = Body::Start {
            granularity: 1000,
            flags: 0,
        };
        for (body, has_one, why) in [
            (start(0), true, text),
            (
                start(8),
                false,
                "Unknown flags in migrated dirty bitmap header: 8",
            ),
            (
                granularity,
                false,
                "Granularity must be power of 2 and at least 512",
            ),
        ] {
            let drive = drive();
            if has_one {
                drive.add_bitmap("b", None, |_| ()).unwrap();
            }
            let (load, result) = load(&drive, &[record(Some("b"), body, true)], false);
            assert_eq!(result, Err(why.to_owned()));
            drop(load);
            assert_eq!(drive.bitmaps().info().len(), usize::from(has_one));
        }
        let twice = [
            record(Some("b"), start(0), false),
            record(None, start(0), true),
        ];
        assert_eq!(load(&drive(), &twice, false).1, Err(text.to_owned()));
    }

    proptest! {
        #[test]
        fn any_section_is_read_without_harm(
            bytes in proptest::collection::vec(any::<u8>(), 0..300),
            is_started: bool,
        ) {
            let drive = drive();
            let mut load = BitmapLoad::new(vec![Arc::clone(&drive)]);
            let mut all = Vec::new();
            record(Some("b"), start(ENABLED), !is_started).put(&mut all);
            all.extend(bytes);
            let mut reader = Recording::reader(&all);
            let _ = load.setup(&mut reader, &header(), 7);
            let _ = load.load(&mut reader, true);
            drop(load);
            prop_assert!(drive.bitmaps().info().is_empty());
        }
    }
}
