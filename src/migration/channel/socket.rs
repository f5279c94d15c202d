//! Channels over sockets: tcp, unix, and a socket that came as a descriptor.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::sockopt::{set_tcp_congestion, socket_domain};
use rustix::net::{AddressFamily, RecvFlags, Shutdown, recv, shutdown};
use socket2::SockRef;

use super::descriptor::{Descriptor, Kind};
use super::outq::unacknowledged;
use super::{Cancel, Channel, Fault, Listener};
use crate::errno;
use crate::iov::{In, Out};
use crate::socket::listen::Listener as Socket;

/// A connected stream socket.
#[derive(Debug)]
pub(super) struct SocketChannel {
    wire: Descriptor,
}

impl SocketChannel {
    /// Takes over a connected, non-blocking socket.
    pub(super) fn new(socket: OwnedFd, cancel: &Arc<Cancel>) -> Self {
        unpace(&socket);
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

    fn part(&mut self, words: &[u8]) {
        // A peer that is gone already needs none.
        let _ = crate::iov::write(self.wire.as_fd(), &[Out::from(words)]);
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

/// A listening socket. Clients wait side by side until one of them has sent as much as a stream's
/// magic and version, so that one who never does keeps nobody out.
#[derive(Debug)]
pub(super) struct SocketListener {
    socket: Socket,
    cancel: Arc<Cancel>,
    /// Connected and silent, oldest first.
    silent: Vec<(OwnedFd, Instant)>,
    /// Whether to leave the backlog alone for a while.
    is_exhausted: bool,
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
            silent: Vec::new(),
            is_exhausted: false,
        }
    }

    /// Takes in whoever waits.
    fn admit(&mut self) -> io::Result<()> {
        self.is_exhausted = false;
        while self.silent.len() < MOST_SILENT {
            match self.socket.accept() {
                Ok(client) => self.silent.push((client, Instant::now())),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if is_passing(&error) => {}
                Err(error) if is_defect(&error) => return Err(error),
                Err(error) => {
                    // Out of descriptors or memory, a network that is down: it may get better.
                    log::warn!("Unable to accept connection: {}", errno::Errno(&error));
                    self.is_exhausted = true;
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    /// Waits for a client, for a word of one, or until one has been silent for too long.
    fn wait(&self) -> io::Result<()> {
        // One who has begun to speak is not polled: that would return at once.
        let (quiet, begun): (Vec<_>, Vec<_>) = self
            .silent
            .iter()
            .map(|(client, _)| client.as_fd())
            .partition(|client| heard(client) == Some(0));
        let mut fds: Vec<PollFd<'_>> = std::iter::once(self.cancel.event())
            .chain(quiet)
            .map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN))
            .collect();
        if self.silent.len() < MOST_SILENT && !self.is_exhausted {
            fds.push(PollFd::new(&self.socket, PollFlags::IN));
        }
        let oldest = self
            .silent
            .first()
            .map(|(_, since)| (*since + SILENCE).saturating_duration_since(Instant::now()));
        let pause = self.is_exhausted.then_some(PAUSE);
        let glance = (!begun.is_empty()).then_some(GLANCE);
        let patience = [oldest, pause, glance].into_iter().flatten().min();
        let timeout = patience.and_then(|patience| Timespec::try_from(patience).ok());
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
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
            self.admit().map_err(failed)?;
            // Gone without a word counts as one: the script says what is wrong with it.
            let speaks = |(client, _): &(OwnedFd, Instant)| heard(client).is_none_or(|n| n >= WORD);
            if let Some(index) = self.silent.iter().position(speaks) {
                let (client, _) = self.silent.remove(index);
                return Ok(Box::new(SocketChannel::new(client, &self.cancel)));
            }
            self.silent.retain(|(_, since)| {
                let is_young = since.elapsed() < SILENCE;
                if !is_young {
                    let seconds = SILENCE.as_secs();
                    log::error!(
                        "A client has sent nothing to go by for {seconds} seconds: dropped"
                    );
                }
                is_young
            });
            self.wait().map_err(failed)?;
        }
    }

    fn address(&self) -> Option<String> {
        Some(self.socket.address())
    }

    fn can_repeat(&self) -> bool {
        true
    }
}

/// Inside one machine there is no bottleneck to find and nobody to share it with: congestion control
/// that paces (BBR) halves what the processors could move. Between machines it stays as the
/// administrator has set it.
fn unpace(socket: &OwnedFd) {
    let ends = SockRef::from(socket);
    let ends = [ends.local_addr(), ends.peer_addr()];
    let [here, there] = ends.map(|end| end.ok().and_then(|end| Some(end.as_socket()?.ip())));
    if here.is_some() && here == there {
        // Part of every kernel, and allowed to everyone. Where it is not, it is slower.
        let _ = set_tcp_congestion(socket, "reno");
    }
}

/// How many bytes a client has sent, as far as [`WORD`]; none if it will send no more.
fn heard(client: impl AsFd) -> Option<usize> {
    let mut word = [0; WORD];
    match recv(&client, &mut word, RecvFlags::PEEK | RecvFlags::DONTWAIT) {
        Ok((0, _)) => None,
        Ok((count, _)) if count < WORD && has_hung_up(&client) => None,
        Ok((count, _)) => Some(count),
        Err(Errno::AGAIN | Errno::INTR) => Some(0),
        Err(_) => None,
    }
}

fn has_hung_up(client: impl AsFd) -> bool {
    let mut fds = [PollFd::new(&client, PollFlags::RDHUP)];
    matches!(poll(&mut fds, Some(&Timespec::default())), Ok(1..))
}

/// Whether accepting will never work again.
fn is_defect(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EBADF | libc::EINVAL | libc::ENOTSOCK | libc::EFAULT)
    )
}

/// Whether the next client may fare better: nobody waits, or the one who did is gone again.
fn is_passing(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionReset, Interrupted, WouldBlock};
    matches!(
        error.kind(),
        WouldBlock | Interrupted | ConnectionAborted | ConnectionReset
    )
}

/// Bytes of magic and version.
const WORD: usize = 8;
/// How often to look at one who has begun to speak.
const GLANCE: Duration = Duration::from_millis(20);
/// How long a client may take for that.
const SILENCE: Duration = Duration::from_secs(5);
/// How many may be.
const MOST_SILENT: usize = 16;
/// How long to leave the backlog alone when accepting fails.
const PAUSE: Duration = Duration::from_millis(100);
