//! Dirty bitmaps go along: with a guest that writes meanwhile, and with every fault on the way.

use super::*;
use crate::block::{Backend, Bitmap, Drive, Memory};
use crate::iov::Out;

/// Of one drive there are two bitmaps, and one of the other.
const LENGTHS: [u64; 2] = [(1 << 16) + 512, 1 << 15];

fn drives(mut guest: FakeGuest, ids: &[&str]) -> FakeGuest {
    let drive = |(id, len): (&&str, u64)| {
        Arc::new(Drive::new((*id).to_owned(), Box::new(Memory::new(len))))
    };
    guest.drives = ids.iter().zip(LENGTHS).map(drive).collect();
    guest
}

fn write(drive: &Drive, offset: u64) {
    let bytes = [7; 600];
    drive
        .write(offset, &mut vec![Out::from(&bytes[..])])
        .unwrap();
}

fn source_with_bitmaps(owners: &Arc<Owners>) -> FakeGuest {
    let guest = drives(running_guest(owners), &["hd0", "hd1"]);
    let [first, second] = [&guest.drives[0], &guest.drives[1]];
    let mut longer = Bitmap::new("longer", 512, LENGTHS[0]).unwrap();
    longer.is_persistent = true;
    first.bitmaps().add(longer).unwrap();
    first.add_bitmap("off", None, |_| ()).unwrap();
    second.add_bitmap("b", Some(4096), |_| ()).unwrap();
    write(first, 5000);
    write(first, LENGTHS[0] - 600);
    write(second, 0);
    let disable = |bitmap: &mut Bitmap| bitmap.is_enabled = false;
    first.bitmaps().with("off", disable).unwrap();
    write(first, 20_000);
    guest
}

fn dest(owners: &Arc<Owners>) -> FakeGuest {
    drives(blank_guest(owners), &["hd0", "hd1"])
}

fn setting(kind: Kind, faults: Faults) -> Setting {
    Setting {
        bitmaps: true,
        ..Setting::faulty(kind, faults)
    }
}

/// Everything about all bitmaps.
fn bitmaps(guest: &FakeGuest) -> Vec<Bitmap> {
    let all = guest.drives.iter().flat_map(|drive| {
        let mut infos = drive.bitmaps().info();
        infos.sort_by(|a, b| a.name.cmp(&b.name));
        let bitmap = |name: &str| drive.bitmaps().with(name, |bitmap| bitmap.clone()).unwrap();
        infos
            .iter()
            .map(|info| bitmap(&info.name))
            .collect::<Vec<_>>()
    });
    all.collect()
}

#[test]
fn bitmaps_arrive_as_they_are() {
    for kind in [Kind::Hmpsh, Kind::Stock, Kind::Silent, Kind::SilentStock] {
        let owners = Arc::default();
        let (source, dest) = (source_with_bitmaps(&owners), dest(&owners));
        let busy = Arc::clone(&source.drives[0]);
        let written = Faults {
            at: Some((
                Way::Forth,
                5000,
                Arc::new(move || {
                    assert!(busy.bitmaps().is_busy());
                    write(&busy, 40_000);
                }),
            )),
            ..Faults::default()
        };
        let outcome = migrate(&source, &dest, &setting(kind, written));
        assert_eq!(verdict(&source, &dest, &outcome, &owners), Ok(false));
        assert!(outcome.source.is_ok(), "{kind:?}: {:?}", outcome.source);
        assert_eq!(outcome.dest_board.lost_bitmaps, None);
        assert_eq!(bitmaps(&source), bitmaps(&dest), "{kind:?}");
        let infos = dest.drives[0].bitmaps().info();
        let dirty: Vec<_> = infos.iter().map(|info| info.dirty).collect();
        // Two sectors or granules each; not what was written while it was off.
        assert!(
            dirty.contains(&(8 * 512)) && dirty.contains(&(2 << 16)),
            "{dirty:?}"
        );
        assert!(infos.iter().all(|info| !info.is_busy));
        // And it goes on.
        write(&dest.drives[1], 8192);
        assert_eq!(dest.drives[1].bitmaps().info()[0].dirty, 8192);
        assert!(bitmaps(&source) != bitmaps(&dest));
    }
}

#[test]
fn without_the_capability_they_stay() {
    let owners = Arc::default();
    let (source, dest) = (source_with_bitmaps(&owners), dest(&owners));
    assert!(
        migrate(&source, &dest, &Setting::new(Kind::Hmpsh))
            .source
            .is_ok()
    );
    assert!(bitmaps(&dest).is_empty());
    assert_eq!(bitmaps(&source).len(), 3);
}

/// What is told to the source, and found before a page has moved.
#[test]
fn what_does_not_fit_is_found_before_anything_moves() {
    let one = |ids: &[&'static str], name: Option<&str>, owners: &Arc<Owners>| {
        let guest = drives(blank_guest(owners), ids);
        if let Some(name) = name {
            guest.drives[0].add_bitmap(name, None, |_| ()).unwrap();
        }
        guest
    };
    for (ids, name, why) in [
        (
            &["hd0", "x"][..],
            None,
            "Disk 'hd1' exists only at the source, and its bitmap 'b' is sent (dirty-bitmaps)",
        ),
        (
            &["hd1", "hd0"],
            None,
            "Disk 'hd0' is too small at the destination: 32768 bytes of 66048",
        ),
        (
            &["hd0", "hd1"],
            Some("off"),
            "Bitmap with the same name ('off') already exists on destination",
        ),
    ] {
        let owners = Arc::default();
        let source = source_with_bitmaps(&owners);
        let before = bitmaps(&source);
        let dest = one(ids, name, &owners);
        let there = bitmaps(&dest);
        let clean = |kind| setting(kind, Faults::default());
        let outcome = migrate(&source, &dest, &clean(Kind::Hmpsh));
        assert!(outcome.dest.is_err() && outcome.source_board.ram.is_none());
        let told = outcome.source.unwrap_err().to_string();
        assert!(told.contains(why), "{told}");
        assert_eq!((bitmaps(&source), bitmaps(&dest)), (before.clone(), there));
        assert_eq!(source.run_state(), RunState::Running);
        // Nobody is told where there is no way back: QEMU lets the guest come, but for the name.
        let dest = one(ids, name, &owners);
        let outcome = migrate(&source, &dest, &clean(Kind::Silent));
        assert_eq!(outcome.dest.is_ok(), name.is_none(), "{why}");
        if name.is_none() {
            assert!(outcome.dest_board.lost_bitmaps.is_some() && bitmaps(&dest).is_empty());
            assert_eq!(bitmaps(&source), before);
        }
    }
}

/// Where the two sections are in the stream, headers and all.
fn sections(stream: &[u8]) -> Vec<u64> {
    let id = b"\0\x62\x6d\x70";
    let found = |at: &usize| stream[*at..].starts_with(id);
    let places: Vec<_> = (0..stream.len()).filter(found).collect();
    assert_eq!(places.len(), 4, "head and footer of START and END");
    let piece = |ends: &[usize]| ends[0] as u64 - 1..ends[1] as u64 + 4;
    places.chunks(2).flat_map(piece).collect()
}

fn stream(kind: Kind) -> Vec<u8> {
    let owners = Arc::default();
    let (source, dest) = (source_with_bitmaps(&owners), dest(&owners));
    let outcome = migrate(&source, &dest, &setting(kind, Faults::default()));
    assert!(outcome.source.is_ok());
    outcome.link.written(Way::Forth)
}

#[test]
fn a_cut_leaves_the_bitmaps_and_the_next_attempt_brings_them() {
    for kind in [Kind::Hmpsh, Kind::Stock, Kind::Silent] {
        for at in sections(&stream(kind)) {
            let owners = Arc::default();
            let (source, first, second) =
                (source_with_bitmaps(&owners), dest(&owners), dest(&owners));
            let before = bitmaps(&source);
            let cut = Faults {
                cut: Some((Way::Forth, at)),
                ..Faults::default()
            };
            let outcome = migrate(&source, &first, &setting(kind, cut));
            assert_eq!(
                verdict(&source, &first, &outcome, &owners),
                Ok(false),
                "{at}"
            );
            assert!(
                outcome.source.is_err() && bitmaps(&first).is_empty(),
                "{at}"
            );
            assert_eq!(bitmaps(&source), before, "{at}");
            let outcome = migrate(&source, &second, &setting(kind, Faults::default()));
            assert!(outcome.source.is_ok(), "{at}: {:?}", outcome.source);
            assert_eq!(bitmaps(&second), before, "{kind:?} {at}");
        }
    }
}

#[test]
fn a_cancel_leaves_the_bitmaps() {
    for at in sections(&stream(Kind::Hmpsh)) {
        let owners = Arc::default();
        let (source, dest) = (source_with_bitmaps(&owners), dest(&owners));
        let before = bitmaps(&source);
        let faults = Faults {
            cancel: Some((Way::Forth, at)),
            ..Faults::default()
        };
        let outcome = migrate(&source, &dest, &setting(Kind::Hmpsh, faults));
        assert_eq!(outcome.source_board.status, Status::Cancelled);
        assert_eq!((bitmaps(&source), bitmaps(&dest)), (before, vec![]), "{at}");
    }
}

#[test]
fn no_flipped_bit_of_a_bitmap_is_believed() {
    for kind in [Kind::Hmpsh, Kind::Silent] {
        for at in sections(&stream(kind)) {
            let owners = Arc::default();
            let (source, dest) = (source_with_bitmaps(&owners), dest(&owners));
            let faults = Faults {
                flip: Some((Way::Forth, at, 1 << (at % 8))),
                ..Faults::default()
            };
            let outcome = migrate(&source, &dest, &setting(kind, faults));
            assert!(
                outcome.dest.is_err() && bitmaps(&dest).is_empty(),
                "{kind:?} {at}"
            );
            assert!(!owners.was_double());
        }
    }
}

/// Captured from QEMU 7.2 and 10.0, which differ in the section's number only: two bitmaps of a disk of
/// 24 MiB, the newer one disabled, nothing dirty.
#[test]
fn the_section_is_qemus_byte_by_byte() {
    let owners = Arc::default();
    let mut source = running_guest(&owners);
    let drive = Drive::new("d0".to_owned(), Box::new(Memory::new(24 << 20)));
    drive.add_bitmap("b0", None, |_| ()).unwrap();
    let disable = |bitmap: &mut Bitmap| bitmap.is_enabled = false;
    drive.add_bitmap("b1", None, disable).unwrap();
    source.drives.push(Arc::new(drive));
    let outcome = migrate(
        &source,
        &blank_guest(&owners),
        &setting(Kind::Silent, Faults::default()),
    );
    assert!(outcome.source.is_ok());
    let stream = outcome.link.written(Way::Forth);
    let has = |bytes: &[u8]| stream.windows(bytes.len()).any(|found| found == bytes);
    // Behind the configuration, in front of RAM.
    assert!(has(b"fake\x08\0\x03\0\0\x01"));
    assert!(has(
        b"\x0cdirty-bitmap\0\0\0\0\0\0\0\x01\x1c\x02d0\x02b1\0\x01\0\0\0\x14\x02b0\0\x01\0\0\x01\x01\x7e"
    ));
    assert!(has(
        b"\x46\x02b1\0\0\0\0\0\0\0\0\0\0\xc0\0\x46\x02b0\0\0\0\0\0\0\0\0\0\0\xc0\0\
          \x24\x02b1\x24\x02b0\x01\x7e"
    ));
}
