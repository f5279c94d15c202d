//! Internal snapshots of qcow2 images, ours and those of QEMU's tools, turn by turn.

mod common;

use std::io::{Read, Write};

use common::need::{Need, require};
use common::qcow2::{Qcow2, check};
use common::vmm::{Program, Setup, have};
use hmpsh::block::snapshots::{self, Error, New};

/// A generator of numbers, the same ones every time.
struct Dice(u64);

impl Dice {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % end
    }
}

fn new(name: &str) -> New<'_> {
    New {
        name,
        seconds: 1_700_000_000,
        nanoseconds: 5,
        vm_clock: 3_661_000_000_001,
    }
}

/// Takes a snapshot with that VM state, written in pieces.
fn create(image: &Qcow2, name: &str, state: &[u8]) -> Result<String, Error> {
    let file = image.file();
    let mut creation = snapshots::create(&file, &new(name))?;
    for piece in state.chunks(77_777) {
        creation.write_all(piece).unwrap();
    }
    creation.commit()
}

fn state(image: &Qcow2, id: &str) -> Vec<u8> {
    let mut state = Vec::new();
    if let Some(mut reader) = snapshots::vm_state(&image.file(), id).unwrap() {
        reader.read_to_end(&mut state).unwrap();
        assert_eq!(reader.len(), state.len() as u64);
    }
    state
}

fn bytes(dice: &mut Dice, len: u64) -> Vec<u8> {
    (0..len).map(|_| dice.below(256) as u8).collect()
}

/// A snapshot as it should be.
struct Expected {
    id: String,
    name: String,
    disk: Vec<u8>,
    state: Vec<u8>,
}

/// An image, and what should be in it.
struct Walk {
    dice: Dice,
    image: Qcow2,
    disk: Vec<u8>,
    snapshots: Vec<Expected>,
    /// How many snapshots there can be before a reference count overflows.
    most: usize,
    /// The disk may have a VM state behind its end, QEMU leaves it there. If it then resizes the
    /// disk it loses that, or makes it a part of the disk.
    has_more: bool,
    is_old: bool,
    /// Bytes of a cluster, or of some.
    unit: u64,
}

impl Walk {
    fn step(&mut self, number: u64) {
        let known = self.snapshots.len() as u64;
        match self.dice.below(10) {
            0..3 => self.write(),
            3..5 => self.create(number, true),
            5 => self.create(number, false),
            _ if known == 0 => self.write(),
            6 => self.delete(known > 1 && number.is_multiple_of(2)),
            7 if !self.is_old && !self.has_more => self.resize(),
            action => self.apply(action < 9),
        }
    }

    /// Where something is done: 1 to 40000 bytes.
    fn range(&mut self) -> (usize, usize) {
        let begin = self.dice.below(self.disk.len() as u64);
        let len = 1 + self
            .dice
            .below((self.disk.len() as u64 - begin).min(40_000));
        (begin as usize, len as usize)
    }

    fn write(&mut self) {
        let mut commands = Vec::new();
        for _ in 0..1 + self.dice.below(4) {
            let (begin, len) = self.range();
            let pattern = self.dice.below(256) as u8;
            self.disk[begin..begin + len].fill(pattern);
            commands.push(match pattern {
                0..40 => format!("write -P {pattern} {begin} {len}"),
                40..80 => {
                    self.disk[begin..begin + len].fill(0);
                    let how = if pattern < 60 { "-z" } else { "-zu" };
                    format!("write {how} {begin} {len}")
                }
                _ => format!("write -P {pattern} {begin} {len}"),
            });
        }
        self.image.io(&commands);
    }

    fn create(&mut self, number: u64, is_ours: bool) {
        let name = format!("s{number}");
        let is_full = self.snapshots.len() >= self.most;
        let mut state = Vec::new();
        let id = match is_ours {
            true => {
                let len = [0, 1, 512, 65_536, 300_001][self.dice.below(5) as usize];
                state = bytes(&mut self.dice, len);
                match create(&self.image, &name, &state) {
                    Ok(id) => id,
                    Err(Error::Overflow { .. }) if is_full => return,
                    Err(error) => panic!("{error}"),
                }
            }
            false if is_full => return,
            false => {
                self.image.snapshot(&["-c", &name]).unwrap();
                let list = snapshots::list(&self.image.file()).unwrap();
                list.last().unwrap().id().into_owned()
            }
        };
        let disk = self.disk.clone();
        self.snapshots.push(Expected {
            id,
            name,
            disk,
            state,
        });
    }

    fn delete(&mut self, is_ours: bool) {
        let at = self.dice.below(self.snapshots.len() as u64) as usize;
        let gone = self.snapshots.remove(at);
        match is_ours {
            true => snapshots::delete(&self.image.file(), &gone.id).unwrap(),
            false => drop(self.image.snapshot(&["-d", &gone.name]).unwrap()),
        }
    }

    fn apply(&mut self, is_ours: bool) {
        let at = self.dice.below(self.snapshots.len() as u64) as usize;
        let known = &self.snapshots[at];
        // QEMU counts up before it counts down.
        let is_resized = known.disk.len() != self.disk.len();
        let is_ours = is_ours || self.most < 100 || self.has_more && is_resized;
        match is_ours {
            true => {
                check(&self.image.file(), &known.id).unwrap();
                snapshots::apply(&self.image.file(), &known.id).unwrap();
            }
            false => drop(self.image.snapshot(&["-a", &known.id]).unwrap()),
        }
        self.has_more = !is_ours;
        self.disk.clone_from(&known.disk);
    }

    fn resize(&mut self) {
        // Whole clusters: of one in part, the rest comes back when the disk grows.
        let size = (1 + self.dice.below(3)) * self.unit;
        self.disk.resize(size as usize, 0);
        let path = self.image.path().display().to_string();
        let resize = ["resize", "-q", "-f", "qcow2", "--shrink"];
        self.image.img(&resize, &[&path, &size.to_string()]);
    }

    #[track_caller]
    fn is_as_expected(&mut self) {
        self.image.is_clean();
        assert!(self.image.content(None) == self.disk, "the disk differs");
        if !self.snapshots.is_empty() {
            let at = self.dice.below(self.snapshots.len() as u64) as usize;
            self.snapshot_is_as_expected(at);
        }
    }

    #[track_caller]
    fn snapshot_is_as_expected(&self, at: usize) {
        let known = &self.snapshots[at];
        let list = snapshots::list(&self.image.file()).unwrap();
        let names = list.iter().map(|snapshot| snapshot.name().into_owned());
        let expected = self.snapshots.iter().map(|known| known.name.clone());
        assert_eq!(names.collect::<Vec<_>>(), expected.collect::<Vec<_>>());
        assert_eq!(list[at].disk_size, known.disk.len() as u64);
        assert!(state(&self.image, &known.id) == known.state);
        check(&self.image.file(), &known.id).unwrap();
        // The tool reads as much as the disk has now.
        let disk = self.image.content(Some(&known.id));
        let len = disk.len().min(known.disk.len());
        let are_same = disk[..len] == known.disk[..len];
        assert!(are_same, "snapshot {} differs", known.name);
    }
}

/// Walks at random over an image of that kind.
fn walk(seed: u64, unit: u64, size: u64, options: &str, most: usize) {
    if !require(&[Need::QemuImg]) {
        return;
    }
    let steps = std::env::var("HMPSH_SNAPSHOT_STEPS").map_or(12, |steps| steps.parse().unwrap());
    let mut dice = Dice(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    dice.below(2);
    let image = Qcow2::new(size, options);
    let is_old = options.contains("compat=0.10");
    let mut walk = Walk {
        dice,
        disk: vec![0; size as usize],
        image,
        snapshots: Vec::new(),
        most,
        has_more: false,
        is_old,
        unit,
    };
    if most > 100 {
        // Clusters that are compressed share their places.
        let len = unit.min(2 << 20) as usize;
        for at in [0, 1, 2] {
            let begin = at * len;
            let pattern = at as u8 + 1;
            let write = format!(
                "write -c -P {pattern} {begin} {}",
                len.min(size as usize - begin)
            );
            walk.image.io(&[write]);
            walk.disk[begin..]
                .iter_mut()
                .take(len)
                .for_each(|byte| *byte = pattern);
        }
    }
    // The largest take as long for one as others for two.
    for number in 0..steps.min(steps * (1 << 20) / unit) {
        walk.step(number);
        walk.is_as_expected();
    }
    for at in 0..walk.snapshots.len() {
        walk.snapshot_is_as_expected(at);
    }
}

#[test]
fn in_the_usual_image() {
    walk(1, 256 << 10, 1 << 20, "cluster_size=64k", usize::MAX);
}

#[test]
fn in_an_old_image() {
    walk(
        2,
        64 << 10,
        1 << 20,
        "compat=0.10,cluster_size=4096",
        usize::MAX,
    );
}

#[test]
fn in_the_smallest_clusters_with_the_widest_counts() {
    walk(
        3,
        64 << 10,
        (1 << 20) + 512,
        "cluster_size=512,refcount_bits=64",
        usize::MAX,
    );
}

#[test]
fn in_the_largest_clusters() {
    walk(
        4,
        2 << 20,
        (5 << 20) + 512,
        "cluster_size=2M,refcount_bits=8",
        usize::MAX,
    );
}

#[test]
fn where_three_uses_are_the_most() {
    walk(
        5,
        256 << 10,
        1 << 20,
        "cluster_size=1024,refcount_bits=2",
        2,
    );
}

/// A QEMU takes ours for one of disks only and keeps its VM state; we read the state of one of its.
fn beside_a_running(program: Program) {
    if !have(&[program]) || !require(&[Need::QemuImg]) {
        return;
    }
    let image = Qcow2::new(1 << 20, "cluster_size=64k");
    image.io(&["write -P 7 0 200k".to_owned()]);
    let saved = bytes(&mut Dice(77), 100_000);
    let id = create(&image, "ours", &saved).unwrap();
    assert_eq!(id, "1");
    let drive = format!("if=none,id=d0,format=qcow2,file={}", image.path().display());
    let start = || Setup::new(program).args(&["-drive", &drive]).start();
    let mut vm = start();
    let list = vm.command("info snapshots");
    let line = list.lines().find(|line| line.contains(" ours ")).unwrap();
    assert!(line.contains(" 0 B "), "{list}");
    let answer = vm.command("loadvm ours");
    assert!(answer.contains("This is a disk-only snapshot"), "{answer}");
    vm.quiet("savevm theirs");
    vm.quiet("savevm gone");
    vm.quiet("delvm gone");
    vm.hmp.send("quit");
    vm.wait_exit();

    image.is_clean();
    assert!(state(&image, "1") == saved);
    let list = snapshots::list(&image.file()).unwrap();
    let theirs = list.iter().find(|snapshot| snapshot.name() == "theirs");
    let theirs = theirs.unwrap();
    let stream = state(&image, &theirs.id());
    assert_eq!(stream.len() as u64, theirs.vm_state_size);
    assert_eq!(stream[..4], *b"QEVM");
    check(&image.file(), &theirs.id()).unwrap();
    snapshots::apply(&image.file(), &id).unwrap();
    snapshots::delete(&image.file(), &id).unwrap();
    create(&image, "again", &saved).unwrap();
    image.is_clean();
    assert!(state(&image, &theirs.id()) == stream);

    let mut vm = start();
    vm.quiet("loadvm theirs");
    vm.wait_status("running");
    vm.quiet("delvm theirs");
    vm.hmp.send("quit");
    vm.wait_exit();
    image.is_clean();
    let list = snapshots::list(&image.file()).unwrap();
    assert_eq!((list.len(), &*list[0].name()), (1, "again"));
    assert!(state(&image, &list[0].id()) == saved);
}

#[test]
fn beside_qemu_7() {
    beside_a_running(Program::Qemu7);
}

#[test]
fn beside_qemu_10() {
    beside_a_running(Program::Qemu10);
}

#[test]
fn what_lists_show_is_what_was_said() {
    if !require(&[Need::QemuImg]) {
        return;
    }
    let image = Qcow2::new(1 << 20, "cluster_size=64k");
    create(&image, "first", b"").unwrap();
    create(&image, "second", b"state").unwrap();
    let list = image.snapshot(&["-l"]).unwrap();
    let expected = "Snapshot list:
ID        TAG               VM SIZE                DATE     VM CLOCK     ICOUNT
1         first                 0 B 2023-11-14 22:13:20 01:01:01.000           
2         second                0 B 2023-11-14 22:13:20 01:01:01.000           
";
    assert_eq!(list, expected);
}

#[test]
fn a_disk_may_have_no_bytes() {
    if !require(&[Need::QemuImg]) {
        return;
    }
    let image = Qcow2::new(0, "cluster_size=4k");
    create(&image, "empty", &[1; 70_000]).unwrap();
    image.is_clean();
    snapshots::apply(&image.file(), "1").unwrap();
    image.is_clean();
    image.snapshot(&["-a", "1"]).unwrap();
    snapshots::delete(&image.file(), "1").unwrap();
    image.is_clean();
}
