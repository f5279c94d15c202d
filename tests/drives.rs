//! Drives while the machine is there: the answers are QEMU 7.2's, and the guest finds what was said.

mod common;

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use common::disk::{DiskGuest, drive, goes_on};
use common::hmp::PATIENCE;
use common::need::{Need, require, tool};
use common::vmm::Program::{Hmpsh, Qemu7};
use common::vmm::{Vmm, have};
use common::{poll, without_node_digits};

fn create(directory: &Path, name: &str, args: &[&str]) -> String {
    let path = directory.join(name).display().to_string();
    let mut all = vec!["create", "-q", "-f"];
    all.extend(&args[..args.len() - 1]);
    all.push(&path);
    if !args[args.len() - 1].is_empty() {
        all.push(args[args.len() - 1]);
    }
    let made = Command::new(tool("qemu-img")).args(&all).status().unwrap();
    assert!(made.success(), "{all:?}");
    path
}

/// What QEMU says to these lines, one after the other, is said here.
#[test]
fn answers_are_those_of_7_2() {
    if !have(&[Hmpsh, Qemu7]) || !require(&[Need::QemuImg]) {
        return;
    }
    let guest = DiskGuest::new();
    let answers = |program| -> Vec<String> {
        let place = tempfile::tempdir().unwrap();
        let at = place.path();
        let raw = create(at, "r.raw", &["raw", "8M"]);
        let alone = create(at, "a.qcow2", &["qcow2", "8M"]);
        let base = create(at, "base.raw", &["raw", "4M"]);
        let top = create(at, "o.qcow2", &["qcow2", "-b", "base.raw", "-F", "raw", ""]);
        let none = at.join("none").display().to_string();
        let mut setup = guest.setup_on(program, &drive("d0", Path::new(&raw), ""));
        for (id, file) in [("d1", &alone), ("d2", &top)] {
            let option = format!("if=none,id={id},file={file},format=qcow2");
            let device = format!("virtio-blk-device,drive={id},id=x{id}");
            setup = setup.args(&["-drive", &option, "-device", &device]);
        }
        let mut vm = setup.args(&["-S"]).start();
        let lines = [
            "info block -v".to_owned(),
            "info block -n -v".to_owned(),
            "block_resize foo 10".to_owned(),
            "block_resize d0 10".to_owned(),
            "block_resize d0 1000k".to_owned(),
            "block_resize d1 12M".to_owned(),
            "block_resize d2 20M".to_owned(),
            "info block -v d0".to_owned(),
            "block_set_io_throttle foo 1 2 3 4 5 6".to_owned(),
            "block_set_io_throttle d0 1000000 2 0 0 0 0".to_owned(),
            "block_set_io_throttle d0 1000000 0 0 100 0 0".to_owned(),
            "block_set_io_throttle xd1 0 1 2 0 3 4".to_owned(),
            "info block".to_owned(),
            "block_set_io_throttle d0 0 0 0 0 0 0".to_owned(),
            "info block d0".to_owned(),
            "commit foo".to_owned(),
            "commit d0".to_owned(),
            "commit d1".to_owned(),
            "commit d2".to_owned(),
            "commit all".to_owned(),
            "info block d2".to_owned(),
            format!("drive_add 0 if=none,file={raw},format=raw,id=x"),
            format!("drive_add 0 if=none,file={raw},format=raw,id=d0"),
            format!("drive_add 0 if=none,file={none},format=raw,id=y"),
            format!("drive_add 0 if=none,file={alone},format=raw,id=b,readonly=on"),
            format!("drive_add 0 if=virtio,file={base},format=raw,id=c"),
            "drive_add 0".to_owned(),
            "info block b".to_owned(),
            "drive_del b".to_owned(),
            "drive_del b".to_owned(),
            "drive_del d0".to_owned(),
            "info block".to_owned(),
            "info blockstats".to_owned(),
            "commit d0".to_owned(),
            "block_resize d0 3".to_owned(),
        ];
        let place = at.display().to_string();
        let answer = |line: &String| {
            let said = without_node_digits(&vm.command(line)).replace(&place, "HERE");
            format!("{line}\n{said}").replace(&place, "HERE")
        };
        lines.iter().map(answer).collect()
    };
    let (here, there) = (answers(Hmpsh), answers(Qemu7));
    for (here, there) in here.iter().zip(&there) {
        assert_eq!(here, there);
    }
}

/// Writes of the guest so far.
fn writes(vm: &mut Vmm) -> u64 {
    let text = vm.command("info blockstats");
    let mut words = text.split_whitespace();
    let value = words.find_map(|word| word.strip_prefix("wr_operations="));
    value.unwrap().parse().unwrap()
}

#[test]
fn a_limit_holds_and_a_stop_does_not_wait_for_it() {
    if !have(&[Hmpsh]) {
        return;
    }
    let guest = DiskGuest::new();
    let mut vm = guest.setup(Hmpsh).start();
    goes_on(&[&vm]);
    vm.quiet("block_set_io_throttle d0 0 0 0 0 0 20");
    let (before, since) = (writes(&mut vm), Instant::now());
    std::thread::sleep(Duration::from_millis(1500));
    let count = (writes(&mut vm) - before) as f64;
    // A tenth of a second's worth may come at once, and one is under way.
    let most = since.elapsed().as_secs_f64() * 20.0 + 4.0;
    assert!((10.0..most).contains(&count), "{count} of {most}");
    vm.quiet("block_set_io_throttle d0 1 0 0 0 0 0");
    std::thread::sleep(Duration::from_millis(100));
    let since = Instant::now();
    vm.quiet("stop");
    assert!(since.elapsed() < Duration::from_secs(2));
    vm.quiet("block_set_io_throttle d0 0 0 0 0 0 0");
    vm.quiet("cont");
    goes_on(&[&vm]);
}

/// Its image is not changed from a side that waits for the guest, or has given it away.
#[test]
fn only_where_the_guest_is_a_disk_becomes_longer() {
    if !have(&[Hmpsh]) {
        return;
    }
    let guest = DiskGuest::new();
    let mut source = guest.setup(Hmpsh).start();
    goes_on(&[&source]);
    let mut dest = guest.setup(Hmpsh).incoming("tcp:127.0.0.1:0").start();
    let refused = "Error: Failed to resize: the image belongs to whoever runs the guest\n";
    assert_eq!(dest.command("block_resize d0 512k"), refused);
    source.quiet("block_resize d0 2M");
    source.command(&format!("migrate tcp:127.0.0.1:{}", dest.port()));
    source.wait_migration("completed");
    dest.wait_status("running");
    assert_eq!(source.command("block_resize d0 512k"), refused);
    assert_eq!(guest.image.as_file().metadata().unwrap().len(), 2 << 20);
    let said = dest.command("info block -v d0");
    assert!(said.contains("virtual size: 2 MiB"), "{said}");
    goes_on(&[&source, &dest]);
}

#[test]
fn a_drive_that_is_deleted_fails_and_its_image_is_free() {
    if !have(&[Hmpsh]) {
        return;
    }
    let guest = DiskGuest::new();
    let mut vm = guest.setup(Hmpsh).start();
    goes_on(&[&vm]);
    vm.quiet("drive_del d0");
    let told = poll(PATIENCE, || {
        let log = std::fs::read_to_string(vm.log()).unwrap_or_default();
        log.ends_with("FAULT status\n").then_some(())
    });
    assert!(told.is_some(), "the disk is still there");
    let other = guest.setup(Hmpsh).start();
    goes_on(&[&other]);
}

/// While the guest writes, what it wrote goes behind its image.
#[test]
fn committed_while_the_guest_writes() {
    if !have(&[Hmpsh]) || !require(&[Need::QemuImg]) {
        return;
    }
    let (guest, place) = (DiskGuest::new(), tempfile::tempdir().unwrap());
    let base = create(place.path(), "base.raw", &["raw", "1M"]);
    let top = create(
        place.path(),
        "top.qcow2",
        &["qcow2", "-b", "base.raw", "-F", "raw", "2M"],
    );
    let option = format!("if=none,id=d0,file={top},format=qcow2");
    let mut vm = guest.setup_on(Hmpsh, &option).start();
    goes_on(&[&vm]);
    vm.quiet("commit d0");
    goes_on(&[&vm]);
    assert_eq!(std::fs::metadata(&base).unwrap().len(), 2 << 20);
    vm.quiet("stop");
    vm.quiet("commit all");
    let bytes = std::fs::read(&base).unwrap();
    assert!(bytes[..65536].iter().any(|byte| *byte != 0));
    vm.quiet("cont");
    goes_on(&[&vm]);
    // Somebody else has what is behind it.
    let holder = format!("if=none,id=d0,file={base},format=raw,readonly=on");
    let reader = guest.setup_on(Hmpsh, &holder).start();
    let said = vm.command("commit d0");
    assert!(
        said.starts_with("'commit' error for 'd0': Failed to get \"write\" lock"),
        "{said}"
    );
    goes_on(&[&vm]);
    drop(reader);
    vm.quiet("commit d0");
    goes_on(&[&vm]);
    vm.quit();
    let check = Command::new(tool("qemu-img"))
        .args(["check", &top])
        .output()
        .unwrap();
    assert!(check.status.success(), "{check:?}");
}
