//! When the rest is small enough: bandwidth, threshold and expected downtime. Pure arithmetic.
//!
//! QEMU: `migration_update_counters` and the decision in `migration_iteration_run` (10.0).

use std::time::Duration;

/// What one window of at least [`WINDOW`] showed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Measure {
    /// Bytes per millisecond over all channels.
    pub bandwidth: f64,
    /// Megabits per second.
    pub mbps: f64,
    /// Pages per second.
    pub pages_per_second: u64,
}

/// Measures a window: `bytes` and `pages` moved in `elapsed` (not zero).
pub fn measure(bytes: u64, pages: u64, elapsed: Duration) -> Measure {
    let seconds = elapsed.as_secs_f64().max(f64::EPSILON);
    Measure {
        bandwidth: bytes as f64 / (seconds * 1000.0),
        mbps: bytes as f64 * 8.0 / seconds / 1e6,
        pages_per_second: (pages as f64 / seconds) as u64,
    }
}

/// Bandwidth to count on for the last phase, bytes per millisecond: what the operator promises
/// (`avail-switchover-bandwidth`, bytes per second) if anything, else what was measured.
pub fn bandwidth(measured: f64, promised: u64) -> f64 {
    if promised > 0 {
        promised as f64 / 1000.0
    } else {
        measured
    }
}

/// Bytes that can be moved within the permitted downtime.
pub fn threshold(bandwidth: f64, downtime_limit: Duration) -> u64 {
    (bandwidth * downtime_limit.as_secs_f64() * 1000.0) as u64
}

/// Milliseconds that moving `bytes` takes; `None` while no bandwidth is known.
pub fn expected_downtime(bytes: u64, bandwidth: f64) -> Option<u64> {
    (bandwidth > 0.0).then(|| (bytes as f64 / bandwidth) as u64)
}

/// Megabits per second over a whole migration.
pub fn overall_mbps(bytes: u64, elapsed: Duration) -> f64 {
    if elapsed.is_zero() {
        0.0
    } else {
        bytes as f64 * 8.0 / elapsed.as_secs_f64() / 1e6
    }
}

/// Shortest window that is measured.
pub const WINDOW: Duration = Duration::from_millis(100);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_is_measured_as_qemu_does() {
        let measure = measure(13_421_772, 3000, WINDOW);
        assert_eq!(measure.bandwidth as u64, 134_217);
        assert!((measure.mbps - 1073.74).abs() < 0.01);
        assert_eq!(measure.pages_per_second, 30_000);
    }

    #[test]
    fn threshold_is_bandwidth_times_limit() {
        assert_eq!(
            threshold(bandwidth(1000.0, 0), Duration::from_millis(300)),
            300_000
        );
        assert_eq!(
            threshold(bandwidth(1000.0, 2_000_000), Duration::from_millis(300)),
            600_000
        );
        assert_eq!(threshold(1e300, Duration::MAX), u64::MAX);
        assert_eq!(threshold(1000.0, Duration::ZERO), 0);
    }

    #[test]
    fn nothing_divides_by_zero() {
        assert_eq!(expected_downtime(4096, 0.0), None);
        assert_eq!(expected_downtime(300_000, 1000.0), Some(300));
        assert_eq!(overall_mbps(1, Duration::ZERO), 0.0);
        assert!(measure(1, 1, Duration::ZERO).mbps.is_finite());
    }
}
