//! Drives while the machine is there: `block_resize`, `block_set_io_throttle`, `commit`,
//! `drive_add`, `drive_del`.
//!
//! QEMU: `block/monitor/block-hmp-cmds.c`.

use crate::block::Limits;
use crate::cli;
use crate::control;
use crate::monitor::args::Args;
use crate::monitor::session::{Error, Session};

/// `block_resize device size`.
pub(crate) fn block_resize(session: &mut Session, args: &Args) -> Result<(), Error> {
    let size = args.int("size")?.cast_unsigned();
    Ok(session.control.resize_drive(args.text("device")?, size)?)
}

/// `block_set_io_throttle device bps bps_rd bps_wr iops iops_rd iops_wr`.
pub(crate) fn block_set_io_throttle(session: &mut Session, args: &Args) -> Result<(), Error> {
    let mut values = [0; 6];
    for (value, name) in values.iter_mut().zip(THROTTLE) {
        // What is below zero is far beyond what can be.
        *value = args.int(name)?.cast_unsigned();
    }
    let [bytes, read_bytes, written_bytes, requests, reads, writes] = values;
    let limits = Limits {
        bytes: [bytes, read_bytes, written_bytes],
        requests: [requests, reads, writes],
    };
    Ok(session.control.limit_drive(args.text("device")?, limits)?)
}

/// `commit device|all`.
pub(crate) fn commit(session: &mut Session, args: &Args) -> Result<(), Error> {
    let done = match args.text("device")? {
        "all" => session.control.commit_all(),
        id => session.control.commit_drive(id),
    };
    done.map_err(plain)
}

/// `drive_add slot opts`.
pub(crate) fn drive_add(session: &mut Session, args: &Args) -> Result<(), Error> {
    if args.flag("node") {
        return Err(Error::Text(
            "drive_add -n: not built in this version".to_owned(),
        ));
    }
    let names: Vec<String> = session
        .control
        .drives()
        .into_iter()
        .map(|drive| drive.id)
        .collect();
    let config = cli::hot_drive(args.text("opts")?, &names).map_err(Error::Text)?;
    session.control.add_drive(&config).map_err(plain)?;
    session.print("OK\n");
    Ok(())
}

/// `drive_del device`.
pub(crate) fn drive_del(session: &mut Session, args: &Args) -> Result<(), Error> {
    let id = args.text("id")?;
    session.control.delete_drive(id).map_err(plain)
}

/// Without `Error: ` in front, as these commands answer.
fn plain(control::Error(text): control::Error) -> Error {
    Error::Text(text)
}

/// Arguments of the limits.
const THROTTLE: [&str; 6] = ["bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr"];
