//! A migration in the foreground of a terminal: its progress line, and the keys that matter.
//!
//! From one second after the start a line tells what is done. ^C cancels, ^Z goes on without
//! waiting; all else that is typed is kept for the prompt.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use super::notices::Notices;
use crate::migration::stats::{Snapshot, Status};
use crate::monitor::interpreter::Interpreter;
use crate::monitor::progress::Progress;
use crate::monitor::terminal::say;

/// Why waiting ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// The migration has ended, or needs the operator.
    Over,
    /// The operator does not want to wait.
    Detached,
}

/// Waits; what is typed goes to `ahead`, what others print above the progress.
pub(super) fn wait<I: Interpreter>(
    interpreter: &mut I,
    ahead: &mut String,
    notices: &Notices,
) -> End {
    match wakeup() {
        Ok(ended) => {
            let foreground = Foreground::new(interpreter, ahead);
            notices.stand_above(Some(foreground.line.clone()));
            let end = foreground.run(&ended);
            notices.stand_above(None);
            end
        }
        Err(error) => {
            say(&format!("Can not wait for the migration: {error}\n"));
            End::Detached
        }
    }
}

fn wakeup() -> io::Result<Arc<OwnedFd>> {
    Ok(Arc::new(eventfd(0, EventfdFlags::CLOEXEC)?))
}

struct Foreground<'a, I> {
    interpreter: &'a mut I,
    ahead: &'a mut String,
    progress: Progress,
    line: ProgressBar,
}

impl<'a, I: Interpreter> Foreground<'a, I> {
    fn new(interpreter: &'a mut I, ahead: &'a mut String) -> Self {
        let line = ProgressBar::with_draw_target(Some(100), ProgressDrawTarget::hidden());
        // The template is a constant; should it ever be wrong, the default tells as much.
        let style = ProgressStyle::with_template("{msg}");
        line.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        Self {
            interpreter,
            ahead,
            progress: Progress::default(),
            line,
        }
    }

    fn run(mut self, ended: &Arc<OwnedFd>) -> End {
        let wake = Arc::clone(ended);
        self.interpreter.when_migration_ends(Box::new(move |_| {
            // An eventfd that was never written takes the eight bytes at once.
            let _ = rustix::io::write(&*wake, &1_u64.to_ne_bytes());
        }));
        let mut next = Instant::now() + TICK;
        let mut reads_keys = true;
        loop {
            let stdin = io::stdin();
            let mut fds = vec![PollFd::from_borrowed_fd(ended.as_fd(), PollFlags::IN)];
            if reads_keys {
                fds.push(PollFd::from_borrowed_fd(stdin.as_fd(), PollFlags::IN));
            }
            let patience = Timespec::try_from(next.saturating_duration_since(Instant::now())).ok();
            // An interrupted poll reports nothing ready: the loop goes round once more.
            let _ = poll(&mut fds, patience.as_ref());
            let is_ready = |index: usize| fds.get(index).is_some_and(|fd| !fd.revents().is_empty());
            let (is_over, has_input) = (is_ready(0), is_ready(1));
            if is_over {
                self.finish();
                return End::Over;
            }
            if has_input {
                match self.keys() {
                    Ok(true) => {
                        self.line.finish_and_clear();
                        return End::Detached;
                    }
                    Ok(false) => (),
                    Err(_) => reads_keys = false,
                }
            }
            if Instant::now() >= next {
                next += TICK;
                self.tick();
            }
        }
    }

    /// Takes what was typed; true if the operator does not want to wait.
    fn keys(&mut self) -> io::Result<bool> {
        let mut bytes = [0; 1024];
        // Not through std's buffer: what it took too much of would never reach the prompt.
        let count = rustix::io::read(io::stdin(), &mut bytes)?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        for character in String::from_utf8_lossy(&bytes[..count]).chars() {
            match character {
                CTRL_C => {
                    if let Some(line) = self.interpreter.cancel() {
                        self.line.suspend(|| say(&format!("{line}\n")));
                    }
                }
                CTRL_Z => return Ok(true),
                BACKSPACE | DELETE if !self.ahead.ends_with('\n') => {
                    self.ahead.pop();
                }
                _ if self.ahead.len() >= AHEAD_LIMIT => (),
                '\r' => self.ahead.push('\n'),
                other if other == '\n' || !other.is_control() => self.ahead.push(other),
                _ => (),
            }
        }
        Ok(false)
    }

    fn tick(&mut self) {
        let snapshot = self.interpreter.migration();
        if self.progress.is_silent() {
            self.line.set_draw_target(ProgressDrawTarget::stdout());
        }
        let percent = self.progress.reached(snapshot.percent());
        if self.line.is_hidden() {
            // A dumb terminal: only what a pipe would get.
            return say(&format!("Completed {percent} %\r"));
        }
        self.line
            .set_message(format!("Completed {percent} %{}", figures(&snapshot)));
    }

    /// Leaves the line as the last thing said, if anything was said.
    fn finish(&mut self) {
        if self.progress.is_silent() {
            return;
        }
        let snapshot = self.interpreter.migration();
        let percent = match snapshot.status {
            Status::Completed => 100,
            _ => self.progress.reached(snapshot.percent()),
        };
        if self.line.is_hidden() {
            say(&format!("Completed {percent} %"));
        } else {
            self.line
                .abandon_with_message(format!("Completed {percent} %{}", figures(&snapshot)));
        }
        say("\n");
    }
}

/// Bytes, rate, what remains, pass and expected downtime.
fn figures(snapshot: &Snapshot) -> String {
    let Some(ram) = &snapshot.ram else {
        return String::new();
    };
    let mebibytes = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    let downtime = match snapshot.downtime {
        Some(downtime) => format!("downtime {downtime} ms"),
        None => format!("expected downtime {} ms", snapshot.expected_downtime),
    };
    format!(
        "  {:.1} MiB sent, {:.0} MB/s, {:.1} MiB remaining, pass {}, {downtime}",
        mebibytes(ram.transferred),
        ram.mbps / 8.0,
        mebibytes(ram.remaining),
        snapshot.pass,
    )
}

const TICK: Duration = Duration::from_secs(1);

/// Bytes kept for the prompt.
const AHEAD_LIMIT: usize = 4096;

const CTRL_C: char = '\x03';
const CTRL_Z: char = '\x1a';
const BACKSPACE: char = '\x08';
const DELETE: char = '\x7f';

#[cfg(test)]
mod tests {
    use super::*;
    use crate::migration::stats::RamStats;

    #[test]
    fn tells_the_figures() {
        assert_eq!(figures(&Snapshot::default()), "");
        let ram = RamStats {
            transferred: 3 << 19,
            remaining: 1 << 20,
            mbps: 800.0,
            ..RamStats::default()
        };
        let snapshot = Snapshot {
            ram: Some(ram),
            pass: 2,
            expected_downtime: 40,
            ..Snapshot::default()
        };
        assert_eq!(
            figures(&snapshot),
            "  1.5 MiB sent, 100 MB/s, 1.0 MiB remaining, pass 2, expected downtime 40 ms"
        );
    }
}
