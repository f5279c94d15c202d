//! What a drive has done: counts, bytes and times.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// Operations of each kind.
#[derive(Default)]
pub struct Stats {
    /// Reads.
    pub reads: Operations,
    /// Writes, of zeros too.
    pub writes: Operations,
    /// Flushes.
    pub flushes: Operations,
}

/// Operations of one kind that went well.
#[derive(Default)]
pub struct Operations {
    count: AtomicU64,
    bytes: AtomicU64,
    nanoseconds: AtomicU64,
    /// When the last one ended, in nanoseconds of [`now`]; 0: there was none.
    ended: AtomicU64,
}

impl Operations {
    /// Does one of `len` bytes.
    pub(super) fn time(
        &self,
        len: u64,
        operation: impl FnOnce() -> io::Result<()>,
    ) -> io::Result<()> {
        let begin = now();
        operation()?;
        let end = now();
        self.count.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(len, Ordering::Relaxed);
        self.nanoseconds.fetch_add(end - begin, Ordering::Relaxed);
        self.ended.store(end, Ordering::Relaxed);
        Ok(())
    }

    /// How many there were.
    pub fn count(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }

    /// How many bytes they moved.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// How many nanoseconds they took.
    pub fn nanoseconds(&self) -> u64 {
        self.nanoseconds.load(Ordering::Relaxed)
    }
}

impl Stats {
    /// Nanoseconds since anything was done; 0 if nothing ever was.
    pub fn idle(&self) -> u64 {
        let all = [&self.reads, &self.writes, &self.flushes];
        let ended = all.map(|kind| kind.ended.load(Ordering::Relaxed));
        match ended.into_iter().max() {
            None | Some(0) => 0,
            Some(last) => now().saturating_sub(last),
        }
    }
}

/// Nanoseconds, never 0, since the first call.
fn now() -> u64 {
    static BEGIN: std::sync::LazyLock<Instant> = std::sync::LazyLock::new(Instant::now);
    u64::try_from(BEGIN.elapsed().as_nanos()).map_or(u64::MAX, |now| now.saturating_add(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_went_well_is_counted() {
        let stats = Stats::default();
        assert_eq!(stats.idle(), 0);
        stats.reads.time(512, || Ok(())).unwrap();
        let failed = stats.writes.time(512, || Err(io::ErrorKind::Other.into()));
        assert!(failed.is_err());
        assert_eq!((stats.reads.count(), stats.reads.bytes()), (1, 512));
        assert_eq!((stats.writes.count(), stats.writes.nanoseconds()), (0, 0));
        std::thread::sleep(std::time::Duration::from_millis(1));
        assert!(stats.idle() > 900_000);
    }
}
