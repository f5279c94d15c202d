//! The log: what `-d`, `-D`, `log` and `logfile` switch. Behind the `log` crate's macros.
//!
//! Warnings and errors are always shown; an item switches on everything else of its room. The
//! logger is one of the three pieces of global state the program allows itself (with the saved
//! terminal mode and the signal wakeup): the `log` crate has exactly one per process.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};

use log::{LevelFilter, Log, Metadata, Record};

/// What can be logged, and what it shows.
pub const ITEMS: [(&str, &str); 5] = [
    ("chardev", "character devices: connections and their ends"),
    ("control", "verbs of the monitors and what became of them"),
    ("migration", "phases, passes and hand-over of migrations"),
    ("monitor", "sessions and their commands"),
    ("vm", "the machine: vCPUs, devices, resets"),
];

/// Where a line goes when there is no log file.
pub type Sink = Box<dyn Fn(&str) + Send>;

struct Logger {
    items: AtomicU32,
    target: Mutex<Target>,
}

enum Target {
    Stderr,
    Sink(Sink),
    File(File),
}

static LOGGER: Logger = Logger {
    items: AtomicU32::new(0),
    target: Mutex::new(Target::Stderr),
};

/// Installs the logger; a second call changes nothing.
pub fn install() {
    if log::set_logger(&LOGGER).is_ok() {
        log::set_max_level(LevelFilter::Trace);
    }
}

/// Switches on exactly the items of a comma-separated list: `all`, `none`, or names of [`ITEMS`].
/// The error is the first word that is none of these.
pub fn switch(items: &str) -> Result<(), String> {
    let mut mask = 0;
    for word in items.split(',').filter(|word| !word.is_empty()) {
        match (word, ITEMS.iter().position(|(name, _)| *name == word)) {
            ("all", _) => mask = (1 << ITEMS.len()) - 1,
            ("none", _) => mask = 0,
            (_, Some(bit)) => mask |= 1 << bit,
            (_, None) => return Err(word.to_owned()),
        }
    }
    LOGGER.items.store(mask, Ordering::Relaxed);
    Ok(())
}

/// Appends the log to a file from now on.
pub fn to_file(path: &Path) -> io::Result<()> {
    let file = OpenOptions::new().create(true).append(true).open(path)?;
    *LOGGER.target.lock().unwrap_or_else(PoisonError::into_inner) = Target::File(file);
    Ok(())
}

/// Sends lines to `sink` instead of stderr (a terminal shell shows them above its prompt); a log
/// file stays where it is.
pub fn to_sink(sink: Sink) {
    let mut target = LOGGER.target.lock().unwrap_or_else(PoisonError::into_inner);
    if !matches!(*target, Target::File(_)) {
        *target = Target::Sink(sink);
    }
}

/// Ends what [`to_sink`] began; a log file stays where it is.
pub fn to_stderr() {
    let mut target = LOGGER.target.lock().unwrap_or_else(PoisonError::into_inner);
    if matches!(*target, Target::Sink(_)) {
        *target = Target::Stderr;
    }
}

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        if metadata.level() <= log::Level::Warn {
            return true;
        }
        let room = metadata.target().split("::").nth(1).unwrap_or("");
        let mask = self.items.load(Ordering::Relaxed);
        ITEMS
            .iter()
            .position(|(name, _)| *name == room)
            .is_some_and(|bit| mask & (1 << bit) != 0)
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let line = format!("hmpsh: {}", record.args());
        match &mut *self.target.lock().unwrap_or_else(PoisonError::into_inner) {
            // A log that can not be written must not stop what it tells of.
            Target::Stderr => drop(writeln!(io::stderr(), "{line}")),
            Target::Sink(sink) => sink(&line),
            Target::File(file) => drop(writeln!(file, "{line}")),
        }
    }

    fn flush(&self) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn items_switch_rooms_and_unknown_ones_are_named() {
        let room = |target| {
            LOGGER.enabled(
                &Metadata::builder()
                    .level(log::Level::Debug)
                    .target(target)
                    .build(),
            )
        };
        assert_eq!(switch("migration,vm"), Ok(()));
        assert!(room("hmpsh::migration::source") && room("hmpsh::vm") && !room("hmpsh::monitor"));
        assert_eq!(switch("none,foo"), Err("foo".to_owned()));
        assert_eq!(switch("none"), Ok(()));
        assert!(!room("hmpsh::migration"));
    }
}
