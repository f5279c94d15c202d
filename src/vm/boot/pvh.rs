//! Kernels with a PVH entry point: 64-bit ELF files, loaded where they say, entered in flat
//! 32-bit mode with EBX at a start info that names memory map, command line and initial RAM disk.
//!
//! Other kernel formats are recognised and refused.

#[cfg(test)]
pub(in crate::vm) mod elf;

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use linux_loader::configurator::pvh::PvhBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::elf::{Elf64_Ehdr, Elf64_Phdr, PT_LOAD};
use linux_loader::loader::KernelLoader;
use linux_loader::loader::elf::start_info::{
    hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use linux_loader::loader::elf::{Elf, PvhBootCapability};
use vm_memory::{ByteValued, Bytes, GuestAddress};

use super::Entry;
use crate::vm::guest::Error;
use crate::vm::map::{Map, RAM};

/// A kernel, its initial RAM disk and its command line.
pub(in crate::vm) struct Pvh {
    kernel: File,
    name: String,
    initrd: Option<(File, u64)>,
    command_line: String,
    /// Memory is not as it was at power on: the guest may have used it.
    is_used: AtomicBool,
}

impl Pvh {
    /// Opens the files and recognises the kernel's format.
    pub(super) fn open(
        kernel: &Path,
        initrd: Option<&Path>,
        command_line: &str,
    ) -> Result<Self, Error> {
        let name = kernel.display().to_string();
        let mut file = File::open(kernel).map_err(|source| Error::System {
            what: format!("could not open kernel file '{name}'"),
            source,
        })?;
        recognise(&mut file, &name)?;
        if command_line.len() >= COMMAND_LINE_MAX {
            return Err(Error::State(format!(
                "-append: {} bytes are too long for a kernel command line (at most {})",
                command_line.len(),
                COMMAND_LINE_MAX - 1
            )));
        }
        let initrd = initrd
            .map(|path| {
                let open = || {
                    let file = File::open(path)?;
                    let len = file.metadata()?.len();
                    Ok((file, len))
                };
                open().map_err(|source: io::Error| Error::System {
                    what: format!("could not open initrd file '{}'", path.display()),
                    source,
                })
            })
            .transpose()?;
        Ok(Self {
            kernel: file,
            name,
            initrd,
            command_line: command_line.to_owned(),
            is_used: AtomicBool::new(false),
        })
    }

    /// Loads everything into RAM.
    pub(super) fn load(&self, map: &Map) -> Result<Entry, Error> {
        let memory = map.memory();
        let mut kernel = self.own(&self.kernel)?;
        let loaded = Elf::load(memory, None, &mut kernel, None)
            .map_err(|error| self.failed(&error.to_string()))?;
        let PvhBootCapability::PvhEntryPresent(entry) = loaded.pvh_boot_cap else {
            return Err(Error::State(format!(
                "Error loading uncompressed kernel without PVH ELF Note: '{}'",
                self.name
            )));
        };
        if self.is_used.swap(true, Ordering::SeqCst) {
            self.clear_bss(map, &mut kernel)?;
        }
        let write = |bytes: &[u8], at| {
            memory
                .write_slice(bytes, GuestAddress(at))
                .map_err(|e| self.failed(&e.to_string()))
        };
        write(self.command_line.as_bytes(), COMMAND_LINE)?;
        write(&[0], COMMAND_LINE + self.command_line.len() as u64)?;
        let table = memory_table(map);
        let mut start = hvm_start_info {
            magic: START_MAGIC,
            version: 1,
            cmdline_paddr: COMMAND_LINE,
            memmap_paddr: MEMORY_TABLE,
            memmap_entries: table.len() as u32,
            ..Default::default()
        };
        let mut modules = Vec::new();
        if let Some((file, len)) = &self.initrd {
            let at = self.place_initrd(map, loaded.kernel_end, *len)?;
            memory
                .read_exact_volatile_from(GuestAddress(at), &mut self.own(file)?, *len as usize)
                .map_err(|error| self.failed(&format!("initrd: {error}")))?;
            modules.push(hvm_modlist_entry {
                paddr: at,
                size: *len,
                ..Default::default()
            });
            start.modlist_paddr = MODULES;
            start.nr_modules = 1;
        }
        let mut params = BootParams::new(&start, GuestAddress(START_INFO));
        params.set_sections(&table, GuestAddress(MEMORY_TABLE));
        if !modules.is_empty() {
            params.set_modules(&modules, GuestAddress(MODULES));
        }
        PvhBootConfigurator::write_bootparams(&params, memory)
            .map_err(|error| self.failed(&error.to_string()))?;
        Ok(Entry {
            address: entry.0,
            start_info: START_INFO,
        })
    }

    /// Clears what the kernel has in memory and not in its file.
    fn clear_bss(&self, map: &Map, kernel: &mut File) -> Result<(), Error> {
        let mut read = |at, bytes: &mut [u8]| {
            let seek = kernel.seek(SeekFrom::Start(at));
            seek.and_then(|_| kernel.read_exact(bytes))
                .map_err(|error| self.failed(&error.to_string()))
        };
        let mut file = Elf64_Ehdr::default();
        read(0, file.as_mut_slice())?;
        for index in 0..u64::from(file.e_phnum) {
            let mut segment = Elf64_Phdr::default();
            let len = size_of::<Elf64_Phdr>() as u64;
            read(
                file.e_phoff.saturating_add(index * len),
                segment.as_mut_slice(),
            )?;
            if segment.p_type != PT_LOAD {
                continue;
            }
            let end = segment.p_paddr.saturating_add(segment.p_memsz);
            let mut at = segment.p_paddr.saturating_add(segment.p_filesz);
            while at < end {
                let count = (end - at).min(ZEROS.len() as u64);
                map.memory()
                    .write_slice(&ZEROS[..count as usize], GuestAddress(at))
                    .map_err(|error| self.failed(&error.to_string()))?;
                at += count;
            }
        }
        Ok(())
    }

    /// The initial RAM disk goes as high as it can below 3 GiB, page-aligned.
    fn place_initrd(&self, map: &Map, kernel_end: u64, len: u64) -> Result<u64, Error> {
        let low = map
            .windows()
            .iter()
            .filter(|w| w.block == RAM && w.guest < 1 << 32);
        let end = low.map(|w| w.guest + w.len).max().unwrap_or(0);
        let at = end
            .checked_sub(len)
            .map(|at| at & !0xfff)
            .filter(|at| *at >= kernel_end);
        at.ok_or_else(|| {
            Error::State(format!(
                "the initrd of {len} bytes does not fit into guest memory behind kernel '{}'",
                self.name
            ))
        })
    }

    /// A descriptor at the file's start; the position is shared, so users take turns (resets do).
    fn own(&self, file: &File) -> Result<File, Error> {
        let open = || {
            let mut file = file.try_clone()?;
            file.rewind()?;
            Ok(file)
        };
        open().map_err(|source: io::Error| Error::System {
            what: format!("could not read kernel '{}'", self.name),
            source,
        })
    }

    fn failed(&self, why: &str) -> Error {
        Error::State(format!("could not load kernel '{}': {why}", self.name))
    }
}

/// Memory as the kernel may use it: RAM; the firmware's places and KVM's own pages are reserved.
fn memory_table(map: &Map) -> Vec<hvm_memmap_table_entry> {
    let mut table: Vec<_> = map
        .windows()
        .iter()
        .map(|window| hvm_memmap_table_entry {
            addr: window.guest,
            size: window.len,
            type_: if window.block == RAM {
                E820_RAM
            } else {
                E820_RESERVED
            },
            reserved: 0,
        })
        .collect();
    table.push(hvm_memmap_table_entry {
        addr: KVM_PAGES.0,
        size: KVM_PAGES.1,
        type_: E820_RESERVED,
        reserved: 0,
    });
    table.sort_by_key(|entry| entry.addr);
    table
}

fn recognise(file: &mut File, name: &str) -> Result<(), Error> {
    let mut head = Vec::new();
    let read = file
        .by_ref()
        .take(8192)
        .read_to_end(&mut head)
        .and_then(|_| file.seek(SeekFrom::Start(0)));
    read.map_err(|source| Error::System {
        what: format!("could not read kernel '{name}'"),
        source,
    })?;
    let not_built = |what: &str| {
        Err(Error::State(format!(
            "{what} kernels ('{name}'): not built in this version"
        )))
    };
    let is_multiboot = head.chunks_exact(4).any(|word| word == MULTIBOOT_MAGIC);
    match () {
        () if head.starts_with(b"\x7fELF\x02") => Ok(()),
        () if head.get(0x202..0x206) == Some(b"HdrS") => not_built("bzImage"),
        () if is_multiboot => not_built("multiboot"),
        () if head.starts_with(b"\x7fELF") => not_built("32-bit ELF"),
        () => Err(Error::State(format!("invalid kernel header: '{name}'"))),
    }
}

const ZEROS: &[u8] = &[0; 4096];
/// Places below 1 MiB, as firmware would choose them.
const START_INFO: u64 = 0x6000;
const MODULES: u64 = 0x6040;
const MEMORY_TABLE: u64 = 0x7000;
const COMMAND_LINE: u64 = 0x2_0000;
const COMMAND_LINE_MAX: usize = 0x1_0000;
const START_MAGIC: u32 = 0x336e_c578;
const MULTIBOOT_MAGIC: [u8; 4] = 0x1bad_b002u32.to_le_bytes();
/// Address and size of what KVM keeps for itself in guest-physical space.
const KVM_PAGES: (u64, u64) = (0xfeff_c000, 0x4000);
const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::sync::Arc;

    use super::*;
    use crate::vm::boot::pvh::elf::elf;
    use crate::vm::map::FIRMWARE;
    use crate::vm::memory::{Backing, RamBlock};

    fn written(content: &[u8]) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(content).unwrap();
        file
    }

    fn machine() -> Map {
        let block = |name, len| Arc::new(RamBlock::new(name, len, Backing::Anonymous).unwrap());
        Map::new(block("microvm.ram", 4 << 20), block("pc.bios", 64 << 10)).unwrap()
    }

    #[test]
    fn a_kernel_is_loaded_with_all_it_needs() {
        let (kernel, initrd) = (written(&elf(b"kernel code", true)), written(&[7; 5000]));
        let map = machine();
        let pvh = Pvh::open(kernel.path(), Some(initrd.path()), "console=ttyS0").unwrap();
        for _ in 0..2 {
            let entry = pvh.load(&map).unwrap();
            assert_eq!(
                entry,
                Entry {
                    address: 0x10_0010,
                    start_info: START_INFO
                }
            );
        }
        let mut code = [0; 11];
        map.read(0x10_0000, &mut code).unwrap();
        assert_eq!(&code, b"kernel code");
        let start: hvm_start_info = map.memory().read_obj(GuestAddress(START_INFO)).unwrap();
        assert_eq!(
            (start.magic, start.version, start.nr_modules),
            (START_MAGIC, 1, 1)
        );
        let mut line = [0; 14];
        map.read(start.cmdline_paddr, &mut line).unwrap();
        assert_eq!(&line, b"console=ttyS0\0");
        let module: hvm_modlist_entry = map
            .memory()
            .read_obj(GuestAddress(start.modlist_paddr))
            .unwrap();
        assert_eq!((module.paddr, module.size), ((4 << 20) - 0x2000, 5000));
        assert_eq!(
            map.memory()
                .read_obj::<u8>(GuestAddress(module.paddr + 4999))
                .unwrap(),
            7
        );
        let table: [hvm_memmap_table_entry; 5] = std::array::from_fn(|n| {
            let at = GuestAddress(start.memmap_paddr + n as u64 * 24);
            map.memory().read_obj(at).unwrap()
        });
        assert_eq!(start.memmap_entries, 5);
        assert_eq!(table.map(|e| e.type_), [1, 2, 1, 2, 2]);
        assert_eq!((table[2].addr, table[2].size), (1 << 20, 3 << 20));
        // The firmware block is as it was: zeros.
        map.written()[FIRMWARE].drain(|_, _| panic!("firmware memory was written"));
    }

    #[test]
    fn other_formats_are_told_apart() {
        let mut bz = vec![0; 0x400];
        bz[0x202..0x206].copy_from_slice(b"HdrS");
        let mut multiboot = vec![0; 64];
        multiboot[32..36].copy_from_slice(&MULTIBOOT_MAGIC);
        let cases: [(&[u8], &str); 4] = [
            (&bz, "not built in this version"),
            (&multiboot, "not built in this version"),
            (b"\x7fELF\x01", "not built in this version"),
            (b"#!/bin/sh", "invalid kernel header"),
        ];
        for (content, text) in cases {
            let error = Pvh::open(written(content).path(), None, "")
                .err()
                .unwrap()
                .to_string();
            assert!(error.contains(text), "{error}");
        }
        let error = Pvh::open(Path::new("/nonexistent"), None, "")
            .err()
            .unwrap()
            .to_string();
        assert!(
            error.starts_with("could not open kernel file '/nonexistent'"),
            "{error}"
        );
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let plain = written(&elf(b"code", false));
        let error = Pvh::open(plain.path(), None, "")
            .unwrap()
            .load(&machine())
            .unwrap_err();
        assert!(
            error.to_string().contains("without PVH ELF Note"),
            "{error}"
        );

        let big = written(&vec![0; 5 << 20]);
        let kernel = written(&elf(b"code", true));
        let pvh = Pvh::open(kernel.path(), Some(big.path()), "").unwrap();
        assert!(
            pvh.load(&machine())
                .unwrap_err()
                .to_string()
                .contains("does not fit")
        );

        let cut = written(&elf(b"code", true)[..0x900]);
        let error = Pvh::open(cut.path(), None, "")
            .unwrap()
            .load(&machine())
            .unwrap_err();
        assert!(
            error.to_string().starts_with("could not load kernel"),
            "{error}"
        );
        let line = "x".repeat(COMMAND_LINE_MAX);
        assert!(Pvh::open(kernel.path(), None, &line).is_err());
    }
}
