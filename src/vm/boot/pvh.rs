//! Kernels with a PVH entry point: ELF files, loaded where they say, entered in flat 32-bit mode
//! with EBX at a start info that names memory map, command line and initial RAM disk.
//!
//! Other kernel formats are recognised and refused, and so is a kernel that wants memory which is
//! not RAM, or which this loader needs below 1 MiB.

mod elf;
#[cfg(test)]
pub(in crate::vm) mod specimen;

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::Path;

use linux_loader::configurator::pvh::PvhBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::elf::start_info::{
    hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use vm_memory::{Bytes, GuestAddress};

use self::elf::Kernel;
use super::Entry;
use crate::vm::guest::Error;
use crate::vm::map::{HIGH_RAM, Map, RAM};

/// A kernel, its initial RAM disk and its command line.
pub(in crate::vm) struct Pvh {
    file: File,
    name: String,
    kernel: Kernel,
    initrd: Option<(File, u64)>,
    command_line: String,
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
        let kernel = recognise(&mut file, &name)?;
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
            file,
            name,
            kernel,
            initrd,
            command_line: command_line.to_owned(),
        })
    }

    /// Loads everything into RAM.
    pub(super) fn load(&self, map: &Map) -> Result<Entry, Error> {
        let memory = map.memory();
        let kernel_end = self.load_segments(map)?;
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
            let at = self.place_initrd(map, kernel_end, *len)?;
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
            address: self.kernel.entry,
            start_info: START_INFO,
        })
    }

    /// Fills the kernel's memory and returns where it ends, as far as it lies below 4 GiB.
    fn load_segments(&self, map: &Map) -> Result<u64, Error> {
        let segments = &self.kernel.segments;
        for segment in segments {
            let wanted = &segment.memory;
            let is_ram = map.windows().iter().any(|window| {
                let end = window.guest + window.len;
                window.block == RAM && window.guest <= wanted.start && wanted.end <= end
            });
            if !is_ram {
                return Err(self.failed(&format!("{wanted:#x?} is not inside guest RAM")));
            }
            if RESERVED
                .iter()
                .any(|own| own.start < wanted.end && wanted.start < own.end)
            {
                return Err(self.failed(&format!(
                    "{wanted:#x?} overlaps the place of start info and command line"
                )));
            }
        }
        let mut file = self.own(&self.file)?;
        for segment in segments {
            let (start, len) = (segment.memory.start, segment.len);
            file.seek(SeekFrom::Start(segment.offset))
                .map_err(|error| self.failed(&error.to_string()))?;
            map.memory()
                .read_exact_volatile_from(GuestAddress(start), &mut file, len as usize)
                .map_err(|error| self.failed(&error.to_string()))?;
            // A guest was here before, or a stream or a file brought what is there.
            self.clear(map, start + len..segment.memory.end)?;
        }
        let below = segments.iter().map(|segment| segment.memory.end);
        Ok(below.filter(|end| *end < HIGH_RAM).max().unwrap_or(0))
    }

    /// Zeros memory, page by page, without touching what is zero already.
    fn clear(&self, map: &Map, range: Range<u64>) -> Result<(), Error> {
        let mut at = range.start;
        let mut seen = [0; ZEROS.len()];
        while at < range.end {
            let count = (range.end - at).min(ZEROS.len() as u64) as usize;
            let mut clear = |at| {
                map.memory().read_slice(&mut seen[..count], at)?;
                if seen[..count] != ZEROS[..count] {
                    map.memory().write_slice(&ZEROS[..count], at)?;
                }
                Ok::<_, vm_memory::GuestMemoryError>(())
            };
            clear(GuestAddress(at)).map_err(|error| self.failed(&error.to_string()))?;
            at += count as u64;
        }
        Ok(())
    }

    /// The initial RAM disk goes as high as it can below 3 GiB, page-aligned.
    fn place_initrd(&self, map: &Map, kernel_end: u64, len: u64) -> Result<u64, Error> {
        let low = map
            .windows()
            .iter()
            .filter(|w| w.block == RAM && w.guest < HIGH_RAM);
        let end = low.map(|w| w.guest + w.len).max().unwrap_or(0);
        let at = end
            .checked_sub(len)
            .map(|at| at & !0xfff)
            .filter(|at| *at >= kernel_end.max(1 << 20));
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
        failed(&self.name, why)
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

fn recognise(file: &mut File, name: &str) -> Result<Kernel, Error> {
    let mut head = Vec::new();
    file.by_ref()
        .take(8192)
        .read_to_end(&mut head)
        .map_err(|source| Error::System {
            what: format!("could not read kernel '{name}'"),
            source,
        })?;
    let not_built = |what: &str| {
        Err(Error::State(format!(
            "{what} kernels ('{name}'): not built in this version"
        )))
    };
    let is_multiboot = head.chunks_exact(4).any(|word| word == MULTIBOOT_MAGIC);
    if head.starts_with(b"\x7fELF") {
        return match Kernel::read(file) {
            Ok(kernel) => Ok(kernel),
            Err(elf::Error::NoEntry) if is_multiboot => not_built("multiboot"),
            Err(elf::Error::NoEntry) => Err(Error::State(format!(
                "Error loading uncompressed kernel without PVH ELF Note: '{name}'"
            ))),
            Err(error) => Err(failed(name, &error.to_string())),
        };
    }
    if head.get(0x202..0x206) == Some(b"HdrS") {
        return not_built("bzImage");
    }
    if is_multiboot {
        return not_built("multiboot");
    }
    Err(Error::State(format!("invalid kernel header: '{name}'")))
}

fn failed(name: &str, why: &str) -> Error {
    Error::State(format!("could not load kernel '{name}': {why}"))
}

const ZEROS: &[u8] = &[0; 4096];
/// Places below 1 MiB, as firmware would choose them.
const START_INFO: u64 = 0x6000;
const MODULES: u64 = 0x6040;
const MEMORY_TABLE: u64 = 0x7000;
const COMMAND_LINE: u64 = 0x2_0000;
const COMMAND_LINE_MAX: usize = 0x1_0000;
/// All of these.
const RESERVED: [Range<u64>; 2] = [
    START_INFO..MEMORY_TABLE + 0x1000,
    COMMAND_LINE..COMMAND_LINE + COMMAND_LINE_MAX as u64,
];
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
    use crate::vm::boot::pvh::specimen::{Class, elf};
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
        let (kernel, initrd) = (
            written(&elf(Class::Elf64, b"kernel code", true)),
            written(&[7; 5000]),
        );
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
        let mut both = elf(Class::Elf32, b"code", false);
        both[0x400..0x404].copy_from_slice(&MULTIBOOT_MAGIC);
        let cases: [(&[u8], &str); 6] = [
            (&bz, "bzImage kernels"),
            (&multiboot, "multiboot kernels"),
            (&both, "multiboot kernels"),
            (&elf(Class::Elf64, b"code", false), "without PVH ELF Note"),
            (b"\x7fELF\x01", "the file is truncated"),
            (b"#!/bin/sh", "invalid kernel header"),
        ];
        for (content, text) in cases {
            let error = Pvh::open(written(content).path(), None, "")
                .err()
                .unwrap()
                .to_string();
            assert!(error.contains(text), "{error}");
        }
        let error = Pvh::open(Path::new("/proc/self/none"), None, "")
            .err()
            .unwrap()
            .to_string();
        assert!(
            error.starts_with("could not open kernel file '/proc/self/none'"),
            "{error}"
        );
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let big = written(&vec![0; 5 << 20]);
        let kernel = written(&elf(Class::Elf64, b"code", true));
        let pvh = Pvh::open(kernel.path(), Some(big.path()), "").unwrap();
        assert!(
            pvh.load(&machine())
                .unwrap_err()
                .to_string()
                .contains("does not fit")
        );

        // Physical address and size in memory of the only segment.
        for (address, size, reason) in [
            (
                0x3f_f000u64,
                0x1001u64,
                "0x3ff000..0x400001 is not inside guest RAM",
            ),
            (0xe_f000, 0x2000, "0xef000..0xf1000 is not inside guest RAM"),
            (
                0x5000,
                0x1001,
                "0x5000..0x6001 overlaps the place of start info",
            ),
        ] {
            let mut content = elf(Class::Elf64, b"code", true);
            content[64 + 24..][..8].copy_from_slice(&address.to_le_bytes());
            content[64 + 40..][..8].copy_from_slice(&size.to_le_bytes());
            content[0x810..0x814].copy_from_slice(&(address as u32).to_le_bytes());
            let file = written(&content);
            let error = Pvh::open(file.path(), None, "").and_then(|pvh| pvh.load(&machine()));
            let error = error.unwrap_err().to_string();
            assert!(error.contains(reason), "{error}");
        }
        let line = "x".repeat(COMMAND_LINE_MAX);
        assert!(Pvh::open(kernel.path(), None, &line).is_err());
    }
}
