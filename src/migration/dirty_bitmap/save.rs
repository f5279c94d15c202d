//! Bitmaps on their way out. Nobody changes them from the beginning of the migration to its end, but
//! the guest, whose writes they note. So the bits go when it stands still.

use std::sync::Arc;

use super::{ALIGN, Body, CHUNK, ENABLED, PERSISTENT, Record, header};
use crate::block::{Bitmap, BitmapError, BitmapInfo, Drive, SECTOR};
use crate::migration::Error;
use crate::migration::dialect::Dialect;
use crate::migration::manifest;
use crate::migration::section::{END, START, put_header, put_piece};
use crate::migration::stream::Writer;

/// The live section `dirty-bitmap`.
#[derive(Default)]
pub struct BitmapSave {
    bitmaps: Vec<Sent>,
    /// Which one the last record was about.
    last: Option<usize>,
}

/// A bitmap being sent.
struct Sent {
    drive: Arc<Drive>,
    info: BitmapInfo,
}

impl BitmapSave {
    /// All bitmaps of these drives; they are busy from here on until this is dropped.
    ///
    /// # Errors
    /// One is busy already, or its name does not fit into a record.
    pub fn new(drives: Vec<Arc<Drive>>) -> Result<Self, Error> {
        let mut save = Self::default();
        for drive in drives.into_iter().filter(|drive| !drive.is_deleted()) {
            for info in drive.bitmaps().info() {
                let (name, id) = (&info.name, drive.id());
                if name.len().max(id.len()) > LONGEST_NAME {
                    return Err(Error::Stream(format!(
                        "Cannot migrate bitmap '{name}' on node '{id}': Name is longer than \
                         {LONGEST_NAME} bytes"
                    )));
                }
                let taken = drive.bitmaps().change(name, |bitmap| bitmap.is_busy = true);
                taken.map_err(missed)?;
                let drive = Arc::clone(&drive);
                save.bitmaps.push(Sent { drive, info });
            }
        }
        Ok(save)
    }

    /// Whether there is nothing to be sent.
    pub fn is_empty(&self) -> bool {
        self.bitmaps.is_empty()
    }

    /// For the manifest.
    pub fn announced(&self) -> Vec<manifest::Bitmap> {
        let bitmap = |sent: &Sent| manifest::Bitmap {
            drive: sent.drive.id().to_owned(),
            name: sent.info.name.clone(),
            len: sent.drive.len(),
        };
        self.bitmaps.iter().map(bitmap).collect()
    }

    /// Queues START: which bitmaps there are.
    pub fn setup(&mut self, writer: &mut Writer<'_>, dialect: Dialect) {
        writer.put(|to| put_header(START, SECTION_ID, &header(), to));
        for index in 0..self.bitmaps.len() {
            let info = &self.bitmaps[index].info;
            let flag = |flag, is_set| if is_set { flag } else { 0 };
            let body = Body::Start {
                granularity: info.granularity,
                flags: flag(ENABLED, info.is_enabled) | flag(PERSISTENT, info.is_persistent),
            };
            self.put(writer, index, body);
        }
        put_end(writer, dialect);
    }

    /// Sends all bits, as END. The guest stands still.
    pub fn complete(&mut self, writer: &mut Writer<'_>, dialect: Dialect) -> Result<(), Error> {
        writer.put(|to| put_piece(END, SECTION_ID, to));
        for index in 0..self.bitmaps.len() {
            let Sent { drive, info } = &self.bitmaps[index];
            let drive = Arc::clone(drive);
            let name = info.name.clone();
            let mut chunk = 0;
            loop {
                let bits = drive.bitmaps().with(&name, |bitmap| bits(bitmap, chunk));
                // Busy bitmaps are not removed, so this is a defect of ours.
                let (body, is_last) = bits.map_err(missed).inspect_err(|_| writer.tear())?;
                self.put(writer, index, body);
                if writer.is_full() {
                    writer.flush()?;
                }
                if is_last {
                    break;
                }
                chunk += 1;
            }
        }
        for index in 0..self.bitmaps.len() {
            self.put(writer, index, Body::Complete);
        }
        put_end(writer, dialect);
        Ok(writer.flush()?)
    }

    /// Queues a record about that bitmap.
    fn put(&mut self, writer: &mut Writer<'_>, index: usize, body: Body) {
        let Sent { drive, info } = &self.bitmaps[index];
        let last = self.last.replace(index);
        let is_same_drive = last.is_some_and(|last| Arc::ptr_eq(&self.bitmaps[last].drive, drive));
        let record = Record {
            drive: (!is_same_drive).then(|| drive.id().to_owned()),
            name: (last != Some(index)).then(|| info.name.clone()),
            body,
            is_last: false,
        };
        writer.put(|to| record.put(to));
    }
}

impl Drop for BitmapSave {
    fn drop(&mut self) {
        for Sent { drive, info } in &self.bitmaps {
            let free = |bitmap: &mut Bitmap| bitmap.is_busy = false;
            // It is there: it was busy.
            let _ = drive.bitmaps().with(&info.name, free);
        }
    }
}

/// The bits of that chunk, and whether it is the last one. A disk without bytes has one all the same.
fn bits(bitmap: &Bitmap, chunk: usize) -> (Body, bool) {
    let per_word = 64 * (u64::from(bitmap.granularity()) / SECTOR);
    // The number of sectors has 32 bits. (QEMU cuts it off, and never ends.)
    let words_per_chunk = (CHUNK as u64 / 8).min(u64::from(u32::MAX) / per_word);
    let mut chunks = bitmap.words().chunks(words_per_chunk as usize);
    let is_last = chunk + 1 >= chunks.len();
    let words = chunks.nth(chunk).unwrap_or_default();
    let per_chunk = words_per_chunk * per_word;
    let sector = chunk as u64 * per_chunk;
    let left = (bitmap.len() / SECTOR).saturating_sub(sector);
    let is_zero = words.iter().all(|word| *word == 0);
    let body = Body::Bits {
        sector,
        count: left.min(per_chunk) as u32,
        words: (!is_zero).then(|| {
            let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
            bytes.resize(bytes.len().next_multiple_of(ALIGN), 0);
            bytes
        }),
    };
    (body, is_last)
}

fn put_end(writer: &mut Writer<'_>, dialect: Dialect) {
    writer.put(|to| {
        Record::EOS.put(to);
        dialect.put_footer(SECTION_ID, to);
    });
    writer.mark();
}

fn missed(error: BitmapError) -> Error {
    Error::Stream(error.to_string())
}

/// "bmp": a number that no other section of ours has.
const SECTION_ID: u32 = 0x62_6d70;
/// Bytes of a name in a record.
const LONGEST_NAME: usize = 255;

#[cfg(test)]
mod tests {
    use super::*;

    fn bitmap(granularity: u32, len: u64) -> Bitmap {
        Bitmap::new("b", granularity, len).unwrap()
    }

    #[test]
    fn bits_are_qemus() {
        // Captured from a QEMU (spec §8.3): 24 MiB, granules of 64 KiB, of which number 16 is dirty.
        let mut one = bitmap(1 << 16, 24 << 20);
        assert!(one.load(0, &[1 << 16]));
        let mut words = vec![0; 64];
        words[2] = 1;
        let expected = Body::Bits {
            sector: 0,
            count: 49152,
            words: Some(words),
        };
        assert_eq!(bits(&one, 0), (expected, true));
    }

    #[test]
    fn a_bitmap_goes_in_chunks() {
        // 8192 bits, and one more.
        let mut long = bitmap(512, 8193 * 512);
        assert!(long.load(128, &[1]));
        let zeros = Body::Bits {
            sector: 0,
            count: 8192,
            words: None,
        };
        assert_eq!(bits(&long, 0), (zeros, false));
        let mut words = vec![0; 32];
        words[0] = 1;
        let rest = Body::Bits {
            sector: 8192,
            count: 1,
            words: Some(words),
        };
        assert_eq!(bits(&long, 1), (rest, true));
        let nothing = Body::Bits {
            sector: 0,
            count: 0,
            words: None,
        };
        assert_eq!(bits(&bitmap(512, 0), 0), (nothing, true));
        // The longest granules there are: sectors of 1024 bytes of them do not fit into the record.
        let huge = bitmap(1 << 31, 1 << 45);
        let count = (15 * 64) << 22;
        let zeros = Body::Bits {
            sector: u64::from(count),
            count,
            words: None,
        };
        assert_eq!(bits(&huge, 1), (zeros, false));
    }
}
