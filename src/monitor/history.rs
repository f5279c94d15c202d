//! The lines typed at one monitor, oldest first: at most 64, none twice.
//!
//! Shared by the line editor, which walks and extends it, and `info history`.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// One monitor's history; clones share the lines.
#[derive(Clone, Default)]
pub struct History(Arc<Mutex<VecDeque<String>>>);

impl History {
    /// Adds a line as the newest; an equal older one goes away, empty lines are not kept.
    pub fn add(&self, line: &str) {
        if line.is_empty() {
            return;
        }
        let mut lines = self.lock();
        lines.retain(|known| known != line);
        if lines.len() == LIMIT {
            lines.pop_front();
        }
        lines.push_back(line.to_owned());
    }

    /// The line with that index, 0 being the oldest.
    pub fn line(&self, index: usize) -> Option<String> {
        self.lock().get(index).cloned()
    }

    /// Number of lines.
    pub fn len(&self) -> usize {
        self.lock().len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<String>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Lines kept.
const LIMIT: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_64_and_none_twice() {
        let history = History::default();
        for number in 0..70 {
            history.add(&format!("print {number}"));
        }
        history.add("");
        assert_eq!(history.len(), 64);
        assert_eq!(history.line(0).as_deref(), Some("print 6"));
        history.add("print 6");
        assert_eq!(history.len(), 64);
        assert_eq!(history.line(0).as_deref(), Some("print 7"));
        assert_eq!(history.line(63).as_deref(), Some("print 6"));
    }
}
