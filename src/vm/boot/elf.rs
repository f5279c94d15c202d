//! ELF files of 32 and 64 bits as far as a kernel's loader needs them: the segments that become
//! memory, the entry, and the Xen note that names the PVH entry.
//!
//! Everything is checked here, before a byte of guest memory is written: a [`Kernel`] has its
//! segments in order, apart from each other, and all of their bytes in the file. Where RAM is, is
//! the caller's business. QEMU: include/hw/elf_ops.h, hw/i386/x86.c.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

/// A kernel that can be loaded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Kernel {
    /// What becomes memory, in order of address; at least one, none empty.
    pub(super) segments: Vec<Segment>,
    is_wide: bool,
    /// Physical address of the header's entry, wherever that is.
    entry: u64,
    /// Physical address in the PVH note, if there is one.
    pvh_entry: Option<u64>,
}

/// A piece of memory and where its first bytes are in the file; the rest of it is zero.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Segment {
    /// Physical addresses.
    pub(super) memory: Range<u64>,
    /// Offset in the file.
    pub(super) offset: u64,
    /// Bytes in the file, at most as many as in memory.
    pub(super) len: u64,
}

/// Why a file is no kernel for this machine.
#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    /// The file can not be read.
    #[error("{0}")]
    Read(#[from] io::Error),
    /// The file ends before what it promises.
    #[error("the file is truncated: {what} at {start:#x} to {end:#x}, but it has {len} bytes")]
    Truncated {
        /// What should be there.
        what: &'static str,
        /// Offset of its first byte.
        start: u64,
        /// Offset behind its last byte.
        end: u64,
        /// Length of the file.
        len: u64,
    },
    /// An ELF file of another kind of machine.
    #[error("not an ELF file for x86 (class {class}, byte order {order}, machine {machine})")]
    Foreign {
        /// 1: 32 bits, 2: 64 bits.
        class: u8,
        /// 1: little-endian, 2: big-endian.
        order: u8,
        /// 3: i386, 62: x86-64.
        machine: u16,
    },
    /// A header with a value that makes no sense.
    #[error("{0}")]
    Header(String),
    /// Two segments want the same memory.
    #[error("segments overlap: {first:#x?} and {second:#x?}")]
    Overlap {
        /// Physical addresses of one.
        first: Range<u64>,
        /// Physical addresses of the other.
        second: Range<u64>,
    },
    /// A kernel that does not know PVH.
    #[error("without PVH ELF Note")]
    NoEntry,
    /// Header or note name an address that the kernel does not fill.
    #[error("its {0} {1:#x} is not inside a loaded segment below 4 GiB")]
    Entry(&'static str, u64),
}

impl Kernel {
    /// Reads headers and notes of `file`.
    pub(super) fn read(file: &File) -> Result<Self, Error> {
        let file = Bounded {
            file,
            len: file.metadata()?.len(),
        };
        let Headers {
            is_wide,
            mut entry,
            headers,
        } = headers(&file)?;
        let mut segments = Vec::new();
        let mut pvh_entry = None;
        // The header's entry is a virtual address; the kernel starts without paging.
        let inside = |header: &ProgramHeader| {
            let offset = entry.checked_sub(header.virt)?;
            let is_inside = header.kind == PT_LOAD && offset < header.file_len;
            is_inside.then(|| header.address.wrapping_add(offset))
        };
        if let Some(physical) = headers.iter().find_map(inside) {
            entry = physical;
        }
        for header in headers {
            match header.kind {
                PT_LOAD if header.memory_len > 0 => segments.push(header.segment(&file)?),
                PT_NOTE if pvh_entry.is_none() => pvh_entry = note(&header, &file)?,
                _ => {}
            }
        }
        segments.sort_by_key(|segment| segment.memory.start);
        for pair in segments.windows(2) {
            if let [first, second] = pair
                && first.memory.end > second.memory.start
            {
                return Err(Error::Overlap {
                    first: first.memory.clone(),
                    second: second.memory.clone(),
                });
            }
        }
        Ok(Self {
            segments,
            is_wide,
            entry,
            pvh_entry,
        })
    }

    /// Whether it is a file of 64 bits.
    pub(super) fn is_wide(&self) -> bool {
        self.is_wide
    }

    /// Physical address of the PVH entry, inside a segment.
    pub(super) fn pvh_entry(&self) -> Result<u64, Error> {
        self.inside("PVH entry", self.pvh_entry.ok_or(Error::NoEntry)?)
    }

    /// Physical address of the header's entry, inside a segment.
    pub(super) fn entry(&self) -> Result<u64, Error> {
        self.inside("entry", self.entry)
    }

    fn inside(&self, what: &'static str, entry: u64) -> Result<u64, Error> {
        let is_inside = self.segments.iter().any(|s| s.memory.contains(&entry));
        if is_inside && entry <= u64::from(u32::MAX) {
            Ok(entry)
        } else {
            Err(Error::Entry(what, entry))
        }
    }
}

/// A file whose end is known.
struct Bounded<'a> {
    file: &'a File,
    len: u64,
}

impl Bounded<'_> {
    fn check(&self, what: &'static str, start: u64, len: u64) -> Result<(), Error> {
        let end = start.saturating_add(len);
        if end > self.len {
            return Err(Error::Truncated {
                what,
                start,
                end,
                len: self.len,
            });
        }
        Ok(())
    }

    /// The bytes at that place; the caller bounds `len`.
    fn bytes(&self, what: &'static str, start: u64, len: u64) -> Result<Vec<u8>, Error> {
        self.check(what, start, len)?;
        let mut bytes = vec![0; len as usize];
        self.file.read_exact_at(&mut bytes, start)?;
        Ok(bytes)
    }
}

/// What of a program header matters.
struct ProgramHeader {
    kind: u32,
    offset: u64,
    virt: u64,
    address: u64,
    file_len: u64,
    memory_len: u64,
    align: u64,
}

impl ProgramHeader {
    fn segment(&self, file: &Bounded<'_>) -> Result<Segment, Error> {
        let Self {
            offset,
            address,
            file_len,
            memory_len,
            ..
        } = *self;
        file.check("a segment", offset, file_len)?;
        let end = address.checked_add(memory_len);
        match end {
            Some(end) if file_len <= memory_len => Ok(Segment {
                memory: address..end,
                offset,
                len: file_len,
            }),
            _ => Err(Error::Header(format!(
                "a segment of {file_len:#x} bytes in the file and {memory_len:#x} in memory \
                 at {address:#x} is impossible"
            ))),
        }
    }
}

/// What of all headers matters.
struct Headers {
    is_wide: bool,
    entry: u64,
    headers: Vec<ProgramHeader>,
}

fn headers(file: &Bounded<'_>) -> Result<Headers, Error> {
    let ident = Words(file.bytes("the ELF header", 0, 20)?);
    let (class, order, machine) = (ident.0[4], ident.0[5], ident.half(18));
    let is_wide = match (class, order, machine) {
        (CLASS_32, LITTLE_ENDIAN, MACHINE_386) => false,
        (CLASS_64, LITTLE_ENDIAN, MACHINE_X86_64) => true,
        _ => {
            return Err(Error::Foreign {
                class,
                order,
                machine,
            });
        }
    };
    let header_len = if is_wide { 64 } else { 52 };
    let header = Words(file.bytes("the ELF header", 0, header_len)?);
    let (entry, table, size, count) = if is_wide {
        let (size, count) = (header.half(54), header.half(56));
        (header.quad(24), header.quad(32), size, count)
    } else {
        let (size, count) = (header.half(42), header.half(44));
        (header.word(24), header.word(28), size, count)
    };
    let expected = if is_wide { 56 } else { 32 };
    if size != expected || count == 0 || count > HEADERS_MAX {
        return Err(Error::Header(format!(
            "{count} program headers of {size} bytes; there should be 1 to {HEADERS_MAX} of \
             {expected}"
        )));
    }
    let len = u64::from(size) * u64::from(count);
    let table = file.bytes("the program headers", table, len)?;
    let headers = table.chunks_exact(usize::from(size)).map(|bytes| {
        let header = Words(bytes);
        let (fields, is_wide) = if is_wide {
            ([8, 16, 24, 32, 40, 48], true)
        } else {
            ([4, 8, 12, 16, 20, 28], false)
        };
        let [offset, virt, address, file_len, memory_len, align] = fields.map(|at| {
            if is_wide {
                header.quad(at)
            } else {
                header.word(at)
            }
        });
        ProgramHeader {
            kind: header.word(0) as u32,
            offset,
            virt,
            address,
            file_len,
            memory_len,
            align,
        }
    });
    Ok(Headers {
        is_wide,
        entry,
        headers: headers.collect(),
    })
}

/// The address in the Xen note of a note segment, if it holds one.
fn note(header: &ProgramHeader, file: &Bounded<'_>) -> Result<Option<u64>, Error> {
    if header.file_len > NOTES_MAX {
        return Err(Error::Header(format!(
            "notes of {:#x} bytes; there should be at most {NOTES_MAX:#x}",
            header.file_len
        )));
    }
    let notes = file.bytes("the notes", header.offset, header.file_len)?;
    let align = if header.align == 8 { 8 } else { 4 };
    let mut rest = &notes[..];
    // Lengths are words of 32 bits and the notes few: no sum here wraps around.
    while let Some((head, behind)) = rest.split_at_checked(12) {
        let head = Words(head);
        let (name_len, len, kind) = (head.word(0), head.word(4), head.word(8));
        let desc_at = (12 + name_len).next_multiple_of(align) - 12;
        let name = behind.get(..name_len as usize);
        let end = desc_at + len;
        let Some(desc) = behind.get(desc_at as usize..end as usize) else {
            return Err(Error::Header(
                "a note that is longer than all notes".to_owned(),
            ));
        };
        if name == Some(XEN) && kind == PHYS32_ENTRY {
            let desc = Words(desc);
            return match desc.0.len() {
                4 => Ok(Some(desc.word(0))),
                8 => Ok(Some(desc.quad(0))),
                len => Err(Error::Header(format!("a PVH ELF Note of {len} bytes"))),
            };
        }
        let next = (12 + end).next_multiple_of(align) - 12;
        rest = behind.get(next as usize..).unwrap_or_default();
    }
    Ok(None)
}

/// Little-endian numbers at their places; zero beyond the end.
struct Words<T>(T);

impl<T: AsRef<[u8]>> Words<T> {
    fn number<const N: usize>(&self, at: usize) -> [u8; N] {
        let bytes = self.0.as_ref().get(at..).and_then(<[u8]>::first_chunk);
        bytes.copied().unwrap_or([0; N])
    }

    fn half(&self, at: usize) -> u16 {
        u16::from_le_bytes(self.number(at))
    }

    fn word(&self, at: usize) -> u64 {
        u64::from(u32::from_le_bytes(self.number(at)))
    }

    fn quad(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.number(at))
    }
}

const CLASS_32: u8 = 1;
const CLASS_64: u8 = 2;
const LITTLE_ENDIAN: u8 = 1;
const MACHINE_386: u16 = 3;
const MACHINE_X86_64: u16 = 62;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
/// More program headers than any kernel has.
const HEADERS_MAX: u16 = 128;
/// More bytes of notes than any kernel has.
const NOTES_MAX: u64 = 1 << 20;
/// The note's owner, and its type: `XEN_ELFNOTE_PHYS32_ENTRY`.
const XEN: &[u8] = b"Xen\0";
const PHYS32_ENTRY: u64 = 18;

#[cfg(test)]
mod tests {
    use std::io::Write;

    use proptest::prelude::*;

    use super::*;
    use crate::vm::boot::specimen::{Class, elf};

    fn read(content: &[u8]) -> Result<Kernel, Error> {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(content).unwrap();
        Kernel::read(&file)
    }

    fn changed(class: Class, at: usize, bytes: &[u8]) -> String {
        let mut content = elf(class, b"kernel code", true);
        content[at..at + bytes.len()].copy_from_slice(bytes);
        read(&content)
            .and_then(|kernel| kernel.pvh_entry())
            .unwrap_err()
            .to_string()
    }

    #[test]
    fn both_classes_say_the_same() {
        for class in [Class::Elf32, Class::Elf64] {
            let kernel = read(&elf(class, b"kernel code", true)).unwrap();
            let segment = Segment {
                memory: 0x10_0000..0x30_000b,
                offset: 0x1000,
                len: 11,
            };
            assert_eq!(kernel.pvh_entry().unwrap(), 0x10_0010);
            assert_eq!(kernel.entry().unwrap(), 0x10_0000);
            assert_eq!(kernel.segments, [segment]);
        }
    }

    #[test]
    fn foreign_files_are_told_apart() {
        for (at, byte) in [(4, 1), (4, 3), (5, 2), (18, 183)] {
            let error = changed(Class::Elf64, at, &[byte]);
            assert!(error.starts_with("not an ELF file for x86 ("), "{error}");
        }
        let kernel = read(&elf(Class::Elf64, b"code", false)).unwrap();
        let error = kernel.pvh_entry().unwrap_err();
        assert!(matches!(error, Error::NoEntry), "{error}");
    }

    #[test]
    fn an_entry_may_be_virtual() {
        let mut content = elf(Class::Elf32, b"kernel code", true);
        // The entry; the virtual address of the first segment.
        content[24..28].copy_from_slice(&0xc010_0003u32.to_le_bytes());
        let error = read(&content).unwrap().entry().unwrap_err();
        assert!(
            matches!(error, Error::Entry("entry", 0xc010_0003)),
            "{error}"
        );
        content[52 + 8..52 + 12].copy_from_slice(&0xc010_0000u32.to_le_bytes());
        assert_eq!(read(&content).unwrap().entry().unwrap(), 0x10_0003);
    }

    #[test]
    fn impossible_headers_are_refused() {
        let huge = u64::MAX.to_le_bytes();
        // Offsets: the table, entry size, count; of the first header offset, address, lengths.
        for (at, bytes, words) in [
            (32, &huge[..], "truncated: the program headers"),
            (54, &[1, 0], "program headers of 1 bytes"),
            (56, &[0, 0], "0 program headers"),
            (56, &[0xff, 0xff], "65535 program headers"),
            (64 + 8, &huge, "truncated: a segment"),
            (64 + 24, &huge, "is impossible"),
            (64 + 32, &huge, "truncated: a segment"),
            (64 + 40, &[1, 0, 0], "is impossible"),
            (120 + 8, &huge, "truncated: the notes"),
            (120 + 32, &huge, "notes of 0xffffffffffffffff bytes"),
            (0x800, &[0xff; 4], "longer than all notes"),
            (0x804, &[0xff; 4], "longer than all notes"),
            (0x804, &[3], "PVH ELF Note of 3 bytes"),
            (0x810, &[0xff; 4], "PVH entry 0xffffffff is not inside"),
        ] {
            let error = changed(Class::Elf64, at, bytes);
            assert!(error.contains(words), "{at:#x}: {error}");
        }
        let error = changed(Class::Elf32, 52 + 20, &[1, 0, 0]);
        assert!(error.contains("is impossible"), "{error}");
    }

    #[test]
    fn overlapping_segments_are_refused() {
        let mut content = elf(Class::Elf64, b"kernel code", true);
        // A copy of the first header behind the notes', one byte before the first one's end.
        content[56..58].copy_from_slice(&3u16.to_le_bytes());
        content.copy_within(64..120, 176);
        content[176 + 24..176 + 32].copy_from_slice(&0x30_000au64.to_le_bytes());
        let error = read(&content).unwrap_err();
        assert!(matches!(error, Error::Overlap { .. }), "{error}");
        content[176 + 24..176 + 32].copy_from_slice(&0x30_000bu64.to_le_bytes());
        assert_eq!(read(&content).unwrap().segments.len(), 2);
    }

    #[test]
    fn every_cut_is_an_error() {
        for class in [Class::Elf32, Class::Elf64] {
            let content = elf(class, b"kernel code", true);
            for len in (0..0x900).chain([content.len() - 1]) {
                assert!(read(&content[..len]).is_err(), "{len}");
            }
        }
    }

    proptest! {
        #[test]
        fn bad_bytes_are_no_panic(
            is_wide: bool,
            changes in proptest::collection::vec((0usize..0x820, any::<u8>()), 1..20),
        ) {
            let class = if is_wide { Class::Elf64 } else { Class::Elf32 };
            let mut content = elf(class, b"kernel code", true);
            for (at, byte) in changes {
                content[at] = byte;
            }
            if let Ok(kernel) = read(&content) {
                for segment in kernel.segments {
                    prop_assert!(segment.len <= segment.memory.end - segment.memory.start);
                    prop_assert!(segment.offset + segment.len <= content.len() as u64);
                }
            }
        }
    }
}
