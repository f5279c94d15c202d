//! The figures of a migration under way, and their publication on the board.
//!
//! Owned by the writer, because the writer is what waits when the peer does not read: the figures
//! must stay true then too (the rate falls to 0, the time goes on).

use std::time::Duration;

use super::clock::Clock;
use super::stats::{Board, Direction, DiskStats, RamStats, Snapshot, Status};
use super::switchover::{self, WINDOW};

/// Figures of an outgoing migration.
pub struct Progress<'a> {
    board: &'a Board,
    clock: &'a dyn Clock,
    started: Duration,
    iterating: Option<Duration>,
    stopped: Option<Duration>,
    moved: Option<Duration>,
    window: Duration,
    window_bytes: u64,
    window_pages: u64,
    bandwidth: f64,
    /// `avail-switchover-bandwidth`, bytes per second.
    pub promised_bandwidth: u64,
    /// Memory figures; `ram` fills in counts, the windows fill in rates.
    pub ram: RamStats,
    /// Disk figures, of a migration with disks.
    pub disk: Option<DiskStats>,
}

impl<'a> Progress<'a> {
    /// A migration that began at `started` on `clock`; `total` is the size of all RAM in bytes.
    /// The board is cleared of the last migration.
    pub fn new(board: &'a Board, clock: &'a dyn Clock, started: Duration, total: u64) -> Self {
        board.update(|snapshot| {
            *snapshot = Snapshot {
                status: held(snapshot, Status::Setup),
                ..Snapshot::default()
            };
        });
        Self {
            board,
            clock,
            started,
            iterating: None,
            stopped: None,
            moved: None,
            window: clock.now(),
            window_bytes: 0,
            window_pages: 0,
            bandwidth: 0.0,
            promised_bandwidth: 0,
            ram: RamStats {
                total,
                remaining: total,
                ..RamStats::default()
            },
            disk: None,
        }
    }

    /// Setup is over: memory moves from now on. `expected` is the downtime limit.
    pub fn begin_iterating(&mut self, sent: u64, expected: Duration) {
        let now = self.clock.now();
        self.iterating = Some(now);
        (self.window, self.window_bytes, self.window_pages) = (now, sent, self.pages());
        self.ram.transferred = sent;
        let (total, setup) = (
            self.since_start(now),
            millis(now.saturating_sub(self.started)),
        );
        let (ram, disk) = (self.ram.clone(), self.disk.clone());
        self.board.update(|snapshot| {
            snapshot.status = held(snapshot, Status::Active);
            snapshot.setup_time = setup;
            snapshot.total_time = total;
            snapshot.expected_downtime = millis(expected);
            snapshot.ram = Some(ram);
            snapshot.disk = disk;
        });
    }

    /// The guest stands still from `at` on.
    pub fn begin_downtime(&mut self, at: Duration) {
        self.stopped = Some(at);
        self.board
            .update(|snapshot| snapshot.status = held(snapshot, Status::Device));
    }

    /// The destination has the guest: what is left to do here keeps nobody waiting.
    pub fn end_downtime(&mut self) {
        self.moved = Some(self.clock.now());
    }

    /// Measures and publishes if a window is over; `sent` bytes have left so far.
    pub fn tick(&mut self, sent: u64) {
        let now = self.clock.now();
        if now.saturating_sub(self.window) >= WINDOW {
            self.measure(sent, now);
            self.publish(sent, now);
        }
    }

    /// Publishes at once.
    pub fn show(&mut self, sent: u64) {
        self.publish(sent, self.clock.now());
    }

    /// Bytes per millisecond to count on for the last phase; 0 while unknown.
    pub fn bandwidth(&self) -> f64 {
        switchover::bandwidth(self.bandwidth, self.promised_bandwidth)
    }

    /// The end: freezes the figures and enters `status`, in one step, with what `change` adds.
    pub fn finish(&mut self, sent: u64, status: Status, change: impl FnOnce(&mut Snapshot)) {
        let now = self.clock.now();
        let total = self.since_start(now);
        let end = self.moved.unwrap_or(now);
        let downtime = self.stopped.map(|at| millis(end.saturating_sub(at)));
        self.ram.transferred = sent;
        if status == Status::Completed {
            self.ram.remaining = 0;
            if let Some(disk) = &mut self.disk {
                disk.remaining = 0;
            }
            let begin = self.iterating.unwrap_or(self.started);
            self.ram.mbps = switchover::overall_mbps(sent, now.saturating_sub(begin));
        }
        let ram = self.iterating.map(|_| self.ram.clone());
        let disk = self.disk.clone();
        self.board.update(|snapshot| {
            snapshot.status = status;
            snapshot.total_time = total;
            snapshot.ram = ram;
            snapshot.disk = disk;
            if status == Status::Completed {
                snapshot.downtime = downtime;
            }
            change(snapshot);
        });
    }

    fn measure(&mut self, sent: u64, now: Duration) {
        let bytes = sent.saturating_sub(self.window_bytes);
        let pages = self.pages().saturating_sub(self.window_pages);
        let measure = switchover::measure(bytes, pages, now.saturating_sub(self.window));
        self.ram.mbps = measure.mbps;
        self.ram.pages_per_second = measure.pages_per_second;
        if bytes > 0 {
            // A window in which nothing moved says nothing about what the line can do.
            self.bandwidth = measure.bandwidth;
        }
        (self.window, self.window_bytes, self.window_pages) = (now, sent, self.pages());
    }

    fn publish(&mut self, sent: u64, now: Duration) {
        self.ram.transferred = sent;
        let total = self.since_start(now);
        let on_disk = self.disk.as_ref().map_or(0, |disk| disk.remaining);
        let remaining = self.ram.remaining.saturating_add(on_disk);
        let expected = switchover::expected_downtime(remaining, self.bandwidth());
        let ram = self.iterating.map(|_| self.ram.clone());
        let disk = self.disk.clone();
        self.board.update(|snapshot| {
            snapshot.total_time = total;
            snapshot.expected_downtime = expected.unwrap_or(snapshot.expected_downtime);
            snapshot.pass = ram.as_ref().map_or(0, |ram| ram.dirty_sync_count);
            snapshot.ram = ram;
            snapshot.disk = disk;
        });
    }

    fn pages(&self) -> u64 {
        self.ram.normal + self.ram.duplicate
    }

    fn since_start(&self, now: Duration) -> u64 {
        millis(now.saturating_sub(self.started))
    }
}

/// Publishes the figures of an incoming migration; the throughput is that of all of it.
pub fn show_incoming(
    board: &Board,
    status: Status,
    total_time: Duration,
    (ram, disk, lost_bitmaps): (Option<RamStats>, Option<DiskStats>, Option<String>),
    error: Option<String>,
    handover_unknown: bool,
) {
    board.update(|snapshot| {
        snapshot.direction = Direction::Incoming;
        snapshot.status = status;
        snapshot.total_time = millis(total_time);
        snapshot.ram = ram.map(|ram| RamStats {
            mbps: switchover::overall_mbps(ram.transferred, total_time),
            ..ram
        });
        snapshot.disk = disk;
        snapshot.lost_bitmaps = lost_bitmaps;
        snapshot.error = error;
        snapshot.handover_unknown = handover_unknown;
        if status == Status::Completed {
            // Nobody listens there any more.
            snapshot.socket_address = None;
        }
    });
}

/// A migration that is being cancelled stays so until it has ended.
fn held(snapshot: &Snapshot, next: Status) -> Status {
    if snapshot.status == Status::Cancelling {
        Status::Cancelling
    } else {
        next
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}
