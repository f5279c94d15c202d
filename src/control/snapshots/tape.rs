//! A machine's state as bytes in a row: the engine at one end of a pipe, a snapshot at the other.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::sync::Mutex;
use std::time::Duration;

use rustix::pipe::{PipeFlags, pipe_with};

use super::super::job::Brake;
use super::still::Still;
use crate::migration::channel;
use crate::migration::clock::{Clock, HostClock};
use crate::migration::dest::Incoming;
use crate::migration::params::Settings;
use crate::migration::source::{Limits, Outgoing};
use crate::migration::stats::Board;
use crate::migration::uri::Uri;
use crate::vm::guest::Guest;
use crate::vm::machine::Machine;
use crate::vm::run_state::RunState;

/// Asked again and again whether to go on; the error why not.
type GoOn<'a> = &'a (dyn Fn() -> io::Result<()> + Sync);

/// Writes the state of a guest that stands still to `to`.
pub(super) fn record(
    machine: &Machine,
    before: RunState,
    settings: &Settings,
    to: &mut dyn Write,
    go_on: GoOn<'_>,
) -> io::Result<()> {
    let guest = Still { machine, before };
    let (exit, entrance) = pipe_with(PipeFlags::CLOEXEC)?;
    let brake = Brake::new().map_err(io::Error::other)?;
    let prepared = channel::prepare(&uri(), &mut named(entrance)).map_err(io::Error::other)?;
    let channel = prepared.connect(&brake.cancel).map_err(io::Error::other)?;
    let (board, clock) = (Board::default(), HostClock::new());
    let limits = || Limits {
        max_bandwidth: 0,
        downtime_limit: Duration::MAX,
        avail_switchover_bandwidth: 0,
    };
    let outgoing = Outgoing {
        guest: &guest,
        limits: &limits,
        block: None,
        bitmaps: false,
        return_path: false,
        is_patient: true,
        dialect: settings.dialect(),
        board: &board,
        clock: &clock,
        started: clock.now(),
        cancel: &brake.cancel,
        point: &brake.point,
    };
    std::thread::scope(|scope| {
        let engine = scope.spawn(|| outgoing.run(channel).map_err(io::Error::other));
        // The end of this one closes the pipe, which ends the engine.
        let copied = copy(&mut File::from(exit), to, go_on);
        let sent = engine.join().unwrap_or_else(|_| Err(panicked()));
        copied.and(sent.map(drop))
    })
}

/// Puts the state that `from` has into a machine that has not run.
pub(super) fn play(
    from: &mut (dyn Read + Send),
    guest: &dyn Guest,
    settings: &Settings,
    uuid: Option<[u8; 16]>,
    go_on: GoOn<'_>,
) -> io::Result<()> {
    let (exit, entrance) = pipe_with(PipeFlags::CLOEXEC)?;
    let brake = Brake::new().map_err(io::Error::other)?;
    let listener = channel::listen(&uri(), &mut named(exit), &brake.cancel);
    let channel = listener
        .map_err(io::Error::other)?
        .accept()
        .map_err(io::Error::other)?;
    let (board, clock) = (Board::default(), HostClock::new());
    let incoming = Incoming {
        guest,
        board: &board,
        clock: &clock,
        autostart: &Mutex::new(false),
        point: &brake.point,
        uuid,
        is_patient: true,
        dialect: settings.dialect(),
    };
    std::thread::scope(|scope| {
        let feeder = scope.spawn(|| copy(from, &mut File::from(entrance), go_on));
        let loaded = incoming.run(channel).map_err(io::Error::other);
        let fed = feeder.join().unwrap_or_else(|_| Err(panicked()));
        match (loaded, fed) {
            (Ok(_), Ok(())) => Ok(()),
            // The engine needs no more.
            (Ok(_), Err(fed)) if fed.kind() == io::ErrorKind::BrokenPipe => Ok(()),
            // The engine has gone because of what it read.
            (Err(error), Err(fed)) if fed.kind() == io::ErrorKind::BrokenPipe => Err(error),
            // Or it misses what could not be read.
            (_, Err(error)) | (Err(error), Ok(())) => Err(error),
        }
    })
}

/// All bytes, in pieces of a pipe's size.
fn copy(
    from: &mut (impl Read + ?Sized),
    to: &mut (impl Write + ?Sized),
    go_on: GoOn<'_>,
) -> io::Result<()> {
    let mut bytes = vec![0; 256 << 10];
    loop {
        go_on()?;
        match from.read(&mut bytes) {
            Ok(0) => return Ok(()),
            Ok(count) => to.write_all(&bytes[..count])?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

fn uri() -> Uri {
    Uri::Fd(NAME.to_owned())
}

fn named(fd: OwnedFd) -> BTreeMap<String, OwnedFd> {
    BTreeMap::from([(NAME.to_owned(), fd)])
}

fn panicked() -> io::Error {
    io::Error::other("internal error in the migration thread")
}

/// The pipe's name among descriptors.
const NAME: &str = "tape";
