//! Tests of the whole engine: both scripts, a scripted guest, and a connection that fails.

mod bitmaps;
mod cuts;
mod disks;
mod faults;
mod flips;
mod golden;
mod own;
mod round_trip;
mod stock;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::Error;
use super::block;
use super::channel::Channel;
use super::clock::HostClock;
use super::dest::Incoming;
use super::dialect::Dialect;
use super::fake::{FakeGuest, Owners, Step};
use super::handover::PointOfNoReturn;
use super::memory_channel::{Faults, Link, Recording, SideClock, Way};
use super::source::{Limits, Outgoing};
use super::stats::{Board, Snapshot, Status};
use crate::vm::guest::Guest;
use crate::vm::run_state::RunState;

/// Both sides' ends of one migration.
struct Outcome {
    source: Result<(), Error>,
    dest: Result<RunState, Error>,
    source_board: Snapshot,
    dest_board: Snapshot,
    link: Arc<Link>,
}

/// What varies between migrations.
#[derive(Clone)]
struct Setting {
    faults: Faults,
    kind: Kind,
    limits: Limits,
    autostart: bool,
    /// How the disks go along, if they do.
    block: Option<block::Options>,
    /// Whether dirty bitmaps go along.
    bitmaps: bool,
}

/// The two partners.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// hmpsh and hmpsh.
    Hmpsh,
    /// hmpsh and something that behaves as QEMU does.
    Stock,
    /// hmpsh and hmpsh, return path off.
    Silent,
    /// The same with something that behaves as QEMU does.
    SilentStock,
}

impl Setting {
    fn new(kind: Kind) -> Self {
        let limits = Limits {
            max_bandwidth: 0,
            downtime_limit: Duration::from_millis(300),
            avail_switchover_bandwidth: 0,
        };
        Self {
            faults: Faults::default(),
            kind,
            limits,
            autostart: true,
            block: None,
            bitmaps: false,
        }
    }

    fn faulty(kind: Kind, faults: Faults) -> Self {
        Self {
            faults,
            ..Self::new(kind)
        }
    }
}

/// Loads a stream that was kept.
fn load(dest: &dyn Guest, board: &Board, stream: &[u8]) -> Result<RunState, Error> {
    let order = Incoming {
        guest: dest,
        board,
        clock: &HostClock::new(),
        autostart: &Mutex::new(true),
        point: &PointOfNoReturn::new(),
        uuid: None,
        is_patient: false,
        dialect: Dialect::default(),
    };
    order.run(Recording::of(stream))
}

fn migrate(source: &FakeGuest, dest: &FakeGuest, setting: &Setting) -> Outcome {
    let link = Link::new(setting.faults.clone());
    let (source_board, dest_board) = (Board::default(), Board::default());
    let limits = || setting.limits;
    let send = |channel: Box<dyn Channel>, clock: &SideClock| {
        let outgoing = Outgoing {
            guest: source,
            limits: &limits,
            block: setting.block,
            bitmaps: setting.bitmaps,
            return_path: matches!(setting.kind, Kind::Hmpsh | Kind::Stock),
            is_patient: false,
            dialect: Dialect::default(),
            board: &source_board,
            clock,
            started: link.now(),
            cancel: &link.cancel,
            point: &link.point,
        };
        outgoing.run(channel)
    };
    let receive = |channel: Box<dyn Channel>, clock: &SideClock| match setting.kind {
        Kind::Stock | Kind::SilentStock => stock::receive(dest, channel),
        Kind::Hmpsh | Kind::Silent => {
            let (board, autostart) = (&dest_board, &Mutex::new(setting.autostart));
            Incoming {
                guest: dest,
                board,
                clock,
                autostart,
                point: &PointOfNoReturn::new(),
                uuid: None,
                is_patient: false,
                dialect: Dialect::default(),
            }
            .run(channel)
        }
    };
    let (sent, received) = link.run(send, receive);
    Outcome {
        source: sent,
        dest: received,
        source_board: source_board.read(),
        dest_board: dest_board.read(),
        link,
    }
}

const PAGES: [usize; 2] = [3, 1];

/// A small guest that runs, and dirties pages at the worst moments.
fn running_guest(owners: &Arc<Owners>) -> FakeGuest {
    let guest = FakeGuest::new(owners, &PAGES, 2);
    guest.store((0, 0, 1));
    guest.store((1, 0, 0));
    guest.set_device(0, 0x1234);
    guest.set_device(1, 0x5678);
    guest.plan([
        Step {
            before: vec![(0, 2, 5)],
            after: vec![(0, 2, 0)],
        },
        Step {
            before: vec![(0, 0, 3)],
            after: vec![],
        },
    ]);
    guest.start().unwrap();
    guest
}

fn blank_guest(owners: &Arc<Owners>) -> FakeGuest {
    FakeGuest::new(owners, &PAGES, 2)
}

/// After a migration that failed, with the guest at the source: the next one must work and bring
/// everything. `Err` says what is wrong.
fn second_attempt(source: &FakeGuest, owners: &Arc<Owners>, kind: Kind) -> Result<(), String> {
    let dest = blank_guest(owners);
    let outcome = migrate(source, &dest, &Setting::new(kind));
    outcome
        .source
        .map_err(|error| format!("second attempt, source: {error}"))?;
    outcome
        .dest
        .map_err(|error| format!("second attempt, destination: {error}"))?;
    if source.content() != dest.content() {
        return Err("second attempt: memory or devices differ".to_owned());
    }
    Ok(())
}

/// What must hold after any migration, and whether the source says that it does not know.
fn verdict(
    source: &FakeGuest,
    dest: &FakeGuest,
    outcome: &Outcome,
    owners: &Owners,
) -> Result<bool, String> {
    let board = &outcome.source_board;
    if owners.was_double() {
        return Err("two owners".to_owned());
    }
    if outcome.dest.is_ok() != dest.run_state().is_running() {
        return Err(format!(
            "the destination says {:?} and does not act so",
            outcome.dest
        ));
    }
    if outcome.source.is_ok() != (board.status == Status::Completed) {
        return Err(format!("the source's board says {:?}", board.status));
    }
    if dest.run_state().is_running() && source.content() != dest.content() {
        return Err("a guest that differs was started".to_owned());
    }
    let expected = match (board.status, board.handover_unknown) {
        (Status::Completed, false) => RunState::PostMigrate,
        (Status::Failed, true) => RunState::PostMigrate,
        (Status::Failed | Status::Cancelled, false) => RunState::Running,
        other => return Err(format!("the source ends as {other:?}")),
    };
    if source.run_state() != expected {
        return Err(format!(
            "the source is {:?}, its board says {board:?}",
            source.run_state()
        ));
    }
    if !board.handover_unknown && owners.running() != 1 {
        return Err(format!(
            "nobody has the guest and the source says {:?}",
            board.status
        ));
    }
    Ok(board.handover_unknown)
}
