//! One bit per page of a RAM block, set from any thread: what the VMM itself has written.
//!
//! KVM's log never shows writes of this process. Whoever writes guest memory through vm-memory
//! (loaders, device emulation) marks pages here by way of [`WriteLog`]; a failed migration gives
//! its bits back here too.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use vm_memory::bitmap::{Bitmap, BitmapSlice, WithBitmapSlice};

use super::memory::{PAGE_SIZE, RamBlock};

/// The bits of one block.
#[derive(Debug)]
pub(super) struct PageBits {
    words: Vec<AtomicU64>,
    pages: usize,
}

impl PageBits {
    /// All clear.
    pub(super) fn new(pages: usize) -> Self {
        let words = (0..pages.div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        Self { words, pages }
    }

    /// Sets bits of pages `word * 64 ..`; those beyond the block are ignored.
    pub(super) fn set(&self, word: usize, bits: u64) {
        let rest = self.pages.saturating_sub(word * 64);
        let legal = if rest >= 64 {
            u64::MAX
        } else {
            (1 << rest) - 1
        };
        if let Some(place) = self.words.get(word)
            && bits & legal != 0
        {
            place.fetch_or(bits & legal, Ordering::SeqCst);
        }
    }

    /// Sets the bits of `count` pages from `first` on.
    pub(super) fn set_range(&self, first: usize, count: usize) {
        let end = first.saturating_add(count).min(self.pages);
        let mut page = first;
        while page < end {
            let below = page % 64;
            let run = (end - page).min(64 - below);
            self.set(page / 64, (u64::MAX >> (64 - run)) << below);
            page += run;
        }
    }

    /// Takes all bits out; `take` sees each word that is not zero.
    pub(super) fn drain(&self, mut take: impl FnMut(usize, u64)) {
        for (index, word) in self.words.iter().enumerate() {
            if word.load(Ordering::Relaxed) != 0 {
                let bits = word.swap(0, Ordering::SeqCst);
                if bits != 0 {
                    take(index, bits);
                }
            }
        }
    }

    fn is_set(&self, page: usize) -> bool {
        self.words
            .get(page / 64)
            .is_some_and(|w| w.load(Ordering::SeqCst) >> (page % 64) & 1 != 0)
    }
}

/// Marks pages when vm-memory writes through a view of a block. It holds the block, so that the
/// mapping lives as long as any view of it.
#[derive(Clone, Debug)]
pub(super) struct WriteLog {
    bits: Arc<PageBits>,
    base: usize,
    block: Arc<RamBlock>,
}

impl WriteLog {
    /// Marks in `bits`, for a view that begins `base` bytes into the block.
    pub(super) fn new(block: Arc<RamBlock>, bits: Arc<PageBits>, base: usize) -> Self {
        Self { bits, base, block }
    }

    /// The block under the view.
    pub(super) fn block(&self) -> &Arc<RamBlock> {
        &self.block
    }

    /// Offset of the view in the block, bytes.
    pub(super) fn base(&self) -> usize {
        self.base
    }
}

impl<'a> WithBitmapSlice<'a> for WriteLog {
    type S = Marks<'a>;
}

impl Bitmap for WriteLog {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.slice_at(offset).mark_dirty(0, len);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.slice_at(offset).dirty_at(0)
    }

    fn slice_at(&self, offset: usize) -> Marks<'_> {
        Marks {
            bits: &self.bits,
            base: self.base + offset,
        }
    }
}

/// Part of a [`WriteLog`], borrowed: a device takes one for every access to guest memory.
#[derive(Clone, Copy, Debug)]
pub(super) struct Marks<'a> {
    bits: &'a PageBits,
    /// Offset in the block, bytes.
    base: usize,
}

impl WithBitmapSlice<'_> for Marks<'_> {
    type S = Self;
}

impl BitmapSlice for Marks<'_> {}

impl Bitmap for Marks<'_> {
    fn mark_dirty(&self, offset: usize, len: usize) {
        if len > 0 {
            let first = (self.base + offset) / PAGE_SIZE;
            let last = (self.base + offset + len - 1) / PAGE_SIZE;
            self.bits.set_range(first, last - first + 1);
        }
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.bits.is_set((self.base + offset) / PAGE_SIZE)
    }

    fn slice_at(&self, offset: usize) -> Self {
        Self {
            base: self.base + offset,
            ..*self
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn drained(bits: &PageBits) -> BTreeSet<usize> {
        let mut pages = BTreeSet::new();
        bits.drain(|word, set| {
            pages.extend(
                (0..64)
                    .filter(|bit| set >> bit & 1 != 0)
                    .map(|bit| word * 64 + bit),
            );
        });
        pages
    }

    proptest! {
        #[test]
        fn ranges_are_exact(pages in 1usize..300, first in 0usize..320, count in 0usize..320) {
            let bits = PageBits::new(pages);
            bits.set_range(first, count);
            let expected: BTreeSet<usize> = (first..first + count).filter(|p| *p < pages).collect();
            prop_assert_eq!(drained(&bits), expected);
            prop_assert!(drained(&bits).is_empty());
        }

        #[test]
        fn words_stay_inside(pages in 1usize..200, word in 0usize..5, set in any::<u64>()) {
            let bits = PageBits::new(pages);
            bits.set(word, set);
            let expected: BTreeSet<usize> = (0..64)
                .filter(|bit| set >> bit & 1 != 0)
                .map(|bit| word * 64 + bit)
                .filter(|page| *page < pages)
                .collect();
            prop_assert_eq!(drained(&bits), expected);
        }
    }
}
