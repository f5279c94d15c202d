//! Images in formats: a guest lives on them at hmpsh and stock QEMU in turn, they go along with it,
//! and `qemu-img` finds nothing wrong with them.

mod common;

use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use common::disk::{DiskGuest, goes_on};
use common::journey::moved;
use common::need::{Need, require, tool};
use common::vmm::Program::{Hmpsh, Qemu7, Qemu10};
use common::vmm::{Program, Setup, have};
use tempfile::TempDir;

const MIB: usize = 1 << 20;

/// A directory of images.
struct Place(TempDir);

impl Place {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// `qemu-img create` of a qcow2 of 1 MiB, with more options and a size if they say so.
    fn create(&self, name: &str, options: &[&str]) -> PathBuf {
        let path = self.path(name);
        let mut args = vec!["create", "-q", "-f", "qcow2"];
        args.extend(options);
        let text = path.display().to_string();
        args.push(&text);
        if !options.contains(&"-b") {
            args.push("8M");
        }
        succeeds("qemu-img", &args);
        path
    }

    /// A raw image of 8 MiB that has something everywhere.
    fn base(&self) -> PathBuf {
        let path = self.path("base.raw");
        let bytes: Vec<u8> = (0..8 * MIB).map(|at| ((at * 31) >> 5) as u8 | 1).collect();
        std::fs::write(&path, bytes).unwrap();
        path
    }
}

fn run(program: &str, args: &[&str]) -> Output {
    Command::new(tool(program)).args(args).output().unwrap()
}

#[track_caller]
fn succeeds(program: &str, args: &[&str]) -> String {
    let output = run(program, args);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {args:?}: {said}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// No cluster is lost or has a wrong count.
#[track_caller]
fn is_clean(image: &Path) {
    let text = succeeds(
        "qemu-img",
        &["check", "-f", "qcow2", &image.display().to_string()],
    );
    assert!(text.contains("No errors were found"), "{text}");
}

/// Both show the same disk.
#[track_caller]
fn are_equal(one: &Path, other: &Path) {
    let [one, other] = [one, other].map(|path| path.display().to_string());
    succeeds("qemu-img", &["compare", &one, &other]);
}

fn drive(id: &str, image: &Path, more: &str) -> String {
    let image = image.display();
    format!("if=none,id={id},file={image}{more}")
}

/// The guest lives on an image of its own, and leaves a clean one behind.
fn lives(create: &[&str], more: &str) {
    if !have(&[Hmpsh]) || !require(&[Need::QemuImg]) {
        return;
    }
    let (place, guest) = (Place::new(), DiskGuest::new());
    place.base();
    let image = place.create("a.qcow2", create);
    let drive = drive("d0", &image, &format!(",format=qcow2{more}"));
    let mut vm = guest.setup_on(Hmpsh, &drive).start();
    goes_on(&[&vm]);
    vm.quit();
    is_clean(&image);
}

/// A process that is killed leaves an image that nothing is wrong with, but for clusters that nobody
/// uses.
#[test]
fn left_in_good_order_by_one_that_was_killed() {
    if !have(&[Hmpsh]) || !require(&[Need::QemuImg]) {
        return;
    }
    let (place, guest) = (Place::new(), DiskGuest::new());
    for round in 0..3 {
        // So that a few writes need many tables.
        let options = ["-o", "cluster_size=512"];
        let image = place.create(&format!("{round}.qcow2"), &options);
        let drive = drive("d0", &image, ",format=qcow2,cache=unsafe");
        let vm = guest.setup_on(Hmpsh, &drive).start();
        vm.wait_beacons(5 + 20 * round);
        drop(vm);
        let image = image.display().to_string();
        let checked = run("qemu-img", &["check", "-f", "qcow2", &image]);
        let said = String::from_utf8_lossy(&checked.stdout).into_owned();
        // 3: leaks, and nothing else.
        assert!(matches!(checked.status.code(), Some(0 | 3)), "{said}");
        let again = guest.setup_on(Hmpsh, &drive).start();
        goes_on(&[&again]);
    }
}

/// The same of a raw one.
fn lives_on_raw(more: &str) {
    if !have(&[Hmpsh]) {
        return;
    }
    let guest = DiskGuest::new();
    let drive = drive("d0", guest.image.path(), &format!(",format=raw{more}"));
    let vm = guest.setup_on(Hmpsh, &drive).start();
    goes_on(&[&vm]);
}

/// From host to host over one image that all of them see.
fn shared(programs: &[Program]) {
    if !have(programs) || !require(&[Need::QemuImg]) {
        return;
    }
    let (place, guest) = (Place::new(), DiskGuest::new());
    place.base();
    let image = place.create("a.qcow2", &["-b", "base.raw", "-F", "raw"]);
    let drive = drive("d0", &image, ",format=qcow2");
    let setup = |program| guest.setup_on(program, &drive);
    let mut hosts = vec![setup(programs[0]).start()];
    goes_on(&hosts.iter().collect::<Vec<_>>());
    for program in &programs[1..] {
        let next = moved(hosts.last_mut().unwrap(), setup(*program));
        hosts.push(next);
        hosts.last_mut().unwrap().wait_status("running");
        goes_on(&hosts.iter().collect::<Vec<_>>());
    }
    hosts.last_mut().unwrap().quit();
    drop(hosts);
    is_clean(&image);
}

/// With `migrate -b` or `-i` to a host with images of its own.
fn sent(from: Program, to: Program, option: &str) {
    if !have(&[from, to]) || !require(&[Need::QemuImg]) {
        return;
    }
    let guest = DiskGuest::new();
    let places = [Place::new(), Place::new()];
    let images = places.each_ref().map(|place| {
        place.base();
        let used = place.create("used.qcow2", &["-o", "cluster_size=16k"]);
        (
            used,
            place.create("spare.qcow2", &["-b", "base.raw", "-F", "raw"]),
        )
    });
    for (at, byte) in [("64k", "1"), ("3M", "2"), ("5111808", "3")] {
        let write = format!("write -P {byte} {at} 64k");
        let spare = images[0].1.display().to_string();
        succeeds("qemu-io", &["-f", "qcow2", "-c", &write, &spare]);
    }
    let setup = |side: usize, program| -> Setup {
        let (used, spare) = &images[side];
        guest
            .setup_on(program, &drive("d0", used, ",format=qcow2"))
            .args(&["-drive", &drive("d1", spare, ",format=qcow2")])
            .args(&["-device", "virtio-blk-device,drive=d1"])
    };
    let mut source = setup(0, from).start();
    goes_on(&[&source]);
    let mut dest = setup(1, to)
        .args(&["-S"])
        .incoming("tcp:127.0.0.1:0")
        .start();
    let port = dest.port();
    source.quiet("migrate_set_parameter max-bandwidth 100g");
    source.quiet("migrate_set_parameter downtime-limit 0");
    source.command(&format!("migrate {option} tcp:127.0.0.1:{port}"));
    source.wait_migration("completed");
    dest.wait_status("paused");
    // What is in memory of the metadata goes to the file at the end.
    source.quit();
    dest.quit();
    let [(used, spare), (used_there, spare_there)] = &images;
    are_equal(used, used_there);
    are_equal(spare, spare_there);
    for image in [used, spare, used_there, spare_there] {
        is_clean(image);
    }
    let kept = std::fs::metadata(spare_there).unwrap().blocks() as usize * 512;
    match option {
        // Three chunks of eight, of which one reaches into the next.
        "-i" => assert!(kept < 5 * MIB, "{kept} bytes"),
        _ => assert!(kept >= 8 * MIB, "{kept} bytes"),
    }
}

/// A QEMU that leaves out what is behind an image never says 100 in time where the image has its last
/// chunk; one that goes on to the end with the guest at rest has not forgotten the chunks between.
fn sent_to_the_last_chunk(from: Program, downtime: u32) {
    if !have(&[from, Hmpsh]) || !require(&[Need::QemuImg]) {
        return;
    }
    let guest = DiskGuest::new();
    let places = [Place::new(), Place::new()];
    let images = places.each_ref().map(|place| {
        std::fs::write(place.path("base.raw"), vec![0; 8 * MIB]).unwrap();
        place.create("used.qcow2", &["-b", "base.raw", "-F", "raw"])
    });
    let image = images[0].display().to_string();
    succeeds(
        "qemu-io",
        &["-f", "qcow2", "-c", "write -P 7 7936k 256k", &image],
    );
    let setup = |side: usize, program| -> Setup {
        guest.setup_on(program, &drive("d0", &images[side], ",format=qcow2"))
    };
    let mut source = setup(0, from).start();
    goes_on(&[&source]);
    let there = setup(1, Hmpsh).args(&["-S"]);
    let mut dest = there.incoming("tcp:127.0.0.1:0").start();
    let port = dest.port();
    source.quiet("migrate_set_parameter max-bandwidth 100g");
    source.quiet(&format!("migrate_set_parameter downtime-limit {downtime}"));
    source.command(&format!("migrate -i tcp:127.0.0.1:{port}"));
    source.wait_migration("completed");
    dest.wait_status("paused");
    source.quit();
    dest.quit();
    are_equal(&images[0], &images[1]);
    images.iter().for_each(|image| is_clean(image));
}

/// Bytes of a file that are locked.
fn locked(path: &Path) -> BTreeSet<u64> {
    let inode = format!(":{}", path.metadata().unwrap().ino());
    let locks = std::fs::read_to_string("/proc/locks").unwrap();
    let its = locks.lines().filter_map(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let at = words.iter().position(|word| word.ends_with(&inode))?;
        let number = |word: &str| word.parse::<u64>().ok();
        Some(number(words.get(at + 1)?)?..=number(words.get(at + 2)?)?)
    });
    its.flatten().collect()
}

/// Images and what is behind them are locked as QEMU locks them.
#[test]
fn locked_as_by_7_2() {
    if !have(&[Hmpsh, Qemu7]) || !require(&[Need::QemuImg]) {
        return;
    }
    let (place, guest) = (Place::new(), DiskGuest::new());
    let base = place.base();
    let middle = place.create("middle.qcow2", &["-b", "base.raw", "-F", "raw"]);
    let top = place.create("top.qcow2", &["-b", "middle.qcow2", "-F", "qcow2"]);
    let files = [&top, &middle, &base];
    for more in ["", ",readonly=on", ",cache=none", ",file.locking=off"] {
        let drive = drive("d0", &top, &format!(",format=qcow2{more}"));
        let held = |program| {
            let _vm = guest.setup_on(program, &drive).args(&["-S"]).start();
            files.map(|file| locked(file))
        };
        let here = held(Hmpsh);
        assert_eq!(here, held(Qemu7), "{more}");
        assert_eq!(here[0].is_empty(), more.contains("locking"), "{more}");
        assert!(!here[2].is_empty());
    }
    let drive = drive("d0", &top, ",format=qcow2");
    let _vm = guest.setup_on(Hmpsh, &drive).start();
    for file in files {
        let file = file.display().to_string();
        let refused = run("qemu-io", &["-c", "write 0 512", &file]);
        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(said.contains("Failed to get \"write\" lock"), "{said}");
    }
    let Err((_, said)) = guest.setup_on(Hmpsh, &drive).try_start() else {
        panic!("two use the image");
    };
    assert!(said.contains("Failed to get \"write\" lock"), "{said}");
}

/// What can not be opened is refused at the start, with its reason.
#[test]
fn what_makes_no_sense_is_refused() {
    if !have(&[Hmpsh]) || !require(&[Need::QemuImg]) {
        return;
    }
    let (place, guest) = (Place::new(), DiskGuest::new());
    let refused = |image: &Path, why: &str| {
        let option = drive("d0", image, ",format=qcow2");
        let Err((status, said)) = guest.setup_on(Hmpsh, &option).try_start() else {
            panic!("{why}: it starts");
        };
        assert_eq!(status.code(), Some(1));
        let text = format!("-drive {option}: ");
        assert!(said.contains(&text) && said.contains(why), "{said}");
    };
    refused(&place.base(), "Image is not in qcow2 format");
    let over = |name: &str, behind: &str, format: &str| {
        place.create(name, &["-u", "-b", behind, "-F", format, "-o", "size=1M"])
    };
    refused(
        &over("a.qcow2", "none.raw", "raw"),
        "Could not open backing file: Could not open '",
    );
    refused(
        &over("b.qcow2", "nbd://host", "raw"),
        "Unknown driver 'nbd'",
    );
    refused(&over("c.qcow2", "base.raw", "qed"), "Unknown driver 'qed'");
    over("d.qcow2", "e.qcow2", "qcow2");
    refused(&over("e.qcow2", "d.qcow2", "qcow2"), "too many layers");
    let data = place.path("data").display().to_string();
    let external = format!("data_file={data}");
    refused(
        &place.create("f.qcow2", &["-o", &external]),
        "an external data file: not built in this version",
    );
    for method in ["luks", "aes"] {
        let name = format!("{method}.qcow2");
        let encrypted = format!("encrypt.format={method},encrypt.key-secret=s");
        let secret = ["--object", "secret,id=s,data=abcdefgh", "-o", &encrypted];
        let why = "Unsupported qcow2 feature(s): encryption";
        refused(&place.create(&name, &secret), why);
        refused(&over(&format!("over-{name}"), &name, "qcow2"), why);
    }
}

/// One test per line.
macro_rules! cells {
    ($($name:ident: $run:expr;)*) => {
        $(
            #[test]
            fn $name() {
                $run;
            }
        )*
    };
}

cells! {
    on_qcow2: lives(&[], "");
    on_an_old_qcow2: lives(&["-o", "compat=0.10"], "");
    on_an_old_qcow2_with_zeros_found: lives(&["-o", "compat=0.10"], ",detect-zeroes=on");
    on_small_clusters: lives(&["-o", "cluster_size=512,refcount_bits=1"], "");
    on_top_of_another: lives(&["-b", "base.raw", "-F", "raw"], "");
    past_the_cache: lives(&["-b", "base.raw", "-F", "raw"], ",cache=none");
    through_the_cache: lives(&[], ",cache=directsync");
    without_flushes: lives(&[], ",cache=unsafe");
    with_zeros_given_back: lives(&[], ",discard=unmap,detect-zeroes=unmap");
    raw_past_the_cache: lives_on_raw(",cache=none");
    raw_through_the_cache: lives_on_raw(",cache=writethrough");
    raw_with_zeros_given_back: lives_on_raw(",discard=unmap,detect-zeroes=unmap");
    shared_between_two_hmpsh: shared(&[Hmpsh, Hmpsh, Hmpsh]);
    shared_with_7_2: shared(&[Hmpsh, Qemu7, Hmpsh]);
    shared_with_10_0: shared(&[Qemu10, Hmpsh, Qemu10]);
    whole_between_two_hmpsh: sent(Hmpsh, Hmpsh, "-b");
    whole_to_7_2: sent(Hmpsh, Qemu7, "-b");
    whole_from_7_2: sent(Qemu7, Hmpsh, "-b");
    in_part_between_two_hmpsh: sent(Hmpsh, Hmpsh, "-i");
    in_part_to_7_2: sent(Hmpsh, Qemu7, "-i");
    in_part_from_7_2: sent(Qemu7, Hmpsh, "-i");
    to_the_last_chunk_from_7_2: sent_to_the_last_chunk(Qemu7, 0);
    to_the_last_chunk_from_hmpsh: sent_to_the_last_chunk(Hmpsh, 2000);
}
