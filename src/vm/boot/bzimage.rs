//! Linux kernels as bzImage: setup code and header in front, behind them the protected-mode code
//! that unpacks the kernel, which goes to 1 MiB.
//!
//! QEMU has its firmware run the setup code, which asks the BIOS for memory and display and leaves
//! the answers in the zero page. There is no BIOS here: the zero page is filled as the setup code
//! fills it on top of qboot, and the protected-mode code is entered as the 32-bit boot protocol
//! says. Linux: Documentation/arch/x86/boot.rst and zero-page.rst; QEMU: `x86_load_linux`; qboot:
//! `parse_bzimage`.

use std::ops::Range;

use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::KernelLoader;
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, screen_info, setup_header};
use linux_loader::loader::bzimage::BzImage;
use vm_memory::{ByteValued, GuestAddress};

use super::e820;
use super::ram::Ram;
use super::source::Source;
use super::{Entry, Selectors};
use crate::vm::guest::Error as GuestError;

/// Why a file with the magic of a setup header is no kernel for this machine.
#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    /// The file ends before what it promises.
    #[error("invalid kernel header: {0} bytes are promised, but the file has {1}")]
    Truncated(u64, u64),
    /// A kernel from before boot protocol 2.02, or one that is loaded below 1 MiB.
    #[error(
        "boot protocol {0}.{1:02}, load flags {2:#x}: only kernels that are loaded at 1 MiB \
             by protocol 2.02 or later can be booted"
    )]
    Old(u16, u16, u8),
    /// The header ends before the fields that every kernel has.
    #[error("invalid kernel header: it ends at {0:#x}")]
    Short(usize),
    /// The entry is not in what is loaded.
    #[error("invalid kernel header: entry {0:#x} is not inside {1:#x?}")]
    Entry(u64, Range<u64>),
    /// No power of two.
    #[error("invalid kernel header: alignment {0:#x}")]
    Alignment(u32),
    /// Memory that no machine has.
    #[error("invalid kernel header: it starts with {1:#x} bytes at {0:#x}")]
    Start(u64, u32),
}

/// A checked setup header.
pub(super) struct Kernel {
    /// As in the file, without what does not belong to it.
    header: setup_header,
    /// What the protected-mode code fills.
    code: Range<u64>,
    /// What the kernel needs until it has found out what memory there is.
    start: Range<u64>,
}

impl Kernel {
    /// Whether that is the start of a bzImage.
    pub(super) fn is_one(head: &[u8]) -> bool {
        head.get(MAGIC_AT..MAGIC_AT + 4) == Some(b"HdrS")
    }

    /// Reads the header of a file of `len` bytes that starts with `head`, which holds all of the
    /// setup header unless the file ends there.
    pub(super) fn read(head: &[u8], len: u64) -> Result<Self, Error> {
        let whole = HEADER_AT + size_of::<setup_header>();
        let Some(bytes) = head.get(HEADER_AT..whole) else {
            return Err(Error::Truncated(whole as u64, len));
        };
        // The jump over the header tells where it ends; what follows is code, not fields.
        let end = MAGIC_AT + usize::from(head[MAGIC_AT - 1]);
        if end < SHORTEST_END {
            return Err(Error::Short(end));
        }
        let mut header = setup_header::default();
        let kept = end.min(whole) - HEADER_AT;
        header.as_mut_slice()[..kept].copy_from_slice(&bytes[..kept]);
        let version = header.version;
        if version < 0x202 || header.loadflags & LOADED_HIGH == 0 {
            return Err(Error::Old(version >> 8, version & 0xff, header.loadflags));
        }

        let setup_len = match header.setup_sects {
            0 => 5 * SECTOR,
            count => (u64::from(count) + 1) * SECTOR,
        };
        // The size of the code counts from 2.04 on; there may be more in the file: signatures.
        let promised = if version >= 0x204 {
            setup_len + u64::from(header.syssize) * 16
        } else {
            setup_len + 1
        };
        if promised.max(setup_len + 1) > len {
            return Err(Error::Truncated(promised, len));
        }
        let code = LOAD..LOAD + (len - setup_len);
        let entry = u64::from(header.code32_start);
        if !code.contains(&entry) || entry > u64::from(u32::MAX) {
            return Err(Error::Entry(entry, code));
        }
        let start = start(&header, &code)?;
        Ok(Self {
            header,
            code,
            start,
        })
    }

    /// Longest command line it takes, without the 0 at its end.
    pub(super) fn command_line_max(&self) -> usize {
        let most = if self.header.version >= 0x206 {
            self.header.cmdline_size as usize
        } else {
            255
        };
        most.min(COMMAND_LINE_LEN - 1)
    }

    /// Loads the kernel and what it starts with.
    pub(super) fn load(
        &self,
        ram: &Ram<'_>,
        source: &Source,
        initrd: Option<&Source>,
        command_line: &str,
    ) -> Result<Entry, GuestError> {
        for range in [&self.code, &self.start] {
            ram.check(range, &[])?;
        }
        BzImage::load(
            ram.map().memory(),
            Some(GuestAddress(LOAD)),
            &mut source.at(0)?,
            None,
        )
        .map_err(|error| ram.failed(error))?;
        ram.write_string(command_line, COMMAND_LINE)?;

        let mut header = self.header;
        header.type_of_loader = LOADER_QEMU;
        header.loadflags |= CAN_USE_HEAP;
        // Between the real-mode code and the command line, had the setup code been there.
        header.heap_end_ptr = (COMMAND_LINE - ZERO_PAGE - 0x200) as u16;
        header.cmd_line_ptr = COMMAND_LINE as u32;
        if let Some(initrd) = initrd {
            let last = if header.version >= 0x203 {
                u64::from(header.initrd_addr_max)
            } else {
                0x37ff_ffff
            };
            let behind = self.code.end.max(self.start.end);
            header.ramdisk_image = ram.place_initrd(initrd, last, behind)? as u32;
            // Checked when it was placed: it ends below 4 GiB.
            header.ramdisk_size = initrd.len() as u32;
        }
        let mut params = boot_params {
            hdr: header,
            // What the setup code makes of a BIOS without a display.
            screen_info: screen_info {
                orig_video_cols: 80,
                orig_video_lines: 25,
                orig_video_ega_bx: NO_EGA,
                ..Default::default()
            },
            ..Default::default()
        };
        let table = e820::table(ram.map());
        params.e820_entries = table.len() as u8;
        for (row, entry) in params.e820_table.iter_mut().zip(&table) {
            *row = boot_e820_entry {
                addr: entry.start,
                size: entry.len,
                r#type: entry.kind as u32,
            };
        }
        let params = BootParams::new(&params, GuestAddress(ZERO_PAGE));
        LinuxBootConfigurator::write_bootparams(&params, ram.map().memory())
            .map_err(|error| ram.failed(error))?;
        for (at, descriptor) in (GDT..).step_by(8).zip(DESCRIPTORS) {
            ram.write(&descriptor.to_le_bytes(), at)?;
        }
        Ok(Entry {
            address: u64::from(header.code32_start),
            esi: ZERO_PAGE,
            gdt: Some(GDT..GDT + 8 * DESCRIPTORS.len() as u64),
            ..Entry::flat(Selectors::LINUX)
        })
    }
}

/// The memory a kernel starts in: where it unpacks itself, and what it needs there.
fn start(header: &setup_header, code: &Range<u64>) -> Result<Range<u64>, Error> {
    let mut start = LOAD;
    if header.version >= 0x205 && header.relocatable_kernel != 0 {
        let align = header.kernel_alignment;
        if !align.is_power_of_two() {
            return Err(Error::Alignment(align));
        }
        start = start.next_multiple_of(u64::from(align));
    }
    if header.version < 0x20a {
        return Ok(start..start.max(code.end));
    }
    // A relocatable kernel goes no lower than where it would like to be.
    start = start.max(header.pref_address);
    let len = header.init_size;
    match start.checked_add(u64::from(len)) {
        Some(end) if end <= 1 << 32 => Ok(start..end),
        _ => Err(Error::Start(start, len)),
    }
}

/// Offsets in the file: the header, its magic, the end of the fields of protocol 2.02.
const HEADER_AT: usize = 0x1f1;
const MAGIC_AT: usize = 0x202;
const SHORTEST_END: usize = 0x22c;
const SECTOR: u64 = 512;
/// Bits of `loadflags`.
const LOADED_HIGH: u8 = 1;
const CAN_USE_HEAP: u8 = 0x80;
/// `type_of_loader`: QEMU.
const LOADER_QEMU: u8 = 0xb0;
/// `orig_video_ega_bx`: the question for an EGA had no answer.
const NO_EGA: u16 = 0x10;
/// Places: QEMU's for the real-mode code, the command line and the protected-mode code. Zero page
/// and descriptors lie where the setup code would, which has its zero page inside.
const ZERO_PAGE: u64 = 0x1_0000;
const GDT: u64 = 0x1_1000;
const COMMAND_LINE: u64 = 0x2_0000;
const COMMAND_LINE_LEN: usize = 0x1_0000;
const LOAD: u64 = 0x10_0000;
/// Flat code at selector 0x10, flat data at 0x18, marked as used.
const DESCRIPTORS: [u64; 4] = [0, 0, 0x00cf_9b00_0000_ffff, 0x00cf_9300_0000_ffff];

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vm_memory::Bytes;

    use super::*;
    use crate::vm::boot::tests::{files, machine, open, processors, refusal};

    /// The smallest file that is taken: protocol 2.15, one sector of setup code, 512 bytes of
    /// protected-mode code, which starts 0x10 bytes in.
    fn image() -> Vec<u8> {
        let mut file = vec![0; 3 * 512];
        for (at, bytes) in [
            (0x1f1, &[1][..]),
            (0x1f4, &[32]),
            (0x1fe, &[0x55, 0xaa, 0xeb, 0x6a]),
            (0x202, b"HdrS\x0f\x02"),
            (0x211, &[1]),
            (0x214, &[0x10, 0, 0x10, 0]),
            (0x22c, &[0xff, 0xff, 0xff, 0x7f]),
            (0x230, &[0, 0, 0x10, 0, 1]),
            (0x238, &[0xff, 7]),
            (0x260, &[0, 0x10]),
            (0x400, b"kernel code"),
        ] {
            file[at..at + bytes.len()].copy_from_slice(bytes);
        }
        file
    }

    fn changed(at: usize, bytes: &[u8]) -> String {
        let mut file = image();
        file[at..at + bytes.len()].copy_from_slice(bytes);
        refusal(&file, None, "")
    }

    #[test]
    fn a_kernel_is_loaded_with_all_it_needs() {
        let map = machine(4 << 20);
        let files = files(&image(), Some(&[7; 5000]));
        let kernel = open(&files, "console=ttyS0").unwrap();
        let entry = kernel.load(&map, &processors(2)).unwrap();
        let wanted = Entry {
            address: 0x10_0010,
            esi: 0x1_0000,
            gdt: Some(0x1_1000..0x1_1020),
            ..Entry::flat(Selectors {
                code: 0x10,
                data: 0x18,
            })
        };
        assert_eq!(entry, wanted);
        let mut code = [0; 11];
        map.read(0x10_0000, &mut code).unwrap();
        assert_eq!(&code, b"kernel code");
        let mut line = [0; 14];
        map.read(0x2_0000, &mut line).unwrap();
        assert_eq!(&line, b"console=ttyS0\0");
        assert_eq!(
            map.memory()
                .read_obj::<u8>(GuestAddress(0x3f_e000 + 4999))
                .unwrap(),
            7
        );

        // What Linux 6.1 showed of its zero page on QEMU 7.2, where it is not what a file says.
        let params: boot_params = map.memory().read_obj(GuestAddress(0x1_0000)).unwrap();
        let header = params.hdr;
        assert_eq!((header.type_of_loader, header.loadflags), (0xb0, 0x81));
        assert_eq!(
            ({ header.heap_end_ptr }, { header.cmd_line_ptr }),
            (0xfe00, 0x2_0000)
        );
        assert_eq!(
            ({ header.ramdisk_image }, { header.ramdisk_size }),
            (0x3f_e000, 5000)
        );
        assert_eq!(({ header.boot_flag }, { header.jump }), (0xaa55, 0x6aeb));
        assert_eq!(
            params.as_slice()[..16],
            *b"\0\0\0\0\0\0\0\x50\0\0\x10\0\0\0\x19\0"
        );
        assert_eq!(params.e820_entries, 6);
        let table = params.e820_table;
        assert_eq!(
            ({ table[0].addr }, { table[0].size }, { table[0].r#type }),
            (0, 0x9_fc00, 1)
        );
        assert_eq!(({ table[5].addr }, { table[5].size }), (1 << 20, 3 << 20));
        assert_eq!({ table[6].size }, 0);

        let mut pointer = [0; 4];
        map.read(0x9_fc00, &mut pointer).unwrap();
        assert_eq!(&pointer, b"_MP_");
    }

    #[test]
    fn what_is_not_a_field_stays_behind() {
        let mut file = image();
        // Protocol 2.02: its header ends where the fields of 2.03 begin.
        file[0x201] = 0x2a;
        file[0x206] = 2;
        let map = machine(4 << 20);
        let files = files(&file, None);
        open(&files, &"x".repeat(255))
            .unwrap()
            .load(&map, &processors(1))
            .unwrap();
        let header: setup_header = map.memory().read_obj(GuestAddress(0x1_01f1)).unwrap();
        assert_eq!({ header.version }, 0x202);
        assert_eq!(
            ({ header.initrd_addr_max }, { header.cmdline_size }),
            (0, 0)
        );
        let error = open(&files, &"x".repeat(256)).err().unwrap().to_string();
        assert!(
            error.contains("256 bytes are too long for a kernel command line (at most 255)"),
            "{error}"
        );
    }

    #[test]
    fn bad_headers_are_refused_with_a_reason() {
        for (at, bytes, words) in [
            (
                0x1f1,
                &[2][..],
                "2048 bytes are promised, but the file has 1536",
            ),
            (0x1f1, &[0], "3072 bytes are promised"),
            (0x1f4, &[33], "1552 bytes are promised"),
            (0x201, &[0x20], "it ends at 0x222"),
            (0x206, &[1], "boot protocol 2.01, load flags 0x1: only"),
            (0x211, &[0x80], "boot protocol 2.15, load flags 0x80: only"),
            (
                0x214,
                &[0, 2],
                "entry 0x100200 is not inside 0x100000..0x100200",
            ),
            (0x214, &[0xff; 4], "entry 0xffffffff is not inside"),
            (0x230, &[1, 0, 0x10], "alignment 0x100001"),
            (0x230, &[0, 0, 0], "alignment 0x0"),
            (
                0x258,
                &[0xff; 8],
                "it starts with 0x1000 bytes at 0xffffffffffffffff",
            ),
            (
                0x258,
                &[0, 0, 0x40],
                "0x400000..0x401000 is not inside guest RAM",
            ),
            (
                0x260,
                &[1, 0, 0x30],
                "0x100000..0x400001 is not inside guest RAM",
            ),
        ] {
            let error = changed(at, bytes);
            assert!(error.contains("could not load kernel '"), "{error}");
            assert!(error.contains(words), "{at:#x}: {error}");
        }
        let error = refusal(&image(), Some(&vec![0; 3 << 20]), "");
        assert!(
            error.contains("does not fit into guest memory behind kernel"),
            "{error}"
        );
        let error = refusal(&image(), Some(&vec![0; 5 << 20]), "");
        assert!(error.contains("(max: 4194303, need 5242880)"), "{error}");
        let error = refusal(&image(), None, &"x".repeat(2048));
        assert!(
            error.contains("2048 bytes are too long for a kernel command line (at most 2047)"),
            "{error}"
        );
    }

    #[test]
    fn every_cut_is_an_error() {
        let file = image();
        for len in 0..file.len() {
            let error = refusal(&file[..len], None, "");
            assert!(error.contains("kernel"), "{len}: {error}");
        }
    }

    proptest! {
        #[test]
        fn bad_bytes_are_no_panic(
            changes in proptest::collection::vec((0x1f1usize..0x270, any::<u8>()), 1..20),
        ) {
            let mut file = image();
            for (at, byte) in changes {
                file[at] = byte;
            }
            let map = machine(4 << 20);
            let files = files(&file, Some(&[7; 5000]));
            if let Ok(entry) = open(&files, "").and_then(|kernel| kernel.load(&map, &processors(1))) {
                prop_assert!((0x10_0000..0x40_0000).contains(&entry.address));
            }
        }
    }
}
