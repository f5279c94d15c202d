//! A kernel of any format that is known, its initial RAM disk and its command line.
//!
//! Formats are tried in QEMU's order (`x86_load_linux`): bzImage, multiboot, PVH. Whatever the
//! format, the memory table and the MP table are those QEMU's firmware leaves.

use std::path::Path;

use super::command_line;
use super::mptable::{self, Processors};
use super::ram::{Ram, failed};
use super::source::Source;
use super::{Entry, bzimage, e820, elf, multiboot, pvh};
use crate::config::DiskConfig;
use crate::vm::guest::Error;
use crate::vm::map::Map;

/// What `-kernel`, `-initrd` and `-append` say, opened and checked.
pub(in crate::vm) struct Kernel {
    source: Source,
    format: Format,
    command_line: String,
}

enum Format {
    BzImage {
        kernel: bzimage::Kernel,
        initrd: Option<Source>,
    },
    Multiboot {
        kernel: multiboot::Kernel,
        modules: Vec<multiboot::Module>,
    },
    Pvh {
        kernel: elf::Kernel,
        entry: u64,
        initrd: Option<Source>,
    },
}

impl Kernel {
    /// Opens the files and recognises the kernel's format. `disks` are told to a kernel that
    /// takes them on its command line, behind `append`.
    pub(super) fn open(
        kernel: &Path,
        initrd: Option<&Path>,
        append: &str,
        disks: &[DiskConfig],
    ) -> Result<Self, Error> {
        let source = Source::open(kernel, "kernel file")?;
        let format = recognise(&source, initrd)?;
        let (command_line, most) = match &format {
            // QEMU has no such devices for it.
            Format::Multiboot { .. } => (append.to_owned(), pvh::COMMAND_LINE_MAX),
            Format::BzImage { kernel, .. } => (
                command_line::with_disks(append, disks),
                kernel.command_line_max(),
            ),
            Format::Pvh { .. } => (
                command_line::with_disks(append, disks),
                pvh::COMMAND_LINE_MAX,
            ),
        };
        if command_line.len() > most {
            return Err(Error::State(format!(
                "-append: {} bytes are too long for a kernel command line (at most {most})",
                command_line.len(),
            )));
        }
        Ok(Self {
            source,
            format,
            command_line,
        })
    }

    /// Loads everything into RAM.
    pub(super) fn load(&self, map: &Map, processors: &Processors) -> Result<Entry, Error> {
        let ram = Ram::new(map, self.source.name());
        let table = mptable::bytes(processors);
        ram.write(&table, e820::EBDA)?;
        let line = &self.command_line;
        match &self.format {
            Format::BzImage { kernel, initrd } => {
                kernel.load(&ram, &self.source, initrd.as_ref(), line)
            }
            Format::Multiboot { kernel, modules } => kernel.load(&ram, &self.source, modules, line),
            Format::Pvh {
                kernel,
                entry,
                initrd,
            } => pvh::load(&ram, &self.source, kernel, *entry, initrd.as_ref(), line),
        }
    }
}

fn recognise(source: &Source, initrd: Option<&Path>) -> Result<Format, Error> {
    let name = source.name();
    let open_initrd = || {
        let source = initrd.map(|path| Source::open(path, "initrd file"));
        // An empty one is none.
        Ok::<_, Error>(source.transpose()?.filter(|source| source.len() > 0))
    };
    let head = source.head(HEAD)?;
    if bzimage::Kernel::is_one(&head) {
        let kernel = bzimage::Kernel::read(&head, source.len());
        return Ok(Format::BzImage {
            kernel: kernel.map_err(|error| failed(name, error))?,
            initrd: open_initrd()?,
        });
    }
    let is_elf = head.starts_with(b"\x7fELF");
    if let Some(header) = multiboot::Header::find(&head) {
        match multiboot::Kernel::read(&header, source) {
            Ok(kernel) => {
                let modules = initrd.map(multiboot::Module::open_all).transpose()?;
                return Ok(Format::Multiboot {
                    kernel,
                    modules: modules.unwrap_or_default(),
                });
            }
            // It may have the other entry as well; QEMU does not look.
            Err(multiboot::Error::Wide) if is_pvh(source) => {}
            Err(error) => return Err(failed(name, error)),
        }
    }
    if !is_elf {
        return Err(Error::State(format!("invalid kernel header: '{name}'")));
    }
    let read = || {
        let kernel = elf::Kernel::read(source.file())?;
        let entry = kernel.pvh_entry()?;
        Ok((kernel, entry))
    };
    match read() {
        Ok((kernel, entry)) => Ok(Format::Pvh {
            kernel,
            entry,
            initrd: open_initrd()?,
        }),
        Err(elf::Error::NoEntry) => Err(Error::State(format!(
            "Error loading uncompressed kernel without PVH ELF Note: '{name}'"
        ))),
        Err(error) => Err(failed(name, error)),
    }
}

fn is_pvh(source: &Source) -> bool {
    elf::Kernel::read(source.file()).is_ok_and(|kernel| kernel.pvh_entry().is_ok())
}

/// Bytes of a file in which every format shows, as QEMU has it.
const HEAD: u64 = 8192;

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::vm::boot::command_line::tests::disk;
    use crate::vm::boot::specimen::{Class, elf};
    use crate::vm::boot::tests::{files, machine, processors, refusal};

    #[test]
    fn disks_are_told_to_a_kernel_that_takes_them() {
        let files = files(&elf(Class::Elf64, b"code", true), None);
        let kernel = Kernel::open(files.kernel.path(), None, "quiet", &[disk(7)]).unwrap();
        let map = machine(4 << 20);
        kernel.load(&map, &processors(1)).unwrap();
        let mut line = [0; 44];
        map.read(0x2_0000, &mut line).unwrap();
        assert_eq!(&line, b"quiet virtio_mmio.device=512@0xfeb00e00:12\0\0");
    }

    #[test]
    fn other_formats_are_told_apart() {
        let cases: [(&[u8], &str); 4] = [
            (&elf(Class::Elf64, b"code", false), "without PVH ELF Note"),
            (b"\x7fELF\x01", "the file is truncated"),
            (b"#!/bin/sh", "invalid kernel header"),
            (b"", "invalid kernel header"),
        ];
        for (content, text) in cases {
            let error = refusal(content, None, "");
            assert!(error.contains(text), "{error}");
        }
        let error = Kernel::open(Path::new("/proc/self/none"), None, "", &[])
            .err()
            .unwrap()
            .to_string();
        assert!(
            error.starts_with("could not open kernel file '/proc/self/none'"),
            "{error}"
        );
    }
}
