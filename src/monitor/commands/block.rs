//! `info block`, `info blockstats`: 7.2's texts, which are 10.0's.
//!
//! QEMU: `block/monitor/block-hmp-cmds.c`, `block/qapi.c`.

use std::fmt::Write as _;

use crate::control::{DriveInfo, DriveStats};
use crate::monitor::args::Args;
use crate::monitor::session::{Error, Session};

/// `info block [-n] [-v] [device]`: nothing about a device that is not there.
pub(crate) fn info_block(session: &mut Session, args: &Args) -> Result<(), Error> {
    let drives = session.control.drives();
    let (wanted, is_verbose) = (args.text_if_any("device"), args.flag("verbose"));
    let text = match args.flag("nodes") {
        true => nodes(&drives, wanted, is_verbose),
        false => blocks(&drives, wanted, is_verbose),
    };
    session.print(&text);
    Ok(())
}

/// `info blockstats`.
pub(crate) fn info_blockstats(session: &mut Session, _: &Args) -> Result<(), Error> {
    let text: String = session.control.drive_stats().iter().map(stats).collect();
    session.print(&text);
    Ok(())
}

fn blocks(drives: &[DriveInfo], wanted: Option<&str>, is_verbose: bool) -> String {
    let mut text = String::new();
    for (index, drive) in drives.iter().enumerate() {
        if wanted.is_some_and(|wanted| wanted != drive.id) {
            continue;
        }
        if index > 0 {
            text.push('\n');
        }
        let name = format!("{} ({})", drive.id, node(drive.node));
        image(&mut text, &name, drive.format, drive);
        match &drive.disk {
            Some(disk) => line(&mut text, &format!("    Attached to:      {disk}")),
            None => line(&mut text, "    Removable device: not locked, tray closed"),
        }
        if let Some(fault) = drive.fault {
            line(&mut text, &format!("    I/O status:       {fault}"));
        }
        line(&mut text, "    Cache mode:       writeback");
        if is_verbose {
            details(&mut text, drive.format, drive);
        }
    }
    text
}

/// The layers of each drive, the last drive's first.
fn nodes(drives: &[DriveInfo], wanted: Option<&str>, is_verbose: bool) -> String {
    let mut text = String::new();
    let layers = drives.iter().rev().flat_map(|drive| {
        [
            (node(drive.node), drive.format, drive),
            (node(drive.node - 1), "file", drive),
        ]
    });
    for (index, (name, format, drive)) in layers.enumerate() {
        if wanted.is_some_and(|wanted| wanted != name) {
            continue;
        }
        if index > 0 {
            text.push('\n');
        }
        image(&mut text, &name, format, drive);
        line(&mut text, "    Cache mode:       writeback");
        if is_verbose {
            details(&mut text, format, drive);
        }
    }
    text
}

fn image(text: &mut String, name: &str, format: &str, drive: &DriveInfo) {
    let mode = if drive.is_read_only {
        ", read-only"
    } else {
        ""
    };
    line(text, &format!("{name}: {} ({format}{mode})", drive.file));
}

fn details(text: &mut String, format: &str, drive: &DriveInfo) {
    line(text, "\nImages:");
    line(text, &format!("image: {}", drive.file));
    line(text, &format!("file format: {format}"));
    let (len, allocated) = (size(drive.len), size(drive.allocated));
    line(text, &format!("virtual size: {len} ({} bytes)", drive.len));
    line(text, &format!("disk size: {allocated}"));
}

fn stats(stats: &DriveStats) -> String {
    let [read, written] = stats.bytes;
    let [reads, writes, flushes] = stats.operations;
    let [read_time, write_time, flush_time] = stats.nanoseconds;
    format!(
        "{}: rd_bytes={read} wr_bytes={written} rd_operations={reads} wr_operations={writes} \
         flush_operations={flushes} wr_total_time_ns={write_time} rd_total_time_ns={read_time} \
         flush_total_time_ns={flush_time} rd_merged=0 wr_merged=0 idle_time_ns={}\n",
        stats.id, stats.idle
    )
}

/// QEMU makes its names of a count and two random digits.
fn node(number: usize) -> String {
    format!("#block{number}00")
}

/// Three digits and a unit, as QEMU's `size_to_str`.
fn size(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"];
    // A unit begins a little before 1024 of the one below, where three digits would end.
    let mut unit = 0;
    while unit + 1 < UNITS.len() && bytes as f64 / f64::powi(1024.0, unit as i32) >= 1000.0 {
        unit += 1;
    }
    let number = bytes as f64 / f64::powi(1024.0, unit as i32);
    let digits = match number {
        ..1.0 => 3,
        ..10.0 => 2,
        ..100.0 => 1,
        _ => 0,
    };
    let text = format!("{number:.digits$}");
    let text = match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.'),
        false => &text,
    };
    format!("{text} {}B", UNITS[unit])
}

fn line(text: &mut String, line: &str) {
    // Writing to a String can not fail.
    let _ = writeln!(text, "{line}");
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drives() -> Vec<DriveInfo> {
        let drive = |id: &str, node, file: &str, disk: Option<&str>| DriveInfo {
            id: id.to_owned(),
            node,
            file: file.to_owned(),
            format: "raw",
            is_read_only: node == 3,
            disk: disk.map(str::to_owned),
            fault: None,
            len: 5 << 20,
            allocated: 0,
        };
        vec![
            drive("d0", 1, "a.img", Some("x")),
            drive(
                "d1",
                3,
                "odd.img",
                Some("/machine/peripheral-anon/device[0]"),
            ),
            drive("d2", 5, "b.img", None),
        ]
    }

    #[test]
    fn drives_are_shown_as_qemu_shows_them() {
        assert_eq!(
            blocks(&drives(), None, false),
            "d0 (#block100): a.img (raw)\n    Attached to:      x\n    Cache mode:       writeback\n\
             \nd1 (#block300): odd.img (raw, read-only)\n    \
             Attached to:      /machine/peripheral-anon/device[0]\n    \
             Cache mode:       writeback\n\
             \nd2 (#block500): b.img (raw)\n    Removable device: not locked, tray closed\n    \
             Cache mode:       writeback\n"
        );
        assert_eq!(
            blocks(&drives(), Some("d2"), true),
            "\nd2 (#block500): b.img (raw)\n    Removable device: not locked, tray closed\n    \
             Cache mode:       writeback\n\nImages:\nimage: b.img\nfile format: raw\n\
             virtual size: 5 MiB (5242880 bytes)\ndisk size: 0 B\n"
        );
        assert_eq!(blocks(&drives(), Some("foo"), false), "");
        assert_eq!(nodes(&drives(), Some("d0"), false), "");
        assert!(nodes(&drives(), None, false).starts_with(
            "#block500: b.img (raw)\n    Cache mode:       writeback\n\n#block400: b.img (file)\n"
        ));
    }

    #[test]
    fn sizes_have_three_digits() {
        for (bytes, text) in [
            (0, "0 B"),
            (512, "512 B"),
            (999, "999 B"),
            (1000, "0.977 KiB"),
            (1024, "1 KiB"),
            (1536, "1.5 KiB"),
            (10 << 20, "10 MiB"),
            (1_234_567_890, "1.15 GiB"),
            (u64::MAX, "16 EiB"),
        ] {
            assert_eq!(size(bytes), text);
        }
    }

    #[test]
    fn statistics_are_one_line() {
        let one = DriveStats {
            id: "d0".to_owned(),
            bytes: [512, 1024],
            operations: [1, 2, 3],
            nanoseconds: [4, 5, 6],
            idle: 7,
        };
        assert_eq!(
            stats(&one),
            "d0: rd_bytes=512 wr_bytes=1024 rd_operations=1 wr_operations=2 flush_operations=3 \
             wr_total_time_ns=5 rd_total_time_ns=4 flush_total_time_ns=6 rd_merged=0 wr_merged=0 \
             idle_time_ns=7\n"
        );
    }
}
