//! Which pages still have to be sent, and which the dirty log has told us about at all.
//!
//! The second set is what a failed migration gives back: reading the log forgets, and a bit that
//! was read may stand for a page whose newest content never arrived.

use std::sync::Arc;

use crate::vm::dirty::{DirtyLog, DirtySink};
use crate::vm::memory::RamBlock;

/// Dirty bits of all blocks.
pub struct DirtyBitmap {
    blocks: Vec<Bits>,
    count: u64,
    fresh: u64,
    cursor: (usize, usize),
}

struct Bits {
    pages: usize,
    dirty: Vec<u64>,
    drained: Vec<u64>,
}

/// Pages of one word of the bitmap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Word {
    /// Index of the block.
    pub block: usize,
    /// Pages `index * 64 ..`.
    pub index: usize,
    /// Bit 0 is the first of them.
    pub bits: u64,
}

impl DirtyBitmap {
    /// Nothing is dirty.
    pub fn new(blocks: &[Arc<RamBlock>]) -> Self {
        let blocks = blocks.iter().map(|block| {
            let words = block.pages().div_ceil(64);
            Bits {
                pages: block.pages(),
                dirty: vec![0; words],
                drained: vec![0; words],
            }
        });
        Self {
            blocks: blocks.collect(),
            count: 0,
            fresh: 0,
            cursor: (0, 0),
        }
    }

    /// Number of dirty pages.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// How many bits arrived since this was last asked, whether news or not.
    pub fn take_fresh(&mut self) -> u64 {
        std::mem::take(&mut self.fresh)
    }

    /// Marks every page of a block.
    pub fn mark_all(&mut self, block: usize) {
        let words = self.blocks.get(block).map_or(0, |bits| bits.dirty.len());
        for word in 0..words {
            self.dirty(block, word, u64::MAX);
        }
    }

    /// Takes the next word with dirty pages, going round over all blocks; its pages are clean then.
    pub fn take(&mut self) -> Option<Word> {
        if self.count == 0 {
            return None;
        }
        loop {
            let (block, index) = self.cursor;
            match self.blocks.get_mut(block) {
                None => self.cursor = (0, 0),
                Some(bits) if index >= bits.dirty.len() => self.cursor = (block + 1, 0),
                Some(bits) => {
                    self.cursor.1 += 1;
                    let bits = std::mem::take(&mut bits.dirty[index]);
                    if bits != 0 {
                        self.count -= u64::from(bits.count_ones());
                        return Some(Word { block, index, bits });
                    }
                }
            }
        }
    }

    /// Puts back what was taken and not sent; it is the next to be taken.
    pub fn put_back(&mut self, word: Word) {
        if word.bits == 0 {
            return;
        }
        let slot = &mut self.blocks[word.block].dirty[word.index];
        self.count += u64::from((word.bits & !*slot).count_ones());
        *slot |= word.bits;
        self.cursor = (word.block, word.index);
    }

    /// Gives back to the log everything it ever told.
    pub fn give_back(&self, log: &dyn DirtyLog) {
        for (block, bits) in self.blocks.iter().enumerate() {
            for (word, drained) in bits
                .drained
                .iter()
                .enumerate()
                .filter(|(_, bits)| **bits != 0)
            {
                log.give_back(block, word, *drained);
            }
        }
    }
}

impl DirtySink for DirtyBitmap {
    fn dirty(&mut self, block: usize, word: usize, bits: u64) {
        let Some(block) = self.blocks.get_mut(block) else {
            return;
        };
        let Some(slot) = block.dirty.get_mut(word) else {
            return;
        };
        let tail = block.pages - word * 64;
        let bits = if tail < 64 {
            bits & ((1 << tail) - 1)
        } else {
            bits
        };
        self.count += u64::from((bits & !*slot).count_ones());
        self.fresh += u64::from(bits.count_ones());
        *slot |= bits;
        block.drained[word] |= bits;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::memory::{Backing, PAGE_SIZE};
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn blocks(pages: &[u64]) -> Vec<Arc<RamBlock>> {
        let block = |pages: &u64| RamBlock::new("b", pages * PAGE_SIZE as u64, Backing::Anonymous);
        pages
            .iter()
            .map(|pages| Arc::new(block(pages).unwrap()))
            .collect()
    }

    fn pages(word: Word) -> impl Iterator<Item = (usize, usize)> {
        (0..64)
            .filter(move |bit| word.bits >> bit & 1 == 1)
            .map(move |bit| (word.block, word.index * 64 + bit))
    }

    proptest! {
        #[test]
        fn behaves_as_a_set(
            steps in proptest::collection::vec((0usize..4, 0usize..5, any::<u64>(), any::<bool>()), 0..60),
        ) {
            let lengths = [130u64, 64, 1];
            let mut bitmap = DirtyBitmap::new(&blocks(&lengths));
            let mut model = BTreeSet::new();
            for (block, word, bits, take) in steps {
                if take {
                    if let Some(taken) = bitmap.take() {
                        let mut kept = taken;
                        kept.bits &= bits;
                        for page in pages(taken) {
                            prop_assert!(model.remove(&page));
                        }
                        bitmap.put_back(kept);
                        model.extend(pages(kept));
                    } else {
                        prop_assert!(model.is_empty());
                    }
                } else {
                    bitmap.dirty(block, word, bits);
                    let word = Word { block, index: word, bits };
                    let length = |block| lengths.get(block).copied().unwrap_or(0) as usize;
                    model.extend(pages(word).filter(|(block, page)| *page < length(*block)));
                }
                prop_assert_eq!(bitmap.count(), model.len() as u64);
            }
            let mut rest = BTreeSet::new();
            while let Some(word) = bitmap.take() {
                rest.extend(pages(word));
            }
            prop_assert_eq!(rest, model);
        }
    }
}
