//! Disks go along: a guest that writes meanwhile, images of every size, and every fault on the way.

use super::*;
use crate::block::{Backend, CHUNK, Drive, Memory, words};
use crate::iov::Out;

/// What disks a side has: names and images.
type Images = Vec<(&'static str, Memory)>;

const LENGTHS: [u64; 2] = [2 * CHUNK + CHUNK / 2, 512];

fn images() -> Images {
    ["hd0", "hd1"]
        .into_iter()
        .zip(LENGTHS.map(Memory::new))
        .collect()
}

/// Images with something in them: a chunk of zeros is left.
fn written() -> Images {
    let images = images();
    for (_, image) in &images {
        let mut bytes = image.bytes();
        let len = bytes.len();
        let first = len.min(CHUNK as usize);
        for (at, byte) in bytes[..first].iter_mut().enumerate() {
            *byte = (at * 7) as u8;
        }
        bytes[len - 1] = 0x55;
    }
    images
}

fn attach(mut guest: FakeGuest, images: &Images) -> FakeGuest {
    let drive = |(id, image): &(&str, Memory)| {
        Arc::new(Drive::new((*id).to_owned(), Box::new(image.clone())))
    };
    guest.drives = images.iter().map(drive).collect();
    guest
}

fn setting(kind: Kind, faults: Faults) -> Setting {
    Setting {
        block: Some(block::Options::default()),
        ..Setting::faulty(kind, faults)
    }
}

fn same(a: &Images, b: &Images) -> bool {
    a.iter().zip(b).all(|(a, b)| *a.1.bytes() == *b.1.bytes())
}

/// The guest stays where it was, and what the operator is told there.
fn fails(source: &FakeGuest, dest: &FakeGuest, setting: &Setting) -> String {
    let outcome = migrate(source, dest, setting);
    assert!(outcome.dest.is_err());
    assert_eq!(source.run_state(), RunState::Running);
    let error = outcome.source.expect_err("the disks did not arrive");
    // A log that goes on would cost memory.
    assert!(source.drives.iter().all(|drive| drive.dirty() == 0));
    source.drives[0].zero(0, 512, false).unwrap_or_default();
    assert_eq!(source.drives[0].dirty(), 0);
    error.to_string()
}

#[test]
fn disks_arrive_as_they_are() {
    for kind in [Kind::Hmpsh, Kind::Silent] {
        let owners = Arc::default();
        let (here, there) = (written(), images());
        // What was there before does not stay.
        there[0].1.bytes()[CHUNK as usize..][..3].fill(9);
        let source = attach(running_guest(&owners), &here);
        let dest = attach(blank_guest(&owners), &there);
        let outcome = migrate(&source, &dest, &setting(kind, Faults::default()));
        assert_eq!(verdict(&source, &dest, &outcome, &owners), Ok(false));
        assert!(outcome.source.is_ok() && same(&here, &there), "{kind:?}");
        let board = outcome.source_board;
        let disk = board.disk.clone().unwrap();
        let total = LENGTHS.iter().sum();
        assert_eq!((disk.remaining, disk.total), (0, total));
        assert_eq!(disk.transferred, total);
        assert_eq!(board.percent(), 100);
        assert_eq!(outcome.dest_board.disk.unwrap().transferred, total);
        // Between two of us a chunk of zeros costs nothing.
        let sent = outcome.link.passed(Way::Forth);
        let chunks = if kind == Kind::Hmpsh { 3 } else { 4 };
        assert!(
            (chunks * CHUNK..(chunks + 1) * CHUNK).contains(&sent),
            "{sent}"
        );
    }
}

/// Writes that come at any time, in front of what is being read and behind it.
#[test]
fn a_guest_that_writes_meanwhile_loses_nothing() {
    for at in (0..3 * CHUNK).step_by(CHUNK as usize / 7) {
        let owners = Arc::default();
        let (here, there) = (written(), images());
        let source = attach(running_guest(&owners), &here);
        let dest = attach(blank_guest(&owners), &there);
        let drives = source.drives.clone();
        let faults = Faults {
            at: Some((
                Way::Forth,
                at,
                Arc::new(move || {
                    for (drive, offset) in [(0, 5), (0, CHUNK + 700), (0, 2 * CHUNK + 3), (1, 40)] {
                        let bytes = [at as u8 | 1; 100];
                        let drive: &Drive = &drives[drive];
                        drive
                            .write(offset, &mut vec![Out::from(&bytes[..])])
                            .unwrap();
                    }
                }),
            )),
            ..Faults::default()
        };
        let outcome = migrate(&source, &dest, &setting(Kind::Hmpsh, faults));
        assert!(outcome.source.is_ok(), "{at:#x}: {:?}", outcome.source);
        assert!(same(&here, &there), "{at:#x}");
        assert_eq!(here[1].1.bytes()[41], at as u8 | 1);
    }
}

/// An image of one chunk that is written to whenever it was read.
struct Restless {
    image: Memory,
    drive: std::sync::OnceLock<std::sync::Weak<Drive>>,
}

impl Backend for Arc<Restless> {
    fn sectors(&self) -> u64 {
        self.image.sectors()
    }

    fn is_read_only(&self) -> bool {
        false
    }

    fn read(&self, offset: u64, rooms: &mut Vec<crate::iov::In<'_>>) -> std::io::Result<()> {
        let drive = self.drive.get().and_then(std::sync::Weak::upgrade);
        drive.unwrap().zero(0, 512, false)?;
        self.image.read(offset, rooms)?;
        let drive = self.drive.get().and_then(std::sync::Weak::upgrade);
        drive.unwrap().zero(0, 512, false)
    }

    fn write(&self, offset: u64, pieces: &mut Vec<Out<'_>>) -> std::io::Result<()> {
        self.image.write(offset, pieces)
    }

    fn zero(&self, offset: u64, len: u64, may_unmap: bool) -> std::io::Result<()> {
        self.image.zero(offset, len, may_unmap)
    }

    fn flush(&self) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_chunk_that_never_rests_leaves_room_for_memory() {
    const PAGES: usize = 400;
    let owners = Arc::default();
    let mut source = FakeGuest::new(&owners, &[PAGES, 1], 1);
    (0..PAGES).for_each(|page| source.store((0, page, 1)));
    source.start().unwrap();
    let restless = Arc::new(Restless {
        image: Memory::new(CHUNK),
        drive: std::sync::OnceLock::new(),
    });
    restless.image.bytes()[CHUNK as usize - 1] = 1;
    let drive = Arc::new(Drive::new("hd0".to_owned(), Box::new(restless.clone())));
    restless.drive.set(Arc::downgrade(&drive)).unwrap();
    source.drives.push(drive);
    let dest = FakeGuest::new(&owners, &[PAGES, 1], 1);
    let dest = attach(dest, &vec![("hd0", Memory::new(CHUNK))]);
    // Less than a chunk in a window of 100 ms, and more than a chunk's time is no downtime.
    let mut slow = setting(Kind::Hmpsh, Faults::default());
    slow.limits.max_bandwidth = 2 << 20;
    slow.limits.avail_switchover_bandwidth = 2 << 20;
    slow.faults.cancel = Some((Way::Forth, 6 * CHUNK));
    let outcome = migrate(&source, &dest, &slow);
    assert!(outcome.source.unwrap_err().is_cancel());
    let board = outcome.source_board;
    let (ram, disk) = (board.ram.unwrap(), board.disk.unwrap());
    assert_eq!((ram.remaining, ram.normal), (0, PAGES as u64));
    assert!(disk.transferred > 2 * CHUNK, "{disk:?}");
}

#[test]
fn a_disk_that_does_not_fit_is_found_before_anything_moves() {
    let small = ("hd0", Memory::new(CHUNK));
    let read_only = ("hd0", Memory::new(LENGTHS[0]).read_only());
    let other = ("other", Memory::new(LENGTHS[0]));
    for (disk, why) in [
        (
            small,
            "Disk 'hd0' is too small at the destination: 1048576 bytes of 2621440",
        ),
        (
            read_only,
            "Disk 'hd0' can not be written at the destination",
        ),
        (
            other,
            "Disk 'hd0' exists only at the source; -b and -i need a -drive of the same id",
        ),
    ] {
        let owners = Arc::default();
        let source = attach(running_guest(&owners), &written());
        let there = vec![disk, images().remove(1)];
        let dest = attach(blank_guest(&owners), &there);
        let clean = setting(Kind::Hmpsh, Faults::default());
        let told = fails(&source, &dest, &clean);
        assert!(told.contains(why), "{told}");
        // Where nobody can be asked it is found when it comes to it.
        let one_way = setting(Kind::Silent, Faults::default());
        let outcome = migrate(&source, &attach(blank_guest(&owners), &there), &one_way);
        let told = outcome.dest.unwrap_err().to_string();
        assert!(
            told.contains("hd0") && told.contains("(section 'block' 0 from byte 0x"),
            "{told}"
        );
    }
}

#[test]
fn an_image_that_fails_is_named_with_its_sector() {
    for (at, sector) in [(0, 0), (1, 2048), (2, 4096)] {
        let owners = Arc::default();
        let (here, there) = (written(), images());
        let source = attach(running_guest(&owners), &here);
        here[0].1.fail_reads(at);
        let dest = attach(blank_guest(&owners), &there);
        let clean = setting(Kind::Hmpsh, Faults::default());
        let told = fails(&source, &dest, &clean);
        let eio = words(libc::EIO);
        let expected = format!("Reading disk 'hd0' from sector {sector} on: {eio}");
        assert!(told.contains(&expected), "{told}");

        here[0].1.fail_reads(-1);
        there[0].1.fail_writes(at);
        let dest = attach(blank_guest(&owners), &there);
        let told = fails(&source, &dest, &clean);
        let enospc = words(libc::ENOSPC);
        let expected = format!("Writing disk 'hd0' from sector {sector} on: {enospc}");
        assert!(told.contains(&expected), "{told}");

        // And then it works.
        there[0].1.fail_writes(-1);
        let dest = attach(blank_guest(&owners), &there);
        assert!(migrate(&source, &dest, &clean).source.is_ok());
        assert!(same(&here, &there));
    }
}

/// After every chunk has gone once: while the guest runs, and when it stands still.
#[test]
fn an_image_that_fails_later_is_named_too() {
    // In no time at all nothing can be sent while the guest stands still, in all the time of the
    // world everything.
    for (bandwidth, phase) in [(1, "dirty phase"), (1 << 40, "end")] {
        for is_source in [true, false] {
            let owners = Arc::default();
            let (here, there) = (written(), images());
            let source = attach(running_guest(&owners), &here);
            let drive = Arc::clone(&source.drives[0]);
            let faults = Faults {
                at: Some((
                    Way::Forth,
                    2 * CHUNK + 100,
                    Arc::new(move || drive.zero(CHUNK + 512, 512, false).unwrap()),
                )),
                ..Faults::default()
            };
            let mut late = setting(Kind::Hmpsh, faults);
            late.limits.avail_switchover_bandwidth = bandwidth;
            // All four chunks once.
            match is_source {
                true => here[0].1.fail_reads(3),
                false => there[0].1.fail_writes(3),
            }
            let told = fails(&source, &attach(blank_guest(&owners), &there), &late);
            let why = match is_source {
                true => format!(
                    "Reading disk 'hd0' from sector 2048 on: {}",
                    words(libc::EIO)
                ),
                false => format!(
                    "Writing disk 'hd0' from sector 2048 on: {}",
                    words(libc::ENOSPC)
                ),
            };
            assert!(told.contains(&why), "{phase}: {told}");
            here[0].1.fail_reads(-1);
            there[0].1.fail_writes(-1);
            let dest = attach(blank_guest(&owners), &there);
            let clean = setting(Kind::Hmpsh, Faults::default());
            assert!(migrate(&source, &dest, &clean).source.is_ok());
            assert!(same(&here, &there), "{phase}");
        }
    }
}

#[test]
fn a_cut_leaves_the_guest_and_the_next_attempt_works() {
    let clean = |kind| setting(kind, Faults::default());
    for kind in [Kind::Hmpsh, Kind::Silent] {
        for at in (0..3 * CHUNK).step_by(CHUNK as usize / 5 + 77) {
            let owners = Arc::default();
            let (here, there) = (written(), images());
            let source = attach(running_guest(&owners), &here);
            let cut = Faults {
                cut: Some((Way::Forth, at)),
                ..Faults::default()
            };
            fails(
                &source,
                &attach(blank_guest(&owners), &there),
                &setting(kind, cut),
            );
            let dest = attach(blank_guest(&owners), &there);
            assert!(migrate(&source, &dest, &clean(kind)).source.is_ok());
            assert!(same(&here, &there), "{kind:?} {at:#x}");
        }
    }
}
