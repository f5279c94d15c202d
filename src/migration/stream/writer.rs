//! Outgoing bytes: small ones are buffered, pages are borrowed, everything leaves in one `writev`.

use std::time::Duration;

use crate::iov::{MAX_PIECES, Out};
use crate::migration::channel::{Cancel, Channel, Fault};
use crate::migration::integrity::Digest;
use crate::migration::progress::Progress;
use crate::vm::memory::{PAGE_SIZE, Page};

/// The writing end of the main stream.
pub struct Writer<'a> {
    channel: Box<dyn Channel>,
    cancel: &'a Cancel,
    /// Told when nothing moves, so that the figures the operator sees stay true.
    pub progress: Progress<'a>,
    small: Vec<u8>,
    pieces: Vec<Piece<'a>>,
    queued_pages: usize,
    digest: Digest,
    /// How much of `small` is in the digest.
    hashed: usize,
    sent: u64,
    patience: Duration,
    torn: bool,
}

enum Piece<'a> {
    /// Bytes of `small` up to this offset, from where the last such piece ended.
    Small(usize),
    Page(Page<'a>),
}

impl<'a> Writer<'a> {
    /// A writer that gives up when the peer takes no byte for 30 seconds.
    pub fn new(channel: Box<dyn Channel>, progress: Progress<'a>, cancel: &'a Cancel) -> Self {
        Self {
            channel,
            cancel,
            progress,
            small: Vec::with_capacity(SMALL_LIMIT * 2),
            pieces: Vec::with_capacity(MAX_PIECES),
            queued_pages: 0,
            digest: Digest::default(),
            hashed: 0,
            sent: 0,
            patience: PATIENCE,
            torn: false,
        }
    }

    /// Queues bytes through `put`, which appends them.
    #[inline]
    pub fn put(&mut self, put: impl FnOnce(&mut Vec<u8>)) {
        put(&mut self.small);
        let end = self.small.len();
        match self.pieces.last_mut() {
            Some(Piece::Small(last)) => *last = end,
            _ => self.pieces.push(Piece::Small(end)),
        }
    }

    /// Queues the content of a page; it is read when the queue is flushed.
    #[inline]
    pub fn page(&mut self, page: Page<'a>) {
        self.pieces.push(Piece::Page(page));
        self.queued_pages += 1;
    }

    /// Whether the queue is as long as one system call takes.
    #[inline]
    pub fn is_full(&self) -> bool {
        self.pieces.len() >= MAX_PIECES - 2
            || self.queued_pages >= PAGE_LIMIT
            || self.small.len() >= SMALL_LIMIT
    }

    /// Bytes that have left, and those queued.
    #[inline]
    pub fn total(&self) -> u64 {
        self.sent + (self.small.len() + self.queued_pages * PAGE_SIZE) as u64
    }

    /// Bytes that the channel has taken.
    pub fn sent(&self) -> u64 {
        self.sent
    }

    /// Hash of everything queued so far that is no page content.
    pub fn digest(&mut self) -> u64 {
        self.digest.update(&self.small[self.hashed..]);
        self.hashed = self.small.len();
        self.digest.value()
    }

    /// Marks the hash here ([`Digest::mark`]).
    pub fn mark(&mut self) {
        self.digest();
        self.digest.mark();
    }

    /// The marks so far.
    pub fn marks(&self) -> &[u32] {
        self.digest.marks()
    }

    /// Whether a failed flush left the peer with an incomplete record.
    pub fn is_torn(&self) -> bool {
        self.torn
    }

    /// From now on the stream counts as ended in the middle of a record.
    pub fn tear(&mut self) {
        self.torn = true;
    }

    /// How long the peer may take no byte.
    pub fn set_patience(&mut self, patience: Duration) {
        self.patience = patience;
    }

    /// The channel, for the way back and for its end.
    pub fn channel(&mut self) -> &mut dyn Channel {
        &mut *self.channel
    }

    /// Sends the queue. After an error the queue is empty and [`Self::sent`] tells what got out.
    pub fn flush(&mut self) -> Result<(), Fault> {
        self.bulk(&[])
    }

    /// Sends the queue and, behind it, bytes of a disk, a multiple of [`PAGE_SIZE`]. As
    /// [`Self::flush`].
    pub fn bulk(&mut self, bytes: &[u8]) -> Result<(), Fault> {
        self.digest.update(&self.small[self.hashed..]);
        self.digest.bulk(bytes);
        let result = self.send(bytes);
        self.hashed = 0;
        self.torn |= result.is_err();
        self.small.clear();
        self.pieces.clear();
        self.queued_pages = 0;
        result
    }

    fn send(&mut self, bulk: &[u8]) -> Result<(), Fault> {
        // A channel that always has room never waits and so never notices.
        if self.cancel.is_cancelled() {
            return Err(Fault::Cancelled);
        }
        let mut start = 0;
        let mut out: Vec<Out<'_>> = Vec::with_capacity(self.pieces.len() + 1);
        for piece in &self.pieces {
            out.push(match piece {
                Piece::Page(page) => page.out(),
                Piece::Small(end) => {
                    let from = std::mem::replace(&mut start, *end);
                    Out::from(&self.small[from..*end])
                }
            });
        }
        if !bulk.is_empty() {
            out.push(Out::from(bulk));
        }
        let mut rest = &mut out[..];
        let mut silence = Duration::ZERO;
        while !rest.is_empty() {
            match self.channel.write(rest, TICK.min(self.patience)) {
                Ok(taken) => {
                    silence = Duration::ZERO;
                    self.sent += taken as u64;
                    rest = advance(rest, taken);
                }
                Err(Fault::TimedOut) => {
                    silence += TICK;
                    self.progress.tick(self.sent);
                    if silence >= self.patience {
                        return Err(Fault::Failed(format!(
                            "The destination has not taken a byte for {} seconds",
                            self.patience.as_secs()
                        )));
                    }
                }
                Err(fault) => return Err(fault),
            }
        }
        Ok(())
    }
}

/// Drops the first `taken` bytes.
fn advance<'p, 'a>(mut rest: &'p mut [Out<'a>], mut taken: usize) -> &'p mut [Out<'a>] {
    while let Some(first) = rest.first_mut() {
        if taken < first.len() {
            *first = first.skip(taken);
            break;
        }
        taken -= first.len();
        rest = &mut rest[1..];
    }
    rest
}

/// How long the peer may take no byte while memory moves.
const PATIENCE: Duration = Duration::from_secs(30);
/// How often the figures are brought up to date while nothing moves.
pub const TICK: Duration = Duration::from_millis(200);
/// Buffered small bytes that are worth a system call of their own.
const SMALL_LIMIT: usize = 64 << 10;
/// Pages per system call: as many as are still in the cache when they are hashed after it.
const PAGE_LIMIT: usize = 128;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn advancing_skips_whole_and_parts() {
        let (a, b, c) = ([1u8, 2], [3u8, 4, 5], [6u8]);
        for taken in 0..=6 {
            let mut pieces = [Out::from(&a[..]), Out::from(&b[..]), Out::from(&c[..])];
            let mut left = Vec::new();
            for piece in advance(&mut pieces, taken) {
                piece.copy_to(&mut left);
            }
            assert_eq!(left, [1, 2, 3, 4, 5, 6][taken..]);
        }
    }
}
