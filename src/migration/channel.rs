//! The seam under the engine: one ordered byte stream, perhaps with a way back.
//!
//! Schemes (tcp, unix, exec, fd, file) implement it over non-blocking descriptors, tests in memory.
//! Every wait ends when bytes move, when its time is over, or when the migration is cancelled.
//! [`prepare`] finds at once what QEMU reports at once (a missing descriptor, a file that can not
//! be made); [`Prepared::connect`] does what may take time.

mod descriptor;
mod exec;
mod fd;
mod file;
pub mod inherited;
mod outq;
mod socket;

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};

use super::uri::Uri;
use crate::errno::Errno;
use crate::iov::{In, Out};

/// Why bytes did not move.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// Nothing moved for as long as the caller was willing to wait.
    #[error("Timed out")]
    TimedOut,
    /// The operator cancelled the migration.
    #[error("Cancelled")]
    Cancelled,
    /// The transport failed, with a text that names it (`Unable to write to socket: …`).
    #[error("{what}: {}", Errno(.source))]
    Io {
        /// What was tried, in QEMU's words.
        what: String,
        /// Why it failed.
        source: io::Error,
    },
    /// Something of the transport's own, such as a child's exit status.
    #[error("{0}")]
    Failed(String),
}

/// An open connection, used by one thread at a time.
pub trait Channel: Send {
    /// Writes a prefix of `pieces` (not empty) and returns its length in bytes, at least 1. Waits
    /// for room at most `patience`.
    fn write(&mut self, pieces: &[Out<'_>], patience: Duration) -> Result<usize, Fault>;

    /// Reads into `rooms` and returns how many bytes came, 0 only at the end of the stream. Waits
    /// for the first byte at most `patience`; with zero patience `TimedOut` means none is there.
    fn read(&mut self, rooms: &mut [In<'_>], patience: Duration) -> Result<usize, Fault>;

    /// Whether the peer can answer on this channel (sockets can, files and pipes can not).
    fn is_duplex(&self) -> bool;

    /// After the last byte, all that can still be taken back: the file is synced, the command has
    /// exited with 0 (also one that an incoming stream came from). Takes as long as it takes, but
    /// for a cancel. Sockets have nothing to do.
    fn settle(&mut self) -> Result<(), Fault> {
        Ok(())
    }

    /// Outgoing side, after [`Self::settle`]: the file gets its name. Most have nothing to do.
    fn commit(&mut self) -> Result<(), Fault> {
        Ok(())
    }

    /// Last words, whatever was cancelled: what of them goes at once. For channels that have
    /// somebody at the other end.
    fn part(&mut self, _words: &[u8]) {}

    /// Gives the channel up after a failure: temporary file removed, child killed, socket closed.
    fn abandon(&mut self);

    /// Waits until the peer's kernel has taken everything that was written, as long as it takes
    /// something every `patience`, and tells whether it has. Channels without a send queue say yes.
    fn drain(&mut self, patience: Duration) -> bool;
}

/// Waits for a source to connect.
pub trait Listener: Send {
    /// The next connection; waits until one comes or the listener is cancelled.
    fn accept(&mut self) -> Result<Box<dyn Channel>, Fault>;

    /// The bound address as `info migrate` shows it (`tcp:127.0.0.1:4444`), if it is a socket.
    fn address(&self) -> Option<String>;

    /// Whether a second source could connect after the first failed (sockets; not exec, fd, file).
    fn can_repeat(&self) -> bool;
}

/// Why there is no channel, in QEMU's words.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A socket could not be had.
    #[error(transparent)]
    Socket(crate::socket::Error),
    /// `fd:` with a name nobody gave.
    #[error("File descriptor named '{0}' has not been found")]
    NoSuchFd(String),
    /// `fd:` with a descriptor no stream can go through.
    #[error("fd:{name}: {why}")]
    UnfitFd {
        /// Its name.
        name: String,
        /// What is wrong with it.
        why: String,
    },
    /// The outgoing file can not be made.
    #[error("Could not create '{path}': {}", Errno(.source))]
    Create {
        /// The path as given.
        path: String,
        /// Why.
        source: io::Error,
    },
    /// The incoming file can not be read.
    #[error("Could not open '{path}': {}", Errno(.source))]
    Open {
        /// The path as given.
        path: String,
        /// Why.
        source: io::Error,
    },
    /// The file is there, but of no use.
    #[error("'{path}': {why}")]
    UnfitFile {
        /// The path as given.
        path: String,
        /// What is wrong with it.
        why: String,
    },
    /// No shell to run the command.
    #[error("Failed to run command: {}", Errno(.0))]
    Spawn(io::Error),
    /// The operator cancelled while it was being opened.
    #[error("Cancelled")]
    Cancelled,
}

impl From<crate::socket::Error> for Error {
    fn from(error: crate::socket::Error) -> Self {
        match error {
            crate::socket::Error::Interrupted => Self::Cancelled,
            error => Self::Socket(error),
        }
    }
}

impl From<Error> for Fault {
    fn from(error: Error) -> Self {
        match error {
            Error::Cancelled => Self::Cancelled,
            error => Self::Failed(error.to_string()),
        }
    }
}

/// An outgoing channel that only has to be connected.
#[derive(Debug)]
pub struct Prepared(Way);

#[derive(Debug)]
enum Way {
    Tcp(crate::socket::address::Inet),
    Unix(std::path::PathBuf),
    Exec(String),
    Fd(fd::Given),
    File(file::Outgoing),
}

/// How long connecting may take.
const CONNECTING: Duration = Duration::from_secs(10);

/// Gets an outgoing channel ready: a descriptor is taken out of `fds`, a file is created. Dropping
/// the result undoes it.
///
/// # Errors
/// [`Error::NoSuchFd`], [`Error::UnfitFd`], [`Error::Create`], [`Error::UnfitFile`].
pub fn prepare(uri: &Uri, fds: &mut BTreeMap<String, OwnedFd>) -> Result<Prepared, Error> {
    Ok(Prepared(match uri {
        Uri::Tcp(inet) => Way::Tcp(inet.clone()),
        Uri::Unix(path) => Way::Unix(path.clone()),
        Uri::Exec(command) => Way::Exec(command.clone()),
        Uri::Fd(name) => Way::Fd(fd::Given::take(name, fds, fd::Use::Write)?),
        Uri::File { path, offset } => Way::File(file::Outgoing::create(path, *offset)?),
    }))
}

impl Prepared {
    /// Connects, or starts the command; waits at most 10 s.
    ///
    /// # Errors
    /// [`Error::Socket`], [`Error::Spawn`], [`Error::Cancelled`].
    pub fn connect(self, cancel: &Arc<Cancel>) -> Result<Box<dyn Channel>, Error> {
        if cancel.is_cancelled() {
            return Err(Error::Cancelled);
        }
        let interrupt = Some(cancel.event());
        Ok(match self.0 {
            Way::Tcp(inet) => {
                let connected = crate::socket::connect::tcp(&inet, CONNECTING, interrupt)?;
                Box::new(socket::SocketChannel::new(connected, cancel))
            }
            Way::Unix(path) => {
                let connected = crate::socket::connect::unix(&path, CONNECTING, interrupt)?;
                Box::new(socket::SocketChannel::new(connected, cancel))
            }
            Way::Exec(command) => Box::new(exec::ExecChannel::to(&command, cancel)?),
            Way::Fd(given) => given.open(cancel),
            Way::File(outgoing) => Box::new(outgoing.open(cancel)),
        })
    }
}

/// Waits for an incoming migration at `uri`: binds, opens or starts what it names at once.
///
/// # Errors
/// [`Error::Socket`], [`Error::NoSuchFd`], [`Error::UnfitFd`], [`Error::Open`],
/// [`Error::UnfitFile`], [`Error::Spawn`].
pub fn listen(
    uri: &Uri,
    fds: &mut BTreeMap<String, OwnedFd>,
    cancel: &Arc<Cancel>,
) -> Result<Box<dyn Listener>, Error> {
    use crate::socket::listen::Listener as Socket;
    let only: Box<dyn Channel> = match uri {
        Uri::Tcp(inet) => {
            return Ok(Box::new(socket::SocketListener::new(
                Socket::tcp(inet)?,
                cancel,
            )));
        }
        Uri::Unix(path) => {
            return Ok(Box::new(socket::SocketListener::new(
                Socket::unix(path)?,
                cancel,
            )));
        }
        Uri::Exec(command) => Box::new(exec::ExecChannel::from(command, cancel)?),
        Uri::Fd(name) => fd::Given::take(name, fds, fd::Use::Read)?.open(cancel),
        Uri::File { path, offset } => file::read(path, *offset, cancel)?,
    };
    Ok(Box::new(Once {
        only: Some(only),
        cancel: Arc::clone(cancel),
    }))
}

/// What can bring one stream and no second one.
struct Once {
    only: Option<Box<dyn Channel>>,
    cancel: Arc<Cancel>,
}

impl Listener for Once {
    fn accept(&mut self) -> Result<Box<dyn Channel>, Fault> {
        if self.cancel.is_cancelled() {
            return Err(Fault::Cancelled);
        }
        let used = || Fault::Failed("The incoming stream has been used up".to_owned());
        self.only.take().ok_or_else(used)
    }

    fn address(&self) -> Option<String> {
        None
    }

    fn can_repeat(&self) -> bool {
        false
    }
}

/// The one way to interrupt a migration: a flag to look at and a descriptor to wait for.
#[derive(Debug)]
pub struct Cancel {
    flag: AtomicBool,
    event: OwnedFd,
}

impl Cancel {
    /// Not cancelled. Fails when the process is out of descriptors.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            flag: AtomicBool::new(false),
            event: eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?,
        })
    }

    /// Cancels; every present and later wait ends with [`Fault::Cancelled`].
    pub fn cancel(&self) {
        self.flag.store(true, Ordering::SeqCst);
        // The counter can only be full if it has been signalled already.
        let _ = rustix::io::write(&self.event, &1u64.to_ne_bytes());
    }

    /// Whether [`Self::cancel`] was called.
    pub fn is_cancelled(&self) -> bool {
        self.flag.load(Ordering::SeqCst)
    }

    /// Readable from the moment of cancelling on: include it in every `poll`.
    pub fn event(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

#[cfg(test)]
mod tests;
