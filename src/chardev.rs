//! Character devices: one seam for whatever carries bytes of monitors and serial ports.
//!
//! A chardev never blocks its user: output that does not fit is queued or dropped (its own
//! policy), input is delivered from the event loop through the callback. Counterpart: QEMU's
//! `chardev/`.

mod file;
mod mailbox;
mod null;
mod output;
mod pty;
mod ringbuf;
mod socket;
mod stdio;
mod stream;

use std::io;
use std::sync::Arc;

use crate::config::{ChardevConfig, ChardevKind};
use crate::errno::Errno;
use crate::poll::Poll;
use crate::socket::address::Inet;

use std::os::fd::OwnedFd;

/// Why a character device can not be had, in QEMU's words.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No socket.
    #[error(transparent)]
    Socket(#[from] crate::socket::Error),
    /// No file.
    #[error("Could not open '{path}': {}", Errno(.source))]
    Open {
        /// The path as given.
        path: String,
        /// Why.
        source: io::Error,
    },
    /// No pseudo-terminal.
    #[error("Failed to create PTY: {}", Errno(.0))]
    Pty(io::Error),
    /// Standard input or output is not there.
    #[error("Failed to use stdio: {}", Errno(.0))]
    Stdio(io::Error),
    /// No ring of that size.
    #[error("size of ringbuf chardev must be power of two")]
    RingbufSize,
    /// The registry failed while a client was waited for.
    #[error("Failed to wait for a connection: {}", Errno(.0))]
    Wait(io::Error),
    /// The caller gave up waiting for a client.
    #[error("Interrupted")]
    Interrupted,
}

/// Opens a character device. A server that is to wait for its client turns the registry until one
/// has come, or until `gives_up` says so.
///
/// # Errors
/// See [`Error`].
pub fn open(
    config: &ChardevConfig,
    poll: &Poll,
    gives_up: &dyn Fn() -> bool,
) -> Result<Arc<dyn Chardev>, Error> {
    let id = config.id.clone();
    Ok(match &config.kind {
        ChardevKind::Stdio => stdio::open(id, poll)?,
        ChardevKind::File(path) => file::open(id, path, poll)?,
        ChardevKind::Pty => pty::open(id, poll)?,
        ChardevKind::Null => null::open(id, poll),
        ChardevKind::Ringbuf { size } => ringbuf::open(id, *size, poll)?,
        ChardevKind::Unix { path, server, wait } => {
            let address = socket::Address::Unix(path.clone());
            let wanted = socket::Wanted {
                address,
                server: *server,
                wait: *wait,
            };
            socket::open(id, &wanted, poll, gives_up)?
        }
        ChardevKind::Tcp {
            host,
            port,
            server,
            wait,
        } => {
            let inet = Inet {
                host: host.clone(),
                port: port.clone(),
            };
            let address = socket::Address::Tcp(inet);
            let wanted = socket::Wanted {
                address,
                server: *server,
                wait: *wait,
            };
            socket::open(id, &wanted, poll, gives_up)?
        }
    })
}

/// Delivered from the event loop's thread.
#[derive(Debug)]
pub enum Incoming {
    /// A client connected (sockets), or the device came up: a monitor greets.
    Opened,
    /// Bytes, and descriptors that came with them (`SCM_RIGHTS`).
    Bytes(Vec<u8>, Vec<OwnedFd>),
    /// The client went away, or input ended.
    Closed,
}

/// Who gets a chardev's input. Never blocks.
pub type Receiver = Box<dyn FnMut(Incoming) + Send>;

/// A character device.
pub trait Chardev: Send + Sync {
    /// Its id (`serial0`).
    fn id(&self) -> &str;

    /// What `info chardev` shows as `filename` (`unix:/path,server=on`, `ringbuf`, …).
    fn description(&self) -> String;

    /// Queues bytes for output, never waits. Bytes beyond the device's own bound are dropped.
    fn write(&self, bytes: &[u8]);

    /// Sets who gets the input; a later call replaces the receiver.
    fn receive(&self, receiver: Receiver);

    /// Stops (`false`) or resumes (`true`) taking input from the other side; a suspended monitor
    /// leaves type-ahead where it is.
    fn set_readable(&self, readable: bool);

    /// Whether the other side is a client that connected and can be dropped (listening sockets).
    fn has_clients(&self) -> bool {
        false
    }

    /// Drops the present client, if there is one; the receiver is told `Closed`.
    fn hang_up(&self) {}

    /// Ends it: what is queued is written as far as it goes at once, nobody can connect any more,
    /// and a socket's path is gone.
    fn close(&self) {}

    /// The ring buffer behind it, if it is one.
    fn ringbuf(&self) -> Option<&dyn Ringbuf> {
        None
    }
}

/// A chardev whose output is kept in memory.
pub trait Ringbuf {
    /// Takes at most `size` of the oldest bytes.
    fn read(&self, size: usize) -> Vec<u8>;

    /// Adds bytes as if the device had written them.
    fn write(&self, bytes: &[u8]);
}

#[cfg(test)]
mod tests;
