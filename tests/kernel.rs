//! Kernels. PVH: one file of either ELF class boots alike on hmpsh and on stock QEMU, moves between
//! them while it runs, and starts afresh after a reset. Multiboot and bzImage: a kernel is told the
//! same of memory and processors as on stock QEMU. Files that are no kernel are refused.

mod common;

use std::path::{Path, PathBuf};
use std::time::Duration;

use common::beacon::Beacons;
use common::journey::moved;
use common::kernel::{Class, elf};
use common::need::{Need, require};
use common::poll;
use common::report;
use common::vmm::Program::{Hmpsh, Qemu7, Qemu10};
use common::vmm::{Program, Setup, Vmm};

/// What the kernel says before its first beacon.
const HEADER: &str = "kernel\nmemory 67108864\ncommand line root=none quiet\ncpu 1\n";

/// The kernel in a file of its own, and machines that boot it.
struct Kernel {
    file: PathBuf,
    _dir: tempfile::TempDir,
}

impl Kernel {
    fn new(class: Class) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("kernel");
        std::fs::write(&file, elf(class)).unwrap();
        Self { file, _dir: dir }
    }

    fn setup(&self, program: Program) -> Setup {
        Setup::new(program)
            .vcpus(2)
            .kernel(&self.file)
            .append("root=none quiet")
    }
}

/// What the kernel's hosts saw of it, in order: the header once, then one life.
fn life(hosts: &[&Vmm]) -> Result<Beacons, String> {
    let logs = hosts.iter().map(|host| std::fs::read(host.log()).unwrap());
    let log = logs.collect::<Vec<_>>().concat();
    let text = String::from_utf8_lossy(&log);
    match text.strip_prefix(HEADER) {
        Some(rest) => Beacons::parse(format!("hmpsh guest kernel\n{rest}").as_bytes()),
        None if HEADER.starts_with(&*text) => Ok(Beacons::default()),
        None => Err(format!("another header: {text}")),
    }
}

/// Waits for ten beacons from now on, during which the second vCPU's timer has ticked too.
#[track_caller]
fn lives(hosts: &[&Vmm]) {
    let now = || life(hosts).unwrap_or_else(|wrong| panic!("{wrong}"));
    let ticks = |beacons: &Beacons| beacons.ticks.first().map_or(0, |(_, ticks)| *ticks);
    let start = now();
    let living = poll(Duration::from_secs(20), || {
        let now = now();
        (now.last >= start.last + 10 && ticks(&now) >= ticks(&start) + 5).then_some(())
    });
    assert!(living.is_some(), "{start:?}, then {:?}", now());
}

fn boots(program: Program, class: Class) {
    if require(program.needs()) {
        lives(&[&Kernel::new(class).setup(program).start()]);
    }
}

#[test]
fn both_classes_boot() {
    boots(Hmpsh, Class::Elf64);
    boots(Hmpsh, Class::Elf32);
}

#[test]
fn the_same_on_7_2() {
    boots(Qemu7, Class::Elf64);
    boots(Qemu7, Class::Elf32);
}

#[test]
fn the_same_on_10_0() {
    boots(Qemu10, Class::Elf64);
    boots(Qemu10, Class::Elf32);
}

/// Moves the running kernel from hmpsh to `between` and back.
fn to_and_fro(between: Program, class: Class) {
    if !(require(Hmpsh.needs()) && require(between.needs())) {
        return;
    }
    let kernel = Kernel::new(class);
    let mut a = kernel.setup(Hmpsh).start();
    lives(&[&a]);
    let mut b = moved(&mut a, kernel.setup(between));
    lives(&[&a, &b]);
    let c = moved(&mut b, kernel.setup(Hmpsh));
    lives(&[&a, &b, &c]);
}

#[test]
fn moved_between_ourselves() {
    to_and_fro(Hmpsh, Class::Elf32);
}

#[test]
fn moved_to_7_2_and_back() {
    to_and_fro(Qemu7, Class::Elf64);
}

#[test]
fn moved_to_10_0_and_back() {
    to_and_fro(Qemu10, Class::Elf32);
}

/// Its memory is as at power on again, or it would find the pages of its first life.
#[test]
fn a_reset_starts_it_afresh() {
    if !require(Hmpsh.needs()) {
        return;
    }
    let mut vm = Kernel::new(Class::Elf64).setup(Hmpsh).start();
    lives(&[&vm]);
    let log = vm.log();
    for command in ["system_reset", "stop", "system_reset"] {
        vm.quiet(command);
    }
    vm.quiet("cont");
    let third = || {
        let text = std::fs::read_to_string(&log).unwrap();
        assert!(!text.contains("FAULT"), "{text}");
        let (_, life) = text.rsplit_once(HEADER)?;
        life.contains("B 5\n").then_some(())
    };
    assert!(poll(Duration::from_secs(20), third).is_some());
}

/// The destination got the kernel with its memory: a reset there boots its own file.
#[test]
fn a_reset_after_a_move_boots_the_destination_s_file() {
    if !require(Hmpsh.needs()) {
        return;
    }
    let (here, there) = (Kernel::new(Class::Elf64), Kernel::new(Class::Elf32));
    let mut a = here.setup(Hmpsh).start();
    lives(&[&a]);
    let mut b = moved(&mut a, there.setup(Hmpsh));
    lives(&[&a, &b]);
    b.quiet("system_reset");
    let log = b.log();
    let again = || {
        let text = std::fs::read_to_string(&log).unwrap();
        let (_, life) = text.rsplit_once(HEADER)?;
        life.contains("B 5\n").then_some(())
    };
    assert!(poll(Duration::from_secs(20), again).is_some());
}

/// Starts hmpsh with this file as its kernel, in vain; returns what it said.
#[track_caller]
fn refused(content: &[u8]) -> String {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("kernel");
    std::fs::write(&file, content).unwrap();
    let setup = Setup::new(Hmpsh).accel("none").kernel(&file);
    let (status, said) = setup.try_start().expect_err("it is no kernel");
    assert_eq!(status.code(), Some(1), "{said}");
    assert!(!said.contains("panicked"), "{said}");
    said
}

#[test]
fn files_that_are_no_kernel_are_refused() {
    let good = elf(Class::Elf64);
    let with = |at: usize, bytes: &[u8]| {
        let mut content = good.clone();
        content[at..at + bytes.len()].copy_from_slice(bytes);
        content
    };
    let mut bz_image = vec![0; 0x8000];
    bz_image[0x202..0x206].copy_from_slice(b"HdrS");
    let mut wide = good.clone();
    wide[0x808] = 0;
    for (at, word) in [(0x400, 0x1bad_b002_u32), (0x408, 0xe452_4ffe)] {
        wide[at..at + 4].copy_from_slice(&word.to_le_bytes());
    }
    let mut multiboot = report::multiboot();
    multiboot[26] = 0xff;
    for (content, words) in [
        (
            good[..good.len() - 1].to_vec(),
            "the file is truncated: a segment",
        ),
        (
            good[..100].to_vec(),
            "the file is truncated: the program headers",
        ),
        (with(18, &[183]), "not an ELF file for x86"),
        (with(0x808, &[0]), "without PVH ELF Note"),
        // Its segment's size, address.
        (with(64 + 40, &[0, 0, 0, 0, 1]), "is not inside guest RAM"),
        (
            with(64 + 24, &[0, 0, 0, 4]),
            "PVH entry 0x200000 is not inside",
        ),
        (bz_image, "invalid kernel header: it ends at 0x202"),
        (
            report::bz_image()[..0x7ff].to_vec(),
            "2048 bytes are promised, but the file has 2047",
        ),
        (wide, "Cannot load x86-64 image, give a 32bit one."),
        (multiboot, "invalid mh_load_addr address"),
        (b"#!/bin/sh\n".to_vec(), "invalid kernel header"),
        (Vec::new(), "invalid kernel header"),
    ] {
        let said = refused(&content);
        assert!(said.contains(words), "'{words}' is not in: {said}");
    }
}

/// What the reporting kernel says on that program, with two modules if `initrd` names two.
#[track_caller]
fn reported(program: Program, memory_mib: u64, kernel: &Path, initrd: &str) -> String {
    let vm = Setup::new(program)
        .vcpus(2)
        .memory_mib(memory_mib)
        .kernel(kernel)
        .append("root=none quiet")
        .args(&["-initrd", initrd])
        .start();
    let log = vm.log();
    let text = || std::fs::read_to_string(&log).unwrap();
    let ended = poll(Duration::from_secs(20), || {
        text().ends_with("end\n").then_some(())
    });
    assert!(ended.is_some(), "{}", text());
    text()
}

/// Lines of a report that begin with one of `words`.
fn lines<'a>(report: &'a str, words: &[&str]) -> Vec<&'a str> {
    let wanted = |line: &&str| words.iter().any(|word| line.starts_with(word));
    report.lines().filter(wanted).collect()
}

/// A directory with both forms of the reporting kernel and two files for it.
fn reporting() -> (tempfile::TempDir, [String; 4]) {
    let dir = tempfile::tempdir().unwrap();
    let files = ["multiboot", "bzimage", "one", "two"].map(|name| dir.path().join(name));
    for (file, content) in files.iter().zip([
        report::multiboot(),
        report::bz_image(),
        b"first".to_vec(),
        vec![b'x'; 50],
    ]) {
        std::fs::write(file, content).unwrap();
    }
    let names = files.map(|file| file.display().to_string());
    (dir, names)
}

/// A report without the features of its two processors, which must be what they say themselves:
/// there are KVMs that show a guest more than they were told, and only firmware asks the guest.
#[track_caller]
fn alike(report: &str) -> String {
    let cpuid = lines(report, &["cpuid "])[0].split_whitespace();
    let own: Vec<u32> = cpuid
        .skip(1)
        .map(|word| u32::from_str_radix(word, 16).unwrap())
        .collect();
    let mut text = report.to_owned();
    for processor in 0..2 {
        let at = text.find("mp ").unwrap() + 3 + 2 * (16 + 44 + 20 * processor + 4);
        let [signature, features] = [at, at + 8].map(|at| {
            let word = u32::from_str_radix(&text[at..at + 8], 16).unwrap();
            word.swap_bytes()
        });
        assert_eq!(signature, own[0], "{report}");
        assert_eq!(features & !own[1], 0, "{report}");
        text.replace_range(at + 8..at + 16, "features");
    }
    // With the features goes the checksum.
    let checksum = text.find("mp ").unwrap() + 3 + 2 * (16 + 7);
    text.replace_range(checksum..checksum + 2, "..");
    text
}

fn multiboot_alike(other: Program) {
    if !(require(Hmpsh.needs()) && require(other.needs())) {
        return;
    }
    let (_dir, [kernel, _, one, two]) = reporting();
    let modules = format!("{one} with arguments,{two}");
    // All below 4 GiB, and some of it above.
    let [ours, _] = [64, 3600].map(|mib| {
        let [ours, theirs] =
            [Hmpsh, other].map(|program| reported(program, mib, Path::new(&kernel), &modules));
        assert_eq!(alike(&ours), alike(&theirs));
        ours
    });
    assert_eq!(lines(&ours, &["module "]).len(), 2, "{ours}");
    assert!(
        ours.contains(&format!("\nline {kernel} root=none quiet\n")),
        "{ours}"
    );
}

#[test]
fn multiboot_as_on_7_2() {
    multiboot_alike(Qemu7);
}

#[test]
fn multiboot_as_on_10_0() {
    multiboot_alike(Qemu10);
}

#[test]
fn a_bzimage_is_told_the_same_as_a_multiboot_kernel() {
    if !require(Hmpsh.needs()) {
        return;
    }
    let (_dir, [multiboot, bz_image, one, _]) = reporting();
    let [with_info, with_page] =
        [multiboot, bz_image].map(|kernel| reported(Hmpsh, 64, Path::new(&kernel), &one));
    let same = ["e820 ", "mp ", "cpuid "];
    assert_eq!(lines(&with_info, &same), lines(&with_page, &same));
    assert_eq!(lines(&with_page, &["line "]), ["line root=none quiet"]);
    assert_eq!(
        lines(&with_page, &["module "]),
        ["module 03fff000  holds first"]
    );
}

#[test]
fn a_kernel_that_is_not_there_is_named() {
    let setup = Setup::new(Hmpsh)
        .accel("none")
        .kernel(Path::new("/proc/self/none"));
    let (status, said) = setup.try_start().expect_err("there is no kernel");
    assert_eq!(status.code(), Some(1));
    assert!(
        said.contains("could not open kernel file '/proc/self/none': No such file"),
        "{said}"
    );
}

/// Initial RAM disk and kernel must both fit.
#[test]
fn an_initrd_that_does_not_fit_is_refused() {
    let kernel = Kernel::new(Class::Elf64);
    let initrd = tempfile::NamedTempFile::new().unwrap();
    initrd.as_file().set_len(63 << 20).unwrap();
    let path = initrd.path().display().to_string();
    let setup = kernel.setup(Hmpsh).accel("none").args(&["-initrd", &path]);
    let (_, said) = setup
        .try_start()
        .expect_err("63 MiB do not fit above 2 MiB of 64");
    assert!(said.contains("does not fit into guest memory"), "{said}");
    if require(&[Need::Kvm]) {
        initrd.as_file().set_len(60 << 20).unwrap();
        lives(&[&kernel.setup(Hmpsh).args(&["-initrd", &path]).start()]);
    }
}
