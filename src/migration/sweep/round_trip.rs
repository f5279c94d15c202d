//! What must work when nothing fails.

use super::*;
use proptest::prelude::*;

const KINDS: [Kind; 4] = [Kind::Hmpsh, Kind::Stock, Kind::Silent, Kind::SilentStock];

#[test]
fn a_running_guest_arrives() {
    for kind in KINDS {
        let owners = Arc::default();
        let (source, dest) = (running_guest(&owners), blank_guest(&owners));
        let outcome = migrate(&source, &dest, &Setting::new(kind));
        assert_eq!(
            verdict(&source, &dest, &outcome, &owners),
            Ok(false),
            "{kind:?}"
        );
        outcome.source.unwrap();
        assert_eq!(outcome.dest.unwrap(), RunState::Running);
        assert_eq!(source.content(), dest.content());
    }
}

#[test]
fn the_figures_are_those_of_the_wire() {
    let owners = Arc::default();
    let (source, dest) = (running_guest(&owners), blank_guest(&owners));
    let outcome = migrate(&source, &dest, &Setting::new(Kind::Hmpsh));
    let ram = outcome.source_board.ram.unwrap();
    assert_eq!(ram.transferred, outcome.link.passed(Way::Forth));
    assert_eq!((ram.total, ram.remaining), (4 * 4096, 0));
    // Page 0 of the first block twice, with content; its page 2 twice and that of the second
    // block once, as zero.
    assert_eq!((ram.normal, ram.duplicate), (2, 3));
    // In setup, after each of two passes, when the destination has read on, and with the guest at
    // rest.
    assert_eq!(ram.dirty_sync_count, 5);
    assert!(ram.precopy_bytes > 2 * 4096 && ram.downtime_bytes < 4096);
    let arrived = outcome.dest_board.ram.unwrap();
    assert_eq!((arrived.normal, arrived.duplicate), (2, 3));
    assert_eq!(arrived.transferred, ram.transferred);
}

#[test]
fn a_paused_guest_arrives_paused() {
    for kind in [Kind::Hmpsh, Kind::Silent] {
        let owners = Arc::default();
        let (source, dest) = (running_guest(&owners), blank_guest(&owners));
        source.stop(RunState::Paused).unwrap();
        let outcome = migrate(&source, &dest, &Setting::new(kind));
        outcome.source.unwrap();
        assert_eq!(outcome.dest.unwrap(), RunState::Paused);
        assert_eq!(dest.run_state(), RunState::Paused);
        assert_eq!(source.run_state(), RunState::PostMigrate);
        assert_eq!(source.content(), dest.content());
    }
}

#[test]
fn a_destination_that_must_not_start_the_guest_takes_it_paused() {
    let owners = Arc::default();
    let (source, dest) = (running_guest(&owners), blank_guest(&owners));
    let setting = Setting {
        autostart: false,
        ..Setting::new(Kind::Hmpsh)
    };
    let outcome = migrate(&source, &dest, &setting);
    outcome.source.unwrap();
    assert_eq!(outcome.dest.unwrap(), RunState::Paused);
    assert_eq!(owners.running(), 0);
}

#[test]
fn bytes_may_come_one_by_one() {
    for kind in KINDS {
        let owners = Arc::default();
        let (source, dest) = (running_guest(&owners), blank_guest(&owners));
        let faults = Faults {
            piece: Some(1),
            ..Faults::default()
        };
        let outcome = migrate(&source, &dest, &Setting::faulty(kind, faults));
        assert_eq!(
            verdict(&source, &dest, &outcome, &owners),
            Ok(false),
            "{kind:?}"
        );
        outcome.source.unwrap();
    }
}

#[test]
fn the_rate_limit_holds() {
    let owners = Arc::default();
    let (source, dest) = (running_guest(&owners), blank_guest(&owners));
    let mut setting = Setting::new(Kind::Hmpsh);
    setting.limits.max_bandwidth = 4096;
    setting.limits.downtime_limit = Duration::from_millis(1);
    let outcome = migrate(&source, &dest, &setting);
    outcome.source.unwrap();
    let board = outcome.source_board;
    let bytes = board.ram.unwrap().precopy_bytes;
    // In the last moment the limit does not count any more.
    let expected = bytes * 1000 / 4096;
    assert!(
        (expected - 1100..=expected + 300).contains(&board.total_time),
        "{}",
        board.total_time
    );
}

fn stores() -> impl Strategy<Value = Vec<(usize, usize, u8)>> {
    let store = (0usize..2, 0usize..12, 0u8..4);
    proptest::collection::vec(store, 0..6).prop_map(|all| {
        all.into_iter()
            .filter(|(block, page, _)| *block == 0 || *page < 4)
            .collect()
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]
    #[test]
    fn any_guest_arrives_as_it_is(
        first in proptest::collection::vec(stores(), 4),
        steps in proptest::collection::vec((stores(), stores()), 0..5),
        piece in prop_oneof![Just(None), (1usize..9000).prop_map(Some)],
        kind in 0usize..4,
        limit in prop_oneof![Just(0), 1u64..300],
    ) {
        let owners = Arc::default();
        let source = FakeGuest::new(&owners, &[12, 4], 1);
        let dest = FakeGuest::new(&owners, &[12, 4], 1);
        first.concat().into_iter().for_each(|store| source.store(store));
        source.plan(steps.into_iter().map(|(before, after)| Step { before, after }));
        source.start().unwrap();
        let faults = Faults { piece, ..Faults::default() };
        let mut setting = Setting::faulty(KINDS[kind], faults);
        setting.limits.downtime_limit = Duration::from_millis(limit);
        let outcome = migrate(&source, &dest, &setting);
        prop_assert_eq!(verdict(&source, &dest, &outcome, &owners), Ok(false));
        prop_assert!(outcome.source.is_ok(), "{:?} {:?}", outcome.source, outcome.dest);
        prop_assert_eq!(source.content(), dest.content());
    }
}
