//! A small 32-bit kernel with a PVH entry that lives on a disk. What it does is in `disk.s`.
//!
//! It says `hmpsh guest disk features <bits>` and then a beacon `B <n>` for every round in which
//! two sectors were written and two read that hold what they should; `FAULT <what>` otherwise.
#![expect(unsafe_code, reason = "global_asm! and the symbol it defines")]

use std::arch::global_asm;
use std::path::Path;

use tempfile::NamedTempFile;

use super::journey::goes_on_for;
use super::kernel::{Class, pack};
use super::vmm::{Program, Setup, Vmm};

global_asm!(include_str!("disk.s"), options(att_syntax, raw));

// SAFETY: the assembly above defines the symbol: so many bytes that nothing ever writes.
unsafe extern "C" {
    safe static hmpsh_disk_kernel: [u8; 0x1000];
}

/// The kernel and an image for its disk, as files.
#[derive(Debug)]
pub(crate) struct DiskGuest {
    kernel: NamedTempFile,
    /// The disk.
    pub(crate) image: NamedTempFile,
}

impl DiskGuest {
    /// The kernel, and 1 MiB of zeros.
    pub(crate) fn new() -> Self {
        let kernel = NamedTempFile::new().unwrap();
        std::fs::write(kernel.path(), pack(Class::Elf32, &hmpsh_disk_kernel)).unwrap();
        let image = NamedTempFile::new().unwrap();
        image.as_file().set_len(1 << 20).unwrap();
        Self { kernel, image }
    }

    /// A machine with this guest and its disk; several of them share the image.
    pub(crate) fn setup(&self, program: Program) -> Setup {
        self.setup_on(program, &drive("d0", self.image.path(), ""))
    }

    /// The same on another `-drive`, with the id `d0`.
    pub(crate) fn setup_on(&self, program: Program, drive: &str) -> Setup {
        self.setup_named(program, "d0", drive)
    }

    /// The same with that id.
    pub(crate) fn setup_named(&self, program: Program, id: &str, drive: &str) -> Setup {
        let device = format!("virtio-blk-device,drive={id}");
        let setup = Setup::new(program).kernel(self.kernel.path());
        setup.args(&["-drive", drive, "-device", &device])
    }
}

/// Gives the machine a disk on that `-drive`, whose id is `d0`.
pub(crate) fn on_drive(setup: Setup, drive: &str) -> Setup {
    setup.args(&["-drive", drive, "-device", "virtio-blk-device,drive=d0"])
}

/// `-drive` of a raw image, with QEMU's locks on: it hands them over by itself.
pub(crate) fn drive(id: &str, image: &Path, more: &str) -> String {
    let image = image.display();
    format!("if=none,id={id},file={image},format=raw{more}")
}

/// The guest goes on at the last of `hosts`, for longer than it takes to read everything again.
#[track_caller]
pub(crate) fn goes_on(hosts: &[&Vmm]) {
    goes_on_for(hosts, 70);
}
