//! Golden streams: what stock QEMU wrote (`tests/data`), read without a QEMU at hand, and captured
//! anew where there is one. Every stream, theirs and ours, is decoded to its last byte by its own
//! description.
//!
//! `tests/data/capture` writes the golden streams.

mod common;

use std::path::{Path, PathBuf};

use common::beacon::wait_beacons;
use common::decoder::Stream;
use common::need::require;
use common::ticks::{TICKS, check_rate};
use common::vmm::Program::{self, Hmpsh, Qemu7, Qemu10};
use common::vmm::{Setup, firmware};

/// A stream that QEMU wrote. The guest checks a page of its memory, or, where there are old chips,
/// lives by the PIT.
struct Golden {
    name: &'static str,
    program: Program,
    vcpus: u32,
    /// PIC, PIT and clock chip.
    chips: bool,
}

const GOLDEN: [Golden; 3] = [
    Golden {
        name: "qemu-7.2",
        program: Qemu7,
        vcpus: 1,
        chips: false,
    },
    Golden {
        name: "qemu-7.2-chips",
        program: Qemu7,
        vcpus: 1,
        chips: true,
    },
    Golden {
        name: "qemu-10.0",
        program: Qemu10,
        vcpus: 2,
        chips: true,
    },
];

const EVERY_CHIP: &str = ",pic=on,pit=on,rtc=on";

impl Golden {
    fn setup(&self, program: Program, bios: &Path) -> Setup {
        let setup = Setup::new(program)
            .memory_mib(2)
            .vcpus(self.vcpus)
            .irqchip("split");
        match self.chips {
            true => setup.machine(EVERY_CHIP).bios(bios),
            false => setup.append("window=4K rate=200"),
        }
    }

    /// Has QEMU write the stream and the guest's log.
    fn capture(&self, dir: &Path) {
        let bios = firmware(TICKS);
        let mut source = self.setup(self.program, bios.path()).start();
        if self.chips {
            check_rate(&source);
        } else {
            source.wait_beacons(5);
        }
        source.quiet("stop");
        let stream = self.file(dir, "mig");
        source.command(&format!("migrate \"exec:cat > {}\"", stream.display()));
        source.wait_status("paused (postmigrate)");
        std::fs::copy(source.log(), self.file(dir, "log")).unwrap();
        let len = std::fs::metadata(stream).unwrap().len();
        assert!(len < 64 << 10, "{len} bytes are too many to be kept");
    }

    fn file(&self, dir: &Path, kind: &str) -> PathBuf {
        dir.join(format!("{}.{kind}", self.name))
    }

    /// The stream is read in every way.
    fn check(&self, dir: &Path) {
        let bios = firmware(TICKS);
        let stream = Stream::decode(&std::fs::read(self.file(dir, "mig")).unwrap()).unwrap();
        assert_eq!(stream.machine, "microvm");
        assert_eq!(stream.blocks[0], ("microvm.ram".to_owned(), 2 << 20));
        let state = stream.field("globalstate 0", "runstate").unwrap();
        assert!(state.starts_with(b"paused\0"));
        assert!(stream.field("cpu 0", "env.eip").is_some());
        let cmos = stream.field("mc146818rtc 0", "cmos_data");
        assert_eq!(cmos.is_some(), self.chips);
        let uri = format!("file:{}", self.file(dir, "mig").display());
        let dest = || self.setup(Hmpsh, bios.path()).incoming(&uri);
        self.memory_is_right(dest().accel("none"));
        if require(Hmpsh.needs()) {
            self.goes_on(dest(), dir);
        }
    }

    /// The guest goes on where QEMU left it.
    fn goes_on(&self, dest: Setup, dir: &Path) {
        let mut vm = dest.start();
        vm.wait_status("paused");
        vm.quiet("cont");
        if self.chips {
            check_rate(&vm);
        } else {
            wait_beacons(&[&self.file(dir, "log"), &vm.log()], 10);
        }
    }

    /// Memory is what the guest had written, seen without KVM; saved again, all of it is described.
    fn memory_is_right(&self, dest: Setup) {
        let mut vm = dest.start();
        vm.wait_migration("completed");
        let memory = vm.memory(2 << 20);
        if self.chips {
            // The interrupt vector that the guest has set.
            assert_eq!(memory[0x80..0x84], [0x66, 0, 0, 0xf0]);
        } else {
            assert!(is_right(0, &memory[1 << 20..][..4096]));
        }
        let again = vm.path("again");
        vm.quiet(&format!("migrate file:{}", again.display()));
        let stream = Stream::decode(&std::fs::read(again).unwrap()).unwrap();
        let pages = stream.pages.iter().sum::<usize>();
        assert_eq!(pages, (2 << 20 >> 12) + (64 << 10 >> 12));
        assert!(
            stream
                .field("globalstate 0", "runstate")
                .unwrap()
                .starts_with(b"paused\0")
        );
    }
}

/// Whether a page holds its three records: a word of sequence number and page number, and its
/// hash.
fn is_right(number: u64, page: &[u8]) -> bool {
    let word = |at: usize| u64::from_le_bytes(page[at..at + 8].try_into().expect("8 bytes"));
    let (stamp, hash) = (word(0), word(8));
    let product = stamp.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let moving = 32 + (hash & 0xfc0) as usize;
    stamp & 0xff_ffff == number
        && stamp >> 24 > 0
        && hash == product ^ (product >> 32)
        && [4080, moving]
            .iter()
            .all(|at| (word(*at), word(at + 8)) == (stamp, hash))
}

#[test]
fn golden_streams_are_read() {
    let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data");
    for golden in &GOLDEN {
        if std::env::var_os("HMPSH_BLESS").is_some() && require(golden.program.needs()) {
            golden.capture(&dir);
        }
        golden.check(&dir);
    }
}

#[test]
fn streams_captured_now_are_read() {
    let dir = tempfile::tempdir().unwrap();
    for golden in &GOLDEN {
        if require(golden.program.needs()) {
            golden.capture(dir.path());
            golden.check(dir.path());
        }
    }
}

/// A running guest's stream of ours, with everything that a machine can have.
#[test]
fn ours_is_described_to_its_last_byte() {
    if !require(Hmpsh.needs()) {
        return;
    }
    let image = tempfile::NamedTempFile::new().unwrap();
    image.as_file().set_len(1 << 20).unwrap();
    let drive = format!("if=none,id=d0,format=raw,file={}", image.path().display());
    let mut source = Setup::new(Hmpsh)
        .vcpus(2)
        .machine(EVERY_CHIP)
        .args(&["-drive", &drive, "-device", "virtio-blk-device,drive=d0"])
        .append("window=1M")
        .start();
    source.wait_beacons(5);
    let file = source.path("saved");
    source.quiet(&format!("migrate file:{}", file.display()));
    let bytes = std::fs::read(file).unwrap();
    let stream = Stream::decode(&bytes).unwrap();
    let names: Vec<&str> = stream
        .devices
        .iter()
        .map(|device| device.name.as_str())
        .collect();
    assert_eq!(
        names,
        [
            "cpu 0",
            "apic 0",
            "cpu 1",
            "apic 1",
            "ioapic 0",
            "kvmclock 0",
            "i8259 0",
            "i8259 1",
            "i8254 0",
            "mc146818rtc 0",
            "serial 0",
            "virtio-mmio@00000000feb00e00/virtio-blk 0",
            "globalstate 0"
        ]
    );
    // One byte more or less and nothing fits.
    for (at, longer) in [(bytes.len() / 2, false), (bytes.len() / 2, true)] {
        let mut other = bytes.clone();
        if longer {
            other.insert(at, 0);
        } else {
            other.remove(at);
        }
        assert!(Stream::decode(&other).is_err());
    }
}
