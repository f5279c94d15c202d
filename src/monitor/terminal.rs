//! The state the terminal was in before hmpsh touched it, and the way back to it.
//!
//! Whatever ends the program (a signal, a panic, quit from another monitor) leaves the operator a
//! terminal that echoes: the settings are kept in the one place that a signal thread, a panic hook
//! and a drop can all reach. At the end the terminal is taken from whoever still reads it, so that
//! nobody can change its settings once more.

use std::env;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crossterm::cursor::Show;
use crossterm::style::ResetColor;
use crossterm::tty::IsTty;
use rustix::fs::{Mode, OFlags};
use rustix::termios::{LocalModes, OptionalActions, Termios, tcgetattr, tcsetattr};

/// Settings of standard input at the start.
static SAVED: Mutex<Saved> = Mutex::new(Saved::Untouched);

enum Saved {
    /// As whoever started us left it.
    Untouched,
    /// Changed since; it was like this.
    Settings(Termios),
    /// Given back: standard input is the terminal no longer.
    Released,
}

/// Whether an operator sits there: standard input and output are a terminal.
pub fn is_there() -> bool {
    io::stdin().is_tty() && io::stdout().is_tty()
}

/// Whether rustyline leaves line editing to the terminal.
pub(super) fn is_dumb() -> bool {
    let name = env::var("TERM").unwrap_or_default();
    ["dumb", "cons25", "emacs"]
        .iter()
        .any(|dumb| name.eq_ignore_ascii_case(dumb))
}

/// Keeps the present settings for [`restore`]. Does nothing if standard input is no terminal.
pub fn save() -> io::Result<()> {
    if io::stdin().is_tty() {
        let now = tcgetattr(io::stdin())?;
        *saved() = Saved::Settings(now);
    }
    Ok(())
}

/// Puts the kept settings back; can be called any number of times, from any thread.
pub fn restore() {
    if let Saved::Settings(settings) = &*saved() {
        // There is nobody left to tell.
        let _ = tcsetattr(io::stdin(), OptionalActions::Now, settings);
    }
}

/// Puts the kept settings back for good: from now on standard input is `/dev/null`, and a shell
/// that is between two lines finds no terminal to change.
pub fn release() {
    let mut saved = saved();
    let Saved::Settings(settings) = &*saved else {
        return;
    };
    let terminal = io::stdin().as_fd().try_clone_to_owned();
    if let Ok(nowhere) = rustix::fs::open("/dev/null", OFlags::RDWR, Mode::empty()) {
        // A failure leaves the terminal where it is, restored all the same.
        let _ = rustix::stdio::dup2_stdin(&nowhere);
    }
    // A line editor or a progress line may have hidden the cursor or left a colour.
    if !is_dumb() {
        let _ = crossterm::execute!(io::stdout(), ResetColor, Show);
    }
    let _ = match terminal {
        Ok(terminal) => tcsetattr(terminal, OptionalActions::Now, settings),
        Err(_) => tcsetattr(io::stdin(), OptionalActions::Now, settings),
    };
    *saved = Saved::Released;
}

/// Whether the terminal was given back for good.
pub(super) fn is_released() -> bool {
    matches!(*saved(), Saved::Released)
}

/// Passes keys on one by one and unechoed, for a program that has no shell: ^C and its like keep
/// their meaning.
pub fn pass_keys() -> io::Result<()> {
    save()?;
    let mut settings = tcgetattr(io::stdin())?;
    settings.local_modes -= LocalModes::ICANON | LocalModes::ECHO;
    Ok(tcsetattr(io::stdin(), OptionalActions::Now, &settings)?)
}

fn saved() -> MutexGuard<'static, Saved> {
    SAVED.lock().unwrap_or_else(PoisonError::into_inner)
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
pub fn say(text: &str) {
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
