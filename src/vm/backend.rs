//! Where guest RAM lives: anonymous memory, or what `-object memory-backend-…` says.

use std::fs::OpenOptions;
use std::io;
use std::sync::Arc;

use rustix::fs::{MemfdFlags, memfd_create};
use vm_memory::FileOffset;

use super::guest::Error;
use super::memory::{Backing, RamBlock};
use crate::config::{BackendKind, MachineConfig};

/// Name of the main block of a machine without a memory backend.
const DEFAULT_NAME: &str = "microvm.ram";

/// The main RAM block.
pub(super) fn main_block(config: &MachineConfig) -> Result<Arc<RamBlock>, Error> {
    let (name, backing) = match &config.memory_backend {
        None => (DEFAULT_NAME, Backing::Anonymous),
        Some(backend) if backend.size != config.memory => {
            return Err(Error::State(
                "Machine memory size does not match the size of the memory backend".to_owned(),
            ));
        }
        Some(backend) => {
            let backing = match &backend.kind {
                BackendKind::Ram if !backend.share => Backing::Anonymous,
                BackendKind::Ram | BackendKind::Memfd => {
                    let file = memfd_create(backend.id.as_str(), MemfdFlags::CLOEXEC)
                        .map_err(io::Error::from)
                        .map(std::fs::File::from)
                        .and_then(|file| file.set_len(backend.size).map(|()| file))
                        .map_err(|source| Error::System {
                            what: format!("can't create memory backend '{}'", backend.id),
                            source,
                        })?;
                    Backing::File {
                        file: FileOffset::new(file, 0),
                        share: true,
                    }
                }
                BackendKind::File(path) => {
                    let open = || {
                        let file = OpenOptions::new()
                            .read(true)
                            .write(true)
                            .create(true)
                            .truncate(false)
                            .open(path)?;
                        let len = file.metadata()?.len();
                        if len == 0 {
                            file.set_len(backend.size)?;
                        }
                        Ok((file, len))
                    };
                    let (file, len) = open().map_err(|source| Error::System {
                        what: format!("can't open backing store {} for guest RAM", path.display()),
                        source,
                    })?;
                    // An empty file is made as long as it must be; another one is somebody's.
                    if (1..backend.size).contains(&len) {
                        return Err(Error::State(format!(
                            "backing store size {len:#x} does not match 'size' option {:#x}",
                            backend.size
                        )));
                    }
                    Backing::File {
                        file: FileOffset::new(file, 0),
                        share: backend.share,
                    }
                }
            };
            (backend.id.as_str(), backing)
        }
    };
    block(name, config.memory, backing)
}

/// A block of that name and length, or QEMU's words for the lack of memory.
pub(super) fn block(name: &str, len: u64, backing: Backing) -> Result<Arc<RamBlock>, Error> {
    RamBlock::new(name, len, backing)
        .map(Arc::new)
        .map_err(|source| Error::System {
            what: format!("cannot set up guest memory '{name}' of {len} bytes"),
            source,
        })
}
