//! Snapshots of qcow2 images on a disk that fails or loses its power, and of images that are bad.

mod common;

use std::collections::HashSet;
use std::io::{self, Read, Write};

use common::memory::{Event, Memory, play};
use common::need::{Need, require};
use common::qcow2::{Qcow2, check, minimal};
use hmpsh::block::snapshots::{self, Error, New};

const STATE: &[u8] = &[9; 5000];

fn create(file: &Memory) -> Result<(), Error> {
    let new = New {
        name: "new",
        seconds: 1,
        nanoseconds: 2,
        vm_clock: 3,
    };
    let mut creation = snapshots::create(file, &new)?;
    // Its error says what failed; here it is enough that nothing can come of the snapshot then.
    let _ = creation.write_all(STATE);
    creation.commit().map(drop)
}

/// What somebody finds in an image: the disk and the snapshots' disks and VM states.
#[derive(PartialEq)]
struct Found {
    disk: Vec<u8>,
    snapshots: Vec<(String, Vec<u8>, Vec<u8>)>,
}

fn found(bytes: &[u8]) -> Found {
    let image = Qcow2::of(bytes);
    image.is_clean();
    let file = image.file();
    let snapshots = snapshots::list(&file).unwrap();
    let one = |id: &str| {
        let mut state = Vec::new();
        if let Some(mut reader) = snapshots::vm_state(&file, id).unwrap() {
            reader.read_to_end(&mut state).unwrap();
        }
        (id.to_owned(), image.content(Some(id)), state)
    };
    Found {
        disk: image.content(None),
        snapshots: snapshots.iter().map(|known| one(&known.id())).collect(),
    }
}

/// The header, and what of the file counts as used.
fn used(bytes: &[u8]) -> Vec<&[u8]> {
    let number = |at: usize, len: usize| {
        let bytes = bytes[at..at + len].iter();
        bytes.fold(0, |sum, byte| sum << 8 | usize::from(*byte))
    };
    let size = 1 << number(20, 4);
    let table = number(48, 8);
    let is_used = |cluster: usize| {
        let block = table + cluster / (size / 2) * 8;
        let block = if block < table + size {
            number(block, 8)
        } else {
            0
        };
        block != 0 && number(block + cluster % (size / 2) * 2, 2) != 0
    };
    let clusters = bytes.chunks(size).zip(0..);
    clusters
        .filter(|(_, number)| is_used(*number))
        .map(|(cluster, _)| cluster)
        .collect()
}

/// An image with two snapshots: ID 1 of QEMU, 2 of ours with a VM state.
fn image() -> Vec<u8> {
    let image = Qcow2::new(300 << 10, "cluster_size=512");
    image.io(&["write -P 1 1k 90k".to_owned()]);
    image.snapshot(&["-c", "one"]).unwrap();
    image.io(&["write -P 2 50k 60k".to_owned()]);
    let memory = Memory::new(&image.bytes());
    create(&memory).unwrap();
    image.set(&memory.bytes.borrow());
    image.io(&["write -P 3 80k 2k".to_owned()]);
    image.bytes()
}

/// Whatever fails while that is done, and wherever the power goes: the image is what it was, or
/// what it should become.
fn holds(action: fn(&Memory) -> Result<(), Error>) {
    if !require(&[Need::QemuImg]) {
        return;
    }
    let base = image();
    let before = found(&base);
    let good = Memory::new(&base);
    action(&good).unwrap();
    let after = found(&good.bytes.borrow());
    assert!(after != before);
    let unchanged = used(&base);

    let mut seen = HashSet::new();
    let mut came_into_force = 0;
    let mut judge = |bytes: &[u8]| {
        if !seen.insert(bytes.to_vec()) {
            return;
        }
        let is_same = bytes.len() >= base.len() && used(bytes) == unchanged;
        came_into_force += u64::from(!is_same);
        // As nothing of what is used differs, QEMU is asked now and then only.
        if !is_same || seen.len() % 16 == 1 {
            let now = found(bytes);
            assert!(if is_same { now == before } else { now == after });
        }
    };

    for number in 0..good.requests.get() {
        for are_all_later in [false, true] {
            let bad = Memory::new(&base);
            bad.fails.set(Some((number, are_all_later)));
            let error = action(&bad).unwrap_err().to_string();
            let is_named = ["Failed to ", "The VM state was not written completely"];
            assert!(
                is_named.iter().any(|begin| error.starts_with(begin)),
                "{error}"
            );
            judge(&bad.bytes.borrow());
        }
    }

    let events = good.events.borrow();
    let mut lost = 1u64;
    for end in 0..=events.len() {
        let (events, _) = events.split_at(end);
        let flushed = events
            .iter()
            .rposition(|event| matches!(event, Event::Flush));
        let (sure, unsure) = events.split_at(flushed.unwrap_or(0));
        let mut bytes = base.clone();
        sure.iter().for_each(|event| play(&mut bytes, event));
        let mut some = bytes.clone();
        for event in unsure {
            play(&mut bytes, event);
            lost = lost.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            if lost >> 63 == 0 {
                play(&mut some, event);
            }
        }
        judge(&bytes);
        judge(&some);
    }
    assert!(came_into_force > 0);
}

#[test]
fn creating_is_all_or_nothing() {
    holds(create);
}

#[test]
fn deleting_is_all_or_nothing() {
    holds(|file| snapshots::delete(file, "1"));
}

#[test]
fn applying_is_all_or_nothing() {
    holds(|file| snapshots::apply(file, "1"));
}

#[test]
fn clusters_and_counts_of_every_size() {
    if !require(&[Need::QemuImg]) {
        return;
    }
    let all = (9..=16).chain([21]).map(|bits| (bits, bits % 7));
    for (bits, order) in all.chain((0..=6).map(|order| (9, order))) {
        let base = minimal(3, bits, order);
        let file = Memory::new(&base);
        if order == 0 {
            let error = create(&file).unwrap_err();
            assert!(matches!(error, Error::Overflow { max: 1, .. }), "{error}");
            assert_eq!(*file.bytes.borrow(), base);
            continue;
        }
        create(&file).unwrap();
        let now = found(&file.bytes.borrow());
        assert!(now.snapshots == [("1".to_owned(), now.disk.clone(), STATE.to_vec())]);
        snapshots::apply(&file, "1").unwrap();
        snapshots::delete(&file, "1").unwrap();
        Qcow2::of(&file.bytes.borrow()).is_clean();
        assert!(snapshots::list(&file).unwrap().is_empty());
    }
}

#[test]
fn counts_and_their_table_grow_with_the_file() {
    if !require(&[Need::QemuImg]) {
        return;
    }
    // A cluster of the table is for 2 MiB.
    let file = Memory::new(&minimal(3, 9, 6));
    let new = New {
        name: "large",
        seconds: 0,
        nanoseconds: 0,
        vm_clock: 0,
    };
    let mut creation = snapshots::create(&file, &new).unwrap();
    let state: Vec<u8> = (0..7_000_001u32).map(|n| (n / 255) as u8).collect();
    creation.write_all(&state).unwrap();
    assert_eq!(creation.len(), 7_000_001);
    assert_eq!(creation.commit().unwrap(), "1");
    check(&file, "1").unwrap();
    assert!(found(&file.bytes.borrow()).snapshots[0].2 == state);
    // What has become free is used again.
    let len = file.bytes.borrow().len();
    snapshots::delete(&file, "1").unwrap();
    for _ in 0..20 {
        create(&file).unwrap();
        snapshots::delete(&file, "1").unwrap();
    }
    assert!(file.bytes.borrow().len() <= len + (256 << 10));
    found(&file.bytes.borrow());
}

/// Everything that can be done, and the errors that come of it. Where nothing goes well nothing
/// changes.
fn everything(bytes: &[u8]) -> Vec<String> {
    let file = Memory::new(bytes);
    let state = |id| match snapshots::vm_state(&file, id)? {
        Some(mut state) => io::copy(&mut state.by_ref().take(1 << 20), &mut io::sink())
            .map(drop)
            .map_err(|source| Error::Corrupt(source.to_string())),
        None => Ok(()),
    };
    let all = [
        snapshots::list(&file).map(drop),
        check(&file, "1"),
        state("1"),
        create(&file),
        snapshots::apply(&file, "1"),
        snapshots::delete(&file, "1"),
    ];
    let changes = all[3..].iter().any(Result::is_ok);
    assert!(changes || *file.bytes.borrow() == bytes);
    let errors = all.into_iter().filter_map(Result::err);
    errors.map(|error| error.to_string()).collect()
}

#[test]
fn what_is_bad_is_named_and_left_alone() {
    let mut good = minimal(3, 12, 4);
    let file = Memory::new(&good);
    create(&file).unwrap();
    good.clone_from(&file.bytes.borrow());
    assert_eq!(everything(&good), [""; 0]);
    let number = |at: usize| u64::from_be_bytes(*good[at..].first_chunk().unwrap()) as usize;
    let (l1, counts, table) = (number(40), number(48), number(64));
    let (l2, block) = (number(l1), number(counts));
    let (snapshot_l1, end) = (number(table), good.len() as u64);
    let state = number(number(snapshot_l1 + 8));
    let cases: &[(usize, &[u8], &str)] = &[
        (0, b"QFI\xfa", "Image is not in qcow2 format"),
        (7, &[4], "Unsupported qcow2 version 4"),
        (23, &[8], "Image is corrupt: Cluster size 2^8 invalid"),
        (23, &[22], "Image is corrupt: Cluster size 2^22 invalid"),
        (35, &[1], "Unsupported qcow2 feature(s): encryption"),
        (36, &[1], "L1 table too large"),
        (39, &[0], "Image is corrupt: L1 table is too small"),
        (47, &[1], "L1 table offset"),
        (55, &[1], "Reference count table offset"),
        (56, &[1], "Reference count table too large"),
        (
            59,
            &[0],
            "Image is corrupt: It has no reference count table",
        ),
        (61, &[1], "Snapshot table too large"),
        (
            62,
            &[0xff],
            "The snapshot table reaches beyond the end of the file",
        ),
        (71, &[1], "Snapshot table offset"),
        (79, &[1], "Unsupported qcow2 feature(s): dirty bit"),
        (79, &[2], "Unsupported qcow2 feature(s): corrupt bit"),
        (79, &[4], "Unsupported qcow2 feature(s): external data file"),
        (
            79,
            &[0x10],
            "Unsupported qcow2 feature(s): extended L2 entries",
        ),
        (78, &[1, 1], "dirty bit, Unknown incompatible feature: 100"),
        (
            99,
            &[7],
            "Image is corrupt: Reference count entry width too large",
        ),
        (l1, &end.to_be_bytes(), "An L2 table at"),
        (l1 + 6, &[2], "L2 table offset"),
        (l2, &end.to_be_bytes(), "A cluster at"),
        (l2 + 6, &[2], "Cluster offset"),
        (counts + 6, &[2], "Refcount block offset"),
        (counts, &end.to_be_bytes(), "beyond the end of the file"),
        (
            block,
            &[0, 0],
            "The header at 0x0 is in a cluster that counts as free",
        ),
        (counts + 8, &good[counts..][..8], "is there twice"),
        (table, &end.to_be_bytes(), "L1 table"),
        (table, &[0; 8], "An L1 table is where the header is"),
        (table + 8, &[1], "L1 table too large"),
        (
            table + 37,
            &[1],
            "Extra metadata in the snapshot table too large",
        ),
        (table + 48, &[1], "L1 table too large"),
        (table + 55, &[1], "A snapshot's disk size of 131073"),
        (table + 76, &[1], "has no room for its VM state"),
        (snapshot_l1 + 8, &good[snapshot_l1..][..8], "is there twice"),
        (
            state,
            &[8],
            "Image is corrupt: The VM state is not what was saved",
        ),
    ];
    for (at, bytes, expected) in cases {
        let mut bad = good.clone();
        bad[*at..at + bytes.len()].copy_from_slice(bytes);
        let errors = everything(&bad);
        let is_said = errors.iter().any(|error| error.contains(expected));
        assert!(is_said, "{at} {expected}: {errors:?}");
    }
    // A version 2 has no features, and keeps its size.
    let mut old = minimal(2, 12, 4);
    old[79] = 1;
    let file = Memory::new(&old);
    create(&file).unwrap();
    file.bytes.borrow_mut()[30] += 2;
    let error = snapshots::apply(&file, "1").unwrap_err();
    assert_eq!(
        error.to_string(),
        "Can't resize a v2 image which has snapshots"
    );
    let error = snapshots::delete(&file, "one").unwrap_err();
    assert_eq!(error.to_string(), "Snapshot 'one' does not exist");
}

#[test]
fn no_damage_goes_unanswered() {
    let file = Memory::new(&minimal(3, 9, 4));
    create(&file).unwrap();
    let good = file.bytes.borrow().clone();
    let mut dice = 1u64;
    for _ in 0..3000 {
        let mut bad = good.clone();
        for _ in 0..2 {
            dice = dice.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let at = (dice >> 33) as usize % good.len();
            // Every other time in the header.
            let at = if dice >> 63 == 0 { at } else { at % 104 };
            bad[at] = [0, 1, 0x80, 0xff, bad[at] ^ 2][(dice >> 20) as usize % 5];
        }
        everything(&bad);
    }
}

#[test]
fn features_that_a_writer_has_to_know_are_cleared() {
    let mut base = minimal(3, 12, 4);
    base[95] = 1;
    let file = Memory::new(&base);
    snapshots::list(&file).unwrap();
    assert_eq!(file.bytes.borrow()[95], 1);
    create(&file).unwrap();
    assert_eq!(file.bytes.borrow()[95], 0);
}

#[test]
fn names_have_their_limits() {
    let file = Memory::new(&minimal(3, 12, 4));
    let long = "x".repeat(256);
    for name in ["", "a\0b", &long] {
        let new = New {
            name,
            seconds: 0,
            nanoseconds: 0,
            vm_clock: 0,
        };
        let refused = snapshots::create(&file, &new).err().unwrap();
        assert!(matches!(refused, Error::Name(_)), "{refused}");
    }
}

#[test]
fn extra_data_of_others_are_kept() {
    let file = Memory::new(&minimal(3, 12, 4));
    create(&file).unwrap();
    let list = || snapshots::list(&file).unwrap();
    let table = u64::from_be_bytes(*file.bytes.borrow()[64..].first_chunk().unwrap());
    // No longer the mark of our VM state.
    file.bytes.borrow_mut()[table as usize + 64] = b'?';
    let theirs = list().remove(0);
    assert_eq!((theirs.unknown.len(), theirs.state()), (24, None));
    create(&file).unwrap();
    assert_eq!(list()[0], theirs);
    assert!(list()[1].state().is_some_and(|state| state.len == 5000));
    snapshots::delete(&file, "2").unwrap();
    assert_eq!(list(), [theirs]);
}

/// The L1 table of one snapshot is no other's: as many as there can be would take for ever.
#[test]
fn tables_are_no_others() {
    let file = Memory::new(&minimal(3, 12, 4));
    create(&file).unwrap();
    create(&file).unwrap();
    let good = file.bytes.borrow().clone();
    let number = |at: usize| u64::from_be_bytes(*good[at..].first_chunk().unwrap()) as usize;
    let (active, first) = (number(40), number(64));
    // ID and name have 4 bytes.
    let second = first + (40 + 24 + 24 + 4usize).next_multiple_of(8);
    let snapshot_l1 = number(first);
    assert_eq!(everything(&good), [""; 0]);
    for (at, table) in [(second, snapshot_l1), (first, active)] {
        let mut bad = good.clone();
        bad[at..at + 8].copy_from_slice(&table.to_be_bytes());
        let file = Memory::new(&bad);
        let error = snapshots::inspect(&file).unwrap_err().to_string();
        assert!(error.contains("is in the place of another"), "{error}");
    }
    // Nor behind the file's end.
    let mut bad = good.clone();
    bad[second..second + 8].copy_from_slice(&(1u64 << 40).to_be_bytes());
    let error = snapshots::inspect(&Memory::new(&bad)).unwrap_err();
    assert!(error.to_string().contains("beyond the end of the file"));
}

/// A small file that says that it has 200 GiB of tables, all zero.
#[test]
fn tables_without_anything_take_no_time() {
    use std::os::unix::fs::FileExt;
    const BITS: u32 = 21;
    const TABLES: u64 = 100_000;
    let image = Qcow2::of(&[]);
    let file = image.file();
    let at = |cluster: u64| cluster << BITS;
    let put = |at: u64, bytes: &[u8]| file.write_all_at(bytes, at).unwrap();
    let head = minimal(3, 9, 0);
    put(0, &head[..104]);
    put(20, &BITS.to_be_bytes());
    put(24, &[0; 8]);
    put(36, &(TABLES as u32).to_be_bytes());
    put(40, &at(3).to_be_bytes());
    put(48, &at(1).to_be_bytes());
    put(at(1), &at(2).to_be_bytes());
    put(at(2), &vec![0xff; TABLES as usize / 8 + 2]);
    let l1: Vec<u8> = (4..4 + TABLES)
        .flat_map(|table| at(table).to_be_bytes())
        .collect();
    put(at(3), &l1);
    file.set_len(at(4 + TABLES)).unwrap();
    let begin = std::time::Instant::now();
    snapshots::inspect(&file).unwrap();
    assert!(begin.elapsed().as_secs() < 5, "{:?}", begin.elapsed());
}

/// Snapshots have sizes in whole sectors, as QEMU compares them.
#[test]
fn a_last_sector_in_part_is_the_disks_own() {
    // 32 KiB is what an L2 table is for.
    for size in [10_000u64, (32 << 10) + 100, (64 << 10) + 511] {
        let mut bytes = minimal(3, 9, 4);
        bytes[24..32].copy_from_slice(&size.to_be_bytes());
        bytes[36..40].copy_from_slice(&3u32.to_be_bytes());
        let file = Memory::new(&bytes);
        create(&file).unwrap();
        let list = snapshots::list(&file).unwrap();
        assert_eq!(list[0].disk_size, size / 512 * 512);
        snapshots::check(&file, "1").unwrap();
        snapshots::apply(&file, "1").unwrap();
        snapshots::check(&file, "1").unwrap();
        assert_eq!(file.bytes.borrow()[24..32], size.to_be_bytes());
        // One of ours from earlier has the disk's own size.
        let table = u64::from_be_bytes(*file.bytes.borrow()[64..].first_chunk().unwrap()) as usize;
        file.bytes.borrow_mut()[table + 48..table + 56].copy_from_slice(&size.to_be_bytes());
        snapshots::check(&file, "1").unwrap();
    }
}
