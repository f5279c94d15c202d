//! Multiboot kernels (version 0.6.96): an ELF file of 32 bits, or any file whose multiboot header
//! says where it goes; entered in flat 32-bit mode with EAX the magic and EBX at an info structure.
//!
//! Everything lies where QEMU puts it (`hw/i386/multiboot.c`): behind the kernel the list of
//! modules, the command lines, the modules; below 1 MiB the info and the memory table, which qboot
//! fills in. Modules are the files of `-initrd`, separated by commas, each with its arguments
//! behind a space.

use std::ops::Range;
use std::path::Path;

use super::elf::{self, Segment};
use super::ram::Ram;
use super::source::Source;
use super::{Entry, Selectors, e820};
use crate::vm::guest::Error as GuestError;

/// Why a file with a multiboot header is no kernel for this machine.
#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    /// As for any other ELF file.
    #[error("{0}")]
    Elf(#[from] elf::Error),
    /// Multiboot starts kernels in 32-bit mode.
    #[error("Cannot load x86-64 image, give a 32bit one.")]
    Wide,
    /// One of the header's addresses does not go with the others; its name.
    #[error("invalid {0} address")]
    Address(&'static str),
    /// The file ends before what the header promises.
    #[error("the file is truncated: the kernel at {0:#x} to {1:#x}, but it has {2} bytes")]
    Truncated(u64, u64, u64),
}

/// A multiboot header.
#[derive(Clone, Copy, Debug)]
pub(super) struct Header<'a> {
    /// Its offset in the file.
    at: usize,
    /// All of it.
    bytes: &'a [u8],
}

impl<'a> Header<'a> {
    /// Finds the header in the first 8 KiB of a file.
    pub(super) fn find(head: &'a [u8]) -> Option<Self> {
        let mut places = (0..LAST).step_by(4).map_while(|at| {
            let bytes = head.get(at..)?;
            (bytes.len() >= 12).then_some(Self { at, bytes })
        });
        places.find(|header| {
            let [magic, flags, sum] = [0, 4, 8].map(|at| header.word(at));
            magic == HEADER_MAGIC && magic.wrapping_add(flags).wrapping_add(sum) == 0
        })
    }

    /// Whether it says itself where the file goes.
    pub(super) fn has_addresses(&self) -> bool {
        self.word(4) & HAS_ADDRESSES != 0
    }

    /// Whether it asks for a graphics mode.
    pub(super) fn wants_graphics(&self) -> bool {
        self.word(4) & WANTS_GRAPHICS != 0
    }

    fn word(&self, at: usize) -> u32 {
        let bytes = self.bytes.get(at..).and_then(<[u8]>::first_chunk);
        bytes.map_or(0, |bytes| u32::from_le_bytes(*bytes))
    }

    /// What a file of `len` bytes fills, and its entry.
    fn addresses(&self, len: u64) -> Result<(Segment, u64), Error> {
        if self.bytes.len() < 32 {
            let at = self.at as u64;
            return Err(Error::Truncated(at, at + 32, len));
        }
        let [own, load, load_end, bss_end, entry] =
            [12, 16, 20, 24, 28].map(|at| u64::from(self.word(at)));
        let before = own
            .checked_sub(load)
            .ok_or(Error::Address("mh_load_addr"))?;
        let offset = (self.at as u64).checked_sub(before);
        let offset = offset.ok_or(Error::Address("mh_header_addr"))?;
        let file_len = match load_end {
            0 => len - offset.min(len),
            end => end
                .checked_sub(load)
                .ok_or(Error::Address("mh_load_end_addr"))?,
        };
        if offset + file_len > len {
            return Err(Error::Truncated(offset, offset + file_len, len));
        }
        let end = match bss_end {
            0 => load + file_len,
            end if end < load + file_len => return Err(Error::Address("mh_bss_end_addr")),
            end => end,
        };
        if !(load..end).contains(&entry) {
            return Err(Error::Address("mh_entry_addr"));
        }
        let segment = Segment {
            memory: load..end,
            offset,
            len: file_len,
        };
        Ok((segment, entry))
    }
}

/// What a kernel fills and where it starts.
pub(super) struct Kernel {
    segments: Vec<Segment>,
    entry: u64,
}

impl Kernel {
    /// Reads the kernel that `header` was found in.
    pub(super) fn read(header: &Header<'_>, source: &Source) -> Result<Self, Error> {
        if header.wants_graphics() {
            log::warn!("multiboot knows VBE. we don't.");
        }
        if header.has_addresses() {
            let (segment, entry) = header.addresses(source.len())?;
            return Ok(Self {
                segments: vec![segment],
                entry,
            });
        }
        let kernel = elf::Kernel::read(source.file())?;
        if kernel.is_wide() {
            return Err(Error::Wide);
        }
        Ok(Self {
            entry: kernel.entry()?,
            segments: kernel.segments,
        })
    }

    /// Loads the kernel and what it starts with.
    pub(super) fn load(
        &self,
        ram: &Ram<'_>,
        source: &Source,
        modules: &[Module],
        command_line: &str,
    ) -> Result<Entry, GuestError> {
        ram.fill(source, &self.segments, &RESERVED)?;
        let (Some(first), Some(last)) = (self.segments.first(), self.segments.last()) else {
            return Err(ram.failed("it is empty"));
        };
        // Offsets from the kernel's start are multiples of pages, whatever that start is.
        let base = first.memory.start;
        let list = base + page_up(last.memory.end - base);
        let mut strings = list + MODULE_LEN * modules.len() as u64;
        let line = format!("{} {command_line}", source.name());
        let mut reserved = line.len() as u64 + 1;
        if !modules.is_empty() {
            let lens = modules.iter().map(|module| module.text.len() as u64 + 1);
            reserved += lens.sum::<u64>();
        }
        let loader = strings + reserved;
        let mut at = base + page_up(loader + LOADER.len() as u64 + 1 - base);
        ram.check(&(list..at), &RESERVED)?;
        let mut table = Vec::new();
        for module in modules {
            let len = module.source.len();
            let end = at.saturating_add(len);
            ram.check(&(at..end), &RESERVED)?;
            ram.copy(&module.source, 0, len, at)?;
            // Checked: it is all below 4 GiB, for the kernel is.
            for word in [at, end, strings, 0] {
                table.extend((word as u32).to_le_bytes());
            }
            ram.write_string(&module.text, strings)?;
            strings += module.text.len() as u64 + 1;
            at = base + page_up(end - base);
        }
        ram.write(&table, list)?;
        ram.write_string(&line, strings)?;
        ram.write_string(LOADER, loader)?;

        let map = memory_map(&e820::table(ram.map()));
        ram.write(&map, MEMORY_MAP)?;
        let mut info = [0; INFO_LEN];
        for (at, value) in [
            (0, INFO_FLAGS),
            (4, LOWER_KIB),
            (8, ((ram.low_end().saturating_sub(e820::MIB)) >> 10) as u32),
            (12, BOOT_DEVICE),
            (16, strings as u32),
            (20, modules.len() as u32),
            (24, list as u32),
            (44, map.len() as u32),
            (48, MEMORY_MAP as u32),
            (64, loader as u32),
        ] {
            info[at..at + 4].copy_from_slice(&u32::to_le_bytes(value));
        }
        ram.write(&info, INFO)?;
        Ok(Entry {
            address: self.entry,
            eax: LOADER_MAGIC,
            ebx: INFO,
            ..Entry::flat(Selectors::FIRMWARE)
        })
    }
}

/// A file of `-initrd`.
pub(super) struct Module {
    source: Source,
    /// Its path and arguments.
    text: String,
}

impl Module {
    /// Opens the files named in `initrd`: separated by commas, a comma in a name written twice.
    pub(super) fn open_all(initrd: &Path) -> Result<Vec<Self>, GuestError> {
        let list = initrd.display().to_string();
        let mut modules = Vec::new();
        for text in split(&list) {
            let path = text.split(' ').next().unwrap_or_default();
            let source = Source::open(Path::new(path), "file")?;
            modules.push(Self { source, text });
        }
        Ok(modules)
    }
}

/// The parts between single commas; two commas are one of the text.
fn split(list: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut chars = list.chars().peekable();
    while let Some(c) = chars.next() {
        if c == ',' && chars.next_if_eq(&',').is_none() {
            parts.push(String::new());
        } else if let Some(part) = parts.last_mut() {
            part.push(c);
        }
    }
    parts
}

/// Rows of the memory map: the size of what follows in the row, address, length, type.
fn memory_map(table: &[e820::Entry]) -> Vec<u8> {
    let mut rows = Vec::new();
    for entry in table {
        rows.extend(20u32.to_le_bytes());
        rows.extend(entry.start.to_le_bytes());
        rows.extend(entry.len.to_le_bytes());
        rows.extend((entry.kind as u32).to_le_bytes());
    }
    rows
}

fn page_up(len: u64) -> u64 {
    len.next_multiple_of(0x1000)
}

/// The header begins before this offset.
const LAST: usize = 8192 - 48;
const HEADER_MAGIC: u32 = 0x1bad_b002;
const LOADER_MAGIC: u64 = 0x2bad_b002;
/// Flags of the header.
const WANTS_GRAPHICS: u32 = 4;
const HAS_ADDRESSES: u32 = 0x1_0000;
/// What the info says of itself: memory, boot device, command line, modules, map, loader.
const INFO_FLAGS: u32 = 0x24f;
const LOWER_KIB: u32 = 639;
/// The first hard disk, as QEMU says it.
const BOOT_DEVICE: u32 = 0x8000_ffff;
const LOADER: &str = "qemu";
const INFO_LEN: usize = 88;
const MODULE_LEN: u64 = 16;
/// Places below 1 MiB.
const MEMORY_MAP: u64 = 0x9000;
const INFO: u64 = 0x9500;
/// Both, and the MP table.
const RESERVED: [Range<u64>; 2] = [0x9000..0xa000, e820::EBDA..e820::EBDA_END];

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::vm::boot::specimen::{Class, elf};
    use crate::vm::boot::tests::{files, machine, open, processors, refusal};

    /// Addresses: of the header, of the file's first byte that is loaded, behind its last one,
    /// behind the zeros that follow, the entry.
    const ADDRESSES: [u32; 5] = [0x10_0040, 0x10_0000, 0x10_0800, 0x10_2001, 0x10_0080];

    /// A file whose header is at 0x140, loaded from offset 0x100 on.
    fn image(addresses: [u32; 5]) -> Vec<u8> {
        let mut file = vec![0; 0x900];
        let words = [HEADER_MAGIC, HAS_ADDRESSES, 0xe451_4ffe];
        for (n, word) in words.into_iter().chain(addresses).enumerate() {
            file[0x140 + 4 * n..][..4].copy_from_slice(&word.to_le_bytes());
        }
        file[0x100..0x10b].copy_from_slice(b"kernel code");
        file
    }

    /// A number of guest memory.
    fn word(map: &crate::vm::map::Map, at: u64) -> u64 {
        let mut bytes = [0; 4];
        map.read(at, &mut bytes).unwrap();
        u64::from(u32::from_le_bytes(bytes))
    }

    fn string(map: &crate::vm::map::Map, at: u64) -> String {
        let bytes = (at..).map(|at| {
            let mut byte = [0];
            map.read(at, &mut byte).unwrap();
            byte[0]
        });
        bytes
            .take_while(|byte| *byte != 0)
            .map(char::from)
            .collect()
    }

    #[test]
    fn a_kernel_is_loaded_with_all_it_needs() {
        let map = machine(4 << 20);
        let files = files(&image(ADDRESSES), Some(&[7; 5000]));
        let entry = open(&files, "quiet")
            .unwrap()
            .load(&map, &processors(1))
            .unwrap();
        let wanted = Entry {
            address: 0x10_0080,
            eax: 0x2bad_b002,
            ebx: 0x9500,
            ..Entry::flat(Selectors {
                code: 8,
                data: 0x10,
            })
        };
        assert_eq!(entry, wanted);
        assert_eq!(string(&map, 0x10_0000), "kernel code");
        let info = |at: u64| word(&map, INFO + at);
        assert_eq!(
            [info(0), info(4), info(8), info(12)],
            [0x24f, 639, 3 << 10, 0x8000_ffff]
        );
        // The list of modules is at the first page behind the kernel, the module two pages on.
        assert_eq!([info(20), info(24)], [1, 0x10_3000]);
        assert_eq!(
            [word(&map, 0x10_3000), word(&map, 0x10_3004)],
            [0x10_4000, 0x10_5388]
        );
        let name = |file: &tempfile::NamedTempFile| file.path().display().to_string();
        assert_eq!(word(&map, 0x10_3008), 0x10_3010);
        assert_eq!(
            string(&map, 0x10_3010),
            name(files.initrd.as_ref().unwrap())
        );
        assert_eq!(
            string(&map, info(16)),
            format!("{} quiet", name(&files.kernel))
        );
        assert_eq!(string(&map, info(64)), "qemu");
        assert_eq!([info(44), info(48)], [6 * 24, 0x9000]);
        assert_eq!(
            [0, 4, 12, 20].map(|at| word(&map, 0x9000 + at)),
            [20, 0, 0x9_fc00, 1]
        );
    }

    #[test]
    fn an_elf_file_goes_where_it_says() {
        let mut file = elf(Class::Elf32, b"kernel code", false);
        for (at, word) in [(0x400, HEADER_MAGIC), (0x408, 0xe452_4ffe)] {
            file[at..at + 4].copy_from_slice(&word.to_le_bytes());
        }
        let files = files(&file, None);
        let kernel = open(&files, "").unwrap();
        let entry = kernel.load(&machine(4 << 20), &processors(1)).unwrap();
        assert_eq!((entry.address, entry.eax), (0x10_0000, LOADER_MAGIC));

        let mut file = elf(Class::Elf64, b"kernel code", true);
        for (at, word) in [(0x400, HEADER_MAGIC), (0x408, 0xe452_4ffe)] {
            file[at..at + 4].copy_from_slice(&word.to_le_bytes());
        }
        let files = self::files(&file, None);
        let kernel = open(&files, "").unwrap();
        let entry = kernel.load(&machine(4 << 20), &processors(1)).unwrap();
        assert_eq!(
            (entry.address, entry.eax),
            (0x10_0010, 0),
            "by its PVH note"
        );
    }

    #[test]
    fn bad_headers_are_refused_with_a_reason() {
        for (at, value, words) in [
            (0, 0xf_ffff, "invalid mh_load_addr address"),
            (0, 0x10_0141, "invalid mh_header_addr address"),
            (2, 0x0f_ffff, "invalid mh_load_end_addr address"),
            (
                2,
                0x10_0801,
                "the file is truncated: the kernel at 0x100 to 0x901",
            ),
            (3, 0x10_07ff, "invalid mh_bss_end_addr address"),
            (3, 0x50_0000, "0x100000..0x500000 is not inside guest RAM"),
            (3, 0x40_0000, "0x400000..0x401000 is not inside guest RAM"),
            (4, 0x10_2001, "invalid mh_entry_addr address"),
        ] {
            let mut addresses = ADDRESSES;
            addresses[at] = value;
            let error = refusal(&image(addresses), None, "");
            assert!(error.contains("could not load kernel '"), "{error}");
            assert!(error.contains(words), "{at}: {error}");
        }
        let low = [0x9040, 0x9000, 0, 0, 0x9080];
        let error = refusal(&image(low), None, "");
        assert!(error.contains("overlaps"), "{error}");
        let error = refusal(&image(ADDRESSES), Some(&vec![0; 3 << 20]), "");
        assert!(error.contains("is not inside guest RAM"), "{error}");
        // Without its checksum it is no header.
        let mut file = image(ADDRESSES);
        file[0x148] ^= 1;
        assert!(refusal(&file, None, "").contains("invalid kernel header"));
    }

    #[test]
    fn modules_are_separated_by_single_commas() {
        assert_eq!(split("one x,two,,2,"), ["one x", "two,2", ""]);
        let error = Module::open_all(Path::new("/proc/self/none x,y"))
            .err()
            .unwrap();
        let error = error.to_string();
        assert!(
            error.starts_with("could not open file '/proc/self/none'"),
            "{error}"
        );
    }

    #[test]
    fn every_cut_is_an_error() {
        let file = image(ADDRESSES);
        for len in 0..file.len() {
            refusal(&file[..len], None, "");
        }
    }

    proptest! {
        #[test]
        fn bad_bytes_are_no_panic(
            changes in proptest::collection::vec((0x144usize..0x160, any::<u8>()), 1..10),
        ) {
            let mut file = image(ADDRESSES);
            for (at, byte) in changes {
                file[at] = byte;
            }
            // The checksum right again, or it is no header at all.
            let flags = u32::from_le_bytes(*file[0x144..].first_chunk().unwrap());
            let sum = 0u32.wrapping_sub(HEADER_MAGIC).wrapping_sub(flags);
            file[0x148..0x14c].copy_from_slice(&sum.to_le_bytes());
            let map = machine(4 << 20);
            let files = files(&file, Some(&[7; 5000]));
            let _ = open(&files, "").and_then(|kernel| kernel.load(&map, &processors(1)));
        }
    }
}
