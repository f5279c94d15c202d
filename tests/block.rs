//! `migrate -b`: disks go along with a guest that writes to them all the time, between hmpsh and
//! hmpsh, and to and from stock QEMU 7.2. When the guest changes hands both images are the same, byte
//! by byte, and the source's is never written again.

mod common;

use common::disk::{DiskGuest, drive, goes_on};
use common::need::{Need, require, tool};
use common::vmm::Program::{Hmpsh, Qemu7};
use common::vmm::{Program, Setup, have};
use std::os::unix::fs::MetadataExt;
use tempfile::NamedTempFile;

const MIB: usize = 1 << 20;

/// A side's images: the one the guest lives on, and one that the guest does not look at.
struct Images {
    used: NamedTempFile,
    spare: NamedTempFile,
}

impl Images {
    /// Empty ones, of 1 MiB and of `len` bytes.
    fn new(len: usize) -> Self {
        let image = |len: usize| {
            let image = NamedTempFile::new().unwrap();
            image.as_file().set_len(len as u64).unwrap();
            image
        };
        Self {
            used: image(MIB),
            spare: image(len),
        }
    }

    /// Images with something in the spare one: every fourth MiB is zeros.
    fn full(len: usize) -> Self {
        let images = Self::new(len);
        let chunk = |number: usize| {
            let byte = move |at: usize| ((at * 31 + number * 7) >> 3) as u8;
            (0..MIB).map(move |at| if number % 4 == 3 { 0 } else { byte(at) })
        };
        let bytes: Vec<u8> = (0..len.div_ceil(MIB)).flat_map(chunk).take(len).collect();
        std::fs::write(images.spare.path(), bytes).unwrap();
        images
    }

    fn setup(&self, guest: &DiskGuest, program: Program) -> Setup {
        let spare = drive("d1", self.spare.path(), "");
        guest
            .setup_on(program, &drive("d0", self.used.path(), ""))
            .args(&["-drive", &spare])
            // A QEMU gives up (an assertion) when it is sent a drive that no device has.
            .args(&["-device", "virtio-blk-device,drive=d1"])
    }

    fn bytes(&self) -> [Vec<u8>; 2] {
        [&self.used, &self.spare].map(|image| std::fs::read(image.path()).unwrap())
    }
}

/// From host to host with its disks, each host with images of its own of `len` bytes.
fn moves(programs: &[Program], len: usize) {
    if !have(programs) {
        return;
    }
    let guest = DiskGuest::new();
    let mut images = vec![Images::full(len)];
    let mut hosts = vec![images[0].setup(&guest, programs[0]).start()];
    goes_on(&hosts.iter().collect::<Vec<_>>());
    for program in &programs[1..] {
        let there = Images::new(len);
        let setup = there.setup(&guest, *program).args(&["-S"]);
        let mut dest = setup.incoming("tcp:127.0.0.1:0").start();
        let port = dest.port();
        let source = hosts.last_mut().unwrap();
        // So that a QEMU sends the disks at all, and whole.
        source.quiet("migrate_set_parameter max-bandwidth 100g");
        source.quiet("migrate_set_parameter downtime-limit 0");
        source.command(&format!("migrate -b tcp:127.0.0.1:{port}"));
        source.wait_migration("completed");
        source.wait_status("paused (postmigrate)");
        dest.wait_status("paused");
        let left = images.last().unwrap().bytes();
        assert!(left == there.bytes(), "the images differ");
        dest.quiet("cont");
        hosts.push(dest);
        goes_on(&hosts.iter().collect::<Vec<_>>());
        assert!(left == images.last().unwrap().bytes(), "the source writes");
        assert!(left[0] != there.bytes()[0], "the guest does not write");
        images.push(there);
    }
}

/// A file has the disks too.
#[test]
fn saved_with_its_disks() {
    if !have(&[Hmpsh]) {
        return;
    }
    let guest = DiskGuest::new();
    let (here, there) = (Images::full(2 * MIB), Images::new(2 * MIB));
    let mut source = here.setup(&guest, Hmpsh).start();
    goes_on(&[&source]);
    let uri = format!("file:{}", source.path("saved").display());
    source.command(&format!("migrate -b {uri}"));
    source.wait_migration("completed");
    let mut dest = there
        .setup(&guest, Hmpsh)
        .incoming(&uri)
        .args(&["-S"])
        .start();
    dest.wait_status("paused");
    assert!(here.bytes() == there.bytes());
    dest.quiet("cont");
    goes_on(&[&source, &dest]);
}

/// A 7.2 counts only what was written to meanwhile, and ends in the middle of the disk when what RAM
/// has left is little. Here that is noticed, and the guest stays where it was.
#[test]
fn a_7_2_that_sends_its_disk_in_part_is_found_out() {
    if !have(&[Hmpsh, Qemu7]) {
        return;
    }
    let guest = DiskGuest::new();
    let len = 256 * MIB;
    let (here, there) = (Images::full(len), Images::new(len));
    let mut source = here.setup(&guest, Qemu7).memory_mib(64).start();
    goes_on(&[&source]);
    let setup = || there.setup(&guest, Hmpsh).memory_mib(64);
    let mut dest = setup().incoming("tcp:127.0.0.1:0").start();
    let port = dest.port();
    source.quiet("migrate_set_parameter max-bandwidth 1g");
    // Little, however slow the host is.
    source.quiet("migrate_set_parameter downtime-limit 5000");
    source.command(&format!("migrate -b tcp:127.0.0.1:{port}"));
    dest.wait_said("The source has ended before it had sent the disks: of 'd1' bytes 0x");
    // It may have thought that all was well: then it holds the guest, at rest.
    let state = source.wait_for("info migrate", "Migration status: ");
    if state.contains("completed") {
        source.quiet("cont");
    }
    source.wait_status("running");
    goes_on(&[&source]);
    // The same from here arrives whole.
    let (from, to) = (Images::full(len), Images::new(len));
    let mut source = from.setup(&guest, Hmpsh).memory_mib(64).start();
    goes_on(&[&source]);
    let setup = to.setup(&guest, Hmpsh).memory_mib(64).args(&["-S"]);
    let mut dest = setup.incoming("tcp:127.0.0.1:0").start();
    let port = dest.port();
    source.quiet("migrate_set_parameter max-bandwidth 1g");
    source.command(&format!("migrate -b tcp:127.0.0.1:{port}"));
    let state = source.wait_migration("completed");
    let kib = (len + MIB) >> 10;
    assert!(state.contains(&format!(
        "remaining disk: 0 kbytes\ntotal disk: {kib} kbytes\n"
    )));
    dest.wait_status("paused");
    assert!(from.bytes() == to.bytes());
    // The guest has hardly used its own 64 MiB.
    for side in [&source, &dest] {
        assert!(side.peak_mib() < 64, "{} MiB", side.peak_mib());
    }
    // Every fourth MiB is zeros, and takes no room.
    let blocks = |images: &Images| images.spare.as_file().metadata().unwrap().blocks() as usize;
    assert!(blocks(&to) <= len / 512 * 3 / 4 + 64, "{}", blocks(&to));
}

/// A drive that is being sent stays what it is.
#[test]
fn on_its_way_a_drive_can_not_be_changed() {
    if !have(&[Hmpsh]) {
        return;
    }
    let guest = DiskGuest::new();
    let (here, there) = (Images::full(4 * MIB), Images::new(4 * MIB));
    let mut source = here.setup(&guest, Hmpsh).start();
    goes_on(&[&source]);
    let dest = there.setup(&guest, Hmpsh).incoming("tcp:127.0.0.1:0");
    let mut dest = dest.start();
    source.quiet("migrate_set_parameter max-bandwidth 1m");
    source.command(&format!("migrate -d -b tcp:127.0.0.1:{}", dest.port()));
    source.wait_for("info migrate", "transferred disk: 1");
    let busy = "Node 'd1' is busy: block device is in use by migration\n";
    assert_eq!(
        source.command("block_resize d1 8"),
        format!("Error: {busy}")
    );
    assert_eq!(source.command("drive_del d1"), busy);
    assert_eq!(source.command("commit d1"), busy);
    source.quiet("migrate_cancel");
    source.wait_migration("cancelled");
    source.quiet("block_resize d1 8");
    source.wait_status("running");
    goes_on(&[&source]);
}

/// An image that somebody cuts off is not taken for zeros; one that nobody finds any more is sent.
#[test]
fn of_an_image_that_was_cut_off_or_removed() {
    if !have(&[Hmpsh]) {
        return;
    }
    let guest = DiskGuest::new();
    let (here, there) = (Images::full(4 * MIB), Images::new(4 * MIB));
    let mut source = here.setup(&guest, Hmpsh).start();
    goes_on(&[&source]);
    here.spare.as_file().set_len(MIB as u64).unwrap();
    let mut dest = there
        .setup(&guest, Hmpsh)
        .args(&["-S"])
        .incoming("tcp:127.0.0.1:0")
        .start();
    let line = format!("migrate -b tcp:127.0.0.1:{}", dest.port());
    source.command(&line);
    let state = source.wait_migration("failed");
    let why = "Reading disk 'd1' from sector 2048 on: the image is shorter than it was";
    assert!(state.contains(why), "{state}");
    source.wait_status("running");
    goes_on(&[&source]);

    here.spare.as_file().set_len(4 * MIB as u64).unwrap();
    std::fs::remove_file(here.used.path()).unwrap();
    source.command(&line);
    source.wait_migration("completed");
    dest.wait_status("paused");
    dest.quiet("cont");
    goes_on(&[&source, &dest]);
}

/// The image at the other end may be the one that is sent.
fn onto_itself(source: Program) {
    if !have(&[source, Hmpsh]) {
        return;
    }
    let guest = DiskGuest::new();
    let images = Images::full(2 * MIB);
    let mut source = images.setup(&guest, source).start();
    goes_on(&[&source]);
    let mut dest = images
        .setup(&guest, Hmpsh)
        .incoming("tcp:127.0.0.1:0")
        .start();
    let port = dest.port();
    let before = std::fs::read(images.spare.path()).unwrap();
    source.command(&format!("migrate -b tcp:127.0.0.1:{port}"));
    // Of a 7.2 either disk may come first.
    dest.wait_said(" at the destination: Failed to get \"write\" lock. Is another");
    source.wait_status("running");
    goes_on(&[&source]);
    assert!(before == std::fs::read(images.spare.path()).unwrap());
}

#[test]
fn onto_the_image_of_hmpsh() {
    onto_itself(Hmpsh);
}

#[test]
fn onto_the_image_of_7_2() {
    onto_itself(Qemu7);
}

/// Part of it is disk, and what is shown never goes back.
#[test]
fn progress_counts_the_disks() {
    if !have(&[Hmpsh]) {
        return;
    }
    let guest = DiskGuest::new();
    let (here, there) = (Images::full(64 * MIB), Images::new(64 * MIB));
    let mut source = here.setup(&guest, Hmpsh).start();
    goes_on(&[&source]);
    let mut dest = there
        .setup(&guest, Hmpsh)
        .incoming("tcp:127.0.0.1:0")
        .start();
    let port = dest.port();
    source.quiet("migrate_set_parameter max-bandwidth 16m");
    let printed = source.command(&format!("migrate -b tcp:127.0.0.1:{port}"));
    let shown: Vec<u32> = printed
        .split("Completed ")
        .filter_map(|text| text.split_once(" %")?.0.parse().ok())
        .collect();
    assert!(shown.len() >= 2 && shown.is_sorted(), "{printed:?}");
    assert!(shown[0] < 50, "{printed:?}");
    source.wait_migration("completed");
    dest.wait_status("running");
    goes_on(&[&source, &dest]);
}

#[test]
fn what_does_not_go_with_b_is_said_as_qemu_says_it() {
    let mut vm = Setup::new(Hmpsh).accel("none").start();
    let conflict = "Error: Command options are incompatible with current migration capabilities\n";
    vm.quiet("migrate_set_capability block on");
    assert_eq!(vm.command("migrate -b tcp:127.0.0.1:1"), conflict);
    vm.quiet("migrate_set_capability block off");
    vm.quiet("migrate_set_parameter block-incremental on");
    assert_eq!(vm.command("migrate -i tcp:127.0.0.1:1"), conflict);
    vm.quiet("migrate_set_parameter block-incremental off");
    // Both are off again when it has ended.
    vm.command("migrate -i tcp:127.0.0.1:1");
    vm.wait_migration("failed");
    assert!(
        vm.command("info migrate_capabilities")
            .contains("\nblock: off\n")
    );
    assert!(
        vm.command("info migrate_parameters")
            .contains("block-incremental: off\n")
    );
}

/// A drive that no disk uses goes along, and is nobody's afterwards.
#[test]
fn a_drive_without_a_disk_is_left() {
    if !have(&[Hmpsh]) || !require(&[Need::QemuImg]) {
        return;
    }
    let guest = DiskGuest::new();
    let (here, there) = (Images::full(MIB), Images::new(MIB));
    let setup = |images: &Images| {
        let used = drive("d0", images.used.path(), "");
        let spare = drive("d1", images.spare.path(), "");
        guest.setup_on(Hmpsh, &used).args(&["-drive", &spare])
    };
    let mut source = setup(&here).start();
    goes_on(&[&source]);
    let mut dest = setup(&there).incoming("tcp:127.0.0.1:0").start();
    let port = dest.port();
    source.command(&format!("migrate -b tcp:127.0.0.1:{port}"));
    source.wait_migration("completed");
    dest.wait_status("running");
    assert!(here.bytes()[1] == there.bytes()[1]);
    let write = |image: &NamedTempFile| {
        let mut io = std::process::Command::new(tool("qemu-io"));
        let output = io
            .args(["-f", "raw", "-c", "write 0 512"])
            .arg(image.path());
        output.output().unwrap().status.success()
    };
    assert!(write(&there.spare) && !write(&there.used));
    dest.quiet("block_resize d1 2");
    goes_on(&[&source, &dest]);
}

/// Who tries again at once meets nothing of the attempt before.
#[test]
fn tried_again_at_once() {
    if !have(&[Hmpsh]) {
        return;
    }
    let mut vm = Setup::new(Hmpsh).accel("none").start();
    for _ in 0..50 {
        vm.quiet("migrate -d -b \"exec:exit 1\"");
        while !vm.command("info migrate").contains("status: failed") {}
    }
}

#[test]
fn between_two_hmpsh() {
    moves(&[Hmpsh, Hmpsh, Hmpsh], 5 * MIB + 512);
}

#[test]
fn to_7_2() {
    moves(&[Hmpsh, Qemu7], 5 * MIB);
}

#[test]
fn from_7_2() {
    moves(&[Qemu7, Hmpsh], 5 * MIB + 512);
}
