//! RAM on its way out: setup, pending, iterate, complete, cleanup.
//!
//! A page's dirty bit is cleared before the page is looked at, so a store that comes later is
//! either in what we send or sets the bit again. Pages the log never mentions are neither read nor
//! sent. QEMU: `ram_save_*`.

use std::sync::Arc;
use std::time::Duration;

use super::{Record, Word, bitmap, header, put_block_list, put_eos};
use crate::migration::Error;
use crate::migration::clock::Clock;
use crate::migration::dialect::Dialect;
use crate::migration::integrity::PageHashes;
use crate::migration::section::{END, PART, START, put_cstr, put_header, put_piece};
use crate::migration::stream::Writer;
use crate::vm::guest::Guest;
use crate::vm::memory::{PAGE_SIZE, RamBlock};

/// The live section `ram`.
pub struct RamSave<'a> {
    guest: &'a dyn Guest,
    clock: &'a dyn Clock,
    dialect: Dialect,
    blocks: &'a [Arc<RamBlock>],
    bitmap: bitmap::DirtyBitmap,
    hashes: PageHashes,
    /// Pages queued and not hashed yet, as block and page.
    queued: Vec<(usize, usize)>,
    last_block: Option<usize>,
    rate_since: Duration,
    rate_pages: u64,
}

impl<'a> RamSave<'a> {
    /// Switches the dirty log on. From here on [`Self::cleanup`] must be called in the end.
    pub fn new(
        guest: &'a dyn Guest,
        clock: &'a dyn Clock,
        dialect: Dialect,
    ) -> Result<Self, Error> {
        let blocks = guest.ram();
        let log = guest.dirty_log();
        // What failed half-way is half on.
        log.start().inspect_err(|_| log.stop())?;
        let order: Vec<usize> = (0..blocks.len()).collect();
        Ok(Self {
            guest,
            clock,
            dialect,
            blocks,
            bitmap: bitmap::DirtyBitmap::new(blocks),
            hashes: PageHashes::new(blocks, &order),
            queued: Vec::new(),
            last_block: None,
            rate_since: clock.now(),
            rate_pages: 0,
        })
    }

    /// Reads the log for the first time and queues START. Unless the peer is known to begin with
    /// `blank` memory, small blocks are sent whole: it may have loaded its own firmware there.
    pub fn setup(&mut self, writer: &mut Writer<'a>, blank: bool) -> Result<(), Error> {
        writer.put(|to| {
            put_header(START, SECTION_ID, &header(), to);
            put_block_list(self.blocks.iter().map(|block| &**block), to);
            self.dialect.put_footer(SECTION_ID, to);
        });
        writer.mark();
        self.sync(writer)?;
        for (index, block) in self.blocks.iter().enumerate().skip(1) {
            if !blank && block.len() <= FIRMWARE_LIMIT {
                self.bitmap.mark_all(index);
            }
        }
        self.bitmap.take_fresh();
        self.note_remaining(writer);
        Ok(())
    }

    /// Reads the log: what was dirtied since the last time has to be sent (again).
    pub fn sync(&mut self, writer: &mut Writer<'a>) -> Result<(), Error> {
        self.guest.dirty_log().sync(&mut self.bitmap)?;
        let ram = &mut writer.progress.ram;
        ram.dirty_sync_count += 1;
        // The first reading yields what exists, not what was dirtied.
        let fresh = self.bitmap.take_fresh();
        let now = self.clock.now();
        if ram.dirty_sync_count > 1 {
            self.rate_pages += fresh;
            let period = now.saturating_sub(self.rate_since);
            if period > RATE_PERIOD {
                ram.dirty_pages_rate = (self.rate_pages as f64 / period.as_secs_f64()) as u64;
                (self.rate_since, self.rate_pages) = (now, 0);
            }
        } else {
            self.rate_since = now;
        }
        self.note_remaining(writer);
        Ok(())
    }

    /// Bytes of pages known to be dirty.
    pub fn pending(&self) -> u64 {
        self.bitmap.count() * PAGE_SIZE as u64
    }

    /// Sends one PART of about `allowance` bytes, or what 50 ms are enough for.
    pub fn iterate(&mut self, writer: &mut Writer<'a>, allowance: u64) -> Result<(), Error> {
        let begin = writer.total();
        writer.put(|to| put_piece(PART, SECTION_ID, to));
        self.pages(writer, allowance, self.clock.now() + PART_TIME)?;
        writer.put(|to| finish(self.dialect, to));
        self.flush(writer)?;
        writer.progress.ram.precopy_bytes += writer.total() - begin;
        Ok(())
    }

    /// Sends everything that is left, as END. The guest stands still.
    pub fn complete(&mut self, writer: &mut Writer<'a>) -> Result<(), Error> {
        self.sync(writer)?;
        let begin = writer.total();
        writer.put(|to| put_piece(END, SECTION_ID, to));
        self.pages(writer, u64::MAX, Duration::MAX)?;
        writer.put(|to| finish(self.dialect, to));
        writer.mark();
        self.flush(writer)?;
        writer.progress.ram.downtime_bytes += writer.total() - begin;
        Ok(())
    }

    /// Sum of the page hashes.
    pub fn sum(&self) -> u64 {
        self.hashes.sum()
    }

    /// Ends logging. After anything but success every bit that was read is given back.
    pub fn cleanup(self, success: bool) {
        let log = self.guest.dirty_log();
        if !success {
            self.bitmap.give_back(log);
        }
        log.stop();
    }

    fn pages(
        &mut self,
        writer: &mut Writer<'a>,
        allowance: u64,
        until: Duration,
    ) -> Result<(), Error> {
        let limit = writer.total().saturating_add(allowance);
        while let Some(mut word) = self.bitmap.take() {
            self.prefetch(&word);
            while word.bits != 0 && writer.total() < limit {
                let index = word.index * 64 + word.bits.trailing_zeros() as usize;
                word.bits &= word.bits - 1;
                self.page(writer, word.block, index);
                if writer.is_full() {
                    self.flush(writer)?;
                    self.note_remaining(writer);
                    writer.progress.tick(writer.sent());
                }
            }
            self.bitmap.put_back(word);
            if writer.total() >= limit || self.clock.now() > until {
                break;
            }
        }
        self.note_remaining(writer);
        Ok(())
    }

    #[inline]
    fn page(&mut self, writer: &mut Writer<'a>, block: usize, index: usize) {
        let page = self.blocks[block].page(index);
        let is_zero = page.is_zero();
        let record = if is_zero { Record::Zero } else { Record::Page };
        let same_block = self.last_block.replace(block) == Some(block);
        let word = Word {
            record,
            same_block,
            offset: (index * PAGE_SIZE) as u64,
        };
        writer.put(|to| {
            to.extend(word.compose().to_be_bytes());
            if !same_block {
                put_cstr(self.blocks[block].name(), to);
            }
            if is_zero {
                to.push(0);
            }
        });
        if is_zero {
            self.hashes.note_zero(block, index);
            writer.progress.ram.duplicate += 1;
        } else {
            self.queued.push((block, index));
            writer.page(page);
            writer.progress.ram.normal += 1;
        }
    }

    /// Sends the queue and hashes its pages: the system call has just brought them into the cache,
    /// where it is slowed less by waiting for memory than a hash would be. A store in between sets
    /// the dirty bit, so the page is sent and hashed again.
    fn flush(&mut self, writer: &mut Writer<'a>) -> Result<(), Error> {
        writer.flush()?;
        for (block, index) in self.queued.drain(..) {
            self.hashes
                .note_live(block, index, &self.blocks[block].page(index));
        }
        Ok(())
    }

    /// Has the first bytes of all these pages fetched at once: looking for zero would wait for
    /// each.
    #[inline]
    fn prefetch(&self, word: &bitmap::Word) {
        let mut bits = word.bits;
        while bits != 0 {
            let index = word.index * 64 + bits.trailing_zeros() as usize;
            bits &= bits - 1;
            self.blocks[word.block].page(index).prefetch();
        }
    }

    fn note_remaining(&self, writer: &mut Writer<'a>) {
        writer.progress.ram.remaining = self.pending();
    }
}

fn finish(dialect: Dialect, to: &mut Vec<u8>) {
    put_eos(to);
    dialect.put_footer(SECTION_ID, to);
}

/// QEMU 10.0's number for the section.
pub const SECTION_ID: u32 = 1;
/// A PART lasts no longer, so that the way back and the operator are heard.
const PART_TIME: Duration = Duration::from_millis(50);
/// Period over which the dirty rate is taken, at least.
const RATE_PERIOD: Duration = Duration::from_secs(1);
/// Blocks up to this size may hold firmware that the peer has loaded itself.
const FIRMWARE_LIMIT: u64 = 1 << 20;
