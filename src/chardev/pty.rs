//! A pseudo-terminal; its name is printed at the start.
//!
//! Linux tells when the last one leaves the other side, but not when somebody comes: while nobody
//! is there the other side is looked at from time to time.

use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{OptionalActions, tcgetattr, tcsetattr};

use super::mailbox::Mailbox;
use super::stream::{Input, Stream};
use super::{Chardev, Error, Incoming, Receiver};
use crate::poll::{Poll, Registration};

/// How often an empty terminal is looked at.
const LOOK: Duration = Duration::from_millis(200);

struct Pty {
    id: String,
    name: String,
    poll: Poll,
    master: Arc<OwnedFd>,
    mailbox: Mailbox,
    state: Mutex<State>,
    /// Ourselves, for timers.
    this: Weak<Self>,
}

struct State {
    /// Somebody is there.
    stream: Option<Stream>,
    /// Nobody is there.
    looking: Option<Registration>,
    readable: bool,
}

/// Opens one and prints where it is.
pub(super) fn open(id: String, poll: &Poll) -> Result<Arc<dyn Chardev>, Error> {
    let (master, name) = terminal().map_err(Error::Pty)?;
    // Nobody who listens there any more is no reason not to start.
    let _ = writeln!(
        io::stdout(),
        "char device redirected to {name} (label {id})"
    );
    let pty = Arc::new_cyclic(|this| Pty {
        this: Weak::clone(this),
        id,
        name,
        poll: poll.clone(),
        master: Arc::new(master),
        mailbox: Mailbox::default(),
        state: Mutex::new(State {
            stream: None,
            looking: None,
            readable: false,
        }),
    });
    pty.look();
    Ok(pty)
}

/// A terminal in raw mode that nobody has open.
fn terminal() -> io::Result<(OwnedFd, String)> {
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    grantpt(&master)?;
    unlockpt(&master)?;
    rustix::io::ioctl_fionbio(&master, true)?;
    let name = ptsname(&master, Vec::new())?;
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
    let slave = rustix::fs::open(&name, flags, Mode::empty())?;
    let mut mode = tcgetattr(&slave)?;
    mode.make_raw();
    tcsetattr(&slave, OptionalActions::Now, &mode)?;
    Ok((master, name.to_string_lossy().into_owned()))
}

impl Pty {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Looks at the other side until somebody is there.
    fn look(self: &Arc<Self>) {
        let weak = Arc::downgrade(self);
        let tick = Box::new(move || {
            if let Some(pty) = Weak::upgrade(&weak)
                && !is_empty(&pty.master)
            {
                pty.arrive();
            }
        });
        let looking = self.poll.timer(Instant::now() + LOOK, Some(LOOK), tick);
        let old = self.lock().looking.replace(looking);
        drop(old);
    }

    fn arrive(self: &Arc<Self>) {
        let weak = Arc::downgrade(self);
        let told = Box::new(move |incoming| {
            if let Some(pty) = Weak::upgrade(&weak) {
                pty.told(incoming);
            }
        });
        let (input, output) = (Arc::clone(&self.master), Arc::clone(&self.master));
        let Ok(stream) = Stream::new(input, output, Input::Plain, &self.poll, told) else {
            return;
        };
        let mut state = self.lock();
        stream.set_readable(state.readable);
        state.stream = Some(stream);
        let looking = state.looking.take();
        drop(state);
        drop(looking);
        self.mailbox.deliver(Incoming::Opened);
    }

    fn told(self: &Arc<Self>, incoming: Incoming) {
        if matches!(incoming, Incoming::Closed) {
            let stream = self.lock().stream.take();
            drop(stream);
            self.look();
        }
        self.mailbox.deliver(incoming);
    }
}

impl Chardev for Pty {
    fn id(&self) -> &str {
        &self.id
    }

    fn description(&self) -> String {
        format!("pty:{}", self.name)
    }

    /// While nobody is there, what is written is lost.
    fn write(&self, bytes: &[u8]) {
        if let Some(stream) = &self.lock().stream {
            stream.write(bytes);
        }
    }

    /// Whoever is there already is announced as if he had just come.
    fn receive(&self, receiver: Receiver) {
        self.mailbox.set(receiver);
        let mut state = self.lock();
        state.readable = true;
        let stream = state.stream.take();
        let was_there = stream.is_some();
        drop(state);
        drop(stream);
        if let Some(pty) = self.this.upgrade()
            && was_there
        {
            pty.look();
        }
    }

    fn set_readable(&self, readable: bool) {
        let mut state = self.lock();
        state.readable = readable;
        if let Some(stream) = &state.stream {
            stream.set_readable(readable);
        }
    }
}

/// Whether nobody has the other side open.
fn is_empty(master: &OwnedFd) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(master.as_fd(), PollFlags::IN)];
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    poll(&mut fds, Some(&now)).is_err() || fds[0].revents().contains(PollFlags::HUP)
}
