//! `info migrate`: 10.0's lines in 10.0's order, with 7.2's `skipped:` line.
//!
//! Beyond QEMU: time and RAM lines stay after a migration that was cancelled or failed, and a
//! hand-over whose end is unknown says so. QEMU: `hmp_info_migrate`.

use std::fmt::Write as _;

use crate::migration::stats::{RamStats, Snapshot, Status};
use crate::monitor::args::Args;
use crate::monitor::session::{Error, Session};
use crate::vm::memory::PAGE_SIZE;

/// `info migrate`.
pub(crate) fn info_migrate(session: &mut Session, _: &Args) -> Result<(), Error> {
    let control = &session.control;
    let text = globals(&control.migration_globals(), &control.migration_blockers())
        + &status(&control.migration());
    session.print(&text);
    Ok(())
}

fn globals(globals: &[(&'static str, String)], blockers: &[String]) -> String {
    let mut text = "globals:\n".to_owned();
    for (name, value) in globals {
        line(&mut text, &format!("{name}: {value}"));
    }
    if !blockers.is_empty() {
        line(&mut text, "Outgoing migration blocked:");
        for blocker in blockers {
            line(&mut text, &format!("  {blocker}"));
        }
    }
    text
}

fn status(snapshot: &Snapshot) -> String {
    let mut text = String::new();
    if snapshot.status != Status::None {
        let cause = match (&snapshot.error, snapshot.status) {
            (Some(error), Status::Failed) => format!(" ({error})"),
            _ => String::new(),
        };
        line(
            &mut text,
            &format!("Migration status: {}{cause}", snapshot.status.name()),
        );
        if snapshot.handover_unknown {
            line(&mut text, "hand-over: unknown");
        }
        line(
            &mut text,
            &format!("total time: {} ms", snapshot.total_time),
        );
        if let Some(ram) = &snapshot.ram {
            times(&mut text, snapshot);
            memory(&mut text, ram);
        }
        if let Some(disk) = &snapshot.disk {
            for (what, bytes) in [
                ("transferred", disk.transferred),
                ("remaining", disk.remaining),
                ("total", disk.total),
            ] {
                line(&mut text, &format!("{what} disk: {} kbytes", bytes >> 10));
            }
        }
    }
    if let Some(why) = &snapshot.lost_bitmaps {
        line(&mut text, &format!("dirty bitmaps: lost ({why})"));
    }
    if let Some(address) = &snapshot.socket_address {
        text.push_str("socket address: [\n");
        line(&mut text, &format!("\t{address}"));
        text.push_str("]\n");
    }
    text
}

fn times(text: &mut String, snapshot: &Snapshot) {
    if snapshot.status.is_running() {
        line(
            text,
            &format!("expected downtime: {} ms", snapshot.expected_downtime),
        );
    } else if let Some(downtime) = snapshot.downtime {
        line(text, &format!("downtime: {downtime} ms"));
    }
    line(text, &format!("setup: {} ms", snapshot.setup_time));
}

fn memory(text: &mut String, ram: &RamStats) {
    let normal_bytes = ram.normal.saturating_mul(PAGE_SIZE as u64);
    line(
        text,
        &format!("transferred ram: {} kbytes", ram.transferred >> 10),
    );
    line(text, &format!("throughput: {:.2} mbps", ram.mbps));
    line(
        text,
        &format!("remaining ram: {} kbytes", ram.remaining >> 10),
    );
    line(text, &format!("total ram: {} kbytes", ram.total >> 10));
    line(text, &format!("duplicate: {} pages", ram.duplicate));
    line(text, "skipped: 0 pages");
    line(text, &format!("normal: {} pages", ram.normal));
    line(
        text,
        &format!("normal bytes: {} kbytes", normal_bytes >> 10),
    );
    line(text, &format!("dirty sync count: {}", ram.dirty_sync_count));
    line(text, &format!("page size: {} kbytes", PAGE_SIZE >> 10));
    line(text, "multifd bytes: 0 kbytes");
    line(text, &format!("pages-per-second: {}", ram.pages_per_second));
    if ram.dirty_pages_rate > 0 {
        line(
            text,
            &format!("dirty pages rate: {} pages", ram.dirty_pages_rate),
        );
    }
    for (what, bytes) in [
        ("precopy", ram.precopy_bytes),
        ("downtime", ram.downtime_bytes),
    ] {
        if bytes > 0 {
            line(text, &format!("{what} ram: {} kbytes", bytes >> 10));
        }
    }
}

fn line(text: &mut String, line: &str) {
    // Writing to a String can not fail.
    let _ = writeln!(text, "{line}");
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The figures of a migration captured on QEMU 7.2.
    fn completed() -> Snapshot {
        Snapshot {
            status: Status::Completed,
            total_time: 13,
            downtime: Some(2),
            ram: Some(RamStats {
                transferred: 309 << 10,
                total: 33352 << 10,
                duplicate: 8279,
                normal: 59,
                mbps: 265.99,
                dirty_sync_count: 2,
                downtime_bytes: 309 << 10,
                ..RamStats::default()
            }),
            ..Snapshot::default()
        }
    }

    #[test]
    fn completed_as_qemu_prints_it() {
        assert_eq!(
            status(&completed()),
            "Migration status: completed
total time: 13 ms
downtime: 2 ms
setup: 0 ms
transferred ram: 309 kbytes
throughput: 265.99 mbps
remaining ram: 0 kbytes
total ram: 33352 kbytes
duplicate: 8279 pages
skipped: 0 pages
normal: 59 pages
normal bytes: 236 kbytes
dirty sync count: 2
page size: 4 kbytes
multifd bytes: 0 kbytes
pages-per-second: 0
downtime ram: 309 kbytes
"
        );
    }

    #[test]
    fn active() {
        let mut snapshot = completed();
        snapshot.status = Status::Active;
        snapshot.expected_downtime = 40;
        if let Some(ram) = &mut snapshot.ram {
            ram.dirty_pages_rate = 74;
            ram.precopy_bytes = 2308 << 10;
        }
        let text = status(&snapshot);
        assert!(text.contains("total time: 13 ms\nexpected downtime: 40 ms\nsetup: 0 ms\n"));
        assert!(text.ends_with(
            "pages-per-second: 0\ndirty pages rate: 74 pages\nprecopy ram: 2308 kbytes\n\
             downtime ram: 309 kbytes\n"
        ));
    }

    #[test]
    fn failed_keeps_its_figures() {
        let mut snapshot = completed();
        snapshot.status = Status::Failed;
        snapshot.error = Some("Connection refused".to_owned());
        snapshot.handover_unknown = true;
        let text = status(&snapshot);
        assert!(text.starts_with(
            "Migration status: failed (Connection refused)\nhand-over: unknown\ntotal time: 13 ms\n"
        ));
        assert!(text.contains("transferred ram: 309 kbytes"));
    }

    #[test]
    fn nothing_listening_and_blocked() {
        assert_eq!(status(&Snapshot::default()), "");
        let listening = Snapshot {
            status: Status::Setup,
            socket_address: Some("tcp:127.0.0.1:4444".to_owned()),
            ..Snapshot::default()
        };
        assert_eq!(
            status(&listening),
            "Migration status: setup\ntotal time: 0 ms\nsocket address: [\n\ttcp:127.0.0.1:4444\n]\n"
        );
        assert_eq!(
            globals(
                &[("store-global-state", "on".to_owned())],
                &["disk".to_owned()]
            ),
            "globals:\nstore-global-state: on\nOutgoing migration blocked:\n  disk\n"
        );
    }
}
