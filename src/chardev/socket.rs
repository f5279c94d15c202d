//! A unix or TCP socket: a server with one client at a time, others waiting in the backlog, or a
//! client.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use super::mailbox::Mailbox;
use super::stream::{Input, Stream};
use super::{Chardev, Error, Incoming, Receiver};
use crate::poll::{Interest, Poll, Registration};
use crate::socket::address::Inet;
use crate::socket::connect;
use crate::socket::listen::Listener;

/// How long connecting to a server may take.
const CONNECTING: Duration = Duration::from_secs(10);
/// How long to leave the backlog alone when accepting fails (out of descriptors).
const PAUSE: Duration = Duration::from_millis(100);
/// How often a start that waits for a client asks whether to give up.
const ASK: Duration = Duration::from_millis(100);

struct Socket {
    id: String,
    poll: Poll,
    mailbox: Mailbox,
    end: End,
    /// What the listener's registration holds on to; the [`Listener`] itself owns the path.
    knock: Option<Arc<OwnedFd>>,
    state: Mutex<State>,
    /// Ourselves, for tasks.
    this: Weak<Self>,
}

/// Where clients come from, or where we went.
enum End {
    Server(Listener),
    Client(String),
}

#[derive(Default)]
struct State {
    link: Option<Link>,
    /// Waiting for a client, or for a moment to wait again.
    listening: Option<Registration>,
    /// Counts connections.
    generation: u64,
    readable: bool,
}

struct Link {
    stream: Stream,
    description: String,
}

/// What the socket is to be.
pub(super) struct Wanted {
    pub(super) address: Address,
    /// Listen or connect.
    pub(super) server: bool,
    /// Whether a server waits for its first client.
    pub(super) wait: bool,
}

pub(super) enum Address {
    Unix(PathBuf),
    Tcp(Inet),
}

/// Listens or connects; a server that is to wait turns the registry until a client is there.
pub(super) fn open(
    id: String,
    wanted: &Wanted,
    poll: &Poll,
    gives_up: &dyn Fn() -> bool,
) -> Result<Arc<dyn Chardev>, Error> {
    let (end, connected) = match (&wanted.address, wanted.server) {
        (Address::Unix(path), true) => (End::Server(Listener::unix(path)?), None),
        (Address::Tcp(inet), true) => (End::Server(Listener::tcp(inet)?), None),
        (Address::Unix(path), false) => {
            let socket = connect::unix(path, CONNECTING, None)?;
            (
                End::Client(format!("unix:{}", path.display())),
                Some(socket),
            )
        }
        (Address::Tcp(inet), false) => {
            let socket = connect::tcp(inet, CONNECTING, None)?;
            (End::Client(format!("tcp:{inet}")), Some(socket))
        }
    };
    let knock = match &end {
        End::Server(listener) => {
            if listener.is_exposed() {
                log::warn!(
                    "chardev {id}: {} is open to every machine that can reach it",
                    listener.address()
                );
            }
            Some(Arc::new(
                listener.as_fd().try_clone_to_owned().map_err(Error::Wait)?,
            ))
        }
        End::Client(_) => None,
    };
    let socket = Arc::new_cyclic(|this| Socket {
        this: Weak::clone(this),
        id,
        poll: poll.clone(),
        mailbox: Mailbox::default(),
        end,
        knock,
        state: Mutex::default(),
    });
    match connected {
        Some(connected) => socket.connected(connected).map_err(Error::Wait)?,
        None => socket.listen(),
    }
    if wanted.server && wanted.wait {
        socket.wait(gives_up)?;
    }
    Ok(socket)
}

impl Socket {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait(&self, gives_up: &dyn Fn() -> bool) -> Result<(), Error> {
        log::warn!("info: waiting for connection on: {}", self.description());
        while self.lock().link.is_none() {
            if gives_up() {
                return Err(Error::Interrupted);
            }
            self.poll.turn(Some(ASK)).map_err(Error::Wait)?;
        }
        Ok(())
    }

    /// Waits for the next client.
    fn listen(self: &Arc<Self>) {
        let Some(knock) = &self.knock else {
            return;
        };
        let weak = Arc::downgrade(self);
        let ready = Box::new(move |_| {
            if let Some(socket) = Weak::upgrade(&weak) {
                socket.accept();
            }
        });
        let interest = Interest {
            readable: true,
            ..Interest::default()
        };
        self.hold(self.poll.register(Arc::clone(knock), interest, ready));
    }

    fn accept(self: &Arc<Self>) {
        let End::Server(listener) = &self.end else {
            return;
        };
        let accepted = listener.accept().and_then(|client| self.connected(client));
        match accepted {
            Ok(()) => self.mailbox.deliver(Incoming::Opened),
            Err(error) if is_passing(&error) => {}
            Err(error) => {
                log::warn!(
                    "chardev {}: accepting failed: {}",
                    self.id,
                    crate::errno::Errno(&error)
                );
                let weak = Arc::downgrade(self);
                let again = Box::new(move || {
                    if let Some(socket) = Weak::upgrade(&weak) {
                        socket.listen();
                    }
                });
                self.hold(self.poll.timer(Instant::now() + PAUSE, None, again));
            }
        }
    }

    /// Replaces what is waited for.
    fn hold(&self, registration: Registration) {
        let old = self.lock().listening.replace(registration);
        drop(old);
    }

    /// From now on this is the connection.
    fn connected(self: &Arc<Self>, socket: OwnedFd) -> io::Result<()> {
        let description = describe(&socket, &self.end);
        let weak = Arc::downgrade(self);
        let told = Box::new(move |incoming| {
            if let Some(socket) = Weak::upgrade(&weak) {
                socket.told(incoming);
            }
        });
        let socket = Arc::new(socket);
        let output = Arc::clone(&socket);
        let stream = Stream::new(socket, output, Input::WithDescriptors, &self.poll, told)?;
        log::debug!("chardev {}: connected: {description}", self.id);
        let mut state = self.lock();
        stream.set_readable(state.readable);
        state.link = Some(Link {
            stream,
            description,
        });
        state.generation += 1;
        let listening = state.listening.take();
        drop(state);
        drop(listening);
        Ok(())
    }

    fn told(self: &Arc<Self>, incoming: Incoming) {
        let is_over = matches!(incoming, Incoming::Closed);
        if is_over {
            log::debug!("chardev {}: disconnected", self.id);
            let link = self.lock().link.take();
            drop(link);
        }
        self.mailbox.deliver(incoming);
        if is_over {
            self.listen();
        }
    }
}

impl Chardev for Socket {
    fn id(&self) -> &str {
        &self.id
    }

    fn description(&self) -> String {
        match (&self.lock().link, &self.end) {
            (Some(link), _) => link.description.clone(),
            (None, End::Server(listener)) => {
                format!("disconnected:{},server=on", listener.address())
            }
            (None, End::Client(address)) => format!("disconnected:{address}"),
        }
    }

    /// While nobody is connected, what is written is lost.
    fn write(&self, bytes: &[u8]) {
        if let Some(link) = &self.lock().link {
            link.stream.write(bytes);
        }
    }

    fn receive(&self, receiver: Receiver) {
        self.mailbox.set(receiver);
        self.set_readable(true);
        let state = self.lock();
        if state.link.is_none() {
            return;
        }
        // Connected before anybody cared: told soon, unless it is another client by then.
        let (weak, generation) = (Weak::clone(&self.this), state.generation);
        self.poll.defer(Box::new(move || {
            if let Some(socket) = weak.upgrade() {
                let state = socket.lock();
                let is_same = state.link.is_some() && state.generation == generation;
                drop(state);
                if is_same {
                    socket.mailbox.deliver(Incoming::Opened);
                }
            }
        }));
    }

    fn has_clients(&self) -> bool {
        matches!(self.end, End::Server(_))
    }

    /// Takes effect soon: it is called by the receiver, which must not be told meanwhile.
    fn hang_up(&self) {
        let (weak, generation) = (Weak::clone(&self.this), self.lock().generation);
        self.poll.defer(Box::new(move || {
            if let Some(socket) = weak.upgrade() {
                let state = socket.lock();
                let is_same = state.link.is_some() && state.generation == generation;
                drop(state);
                if is_same {
                    socket.told(Incoming::Closed);
                }
            }
        }));
    }

    fn close(&self) {
        let mut state = self.lock();
        let (listening, link) = (state.listening.take(), state.link.take());
        drop(state);
        drop((listening, link));
        if let End::Server(listener) = &self.end {
            listener.unlink();
        }
    }

    fn set_readable(&self, readable: bool) {
        let mut state = self.lock();
        state.readable = readable;
        if let Some(link) = &state.link {
            link.stream.set_readable(readable);
        }
    }
}

/// Whether the next client may fare better: nobody waits, or the one who did is gone again.
fn is_passing(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionReset, Interrupted, WouldBlock};
    matches!(
        error.kind(),
        WouldBlock | Interrupted | ConnectionAborted | ConnectionReset
    )
}

/// As `info chardev` shows a connection.
fn describe(socket: &OwnedFd, end: &End) -> String {
    let socket = socket2::SockRef::from(socket);
    let inet = |address: io::Result<socket2::SockAddr>| address.ok()?.as_socket();
    let ends: Option<(SocketAddr, SocketAddr)> =
        inet(socket.local_addr()).zip(inet(socket.peer_addr()));
    match (ends, end) {
        (Some((ours, theirs)), End::Server(_)) => format!("tcp:{ours},server=on <-> {theirs}"),
        (Some((ours, theirs)), End::Client(_)) => format!("tcp:{ours} <-> {theirs}"),
        (None, End::Server(listener)) => format!("{},server=on", listener.address()),
        (None, End::Client(address)) => address.clone(),
    }
}
