//! A non-blocking descriptor that bytes of a migration go through: what all schemes share.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use rustix::event::PollFlags;

use super::{Cancel, Fault};
use crate::iov::{self, In, Out};
use crate::socket::{Waited, wait};

/// What is at the other side, as QEMU's texts name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Socket,
    Command,
    File,
}

impl Kind {
    fn noun(self) -> &'static str {
        match self {
            Self::Socket => "socket",
            Self::Command => "command",
            Self::File => "file",
        }
    }
}

/// A descriptor, tried first and waited for only when it has nothing.
#[derive(Debug)]
pub(super) struct Descriptor {
    fd: OwnedFd,
    kind: Kind,
    cancel: Arc<Cancel>,
    /// Wait before the first read: a FIFO that no writer has opened yet reads as ended.
    waits_first: bool,
}

impl Descriptor {
    /// Takes over a descriptor that is non-blocking already, or never blocks (a regular file).
    pub(super) fn new(fd: OwnedFd, kind: Kind, cancel: &Arc<Cancel>) -> Self {
        Self {
            fd,
            kind,
            cancel: Arc::clone(cancel),
            waits_first: false,
        }
    }

    /// Makes the first read wait for a writer.
    pub(super) fn waiting_first(mut self) -> Self {
        self.waits_first = true;
        self
    }

    pub(super) fn cancel(&self) -> &Arc<Cancel> {
        &self.cancel
    }

    /// [`super::Channel::write`].
    pub(super) fn write(&mut self, pieces: &[Out<'_>], patience: Duration) -> Result<usize, Fault> {
        loop {
            self.check()?;
            match iov::write(self.fd.as_fd(), pieces) {
                Ok(0) => return Err(self.fault("write to", io::ErrorKind::WriteZero.into())),
                Ok(count) => return Ok(count),
                Err(error) => self.pause("write to", error, PollFlags::OUT, patience)?,
            }
        }
    }

    /// [`super::Channel::read`].
    pub(super) fn read(
        &mut self,
        rooms: &mut [In<'_>],
        patience: Duration,
    ) -> Result<usize, Fault> {
        loop {
            self.check()?;
            if self.waits_first {
                self.pause(
                    "read from",
                    io::ErrorKind::WouldBlock.into(),
                    PollFlags::IN,
                    patience,
                )?;
                self.waits_first = false;
            }
            match iov::read(self.fd.as_fd(), rooms) {
                Ok(count) => return Ok(count),
                Err(error) => self.pause("read from", error, PollFlags::IN, patience)?,
            }
        }
    }

    /// `Unable to write to socket: Broken pipe`.
    pub(super) fn fault(&self, tried: &str, source: io::Error) -> Fault {
        Fault::Io {
            what: format!("Unable to {tried} {}", self.kind.noun()),
            source,
        }
    }

    fn check(&self) -> Result<(), Fault> {
        if self.cancel.is_cancelled() {
            Err(Fault::Cancelled)
        } else {
            Ok(())
        }
    }

    /// After a failed call: returns when it should be tried again.
    fn pause(
        &self,
        tried: &str,
        error: io::Error,
        events: PollFlags,
        patience: Duration,
    ) -> Result<(), Fault> {
        match error.kind() {
            io::ErrorKind::Interrupted => return Ok(()),
            io::ErrorKind::WouldBlock if patience.is_zero() => return Err(Fault::TimedOut),
            io::ErrorKind::WouldBlock => {}
            _ => return Err(self.fault(tried, error)),
        }
        match wait(self.fd.as_fd(), events, patience, Some(self.cancel.event())) {
            Ok(Waited::Ready) => Ok(()),
            Ok(Waited::TimedOut) => Err(Fault::TimedOut),
            Ok(Waited::Interrupted) => Err(Fault::Cancelled),
            Err(error) => Err(self.fault(tried, error)),
        }
    }
}

impl AsFd for Descriptor {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
