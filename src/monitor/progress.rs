//! `Completed N %` of a migration that a monitor waits for.
//!
//! Pure: what to print at each tick and at the end. On a character device these bytes are all
//! there is; on a terminal the same text heads a livelier line.

/// How far a migration was said to be.
#[derive(Debug, Default)]
pub struct Progress {
    said: Option<u8>,
}

impl Progress {
    /// What to print, a second after the start and each second from then on.
    pub fn tick(&mut self, percent: u8) -> String {
        format!("Completed {} %\r", self.reached(percent))
    }

    /// What to say when the migration is at `percent`, which may jump back (memory gets dirty
    /// again) where what is said does not.
    pub fn reached(&mut self, percent: u8) -> u8 {
        let percent = percent.min(99).max(self.said.unwrap_or(0));
        self.said = Some(percent);
        percent
    }

    /// Whether anything was said yet.
    pub fn is_silent(&self) -> bool {
        self.said.is_none()
    }

    /// What to print when the migration has ended: nothing if nothing was said; 100 only if it
    /// was completed.
    pub fn end(self, is_completed: bool) -> &'static str {
        match (self.said, is_completed) {
            (None, _) => "",
            (Some(_), true) => "Completed 100 %\r\n",
            (Some(_), false) => "\n",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn never_goes_back_and_ends_with_100() {
        let mut progress = Progress::default();
        assert_eq!(progress.tick(40), "Completed 40 %\r");
        assert_eq!(progress.tick(30), "Completed 40 %\r");
        assert_eq!(progress.tick(100), "Completed 99 %\r");
        assert_eq!(progress.end(true), "Completed 100 %\r\n");
    }

    #[test]
    fn short_or_failed() {
        assert_eq!(Progress::default().end(true), "");
        let mut progress = Progress::default();
        progress.tick(0);
        assert_eq!(progress.end(false), "\n");
    }
}
