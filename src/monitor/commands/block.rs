//! `info block`, `info blockstats`: 7.2's texts, which are 10.0's.
//!
//! QEMU: `block/monitor/block-hmp-cmds.c`, `block/qapi.c`.

use std::fmt::Write as _;

use crate::block::{Layer, Limits};
use crate::config::Zeroes;
use crate::control::{DriveInfo, DriveStats};
use crate::monitor::args::Args;
use crate::monitor::session::{Error, Session};
use crate::units::three_digits;

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
        if let (None, Some(disk)) = (drive.layers.first(), &drive.disk) {
            line(&mut text, &format!("{disk}: [not inserted]"));
            line(&mut text, &format!("    Attached to:      {disk}"));
            continue;
        }
        let [_, top] = drive.nodes(0);
        let name = format!("{} ({top})", drive.id);
        image(&mut text, &name, drive, 0, drive.format(0));
        match &drive.disk {
            Some(disk) => line(&mut text, &format!("    Attached to:      {disk}")),
            None => line(&mut text, "    Removable device: not locked, tray closed"),
        }
        if let Some(fault) = drive.fault {
            line(&mut text, &format!("    I/O status:       {fault}"));
        }
        properties(&mut text, drive, 0, true);
        if is_verbose {
            images(&mut text, drive, 0, None);
        }
    }
    text
}

/// The nodes of each drive, the last drive's and the last layer's first.
fn nodes(drives: &[DriveInfo], wanted: Option<&str>, is_verbose: bool) -> String {
    let mut text = String::new();
    let all = drives.iter().rev().flat_map(|drive| {
        let layers = (0..drive.layers.len()).rev();
        layers.flat_map(move |layer| {
            let [file, top] = drive.nodes(layer);
            [
                (top, drive, layer, None),
                (file, drive, layer, Some("file")),
            ]
        })
    });
    for (index, (name, drive, layer, file)) in all.enumerate() {
        if wanted.is_some_and(|wanted| wanted != name) {
            continue;
        }
        if index > 0 {
            text.push('\n');
        }
        let format = file.unwrap_or(drive.format(layer));
        image(&mut text, &name, drive, layer, format);
        properties(&mut text, drive, layer, file.is_none());
        if is_verbose {
            images(&mut text, drive, layer, file);
        }
    }
    text
}

impl DriveInfo {
    /// Names of the nodes of a layer: file and format. QEMU makes them of a count and two random
    /// digits.
    fn nodes(&self, layer: usize) -> [String; 2] {
        [0, 1].map(|node| format!("#block{}00", self.nodes_before + 2 * layer + node))
    }

    fn format(&self, layer: usize) -> &'static str {
        let layer = self.layers.get(layer);
        layer.map_or("", |layer| layer.format.name())
    }
}

fn image(text: &mut String, name: &str, drive: &DriveInfo, layer: usize, format: &str) {
    let mode = match drive.is_read_only || layer > 0 {
        true => ", read-only",
        false => "",
    };
    let file = drive.layers.get(layer).map_or("", |layer| &layer.file);
    line(text, &format!("{name}: {file} ({format}{mode})"));
}

fn properties(text: &mut String, drive: &DriveInfo, layer: usize, is_format: bool) {
    let cache = drive.cache;
    // Only the drive's own node writes through: what is below it is told to.
    let mode = match cache.is_writeback || layer > 0 || !is_format {
        true => "writeback",
        false => "writethrough",
    };
    let direct = if cache.is_direct { ", direct" } else { "" };
    let ignores = match cache.ignores_flushes {
        true => ", ignore flushes",
        false => "",
    };
    line(
        text,
        &format!("    Cache mode:       {mode}{direct}{ignores}"),
    );
    if !is_format {
        return;
    }
    if let Some(behind) = drive.layers.get(layer + 1) {
        let behind = &behind.file;
        let depth = drive.layers.len() - 1 - layer;
        line(
            text,
            &format!("    Backing file:     {behind} (chain depth: {depth})"),
        );
    }
    if drive.zeroes != Zeroes::Off && layer == 0 {
        let zeroes = drive.zeroes.name();
        line(text, &format!("    Detect zeroes:    {zeroes}"));
    }
    let (limits, group) = &drive.limits;
    if *limits != Limits::default() && layer == 0 {
        let Limits {
            bytes: [bps, bps_rd, bps_wr],
            requests: [iops, iops_rd, iops_wr],
        } = limits;
        let limits = format!(
            "    I/O throttling:   bps={bps} bps_rd={bps_rd} bps_wr={bps_wr} bps_max=0 \
             bps_rd_max=0 bps_wr_max=0 iops={iops} iops_rd={iops_rd} iops_wr={iops_wr} iops_max=0 \
             iops_rd_max=0 iops_wr_max=0 iops_size=0 group={group}"
        );
        line(text, &limits);
    }
}

/// A layer and all behind it, or only the file.
fn images(text: &mut String, drive: &DriveInfo, layer: usize, file: Option<&str>) {
    line(text, "\nImages:");
    let count = file.map_or(drive.layers.len(), |_| 1);
    let mut layers = drive.layers.iter().skip(layer).take(count).peekable();
    while let Some(layer) = layers.next() {
        line(text, &format!("image: {}", layer.file));
        line(
            text,
            &format!("file format: {}", file.unwrap_or(layer.format.name())),
        );
        let len = file.map_or(layer.len, |_| layer.file_len);
        let (size, allocated) = (three_digits(len), three_digits(layer.allocated));
        line(text, &format!("virtual size: {size} ({len} bytes)"));
        line(text, &format!("disk size: {allocated}"));
        if file.is_none() {
            let actual = layers.peek().map_or("", |behind| &behind.file);
            facts(text, layer, actual);
        }
    }
}

/// What only qcow2 says of itself; `actual` is where what is behind it was found.
fn facts(text: &mut String, layer: &Layer, actual: &str) {
    let Some(facts) = layer.facts else {
        return;
    };
    line(text, &format!("cluster_size: {}", facts.cluster_size));
    if let Some((name, format)) = &layer.behind {
        let place = match name == actual {
            true => String::new(),
            false => format!(" (actual path: {actual})"),
        };
        line(text, &format!("backing file: {name}{place}"));
        if let Some(format) = format {
            line(text, &format!("backing file format: {}", format.name()));
        }
    }
    line(text, "Format specific information:");
    let compat = if facts.is_version_3 { "1.1" } else { "0.10" };
    line(text, &format!("    compat: {compat}"));
    let compression = if facts.is_zstd { "zstd" } else { "zlib" };
    line(text, &format!("    compression type: {compression}"));
    if facts.is_version_3 {
        line(text, &format!("    lazy refcounts: {}", facts.is_lazy));
    }
    line(text, &format!("    refcount bits: {}", facts.refcount_bits));
    if facts.is_version_3 {
        // An image with either is not opened.
        line(text, "    corrupt: false");
        line(text, "    extended l2: false");
    }
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

fn line(text: &mut String, line: &str) {
    // Writing to a String can not fail.
    let _ = writeln!(text, "{line}");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Cache, Format};

    fn drives() -> Vec<DriveInfo> {
        let drive = |id: &str, node: usize, file: &str, disk: Option<&str>| DriveInfo {
            id: id.to_owned(),
            nodes_before: node - 1,
            layers: vec![Layer {
                file: file.to_owned(),
                format: Format::Raw,
                len: 5 << 20,
                file_len: 5 << 20,
                allocated: 0,
                behind: None,
                facts: None,
            }],
            cache: Cache::default(),
            zeroes: Zeroes::Off,
            limits: (Limits::default(), String::new()),
            is_read_only: node == 3,
            disk: disk.map(str::to_owned),
            fault: None,
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
