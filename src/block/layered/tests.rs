use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Barrier;
use std::thread;
use std::time::Duration;

use imago::qcow2::{Qcow2, Qcow2CreateBuilder};
use imago::{FormatCreateBuilder, StorageOpenOptions};
use proptest::prelude::*;

use super::*;
use crate::block::{CHUNK, Drive, Policy, open};
use crate::config::Cache;

/// A qcow2 of that size in a directory.
fn create(directory: &Path, name: &str, len: u64, behind: Option<&str>) -> PathBuf {
    create_as(directory, name, |builder| {
        let builder = builder.size(len);
        match behind {
            Some(name) => builder.backing(name.to_owned(), "raw".to_owned()),
            None => builder,
        }
    })
}

type Builder = Qcow2CreateBuilder<Storage>;

fn create_as(directory: &Path, name: &str, shape: impl FnOnce(Builder) -> Builder) -> PathBuf {
    let path = directory.join(name);
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&path)
        .unwrap();
    let storage = StorageOpenOptions::new().filename(&path).write(true);
    let storage = Storage::from_open_file(file, storage).unwrap();
    shape(Qcow2::<Storage>::create_builder(storage))
        .create()
        .unwrap();
    path
}

/// Makes a qcow2 one of version 2, which differs in nothing else as imago creates it.
fn make_old(path: &Path) {
    let file = File::options().write(true).open(path).unwrap();
    file.write_all_at(&2u32.to_be_bytes(), 4).unwrap();
}

fn claimed(options: OpenOptions) -> Box<dyn Backend> {
    let image = open(options).unwrap();
    image.claim().unwrap();
    image
}

fn options(path: &Path) -> OpenOptions {
    OpenOptions {
        path: path.to_owned(),
        directory: PathBuf::new(),
        format: Some(Format::Qcow2),
        is_read_only: false,
        locks: true,
        is_direct: false,
    }
}

fn read(image: &dyn Backend, offset: u64, len: usize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0x55; len];
    let (one, other) = bytes.split_at_mut(len / 3);
    image.read(offset, &mut vec![In::from(one), In::from(other)])?;
    Ok(bytes)
}

fn write(image: &dyn Backend, offset: u64, bytes: &[u8]) -> io::Result<()> {
    let (one, other) = bytes.split_at(bytes.len() / 2);
    image.write(offset, &mut vec![Out::from(one), Out::from(other)])
}

#[test]
fn what_is_written_is_read_and_the_rest_is_what_is_behind() {
    let place = tempfile::tempdir().unwrap();
    std::fs::write(place.path().join("base"), vec![9; CHUNK as usize]).unwrap();
    let path = create(place.path(), "top", 2 * CHUNK, Some("base"));
    let image = open(options(&path)).unwrap();
    assert_eq!(image.sectors(), 4096);
    let layers = image.layers();
    assert_eq!(
        layers[0].behind,
        Some(("base".to_owned(), Some(Format::Raw)))
    );
    assert_eq!((layers.len(), layers[1].len), (2, CHUNK));
    // Not ours yet.
    assert_eq!(
        write(&*image, 0, &[1; 512]).unwrap_err().kind(),
        io::ErrorKind::PermissionDenied
    );
    image.claim().unwrap();
    write(&*image, 65536 - 512, &[1; 1024]).unwrap();
    assert_eq!(read(&*image, 65536 - 1024, 2048).unwrap()[..512], [9; 512]);
    assert_eq!(read(&*image, 65536 - 512, 1024).unwrap(), [1; 1024]);
    assert_eq!(read(&*image, CHUNK, 512).unwrap(), [0; 512]);
    // A whole cluster, a part of one.
    image.zero(0, 65536, true).unwrap();
    image.zero(2 * 65536, 512, false).unwrap();
    assert_eq!(read(&*image, 0, 512).unwrap(), [0; 512]);
    assert_eq!(read(&*image, 2 * 65536, 1024).unwrap()[511..513], [0, 9]);
    assert_eq!(image.is_allocated(0, CHUNK).unwrap(), (true, 65536));
    let (is_here, count) = image.is_allocated(3 * 65536, 65536).unwrap();
    assert!(!is_here && count >= 65536);
    image.resize(3 * CHUNK).unwrap();
    assert_eq!(image.sectors(), 6144);
    assert_eq!(read(&*image, 2 * CHUNK, 512).unwrap(), [0; 512]);

    // Somebody else has it meanwhile.
    image.release();
    let other = open(options(&path)).unwrap();
    other.claim().unwrap();
    assert!(image.claim().is_err());
    write(&*other, 0, &[7; 512]).unwrap();
    other.flush().unwrap();
    other.release();
    image.claim().unwrap();
    assert_eq!(read(&*image, 0, 512).unwrap(), [7; 512]);
    assert_eq!(image.sectors(), 6144);
}

/// Each has its part of a cluster that was zero.
#[test]
fn what_is_written_beside_what_is_made_zero_stays() {
    const CLUSTER: u64 = 2 << 20;
    const CLUSTERS: u64 = 60;
    let place = tempfile::tempdir().unwrap();
    let path = create_as(place.path(), "a", |builder| {
        let builder = builder.size(CLUSTERS * CLUSTER);
        builder.cluster_size(CLUSTER as usize)
    });
    let image = claimed(options(&path));
    let both = Barrier::new(2);
    let data = vec![1; CLUSTER as usize / 2];
    thread::scope(|scope| {
        scope.spawn(|| {
            for cluster in 0..CLUSTERS {
                both.wait();
                write(&*image, cluster * CLUSTER, &data).unwrap();
            }
        });
        for cluster in 0..CLUSTERS {
            both.wait();
            // Now while the other one writes, and now after it.
            thread::sleep(Duration::from_micros(cluster % 10 * 50));
            let offset = (cluster + 1) * CLUSTER - 4096;
            image.zero(offset, 4096, false).unwrap();
        }
    });
    let lost = (0..CLUSTERS).filter(|cluster| {
        let found = read(&*image, cluster * CLUSTER, 512);
        found.unwrap() != data[..512]
    });
    assert_eq!(lost.count(), 0);
}

#[test]
fn what_is_new_of_an_image_is_zero_whatever_is_behind_it() {
    // In whole clusters and in parts of them.
    for before in [CHUNK, CHUNK + 512] {
        for is_old in [false, true] {
            let place = tempfile::tempdir().unwrap();
            std::fs::write(place.path().join("base"), vec![9; 2 << 20]).unwrap();
            let path = create(place.path(), "top", before, Some("base"));
            if is_old {
                make_old(&path);
            }
            let image = claimed(options(&path));
            image.resize(3 * CHUNK).unwrap();
            let bytes = read(&*image, 0, 3 << 20).unwrap();
            let (old, new) = bytes.split_at(before as usize);
            assert!(old.iter().all(|byte| *byte == 9), "{before} {is_old}");
            assert!(new.iter().all(|byte| *byte == 0), "{before} {is_old}");
            drop(image);
            let bytes = read(&*claimed(options(&path)), 0, 3 << 20).unwrap();
            assert!(bytes.starts_with(old) && bytes.ends_with(new));
        }
    }
}

#[test]
fn an_image_that_grows_when_another_is_moved_into_it_gets_zeros() {
    let place = tempfile::tempdir().unwrap();
    std::fs::write(place.path().join("base"), vec![9; 2 << 20]).unwrap();
    let middle = create(place.path(), "middle", CHUNK, Some("base"));
    let top = create_as(place.path(), "top", |builder| {
        let builder = builder.size(2 * CHUNK);
        builder.backing("middle".to_owned(), "qcow2".to_owned())
    });
    let image = claimed(options(&top));
    write(&*image, 2 * CHUNK - 512, &[1; 512]).unwrap();
    let before = read(&*image, 0, 2 << 20).unwrap();
    assert_eq!((before[0], before[1 << 20]), (9, 0));
    image.commit().unwrap();
    assert!(read(&*image, 0, 2 << 20).unwrap() == before);
    drop(image);
    assert!(read(&*claimed(options(&middle)), 0, 2 << 20).unwrap() == before);
}

#[test]
fn an_image_without_clusters_of_zeros_is_written_to() {
    let place = tempfile::tempdir().unwrap();
    std::fs::write(place.path().join("base"), vec![9; CHUNK as usize]).unwrap();
    let path = create(place.path(), "top", 64 * CHUNK, Some("base"));
    make_old(&path);
    let image = claimed(options(&path));
    write(&*image, 512, &[1; 1 << 17]).unwrap();
    for may_unmap in [false, true] {
        image.zero(1024, 512, may_unmap).unwrap();
        image.zero(0, 70_000, may_unmap).unwrap();
        let bytes = read(&*image, 0, 1 << 20).unwrap();
        assert!(bytes[..70_000].iter().all(|byte| *byte == 0));
        assert_eq!((bytes[70_000], bytes[(1 << 17) + 512]), (1, 9));
    }
    // What is zero anyway takes no room.
    image.zero(CHUNK / 2, 60 * CHUNK, true).unwrap();
    assert_eq!(read(&*image, CHUNK - 512, 1024).unwrap(), [0; 1024]);
    image.flush().unwrap();
    assert!(image.layers()[0].file_len < 3 * CHUNK);
}

/// A raw image past the cache; not every file system can that.
fn direct(file: &tempfile::NamedTempFile) -> Box<dyn Backend> {
    claimed(OpenOptions {
        format: Some(Format::Raw),
        is_direct: true,
        ..options(file.path())
    })
}

#[test]
fn a_raw_image_past_the_cache_keeps_its_room() {
    let file = tempfile::NamedTempFile::new_in(".").unwrap();
    std::fs::write(file.path(), [7; 1 << 17]).unwrap();
    file.as_file().sync_all().unwrap();
    let room = || file.path().metadata().unwrap().blocks();
    let before = room();
    let image = direct(&file);
    image.zero(512, 1 << 16, false).unwrap();
    let bytes = std::fs::read(file.path()).unwrap();
    assert!(bytes[512..][..1 << 16].iter().all(|byte| *byte == 0));
    assert_eq!((bytes[511], bytes[512 + (1 << 16)]), (7, 7));
    assert!(room() >= before, "{before} blocks and then {}", room());
    image.zero(0, 1 << 16, true).unwrap();
    assert!(room() < before, "{before} blocks and then {}", room());
}

type Change = dyn Fn(&dyn Backend);

#[test]
fn a_last_sector_in_part_counts_past_the_cache_too() {
    let file = tempfile::NamedTempFile::new_in(".").unwrap();
    let fill = || std::fs::write(file.path(), [7; 1000]).unwrap();
    let changes: [&Change; 3] = [
        &|image| write(image, 512, &[0; 512]).unwrap(),
        &|image| image.zero(512, 512, false).unwrap(),
        &|image| image.zero(512, 512, true).unwrap(),
    ];
    for change in changes {
        fill();
        let image = direct(&file);
        assert_eq!(image.sectors(), 2);
        let bytes = read(&*image, 0, 1024).unwrap();
        assert_eq!(
            (&bytes[..1000], &bytes[1000..]),
            (&[7; 1000][..], &[0; 24][..])
        );
        change(&*image);
        assert_eq!(image.sectors(), 2);
        assert_eq!(read(&*image, 512, 512).unwrap(), [0; 512]);
        let bytes = std::fs::read(file.path()).unwrap();
        assert_eq!(
            (&bytes[..512], bytes[512..].iter().max()),
            (&[7; 512][..], Some(&0))
        );
        assert_eq!(bytes.len(), 1024);
    }
    fill();
    direct(&file).discard(512, 512).unwrap();
}

/// The image as it would be found if the process ended now.
fn is_in_order(path: &Path) {
    let copy = path.with_extension("copy");
    std::fs::copy(path, &copy).unwrap();
    snapshots::inspect(&File::open(&copy).unwrap()).unwrap();
}

fn snapshot(image: &dyn Backend) -> io::Result<()> {
    let new = snapshots::New {
        name: "a",
        seconds: 0,
        nanoseconds: 0,
        vm_clock: 0,
    };
    image.with_file(true, &mut |file| {
        snapshots::create(file, &new)?.commit()?;
        Ok(())
    })
}

/// What was opened stays what it is, whatever comes to have its name.
#[test]
fn names_matter_only_at_the_start() {
    for is_direct in [false, true] {
        let place = tempfile::tempdir_in(".").unwrap();
        let at = |name: &str| place.path().join(name);
        std::fs::write(at("base"), vec![9; CHUNK as usize]).unwrap();
        create(place.path(), "top", 2 * CHUNK, Some("base"));
        let image = open(OpenOptions {
            directory: place.path().to_owned(),
            is_direct,
            ..options(Path::new("top"))
        });
        let image = image.unwrap();
        image.claim().unwrap();
        write(&*image, 0, &[1; 512]).unwrap();
        for name in ["top", "base"] {
            std::fs::rename(at(name), at(&format!("was-{name}"))).unwrap();
            std::fs::write(at(name), "another").unwrap();
        }
        let is_well = || {
            assert_eq!(read(&*image, 0, 512).unwrap(), [1; 512]);
            assert_eq!(read(&*image, 65536, 512).unwrap(), [9; 512]);
            write(&*image, 512, &[2; 512]).unwrap();
        };
        snapshot(&*image).unwrap();
        is_well();
        let delete = &mut |file: &File| Ok(snapshots::delete(file, "1")?);
        image.with_file(true, delete).unwrap();
        is_well();
        image.release();
        image.claim().unwrap();
        is_well();
        // What is written to is looked for by its name.
        let refused = image.commit().unwrap_err().to_string();
        assert_eq!(refused, "'base' is another file than was opened");
        is_well();
        image.release();
        for name in ["top", "base"] {
            assert_eq!(std::fs::read(at(name)).unwrap(), b"another");
            std::fs::rename(at(&format!("was-{name}")), at(name)).unwrap();
        }
        is_in_order(&at("top"));
        assert!(image.layers()[1].file == "base", "{:?}", image.layers());
        // Nothing of it is locked any more.
        let other = open(OpenOptions {
            format: Some(Format::Raw),
            ..options(&at("base"))
        })
        .unwrap();
        other.claim().unwrap();
    }
}

/// Every way to a new L2 table has it counted before anything else happens.
#[test]
fn a_table_is_counted_however_it_came() {
    let place = tempfile::tempdir().unwrap();
    // An L2 table is for 512 MiB.
    let path = create(place.path(), "top", 4 << 30, None);
    let [one, two] = [512 << 20, 1 << 30];
    let file = Source::open(&options(&path), &path, true).unwrap();
    let image = Layered::open(file, Format::Qcow2, options(&path), false).unwrap();
    image.claim().unwrap();
    image.discard(one, 65536).unwrap();
    is_in_order(&path);
    let failed = image.with([two, 512], |image| {
        image.write(&[1; 512][..], two)?;
        Err(io::Error::other("full"))
    });
    assert_eq!(failed.unwrap_err().to_string(), "full");
    is_in_order(&path);
    // A table that a snapshot has is copied.
    snapshot(&image).unwrap();
    image.discard(one, 65536).unwrap();
    is_in_order(&path);
}

#[test]
fn an_old_image_with_snapshots_keeps_its_size() {
    let place = tempfile::tempdir().unwrap();
    let path = create(place.path(), "top", CHUNK, None);
    // The version; a later one has the width of counts that this one has always.
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[7] = 2;
    std::fs::write(&path, bytes).unwrap();
    let image = open(options(&path)).unwrap();
    image.claim().unwrap();
    image.resize(2 * CHUNK).unwrap();
    snapshot(&*image).unwrap();
    assert_eq!(
        image.resize(3 * CHUNK).unwrap_err().to_string(),
        "Can't resize a v2 image which has snapshots"
    );
    assert_eq!(image.sectors(), 4096);
    image
        .with_file(true, &mut |file| Ok(snapshots::delete(file, "1")?))
        .unwrap();
    image.resize(3 * CHUNK).unwrap();
}

/// With `cache=unsafe` too.
#[test]
fn what_a_guest_has_flushed_survives_the_process() {
    let place = tempfile::tempdir().unwrap();
    let path = create(place.path(), "a", CHUNK, None);
    let policy = Policy {
        cache: Cache {
            ignores_flushes: true,
            ..Cache::default()
        },
        ..Policy::default()
    };
    let drive = Drive::new("d0".to_owned(), open(options(&path)).unwrap()).with_policy(policy);
    drive.claim().unwrap();
    for cluster in 0..2 {
        write(&drive, cluster << 16, &[1; 512]).unwrap();
    }
    drive.flush().unwrap();
    let copy = place.path().join("copy");
    std::fs::copy(&path, &copy).unwrap();
    let copy = open(options(&copy)).unwrap();
    assert_eq!(read(&*copy, 1 << 16, 512).unwrap(), [1; 512]);
}

#[test]
fn a_raw_image_past_the_cache_is_the_same_image() {
    let file = tempfile::NamedTempFile::new_in(".").unwrap();
    file.as_file().set_len(65536).unwrap();
    let image = open(OpenOptions {
        format: Some(Format::Raw),
        is_direct: true,
        ..options(file.path())
    })
    .unwrap();
    image.claim().unwrap();
    write(&*image, 1024, &[3; 1536]).unwrap();
    image.zero(1024, 512, false).unwrap();
    image.flush().unwrap();
    let bytes = std::fs::read(file.path()).unwrap();
    assert_eq!(
        (bytes[1024], bytes[1536], bytes[2559], bytes[2560]),
        (0, 3, 3, 0)
    );
    assert_eq!(read(&*image, 1536, 512).unwrap(), [3; 512]);
    assert_eq!(image.is_allocated(0, 512).unwrap(), (true, 512));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Whatever stands in the metadata, there is an answer.
    #[test]
    fn any_metadata_are_survived(
        changes in prop::collection::vec((prop_oneof![0usize..112, 0usize..5 << 16], any::<u8>()), 1..4),
    ) {
        let place = tempfile::tempdir().unwrap();
        let path = create(place.path(), "a", 2 * CHUNK, None);
        let image = open(options(&path)).unwrap();
        image.claim().unwrap();
        write(&*image, 0, &[1; 4096]).unwrap();
        drop(image);
        let mut bytes = std::fs::read(&path).unwrap();
        for (at, value) in changes {
            let len = bytes.len();
            bytes[at % len] = value;
        }
        std::fs::write(&path, bytes).unwrap();
        let Ok(image) = open(options(&path)) else { return Ok(()) };
        let claimed = image.claim();
        if let Err(error) = &claimed {
            prop_assert!(error.to_string().contains(&path.display().to_string()), "{error}");
        }
        if claimed.is_ok() {
            let _ = read(&*image, 0, 1 << 16);
            let _ = write(&*image, 65536, &[2; 512]);
            let _ = image.zero(0, 65536, true);
            let _ = image.flush();
        }
    }
}
