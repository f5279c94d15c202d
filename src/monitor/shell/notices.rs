//! Lines from elsewhere: above the prompt, or above the progress of a migration in the foreground.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use indicatif::ProgressBar;
use rustyline::ExternalPrinter;

use crate::monitor::terminal::say;

/// Prints above what the operator is typing, from any thread.
#[derive(Clone)]
pub struct Notices(Arc<Mutex<Place>>);

struct Place {
    /// Draws the prompt anew; without it lines come where the cursor is.
    prompt: Option<Box<dyn ExternalPrinter + Send>>,
    /// There while a migration runs in the foreground.
    progress: Option<ProgressBar>,
}

impl Notices {
    pub(super) fn new<P: ExternalPrinter + Send + 'static>(prompt: Option<P>) -> Self {
        let prompt = prompt.map(|prompt| Box::new(prompt) as Box<_>);
        Self(Arc::new(Mutex::new(Place {
            prompt,
            progress: None,
        })))
    }

    /// Prints one line.
    pub fn print(&self, line: &str) {
        let mut place = self.lock();
        let text = format!("{line}\n");
        let Place { prompt, progress } = &mut *place;
        match (progress, prompt) {
            (Some(progress), _) => progress.suspend(|| say(&text)),
            // The shell has ended if this fails.
            (None, Some(prompt)) => drop(prompt.print(text)),
            (None, None) => say(&text),
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
