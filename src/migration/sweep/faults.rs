//! Peers that hang, operators who cancel, partners that do not fit.

use std::sync::atomic::Ordering;

use super::*;

/// One migration that should not succeed; the guest must be safe and movable afterwards.
fn fails(source: &FakeGuest, dest: &FakeGuest, owners: &Arc<Owners>, setting: &Setting) -> Outcome {
    let outcome = migrate(source, dest, setting);
    let unknown = verdict(source, dest, &outcome, owners);
    assert!(outcome.source.is_err(), "{:?}", outcome.source_board);
    if !unknown.unwrap() {
        second_attempt(source, owners, Kind::Hmpsh).unwrap();
    }
    outcome
}

fn stalls(kind: Kind, way: Way, at: u64) -> Outcome {
    let owners = Arc::default();
    let (source, dest) = (running_guest(&owners), blank_guest(&owners));
    let faults = Faults {
        stall: Some((way, at)),
        ..Faults::default()
    };
    fails(&source, &dest, &owners, &Setting::faulty(kind, faults))
}

#[test]
fn a_destination_that_never_answers_is_left_in_setup() {
    for kind in [Kind::Hmpsh, Kind::Stock] {
        let outcome = stalls(kind, Way::Back, 0);
        let board = outcome.source_board;
        assert!(board.error.unwrap().contains("return-path off"));
        assert_eq!(board.total_time, 5000);
        assert_eq!(board.downtime, None);
        assert!(!board.handover_unknown);
    }
}

#[test]
fn a_frozen_destination_never_makes_completed() {
    for kind in [Kind::Hmpsh, Kind::Stock] {
        let owners = Arc::default();
        let (source, dest) = (running_guest(&owners), blank_guest(&owners));
        let clean = migrate(&source, &dest, &Setting::new(kind));
        for at in 0..clean.link.passed(Way::Back) {
            let board = stalls(kind, Way::Back, at).source_board;
            assert_eq!(board.status, Status::Failed);
        }
        for at in (0..clean.link.passed(Way::Forth)).step_by(97) {
            let board = stalls(kind, Way::Forth, at).source_board;
            assert_eq!(board.status, Status::Failed);
        }
    }
}

#[test]
fn a_peer_that_stops_reading_is_given_up_and_the_figures_stay_true() {
    // In the middle of the first pass.
    let outcome = stalls(Kind::Hmpsh, Way::Forth, 5000);
    let board = outcome.source_board;
    let error = board.error.unwrap();
    assert!(
        error.contains("has not taken a byte for 30 seconds"),
        "{error}"
    );
    assert_eq!(board.total_time, 30_000);
    let ram = board.ram.unwrap();
    assert_eq!(ram.mbps, 0.0);
    assert_eq!(ram.transferred, 5000);
}

#[test]
fn a_source_that_stops_sending_is_given_up() {
    let outcome = stalls(Kind::Silent, Way::Forth, 5000);
    let error = outcome.dest_board.error.unwrap();
    assert!(
        error.contains("30 seconds") || error.contains("closed the connection"),
        "{error}"
    );
}

#[test]
fn a_client_that_says_nothing_is_sent_away() {
    let owners = Arc::default();
    let dest = blank_guest(&owners);
    let link = Link::new(Faults::default());
    let board = Board::default();
    let ((), result) = link.run(
        |channel, clock| {
            use crate::migration::clock::Clock;
            clock.sleep(Duration::from_secs(60), &link.cancel);
            drop(channel);
        },
        |channel, clock| {
            let order = Incoming {
                guest: &dest,
                board: &board,
                clock,
                autostart: &Mutex::new(true),
                point: &PointOfNoReturn::new(),
                uuid: None,
                is_patient: false,
                dialect: Dialect::default(),
            };
            order.run(channel)
        },
    );
    assert_eq!(
        result.unwrap_err().to_string(),
        "The source has not sent a byte for 5 seconds"
    );
    assert_eq!(board.read().total_time, 5000);
}

#[test]
fn a_cancel_at_any_byte_leaves_the_guest_or_comes_too_late() {
    for kind in [Kind::Hmpsh, Kind::Stock, Kind::Silent] {
        let owners = Arc::default();
        let (source, dest) = (running_guest(&owners), blank_guest(&owners));
        let total = migrate(&source, &dest, &Setting::new(kind))
            .link
            .passed(Way::Forth);
        let (mut early, mut late) = (0, 0);
        for at in (0..total).step_by(7).chain(total - 60..total) {
            let owners = Arc::default();
            let (source, dest) = (running_guest(&owners), blank_guest(&owners));
            let faults = Faults {
                cancel: Some((Way::Forth, at)),
                ..Faults::default()
            };
            let outcome = migrate(&source, &dest, &Setting::faulty(kind, faults));
            assert_eq!(
                verdict(&source, &dest, &outcome, &owners),
                Ok(false),
                "{kind:?} {at}"
            );
            match outcome.source {
                Ok(()) => {
                    assert!(outcome.link.point.is_passed());
                    late += 1;
                }
                Err(error) => {
                    assert!(error.is_cancel(), "{kind:?} {at}: {error}");
                    assert_eq!(outcome.source_board.status, Status::Cancelled);
                    assert_eq!(outcome.source_board.error, None);
                    second_attempt(&source, &owners, kind).unwrap();
                    early += 1;
                }
            }
        }
        assert!(early > 0 && late > 0, "{kind:?}: {early} {late}");
    }
}

#[test]
fn a_cancelled_migration_keeps_its_figures() {
    let owners = Arc::default();
    let (source, dest) = (running_guest(&owners), blank_guest(&owners));
    let faults = Faults {
        cancel: Some((Way::Forth, 6000)),
        ..Faults::default()
    };
    let board = migrate(&source, &dest, &Setting::faulty(Kind::Hmpsh, faults)).source_board;
    assert_eq!(board.status, Status::Cancelled);
    assert!(board.ram.unwrap().transferred >= 6000);
}

#[test]
fn a_missing_device_is_found_before_anything_moves() {
    let owners = Arc::default();
    let source = running_guest(&owners);
    let dest = FakeGuest::new(&owners, &PAGES, 1);
    let outcome = fails(&source, &dest, &owners, &Setting::new(Kind::Hmpsh));
    let error = outcome.source_board.error.unwrap();
    assert!(
        error.contains("Unknown savevm section or instance 'toy' 1."),
        "{error}"
    );
    assert_eq!(outcome.source_board.ram, None);
    assert!(outcome.dest.unwrap_err().to_string().contains("'toy' 1"));
}

#[test]
fn a_memory_of_another_size_is_found_before_anything_moves() {
    let owners = Arc::default();
    let source = running_guest(&owners);
    let dest = FakeGuest::new(&owners, &[2, 1], 2);
    let outcome = fails(&source, &dest, &owners, &Setting::new(Kind::Hmpsh));
    let error = outcome.source_board.error.unwrap();
    assert!(
        error.contains("Size mismatch: fake.ram: 0x3000 != 0x2000: Invalid argument"),
        "{error}"
    );
    assert_eq!(outcome.source_board.ram, None);
}

#[test]
fn a_stock_destination_without_a_device_does_not_get_the_guest() {
    let owners = Arc::default();
    let source = running_guest(&owners);
    let dest = FakeGuest::new(&owners, &PAGES, 1);
    let outcome = fails(&source, &dest, &owners, &Setting::new(Kind::Stock));
    assert!(!outcome.source_board.handover_unknown);
    assert_eq!(
        outcome.source_board.error.unwrap(),
        "Sibling indicated error 1"
    );
}

#[test]
fn a_device_that_refuses_its_state_is_named_at_the_source() {
    let owners = Arc::default();
    let source = running_guest(&owners);
    let mut dest = blank_guest(&owners);
    dest.refuses = true;
    let outcome = fails(&source, &dest, &owners, &Setting::new(Kind::Hmpsh));
    let error = outcome.source_board.error.unwrap();
    assert_eq!(error, "The destination refused: toy 0: value refused");
}

#[test]
fn a_defect_of_ours_does_not_cost_the_guest() {
    for kind in [Kind::Hmpsh, Kind::Stock, Kind::Silent] {
        let owners = Arc::default();
        let (source, dest) = (running_guest(&owners), blank_guest(&owners));
        source
            .panics
            .store(true, std::sync::atomic::Ordering::SeqCst);
        let outcome = fails(&source, &dest, &owners, &Setting::new(kind));
        let board = outcome.source_board;
        assert_eq!(board.status, Status::Failed);
        assert!(!board.handover_unknown);
        assert!(board.error.unwrap().contains("internal error"));
    }
}

#[test]
fn a_guest_that_died_when_it_was_to_be_stopped_is_not_run_again() {
    let owners = Arc::default();
    let mut source = running_guest(&owners);
    source.dies = true;
    let dest = blank_guest(&owners);
    let outcome = migrate(&source, &dest, &Setting::new(Kind::Hmpsh));
    assert_eq!(outcome.source_board.error.unwrap(), "KVM gave up");
    assert_eq!(source.run_state(), RunState::InternalError);
    assert_eq!(owners.running(), 0);
}

#[test]
fn an_arrival_that_was_given_up_is_not_taken() {
    let owners = Arc::default();
    let (source, dest) = (running_guest(&owners), blank_guest(&owners));
    let (source_board, dest_board) = (Board::default(), Board::default());
    let link = Link::new(Faults::default());
    let given_up = PointOfNoReturn::new();
    let nobody = crate::migration::channel::Cancel::new().unwrap();
    assert!(given_up.cancel(&nobody));
    let limits = || Setting::new(Kind::Hmpsh).limits;
    let (sent, received) = link.run(
        |channel, clock| {
            let order = Outgoing {
                guest: &source,
                limits: &limits,
                block: None,
                bitmaps: false,
                return_path: true,
                is_patient: false,
                dialect: Dialect::default(),
                board: &source_board,
                clock,
                started: link.now(),
                cancel: &link.cancel,
                point: &link.point,
            };
            order.run(channel)
        },
        |channel, clock| {
            let order = Incoming {
                guest: &dest,
                board: &dest_board,
                clock,
                autostart: &Mutex::new(true),
                point: &given_up,
                uuid: None,
                is_patient: false,
                dialect: Dialect::default(),
            };
            order.run(channel)
        },
    );
    assert!(received.unwrap_err().is_cancel());
    assert!(!dest.run_state().is_running());
    // GO was on its way: the source can not know.
    assert!(sent.is_err() && source_board.read().handover_unknown);
    assert_eq!(source.run_state(), RunState::PostMigrate);
}

/// The images are somebody else's when the guest is to go on: it waits for the operator.
#[test]
fn a_guest_without_its_images_is_paused() {
    let owners: Arc<Owners> = Arc::default();
    let (source, mut dest) = (running_guest(&owners), blank_guest(&owners));
    dest.refuses = true;
    source.is_robbed.store(true, Ordering::SeqCst);
    let outcome = migrate(&source, &dest, &Setting::new(Kind::Hmpsh));
    let error = outcome.source.unwrap_err().to_string();
    assert!(
        error.ends_with(
            "; then the guest could not be resumed: the images are somebody else's; it stays \
             paused here, and `cont` tries again"
        ),
        "{error}"
    );
    assert_eq!(source.run_state(), RunState::Paused);
    source.is_robbed.store(false, Ordering::SeqCst);
    source.start().unwrap();
    second_attempt(&source, &owners, Kind::Hmpsh).unwrap();
}

/// Between two ends of one process nobody is given up for being slow.
#[test]
fn the_patient_wait_as_long_as_it_takes() {
    use crate::migration::clock::Clock;
    let hour = Duration::from_secs(3600);
    for [of_source, of_dest] in [[hour, Duration::ZERO], [Duration::ZERO, hour]] {
        let owners = Arc::default();
        let (source, dest) = (running_guest(&owners), blank_guest(&owners));
        // More than is under way at most.
        (0..3).for_each(|page| source.store((0, page, 7)));
        source.store((1, 0, 7));
        let (source_board, dest_board) = (Board::default(), Board::default());
        let link = Link::new(Faults {
            one_way: true,
            ..Faults::default()
        });
        let limits = || Setting::new(Kind::Silent).limits;
        let (sent, received) = link.run(
            |channel, clock| {
                clock.sleep(of_source, &link.cancel);
                let order = Outgoing {
                    guest: &source,
                    limits: &limits,
                    block: None,
                    bitmaps: false,
                    return_path: false,
                    is_patient: true,
                    dialect: Dialect::default(),
                    board: &source_board,
                    clock,
                    started: link.now(),
                    cancel: &link.cancel,
                    point: &link.point,
                };
                order.run(channel)
            },
            |channel, clock| {
                clock.sleep(of_dest, &link.cancel);
                let order = Incoming {
                    guest: &dest,
                    board: &dest_board,
                    clock,
                    autostart: &Mutex::new(false),
                    point: &PointOfNoReturn::new(),
                    uuid: None,
                    is_patient: true,
                    dialect: Dialect::default(),
                };
                order.run(channel)
            },
        );
        sent.unwrap();
        received.unwrap();
        assert_eq!(source.content(), dest.content());
    }
}
