//! The section `dirty-bitmap`: its records, and both directions below.
//!
//! ```text
//! START, PART, END   record…, the last one with EOS
//! record    flags u8 | (DRIVE:) cstr | (NAME:) cstr | by flag, the first that is set:
//!   START     granularity be32 | bitmap flags u8
//!   COMPLETE
//!   BITS      sector be64 | sectors be32 | (unless ZEROES:) size be64 | words, each le64
//! ```
//! Sectors have 512 bytes. Drive and name are left out where they are those of the record before.
//! QEMU: `migration/block-dirty-bitmap.c`; stream spec §8.

mod load;
mod save;

pub use load::BitmapLoad;
pub use save::BitmapSave;

use std::sync::Arc;

use super::Error;
use super::block;
use super::manifest;
use super::section::put_cstr;
use super::stream::Reader;
use crate::block::Drive;
use crate::vm::guest::SectionHeader;

/// Section name.
pub const IDSTR: &str = "dirty-bitmap";
/// The only version.
pub const VERSION: u32 = 1;

/// A record of the section.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// `id=` of the drive, unless it is that of the record before.
    pub drive: Option<String>,
    /// Name of the bitmap, unless it is that of the record before.
    pub name: Option<String>,
    /// What is said of the bitmap.
    pub body: Body,
    /// The section's piece ends here.
    pub is_last: bool,
}

/// What a record says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Body {
    /// Nothing.
    Nothing,
    /// There is such a bitmap.
    Start {
        /// Bytes of a granule.
        granularity: u32,
        /// [`ENABLED`] and others.
        flags: u8,
    },
    /// All bits of the bitmap have been sent.
    Complete,
    /// Bits of that many sectors.
    Bits {
        /// The first of them.
        sector: u64,
        /// How many.
        count: u32,
        /// Words, each le64, and padding; none if all bits are 0.
        words: Option<Vec<u8>>,
    },
}

impl Record {
    /// Only the end of a piece.
    pub const EOS: Self = Self {
        drive: None,
        name: None,
        body: Body::Nothing,
        is_last: true,
    };

    /// Reads one.
    ///
    /// # Errors
    /// The stream ends or makes no sense: where the next record begins can not be known.
    pub fn read(reader: &mut Reader) -> Result<Self, Error> {
        let flags = read_flags(reader)?;
        let mut name = |flag: u8, what: &str| {
            if flags & flag == 0 {
                return Ok(None);
            }
            match reader.cstr()? {
                name if name.is_empty() => {
                    Err(Error::Stream(format!("Unable to read {what} alias string")))
                }
                name => Ok(Some(name)),
            }
        };
        let drive = name(DRIVE, "node")?;
        let name = name(NAME, "bitmap")?;
        let body = if flags & START != 0 {
            Body::Start {
                granularity: reader.be32()?,
                flags: reader.u8()?,
            }
        } else if flags & COMPLETE != 0 {
            Body::Complete
        } else if flags & BITS != 0 {
            let (sector, count) = (reader.be64()?, reader.be32()?);
            let words = match flags & ZEROES {
                0 => Some(read_words(reader)?),
                _ => None,
            };
            Body::Bits {
                sector,
                count,
                words,
            }
        } else {
            Body::Nothing
        };
        Ok(Self {
            drive,
            name,
            body,
            is_last: flags & EOS != 0,
        })
    }

    /// Appends it.
    pub fn put(&self, to: &mut Vec<u8>) {
        let flag = |flag: u8, is_set: bool| if is_set { flag } else { 0 };
        let kind = match &self.body {
            Body::Nothing => 0,
            Body::Start { .. } => START,
            Body::Complete => COMPLETE,
            Body::Bits { words: Some(_), .. } => BITS,
            Body::Bits { words: None, .. } => BITS | ZEROES,
        };
        to.push(
            kind | flag(DRIVE, self.drive.is_some())
                | flag(NAME, self.name.is_some())
                | flag(EOS, self.is_last),
        );
        for name in [&self.drive, &self.name].into_iter().flatten() {
            put_cstr(name, to);
        }
        match &self.body {
            Body::Nothing | Body::Complete => {}
            Body::Start { granularity, flags } => {
                to.extend(granularity.to_be_bytes());
                to.push(*flags);
            }
            Body::Bits {
                sector,
                count,
                words,
            } => {
                to.extend(sector.to_be_bytes());
                to.extend(count.to_be_bytes());
                if let Some(words) = words {
                    to.extend((words.len() as u64).to_be_bytes());
                    to.extend(words);
                }
            }
        }
    }
}

/// One byte; two or four if bit 7 says so, of which the last one has the flags that there are.
fn read_flags(reader: &mut Reader) -> Result<u8, Error> {
    let mut flags = reader.u8()?;
    if flags & EXTRA != 0 {
        flags = reader.u8()?;
        if flags & EXTRA != 0 {
            flags = reader.be16()? as u8;
        }
    }
    Ok(flags)
}

fn read_words(reader: &mut Reader) -> Result<Vec<u8>, Error> {
    let size = reader.be64()?;
    if size > LONGEST {
        let text = "Bitmap migration stream buffer allocation request is too large";
        return Err(Error::stream(text));
    }
    let mut words = vec![0; size as usize];
    reader.exact(&mut words)?;
    Ok(words)
}

/// Whether a bitmap that is announced can be taken in; the text says why not.
pub fn check(drives: &[Arc<Drive>], bitmap: &manifest::Bitmap) -> Result<(), String> {
    let manifest::Bitmap {
        drive: id,
        name,
        len,
    } = bitmap;
    let (id, name) = (id.escape_default(), name.escape_default());
    let Some(drive) = find(drives, &bitmap.drive) else {
        return Err(format!(
            "Disk '{id}' exists only at the source, and its bitmap '{name}' is sent (dirty-bitmaps)"
        ));
    };
    if drive.bitmaps().with(&bitmap.name, |_| ()).is_ok() {
        return Err(exists(&bitmap.name));
    }
    block::check_len(drive, *len)
}

fn find<'a>(drives: &'a [Arc<Drive>], id: &str) -> Option<&'a Arc<Drive>> {
    let is_it = |drive: &&Arc<Drive>| drive.id() == id && !drive.is_deleted();
    drives.iter().find(is_it)
}

fn exists(name: &str) -> String {
    let name = name.escape_default();
    format!("Bitmap with the same name ('{name}') already exists on destination")
}

fn header() -> SectionHeader {
    SectionHeader {
        idstr: IDSTR.to_owned(),
        instance: 0,
        version: VERSION,
    }
}

const EOS: u8 = 0x01;
const ZEROES: u8 = 0x02;
const NAME: u8 = 0x04;
const DRIVE: u8 = 0x08;
const START: u8 = 0x10;
const COMPLETE: u8 = 0x20;
const BITS: u8 = 0x40;
const EXTRA: u8 = 0x80;

/// Writes are noted.
pub const ENABLED: u8 = 0x01;
/// See [`crate::block::Bitmap::is_persistent`].
pub const PERSISTENT: u8 = 0x02;
/// Said once, and means nothing.
const AUTOLOAD: u8 = 0x04;

/// Bytes of a bitmap that are sent at once.
const CHUNK: usize = 1 << 10;
/// What follows the words is a multiple of so many bytes with them.
const ALIGN: usize = 32;
/// Bytes of words at most.
const LONGEST: u64 = 10 << 10;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::migration::memory_channel::Recording;
    use proptest::prelude::*;

    fn bytes(record: &Record) -> Vec<u8> {
        let mut bytes = Vec::new();
        record.put(&mut bytes);
        bytes
    }

    fn read(bytes: &[u8]) -> Result<Record, Error> {
        Record::read(&mut Recording::reader(bytes))
    }

    fn record() -> impl Strategy<Value = Record> {
        let name = || proptest::option::of("[a-z0-9ä ]{1,60}");
        let words = proptest::option::of(proptest::collection::vec(any::<u8>(), 0..200));
        let body = prop_oneof![
            Just(Body::Nothing),
            Just(Body::Complete),
            (any::<u32>(), any::<u8>())
                .prop_map(|(granularity, flags)| Body::Start { granularity, flags }),
            (any::<u64>(), any::<u32>(), words).prop_map(|(sector, count, words)| Body::Bits {
                sector,
                count,
                words
            }),
        ];
        (name(), name(), body, any::<bool>()).prop_map(|(drive, name, body, is_last)| Record {
            drive,
            name,
            body,
            is_last,
        })
    }

    #[test]
    fn records_are_qemus_bytes() {
        let start = |drive: Option<&str>, name: &str, granularity, flags| Record {
            drive: drive.map(str::to_owned),
            name: Some(name.to_owned()),
            body: Body::Start { granularity, flags },
            is_last: false,
        };
        // Captured from a QEMU (spec, A.7).
        let first = bytes(&start(Some("nd0"), "other", 1 << 20, ENABLED));
        assert_eq!(first, *b"\x1c\x03nd0\x05other\0\x10\0\0\x01");
        let second = bytes(&start(None, "bm0", 1 << 16, ENABLED));
        assert_eq!(second, *b"\x14\x03bm0\0\x01\0\0\x01");
        assert_eq!(bytes(&Record::EOS), [1]);
        let zeros = Record {
            drive: None,
            name: None,
            body: Body::Bits {
                sector: 0,
                count: 2048,
                words: None,
            },
            is_last: false,
        };
        assert_eq!(bytes(&zeros), *b"\x42\0\0\0\0\0\0\0\0\0\0\x08\0");
    }

    #[test]
    fn more_bytes_of_flags_say_no_more() {
        for flags in [
            &b"\x01"[..],
            b"\x80\x01",
            b"\xff\x01",
            b"\x80\x80\0\x01",
            b"\xff\xff\xff\x01",
        ] {
            assert_eq!(read(flags).unwrap(), Record::EOS, "{flags:x?}");
        }
    }

    #[test]
    fn what_has_no_end_is_refused() {
        let text = |bytes: &[u8]| read(bytes).unwrap_err().to_string();
        assert_eq!(text(b"\x08\0"), "Unable to read node alias string");
        assert_eq!(text(b"\x04\0"), "Unable to read bitmap alias string");
        let long = b"\x40\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\x28\x01";
        assert_eq!(
            text(long),
            "Bitmap migration stream buffer allocation request is too large"
        );
    }

    proptest! {
        #[test]
        fn records_come_back(record in record()) {
            let bytes = bytes(&record);
            prop_assert_eq!(read(&bytes).unwrap(), record);
            for len in 0..bytes.len() {
                prop_assert!(read(&bytes[..len]).is_err());
            }
        }

        #[test]
        fn any_bytes_are_read_without_harm(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
            let _ = read(&bytes);
        }
    }
}
