//! What a machine boots: the built-in guest, a flat firmware image, or a kernel (bzImage, multiboot
//! or PVH).
//!
//! Files are opened when the machine is built; every reset loads them again, into firmware memory
//! or RAM. There is no firmware of ours: with a kernel the firmware block exists, because QEMU
//! always sends it, and holds zeros; what firmware would leave in RAM the loader leaves there.

pub mod builtin;
mod bzimage;
mod command_line;
mod e820;
mod elf;
mod kernel;
mod mptable;
mod multiboot;
mod pvh;
mod ram;
mod source;
#[cfg(test)]
pub(super) mod specimen;

use std::fs::File;
use std::io::{self, Read};
use std::ops::Range;
use std::path::Path;

use vm_memory::{Bytes, GuestAddress};

use self::kernel::Kernel;
pub(super) use self::mptable::Processors;
use super::guest::Error;
use super::map::{HIGH_RAM, Map};
use crate::config::{Boot, MachineConfig};

/// Something to boot, ready to be loaded as often as it takes.
pub(super) enum Program {
    /// A firmware image; the boot vCPU starts at its reset vector.
    Firmware(Vec<u8>),
    /// A kernel; the boot vCPU starts at its entry.
    Kernel(Box<Kernel>),
}

/// How a kernel is entered, instead of the reset vector: in 32-bit protected mode without paging,
/// all segments flat, interrupts off, every register that is not here 0 (EDX, ESP: undefined).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Entry {
    /// Physical address of the first instruction.
    pub(super) address: u64,
    /// EAX.
    pub(super) eax: u64,
    /// EBX.
    pub(super) ebx: u64,
    /// ESI.
    pub(super) esi: u64,
    /// What the segment registers hold.
    pub(super) selectors: Selectors,
    /// Physical addresses of the descriptor table they are in, for a kernel that relies on it.
    pub(super) gdt: Option<Range<u64>>,
}

impl Entry {
    fn flat(selectors: Selectors) -> Self {
        Self {
            selectors,
            ..Self::default()
        }
    }
}

/// Selectors of flat segments.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Selectors {
    /// CS.
    pub(super) code: u32,
    /// All others.
    pub(super) data: u32,
}

impl Selectors {
    /// Those of QEMU's firmware.
    const FIRMWARE: Self = Self {
        code: 0x08,
        data: 0x10,
    };
    /// Those of Linux's boot protocol.
    const LINUX: Self = Self {
        code: 0x10,
        data: 0x18,
    };
}

impl Program {
    /// Opens what the configuration names. A kernel is told of the disks, unless the configuration
    /// has something against it.
    pub(super) fn open(config: &MachineConfig) -> Result<Self, Error> {
        let disks = match config.auto_kernel_cmdline {
            true => &config.disks[..],
            false => &[],
        };
        match &config.boot {
            Boot::Builtin => builtin::image(&config.append, config.memory)
                .map(Self::Firmware)
                .map_err(|error| Error::State(error.to_string())),
            Boot::Bios(path) => read_firmware(path).map(Self::Firmware),
            Boot::Kernel { kernel, initrd } => {
                Kernel::open(kernel, initrd.as_deref(), &config.append, disks)
                    .map(|kernel| Self::Kernel(Box::new(kernel)))
            }
        }
    }

    /// Bytes of firmware memory the machine has.
    pub(super) fn firmware_size(&self) -> u64 {
        match self {
            Self::Firmware(image) => image.len() as u64,
            Self::Kernel(_) => FIRMWARE_UNIT,
        }
    }

    /// Loads it, and tells where to enter if that is not the reset vector. A kernel is told what
    /// `processors` there are.
    pub(super) fn load(&self, map: &Map, processors: &Processors) -> Result<Option<Entry>, Error> {
        match self {
            Self::Firmware(image) => {
                let at = GuestAddress(HIGH_RAM - image.len() as u64);
                map.memory().write_slice(image, at).map_err(|error| {
                    Error::State(format!("could not load the firmware image: {error}"))
                })?;
                Ok(None)
            }
            Self::Kernel(kernel) => kernel.load(map, processors).map(Some),
        }
    }
}

fn read_firmware(path: &Path) -> Result<Vec<u8>, Error> {
    let read = || {
        let file = File::open(path)?;
        let mut image = Vec::new();
        file.take(FIRMWARE_MAX + 1).read_to_end(&mut image)?;
        let len = image.len() as u64;
        let problem = if len == 0 {
            Some("the file is empty".to_owned())
        } else if len > FIRMWARE_MAX {
            Some(format!("the image is longer than {FIRMWARE_MAX} bytes"))
        } else if !len.is_multiple_of(FIRMWARE_UNIT) {
            Some(format!("{len} bytes are no multiple of 64 KiB"))
        } else {
            None
        };
        problem.map_or(Ok(image), |problem| Err(io::Error::other(problem)))
    };
    read().map_err(|source| Error::System {
        what: format!("could not load PC BIOS '{}'", path.display()),
        source,
    })
}

/// Firmware comes in multiples of this.
const FIRMWARE_UNIT: u64 = 64 << 10;
/// More would reach the interrupt controllers below the top of 4 GiB.
const FIRMWARE_MAX: u64 = 8 << 20;

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::sync::Arc;

    use super::*;
    use crate::vm::memory::{Backing, RamBlock};

    /// A machine's memory, so many bytes, with the firmware block that goes with a kernel.
    pub(super) fn machine(memory: u64) -> Map {
        let block = |name, len| Arc::new(RamBlock::new(name, len, Backing::Anonymous).unwrap());
        Map::new(block("microvm.ram", memory), block("pc.bios", 64 << 10)).unwrap()
    }

    pub(super) fn processors(count: u8) -> Processors {
        Processors {
            count,
            signature: 0x0006_0fb1,
            features: 0x178b_fbff,
        }
    }

    /// Kernel and initial RAM disk, as files.
    pub(super) struct Files {
        pub(super) kernel: tempfile::NamedTempFile,
        pub(super) initrd: Option<tempfile::NamedTempFile>,
    }

    pub(super) fn files(kernel: &[u8], initrd: Option<&[u8]>) -> Files {
        let written = |content: &[u8]| {
            let mut file = tempfile::NamedTempFile::new().unwrap();
            file.write_all(content).unwrap();
            file
        };
        Files {
            kernel: written(kernel),
            initrd: initrd.map(written),
        }
    }

    pub(super) fn open(files: &Files, append: &str) -> Result<Kernel, Error> {
        let initrd = files.initrd.as_ref().map(tempfile::NamedTempFile::path);
        Kernel::open(files.kernel.path(), initrd, append, &[])
    }

    /// Why a machine with 4 MiB does not boot that.
    #[track_caller]
    pub(super) fn refusal(kernel: &[u8], initrd: Option<&[u8]>, append: &str) -> String {
        let files = files(kernel, initrd);
        let entry =
            open(&files, append).and_then(|kernel| kernel.load(&machine(4 << 20), &processors(1)));
        entry.expect_err("it is refused").to_string()
    }

    #[test]
    fn bad_images_are_refused_with_a_reason() {
        let long = vec![0; 100_000];
        for (content, reason) in [
            (&[][..], "the file is empty"),
            (&long, "100000 bytes are no multiple of 64 KiB"),
        ] {
            let mut file = tempfile::NamedTempFile::new().unwrap();
            file.write_all(content).unwrap();
            let error = read_firmware(file.path()).unwrap_err().to_string();
            let name = file.path().display();
            assert_eq!(error, format!("could not load PC BIOS '{name}': {reason}"));
        }
        let error = read_firmware(Path::new("/proc/self/none"))
            .unwrap_err()
            .to_string();
        assert!(error.starts_with("could not load PC BIOS '/proc/self/none': No such file"));
    }
}
