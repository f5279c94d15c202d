//! One bit of the stream is wrong: the destination refuses it, or ends up with the same guest.

use super::cuts::eof_offset;
use super::*;

fn flip(kind: Kind, way: Way, at: u64, mask: u8) {
    let owners = Arc::default();
    let (source, dest) = (running_guest(&owners), blank_guest(&owners));
    let faults = Faults {
        flip: Some((way, at, mask)),
        ..Faults::default()
    };
    let outcome = migrate(&source, &dest, &Setting::faulty(kind, faults));
    match (kind, verdict(&source, &dest, &outcome, &owners)) {
        (_, Ok(_)) => {}
        // Without a way back the source can not know that the destination refused.
        (Kind::Silent, Err(text)) if text.starts_with("nobody has the guest") => {
            assert!(outcome.dest.is_err());
        }
        (_, Err(text)) => panic!("{kind:?}, {way:?}, byte {at} ^ {mask:#x}: {text}"),
    }
}

fn total(kind: Kind, way: Way) -> u64 {
    let owners = Arc::default();
    let (source, dest) = (running_guest(&owners), blank_guest(&owners));
    migrate(&source, &dest, &Setting::new(kind))
        .link
        .passed(way)
}

#[test]
fn no_flipped_bit_of_the_stream_is_believed() {
    for at in 0..total(Kind::Hmpsh, Way::Forth) {
        flip(Kind::Hmpsh, Way::Forth, at, 1 << (at % 8));
    }
}

#[test]
fn no_flipped_bit_of_a_one_sided_stream_is_believed() {
    for at in 0..total(Kind::Silent, Way::Forth) {
        flip(Kind::Silent, Way::Forth, at, 0x80 >> (at % 8));
    }
}

#[test]
fn no_flipped_bit_of_an_answer_makes_two_owners() {
    for kind in [Kind::Hmpsh, Kind::Stock] {
        for at in 0..total(kind, Way::Back) {
            (0..8).for_each(|bit| flip(kind, Way::Back, at, 1 << bit));
        }
    }
}

/// A page is wrong, and so is one bit of what closes the stream: that the hashes can not be read does
/// not mean that there were none.
#[test]
fn a_second_flipped_bit_does_not_hide_the_first() {
    let owners = Arc::default();
    let (source, dest) = (running_guest(&owners), blank_guest(&owners));
    let one_way = Faults {
        one_way: true,
        ..Faults::default()
    };
    let outcome = migrate(&source, &dest, &Setting::faulty(Kind::Silent, one_way));
    drop(dest);
    let mut stream = outcome.link.written(Way::Forth);
    let load = |stream: &[u8]| {
        let result = load(&blank_guest(&owners), &Board::default(), stream);
        result.map_err(|error| error.to_string())
    };
    let eof = eof_offset(&stream) as usize;
    // A byte of a page that was not sent again.
    let in_a_page = (0..eof).rev().step_by(64).any(|at| {
        stream[at] ^= 1;
        let is_page =
            load(&stream).is_err_and(|text| text.starts_with("Guest memory was corrupted"));
        stream[at] ^= u8::from(!is_page);
        is_page
    });
    assert!(in_a_page);
    for at in eof..stream.len() {
        let bit = 1 << (at % 8);
        stream[at] ^= bit;
        assert!(load(&stream).is_err(), "byte {at} of {}", stream.len());
        stream[at] ^= bit;
    }
}
