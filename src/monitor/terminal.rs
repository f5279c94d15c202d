//! The state the terminal was in before hmpsh touched it, and the way back to it.
//!
//! Whatever ends the program (a signal, a panic, quit from another monitor) leaves the operator a
//! terminal that echoes: the settings are kept in the one place that a signal thread, a panic hook
//! and a drop can all reach.

use std::io::{self, IsTerminal, Write};
use std::sync::{Mutex, PoisonError};

use rustix::termios::{LocalModes, OptionalActions, Termios, tcgetattr, tcsetattr};

/// Settings of standard input at the start; `None` as long as they were not touched.
static SAVED: Mutex<Option<Termios>> = Mutex::new(None);

/// Keeps the present settings for [`restore`]. Does nothing if standard input is no terminal.
pub fn save() -> io::Result<()> {
    if io::stdin().is_terminal() {
        let now = tcgetattr(io::stdin())?;
        *SAVED.lock().unwrap_or_else(PoisonError::into_inner) = Some(now);
    }
    Ok(())
}

/// Puts the kept settings back; can be called any number of times, from any thread.
pub fn restore() {
    let saved = SAVED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(saved) = &*saved {
        // There is nobody left to tell.
        let _ = tcsetattr(io::stdin(), OptionalActions::Now, saved);
    }
}

/// Makes a panic restore the terminal before it is reported.
pub fn restore_on_panic() {
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        restore();
        report(panic);
    }));
}

/// Prints on standard output. A terminal that is gone is no reason to end: the machine runs on.
pub(super) fn say(text: &str) {
    let mut out = io::stdout().lock();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}

/// Keys come one by one, unechoed, and ^C is a key; until this is dropped.
pub(super) struct Keys {
    before: Termios,
}

impl Keys {
    /// Fails if standard input is no terminal.
    pub(super) fn grab() -> io::Result<Self> {
        let before = tcgetattr(io::stdin())?;
        let mut raw = before.clone();
        raw.local_modes -= LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG;
        tcsetattr(io::stdin(), OptionalActions::Now, &raw)?;
        Ok(Self { before })
    }
}

impl Drop for Keys {
    fn drop(&mut self) {
        let _ = tcsetattr(io::stdin(), OptionalActions::Now, &self.before);
    }
}
