//! What a machine boots: the built-in guest, a flat firmware image, or a PVH kernel.
//!
//! Files are opened when the machine is built; every reset loads them again, into firmware memory
//! or RAM. There is no firmware of ours: with a kernel the firmware block exists, because QEMU
//! always sends it, and holds zeros.

pub mod builtin;
pub(super) mod pvh;

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use vm_memory::{Bytes, GuestAddress};

use self::pvh::Pvh;
use super::guest::Error;
use super::map::{HIGH_RAM, Map};
use crate::config::{Boot, MachineConfig};

/// Something to boot, ready to be loaded as often as it takes.
pub(super) enum Program {
    /// A firmware image; the boot vCPU starts at its reset vector.
    Firmware(Vec<u8>),
    /// A kernel with a PVH entry point.
    Kernel(Pvh),
}

/// How a kernel is entered, instead of the reset vector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    /// Physical address of the first instruction, executed in flat 32-bit mode.
    pub(super) address: u64,
    /// Physical address of the start info.
    pub(super) start_info: u64,
}

impl Program {
    /// Opens what the configuration names.
    pub(super) fn open(config: &MachineConfig) -> Result<Self, Error> {
        match &config.boot {
            Boot::Builtin => builtin::image(&config.append, config.memory)
                .map(Self::Firmware)
                .map_err(|error| Error::State(error.to_string())),
            Boot::Bios(path) => read_firmware(path).map(Self::Firmware),
            Boot::Kernel { kernel, initrd } => {
                Pvh::open(kernel, initrd.as_deref(), &config.append).map(Self::Kernel)
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

    /// Loads it, and tells where to enter if that is not the reset vector.
    pub(super) fn load(&self, map: &Map) -> Result<Option<Entry>, Error> {
        match self {
            Self::Firmware(image) => {
                let at = GuestAddress(HIGH_RAM - image.len() as u64);
                map.memory().write_slice(image, at).map_err(|error| {
                    Error::State(format!("could not load the firmware image: {error}"))
                })?;
                Ok(None)
            }
            Self::Kernel(kernel) => kernel.load(map).map(Some),
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

    use super::*;

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
