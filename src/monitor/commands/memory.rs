//! Memory as a whole: `info mtree`, `info ramblock`, `info memory_size_summary`, `memsave`,
//! `pmemsave`, `sum`, `gpa2hva`, `gva2gpa`.

use std::fmt::Write as _;
use std::fs::File;
use std::io::Write;

use crate::control::RamBlockInfo;
use crate::errno::Errno;
use crate::monitor::args::Args;
use crate::monitor::session::{Error, Session};
use crate::vm::machine::MapEntry;

/// `info mtree [-f] …`.
pub(crate) fn info_mtree(session: &mut Session, args: &Args) -> Result<(), Error> {
    let map = session.control.memory_map();
    let text = if args.flag("flatview") {
        flat(
            &map,
            session.control.cpus().len(),
            session.control.has_kvm(),
        )
    } else {
        tree(&map, session.control.cpus().len())
    };
    session.print(&text);
    Ok(())
}

/// `info ramblock`.
pub(crate) fn info_ramblock(session: &mut Session, _: &Args) -> Result<(), Error> {
    let text = ram_blocks(&session.control.ram_blocks());
    session.print(&text);
    Ok(())
}

/// `info memory_size_summary`.
pub(crate) fn info_memory_size_summary(session: &mut Session, _: &Args) -> Result<(), Error> {
    let size = session.control.memory_size();
    session.print(&format!("base memory: {size}\nplugged memory: 0\n"));
    Ok(())
}

/// `memsave addr size file`.
pub(crate) fn memsave(session: &mut Session, args: &Args) -> Result<(), Error> {
    let memory = session.control.virtual_memory(session.cpu)?;
    save(args, |address, bytes| memory.read(address, bytes))
}

/// `pmemsave addr size file`.
pub(crate) fn pmemsave(session: &mut Session, args: &Args) -> Result<(), Error> {
    let control = session.control.clone();
    save(args, |address, bytes| control.read_physical(address, bytes))
}

/// `sum addr size`.
pub(crate) fn sum(session: &mut Session, args: &Args) -> Result<(), Error> {
    let control = session.control.clone();
    let mut sum = 0;
    chunks(
        args.int("start")?.cast_unsigned(),
        args.int("size")?.cast_unsigned(),
        |address, bytes| control.read_physical(address, bytes),
        |bytes| {
            sum = bsd_sum(sum, bytes);
            Ok(())
        },
    )
    .map_err(|error| match error {
        Stopped::At(address) => Error::Refused(format!("Cannot access memory at {address:#x}")),
        Stopped::By(error) => error,
    })?;
    session.print(&format!("{sum:05}\n"));
    Ok(())
}

/// `gpa2hva addr`.
pub(crate) fn gpa2hva(session: &mut Session, args: &Args) -> Result<(), Error> {
    let address = args.int("addr")?.cast_unsigned();
    if let Some((host, region)) = session.control.host_address(address) {
        let line = format!("Host virtual address for {address:#x} ({region}) is {host:#x}\n");
        session.print(&line);
        return Ok(());
    }
    let is_mapped = session
        .control
        .memory_map()
        .iter()
        .any(|entry| !entry.is_port && (entry.start..=entry.end).contains(&address));
    Err(Error::Text(if is_mapped {
        format!("Memory at address {address:#x} is not RAM")
    } else {
        format!("No memory is mapped at address {address:#x}")
    }))
}

/// `gva2gpa addr`.
pub(crate) fn gva2gpa(session: &mut Session, args: &Args) -> Result<(), Error> {
    let address = args.int("addr")?.cast_unsigned();
    let memory = session.control.virtual_memory(session.cpu)?;
    let text = match memory.translate(address) {
        Some(physical) => format!("gpa: {}\n", hexadecimal(physical)),
        None => "Unmapped\n".to_owned(),
    };
    session.print(&text);
    Ok(())
}

/// Why memory was not walked to its end.
enum Stopped {
    /// This address can not be read.
    At(u64),
    /// What the bytes were for failed.
    By(Error),
}

fn save(args: &Args, read: impl Fn(u64, &mut [u8]) -> Result<(), u64>) -> Result<(), Error> {
    let (address, size) = (
        args.int("val")?.cast_unsigned(),
        args.int("size")?.cast_unsigned(),
    );
    let path = args.text("filename")?;
    let open = |error| Error::Refused(format!("Could not open '{path}': {}", Errno(&error)));
    let mut file = File::create(path).map_err(open)?;
    let write = |error| Error::Refused(format!("Could not write to '{path}': {}", Errno(&error)));
    chunks(address, size, read, |bytes| {
        file.write_all(bytes).map_err(write)
    })
    .map_err(|error| match error {
        Stopped::At(_) => Error::Refused(format!(
            "Invalid addr 0x{address:016x}/size {size} specified"
        )),
        Stopped::By(error) => error,
    })
}

/// Walks memory in pieces of bounded size.
fn chunks(
    mut address: u64,
    mut left: u64,
    read: impl Fn(u64, &mut [u8]) -> Result<(), u64>,
    mut take: impl FnMut(&[u8]) -> Result<(), Error>,
) -> Result<(), Stopped> {
    let mut buffer = vec![0; CHUNK];
    while left > 0 {
        let length = usize::try_from(left).unwrap_or(CHUNK).min(CHUNK);
        let piece = &mut buffer[..length];
        read(address, piece).map_err(Stopped::At)?;
        take(piece).map_err(Stopped::By)?;
        address = address.wrapping_add(length as u64);
        left -= length as u64;
    }
    Ok(())
}

/// The checksum of BSD's `sum`, going on from `sum`.
fn bsd_sum(sum: u16, bytes: &[u8]) -> u16 {
    bytes.iter().fold(sum, |sum, byte| {
        sum.rotate_right(1).wrapping_add((*byte).into())
    })
}

/// As C's `%#x`.
fn hexadecimal(value: u64) -> String {
    if value == 0 {
        "0".to_owned()
    } else {
        format!("{value:#x}")
    }
}

fn ram_blocks(blocks: &[RamBlockInfo]) -> String {
    let mut text = format!(
        "{:>24} {:>8}  {:>18} {:>18} {:>18} {:>18} {:>3}\n",
        "Block Name", "PSize", "Offset", "Used", "Total", "HVA", "RO"
    );
    for block in blocks {
        let page = binary_size(block.page_size);
        // Writing to a String can not fail.
        let _ = writeln!(
            text,
            "{:>24} {page:>8}  0x{:016x} 0x{:016x} 0x{:016x} 0x{:016x} {:>3}",
            block.name, block.offset, block.used, block.used, block.host, "rw"
        );
    }
    text
}

/// `4 KiB`, `2 MiB`.
fn binary_size(bytes: u64) -> String {
    match bytes.trailing_zeros() {
        zeros @ 30.. if bytes != 0 => format!("{} GiB", bytes >> zeros.min(30)),
        20.. if bytes != 0 => format!("{} MiB", bytes >> 20),
        10.. if bytes != 0 => format!("{} KiB", bytes >> 10),
        _ => format!("{bytes} B"),
    }
}

fn tree(map: &[MapEntry], cpus: usize) -> String {
    let mut text = String::new();
    for cpu in 0..cpus {
        text.push_str(&format!("address-space: cpu-memory-{cpu}\n"));
    }
    text.push_str(
        "address-space: memory\n  0000000000000000-ffffffffffffffff (prio 0, i/o): system\n",
    );
    let mut blocks: Vec<(&str, u64)> = Vec::new();
    for entry in map.iter().filter(|entry| !entry.is_port) {
        text.push_str(&format!("    {}\n", region(entry)));
        if let Some(offset) = entry.offset {
            let end = offset + (entry.end - entry.start);
            match blocks.iter_mut().find(|(name, _)| *name == entry.name) {
                Some((_, last)) => *last = end.max(*last),
                None => blocks.push((&entry.name, end)),
            }
        }
    }
    text.push_str("\naddress-space: I/O\n  0000000000000000-000000000000ffff (prio 0, i/o): io\n");
    for entry in map.iter().filter(|entry| entry.is_port) {
        text.push_str(&format!("    {}\n", region(entry)));
    }
    text.push('\n');
    for (name, end) in blocks {
        text.push_str(&format!(
            "memory-region: {name}\n  {:016x}-{end:016x} (prio 0, ram): {name}\n\n",
            0
        ));
    }
    text
}

fn flat(map: &[MapEntry], cpus: usize, has_kvm: bool) -> String {
    let mut text = String::from("FlatView #0\n AS \"I/O\", root: io\n Root memory region: io\n");
    let mut next = 0;
    let hole = |start: u64, end: u64| {
        let offset = if start == 0 {
            String::new()
        } else {
            format!(" @{start:016x}")
        };
        format!("  {start:016x}-{end:016x} (prio 0, i/o): io{offset}\n")
    };
    for entry in map.iter().filter(|entry| entry.is_port) {
        if entry.start > next {
            text.push_str(&hole(next, entry.start - 1));
        }
        text.push_str(&format!("  {}\n", region(entry)));
        next = entry.end.saturating_add(1);
    }
    if next <= LAST_PORT {
        text.push_str(&hole(next, LAST_PORT));
    }
    text.push_str("\nFlatView #1\n AS \"memory\", root: system\n");
    for cpu in 0..cpus {
        text.push_str(&format!(" AS \"cpu-memory-{cpu}\", root: system\n"));
    }
    text.push_str(" Root memory region: system\n");
    for entry in map.iter().filter(|entry| !entry.is_port) {
        let kvm = if has_kvm && entry.offset.is_some() {
            " KVM"
        } else {
            ""
        };
        text.push_str(&format!("  {}{kvm}\n", region(entry)));
    }
    text.push('\n');
    text
}

fn region(entry: &MapEntry) -> String {
    let offset = match entry.offset {
        None | Some(0) => String::new(),
        Some(offset) => format!(" @{offset:016x}"),
    };
    format!(
        "{:016x}-{:016x} (prio 0, {}): {}{offset}",
        entry.start, entry.end, entry.kind, entry.name
    )
}

/// Bytes read from the guest at a time.
const CHUNK: usize = 64 * 1024;

const LAST_PORT: u64 = 0xffff;

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(start: u64, end: u64, name: &str, offset: Option<u64>, is_port: bool) -> MapEntry {
        let kind = if offset.is_some() { "ram" } else { "i/o" };
        MapEntry {
            start,
            end,
            name: name.to_owned(),
            kind,
            offset,
            is_port,
        }
    }

    fn map() -> Vec<MapEntry> {
        vec![
            entry(0, 0xe_ffff, "microvm.ram", Some(0), false),
            entry(0xf_0000, 0xf_ffff, "pc.bios", Some(0), false),
            entry(0x10_0000, 0x7ff_ffff, "microvm.ram", Some(0x10_0000), false),
            entry(0xfec0_0000, 0xfec0_0fff, "ioapic", None, false),
            entry(0x3f8, 0x3ff, "serial", None, true),
        ]
    }

    #[test]
    fn flat_view_as_qemu_prints_it() {
        assert_eq!(
            flat(&map(), 1, true),
            "FlatView #0
 AS \"I/O\", root: io
 Root memory region: io
  0000000000000000-00000000000003f7 (prio 0, i/o): io
  00000000000003f8-00000000000003ff (prio 0, i/o): serial
  0000000000000400-000000000000ffff (prio 0, i/o): io @0000000000000400

FlatView #1
 AS \"memory\", root: system
 AS \"cpu-memory-0\", root: system
 Root memory region: system
  0000000000000000-00000000000effff (prio 0, ram): microvm.ram KVM
  00000000000f0000-00000000000fffff (prio 0, ram): pc.bios KVM
  0000000000100000-0000000007ffffff (prio 0, ram): microvm.ram @0000000000100000 KVM
  00000000fec00000-00000000fec00fff (prio 0, i/o): ioapic

"
        );
    }

    #[test]
    fn tree_ends_with_the_blocks() {
        let text = tree(&map(), 2);
        assert!(text.starts_with("address-space: cpu-memory-0\naddress-space: cpu-memory-1\n"));
        assert!(text.ends_with(
            "memory-region: microvm.ram\n  0000000000000000-0000000007ffffff (prio 0, ram): \
             microvm.ram\n\nmemory-region: pc.bios\n  0000000000000000-000000000000ffff (prio 0, \
             ram): pc.bios\n\n"
        ));
    }

    #[test]
    fn ram_blocks_as_qemu_prints_them() {
        let block = RamBlockInfo {
            name: "microvm.ram".to_owned(),
            page_size: 4096,
            offset: 0,
            used: 0x800_0000,
            host: 0x7fc6_9be0_0000,
        };
        assert_eq!(
            ram_blocks(&[block]),
            "              Block Name    PSize              Offset               Used              \
             Total                HVA  RO\n             microvm.ram    4 KiB  0x0000000000000000 \
             0x0000000008000000 0x0000000008000000 0x00007fc69be00000  rw\n"
        );
        assert_eq!(binary_size(2 << 20), "2 MiB");
        assert_eq!(binary_size(1 << 30), "1 GiB");
    }

    #[test]
    fn sums_as_qemu() {
        assert_eq!(bsd_sum(0, b"DCBA\x80\x7f\xff\0\\'\n\r \x7f\t\x1b"), 27450);
    }

    #[test]
    fn walks_in_pieces_and_stops() {
        let mut length = 0;
        let size = CHUNK as u64 * 2 + 5;
        let all = chunks(
            7,
            size,
            |_, _| Ok(()),
            |bytes| {
                length += bytes.len() as u64;
                Ok(())
            },
        );
        assert!(all.is_ok());
        assert_eq!(length, size);
        let stopped = chunks(0, 10, |_, _| Err(4), |_| Ok(()));
        assert!(matches!(stopped, Err(Stopped::At(4))));
    }
}
