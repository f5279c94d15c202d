//! What completion can ask of a machine and of the file system.

use std::fs;

use crate::control::Control;
use crate::monitor::complete::Context;

/// The program's own state as a completion context.
pub(super) struct Machine<'a>(pub(super) &'a Control);

impl Context for Machine<'_> {
    fn capabilities(&self) -> Vec<String> {
        self.0
            .capabilities()
            .into_iter()
            .map(|(name, _)| name.to_owned())
            .collect()
    }

    fn parameters(&self) -> Vec<String> {
        self.0
            .parameters()
            .into_iter()
            .map(|parameter| parameter.name.to_owned())
            .collect()
    }

    fn parameter_values(&self, name: &str) -> Vec<String> {
        let parameters = self.0.parameters();
        let known = parameters.iter().find(|parameter| parameter.name == name);
        let words = known.map_or(&[][..], |parameter| parameter.words);
        words.iter().map(|word| (*word).to_owned()).collect()
    }

    fn drives(&self) -> Vec<String> {
        self.0.drives().into_iter().map(|drive| drive.id).collect()
    }

    fn snapshots(&self) -> Vec<String> {
        let list = self.0.snapshots().unwrap_or_default();
        let names = list
            .whole
            .iter()
            .map(|snapshot| snapshot.name().into_owned());
        names.collect()
    }

    fn chardevs(&self) -> Vec<(String, bool)> {
        let is_ringbuf = |description: &str| description.starts_with("ringbuf");
        self.0
            .chardevs()
            .into_iter()
            .map(|chardev| {
                let is_ringbuf = is_ringbuf(&chardev.description);
                (chardev.id, is_ringbuf)
            })
            .collect()
    }

    fn log_items(&self) -> Vec<String> {
        self.0
            .log_items()
            .iter()
            .map(|(name, _)| (*name).to_owned())
            .collect()
    }

    fn directory(&self, path: &str) -> Vec<(String, bool)> {
        let Ok(entries) = fs::read_dir(if path.is_empty() { "." } else { path }) else {
            return Vec::new();
        };
        entries
            .flatten()
            .filter_map(|entry| {
                let name = entry.file_name().into_string().ok()?;
                // Through symbolic links, as the command that opens the file goes.
                let is_directory = fs::metadata(entry.path()).is_ok_and(|meta| meta.is_dir());
                Some((name, is_directory))
            })
            .take(MOST_ENTRIES)
            .collect()
    }
}

/// Entries of a directory looked at; a longer listing helps nobody.
const MOST_ENTRIES: usize = 65536;
