//! A session on a character device: the monitors of pipes, files and sockets.
//!
//! Glue only: input to the conversation, output to the device, ticks from the poll registry, and
//! the end of a migration brought to the event loop's thread. QEMU: `monitor_init_hmp`.

use std::io::{self, Write};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::conversation::{Action, Conversation};
use super::history::History;
use super::interpreter::Interpreter;
use super::session::Session;
use crate::chardev::{Chardev, Incoming};
use crate::control::Control;
use crate::poll::{Poll, Registration};

/// Puts a monitor on `chardev`. It lives as long as the device.
pub fn attach(control: &Arc<Control>, chardev: &Arc<dyn Chardev>, poll: &Poll, prompt: &str) {
    let lines = Box::new(Lines(Raw(Arc::clone(chardev))));
    let session = Session::new(Arc::clone(control), lines, History::default());
    let output = Box::new(Raw(Arc::clone(chardev)));
    let wire = Arc::new(Mutex::new(Wire {
        conversation: Conversation::new(session, prompt, output, chardev.has_clients()),
        chardev: Arc::clone(chardev),
        poll: poll.clone(),
        ticking: None,
        awaited: 0,
    }));
    chardev.receive(Box::new(move |incoming| incoming_to(&wire, incoming)));
}

struct Wire {
    conversation: Conversation<Session>,
    chardev: Arc<dyn Chardev>,
    poll: Poll,
    /// There while a migration is waited for.
    ticking: Option<Registration>,
    /// Counts migrations that were to be told of: the end of an earlier one must not end the wait
    /// for a later one.
    awaited: u64,
}

fn incoming_to(wire: &Arc<Mutex<Wire>>, incoming: Incoming) {
    let mut locked = lock(wire);
    let action = match incoming {
        Incoming::Opened => {
            locked.conversation.opened();
            Action::None
        }
        Incoming::Closed => {
            locked.conversation.closed();
            locked.stop_waiting();
            Action::None
        }
        Incoming::Bytes(bytes, fds) => locked.conversation.input(&bytes, fds),
    };
    locked.follow(action, wire);
}

impl Wire {
    fn follow(&mut self, action: Action, this: &Arc<Mutex<Self>>) {
        match action {
            Action::None => (),
            Action::HangUp => self.chardev.hang_up(),
            Action::Suspend => {
                self.chardev.set_readable(false);
                let ticked = Arc::clone(this);
                self.ticking = Some(self.poll.timer(
                    Instant::now() + TICK,
                    Some(TICK),
                    Box::new(move || lock(&ticked).conversation.tick()),
                ));
                self.await_end(this);
            }
            Action::Await => self.await_end(this),
        }
    }

    fn await_end(&mut self, this: &Arc<Mutex<Self>>) {
        self.awaited += 1;
        let awaited = self.awaited;
        let (poll, ended) = (self.poll.clone(), Arc::clone(this));
        // Called on the migration's thread, or at once: the lock held here must be free before
        // the end is dealt with.
        self.conversation
            .interpreter()
            .when_migration_ends(Box::new(move |_| {
                poll.defer(Box::new(move || {
                    let mut wire = lock(&ended);
                    wire.ended(awaited, &ended);
                }));
            }));
    }

    fn ended(&mut self, awaited: u64, this: &Arc<Mutex<Self>>) {
        if awaited == self.awaited && self.conversation.is_waiting() {
            self.stop_waiting();
            let action = self.conversation.resume();
            self.follow(action, this);
        }
        let action = self.conversation.catch_up();
        self.follow(action, this);
    }

    fn stop_waiting(&mut self) {
        self.ticking = None;
        self.chardev.set_readable(true);
    }
}

fn lock(wire: &Mutex<Wire>) -> std::sync::MutexGuard<'_, Wire> {
    wire.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A device as a place to write to.
struct Raw(Arc<dyn Chardev>);

impl Write for Raw {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Ends lines with CR LF, as every line that leaves a monitor.
struct Lines<W>(W);

impl<W: Write> Write for Lines<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut converted = Vec::with_capacity(bytes.len() + 16);
        for byte in bytes {
            if *byte == b'\n' {
                converted.push(b'\r');
            }
            converted.push(*byte);
        }
        self.0.write_all(&converted)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

/// From the start of a migration in the foreground to the first word about it, and between two.
const TICK: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_end_with_cr_lf() {
        let mut out = Vec::new();
        Lines(&mut out)
            .write_all(b"a\nb\n\n")
            .expect("a vector takes all");
        assert_eq!(out, b"a\r\nb\r\n\r\n");
    }
}
