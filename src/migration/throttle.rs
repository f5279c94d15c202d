//! The rate limit (`max-bandwidth`): how many bytes may leave now. Pure arithmetic.
//!
//! QEMU's budget per window of 100 ms, with one difference: what a window overspends is taken from
//! the next, so that small limits hold too. A change of the limit forgives such a debt.

use std::time::Duration;

/// Bytes that may be spent.
#[derive(Debug)]
pub struct Throttle {
    credit: i128,
    /// When the present window began; the first begins when it is first asked for.
    window: Option<Duration>,
    spent: u64,
    rate: u64,
}

impl Throttle {
    /// Counts bytes from `total` (queued so far). The first window brings the first budget.
    pub fn new(total: u64) -> Self {
        Self {
            credit: 0,
            window: None,
            spent: total,
            rate: 0,
        }
    }

    /// Bytes that may be queued at `now`, `total` having been queued so far, with a limit of
    /// `rate` bytes per second (0: none). 0 means: wait until [`Self::next`].
    pub fn allowance(&mut self, now: Duration, total: u64, rate: u64) -> u64 {
        self.credit -= i128::from(total.saturating_sub(self.spent));
        self.spent = total;
        if std::mem::replace(&mut self.rate, rate) != rate {
            // What was spent under another limit is no debt under this one.
            self.credit = self.credit.max(0);
        }
        if rate == 0 {
            (self.credit, self.window) = (0, Some(now));
            return u64::MAX;
        }
        let budget = i128::from(rate) * WINDOW.as_millis() as i128 / 1000;
        let (windows, begin) = match self.window {
            None => (1, now),
            Some(begin) => {
                let windows = now.saturating_sub(begin).as_millis() / WINDOW.as_millis();
                let windows = u32::try_from(windows).unwrap_or(u32::MAX);
                (windows, begin + WINDOW * windows)
            }
        };
        if windows > 0 {
            let earned = budget.max(1).saturating_mul(i128::from(windows));
            self.credit = self.credit.saturating_add(earned).min(budget.max(1));
        }
        self.window = Some(begin);
        u64::try_from(self.credit.max(0)).unwrap_or(u64::MAX)
    }

    /// When the next window begins.
    pub fn next(&self) -> Duration {
        self.window.map_or(Duration::ZERO, |begin| begin + WINDOW)
    }
}

/// QEMU's window.
const WINDOW: Duration = Duration::from_millis(100);

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Sends pieces of `piece` bytes for `seconds` and returns the bytes sent.
    fn run(rate: u64, piece: u64, seconds: u64) -> u64 {
        let mut now = Duration::from_secs(7);
        let end = now + Duration::from_secs(seconds);
        let mut total = 0;
        let mut throttle = Throttle::new(total);
        while now < end {
            let start = total;
            let allowance = throttle.allowance(now, total, rate);
            while total - start < allowance {
                total += piece;
            }
            if allowance == 0 {
                now = throttle.next();
            }
        }
        total
    }

    #[test]
    fn a_limit_holds_however_coarse_the_pieces() {
        assert!((900_000..=1_110_000).contains(&run(100_000, 4104, 10)));
        assert!((9_000_000..=11_000_000).contains(&run(1_000_000, 4104, 10)));
        // One page is all that fits into a limit below a page per second and ten seconds.
        assert_eq!(run(1, 4104, 10), 4104);
    }

    #[test]
    fn the_first_budget_is_there_at_once() {
        // A clock that has just begun, as a migration's does.
        let now = Duration::from_millis(1);
        let mut throttle = Throttle::new(40);
        assert_eq!(throttle.allowance(now, 40, 1_000_000), 100_000);
        assert_eq!(throttle.allowance(now, 100_040, 1_000_000), 0);
        assert_eq!(throttle.next(), now + WINDOW);
        assert_eq!(
            throttle.allowance(throttle.next(), 100_040, 1_000_000),
            100_000
        );
    }

    #[test]
    fn a_limit_can_be_lifted_and_set_again() {
        let mut throttle = Throttle::new(0);
        assert_eq!(throttle.allowance(Duration::ZERO, 0, 0), u64::MAX);
        // What went out without a limit is no debt: the new limit is obeyed from the next window.
        let later = Duration::from_millis(99);
        assert_eq!(throttle.allowance(later, 1 << 40, 1_000_000), 0);
        assert_eq!(
            throttle.allowance(throttle.next(), 1 << 40, 1_000_000),
            100_000
        );
    }

    #[test]
    fn a_raise_does_not_wait_for_an_old_debt() {
        let mut throttle = Throttle::new(0);
        assert_eq!(throttle.allowance(throttle.next(), 0, 1), 1);
        // A page, on a budget of 1 byte per window: a debt of minutes.
        let now = throttle.next();
        assert_eq!(throttle.allowance(now, 4104, 1), 0);
        assert_eq!(throttle.allowance(throttle.next(), 4104, 2000), 200);
    }

    proptest! {
        #[test]
        fn no_rate_and_no_time_overflows(rate: u64, total: u64, millis: u64) {
            let mut throttle = Throttle::new(0);
            throttle.allowance(Duration::from_millis(millis), total, rate);
            throttle.allowance(Duration::from_millis(millis), total, rate);
        }
    }
}
