//! Lines from elsewhere: above the prompt, or above the progress of a migration in the foreground.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use indicatif::ProgressBar;
use rustyline::ExternalPrinter;

use crate::monitor::terminal::say;

/// Prints above what the operator is typing, from any thread.
#[derive(Clone)]
pub struct Notices(Arc<Mutex<Place>>);

struct Place {
    prompt: Box<dyn ExternalPrinter + Send>,
    /// There while a migration runs in the foreground.
    progress: Option<ProgressBar>,
}

impl Notices {
    pub(super) fn new(prompt: impl ExternalPrinter + Send + 'static) -> Self {
        Self(Arc::new(Mutex::new(Place {
            prompt: Box::new(prompt),
            progress: None,
        })))
    }

    /// Prints one line.
    pub fn print(&self, line: &str) {
        let mut place = self.lock();
        let text = format!("{line}\n");
        match &place.progress {
            Some(progress) => progress.suspend(|| say(&text)),
            // The shell has ended if this fails.
            None => drop(place.prompt.print(text)),
        }
    }

    /// Until it is called with `None`, lines stand above this.
    pub(super) fn stand_above(&self, progress: Option<ProgressBar>) {
        self.lock().progress = progress;
    }

    fn lock(&self) -> MutexGuard<'_, Place> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
