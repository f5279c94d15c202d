//! A bounded queue before a descriptor that must never be waited for.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::PollFlags;
use rustix::fs::{FileType, OFlags, fcntl_getfl, fstat};
use rustix::net::SendFlags;

use crate::socket::{Waited, wait};

/// Bytes that are kept for a reader who is slower than the writer; what comes beyond is dropped.
/// Room for the longest answers of a monitor.
pub(super) const BOUND: usize = 16 << 20;
/// From here on no input should be taken that leads to more output.
pub(super) const BUSY: usize = 64 << 10;

/// How a descriptor is kept from blocking.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    /// It never does: a regular file, or `O_NONBLOCK`.
    Plain,
    /// A socket that others share: asked not to block each time.
    Socket,
    /// A pipe or terminal that others share, so that its mode is not ours to change: written in
    /// pieces that fit when `poll(2)` says there is room.
    Pieces,
}

/// What of a pipe's room `poll(2)` promises.
const PIECE: usize = 4096;
/// Of a terminal it promises less.
const SMALL_PIECE: usize = 256;

/// The queue and its descriptor.
#[derive(Debug)]
pub(super) struct Output {
    fd: std::sync::Arc<OwnedFd>,
    mode: Mode,
    piece: usize,
    queue: VecDeque<u8>,
    is_broken: bool,
}

impl Output {
    pub(super) fn new(fd: std::sync::Arc<OwnedFd>) -> io::Result<Self> {
        let kind = FileType::from_raw_mode(fstat(&fd)?.st_mode);
        let is_nonblocking = fcntl_getfl(&fd)?.contains(OFlags::NONBLOCK);
        let mode = match kind {
            FileType::RegularFile => Mode::Plain,
            _ if is_nonblocking => Mode::Plain,
            FileType::Socket => Mode::Socket,
            _ => Mode::Pieces,
        };
        let piece = match (mode, kind) {
            (Mode::Pieces, FileType::Fifo) => PIECE,
            (Mode::Pieces, _) => SMALL_PIECE,
            _ => usize::MAX,
        };
        Ok(Self {
            fd,
            mode,
            piece,
            queue: VecDeque::new(),
            is_broken: false,
        })
    }

    /// Writes what goes at once and queues the rest.
    pub(super) fn write(&mut self, bytes: &[u8]) {
        let room = BOUND.saturating_sub(self.queue.len());
        self.queue.extend(&bytes[..bytes.len().min(room)]);
        self.push();
    }

    /// Writes of the queue what goes at once.
    pub(super) fn push(&mut self) {
        while !self.queue.is_empty() && !self.is_broken {
            match self.write_some() {
                Ok(count) => drop(self.queue.drain(..count)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => self.is_broken = true,
            }
        }
        if self.is_broken {
            self.queue.clear();
        }
    }

    /// Writes the queue out, waiting at most `patience` in all: last words before the end.
    pub(super) fn flush(&mut self, patience: Duration) {
        let end = Instant::now() + patience;
        self.push();
        while self.has_queue() {
            let left = end.saturating_duration_since(Instant::now());
            match wait(self.fd.as_fd(), PollFlags::OUT, left, None) {
                Ok(Waited::Ready) => self.push(),
                _ => return,
            }
        }
    }

    /// Whether something waits for room.
    pub(super) fn has_queue(&self) -> bool {
        !self.queue.is_empty()
    }

    /// Whether so much waits that no more should be asked for.
    pub(super) fn is_busy(&self) -> bool {
        self.queue.len() > BUSY
    }

    /// Whether the reader is gone.
    pub(super) fn is_broken(&self) -> bool {
        self.is_broken
    }

    fn write_some(&self) -> io::Result<usize> {
        let (front, _) = self.queue.as_slices();
        let front = &front[..front.len().min(self.piece)];
        Ok(match self.mode {
            Mode::Plain => rustix::io::write(&self.fd, front)?,
            Mode::Socket => {
                rustix::net::send(&self.fd, front, SendFlags::DONTWAIT | SendFlags::NOSIGNAL)?
            }
            Mode::Pieces => match wait(self.fd.as_fd(), PollFlags::OUT, Duration::ZERO, None)? {
                Waited::Ready => rustix::io::write(&self.fd, front)?,
                _ => return Err(io::ErrorKind::WouldBlock.into()),
            },
        })
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::UnixStream;
    use std::sync::Arc;

    use super::*;

    /// Fills a blocking descriptor nobody reads, then reads it.
    fn never_blocks(fd: OwnedFd, mut reader: impl Read + Send + 'static) {
        let mut output = Output::new(Arc::new(fd)).unwrap();
        let start = Instant::now();
        for _ in 0..BOUND / 65536 + 10 {
            output.write(&[7; 65536]);
        }
        assert!(start.elapsed() < Duration::from_secs(5));
        assert!(output.has_queue() && output.queue.len() <= BOUND);
        let before = output.queue.len();
        output.flush(Duration::from_millis(20));
        assert_eq!(output.queue.len(), before, "nobody reads");
        let thread = std::thread::spawn(move || {
            let mut all = Vec::new();
            reader.read_to_end(&mut all).unwrap();
            all.len()
        });
        output.flush(Duration::from_secs(10));
        assert!(!output.has_queue());
        drop(output);
        assert!(thread.join().unwrap() > BOUND);
    }

    #[test]
    fn a_blocking_pipe_never_blocks_its_user() {
        let (reader, writer) = io::pipe().unwrap();
        never_blocks(writer.into(), reader);
    }

    #[test]
    fn a_blocking_socket_never_blocks_its_user() {
        let (reader, writer) = UnixStream::pair().unwrap();
        never_blocks(writer.into(), reader);
    }

    #[test]
    fn a_reader_that_is_gone_is_noticed() {
        let (reader, writer) = io::pipe().unwrap();
        drop(reader);
        let mut output = Output::new(Arc::new(writer.into())).unwrap();
        output.write(b"x");
        assert!(output.is_broken() && !output.has_queue());
    }
}
