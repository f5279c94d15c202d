//! The section `ram`: record words, the block list, and both directions below.
//!
//! ```text
//! START  total|MEM_SIZE be64 | { name cstr | length be64 }… | EOS be64
//! PART   { offset|flags be64 [name cstr] payload }… | EOS be64        END as PART
//! ```
//! Offsets are relative to the block and multiples of 4096, so the low 12 bits hold the flags.
//! QEMU: `migration/ram.c`.

mod bitmap;
mod load;
mod populate;
mod save;

pub use bitmap::DirtyBitmap;
pub use load::RamLoad;
pub use save::{RamSave, SECTION_ID};

use super::section::put_cstr;
use crate::vm::guest::SectionHeader;
use crate::vm::memory::{PAGE_SIZE, RamBlock};

/// Section name.
pub const IDSTR: &str = "ram";
/// The only version.
pub const VERSION: u32 = 4;

/// What a record of the section is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Record {
    /// A page of zeros.
    Zero,
    /// The block list.
    MemSize,
    /// A page.
    Page,
    /// The end of the body.
    Eos,
}

const ZERO: u64 = 0x02;
const MEM_SIZE: u64 = 0x04;
const PAGE: u64 = 0x08;
const EOS: u64 = 0x10;
const CONTINUE: u64 = 0x20;
const FLAGS: u64 = PAGE_SIZE as u64 - 1;

/// A record word, taken apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Word {
    /// What follows.
    pub record: Record,
    /// The block is the one of the last page: no name follows.
    pub same_block: bool,
    /// Offset in the block (pages) or total length (block list), bytes.
    pub offset: u64,
}

impl Word {
    /// Takes a word apart. `Err` is QEMU's text.
    #[inline]
    pub fn parse(word: u64) -> Result<Self, String> {
        let flags = word & FLAGS;
        let offset = word & !FLAGS;
        let record = match flags & !CONTINUE {
            PAGE => Record::Page,
            ZERO => Record::Zero,
            MEM_SIZE if flags & CONTINUE == 0 => Record::MemSize,
            EOS if word == EOS => Record::Eos,
            _ => {
                return Err(format!(
                    "Unknown combination of migration flags: {flags:#x}"
                ));
            }
        };
        Ok(Self {
            record,
            same_block: flags & CONTINUE != 0,
            offset,
        })
    }

    /// Puts a word together.
    #[inline]
    pub fn compose(self) -> u64 {
        let record = match self.record {
            Record::Zero => ZERO,
            Record::MemSize => MEM_SIZE,
            Record::Page => PAGE,
            Record::Eos => EOS,
        };
        self.offset | record | if self.same_block { CONTINUE } else { 0 }
    }
}

/// Header of the section.
pub fn header() -> SectionHeader {
    SectionHeader {
        idstr: IDSTR.to_owned(),
        instance: 0,
        version: VERSION,
    }
}

fn put_eos(to: &mut Vec<u8>) {
    to.extend(EOS.to_be_bytes());
}

/// Appends the block list and the EOS after it.
fn put_block_list<'b>(blocks: impl Iterator<Item = &'b RamBlock> + Clone, to: &mut Vec<u8>) {
    let total: u64 = blocks.clone().map(RamBlock::len).sum();
    to.extend((total | MEM_SIZE).to_be_bytes());
    for block in blocks {
        put_cstr(block.name(), to);
        to.extend(block.len().to_be_bytes());
    }
    put_eos(to);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn words_survive(word: u64) {
            if let Ok(parsed) = Word::parse(word) {
                prop_assert_eq!(parsed.compose(), word);
            }
        }

        #[test]
        fn every_legal_word_is_parsed(page in 0u64..1 << 40, kind in 0usize..2, same: bool) {
            let record = [Record::Zero, Record::Page][kind];
            let word = Word { record, same_block: same, offset: page << 12 };
            prop_assert_eq!(Word::parse(word.compose()), Ok(word));
        }
    }

    #[test]
    fn other_flags_are_refused_in_qemus_words() {
        for (word, flags) in [
            (0x1120, "0x120"),
            (0x40, "0x40"),
            (0x200, "0x200"),
            (0x1010, "0x10"),
            (0x0a, "0xa"),
        ] {
            let text = format!("Unknown combination of migration flags: {flags}");
            assert_eq!(Word::parse(word), Err(text));
        }
    }

    #[test]
    fn the_worked_example_of_a_zero_page() {
        let word = Word {
            record: Record::Zero,
            same_block: true,
            offset: 0x1000,
        };
        assert_eq!(word.compose().to_be_bytes(), [0, 0, 0, 0, 0, 0, 0x10, 0x22]);
    }
}
