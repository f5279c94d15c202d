//! Kernels with a PVH entry point: ELF files, loaded where they say, entered in flat 32-bit mode
//! with EBX at a start info that names memory map, command line and initial RAM disk.
//!
//! A kernel that wants memory which is not RAM, or which this loader needs below 1 MiB, is refused.
//! Xen's `start_info.h`.

use std::ops::Range;

use linux_loader::configurator::pvh::PvhBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::elf::start_info::{
    hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use vm_memory::GuestAddress;

use super::elf::Kernel;
use super::ram::Ram;
use super::source::Source;
use super::{Entry, Selectors, e820};
use crate::vm::guest::Error;

/// Loads a kernel whose PVH entry is `address`, and what it starts with.
pub(super) fn load(
    ram: &Ram<'_>,
    source: &Source,
    kernel: &Kernel,
    address: u64,
    initrd: Option<&Source>,
    command_line: &str,
) -> Result<Entry, Error> {
    let kernel_end = ram.fill(source, &kernel.segments, &RESERVED)?;
    ram.write_string(command_line, COMMAND_LINE)?;
    let table: Vec<_> = e820::table(ram.map()).iter().map(row).collect();
    let mut start = hvm_start_info {
        magic: START_MAGIC,
        version: 1,
        cmdline_paddr: COMMAND_LINE,
        memmap_paddr: MEMORY_TABLE,
        memmap_entries: table.len() as u32,
        ..Default::default()
    };
    let mut modules = Vec::new();
    if let Some(initrd) = initrd {
        modules.push(hvm_modlist_entry {
            paddr: ram.place_initrd(initrd, u64::MAX, kernel_end)?,
            size: initrd.len(),
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
    PvhBootConfigurator::write_bootparams(&params, ram.map().memory())
        .map_err(|error| ram.failed(error))?;
    Ok(Entry {
        address,
        ebx: START_INFO,
        ..Entry::flat(Selectors::FIRMWARE)
    })
}

fn row(entry: &e820::Entry) -> hvm_memmap_table_entry {
    hvm_memmap_table_entry {
        addr: entry.start,
        size: entry.len,
        type_: entry.kind as u32,
        reserved: 0,
    }
}

/// Longest command line.
pub(super) const COMMAND_LINE_MAX: usize = 0xffff;
/// Places below 1 MiB, as firmware would choose them.
const START_INFO: u64 = 0x6000;
const MODULES: u64 = 0x6040;
const MEMORY_TABLE: u64 = 0x7000;
const COMMAND_LINE: u64 = 0x2_0000;
/// All of these, and the MP table.
const RESERVED: [Range<u64>; 3] = [
    START_INFO..MEMORY_TABLE + 0x1000,
    COMMAND_LINE..COMMAND_LINE + COMMAND_LINE_MAX as u64 + 1,
    e820::EBDA..e820::EBDA_END,
];
const START_MAGIC: u32 = 0x336e_c578;

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;

    use super::*;
    use crate::vm::boot::specimen::{Class, elf};
    use crate::vm::boot::tests::{files, machine, open, processors, refusal};
    use crate::vm::map::FIRMWARE;

    #[test]
    fn a_kernel_is_loaded_with_all_it_needs() {
        let map = machine(4 << 20);
        let files = files(&elf(Class::Elf64, b"kernel code", true), Some(&[7; 5000]));
        let kernel = open(&files, "console=ttyS0").unwrap();
        for _ in 0..2 {
            let entry = kernel.load(&map, &processors(1)).unwrap();
            assert_eq!((entry.address, entry.ebx), (0x10_0010, START_INFO));
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
        let table: [hvm_memmap_table_entry; 6] = std::array::from_fn(|n| {
            let at = GuestAddress(start.memmap_paddr + n as u64 * 24);
            map.memory().read_obj(at).unwrap()
        });
        assert_eq!(start.memmap_entries, 6);
        assert_eq!(table.map(|e| e.type_), [1, 2, 4, 2, 2, 1]);
        assert_eq!((table[5].addr, table[5].size), (1 << 20, 3 << 20));
        // The firmware block is as it was: zeros.
        map.written()[FIRMWARE].drain(|_, _| panic!("firmware memory was written"));
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let content = elf(Class::Elf64, b"code", true);
        for (len, reason) in [
            (5 << 20, "initrd is too large, cannot support.(max: 4194303"),
            (3 << 20, "does not fit into guest memory behind kernel"),
        ] {
            let error = refusal(&content, Some(&vec![0; len]), "");
            assert!(error.contains(reason), "{error}");
        }
        // Physical address and size in memory of the only segment.
        for (address, size, reason) in [
            (
                0x3f_f000u64,
                0x1001u64,
                "0x3ff000..0x400001 is not inside guest RAM",
            ),
            (0xe_f000, 0x2000, "0xef000..0xf1000 is not inside guest RAM"),
            (0x5000, 0x1001, "0x5000..0x6001 overlaps the place of"),
            (0x9_f000, 0x1000, "0x9f000..0xa0000 overlaps the place of"),
        ] {
            let mut content = content.clone();
            content[64 + 24..][..8].copy_from_slice(&address.to_le_bytes());
            content[64 + 40..][..8].copy_from_slice(&size.to_le_bytes());
            content[0x810..0x814].copy_from_slice(&(address as u32).to_le_bytes());
            let error = refusal(&content, None, "");
            assert!(error.contains(reason), "{error}");
        }
        let error = refusal(&content, None, &"x".repeat(COMMAND_LINE_MAX + 1));
        assert!(error.contains("65536 bytes are too long"), "{error}");
    }
}
