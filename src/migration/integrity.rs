//! What proves at the end that both sides hold the same: a hash per page and one over the rest.
//!
//! Per page 8 bytes: a hash of the content and the page's place (byte offset in all RAM blocks laid
//! end to end in the order of the block list). Zero pages and pages never sent count
//! as 0. The sum of all of them, kept while the pages move, does not depend on the order or on how
//! often a page was sent. Every byte of the main stream that is not the content of a page goes, up
//! to and including the EOF byte, into another XXH3-64. Both travel in the trailing JSON
//! (`docs/wire.md`). QEMU has nothing of the kind.

use std::sync::Arc;

use xxhash_rust::xxh3::Xxh3Default;

use crate::vm::memory::{PAGE_SIZE, Page, RamBlock, hash};

/// The hashes of all pages of all blocks, and their sum.
pub struct PageHashes {
    blocks: Vec<BlockHashes>,
    sum: u64,
}

struct BlockHashes {
    base: u64,
    // Zeroed memory costs nothing until it is written: 8 GiB of untouched RAM stay free here too.
    pages: Vec<u64>,
}

impl PageHashes {
    /// All zero. `order` holds indices into `blocks` in the order of the block list.
    pub fn new(blocks: &[Arc<RamBlock>], order: &[usize]) -> Self {
        let mut tables: Vec<_> = blocks
            .iter()
            .map(|block| BlockHashes {
                base: 0,
                pages: vec![0; block.pages()],
            })
            .collect();
        let mut base = 0;
        for &index in order {
            tables[index].base = base;
            base += (tables[index].pages.len() * PAGE_SIZE) as u64;
        }
        Self {
            blocks: tables,
            sum: 0,
        }
    }

    /// Notes the content of a page that is not zero.
    #[inline]
    pub fn note(&mut self, block: usize, page: usize, content: &[u8; PAGE_SIZE]) {
        let hash = hash::page(content, self.place(block, page));
        self.set(block, page, hash.max(LEAST));
    }

    /// Notes what a page of the guest holds, which is not zero.
    #[inline]
    pub fn note_live(&mut self, block: usize, page: usize, content: &Page<'_>) {
        let hash = content.hash(self.place(block, page));
        self.set(block, page, hash.max(LEAST));
    }

    /// Notes that a page is zero.
    #[inline]
    pub fn note_zero(&mut self, block: usize, page: usize) {
        self.set(block, page, 0);
    }

    /// Whether the page was noted as zero last, or never noted.
    #[inline]
    pub fn is_zero(&self, block: usize, page: usize) -> bool {
        self.blocks[block].pages[page] == 0
    }

    /// Sum of all hashes, wrapping.
    pub fn sum(&self) -> u64 {
        self.sum
    }

    #[inline]
    fn place(&self, block: usize, page: usize) -> u64 {
        self.blocks[block].base + (page * PAGE_SIZE) as u64
    }

    #[inline]
    fn set(&mut self, block: usize, page: usize, hash: u64) {
        let slot = &mut self.blocks[block].pages[page];
        // Reading an untouched slot is free, writing it is not.
        if *slot != hash {
            self.sum = self.sum.wrapping_sub(*slot).wrapping_add(hash);
            *slot = hash;
        }
    }
}

/// 0 means zero, so no content may have it.
const LEAST: u64 = 1;

/// Hash over the stream's bytes that are no page contents.
#[derive(Default)]
pub struct Digest {
    hash: Xxh3Default,
    marks: Vec<u32>,
}

impl Digest {
    /// Takes the next bytes.
    #[inline]
    pub fn update(&mut self, bytes: &[u8]) {
        self.hash.update(bytes);
    }

    /// Takes the next bytes of a disk, a multiple of [`PAGE_SIZE`]: a hash for each page of them,
    /// which is much faster.
    pub fn bulk(&mut self, bytes: &[u8]) {
        let (pages, _) = bytes.as_chunks();
        for page in pages {
            self.update(&hash::page(page, 0).to_le_bytes());
        }
    }

    /// The hash of everything so far.
    pub fn value(&self) -> u64 {
        self.hash.digest()
    }

    /// Keeps the low half of the value, by which damage up to here is told from damage after it.
    pub fn mark(&mut self) {
        self.marks.push(self.value() as u32);
    }

    /// What was kept, in order.
    pub fn marks(&self) -> &[u32] {
        &self.marks
    }
}

/// Section id of `globalstate` in a stream that a [`Seal`] of version 1 closes ("hsh1"). It is part of
/// what is hashed, so a seal that was damaged or cut off is missed.
pub const PROMISE: u32 = 0x6873_6831;

/// Both values and the marks, as they travel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seal {
    /// [`Digest::value`] after the EOF byte.
    pub stream: u64,
    /// [`PageHashes::sum`] at the end.
    pub ram: u64,
    /// [`Digest::marks`]: one after the header, and one after each section but the PARTs.
    pub marks: Vec<u32>,
}

/// What the end of a trailing JSON text says about integrity.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Sealing {
    /// Nothing: the source is not hmpsh.
    Absent,
    /// A version this program does not know.
    Foreign,
    /// The values.
    Sealed(Seal),
}

const KEY: &str = "\"hmpsh-integrity\": ";
const VERSION: u64 = 1;

/// Bytes at the end of the JSON text that [`Seal::find`] needs to see: enough for the marks of a
/// machine with as many vCPUs as KVM has.
pub const SEAL_REACH: usize = 32 << 10;

impl Seal {
    /// The member for the trailing JSON: key and value.
    pub fn member(&self) -> String {
        let Self { stream, ram, marks } = self;
        let marks: String = marks.iter().map(|mark| format!("{mark:08x}")).collect();
        format!(
            "{KEY}{{\"version\": {VERSION}, \"stream\": \"{stream:016x}\", \"ram\": \"{ram:016x}\", \
             \"marks\": \"{marks}\"}}"
        )
    }

    /// Looks for the member as the last one of a JSON text whose end is `tail`.
    pub fn find(tail: &[u8]) -> Sealing {
        let text = String::from_utf8_lossy(tail);
        let Some((_, value)) = text.rsplit_once(KEY) else {
            return Sealing::Absent;
        };
        let value = value.strip_suffix('}').unwrap_or(value);
        let hex = |json: &serde_json::Value, name: &str| {
            u64::from_str_radix(json.get(name)?.as_str()?, 16).ok()
        };
        let marks = |json: &serde_json::Value| {
            let digits = json.get("marks")?.as_str()?.as_bytes();
            let mark = |digits| u32::from_str_radix(str::from_utf8(digits).ok()?, 16).ok();
            digits.chunks(8).map(mark).collect::<Option<_>>()
        };
        let seal = serde_json::from_str::<serde_json::Value>(value)
            .ok()
            .and_then(|json| {
                (json.get("version")?.as_u64()? == VERSION).then(|| {
                    Some(Self {
                        stream: hex(&json, "stream")?,
                        ram: hex(&json, "ram")?,
                        marks: marks(&json)?,
                    })
                })?
            });
        seal.map_or(Sealing::Foreign, Sealing::Sealed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::memory::Backing;
    use proptest::prelude::*;

    fn blocks() -> Vec<Arc<RamBlock>> {
        let block = |name, pages| {
            Arc::new(RamBlock::new(name, pages * PAGE_SIZE as u64, Backing::Anonymous).unwrap())
        };
        vec![block("a", 5), block("b", 3)]
    }

    proptest! {
        #[test]
        fn order_and_repetition_do_not_matter(
            steps in proptest::collection::vec((0usize..2, 0usize..3, 0u8..3), 0..40),
        ) {
            let blocks = blocks();
            let mut live = PageHashes::new(&blocks, &[0, 1]);
            for (block, page, fill) in steps {
                blocks[block].page(page).write(&[fill; PAGE_SIZE]);
                match fill {
                    0 => live.note_zero(block, page),
                    _ => live.note_live(block, page, &blocks[block].page(page)),
                }
            }
            let mut fresh = PageHashes::new(&blocks, &[0, 1]);
            for (index, block) in blocks.iter().enumerate().rev() {
                for page in 0..block.pages() {
                    if !block.page(page).is_zero() {
                        fresh.note_live(index, page, &block.page(page));
                    }
                }
            }
            prop_assert_eq!(live.sum(), fresh.sum());
        }

        #[test]
        fn seal_is_found_again(
            stream: u64,
            ram: u64,
            marks in proptest::collection::vec(any::<u32>(), 0..3000),
        ) {
            let seal = Seal { stream, ram, marks };
            let text = format!("{{\"devices\": [], {}}}", seal.member());
            prop_assert!(seal.member().len() < SEAL_REACH);
            prop_assert_eq!(Seal::find(text.as_bytes()), Sealing::Sealed(seal));
        }
    }

    #[test]
    fn swapped_pages_are_noticed() {
        let blocks = blocks();
        blocks[0].page(0).write(&[1; PAGE_SIZE]);
        blocks[0].page(1).write(&[2; PAGE_SIZE]);
        let mut right = PageHashes::new(&blocks, &[0, 1]);
        right.note_live(0, 0, &blocks[0].page(0));
        right.note_live(0, 1, &blocks[0].page(1));
        let mut swapped = PageHashes::new(&blocks, &[0, 1]);
        swapped.note_live(0, 1, &blocks[0].page(0));
        swapped.note_live(0, 0, &blocks[0].page(1));
        assert_ne!(right.sum(), swapped.sum());
    }

    #[test]
    fn a_text_of_qemus_has_no_seal() {
        assert_eq!(
            Seal::find(b"{\"page_size\": 4096, \"devices\": []}"),
            Sealing::Absent
        );
        let later = b"{\"devices\": [], \"hmpsh-integrity\": {\"version\": 9}}";
        assert_eq!(Seal::find(later), Sealing::Foreign);
    }
}
