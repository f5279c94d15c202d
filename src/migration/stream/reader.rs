//! Incoming bytes: a buffer for the small ones, guest memory itself for pages.
//!
//! The length of what comes next is not known, so a page that is read exactly costs a system call
//! of its own. But most pages come in a row. [`Reader::pages`] therefore lays out room for
//! `rest of page | header | page | header | page …` straight into guest memory and checks the
//! headers afterwards. It guesses only into pages that the caller knows to be zero, so a wrong
//! guess is undone by copying the bytes back into the buffer and clearing the pages.

use std::io;
use std::time::Duration;

use crate::iov::In;
use crate::migration::Error;
use crate::migration::channel::{Channel, Fault};
use crate::migration::integrity::Digest;
use crate::vm::memory::{PAGE_SIZE, RamBlock};
use crate::vmstate::StateReader;

/// The reading end of the main stream.
pub struct Reader {
    channel: Box<dyn Channel>,
    buffer: Vec<u8>,
    start: usize,
    end: usize,
    /// Received headers of guessed pages.
    headers: Vec<u8>,
    /// How many pages to guess next time.
    boldness: usize,
    /// How much to read ahead at most when a header is wanted.
    appetite: usize,
    digest: Digest,
    received: u64,
    patience: Duration,
    /// The error behind the last `io::Error` given to a device.
    fault: Option<Error>,
}

impl Reader {
    /// A reader that waits `patience` for each byte.
    pub fn new(channel: Box<dyn Channel>, patience: Duration) -> Self {
        Self {
            channel,
            buffer: vec![0; SMALL],
            start: 0,
            end: 0,
            headers: vec![0; HEADER * MAX_GUESS],
            boldness: MIN_GUESS,
            appetite: SMALL,
            digest: Digest::default(),
            received: 0,
            patience,
            fault: None,
        }
    }

    /// How long to wait for the next byte.
    pub fn set_patience(&mut self, patience: Duration) {
        self.patience = patience;
    }

    /// Bytes received, buffered ones included.
    pub fn received(&self) -> u64 {
        self.received
    }

    /// Hash of everything consumed that was no page content.
    pub fn digest(&self) -> u64 {
        self.digest.value()
    }

    /// The channel, for answers.
    pub fn channel(&mut self) -> &mut dyn Channel {
        &mut *self.channel
    }

    /// The error that a device saw as an `io::Error`, if there was one.
    pub fn take_fault(&mut self) -> Option<Error> {
        self.fault.take()
    }

    /// Fills `to`.
    pub fn exact(&mut self, to: &mut [u8]) -> Result<(), Error> {
        let mut done = 0;
        while done < to.len() {
            if self.start == self.end && self.fill()? == 0 {
                return Err(ended());
            }
            let n = (to.len() - done).min(self.end - self.start);
            to[done..done + n].copy_from_slice(&self.buffer[self.start..self.start + n]);
            self.consume(n);
            done += n;
        }
        Ok(())
    }

    /// The next byte.
    pub fn u8(&mut self) -> Result<u8, Error> {
        let mut bytes = [0; 1];
        self.exact(&mut bytes)?;
        Ok(bytes[0])
    }

    /// The next two bytes.
    pub fn be16(&mut self) -> Result<u16, Error> {
        let mut bytes = [0; 2];
        self.exact(&mut bytes)?;
        Ok(u16::from_be_bytes(bytes))
    }

    /// The next four bytes.
    pub fn be32(&mut self) -> Result<u32, Error> {
        let mut bytes = [0; 4];
        self.exact(&mut bytes)?;
        Ok(u32::from_be_bytes(bytes))
    }

    /// The next eight bytes.
    #[inline]
    pub fn be64(&mut self) -> Result<u64, Error> {
        let mut bytes = [0; 8];
        if self.end - self.start >= 8 {
            bytes.copy_from_slice(&self.buffer[self.start..self.start + 8]);
            self.consume(8);
        } else {
            self.exact(&mut bytes)?;
        }
        Ok(u64::from_be_bytes(bytes))
    }

    /// A counted string. Bytes that are no UTF-8 become U+FFFD: names are only compared and shown.
    pub fn cstr(&mut self) -> Result<String, Error> {
        let mut bytes = vec![0; usize::from(self.u8()?)];
        self.exact(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// Reads the content of page `first` of `block`, whose header has been consumed, and goes on
    /// with the pages after it as long as they arrive with it. `is_blank` says of a page whether
    /// it is known to be zero; only such pages are guessed. Returns how many pages are complete.
    ///
    /// `header` makes the 8 bytes expected before a page that follows in a row.
    pub fn pages(
        &mut self,
        block: &RamBlock,
        first: usize,
        header: impl Fn(usize) -> [u8; HEADER],
        is_blank: impl Fn(usize) -> bool,
    ) -> Result<usize, Error> {
        let mut filled = self.take_buffered(block, first);
        if filled == PAGE_SIZE {
            return Ok(1);
        }
        let mut page = first;
        loop {
            // Here the header of `page` is consumed and `filled` bytes of the page are there.
            let most = self.boldness.min(MAX_GUESS.saturating_sub(page - first));
            let guesses = (1..=most)
                .take_while(|i| page + i < block.pages() && is_blank(page + i))
                .count();
            self.appetite = if guesses == 0 { LARGE } else { SMALL };
            let got = self.scatter(block, page, filled, guesses)?;
            let wanted = PAGE_SIZE - filled;
            if got < wanted {
                filled += got;
                continue;
            }
            page += 1;
            let (whole, inside) = self.sort(block, page, got - wanted, guesses, &header);
            page += whole;
            match inside {
                Some(bytes) => filled = bytes,
                None => return Ok(page - first),
            }
        }
    }

    /// Copies what the buffer holds of a page into it.
    fn take_buffered(&mut self, block: &RamBlock, page: usize) -> usize {
        let n = block
            .page(page)
            .room()
            .fill(&self.buffer[self.start..self.end]);
        self.start += n;
        n
    }

    /// One read into the rest of `page` and into `guesses` records after it.
    fn scatter(
        &mut self,
        block: &RamBlock,
        page: usize,
        filled: usize,
        guesses: usize,
    ) -> Result<usize, Error> {
        let mut rooms = Vec::with_capacity(1 + 2 * guesses);
        rooms.push(block.page(page).room().skip(filled));
        for (guess, room) in self
            .headers
            .chunks_exact_mut(HEADER)
            .take(guesses)
            .enumerate()
        {
            rooms.push(In::from(room));
            rooms.push(block.page(page + 1 + guess).room());
        }
        let n = receive(&mut *self.channel, &mut rooms, self.patience)?;
        if n == 0 {
            return Err(ended());
        }
        self.received += n as u64;
        Ok(n)
    }

    /// Looks at what a read left in `guesses` records, the first of which should be `page`.
    /// Returns the number of whole records that were as guessed, and, if the next one has begun
    /// as guessed, how much of its page is there.
    fn sort(
        &mut self,
        block: &RamBlock,
        page: usize,
        mut left: usize,
        guesses: usize,
        header: &impl Fn(usize) -> [u8; HEADER],
    ) -> (usize, Option<usize>) {
        for guess in 0..guesses {
            let at = guess * HEADER;
            if left < HEADER || self.headers[at..at + HEADER] != header(page + guess) {
                if left >= HEADER {
                    self.boldness = MIN_GUESS;
                }
                self.undo(block, page, guess, left);
                return (guess, None);
            }
            self.digest.update(&self.headers[at..at + HEADER]);
            left -= HEADER;
            if left < PAGE_SIZE {
                return (guess, Some(left));
            }
            left -= PAGE_SIZE;
        }
        self.boldness = (self.boldness * 2).min(MAX_GUESS);
        (guesses, None)
    }

    /// Moves the last `left` bytes that a read scattered, from the record `guess` on, back into
    /// the buffer (empty now) and makes the pages they fell into zero again.
    fn undo(&mut self, block: &RamBlock, page: usize, mut guess: usize, mut left: usize) {
        (self.start, self.end) = (0, left);
        if self.buffer.len() < left {
            self.buffer.resize(left, 0);
        }
        let mut rest = &mut self.buffer[..left];
        let mut content = [0; PAGE_SIZE];
        while left > 0 {
            let n = left.min(HEADER);
            let (now, later) = rest.split_at_mut(n);
            now.copy_from_slice(&self.headers[guess * HEADER..][..n]);
            left -= n;
            let n = left.min(PAGE_SIZE);
            let (now, later) = later.split_at_mut(n);
            if n > 0 {
                let page = block.page(page + guess);
                page.read(&mut content);
                now.copy_from_slice(&content[..n]);
                page.clear();
            }
            left -= n;
            rest = later;
            guess += 1;
        }
    }

    /// Reads ahead; 0 at the end of the stream.
    fn fill(&mut self) -> Result<usize, Error> {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        } else {
            self.buffer.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        let limit = self.end + self.appetite;
        if self.buffer.len() < limit {
            self.buffer.resize(limit, 0);
        }
        let mut rooms = [In::from(&mut self.buffer[self.end..limit])];
        let n = receive(&mut *self.channel, &mut rooms, self.patience)?;
        self.end += n;
        self.received += n as u64;
        Ok(n)
    }

    #[inline]
    fn consume(&mut self, n: usize) {
        self.digest.update(&self.buffer[self.start..self.start + n]);
        self.start += n;
    }
}

impl StateReader for Reader {
    fn read(&mut self, to: &mut [u8]) -> io::Result<()> {
        let result = self.exact(to);
        result.map_err(|error| keep(&mut self.fault, error))
    }

    fn peek(&mut self, n: usize) -> io::Result<&[u8]> {
        let n = n.min(PEEK);
        while self.end - self.start < n {
            match self.fill() {
                Ok(0) => break,
                Ok(_) => {}
                Err(error) => return Err(keep(&mut self.fault, error)),
            }
        }
        let n = n.min(self.end - self.start);
        Ok(&self.buffer[self.start..self.start + n])
    }
}

fn keep(fault: &mut Option<Error>, error: Error) -> io::Error {
    let text = error.to_string();
    *fault = Some(error);
    io::Error::other(text)
}

fn receive(
    channel: &mut dyn Channel,
    rooms: &mut [In<'_>],
    patience: Duration,
) -> Result<usize, Error> {
    channel.read(rooms, patience).map_err(|fault| match fault {
        Fault::TimedOut => Error::stream(format!(
            "The source has not sent a byte for {} seconds",
            patience.as_secs()
        )),
        fault => fault.into(),
    })
}

fn ended() -> Error {
    Error::stream("The source closed the connection before the end of the migration stream")
}

/// Bytes of a record word, all there is before a page in a row.
const HEADER: usize = 8;
/// How far [`StateReader::peek`] sees.
const PEEK: usize = 256;
/// Read-ahead where pages are expected, which should not land in the buffer.
const SMALL: usize = 4 << 10;
/// Read-ahead where pages can not be guessed.
const LARGE: usize = 256 << 10;
/// Pages guessed after a wrong guess, and at most: they should still be in the cache when they
/// are hashed.
const MIN_GUESS: usize = 8;
const MAX_GUESS: usize = 128;
