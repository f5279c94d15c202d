//! One operator's session: what a command line is executed in.
//!
//! It knows the verbs, where output goes and what stays from command to command, but no terminal:
//! whoever drives it (the wire, the terminal's shell, `-e`) reads lines, shows the prompt and
//! waits for a migration in the foreground. QEMU: `Monitor` and `handle_hmp_command`.

use std::collections::VecDeque;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::args::{self, Sticky};
use super::complete::{self, Candidates};
use super::expr;
use super::hint;
use super::history::History;
use super::registers;
use crate::control::{self, Control, NamedFds};
use crate::migration::stats::{Snapshot, Status};

mod context;

/// Where a session prints. `\n` ends a line; whoever is behind it makes of it what the other side
/// needs.
pub type Output = Box<dyn Write + Send>;

/// A human monitor session.
pub struct Session {
    pub(super) control: Arc<Control>,
    output: Output,
    is_muted: bool,
    history: History,
    /// Named with `getfd`.
    pub(super) fds: NamedFds,
    /// Arrived, not named yet.
    arrived: VecDeque<OwnedFd>,
    /// The default vCPU.
    pub(super) cpu: usize,
    sticky: Sticky,
    /// Set by a command; read when its line has been executed.
    pub(super) next: Next,
}

/// What a command asks of whoever drives the session.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Next {
    /// The next line.
    #[default]
    Prompt,
    /// Wait for the migration.
    Wait,
    /// End.
    Quit,
}

/// How the execution of a line ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Executed; prompt for the next.
    Done,
    /// Refused or failed, and said so; prompt for the next.
    Failed,
    /// A migration runs in the foreground: no prompt until it has ended
    /// ([`Control::when_migration_ends`]), then [`Session::conclude`].
    Suspended,
    /// The program is about to end: no prompt any more.
    Quit,
}

/// Why a command was refused or failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Shown as it is.
    #[error("{0}")]
    Text(String),
    /// Shown after `Error: `.
    #[error("Error: {0}")]
    Refused(String),
}

impl From<control::Error> for Error {
    fn from(error: control::Error) -> Self {
        Self::Refused(error.to_string())
    }
}

impl Session {
    /// A new session; `history` is shared with the editor that feeds it.
    pub fn new(control: Arc<Control>, output: Output, history: History) -> Self {
        Self {
            control,
            output,
            is_muted: false,
            history,
            fds: NamedFds::new(),
            arrived: VecDeque::new(),
            cpu: 0,
            sticky: Sticky::default(),
            next: Next::Prompt,
        }
    }

    /// Executes one line and prints what it has to say.
    pub fn execute(&mut self, line: &str) -> Outcome {
        self.next = Next::Prompt;
        let result = self.run(line);
        if let Err(error) = &result {
            self.print(&format!("{error}\n"));
        }
        match (self.next, result) {
            (Next::Wait, Ok(())) => Outcome::Suspended,
            (Next::Quit, _) => Outcome::Quit,
            (_, Ok(())) => Outcome::Done,
            (_, Err(_)) => Outcome::Failed,
        }
    }

    /// Tells the operator how the migration in the foreground ended; false if it did not succeed.
    pub fn conclude(&mut self) -> bool {
        let snapshot = self.control.migration();
        self.print(&conclusion(&snapshot));
        snapshot.status == Status::Completed
    }

    /// Candidates for the end of the line up to the cursor.
    pub fn complete(&self, line: &str) -> Candidates {
        complete::complete(line, &context::Machine(&self.control))
    }

    /// What to show behind the cursor at the end of a line.
    pub fn hint(&self, line: &str) -> Option<String> {
        hint::hint(line, &context::Machine(&self.control))
    }

    /// Keeps descriptors that arrived for `getfd`. Those of an earlier message that nobody has
    /// claimed are closed: `getfd` means what was sent with it.
    pub fn accept(&mut self, fds: Vec<OwnedFd>) {
        if !fds.is_empty() {
            self.arrived = fds.into();
        }
    }

    /// Closes descriptors that nobody has claimed.
    pub fn disown(&mut self) {
        self.arrived.clear();
    }

    /// The session's history.
    pub fn history(&self) -> &History {
        &self.history
    }

    /// The verbs.
    pub fn control(&self) -> &Arc<Control> {
        &self.control
    }

    /// Whether what there is to say is to be lost: nobody is there who asked for it.
    pub fn mute(&mut self, is_muted: bool) {
        self.is_muted = is_muted;
    }

    /// Prints text.
    pub fn print(&mut self, text: &str) {
        self.print_bytes(text.as_bytes());
    }

    /// Prints bytes that may be no text. A reader that went away is not the session's business.
    pub fn print_bytes(&mut self, bytes: &[u8]) {
        if !self.is_muted {
            let _ = self.output.write_all(bytes);
        }
    }

    /// The descriptor that arrived first.
    pub(super) fn next_fd(&mut self) -> Option<OwnedFd> {
        self.arrived.pop_front()
    }

    fn run(&mut self, line: &str) -> Result<(), Error> {
        let mut sticky = self.sticky;
        let parsed = args::parse(line, &mut sticky, self);
        self.sticky = sticky;
        match parsed? {
            Some((command, args)) => (command.handler)(self, &args),
            None => Ok(()),
        }
    }
}

impl expr::Registers for Session {
    fn register(&self, name: &str) -> Option<i64> {
        registers::value(&self.control.registers(self.cpu).ok()?, name)
    }
}

/// What the operator is told when a migration in the foreground has ended: the cause, if it did
/// not succeed, and what to do if nobody knows who runs the guest.
pub(super) fn conclusion(snapshot: &Snapshot) -> String {
    let cause = snapshot.error.as_deref();
    if snapshot.handover_unknown {
        let cause = cause.unwrap_or("the connection was lost while the guest was handed over");
        return if cause.contains("cont -f") {
            format!("Error: {cause}\n")
        } else {
            format!(
                "Error: {cause}; if 'info status' at the destination does not say that the guest \
                 runs there, 'cont -f' runs it here\n"
            )
        };
    }
    match snapshot.status {
        Status::Failed => format!("Error: {}\n", cause.unwrap_or("the migration failed")),
        _ => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn concludes() {
        let mut snapshot = Snapshot {
            status: Status::Completed,
            ..Snapshot::default()
        };
        assert_eq!(conclusion(&snapshot), "");
        snapshot.status = Status::Cancelled;
        assert_eq!(conclusion(&snapshot), "");
        snapshot.status = Status::Failed;
        assert_eq!(conclusion(&snapshot), "Error: the migration failed\n");
        snapshot.error = Some("Connection refused".to_owned());
        assert_eq!(conclusion(&snapshot), "Error: Connection refused\n");
        snapshot.handover_unknown = true;
        let text = conclusion(&snapshot);
        assert!(
            text.starts_with("Error: Connection refused; ") && text.contains("'cont -f'"),
            "{text}"
        );
        assert_eq!(text.lines().count(), 1);
        snapshot.error = Some("lost; see there, then cont -f".to_owned());
        assert_eq!(
            conclusion(&snapshot),
            "Error: lost; see there, then cont -f\n"
        );
    }
}
