//! Status and statistics of the present or last migration: one snapshot, replaced atomically.
//!
//! The engine publishes, mouths read. Status and numbers always come from the same snapshot, and
//! they stay until the next migration starts, on both sides, however the last one ended.

use std::sync::{Mutex, PoisonError};

use crate::vm::memory::PAGE_SIZE;

/// QEMU's migration status.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Status {
    /// Nothing happened yet.
    #[default]
    None,
    /// Connecting, or (incoming) listening.
    Setup,
    /// Being cancelled.
    Cancelling,
    /// Cancelled; the guest runs on here.
    Cancelled,
    /// Moving memory.
    Active,
    /// Handing over: guest stopped, device state and last pages under way.
    Device,
    /// The other side runs the guest (or the bytes are safe).
    Completed,
    /// Failed; see the error text.
    Failed,
}

impl Status {
    /// QEMU's word.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Setup => "setup",
            Self::Cancelling => "cancelling",
            Self::Cancelled => "cancelled",
            Self::Active => "active",
            Self::Device => "device",
            Self::Completed => "completed",
            Self::Failed => "failed",
        }
    }

    /// Whether a migration is under way.
    pub fn is_running(self) -> bool {
        matches!(
            self,
            Self::Setup | Self::Cancelling | Self::Active | Self::Device
        )
    }
}

/// Which way the migration of a snapshot went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Direction {
    /// From here.
    #[default]
    Outgoing,
    /// To here.
    Incoming,
}

/// RAM statistics; `ram` in QMP, the lines from `transferred ram` on in `info migrate`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RamStats {
    /// Bytes on the wire, all channels, device state included.
    pub transferred: u64,
    /// Bytes of pages known to be dirty and not sent.
    pub remaining: u64,
    /// Bytes of all RAM blocks.
    pub total: u64,
    /// Zero pages sent.
    pub duplicate: u64,
    /// Pages sent as they are.
    pub normal: u64,
    /// Megabits per second over the last window, over all at the end.
    pub mbps: f64,
    /// Bitmap syncs, the one in setup included.
    pub dirty_sync_count: u64,
    /// Pages per second over the last window.
    pub pages_per_second: u64,
    /// Pages dirtied per second.
    pub dirty_pages_rate: u64,
    /// RAM bytes sent while the guest ran here.
    pub precopy_bytes: u64,
    /// RAM bytes sent while it was stopped.
    pub downtime_bytes: u64,
}

/// Disk statistics; `disk` in QMP, the lines from `transferred disk` on in `info migrate`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DiskStats {
    /// Bytes of chunks sent, those sent again included.
    pub transferred: u64,
    /// Bytes of chunks never sent, or written to since.
    pub remaining: u64,
    /// Bytes of all disks.
    pub total: u64,
}

/// Everything `info migrate` can tell, at one instant.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// Where the migration stands.
    pub status: Status,
    /// Which way it goes.
    pub direction: Direction,
    /// Why it failed.
    pub error: Option<String>,
    /// The connection was lost inside the ambiguous window: nobody here knows who runs the guest.
    pub handover_unknown: bool,
    /// Milliseconds since the start, frozen at the end.
    pub total_time: u64,
    /// Milliseconds until the first iteration.
    pub setup_time: u64,
    /// Milliseconds the guest stood still (once known).
    pub downtime: Option<u64>,
    /// Milliseconds it would stand still if it were stopped now.
    pub expected_downtime: u64,
    /// Number of the present pass over memory, from 1.
    pub pass: u64,
    /// Memory figures; present from the first moment of `active` on.
    pub ram: Option<RamStats>,
    /// Disk figures of a migration with disks.
    pub disk: Option<DiskStats>,
    /// Why the guest came without its dirty bitmaps.
    pub lost_bitmaps: Option<String>,
    /// Address an incoming migration listens on (`tcp:127.0.0.1:4444`).
    pub socket_address: Option<String>,
}

impl Snapshot {
    /// Percent done for `Completed N %`: what was sent of what was sent and what is known to be
    /// left; never 100 before the end. Memory that was never used counts for nothing, so it begins
    /// at 0. It falls when the guest dirties memory faster than it is sent; callers keep what they
    /// show from going back.
    pub fn percent(&self) -> u8 {
        if self.status == Status::Completed {
            return 100;
        }
        let ram = self.ram.as_ref().map_or((0, 0), |ram| {
            let moved = (ram.normal + ram.duplicate).saturating_mul(PAGE_SIZE as u64);
            (moved, ram.remaining)
        });
        let disk = self.disk.as_ref();
        let disk = disk.map_or((0, 0), |disk| (disk.transferred, disk.remaining));
        let moved = ram.0.saturating_add(disk.0);
        let all = moved.saturating_add(ram.1).saturating_add(disk.1);
        let percent = moved.saturating_mul(100).checked_div(all).unwrap_or(0);
        percent.min(99) as u8
    }
}

/// Holds the present snapshot; whoever waits for changes is told through the callback.
#[derive(Default)]
pub struct Board {
    snapshot: Mutex<Snapshot>,
    watcher: Mutex<Option<Watcher>>,
}

/// Called after each change of status, on the thread that caused it.
pub type Watcher = Box<dyn Fn(&Snapshot) + Send>;

impl Board {
    /// The present snapshot.
    pub fn read(&self) -> Snapshot {
        self.snapshot
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Changes the snapshot in one step; calls the watcher if the status changed.
    pub fn update(&self, change: impl FnOnce(&mut Snapshot)) {
        let mut snapshot = self.snapshot.lock().unwrap_or_else(PoisonError::into_inner);
        let before = snapshot.status;
        change(&mut snapshot);
        if snapshot.status != before {
            let now = snapshot.clone();
            drop(snapshot);
            if let Some(watcher) = &*self.watcher.lock().unwrap_or_else(PoisonError::into_inner) {
                watcher(&now);
            }
        }
    }

    /// Sets who is told of changes of status.
    pub fn watch(&self, watcher: Watcher) {
        *self.watcher.lock().unwrap_or_else(PoisonError::into_inner) = Some(watcher);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percent_begins_at_0_and_is_100_only_at_the_end() {
        let percent = |status, normal, remaining| {
            let ram = RamStats {
                normal,
                remaining,
                total: 1 << 30,
                ..RamStats::default()
            };
            Snapshot {
                status,
                ram: Some(ram),
                ..Snapshot::default()
            }
            .percent()
        };
        assert_eq!(percent(Status::Active, 0, 40 << 12), 0);
        assert_eq!(percent(Status::Active, 10, 30 << 12), 25);
        assert_eq!(percent(Status::Device, 40, 0), 99);
        assert_eq!(percent(Status::Completed, 40, 0), 100);
        assert_eq!(Snapshot::default().percent(), 0);
    }
}
