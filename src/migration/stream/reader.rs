//! Incoming bytes, through a buffer that stays in the cache.
//!
//! Pages pass through it too. To read them straight into guest memory (`readv`, guessing which come
//! next) saves a copy and still costs more: the kernel then copies to memory that is in no cache,
//! and the hash fetches it again. From here a page is hashed, and copied once, while it is near
//! (`docs/speed.md`).

use std::io;
use std::time::Duration;

use crate::iov::In;
use crate::migration::Error;
use crate::migration::channel::{Channel, Fault};
use crate::migration::integrity::Digest;
use crate::vm::memory::PAGE_SIZE;
use crate::vmstate::StateReader;

/// The reading end of the main stream.
pub struct Reader {
    channel: Box<dyn Channel>,
    buffer: Vec<u8>,
    start: usize,
    end: usize,
    ahead: usize,
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
            buffer: vec![0; BUFFER],
            start: 0,
            end: 0,
            ahead: BUFFER,
            digest: Digest::default(),
            received: 0,
            patience,
            fault: None,
        }
    }

    /// How far to read ahead, up to what the buffer holds: where [`Self::bulk`] will be called, what
    /// is in the buffer by then is copied once more. A page it is at least, for [`Self::page`].
    pub fn set_ahead(&mut self, ahead: usize) {
        self.ahead = ahead.clamp(PAGE_SIZE, BUFFER);
    }

    /// How long to wait for the next byte.
    pub fn set_patience(&mut self, patience: Duration) {
        self.patience = patience;
    }

    /// Bytes received, buffered ones included.
    pub fn received(&self) -> u64 {
        self.received
    }

    /// Bytes consumed: the offset of the next one.
    pub fn position(&self) -> u64 {
        self.received - (self.end - self.start) as u64
    }

    /// Hash of everything consumed that was no page content.
    pub fn digest(&mut self) -> &mut Digest {
        &mut self.digest
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

    /// Fills `to`, a multiple of [`PAGE_SIZE`], with bytes of a disk. What is not in the buffer yet
    /// goes past it: it would only be one more copy.
    pub fn bulk(&mut self, to: &mut [u8]) -> Result<(), Error> {
        let mut done = to.len().min(self.end - self.start);
        to[..done].copy_from_slice(&self.buffer[self.start..self.start + done]);
        self.start += done;
        while done < to.len() {
            let mut rooms = [In::from(&mut to[done..])];
            let n = receive(&mut *self.channel, &mut rooms, self.patience)?;
            if n == 0 {
                return Err(ended());
            }
            self.received += n as u64;
            done += n;
        }
        self.digest.bulk(to);
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
        if let Some(bytes) = self.buffer[self.start..self.end].first_chunk() {
            let value = u64::from_be_bytes(*bytes);
            self.consume(8);
            return Ok(value);
        }
        self.split_be64()
    }

    /// Where a word comes in two pieces.
    #[cold]
    fn split_be64(&mut self) -> Result<u64, Error> {
        let mut bytes = [0; 8];
        self.exact(&mut bytes)?;
        Ok(u64::from_be_bytes(bytes))
    }

    /// A counted string. Bytes that are no UTF-8 become U+FFFD: names are only compared and shown.
    pub fn cstr(&mut self) -> Result<String, Error> {
        let mut bytes = vec![0; usize::from(self.u8()?)];
        self.exact(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// The content of a page. It stays in the buffer: there it is in the cache.
    pub fn page(&mut self) -> Result<&[u8; PAGE_SIZE], Error> {
        while self.end - self.start < PAGE_SIZE {
            if self.fill()? == 0 {
                return Err(ended());
            }
        }
        let content = self.buffer[self.start..self.end]
            .first_chunk()
            .ok_or_else(ended)?;
        self.start += PAGE_SIZE;
        Ok(content)
    }

    /// Reads ahead; 0 at the end of the stream.
    fn fill(&mut self) -> Result<usize, Error> {
        if self.start > 0 {
            self.buffer.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        let limit = BUFFER.min(self.end + self.ahead);
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

/// How far [`StateReader::peek`] sees.
const PEEK: usize = 256;
/// Size of the buffer: system calls are few, and it fits the second-level cache of a processor
/// together with the kernel's pages that it is filled from.
const BUFFER: usize = 512 << 10;
