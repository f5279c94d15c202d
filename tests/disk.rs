//! A guest that lives on its disk, at rest and on its way between hmpsh and stock QEMU 7.2 and
//! 10.0. It checks all it reads itself; one life over all hosts, as in tests/qemu.rs. The same for
//! the disk of the built-in guest.

mod common;

use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use common::beacon::{fault, wait_fault, wait_requests};
use common::disk::{DiskGuest, drive, goes_on, on_drive};
use common::hmp::PATIENCE;
use common::journey::moved;
use common::need::{Need, require};
use common::small::SmallDisk;
use common::vmm::Program::{Hmpsh, Qemu7, Qemu10};
use common::vmm::{Program, Setup, Vmm, have};
use common::{poll, without_node_digits};
use rustix::fs::{FlockOperation, fcntl_lock};
use tempfile::NamedTempFile;

/// Boots and reads back what it wrote; `kind` is what it says of its disk.
fn lives(program: Program, adjust: fn(Setup) -> Setup, kind: &str) {
    if !have(&[program]) {
        return;
    }
    let guest = DiskGuest::new();
    let mut vm = adjust(guest.setup(program)).start();
    goes_on(&[&vm]);
    let log = std::fs::read_to_string(vm.log()).unwrap();
    // INDIRECT_DESC, EVENT_IDX, WRITE_ZEROES, DISCARD, CONFIG_WCE, TOPOLOGY, FLUSH, BLK_SIZE,
    // GEOMETRY, SEG_MAX: the same at all three.
    let hello = format!("hmpsh guest {kind} features 805334612\n");
    assert!(log.starts_with(&hello), "{log}");
    vm.quiet("stop");
    let image = std::fs::read(guest.image.path()).unwrap();
    // The first word of a round in the 64 places, each two sectors.
    let last = image.chunks(1024).take(64).map(|place| {
        let word = |at: usize| u32::from_le_bytes(place[at..at + 4].try_into().unwrap());
        assert!((0..256).all(|n| word(4 * n as usize) == word(0).wrapping_add(n)));
        word(0)
    });
    assert!(last.filter(|first| *first != 0).count() >= 62);
    vm.quiet("system_reset");
    vm.quiet("cont");
    let again = poll(PATIENCE, || {
        let log = std::fs::read_to_string(vm.log()).unwrap_or_default();
        let (_, second) = log.rsplit_once(&*hello)?;
        (log.matches("hmpsh").count() == 2 && second.contains("\nB 70\n")).then_some(())
    });
    assert!(again.is_some(), "it does not live again after a reset");
}

/// Moves from host to host, live, over tcp.
fn moves(programs: &[Program], adjust: fn(Setup) -> Setup) {
    if !have(programs) {
        return;
    }
    let guest = DiskGuest::new();
    let setup = |program| adjust(guest.setup(program));
    let mut hosts = vec![setup(programs[0]).start()];
    goes_on(&hosts.iter().collect::<Vec<_>>());
    for program in &programs[1..] {
        let last = hosts.last_mut().unwrap();
        let next = moved(last, setup(*program));
        hosts.push(next);
        hosts.last_mut().unwrap().wait_status("running");
        goes_on(&hosts.iter().collect::<Vec<_>>());
    }
}

fn plain(setup: Setup) -> Setup {
    setup
}

/// The present interface of virtio instead of the legacy one.
fn modern(setup: Setup) -> Setup {
    setup.args(&["-global", "virtio-mmio.force-legacy=off"])
}

fn split_with_pic(setup: Setup) -> Setup {
    setup.irqchip("split").machine(",pic=on,pit=on")
}

/// Saved to a file with the disk at work, and loaded.
fn saved(from: Program, to: Program) {
    if !have(&[from, to]) {
        return;
    }
    let guest = DiskGuest::new();
    let mut source = guest.setup(from).start();
    goes_on(&[&source]);
    let file = source.path("saved");
    let file = file.display();
    source.command(&format!("migrate \"exec:cat > {file}\""));
    source.wait_migration("completed");
    let incoming = format!("exec:cat {file}");
    let mut dest = guest.setup(to).incoming(&incoming).start();
    dest.wait_status("running");
    goes_on(&[&source, &dest]);
}

/// A read-only disk answers a write with an error, and the image stays as it was.
fn takes_no_writes(program: Program) {
    if !have(&[program]) {
        return;
    }
    let guest = DiskGuest::new();
    let drive = drive("d0", guest.image.path(), ",readonly=on");
    let vm = guest.setup_on(program, &drive).start();
    let told = poll(PATIENCE, || {
        let log = std::fs::read_to_string(vm.log()).unwrap_or_default();
        log.ends_with("FAULT status\n").then_some(())
    });
    assert!(told.is_some(), "the write was not refused");
    let image = std::fs::read(guest.image.path()).unwrap();
    assert!(image.iter().all(|byte| *byte == 0));
}

/// QEMU stops a guest whose disk is full, and sends the request with it: it is executed here, or
/// further on.
fn kept_by(from: Program, hosts: &[Program]) {
    if !have(&[&[from], hosts].concat()) {
        return;
    }
    let guest = DiskGuest::new();
    let fault = tempfile::NamedTempFile::new().unwrap();
    let rule = "[inject-error]\nevent = \"pwritev\"\nerrno = \"28\"\nonce = \"on\"\n";
    std::fs::write(fault.path(), rule).unwrap();
    let (fault, image) = (fault.path().display(), guest.image.path().display());
    let drive = format!("if=none,id=d0,file=blkdebug:{fault}:{image},format=raw,werror=stop");
    let mut vms = vec![guest.setup_on(from, &drive).start()];
    for host in hosts {
        let source = vms.last_mut().unwrap();
        source.wait_status("paused (io-error)");
        let dest = saved_and_loaded(source, guest.setup(*host));
        vms.push(dest);
    }
    let last = vms.last_mut().unwrap();
    last.wait_status("paused (io-error)");
    last.quiet("cont");
    goes_on(&vms.iter().collect::<Vec<_>>());
}

/// A guest at rest goes through a file.
fn saved_and_loaded(source: &mut Vmm, setup: Setup) -> Vmm {
    let file = source.path("saved");
    let file = file.display();
    source.command(&format!("migrate \"exec:cat > {file}\""));
    source.wait_migration("completed");
    setup.incoming(&format!("exec:cat {file}")).start()
}

/// A host without room stops the guest; with room it goes on, here or elsewhere.
fn full(to: Option<Program>) {
    if !have(&[Hmpsh, Qemu7, Qemu10]) || !require(&[Need::Root]) {
        return;
    }
    let guest = DiskGuest::new();
    let small = SmallDisk::new("size=32k");
    let image = small.path().join("disk");
    let file = std::fs::File::create(&image).unwrap();
    file.set_len(1 << 20).unwrap();
    let drive = drive("d0", &image, "");
    let mut vm = guest.setup_on(Hmpsh, &drive).start();
    vm.wait_status("paused (io-error)");
    let here = without_node_digits(&vm.command("info block"));
    assert!(here.contains("    I/O status:       nospace\n"), "{here}");
    vm.quiet("cont");
    vm.wait_status("paused (io-error)");
    let mut vms = vec![vm];
    if let Some(to) = to {
        let setup = guest.setup_on(to, &drive);
        let dest = saved_and_loaded(&mut vms[0], setup);
        vms.push(dest);
        vms[1].wait_status("paused (io-error)");
        vms[1].quiet("cont");
        vms[1].wait_status("paused (io-error)");
        assert_eq!(without_node_digits(&vms[1].command("info block")), here);
    }
    small.mount("remount,size=2m");
    let last = vms.last_mut().unwrap();
    last.quiet("cont");
    last.wait_status("running");
    assert!(!last.command("info block").contains("I/O status"));
    goes_on(&vms.iter().collect::<Vec<_>>());
}

/// Disks in three slots, one of which is read-only, arrive whatever the program.
fn three_disks(from: Program, to: Program) {
    if !have(&[from, to]) {
        return;
    }
    let guest = DiskGuest::new();
    let odd = tempfile::NamedTempFile::new().unwrap();
    odd.as_file().set_len(1000).unwrap();
    let (b, c) = (
        drive("d1", odd.path(), ",readonly=on"),
        drive("d2", odd.path(), ",readonly=on"),
    );
    let setup = |program| {
        guest.setup(program).args(&[
            "-drive",
            &b,
            "-device",
            "virtio-blk-device,drive=d1,bus=virtio-mmio-bus.0",
            "-drive",
            &c,
            "-device",
            "virtio-blk-device,drive=d2,serial=third",
        ])
    };
    let mut source = setup(from).start();
    goes_on(&[&source]);
    let mut dest = moved(&mut source, setup(to));
    dest.wait_status("running");
    goes_on(&[&source, &dest]);
}

/// A machine whose slots have another interface is told which option to change, and the guest goes
/// on where it was (a QEMU without a way back knows nothing of it).
fn meets_the_other_interface(
    from: Program,
    ours: fn(Setup) -> Setup,
    theirs: fn(Setup) -> Setup,
    how: &str,
) {
    if !have(&[from, Hmpsh]) {
        return;
    }
    let guest = DiskGuest::new();
    let mut source = ours(guest.setup(from)).start();
    goes_on(&[&source]);
    let mut dest = theirs(guest.setup(Hmpsh))
        .incoming("tcp:127.0.0.1:0")
        .start();
    let port = dest.port();
    let why = format!("(start it {how} -global virtio-mmio.force-legacy=off)");
    source.command(&format!("migrate tcp:127.0.0.1:{port}"));
    dest.wait_said(&why);
    if from == Hmpsh {
        let state = source.wait_migration("failed");
        assert!(state.contains(&why), "{state}");
        source.wait_status("running");
        goes_on(&[&source]);
    }
}

/// A migration that fails leaves the disk at work where it was.
fn stays(from: Program) {
    if !have(&[from]) {
        return;
    }
    let guest = DiskGuest::new();
    let mut source = guest.setup(from).start();
    goes_on(&[&source]);
    source.command("migrate \"exec:cat > /dev/null; exit 1\"");
    source.wait_migration("failed");
    goes_on(&[&source]);
    let mut dest = moved(&mut source, guest.setup(Hmpsh));
    dest.wait_status("running");
    goes_on(&[&source, &dest]);
}

#[test]
fn a_destination_without_the_disk_is_refused_by_name() {
    if !have(&[Hmpsh]) {
        return;
    }
    let guest = DiskGuest::new();
    let mut source = guest.setup(Hmpsh).start();
    goes_on(&[&source]);
    let mut dest = Setup::new(Hmpsh).incoming("tcp:127.0.0.1:0").start();
    let port = dest.port();
    source.command(&format!("migrate tcp:127.0.0.1:{port}"));
    let state = source.wait_migration("failed");
    assert!(
        state.contains("virtio-mmio@00000000feb00e00/virtio-blk"),
        "{state}"
    );
    source.wait_status("running");
    goes_on(&[&source]);
}

/// Whoever comes second is refused, in the same words; what was moved is the destination's.
fn locks(first: Program, second: Program) {
    if !have(&[first, second, Hmpsh]) {
        return;
    }
    let guest = DiskGuest::new();
    let image = guest.image.path().display().to_string();
    let mut holder = guest.setup(first).start();
    goes_on(&[&holder]);
    let refused = |program, more: &str, why: &str| {
        let drive = drive("d0", guest.image.path(), more);
        let Err((status, said)) = guest.setup_on(program, &drive).try_start() else {
            panic!("{program:?} uses the image too");
        };
        assert_eq!(status.code(), Some(1));
        let text = format!(
            "-device virtio-blk-device,drive=d0: Failed to get {why} lock \
             Is another process using the image [{image}]? "
        );
        // Here an error is one line.
        assert!(said.replace('\n', " ").contains(&text), "{said}");
    };
    let all_refused = || {
        for program in [second, Hmpsh] {
            refused(program, "", "\"write\"");
            refused(program, ",readonly=on", "shared \"write\"");
        }
    };
    all_refused();
    if first == Hmpsh {
        // A migration that fails takes nothing away.
        holder.command("migrate \"exec:cat > /dev/null; exit 1\"");
        holder.wait_migration("failed");
        holder.wait_status("running");
        goes_on(&[&holder]);
        all_refused();
    }
    let mut dest = moved(&mut holder, guest.setup(second));
    dest.wait_status("running");
    goes_on(&[&holder, &dest]);
    all_refused();
    if first == Hmpsh {
        let told = holder.command("cont -f");
        assert!(
            told.contains("Failed to get \"write\" lock. Is another"),
            "{told}"
        );
        holder.wait_status("paused (postmigrate)");
    }
    drop(dest);
    let off = drive("d0", guest.image.path(), ",file.locking=off");
    let _beside = guest.setup_on(Hmpsh, &off).start();
    guest.setup(Hmpsh).start();
}

#[test]
fn an_image_that_somebody_else_took_meanwhile_is_not_run_on() {
    if !have(&[Hmpsh]) {
        return;
    }
    let guest = DiskGuest::new();
    let mut source = guest.setup(Hmpsh).start();
    goes_on(&[&source]);
    let mut dest = {
        let other = DiskGuest::new();
        let drive = drive("d0", other.image.path(), "");
        let third = guest.setup_on(Hmpsh, &drive).start();
        let dest = guest.setup_on(Hmpsh, &drive).incoming("tcp:127.0.0.1:0");
        let mut dest = dest.start();
        let port = dest.port();
        source.command(&format!("migrate tcp:127.0.0.1:{port}"));
        let state = source.wait_migration("failed");
        assert!(
            state.contains("Disk 'd0': Failed to get \"write\" lock. "),
            "{state}"
        );
        source.wait_status("running");
        goes_on(&[&source]);
        drop(third);
        moved(&mut source, guest.setup(Hmpsh))
    };
    dest.wait_status("running");
    goes_on(&[&source, &dest]);
}

/// The same where the guest would go on at the source: it waits there, and can be told to go on.
#[test]
fn a_guest_whose_image_was_taken_waits() {
    if !have(&[Hmpsh]) {
        return;
    }
    let guest = DiskGuest::new();
    let mut source = guest.setup(Hmpsh).start();
    goes_on(&[&source]);
    let image = guest.image.reopen().unwrap();
    let (leave, left) = std::sync::mpsc::channel::<()>();
    let thief = std::thread::spawn(move || {
        fcntl_lock(&image, FlockOperation::LockExclusive).unwrap();
        let _ = left.recv();
    });
    // Everything is there, and the source has let go, when the command fails.
    source.command("migrate \"exec:cat >/dev/null; sleep 1; exit 1\"");
    let state = source.wait_migration("failed");
    let waits = "; then the guest could not be resumed: Disk 'd0': Failed to ";
    assert!(state.contains(waits), "{state}");
    assert!(
        state.contains("; it stays paused here, and `cont` tries again"),
        "{state}"
    );
    source.wait_status("paused");
    let refused = source.command("cont");
    assert!(refused.contains("Disk 'd0': Failed to "), "{refused}");
    drop(leave);
    thief.join().unwrap();
    source.quiet("cont");
    source.wait_status("running");
    goes_on(&[&source]);
}

/// What the monitor says of disks is what QEMU says, but for the digits of nodes' names.
fn shown_as_by(program: Program) {
    if !have(&[program, Hmpsh]) {
        return;
    }
    let guest = DiskGuest::new();
    let odd = tempfile::NamedTempFile::new().unwrap();
    odd.as_file().set_len(1000).unwrap();
    let used = drive("d1", odd.path(), ",readonly=on");
    let unused = drive("d2", odd.path(), "");
    let setup = |program| {
        let args = [
            "-drive",
            &used,
            "-device",
            "virtio-blk-device,drive=d1,id=x",
        ];
        guest.setup(program).args(&args).args(&["-drive", &unused])
    };
    let answers = |program| {
        let mut vm = setup(program).args(&["-S"]).start();
        let answers = [
            "info block",
            "info block -v",
            "info block -n",
            "info block d1",
            "info block -v d2",
            "info block foo",
            "info block -n d1",
            "info blockstats",
        ]
        .map(|line| vm.command(line));
        answers.map(|text| without_node_digits(&text))
    };
    assert_eq!(answers(Hmpsh), answers(program));
}

#[test]
fn what_the_guest_does_is_counted() {
    if !have(&[Hmpsh]) {
        return;
    }
    let guest = DiskGuest::new();
    let mut vm = guest.setup(Hmpsh).start();
    goes_on(&[&vm]);
    vm.quiet("stop");
    let mut number = |name| vm.blockstats(name);
    // Two sectors a round, one operation each way.
    assert_eq!(number("wr_bytes"), number("wr_operations") * 1024);
    assert_eq!(number("rd_bytes"), number("rd_operations") * 1024);
    assert!(number("wr_operations") >= 70 && number("flush_operations") >= 3);
    assert!(number("rd_total_time_ns") > 0 && number("idle_time_ns") > 0);
}

/// The built-in guest on a disk of its own.
struct Checked {
    image: NamedTempFile,
    append: &'static str,
}

impl Checked {
    /// With `append`, on so many bytes of zeros.
    fn new(append: &'static str, len: u64) -> Self {
        let image = NamedTempFile::new().unwrap();
        image.as_file().set_len(len).unwrap();
        Self { image, append }
    }

    fn setup(&self, program: Program, more: &str) -> Setup {
        let setup = Setup::new(program).append("window=1M").append(self.append);
        on_drive(setup, &drive("d0", self.image.path(), more))
    }
}

/// It goes on at the last of `hosts`, for so many requests.
#[track_caller]
fn answers(hosts: &[&Vmm], requests: u64) {
    let logs: Vec<PathBuf> = hosts.iter().map(|host| host.log()).collect();
    let logs: Vec<_> = logs.iter().map(PathBuf::as_path).collect();
    wait_requests(&logs, requests);
}

/// Requests of more than one pass of `disk=1`: 32 times 4 reads and writes.
const PASS: u64 = 300;

/// The built-in guest reads back what it wrote, and notices what it did not write.
fn notices_a_changed_sector(program: Program) {
    if !have(&[program]) {
        return;
    }
    let guest = Checked::new("disk=1", 1 << 20);
    let vm = guest.setup(program, "").start();
    answers(&[&vm], PASS);
    let image = std::fs::read(guest.image.path()).unwrap();
    let (used, rest) = image.split_at(512 << 10);
    for (number, sector) in used.chunks(512).enumerate() {
        assert_eq!(sector[..3], number.to_le_bytes()[..3]);
        assert_eq!(sector[..16], sector[512 - 16..]);
    }
    assert!(rest.iter().all(|byte| *byte == 0));
    // Again and again: it may be about to rewrite what it has just read.
    let change = || {
        let bytes = [0x55; 16];
        let at = 100 * 512 + 496;
        guest.image.as_file().write_all_at(&bytes, at).unwrap();
        fault(&vm.log())
    };
    let found = poll(PATIENCE, change).expect("it is noticed");
    assert!(found.starts_with("FAULT sector 100 offset 496 "), "{found}");
    assert!(found.ends_with(" found 5555555555555555 5555555555555555"));
}

/// The built-in guest's disk moves from host to host with its requests.
fn moves_checked(append: &'static str, programs: &[Program]) {
    if !have(programs) {
        return;
    }
    let guest = Checked::new(append, 1 << 20);
    let mut hosts = vec![guest.setup(programs[0], "").start()];
    answers(&[&hosts[0]], PASS);
    for program in &programs[1..] {
        let next = moved(hosts.last_mut().unwrap(), guest.setup(*program, ""));
        hosts.push(next);
        answers(&hosts.iter().collect::<Vec<_>>(), PASS);
    }
}

#[test]
fn a_disk_that_can_not_be_checked_is_a_fault() {
    if !have(&[Hmpsh]) {
        return;
    }
    let none = Setup::new(Hmpsh).append("disk=1").start();
    let small = Checked::new("disk=1", 1000);
    let small = small.setup(Hmpsh, "").start();
    let read_only = Checked::new("disk=1 depth=1", 1 << 20);
    let read_only = read_only.setup(Hmpsh, ",readonly=on").start();
    assert_eq!(wait_fault(&none.log()), "FAULT disk not found");
    assert_eq!(wait_fault(&small.log()), "FAULT disk too small");
    let refused = wait_fault(&read_only.log());
    assert_eq!(refused, "FAULT disk status 1 sector 0");
}

#[test]
fn the_map_has_all_slots() {
    if !have(&[Hmpsh]) {
        return;
    }
    let map = Setup::new(Hmpsh).start().command("info mtree");
    for slot in 0..8 {
        let (start, end) = (0xfeb0_0000u64 + slot * 512, 0xfeb0_01ff + slot * 512);
        let line = format!("{start:016x}-{end:016x} (prio 0, i/o): virtio-mmio");
        assert!(map.contains(&line), "{map}");
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
    lives_at_hmpsh: lives(Hmpsh, plain, "disk");
    lives_at_7_2: lives(Qemu7, plain, "disk");
    lives_at_10_0: lives(Qemu10, plain, "disk");
    lives_at_hmpsh_modern: lives(Hmpsh, modern, "modern disk");
    read_only_at_hmpsh: takes_no_writes(Hmpsh);
    read_only_at_7_2: takes_no_writes(Qemu7);
    live_between_two_hmpsh: moves(&[Hmpsh, Hmpsh, Hmpsh], plain);
    live_to_7_2_and_back: moves(&[Hmpsh, Qemu7, Hmpsh], plain);
    live_to_10_0_and_back: moves(&[Hmpsh, Qemu10, Hmpsh], plain);
    live_from_7_2_and_back: moves(&[Qemu7, Hmpsh, Qemu7], plain);
    live_from_10_0_and_back: moves(&[Qemu10, Hmpsh, Qemu10], plain);
    live_modern_from_hmpsh: moves(&[Hmpsh, Hmpsh, Qemu10], modern);
    live_modern_from_10_0_and_7_2: moves(&[Qemu10, Hmpsh, Qemu7, Hmpsh], modern);
    legacy_is_not_modern: meets_the_other_interface(Hmpsh, plain, modern, "without");
    modern_of_7_2_is_not_legacy: meets_the_other_interface(Qemu7, modern, plain, "with");
    live_to_7_2_and_back_split: moves(&[Hmpsh, Qemu7, Hmpsh], split_with_pic);
    saved_and_loaded_by_10_0: saved(Hmpsh, Qemu10);
    saved_by_7_2: saved(Qemu7, Hmpsh);
    saved_by_10_0: saved(Qemu10, Hmpsh);
    three_disks_to_7_2: three_disks(Hmpsh, Qemu7);
    three_disks_from_10_0: three_disks(Qemu10, Hmpsh);
    a_failed_migration: stays(Hmpsh);
    shown_as_by_7_2: shown_as_by(Qemu7);
    shown_as_by_10_0: shown_as_by(Qemu10);
    locked_by_hmpsh: locks(Hmpsh, Hmpsh);
    locked_by_hmpsh_against_7_2: locks(Hmpsh, Qemu7);
    locked_by_7_2: locks(Qemu7, Hmpsh);
    locked_by_10_0: locks(Qemu10, Hmpsh);
    requests_kept_by_7_2: kept_by(Qemu7, &[Hmpsh]);
    requests_kept_by_7_2_go_on_to_7_2: kept_by(Qemu7, &[Hmpsh, Qemu7]);
    requests_kept_by_10_0_go_on_to_10_0: kept_by(Qemu10, &[Hmpsh, Hmpsh, Qemu10]);
    a_full_host_stops_the_guest: full(None);
    a_full_host_stops_the_guest_at_7_2_too: full(Some(Qemu7));
    a_full_host_stops_the_guest_at_10_0_too: full(Some(Qemu10));
    builtin_at_hmpsh: notices_a_changed_sector(Hmpsh);
    builtin_at_7_2: notices_a_changed_sector(Qemu7);
    builtin_at_10_0: notices_a_changed_sector(Qemu10);
    builtin_between_two_hmpsh: moves_checked("disk=1 depth=16 request=1K", &[Hmpsh, Hmpsh]);
    builtin_to_7_2_and_back: moves_checked("disk=1", &[Hmpsh, Qemu7, Hmpsh]);
    builtin_to_10_0_and_back: moves_checked("disk=1", &[Hmpsh, Qemu10, Hmpsh]);
    builtin_reading_to_7_2: moves_checked("disk=read depth=8", &[Hmpsh, Qemu7]);
}
