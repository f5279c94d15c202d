//! The seam between those who talk with an operator and what executes lines.
//!
//! A [`Session`] is the interpreter; in tests a script is, so that line editor, prompt and
//! foreground migration can be tried without a machine.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::complete::Candidates;
use super::history::History;
use super::session::{Outcome, Session};
use crate::migration::stats::Snapshot;

/// Told how a migration ended.
pub type Ended = Box<dyn FnOnce(&Snapshot) + Send>;

/// What executes lines.
pub trait Interpreter: Send {
    /// Executes a line; prints by itself.
    fn execute(&mut self, line: &str) -> Outcome;

    /// From now on prints nothing (`true`), or again what there is to say.
    fn mute(&mut self, is_muted: bool);

    /// Candidates for the end of the line up to the cursor.
    fn complete(&self, line: &str) -> Candidates;

    /// What to show behind the cursor at the end of a line.
    fn hint(&self, line: &str) -> Option<String>;

    /// Takes descriptors that came with the input.
    fn accept(&mut self, fds: Vec<OwnedFd>);

    /// Closes descriptors that came and were not asked for: who sent them is gone.
    fn disown(&mut self);

    /// The lines typed so far.
    fn history(&self) -> &History;

    /// Status and figures of the migration.
    fn migration(&self) -> Snapshot;

    /// Cancels the migration. `Some` is the line for the operator when it is too late.
    fn cancel(&mut self) -> Option<String>;

    /// Calls `done` once, on any thread, when the migration has ended or needs the operator.
    fn when_migration_ends(&self, done: Ended);

    /// Says how the migration in the foreground ended; false if it did not succeed.
    fn conclude(&mut self) -> bool;
}

impl Interpreter for Session {
    fn execute(&mut self, line: &str) -> Outcome {
        Self::execute(self, line)
    }

    fn mute(&mut self, is_muted: bool) {
        Self::mute(self, is_muted);
    }

    fn complete(&self, line: &str) -> Candidates {
        Self::complete(self, line)
    }

    fn hint(&self, line: &str) -> Option<String> {
        Self::hint(self, line)
    }

    fn accept(&mut self, fds: Vec<OwnedFd>) {
        Self::accept(self, fds);
    }

    fn disown(&mut self) {
        Self::disown(self);
    }

    fn history(&self) -> &History {
        Self::history(self)
    }

    fn migration(&self) -> Snapshot {
        self.control().migration()
    }

    fn cancel(&mut self) -> Option<String> {
        self.control().migrate_cancel()
    }

    fn when_migration_ends(&self, done: Ended) {
        let control = Arc::clone(self.control());
        self.control()
            .when_migration_ends(Box::new(move || done(&control.migration())));
    }

    fn conclude(&mut self) -> bool {
        Self::conclude(self)
    }
}
