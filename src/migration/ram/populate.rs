//! Has the kernel provide memory ahead of the pages that arrive in it.
//!
//! The first touch of memory costs more than moving a page into it, above all inside a virtual
//! machine, and a receiver that waits for it keeps the source waiting. While pages come in a row, a
//! thread of its own therefore touches what comes next. It never changes content, and never goes
//! further than a few MiB beyond the last page received, so that memory the guest does not use
//! stays unused here too. QEMU has nothing of the kind (its `preallocate-switch` is all or nothing).
//!
//! What the first touch costs differs by a factor of five on one machine, depending on whether the
//! host still has the memory. Where it is cheap the thread would only take a processor away from
//! source and receiver, so then it merely looks, once in a while, whether that is still so.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::{Builder, JoinHandle};

use rustix::time::{ClockId, clock_gettime};

use crate::vm::memory::RamBlock;

/// Watches what arrives, and sends a thread ahead.
pub(super) struct Populator {
    crew: Option<Crew>,
    is_wanted: bool,
    row: Row,
}

/// Pages that came one after the other.
#[derive(Debug, Default, PartialEq, Eq)]
struct Row {
    block: usize,
    begin: usize,
    next: usize,
    /// Up to where the thread was sent.
    ahead: usize,
}

struct Crew {
    orders: SyncSender<(Arc<RamBlock>, Range<usize>)>,
    thread: JoinHandle<()>,
    /// Whether the first touch was so dear the last time that it is worth a thread.
    is_dear: Arc<AtomicBool>,
}

impl Populator {
    /// On a host with a single processor nothing would be gained.
    pub(super) fn new() -> Self {
        let processors = std::thread::available_parallelism();
        Self {
            crew: None,
            is_wanted: processors.is_ok_and(|count| count.get() > 1),
            row: Row::default(),
        }
    }

    /// This page of the block with that index has arrived.
    #[inline]
    pub(super) fn received(&mut self, index: usize, block: &Arc<RamBlock>, page: usize) {
        self.row.extend(index, page);
        if self.is_wanted && block.is_anonymous() {
            while let Some(chunk) = self.row.next_chunk(block.pages()) {
                if !self.send(block, chunk.clone()) {
                    return;
                }
                self.row.ahead = chunk.end;
            }
        }
    }

    /// False when the thread has enough to do, or can not be had.
    fn send(&mut self, block: &Arc<RamBlock>, chunk: Range<usize>) -> bool {
        if self.crew.is_none() {
            self.crew = Crew::hire();
            self.is_wanted = self.crew.is_some();
        }
        self.crew
            .as_ref()
            .is_some_and(|crew| crew.order(block, chunk))
    }
}

impl Drop for Populator {
    fn drop(&mut self) {
        if let Some(Crew { orders, thread, .. }) = self.crew.take() {
            drop(orders);
            // It does nothing that could panic, and its end is all that is waited for.
            let _ = thread.join();
        }
    }
}

impl Crew {
    fn hire() -> Option<Self> {
        let (orders, work) = sync_channel::<(Arc<RamBlock>, Range<usize>)>(AHEAD / CHUNK);
        let is_dear = Arc::new(AtomicBool::new(false));
        let verdict = Arc::clone(&is_dear);
        let populate = move || {
            for (block, pages) in work {
                let before = clock_gettime(ClockId::ThreadCPUTime);
                block.populate(pages);
                let spent = clock_gettime(ClockId::ThreadCPUTime) - before;
                verdict.store((spent.tv_sec, spent.tv_nsec) > (0, DEAR), Ordering::Relaxed);
            }
        };
        match Builder::new().name("populate".to_owned()).spawn(populate) {
            Ok(thread) => Some(Self {
                orders,
                thread,
                is_dear,
            }),
            Err(error) => {
                log::debug!("no thread to populate memory ahead: {error}");
                None
            }
        }
    }

    /// Has the chunk populated if that is worth it, or if it is time to find out. False when the
    /// thread has enough to do.
    fn order(&self, block: &Arc<RamBlock>, chunk: Range<usize>) -> bool {
        let is_wanted = self.is_dear.load(Ordering::Relaxed) || is_sample(&chunk);
        !is_wanted || self.orders.try_send((Arc::clone(block), chunk)).is_ok()
    }
}

/// Whether this chunk is populated in any case, to see what it costs.
fn is_sample(chunk: &Range<usize>) -> bool {
    (chunk.start / CHUNK).is_multiple_of(SAMPLE)
}

impl Row {
    #[inline]
    fn extend(&mut self, block: usize, page: usize) {
        if (self.block, self.next) == (block, page) {
            self.next += 1;
        } else {
            *self = Self {
                block,
                begin: page,
                next: page + 1,
                ahead: page + 1,
            };
        }
    }

    /// What should be populated next in a block of `limit` pages: a huge page or the rest of one.
    #[inline]
    fn next_chunk(&self, limit: usize) -> Option<Range<usize>> {
        if self.next - self.begin < LONG {
            return None;
        }
        // A huge page that has begun to arrive is there already.
        let start = self.ahead.max(self.next.next_multiple_of(CHUNK));
        let end = (start + 1).next_multiple_of(CHUNK).min(limit);
        (start < end && end <= self.next + AHEAD).then_some(start..end)
    }
}

/// Pages of a huge page.
const CHUNK: usize = 512;
/// A row of so many pages will probably go on.
const LONG: usize = 2 * CHUNK;
/// Every so many chunks one is a sample.
const SAMPLE: usize = 16;
/// Processor time for a chunk from which on it is dear, nanoseconds: twice what clearing 2 MiB
/// takes, half of what it takes where a host has to find the memory first.
const DEAR: i64 = 1_000_000;
/// Pages beyond the last one received.
const AHEAD: usize = 8 * CHUNK;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::memory::{Backing, PAGE_SIZE};
    use proptest::prelude::*;

    #[test]
    fn only_a_long_row_sends_anyone_ahead() {
        let mut row = Row::default();
        (100..100 + LONG - 1).for_each(|page| row.extend(0, page));
        assert_eq!(row.next_chunk(1 << 20), None);
        row.extend(0, 100 + LONG - 1);
        assert_eq!(row.next_chunk(1 << 20), Some(1536..2048));
        assert_eq!(row.next_chunk(1600), Some(1536..1600));
        row.extend(1, 100 + LONG);
        assert_eq!(row.next_chunk(1 << 20), None, "another block");
    }

    proptest! {
        #[test]
        fn nobody_goes_far(
            pieces in proptest::collection::vec((0usize..2, 1usize..3000), 1..20),
            limit in 1usize..40_000,
        ) {
            let mut row = Row::default();
            let mut at = 0;
            for (block, count) in pieces {
                (at..at + count).for_each(|page| row.extend(block, page));
                at += count;
                while let Some(chunk) = row.next_chunk(limit) {
                    prop_assert!(chunk.start >= at && chunk.end <= at + AHEAD && chunk.end <= limit);
                    row.ahead = chunk.end;
                }
            }
        }
    }

    #[test]
    fn content_stays_and_memory_far_ahead_is_not_touched() {
        let bytes = (64 * CHUNK * PAGE_SIZE) as u64;
        let block = Arc::new(RamBlock::new("test", bytes, Backing::Anonymous).unwrap());
        block.page(3 * CHUNK).write(&[7; PAGE_SIZE]);
        let mut populator = Populator::new();
        (0..LONG).for_each(|page| populator.received(0, &block, page));
        drop(populator);
        let mut content = [0; PAGE_SIZE];
        block.page(3 * CHUNK).read(&mut content);
        assert_eq!(content, [7; PAGE_SIZE]);
        let mut last = 0;
        block.populated(|run| last = run.end).unwrap();
        assert!(last <= LONG + AHEAD, "{last}");
    }
}
