use std::path::{Path, PathBuf};

use imago::qcow2::Qcow2;
use imago::{FormatCreateBuilder, StorageOpenOptions};
use proptest::prelude::*;

use super::*;
use crate::block::{CHUNK, Drive, Policy, open};
use crate::config::Cache;

/// A qcow2 of that size in a directory.
fn create(directory: &Path, name: &str, len: u64, behind: Option<&str>) -> PathBuf {
    let path = directory.join(name);
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&path)
        .unwrap();
    let storage = StorageOpenOptions::new().filename(&path).write(true);
    let storage = Storage::from_open_file(file, storage).unwrap();
    let builder = Qcow2::<Storage>::create_builder(storage).size(len);
    match behind {
        Some(name) => builder.backing(name.to_owned(), "raw".to_owned()),
        None => builder,
    }
    .create()
    .unwrap();
    path
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
