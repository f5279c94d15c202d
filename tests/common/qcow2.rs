//! A qcow2 in a directory of its own, and what QEMU's tools say and make of it.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use hmpsh::block::snapshots::{self, Error, Storage};
use tempfile::TempDir;

use super::need::tool;

/// The image; gone when dropped.
#[derive(Debug)]
pub(crate) struct Qcow2 {
    dir: TempDir,
}

impl Qcow2 {
    /// A new one of `size` bytes; `options` as for `-o`.
    pub(crate) fn new(size: u64, options: &str) -> Self {
        let image = Self::empty();
        let path = image.path();
        image.img(
            &["create", "-q", "-f", "qcow2", "-o", options],
            &[&path.display().to_string(), &size.to_string()],
        );
        image
    }

    /// One of these bytes.
    pub(crate) fn of(bytes: &[u8]) -> Self {
        let image = Self::empty();
        image.set(bytes);
        image
    }

    /// A place for one.
    fn empty() -> Self {
        // Most of what is done here is small; on a disk it would wait for that.
        let memory = Path::new("/dev/shm");
        let dir = match memory.is_dir() {
            true => tempfile::tempdir_in(memory),
            false => tempfile::tempdir(),
        };
        Self {
            dir: dir.expect("a temporary directory"),
        }
    }

    /// Its path.
    pub(crate) fn path(&self) -> PathBuf {
        self.dir.path().join("image.qcow2")
    }

    /// Opens it.
    pub(crate) fn file(&self) -> File {
        let file = File::options().read(true).write(true).open(self.path());
        file.expect("an image")
    }

    /// The file.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        std::fs::read(self.path()).expect("an image")
    }

    /// Replaces the file.
    pub(crate) fn set(&self, bytes: &[u8]) {
        std::fs::write(self.path(), bytes).expect("room for an image");
    }

    /// Lets `qemu-io` do this; it says if that goes well.
    pub(crate) fn io(&self, commands: &[String]) {
        let mut io = Command::new(tool("qemu-io"));
        io.args(["-f", "qcow2"]);
        for command in commands {
            io.args(["-c", command]);
        }
        let output = io.arg(self.path()).output().expect("qemu-io");
        assert!(output.status.success(), "{commands:?}: {}", said(&output));
    }

    /// `qemu-img snapshot` with these options: what it prints.
    pub(crate) fn snapshot(&self, options: &[&str]) -> Result<String, String> {
        let output = Command::new(tool("qemu-img"))
            .arg("snapshot")
            .env("TZ", "UTC")
            .args(options)
            .arg(self.path())
            .output()
            .expect("qemu-img");
        match output.status.success() {
            true => Ok(said(&output)),
            false => Err(said(&output)),
        }
    }

    /// `qemu-img` with these options, the image and `more`.
    pub(crate) fn img(&self, options: &[&str], more: &[&str]) {
        let mut img = Command::new(tool("qemu-img"));
        let output = img.args(options).args(more).output().expect("qemu-img");
        assert!(output.status.success(), "{options:?}: {}", said(&output));
    }

    /// `qemu-img check` finds nothing, not even leaks.
    #[track_caller]
    pub(crate) fn is_clean(&self) {
        let check = Command::new(tool("qemu-img"))
            .args(["check", "-q", "-f", "qcow2"])
            .arg(self.path())
            .output()
            .expect("qemu-img");
        assert!(check.status.success(), "{}", said(&check));
    }

    /// What the disk holds, now or in the snapshot with that ID.
    #[track_caller]
    pub(crate) fn content(&self, id: Option<&str>) -> Vec<u8> {
        let raw = self.dir.path().join("raw");
        let mut convert = Command::new(tool("qemu-img"));
        convert.args(["convert", "-f", "qcow2", "-O", "raw"]);
        if let Some(id) = id {
            convert.args(["-l", &format!("snapshot.id={id}")]);
        }
        let output = convert
            .arg(self.path())
            .arg(&raw)
            .output()
            .expect("qemu-img");
        assert!(output.status.success(), "{id:?}: {}", said(&output));
        let bytes = std::fs::read(&raw).expect("what was converted");
        std::fs::remove_file(raw).expect("what was converted");
        bytes
    }
}

fn said(output: &Output) -> String {
    let both = [&output.stdout[..], &output.stderr].concat();
    String::from_utf8_lossy(&both).into_owned()
}

/// An image of 32 clusters, of which the first has data; made by hand.
pub(crate) fn minimal(version: u32, cluster_bits: u32, order: u32) -> Vec<u8> {
    let size = 1usize << cluster_bits;
    let mut bytes = vec![0; 6 * size];
    let mut put = |at: usize, piece: &[u8]| bytes[at..at + piece.len()].copy_from_slice(piece);
    let at = |cluster: usize| (cluster * size) as u64;
    put(0, b"QFI\xfb");
    put(4, &version.to_be_bytes());
    put(20, &cluster_bits.to_be_bytes());
    put(24, &at(32).to_be_bytes());
    put(36, &1u32.to_be_bytes());
    put(40, &at(L1).to_be_bytes());
    put(48, &at(TABLE).to_be_bytes());
    put(56, &1u32.to_be_bytes());
    if version == 3 {
        put(96, &order.to_be_bytes());
        put(100, &104u32.to_be_bytes());
    }
    put(size * TABLE, &at(BLOCK).to_be_bytes());
    match order {
        0 => put(size * BLOCK, &[0x3f]),
        1 => put(size * BLOCK, &[0x55, 0x05]),
        2 => put(size * BLOCK, &[0x11, 0x11, 0x11]),
        _ => {
            let len = 1 << (order - 3);
            (1..=6).for_each(|end| put(size * BLOCK + len * end - 1, &[1]));
        }
    }
    put(size * L1, &(COPIED | at(L2)).to_be_bytes());
    put(size * L2, &(COPIED | at(5)).to_be_bytes());
    put(size * 5, &[0xaa; 512]);
    bytes
}

const TABLE: usize = 1;
const BLOCK: usize = 2;
const L1: usize = 3;
const L2: usize = 4;
const COPIED: u64 = 1 << 63;

/// All that can be known of a snapshot before it is loaded.
pub(crate) fn check<S: Storage>(file: &S, id: &str) -> Result<(), Error> {
    snapshots::check(file, id).and_then(|()| snapshots::check_state(file, id))
}
