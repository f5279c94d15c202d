//! Disks go along: a guest that writes meanwhile, images of every size, and every fault on the way.

use std::sync::atomic::{AtomicU64, Ordering};

use super::*;
use crate::block::{Backend, CHUNK, Drive, Layer, Memory, words};
use crate::config::Format;
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
        // What is zero already is not written.
        there[0].1.bytes().fill(9);
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
            there[0].1.bytes().fill(9);
            let source = attach(running_guest(&owners), &here);
            let drive = Arc::clone(&source.drives[0]);
            let faults = Faults {
                at: Some((
                    Way::Forth,
                    2 * CHUNK + 100,
                    Arc::new(move || {
                        let mut pieces = vec![Out::from(&[1; 512][..])];
                        drive.write(CHUNK + 512, &mut pieces).unwrap();
                    }),
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

/// An image with something behind it: what is zero here is there.
#[derive(Clone)]
struct Upper {
    image: Memory,
    flushes: Arc<AtomicU64>,
}

impl Upper {
    fn new(image: &Memory) -> Self {
        let (image, flushes) = (image.clone(), Arc::default());
        Self { image, flushes }
    }
}

impl Backend for Upper {
    fn sectors(&self) -> u64 {
        self.image.sectors()
    }

    fn layers(&self) -> Vec<Layer> {
        vec![Layer {
            file: String::new(),
            format: Format::Qcow2,
            len: 0,
            file_len: 0,
            allocated: 0,
            behind: Some(("base".to_owned(), None)),
            facts: None,
        }]
    }

    fn is_read_only(&self) -> bool {
        false
    }

    fn read(&self, offset: u64, rooms: &mut Vec<crate::iov::In<'_>>) -> std::io::Result<()> {
        self.image.read(offset, rooms)
    }

    fn write(&self, offset: u64, pieces: &mut Vec<Out<'_>>) -> std::io::Result<()> {
        self.image.write(offset, pieces)
    }

    fn zero(&self, offset: u64, len: u64, may_unmap: bool) -> std::io::Result<()> {
        self.image.zero(offset, len, may_unmap)
    }

    fn is_allocated(&self, offset: u64, len: u64) -> std::io::Result<(bool, u64)> {
        let bytes = self.image.bytes();
        let asked = &bytes[offset as usize..][..len as usize];
        Ok((asked.iter().any(|byte| *byte != 0), len))
    }

    fn flush(&self) -> std::io::Result<()> {
        self.flushes.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
}

/// The rest is small enough before the first chunk has gone: all of it goes when the guest stands
/// still, and what `-i` leaves out is not missed.
#[test]
fn disks_may_go_with_the_end() {
    for (kind, incremental) in [
        (Kind::Hmpsh, true),
        (Kind::Hmpsh, false),
        (Kind::Silent, true),
        (Kind::Silent, false),
    ] {
        let owners = Arc::default();
        // At the destination one is longer, and there is another one.
        let lengths = [4 * CHUNK, 6 * CHUNK, CHUNK].map(Memory::new);
        let [here, there, other] = &lengths;
        here.bytes()[0] = 1;
        here.bytes()[3 * CHUNK as usize..].fill(2);
        there.bytes()[2 * CHUNK as usize] = 3;
        let drive = |id: &str, image: Box<dyn Backend>| Arc::new(Drive::new(id.to_owned(), image));
        let [mut source, mut dest] = [running_guest(&owners), blank_guest(&owners)];
        source.drives = vec![drive("hd0", Box::new(Upper::new(here)))];
        let upper = Upper::new(there);
        let flushes = Arc::clone(&upper.flushes);
        dest.drives = vec![
            drive("other", Box::new(other.clone())),
            drive("hd0", Box::new(upper)),
        ];
        let mut early = setting(kind, Faults::default());
        early.limits.avail_switchover_bandwidth = 1 << 40;
        let zeros = false;
        early.block = Some(block::Options { zeros, incremental });
        let outcome = migrate(&source, &dest, &early);
        let what = format!("{kind:?} {incremental}");
        assert!(outcome.source.is_ok(), "{what}: {:?}", outcome.source);
        assert!(outcome.dest.is_ok(), "{what}: {:?}", outcome.dest);
        let disk = outcome.source_board.disk.unwrap();
        assert_eq!((disk.remaining, disk.total), (0, 4 * CHUNK), "{what}");
        let (here, there) = (here.bytes(), there.bytes());
        assert_eq!(here[..CHUNK as usize], there[..CHUNK as usize], "{what}");
        let last = 3 * CHUNK as usize..4 * CHUNK as usize;
        assert_eq!(here[last.clone()], there[last], "{what}");
        assert_eq!(there[2 * CHUNK as usize], if incremental { 3 } else { 0 });
        // The guest that has come can do what it likes with its drives.
        assert!(dest.drives.iter().all(|drive| !drive.is_busy()), "{what}");
        // What has come is made safe by and by.
        let is_safe = || flushes.load(Ordering::SeqCst) == 1;
        let waited = (0..500).any(|_| {
            std::thread::sleep(Duration::from_millis(10));
            is_safe()
        });
        assert!(waited, "{what}");
    }
}

/// Where nobody could ask for the length, what does not fit is noticed when it comes.
#[test]
fn a_disk_that_loses_its_end_is_refused() {
    for (is_written, is_refused) in [(true, true), (false, false)] {
        let owners = Arc::default();
        let here = vec![("hd0", Memory::new(CHUNK + 1024))];
        let there = vec![("hd0", Memory::new(CHUNK + 512))];
        here[0].1.bytes()[0] = 1;
        if is_written {
            here[0].1.bytes()[CHUNK as usize + 512] = 1;
        }
        let source = attach(running_guest(&owners), &here);
        let dest = attach(blank_guest(&owners), &there);
        let outcome = migrate(&source, &dest, &setting(Kind::Silent, Faults::default()));
        assert_eq!(outcome.dest.is_err(), is_refused);
        if let Err(error) = outcome.dest {
            let why = "Disk 'hd0' is too small: it has 2049 sectors here, and the source's goes on";
            assert_eq!(error.to_string(), why);
        }
    }
}

/// From the first word about them to the end their length is what was said.
#[test]
fn drives_are_busy_all_the_way() {
    for way in [Way::Forth, Way::Back] {
        let owners = Arc::default();
        let (here, there) = (written(), images());
        let source = attach(running_guest(&owners), &here);
        let dest = attach(blank_guest(&owners), &there);
        let (ours, theirs) = (Arc::clone(&source.drives[1]), Arc::clone(&dest.drives[1]));
        let seen = Arc::new(Mutex::new(None));
        let note = Arc::clone(&seen);
        let event = Arc::new(move || {
            *note.lock().unwrap() = Some((ours.is_busy(), theirs.is_busy()));
        });
        // The first bytes there, and the answer to the manifest: pongs have 8 bytes.
        let at = if way == Way::Forth { 0 } else { 8 };
        let faults = Faults {
            at: Some((way, at, event)),
            ..Faults::default()
        };
        let outcome = migrate(&source, &dest, &setting(Kind::Hmpsh, faults));
        assert!(outcome.source.is_ok());
        assert_eq!(*seen.lock().unwrap(), Some((true, way == Way::Back)));
        let all = source.drives.iter().chain(&dest.drives);
        assert!(all.into_iter().all(|drive| !drive.is_busy()));
    }
}

/// A bitmap of the destination's own notes what comes; zeros where there are zeros are not written.
#[test]
fn what_comes_is_written_as_by_the_guest() {
    let owners = Arc::default();
    let (here, there) = (written(), images());
    let source = attach(running_guest(&owners), &here);
    let dest = attach(blank_guest(&owners), &there);
    dest.drives[0].add_bitmap("b", None, |_| ()).unwrap();
    let clean = setting(Kind::Hmpsh, Faults::default());
    assert!(migrate(&source, &dest, &clean).source.is_ok());
    assert_eq!(dest.drives[0].bitmaps().info()[0].dirty, LENGTHS[0]);
    assert_eq!(there[0].1.zeroed(), 0);
}
