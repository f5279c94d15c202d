//! The connection breaks at every byte, in both directions.
//!
//! Never two owners; exactly one outside the ambiguous window; inside it the source is paused and
//! says so; and the next attempt works. The window is not assumed but found, and compared with
//! what the documents promise.

use super::*;
use crate::migration::integrity::PROMISE;
use crate::migration::section::Command;
use std::ops::Range;

/// Cuts at every byte of `way`; returns where the source did not know who has the guest.
fn sweep(kind: Kind, way: Way, is_mutant: bool) -> Result<Vec<u64>, String> {
    let mut ambiguous = Vec::new();
    for at in 0..clean_run(kind).link.passed(way) {
        let faults = Faults {
            cut: Some((way, at)),
            ..Faults::default()
        };
        let owners = Arc::default();
        let mut source = running_guest(&owners);
        source.forgets = is_mutant;
        let dest = blank_guest(&owners);
        let outcome = migrate(&source, &dest, &Setting::faulty(kind, faults));
        let told = |text: String| format!("{kind:?}, cut {way:?} at byte {at}: {text}");
        if verdict(&source, &dest, &outcome, &owners).map_err(told)? {
            ambiguous.push(at);
            if dest.run_state().is_running() {
                continue;
            }
            // The operator has looked: `cont -f`.
            source.start().unwrap();
        } else if outcome.source.is_ok() {
            return Err(told("a cut connection was not noticed".to_owned()));
        }
        second_attempt(&source, &owners, kind).map_err(told)?;
    }
    Ok(ambiguous)
}

fn clean_run(kind: Kind) -> Outcome {
    let owners = Arc::default();
    let (source, dest) = (running_guest(&owners), blank_guest(&owners));
    let outcome = migrate(&source, &dest, &Setting::new(kind));
    assert_eq!(verdict(&source, &dest, &outcome, &owners), Ok(false));
    assert!(outcome.source.is_ok());
    outcome
}

/// Offset of the EOF byte in a stream that ends with the trailing JSON.
pub(super) fn eof_offset(stream: &[u8]) -> u64 {
    let is_eof = |at: &usize| {
        let rest = &stream[*at..];
        rest[..2] == [0, 6]
            && u32::from_be_bytes(rest[2..6].try_into().unwrap()) as usize == rest.len() - 6
    };
    (0..stream.len() - 6).rev().find(is_eof).unwrap() as u64
}

/// The cuts after the first byte of `window` and before its end.
fn within(window: Range<u64>) -> Vec<u64> {
    (window.start + 1..window.end).collect()
}

#[test]
fn between_two_hmpsh_the_window_is_go_to_running() {
    let clean = clean_run(Kind::Hmpsh);
    let stream = clean.link.written(Way::Forth);
    let mut go = Vec::new();
    Command::Go.put(&[], &mut go);
    assert!(stream.ends_with(&go));
    let end = stream.len() as u64;
    assert_eq!(
        sweep(Kind::Hmpsh, Way::Forth, false),
        Ok(within(end - go.len() as u64..end))
    );

    // GO was written as a whole in every one of these, so the first byte counts too.
    let end = clean.link.passed(Way::Back);
    let running = crate::migration::return_path::Message::Running
        .bytes()
        .len() as u64;
    assert_eq!(
        sweep(Kind::Hmpsh, Way::Back, false),
        Ok((end - running..end).collect::<Vec<_>>())
    );
}

#[test]
fn with_a_stock_destination_the_window_is_eof_to_shut() {
    let clean = clean_run(Kind::Stock);
    let stream = clean.link.written(Way::Forth);
    let eof = eof_offset(&stream);
    assert_eq!(
        sweep(Kind::Stock, Way::Forth, false),
        Ok(within(eof..stream.len() as u64))
    );
    let end = clean.link.passed(Way::Back);
    assert_eq!(
        sweep(Kind::Stock, Way::Back, false),
        Ok((end - 8..end).collect::<Vec<_>>())
    );
}

#[test]
fn without_return_path_the_window_is_eof_to_the_last_byte() {
    for kind in [Kind::Silent, Kind::SilentStock] {
        let clean = clean_run(kind);
        assert_eq!(clean.link.passed(Way::Back), 0);
        let stream = clean.link.written(Way::Forth);
        let eof = eof_offset(&stream);
        assert_eq!(
            sweep(kind, Way::Forth, false),
            Ok(within(eof..stream.len() as u64))
        );
    }
}

#[test]
fn a_guest_that_forgets_what_is_given_back_is_found_out() {
    let error = sweep(Kind::Hmpsh, Way::Forth, true).expect_err("the mutant must be noticed");
    assert!(error.ends_with("memory or devices differ"), "{error}");
}

/// A stream as a stock source with a return path would send it.
fn stock_stream(owners: &Arc<Owners>) -> Vec<u8> {
    let source = running_guest(owners);
    let (channel, output) = Recording::to();
    let link = Link::new(Faults::default());
    let setting = Setting::new(Kind::Silent);
    let (board, limits) = (Board::default(), || setting.limits);
    let clock = HostClock::new();
    let outgoing = Outgoing {
        guest: &source,
        limits: &limits,
        block: None,
        bitmaps: false,
        return_path: false,
        is_patient: false,
        dialect: Dialect::default(),
        board: &board,
        clock: &clock,
        started: Duration::ZERO,
        cancel: &link.cancel,
        point: &link.point,
    };
    outgoing.run(channel).unwrap();
    let stream = output.lock().unwrap().clone();
    let head = 8 + 5 + "fake".len();
    let eof = eof_offset(&stream) as usize;
    let mut stock = stream[..head].to_vec();
    Command::OpenReturnPath.put(&[], &mut stock);
    Command::Ping.put(&1u32.to_be_bytes(), &mut stock);
    stock.extend(without_promise(&stream[head..=eof]));
    stock.extend(b"\x06\0\0\0\x10{\"devices\":  []}");
    stock
}

#[test]
fn a_stock_source_and_we_never_both_run_the_guest() {
    let stream = stock_stream(&Arc::default());
    for (way, total) in [(Way::Forth, stream.len() as u64), (Way::Back, 16)] {
        for at in 0..=total {
            let owners: Arc<Owners> = Arc::default();
            let (source, dest) = (running_guest(&owners), blank_guest(&owners));
            let link = Link::new(Faults {
                cut: Some((way, at)),
                ..Faults::default()
            });
            let board = Board::default();
            let (sent, received) = link.run(
                |channel, _| stock::send(&source, &stream, channel),
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
            assert!(!owners.was_double(), "{way:?} {at}");
            assert_eq!(owners.running(), 1, "{way:?} {at}: {sent:?} {received:?}");
            assert_eq!(received.is_ok(), at == total, "{way:?} {at}: {received:?}");
        }
    }
}

#[test]
fn every_truncated_file_is_refused() {
    let owners = Arc::default();
    let source = running_guest(&owners);
    let setting = Setting::faulty(
        Kind::Silent,
        Faults {
            one_way: true,
            ..Faults::default()
        },
    );
    let dest = blank_guest(&owners);
    let outcome = migrate(&source, &dest, &setting);
    assert_eq!(source.content(), dest.content());
    drop(dest);
    let stream = outcome.link.written(Way::Forth);
    let eof = eof_offset(&stream) as usize;
    let cuts = (0..stream.len()).map(|length| (stream[..length].to_vec(), false));
    // A QEMU can be told to leave the JSON out.
    let stock = (without_promise(&stream[..=eof]), true);
    for (bytes, is_stock) in cuts.chain([stock]) {
        let dest = blank_guest(&owners);
        let board = Board::default();
        let result = load(&dest, &board, &bytes);
        if is_stock {
            assert_eq!(result.unwrap(), RunState::Running);
            assert_eq!(source.content(), dest.content());
        } else {
            assert!(result.is_err(), "{} of {} bytes", bytes.len(), stream.len());
            assert_eq!(board.read().status, Status::Failed);
        }
    }
}

/// A stream of ours as one that does not say that its hashes will come.
fn without_promise(stream: &[u8]) -> Vec<u8> {
    let id = PROMISE.to_be_bytes();
    let mut stream = stream.to_vec();
    let places: Vec<_> = (0..stream.len())
        .filter(|at| stream[*at..].starts_with(&id))
        .collect();
    // Head and footer of the section.
    assert_eq!(places.len(), 2);
    for at in places {
        stream[at..at + id.len()].fill(9);
    }
    stream
}
