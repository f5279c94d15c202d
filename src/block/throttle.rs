//! Limits on what a drive does in a second.
//!
//! A leaky bucket for each limit, as in QEMU (`util/throttle.c`): a tenth of a second's worth may
//! come at once, and who finds a bucket full waits until it has run out so far.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Which way a request goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// From the image.
    Read,
    /// To the image.
    Write,
}

/// `block_set_io_throttle`: 0 is no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Bytes a second: all, read, written.
    pub bytes: [u64; 3],
    /// Requests a second: all, reads, writes.
    pub requests: [u64; 3],
}

impl Limits {
    /// Whether they go together; QEMU's words if they do not.
    pub fn check(self) -> Result<(), &'static str> {
        for [all, read, write] in [self.bytes, self.requests] {
            if all > 0 && (read > 0 || write > 0) {
                return Err(
                    "bps/iops/max total values and read/write values cannot be used at the same \
                     time",
                );
            }
        }
        let mut values = self.bytes.iter().chain(&self.requests);
        match values.all(|value| *value <= MOST) {
            true => Ok(()),
            false => Err("bps/iops/max values must be within [0, 1000000000000000]"),
        }
    }
}

/// Most of anything in a second, as in QEMU.
const MOST: u64 = 1_000_000_000_000_000;
/// What may come at once: what so much time is good for.
const BURST: Duration = Duration::from_millis(100);

/// A drive's limits, and who waits for them.
#[derive(Default)]
pub struct Throttle {
    /// Whether there is any limit: without, a request takes no lock.
    is_any: AtomicBool,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    limits: Limits,
    /// The name under which they were set.
    group: String,
    /// When the buckets, in the order of the limits, will have run out.
    empty: [Option<Instant>; 6],
    /// So many wait for all requests: none is held up.
    hurry: u32,
}

impl Throttle {
    /// The limits.
    pub fn limits(&self) -> Limits {
        self.lock().limits
    }

    /// The name under which they were set, which QEMU shows.
    pub fn group(&self) -> String {
        self.lock().group.clone()
    }

    /// Sets them under a name, for those who wait too.
    pub fn set_limits(&self, limits: Limits, group: &str) {
        let mut state = self.lock();
        group.clone_into(&mut state.group);
        state.limits = limits;
        self.is_any
            .store(limits != Limits::default(), Ordering::Relaxed);
        state.empty = [None; 6];
        drop(state);
        self.changed.notify_all();
    }

    /// From here on nobody is held up, or (for each `true` one `false`) as before.
    pub(super) fn set_hurry(&self, is_hurry: bool) {
        let mut state = self.lock();
        state.hurry = match is_hurry {
            true => state.hurry + 1,
            false => state.hurry.saturating_sub(1),
        };
        drop(state);
        self.changed.notify_all();
    }

    /// Lets a request of `len` bytes through when it is its turn.
    pub(super) fn pass(&self, way: Way, len: u64) {
        if !self.is_any.load(Ordering::Relaxed) {
            return;
        }
        let mut state = self.lock();
        let asked = state.limits;
        let mut now = Instant::now();
        let turn = state.fill(way, len, now);
        while now < turn && state.hurry == 0 && state.limits == asked {
            let waited = self.changed.wait_timeout(state, turn - now);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
            now = Instant::now();
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Puts a request into its buckets, and tells when it may go.
    fn fill(&mut self, way: Way, len: u64, now: Instant) -> Instant {
        let own = 1 + usize::from(way == Way::Write);
        let mut turn = now;
        for (first, values, amount) in [(0, self.limits.bytes, len), (3, self.limits.requests, 1)] {
            for index in [0, own].into_iter().filter(|index| values[*index] > 0) {
                let bucket = &mut self.empty[first + index];
                let level = bucket.map_or(now, |empty| empty.max(now));
                let takes = Duration::from_secs_f64(amount as f64 / values[index] as f64);
                turn = turn.max(level.checked_sub(BURST).unwrap_or(now));
                *bucket = level.checked_add(takes).or(*bucket);
            }
        }
        turn
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn throttle(bytes: [u64; 3], requests: [u64; 3]) -> Throttle {
        let throttle = Throttle::default();
        throttle.set_limits(Limits { bytes, requests }, "d0");
        throttle
    }

    #[test]
    fn a_second_is_worth_what_was_said() {
        let throttle = throttle([0, 1000, 0], [0; 3]);
        let mut state = throttle.lock();
        let now = Instant::now();
        let mut turn = |way, len| state.fill(way, len, now) - now;
        // What a tenth of a second is good for comes at once.
        assert_eq!(turn(Way::Read, 100), Duration::ZERO);
        assert_eq!(turn(Way::Read, 1000), Duration::ZERO);
        assert_eq!(turn(Way::Read, 1), Duration::from_secs(1));
        assert_eq!(turn(Way::Write, 1 << 40), Duration::ZERO);
    }

    #[test]
    fn every_limit_counts() {
        let throttle = throttle([1000, 0, 0], [0, 0, 10]);
        let mut state = throttle.lock();
        let now = Instant::now();
        let mut turn = |way, len| state.fill(way, len, now) - now;
        turn(Way::Write, 1);
        turn(Way::Write, 1);
        assert_eq!(turn(Way::Write, 1), Duration::from_millis(100));
        assert_eq!(turn(Way::Read, 1000), Duration::ZERO);
        assert_eq!(turn(Way::Read, 1), Duration::from_millis(903));
    }

    #[test]
    fn who_waits_is_let_go() {
        let throttle = throttle([1, 0, 0], [0; 3]);
        throttle.pass(Way::Read, 1 << 20);
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| throttle.pass(Way::Read, 1));
            std::thread::sleep(Duration::from_millis(20));
            assert!(!waiting.is_finished());
            throttle.set_hurry(true);
            waiting.join().unwrap();
            throttle.set_hurry(false);
            let waiting = scope.spawn(|| throttle.pass(Way::Read, 1));
            std::thread::sleep(Duration::from_millis(20));
            assert!(!waiting.is_finished());
            throttle.set_limits(Limits::default(), "d0");
            waiting.join().unwrap();
        });
    }

    #[test]
    fn what_does_not_go_together_is_refused() {
        let check = |bytes, requests| Limits { bytes, requests }.check();
        assert_eq!(check([1, 0, 0], [0, 2, 3]), Ok(()));
        assert!(check([1, 2, 0], [0; 3]).is_err());
        assert!(check([0; 3], [1, 0, 2]).is_err());
        assert!(check([MOST + 1, 0, 0], [0; 3]).is_err());
    }
}
