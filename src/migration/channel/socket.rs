//! Channels over sockets: tcp, unix, and a socket that came as a descriptor.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::PollFlags;
use rustix::net::{AddressFamily, Shutdown, shutdown, sockopt::socket_domain};

use super::descriptor::{Descriptor, Kind};
use super::outq::unacknowledged;
use super::{Cancel, Channel, Fault, Listener};
use crate::iov::{In, Out};
use crate::socket::listen::Listener as Socket;
use crate::socket::{Waited, wait};

/// A connected stream socket.
#[derive(Debug)]
pub(super) struct SocketChannel {
    wire: Descriptor,
}

impl SocketChannel {
    /// Takes over a connected, non-blocking socket.
    pub(super) fn new(socket: OwnedFd, cancel: &Arc<Cancel>) -> Self {
        Self {
            wire: Descriptor::new(socket, Kind::Socket, cancel),
        }
    }
}

impl Channel for SocketChannel {
    fn write(&mut self, pieces: &[Out<'_>], patience: Duration) -> Result<usize, Fault> {
        self.wire.write(pieces, patience)
    }

    fn read(&mut self, rooms: &mut [In<'_>], patience: Duration) -> Result<usize, Fault> {
        self.wire.read(rooms, patience)
    }

    fn is_duplex(&self) -> bool {
        true
    }

    fn commit(&mut self) -> Result<(), Fault> {
        Ok(())
    }

    fn abandon(&mut self) {
        // A peer that is gone already is as good.
        let _ = shutdown(&self.wire, Shutdown::Both);
    }

    fn drain(&mut self, patience: Duration) -> bool {
        // What is written to a unix socket is in the peer's queue at once.
        let is_tcp = matches!(
            socket_domain(&self.wire),
            Ok(AddressFamily::INET | AddressFamily::INET6)
        );
        if !is_tcp {
            return true;
        }
        let mut end = Instant::now() + patience;
        let mut least = usize::MAX;
        loop {
            match unacknowledged(self.wire.as_fd()) {
                Ok(0) => return true,
                Ok(count) if count < least => {
                    least = count;
                    end = Instant::now() + patience;
                }
                _ => {}
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() || self.wire.cancel().is_cancelled() {
                return false;
            }
            // No event tells that the queue is empty: look again.
            std::thread::sleep(left.min(Duration::from_millis(1)));
        }
    }
}

/// A listening socket.
#[derive(Debug)]
pub(super) struct SocketListener {
    socket: Socket,
    cancel: Arc<Cancel>,
}

impl SocketListener {
    /// Says so when other machines can connect.
    pub(super) fn new(socket: Socket, cancel: &Arc<Cancel>) -> Self {
        if socket.is_exposed() {
            log::warn!(
                "{} is open to every machine that can reach it, without TLS",
                socket.address()
            );
        }
        Self {
            socket,
            cancel: Arc::clone(cancel),
        }
    }
}

impl Listener for SocketListener {
    fn accept(&mut self) -> Result<Box<dyn Channel>, Fault> {
        let failed = |source| Fault::Io {
            what: "Unable to accept connection".to_owned(),
            source,
        };
        loop {
            if self.cancel.is_cancelled() {
                return Err(Fault::Cancelled);
            }
            match self.socket.accept() {
                Ok(client) => return Ok(Box::new(SocketChannel::new(client, &self.cancel))),
                Err(error) if is_passing(&error) => {}
                Err(error) => return Err(failed(error)),
            }
            let interrupt = Some(self.cancel.event());
            if wait(self.socket.as_fd(), PollFlags::IN, Duration::MAX, interrupt).map_err(failed)?
                == Waited::Interrupted
            {
                return Err(Fault::Cancelled);
            }
        }
    }

    fn address(&self) -> Option<String> {
        Some(self.socket.address())
    }

    fn can_repeat(&self) -> bool {
        true
    }
}

/// Whether the next client may fare better: nobody waits, or the one who did is gone again.
fn is_passing(error: &std::io::Error) -> bool {
    use std::io::ErrorKind::{ConnectionAborted, ConnectionReset, Interrupted, WouldBlock};
    matches!(
        error.kind(),
        WouldBlock | Interrupted | ConnectionAborted | ConnectionReset
    )
}
