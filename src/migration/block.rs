//! The section `block`: record words, and both directions below.
//!
//! ```text
//! START  EOS be64
//! PART   { sector<<9|flags be64 [name cstr [1 MiB]] }… | EOS be64        END as PART
//! ```
//! Sectors have 512 bytes, so the low 9 bits hold the flags. A chunk has 1 MiB also where the disk
//! ends before. QEMU: `migration/block.c` of 7.2 (10.0 has none); stream spec §5.

mod load;
mod save;
mod target;

pub use load::{BlockLoad, sync};
pub use save::{BlockSave, Options};

use std::sync::Arc;

use crate::block::{Backend, Drive, SECTOR};
use crate::vm::guest::SectionHeader;
use crate::vm::memory;

/// Section name.
pub const IDSTR: &str = "block";
/// The only version.
pub const VERSION: u32 = 1;

/// What a record of the section is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Record {
    /// The bytes of a chunk, from a sector on.
    Chunk(u64),
    /// A chunk of zeros, from a sector on.
    Zero(u64),
    /// How much of all disks was sent, in percent.
    Progress(u64),
    /// The end of the body.
    Eos,
}

const CHUNK: u64 = 0x01;
const EOS: u64 = 0x02;
const PROGRESS: u64 = 0x04;
const ZERO: u64 = 0x08;
const FLAGS: u64 = SECTOR - 1;

impl Record {
    /// Takes a word apart. `Err` is QEMU's text.
    pub fn parse(word: u64) -> Result<Self, String> {
        let number = word / SECTOR;
        match word & FLAGS {
            CHUNK => Ok(Self::Chunk(number)),
            flags if flags == CHUNK | ZERO => Ok(Self::Zero(number)),
            PROGRESS if number <= 100 => Ok(Self::Progress(number)),
            EOS if number == 0 => Ok(Self::Eos),
            _ => Err(format!("Unknown block migration flags: {word:#x}")),
        }
    }

    /// The word.
    pub fn compose(self) -> u64 {
        match self {
            Self::Chunk(sector) => (sector * SECTOR) | CHUNK,
            Self::Zero(sector) => (sector * SECTOR) | CHUNK | ZERO,
            Self::Progress(percent) => (percent * SECTOR) | PROGRESS,
            Self::Eos => EOS,
        }
    }
}

/// The drives that a migration with disks sends.
pub fn sent(drives: Vec<Arc<Drive>>) -> impl Iterator<Item = Arc<Drive>> {
    let is_sent = |drive: &Arc<Drive>| !drive.is_read_only() && !drive.is_empty();
    drives.into_iter().filter(is_sent)
}

/// Whether a drive is as long as that one at the source; the text says why not.
pub(super) fn check_len(drive: &Drive, len: u64) -> Result<(), String> {
    let (id, here) = (drive.id(), drive.len());
    match here < len {
        true => Err(format!(
            "Disk '{id}' is too small at the destination: {here} bytes of {len}"
        )),
        false => Ok(()),
    }
}

/// Whether the image has a backing file.
fn has_behind(drive: &Drive) -> bool {
    let layers = drive.layers();
    layers.first().is_some_and(|top| top.behind.is_some())
}

/// Whether a chunk, or less, is all zero.
fn is_zero(chunk: &[u8]) -> bool {
    let (pages, rest) = chunk.as_chunks();
    pages.iter().all(memory::is_zero) && rest.iter().all(|byte| *byte == 0)
}

fn header() -> SectionHeader {
    SectionHeader {
        idstr: IDSTR.to_owned(),
        instance: 0,
        version: VERSION,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn words_are_qemus() {
        assert_eq!(Record::Chunk(0x1000).compose(), 0x20_0001);
        assert_eq!(Record::Zero(2048).compose(), 0x10_0009);
        assert_eq!(Record::Progress(99).compose(), 0xc604);
        assert_eq!(Record::Eos.compose(), 2);
        assert_eq!(
            Record::parse(0x21),
            Err("Unknown block migration flags: 0x21".to_owned())
        );
    }

    proptest! {
        #[test]
        fn what_is_understood_is_the_same_word(word: u64) {
            // Random bits hardly ever are a word.
            for word in [word, word & !0x1f0, word & !0x1f6] {
                if let Ok(record) = Record::parse(word) {
                    prop_assert_eq!(record.compose(), word);
                }
            }
        }
    }
}
