//! Sockets: addresses as QEMU writes them, listening, connecting.
//!
//! Character devices and migration channels stand on the same sockets, so they fail with the same
//! words. Every wait here has an end and can be interrupted through a descriptor. What is said
//! over a socket is none of this room's business. Counterpart: QEMU's `util/qemu-sockets.c`.

pub mod address;
pub mod connect;
pub mod listen;

use std::io;
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::errno::Errno;

/// Why a socket could not be had, in QEMU's words.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Neither `host:port` nor `:port`.
    #[error("error parsing address '{0}'")]
    Address(String),
    /// A `[` that does not open an IPv6 address with a port.
    #[error("error parsing IPv6 address '{0}'")]
    Ipv6Address(String),
    /// A port number above 65535 (QEMU takes it modulo 65536).
    #[error("error parsing address '{address}': port {port} is not in the range of 0 to 65535")]
    Port {
        /// What was given.
        address: String,
        /// Its port.
        port: String,
    },
    /// Something after the port.
    #[error("address option '{0}': not built in this version")]
    AddressOption(String),
    /// The host or the service has no address.
    #[error("address resolution failed for {address}: {why}")]
    Resolve {
        /// Host and port.
        address: String,
        /// The resolver's reason.
        why: String,
    },
    /// No socket of that kind to be had.
    #[error("Failed to create socket: {}", Errno(.0))]
    Create(io::Error),
    /// Nobody listens there, or no way leads there.
    #[error("Failed to connect to '{address}': {}", Errno(.source))]
    Connect {
        /// `host:port` or path.
        address: String,
        /// The last of the reasons, if there were several addresses.
        source: io::Error,
    },
    /// The port is taken.
    #[error("Failed to find an available port: {}", Errno(.0))]
    PortInUse(io::Error),
    /// The address is not ours.
    #[error("Failed to bind socket: {}", Errno(.0))]
    Bind(io::Error),
    /// The path can not be made.
    #[error("Failed to bind socket to {path}: {}", Errno(.source))]
    BindPath {
        /// The path.
        path: String,
        /// Why.
        source: io::Error,
    },
    /// Bound, but not listening.
    #[error("Failed to listen on socket: {}", Errno(.0))]
    Listen(io::Error),
    /// No path at all.
    #[error("invalid Unix socket address")]
    EmptyPath,
    /// `sun_path` has 108 bytes with its end mark.
    #[error("UNIX socket path '{0}' is too long")]
    PathTooLong(String),
    /// The caller's interrupt came first.
    #[error("Interrupted")]
    Interrupted,
}

/// How a wait ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Waited {
    /// The descriptor is ready (or failed: the next call on it tells).
    Ready,
    /// The time is over.
    TimedOut,
    /// The interrupt became readable.
    Interrupted,
}

/// Waits at most `patience` until `fd` has one of `events` or `interrupt` is readable; the
/// interrupt wins.
///
/// # Errors
/// What `poll(2)` says, but for `EINTR`, which is waited through.
pub fn wait(
    fd: BorrowedFd<'_>,
    events: PollFlags,
    patience: Duration,
    interrupt: Option<BorrowedFd<'_>>,
) -> io::Result<Waited> {
    let deadline = Instant::now().checked_add(patience);
    loop {
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let timeout = left.and_then(|left| Timespec::try_from(left).ok());
        let mut fds = [
            PollFd::from_borrowed_fd(fd, events),
            PollFd::from_borrowed_fd(interrupt.unwrap_or(fd), PollFlags::IN),
        ];
        let count = if interrupt.is_some() { 2 } else { 1 };
        match poll(&mut fds[..count], timeout.as_ref()) {
            Ok(0) => return Ok(Waited::TimedOut),
            Ok(_) if count == 2 && !fds[1].revents().is_empty() => return Ok(Waited::Interrupted),
            Ok(_) => return Ok(Waited::Ready),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn a_wait_ends_by_time_by_readiness_or_by_interrupt() {
        let (silent, _keep) = rustix::pipe::pipe().unwrap();
        let (ready, feed) = rustix::pipe::pipe().unwrap();
        rustix::io::write(&feed, b"x").unwrap();
        let brief = Duration::from_millis(10);
        let at = |fd: &std::os::fd::OwnedFd, stop: Option<&std::os::fd::OwnedFd>| {
            wait(fd.as_fd(), PollFlags::IN, brief, stop.map(AsFd::as_fd)).unwrap()
        };
        assert_eq!(at(&silent, None), Waited::TimedOut);
        assert_eq!(at(&silent, Some(&ready)), Waited::Interrupted);
        assert_eq!(at(&ready, Some(&silent)), Waited::Ready);
        assert_eq!(at(&ready, Some(&ready)), Waited::Interrupted);
        let forever = Duration::MAX;
        assert_eq!(
            wait(ready.as_fd(), PollFlags::IN, forever, None).unwrap(),
            Waited::Ready
        );
    }
}
