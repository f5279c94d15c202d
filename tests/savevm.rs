//! `savevm`, `loadvm`, `delvm`: a guest that lives on its disk goes back in time, with the disk.

mod common;

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::disk::{DiskGuest, goes_on};
use common::hmp::{Hmp, PATIENCE};
use common::need::{Need, require, tool};
use common::poll;
use common::vmm::Program::{Hmpsh, Qemu7, Qemu10};
use common::vmm::{Program, Setup, Vmm, have};
use hmpsh::cli::Request;
use hmpsh::control::{Control, Error, MigrateOptions, Shared};
use hmpsh::poll::Poll;

/// A guest with two qcow2 disks, of which it lives on the first.
struct Place {
    guest: DiskGuest,
    directory: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        let place = Self {
            guest: DiskGuest::new(),
            directory: tempfile::tempdir().unwrap(),
        };
        for name in ["used", "spare"] {
            place.img(&["create", "-q", "-f", "qcow2"], &[name, "2M"]);
        }
        place
    }

    fn path(&self, name: &str) -> String {
        self.directory.path().join(name).display().to_string()
    }

    /// Runs `qemu-img` in the directory.
    #[track_caller]
    fn img(&self, args: &[&str], more: &[&str]) -> String {
        let mut command = std::process::Command::new(tool("qemu-img"));
        let output = command.args(args).args(more).current_dir(&self.directory);
        let output = output.output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{args:?}: {said}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    fn setup(&self, program: Program) -> Setup {
        let drive = |id: &str, name: &str| {
            let file = self.path(name);
            format!("if=none,id={id},file={file},format=qcow2")
        };
        self.guest
            .setup_on(program, &drive("d0", "used"))
            .args(&["-drive", &drive("d1", "spare")])
            .args(&["-device", "virtio-blk-device,drive=d1"])
    }

    /// The program without its mouths, and the built-in guest.
    fn control(&self) -> Shared {
        let drive = |id: &str, name: &str| {
            let file = self.path(name);
            format!("if=none,id={id},file={file},format=qcow2")
        };
        let (used, spare) = (drive("d0", "used"), drive("d1", "spare"));
        let serial = format!("file:{}", self.path("serial"));
        let args = "-M microvm,accel=kvm -m 16 -append disk=1 -display none -device \
                    virtio-blk-device,drive=d0";
        let mut args: Vec<_> = args.split_whitespace().collect();
        args.extend(["-serial", &serial, "-drive", &used, "-drive", &spare]);
        let Request::Run(config) = hmpsh::cli::parse(args.iter().map(Into::into)).unwrap() else {
            panic!("{args:?}");
        };
        let poll = Poll::new().unwrap();
        let open = |config| hmpsh::chardev::open(config, &poll, &|| false).unwrap();
        let chardevs = config.chardevs.iter().map(open).collect();
        Control::new(*config, poll.clone(), chardevs, Default::default()).unwrap()
    }

    #[track_caller]
    fn is_clean(&self) {
        for name in ["used", "spare"] {
            let text = self.img(&["check"], &[name]);
            assert!(text.contains("No errors were found"), "{text}");
        }
    }
}

/// The number of the guest's last beacon.
fn beacon(vm: &Vmm) -> u64 {
    let log = std::fs::read_to_string(vm.log()).unwrap_or_default();
    assert!(!log.contains("FAULT"), "{log}");
    let whole = &log[..log.rfind('\n').unwrap_or(0)];
    // Where it went back in the middle of a line that line is of two.
    let number = |line: &str| line.strip_prefix("B ")?.parse().ok();
    whole.lines().rev().find_map(number).unwrap_or(0)
}

#[track_caller]
fn wait_beacon(vm: &Vmm, is: impl Fn(u64) -> bool) {
    let found = poll(PATIENCE, || is(beacon(vm)).then_some(()));
    assert!(found.is_some(), "the beacon stays {}", beacon(vm));
}

/// Back in time twice, from a running guest and from one at rest.
#[test]
fn a_guest_goes_back_with_its_disks() {
    if !have(&[Hmpsh]) || !require(&[Need::QemuImg]) {
        return;
    }
    let place = Place::new();
    let mut vm = place.setup(Hmpsh).start();
    goes_on(&[&vm]);
    assert_eq!(
        vm.command("info snapshots"),
        "There is no snapshot available.\n"
    );
    vm.quiet("savevm one");
    let then = beacon(&vm);
    wait_beacon(&vm, |now| now > then + 100);
    let text = vm.command("info snapshots");
    assert!(
        text.starts_with("List of snapshots present on all disks:\nID        TAG   ")
            && text.contains("\n--        one              "),
        "{text}"
    );
    vm.quiet("loadvm one");
    wait_beacon(&vm, |now| now < then + 100);
    wait_beacon(&vm, |now| now > then + 150);
    vm.wait_status("running");
    // Again of that name: the older one goes.
    vm.quiet("stop");
    vm.quiet("savevm one");
    vm.quiet("savevm two");
    let then = beacon(&vm);
    vm.quiet("cont");
    wait_beacon(&vm, |now| now > then + 100);
    vm.quiet("stop");
    vm.quiet("loadvm one");
    vm.wait_status("paused");
    vm.quiet("cont");
    wait_beacon(&vm, |now| now < then + 100);
    wait_beacon(&vm, |now| now > then + 100);
    assert_eq!(vm.command("info snapshots").matches("one").count(), 1);
    vm.quiet("delvm two");
    assert_eq!(
        vm.command("delvm two"),
        "Error: Snapshot 'two' does not exist\n"
    );
    assert_eq!(
        vm.command("loadvm two"),
        "Error: Snapshot 'two' does not exist in one or more devices\n"
    );
    vm.quit();
    place.is_clean();
    let listed = place.img(&["snapshot", "-l"], &["used"]);
    assert!(
        listed.contains(" one ") && !listed.contains(" two "),
        "{listed}"
    );
}

/// What QEMU makes of ours.
fn taken_for_one_of_disks(program: Program) {
    if !have(&[Hmpsh, program]) || !require(&[Need::QemuImg]) {
        return;
    }
    let place = Place::new();
    let mut vm = place.setup(Hmpsh).start();
    goes_on(&[&vm]);
    vm.quiet("savevm one");
    vm.quit();
    let mut vm = place.setup(program).args(&["-S"]).start();
    let said = vm.command("loadvm one");
    assert!(said.contains("This is a disk-only snapshot"), "{said}");
    assert!(vm.command("info snapshots").contains(" one "));
    vm.quit();
    let mut vm = place.setup(Hmpsh).args(&["-S"]).start();
    let then = vm.command("info snapshots");
    vm.wait_status("paused (prelaunch)");
    vm.quiet("loadvm one");
    vm.wait_status("paused");
    vm.quiet("cont");
    wait_beacon(&vm, |now| now > 70);
    assert_eq!(vm.command("info snapshots"), then);
}

/// A QEMU's own snapshot is loaded here.
fn taken_by(program: Program) {
    if !have(&[Hmpsh, program]) || !require(&[Need::QemuImg]) {
        return;
    }
    let place = Place::new();
    let mut source = place.setup(program).start();
    goes_on(&[&source]);
    source.command("savevm theirs");
    source.quiet("stop");
    let listed = source.command("info snapshots");
    let last = beacon(&source);
    source.quit();
    let mut vm = place.setup(Hmpsh).args(&["-S"]).start();
    // 10.0 has other columns.
    if program == Qemu7 {
        assert_eq!(vm.command("info snapshots"), listed);
    }
    vm.quiet("loadvm theirs");
    vm.quiet("cont");
    wait_beacon(&vm, |now| now > last + 70);
    vm.quiet("delvm theirs");
    vm.quit();
    place.is_clean();
}

/// What goes wrong leaves the guest as it is, and the snapshots that were there.
#[test]
fn a_snapshot_that_can_not_be_had_changes_nothing() {
    if !have(&[Hmpsh]) || !require(&[Need::QemuImg]) {
        return;
    }
    let place = Place::new();
    let mut vm = place.setup(Hmpsh).start();
    goes_on(&[&vm]);
    vm.quiet("savevm one");
    vm.quiet("stop");
    // The state is not what was saved.
    let path = place.path("used");
    let good = std::fs::read(&path).unwrap();
    let mark = b"hmpsh guest";
    let mut bad = good.clone();
    let found = bad.windows(mark.len()).rposition(|bytes| bytes == mark);
    bad[found.unwrap()] ^= 1;
    std::fs::write(&path, &bad).unwrap();
    let said = vm.command("loadvm one");
    assert!(
        said.contains("The VM state is not what was saved"),
        "{said}"
    );
    std::fs::write(&path, &good).unwrap();
    vm.quiet("cont");
    goes_on(&[&vm]);
    vm.quiet("loadvm one");
    wait_beacon(&vm, |now| now > 140);

    // One disk has not got it.
    vm.quit();
    place.img(&["snapshot", "-d", "one"], &["spare"]);
    let mut vm = place.setup(Hmpsh).start();
    goes_on(&[&vm]);
    let said = vm.command("loadvm one");
    assert_eq!(
        said,
        "Error: Snapshot 'one' does not exist in one or more devices\n"
    );
    let listed = vm.command("info snapshots");
    assert!(
        listed.contains("disks:\nNone\n\nList of partial (non-loadable) snapshots on 'd0':\n"),
        "{listed}"
    );
    goes_on(&[&vm]);
    let raw = place.directory.path().join("raw");
    std::fs::write(&raw, [0; 512]).unwrap();
    let option = format!("if=none,id=x,file={},format=raw", raw.display());
    vm.command(&format!("drive_add 0 {option}"));
    for line in ["savevm", "savevm foo", "loadvm foo", "delvm foo"] {
        assert_eq!(
            vm.command(line),
            "Error: Device 'x' is writable but does not support snapshots\n",
            "{line}"
        );
    }
    goes_on(&[&vm]);
}

/// A full disk at any time while the snapshot is written.
#[test]
fn a_full_host_leaves_what_was_there() {
    if !have(&[Hmpsh]) || !require(&[Need::QemuImg, Need::Root]) {
        return;
    }
    let place = Place::new();
    let small = common::small::SmallDisk::new("size=16m");
    let used = small.path().join("used");
    place.img(
        &["create", "-q", "-f", "qcow2"],
        &[&used.display().to_string(), "2M"],
    );
    let option = format!("if=none,id=d0,file={},format=qcow2", used.display());
    let mut vm = place.guest.setup_on(Hmpsh, &option).start();
    goes_on(&[&vm]);
    vm.quiet("savevm one");
    let stuffing = small.path().join("stuffing");
    for kib in [0, 100, 400] {
        fill(&stuffing, kib);
        let said = vm.command("savevm two");
        assert!(said.contains("No space left on device"), "{kib}: {said}");
        std::fs::remove_file(&stuffing).unwrap();
        vm.wait_status("running");
        goes_on(&[&vm]);
    }
    let listed = vm.command("info snapshots");
    assert!(
        listed.contains(" one ") && !listed.contains(" two "),
        "{listed}"
    );
    vm.quiet("savevm two");
    vm.quiet("loadvm one");
    wait_beacon(&vm, |now| now > 140);
    vm.quit();
    let text = place.img(&["check"], &[&used.display().to_string()]);
    assert!(text.contains("No errors were found"), "{text}");
}

/// The second disk can not be made what it was: then the first one is what it is, too.
#[test]
fn all_disks_go_back_or_none() {
    if !have(&[Hmpsh]) || !require(&[Need::QemuImg, Need::Root]) {
        return;
    }
    let place = Place::new();
    let small = common::small::SmallDisk::new("size=1m");
    let spare = small.path().join("spare");
    std::fs::rename(place.path("spare"), &spare).unwrap_or_else(|_| {
        std::fs::copy(place.path("spare"), &spare).unwrap();
        std::fs::remove_file(place.path("spare")).unwrap();
    });
    std::os::unix::fs::symlink(&spare, place.path("spare")).unwrap();
    let mut vm = place.setup(Hmpsh).start();
    goes_on(&[&vm]);
    vm.quiet("savevm one");
    let then = beacon(&vm);
    wait_beacon(&vm, |now| now > then + 70);
    let stuffing = small.path().join("stuffing");
    let mut refused = 0;
    // What the present takes, then what going back takes.
    for kib in (0..=512).step_by(32) {
        fill(&stuffing, kib);
        let before = beacon(&vm);
        let said = vm.command("loadvm one");
        std::fs::remove_file(&stuffing).unwrap();
        if said.is_empty() {
            break;
        }
        refused += 1;
        assert!(
            said.contains("Device 'd1': ") && said.contains("No space left"),
            "{said}"
        );
        vm.wait_status("running");
        wait_beacon(&vm, |now| now > before + 20);
        assert!(!vm.command("info snapshots").contains("before-loadvm"));
    }
    assert!(refused > 1, "{refused}");
    wait_beacon(&vm, |now| now < then + 70);
    wait_beacon(&vm, |now| now > then + 100);
    assert!(!vm.command("info snapshots").contains("before-loadvm"));
    vm.quit();
    place.is_clean();
}

/// Drives that were taken out, added or limited since then are still so.
#[test]
fn drives_stay_as_they_are() {
    if !have(&[Hmpsh]) || !require(&[Need::QemuImg]) {
        return;
    }
    let place = Place::new();
    for name in ["x", "y", "other"] {
        place.img(&["create", "-q", "-f", "qcow2"], &[name, "1M"]);
    }
    let option = |id: &str, name: &str| {
        let file = place.path(name);
        format!("if=none,id={id},file={file},format=qcow2")
    };
    let setup = place.setup(Hmpsh);
    let setup = setup.args(&["-drive", &option("x", "x"), "-drive", &option("y", "y")]);
    let mut vm = setup.start();
    goes_on(&[&vm]);
    for line in ["drive_del x", "drive_del y", "drive_del d1"] {
        vm.quiet(line);
    }
    std::fs::remove_file(place.path("x")).unwrap();
    let added = vm.command(&format!("drive_add 0 {}", option("y", "other")));
    assert_eq!(added, "OK\n");
    vm.quiet("block_set_io_throttle d0 0 0 0 0 0 9000");
    vm.quiet("savevm one");
    let before = vm.command("info block");
    let then = beacon(&vm);
    wait_beacon(&vm, |now| now > then + 70);
    vm.quiet("loadvm one");
    wait_beacon(&vm, |now| now < then + 70);
    wait_beacon(&vm, |now| now > then + 70);
    assert_eq!(vm.command("info block"), before);
    assert!(before.contains("iops_wr=9000") && before.contains("other") && !before.contains("x: "));
    // A disk without its image keeps the guest neither from leaving nor from being quit.
    let there = vm.path("state");
    vm.quiet(&format!("migrate file:{}", there.display()));
    vm.wait_migration("completed");
    vm.quit();
    place.is_clean();
    for (name, count) in [("y", 0), ("other", 1)] {
        let listed = place.img(&["snapshot", "-l"], &[name]);
        assert_eq!(listed.matches(" one ").count(), count, "{name}: {listed}");
    }
}

/// Whatever another monitor asks for meanwhile, each is told what it can have and the guest is whole.
#[test]
fn two_monitors_do_not_meet() {
    if !require(&[Need::Kvm, Need::QemuImg]) {
        return;
    }
    let place = Place::new();
    let control = place.control();
    control.launch().unwrap();
    control.save_snapshot(Some("a")).unwrap();
    let is_over = AtomicBool::new(false);
    let (mut refused, mut done) = (0, 0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let answers = (0..20).flat_map(|_| {
                let saved = control.save_snapshot(Some("a"));
                [saved, control.load_snapshot("a")]
            });
            done = answers.filter(Result::is_ok).count();
            is_over.store(true, Ordering::SeqCst);
        });
        let leave = MigrateOptions {
            uri: "exec:exit 1".to_owned(),
            ..MigrateOptions::default()
        };
        while !is_over.load(Ordering::SeqCst) {
            let answers = [
                control.stop(),
                control.snapshots().map(drop),
                control.cont(false),
                control.resize_drive("d1", 3 << 20),
                control.migrate(&leave, &mut Default::default()),
                control.snapshots().map(drop),
            ];
            let errors = answers.iter().filter_map(|answer| answer.as_ref().err());
            let is_meeting = |text: &String| text.contains("A snapshot is being taken or loaded");
            refused += errors.filter(|error| is_meeting(&error.0)).count();
            // The other one has its turns too.
            std::thread::sleep(Duration::from_millis(5));
        }
    });
    assert!(refused > 0 && done > 0, "{refused} refused, {done} done");
    let ended = poll(PATIENCE, || {
        (!control.migration().status.is_running()).then_some(())
    });
    assert!(ended.is_some());
    control.cont(false).unwrap();
    assert_eq!(control.run_state().name(), "running");
    let said = || std::fs::read_to_string(place.path("serial")).unwrap();
    let before = said().len();
    let goes_on = poll(PATIENCE, || (said().len() > before + 200).then_some(()));
    assert!(goes_on.is_some() && !said().contains("FAULT"), "{}", said());
    let names = control.snapshots().unwrap();
    assert_eq!((names.whole.len(), names.partial.len()), (1, 0));
    control.shut_down();
    place.is_clean();
}

/// The program ends at any time while one is taken or loaded.
#[test]
fn none_is_left_in_part() {
    if !require(&[Need::Kvm, Need::QemuImg]) {
        return;
    }
    let place = Place::new();
    let mut given_up = 0;
    for millis in [0, 1, 2, 3, 5, 8, 13, 21, 34, 55] {
        let control = place.control();
        control.launch().unwrap();
        let first = control.save_snapshot(Some("first"));
        first.unwrap();
        std::thread::scope(|scope| {
            let answers = scope.spawn(|| {
                let work = || [control.load_snapshot("first"), control.save_snapshot(None)];
                let answers = work().into_iter().chain(work()).chain(work());
                answers.filter_map(Result::err).collect::<Vec<_>>()
            });
            std::thread::sleep(Duration::from_millis(millis));
            control.quit();
            control.shut_down();
            let errors = answers.join().unwrap();
            let is_end = |error: &Error| error.0.ends_with("The program is about to end");
            assert!(errors.iter().all(is_end), "{errors:?}");
            given_up += usize::from(!errors.is_empty());
        });
        drop(control);
        place.is_clean();
        let names = |name| {
            let listed = place.img(&["snapshot", "-l"], &[name]);
            let tags = listed
                .lines()
                .filter_map(|line| line.split_whitespace().nth(1));
            tags.map(str::to_owned).collect::<Vec<_>>()
        };
        assert_eq!(names("used"), names("spare"));
        assert!(!names("used").contains(&"before-loadvm".to_owned()));
    }
    assert!(given_up > 0);
}

/// A daemon goes to `/`, and its files stay where they are.
#[test]
fn a_daemon_finds_what_it_was_started_with() {
    if !have(&[Hmpsh]) || !require(&[Need::QemuImg]) {
        return;
    }
    let place = Place::new();
    place.img(
        &["create", "-q", "-f", "qcow2", "-b", "spare", "-F", "qcow2"],
        &["top"],
    );
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_hmpsh"));
    command.args(["-daemonize", "-pidfile", "pid", "-m", "16", "-bios", "bios"]);
    // A guest that halts.
    std::fs::write(place.path("bios"), [0xf4; 64 << 10]).unwrap();
    command.args(["-monitor", "unix:monitor,server=on,wait=off"]);
    for (id, option) in [("d0", "used"), ("d1", "./top,cache=none")] {
        let drive = format!("if=none,id={id},file={option},format=qcow2");
        let device = format!("virtio-blk-device,drive={id}");
        command.args(["-drive", &drive, "-device", &device]);
    }
    let started = command.current_dir(&place.directory).status().unwrap();
    assert!(started.success());
    let pid = std::fs::read_to_string(place.path("pid")).unwrap();
    let process = Path::new("/proc").join(pid.trim());
    let mut monitor = Hmp::connect(Path::new(&place.path("monitor"))).unwrap();
    let said = [
        "savevm one",
        "block_resize d0 4M",
        "loadvm one",
        "savevm two",
        "delvm one",
        "commit d1",
        "info status",
    ]
    .map(|line| monitor.command(line));
    let shown = monitor.command("info block");
    monitor.send("quit");
    let ended = poll(PATIENCE, || (!process.exists()).then_some(()));
    assert!(ended.is_some(), "{} is still there", process.display());
    assert_eq!(said, ["", "", "", "", "", "", "VM status: running\n"]);
    assert!(
        shown.contains(": used (qcow2)") && shown.contains(": ./top (qcow2)"),
        "{shown}"
    );
    place.is_clean();
}

/// Takes all room of a file system but so many KiB.
fn fill(path: &Path, but: u64) {
    use std::io::Write;
    let mut file = std::fs::File::create(path).unwrap();
    let mut len = 0;
    while file.write_all(&[1; 4096]).is_ok() {
        len += 4096;
    }
    file.set_len(u64::saturating_sub(len, but << 10)).unwrap();
}

#[test]
fn taken_for_one_of_disks_by_7_2() {
    taken_for_one_of_disks(Qemu7);
}

#[test]
fn taken_for_one_of_disks_by_10_0() {
    taken_for_one_of_disks(Qemu10);
}

#[test]
fn taken_by_7_2() {
    taken_by(Qemu7);
}

#[test]
fn taken_by_10_0() {
    taken_by(Qemu10);
}
