//! `savevm`, `loadvm`, `delvm`, `info snapshots`.
//!
//! QEMU: `migration/savevm.c`, `block/qapi.c` (`bdrv_snapshot_dump`).

use std::fmt::Write as _;

use crate::block::snapshots::Snapshot;
use crate::calendar::Date;
use crate::control::SnapshotList;
use crate::monitor::args::Args;
use crate::monitor::session::{Error, Session};
use crate::units;

/// `savevm [tag]`.
pub(crate) fn savevm(session: &mut Session, args: &Args) -> Result<(), Error> {
    Ok(session.control.save_snapshot(args.text_if_any("name"))?)
}

/// `loadvm tag`.
pub(crate) fn loadvm(session: &mut Session, args: &Args) -> Result<(), Error> {
    Ok(session.control.load_snapshot(args.text("name")?)?)
}

/// `delvm tag`.
pub(crate) fn delvm(session: &mut Session, args: &Args) -> Result<(), Error> {
    Ok(session.control.delete_snapshot(args.text("name")?)?)
}

/// `info snapshots`.
pub(crate) fn info_snapshots(session: &mut Session, _: &Args) -> Result<(), Error> {
    let list = session.control.snapshots();
    let text = list.map_err(|error| Error::Text(error.to_string()));
    session.print(&listed(&text?));
    Ok(())
}

fn listed(list: &SnapshotList) -> String {
    if list.whole.is_empty() && list.partial.is_empty() {
        return "There is no snapshot available.\n".to_owned();
    }
    let mut text = "List of snapshots present on all disks:\n".to_owned();
    match list.whole.is_empty() {
        true => text.push_str("None\n"),
        false => {
            text.push_str(&head());
            for snapshot in &list.whole {
                // Not every disk has given it the same.
                text.push_str(&line("--", snapshot));
            }
        }
    }
    for (drive, snapshots) in &list.partial {
        // Writing to a String can not fail.
        let _ = write!(
            text,
            "\nList of partial (non-loadable) snapshots on '{drive}':\n{}",
            head()
        );
        for snapshot in snapshots {
            text.push_str(&line(&snapshot.id(), snapshot));
        }
    }
    text
}

fn head() -> String {
    format!(
        "{:<10}{:<17}{:>8}{:>20}{:>13}{:>11}\n",
        "ID", "TAG", "VM SIZE", "DATE", "VM CLOCK", "ICOUNT"
    )
}

fn line(id: &str, snapshot: &Snapshot) -> String {
    let size = units::three_digits(snapshot.state().map_or(0, |state| state.len));
    let Date {
        year,
        month,
        day,
        hour,
        minute,
        second,
        ..
    } = Date::at(snapshot.seconds.into());
    let date = format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02}");
    let seconds = snapshot.vm_clock / 1_000_000_000;
    let clock = format!(
        "{:02}:{:02}:{:02}.{:03}",
        seconds / 3600,
        seconds / 60 % 60,
        seconds % 60,
        snapshot.vm_clock / 1_000_000 % 1000
    );
    let icount = snapshot.icount.map(|count| count.to_string());
    format!(
        "{id:<9} {:<16} {size:>8}{date:>20}{clock:>13}{:>11}\n",
        snapshot.name(),
        icount.unwrap_or_default()
    )
}
