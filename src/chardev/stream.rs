//! An open connection: bytes in through the registry, bytes out through a bounded queue.

use std::io;
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

use super::Incoming;
use super::output::Output;
use crate::poll::{Interest, Poll, Registration};

/// How input is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Input {
    /// `read(2)`.
    Plain,
    /// `recvmsg(2)`, for descriptors that come along.
    WithDescriptors,
}

/// Who is told: bytes, and once that the connection is over. Called on the event loop's thread
/// with no lock held.
pub(super) type Told = Box<dyn Fn(Incoming) + Send + Sync>;

/// Most bytes delivered at once, so that one connection does not starve the others, and that the
/// echo of a chunk (16 KiB for each byte of the longest line) is not more than is kept.
const CHUNK: usize = 256;
/// Most descriptors that may come along with them.
const DESCRIPTORS: usize = 16;
/// How long last words may take when the connection is dropped.
const PARTING: Duration = Duration::from_millis(200);

/// A connection. Dropping it closes our descriptors.
pub(super) struct Stream {
    inner: Arc<Inner>,
}

struct Inner {
    input: Arc<OwnedFd>,
    how: Input,
    told: Told,
    poll: Poll,
    state: Mutex<State>,
}

struct State {
    output: Output,
    reading: Option<Registration>,
    writing: Option<Registration>,
    /// Whether input is wanted.
    is_wanted: bool,
    is_over: bool,
}

impl Stream {
    /// Serves a connection; input is not read before [`Self::set_readable`].
    pub(super) fn new(
        input: Arc<OwnedFd>,
        output: Arc<OwnedFd>,
        how: Input,
        poll: &Poll,
        told: Told,
    ) -> io::Result<Self> {
        let state = State {
            output: Output::new(Arc::clone(&output))?,
            reading: None,
            writing: None,
            is_wanted: false,
            is_over: false,
        };
        let inner = Arc::new(Inner {
            input: Arc::clone(&input),
            how,
            told,
            poll: poll.clone(),
            state: Mutex::new(state),
        });
        let weak = Arc::downgrade(&inner);
        let reading = Box::new(move |_| {
            if let Some(inner) = weak.upgrade() {
                inner.read();
            }
        });
        let weak = Arc::downgrade(&inner);
        let writing = Box::new(move |_| {
            if let Some(inner) = weak.upgrade() {
                inner.change_output(Output::push);
            }
        });
        let mut state = inner.lock();
        state.reading = Some(poll.register(input, Interest::default(), reading));
        state.writing = Some(poll.register(output, Interest::default(), writing));
        drop(state);
        Ok(Self { inner })
    }

    /// Writes without waiting.
    pub(super) fn write(&self, bytes: &[u8]) {
        self.inner.change_output(|output| output.write(bytes));
    }

    /// Writes what is queued, unless its reader takes too long.
    pub(super) fn flush(&self) {
        self.inner.lock().output.flush(PARTING);
    }

    /// Starts or stops taking input.
    pub(super) fn set_readable(&self, readable: bool) {
        let mut state = self.inner.lock();
        state.is_wanted = readable;
        self.inner.watch(&state);
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        let mut state = self.inner.lock();
        state.output.flush(PARTING);
        state.is_over = true;
        let registrations = (state.reading.take(), state.writing.take());
        drop(state);
        drop(registrations);
    }
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read(self: &Arc<Self>) {
        match receive(&self.input, self.how) {
            Ok((bytes, _)) if bytes.is_empty() => self.end(),
            Ok((bytes, descriptors)) => (self.told)(Incoming::Bytes(bytes, descriptors)),
            Err(error) if is_passing(&error) => {}
            Err(_) => self.end(),
        }
    }

    /// Writes.
    fn change_output(self: &Arc<Self>, change: impl FnOnce(&mut Output)) {
        let mut state = self.lock();
        if state.is_over {
            return;
        }
        change(&mut state.output);
        self.watch(&state);
        if state.output.is_broken() && self.how == Input::WithDescriptors {
            // A socket whose reader is gone is over in both directions. Told later: whoever is
            // writing may hold locks.
            let inner = Arc::downgrade(self);
            self.poll.defer(Box::new(move || {
                if let Some(inner) = inner.upgrade() {
                    inner.end();
                }
            }));
        }
    }

    /// Keeps the registry informed about what is waited for: room if something is queued, input if
    /// it is wanted and its answers would not only make a long queue longer.
    fn watch(&self, state: &State) {
        if let Some(writing) = &state.writing {
            writing.set_interest(Interest {
                writable: state.output.has_queue(),
                ..Interest::default()
            });
        }
        if let Some(reading) = &state.reading {
            reading.set_interest(Interest {
                readable: state.is_wanted && !state.output.is_busy(),
                // A socket's client that goes away makes room for the next one even while its
                // input is not wanted; what a pipe still holds can wait.
                over: self.how == Input::WithDescriptors,
                ..Interest::default()
            });
        }
    }

    /// Input is over: told once. Output goes on until the stream is dropped.
    fn end(&self) {
        let mut state = self.lock();
        let reading = state.reading.take();
        drop(state);
        if let Some(reading) = reading {
            drop(reading);
            (self.told)(Incoming::Closed);
        }
    }
}

fn receive(fd: &OwnedFd, how: Input) -> io::Result<(Vec<u8>, Vec<OwnedFd>)> {
    let mut room = [0; CHUNK];
    if how == Input::Plain {
        let count = rustix::io::read(fd, &mut room)?;
        return Ok((room[..count].to_vec(), Vec::new()));
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let count = recvmsg(fd, &mut [IoSliceMut::new(&mut room)], &mut control, flags)?.bytes;
    let mut descriptors = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            descriptors.extend(rights);
        }
    }
    Ok((room[..count].to_vec(), descriptors))
}

fn is_passing(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
    )
}
