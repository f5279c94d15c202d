//! Time as the engine sees it, so that tests can own it.

use std::time::{Duration, Instant};

use super::channel::Cancel;

/// Monotonic time and sleeping.
pub trait Clock: Send + Sync {
    /// Time since some fixed moment.
    fn now(&self) -> Duration;

    /// Sleeps for `time`, less if cancelled.
    fn sleep(&self, time: Duration, cancel: &Cancel);
}

/// The host's monotonic clock.
#[derive(Debug)]
pub struct HostClock(Instant);

impl HostClock {
    /// Counts from now.
    #[expect(
        clippy::new_without_default,
        reason = "a start of time is no default value"
    )]
    pub fn new() -> Self {
        Self(Instant::now())
    }
}

impl Clock for HostClock {
    fn now(&self) -> Duration {
        self.0.elapsed()
    }

    fn sleep(&self, time: Duration, cancel: &Cancel) {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        if let Ok(timeout) = Timespec::try_from(time) {
            // An interrupted sleep is a short sleep: callers look at the clock again.
            let _ = poll(
                &mut [PollFd::from_borrowed_fd(cancel.event(), PollFlags::IN)],
                Some(&timeout),
            );
        }
    }
}
