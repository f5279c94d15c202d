//! Guest memory as a kernel's loader uses it: every piece is checked before it is written, and
//! what goes wrong is told with the kernel's name.

use std::ops::Range;

use vm_memory::{Bytes, GuestAddress};

use super::elf::Segment;
use super::source::Source;
use crate::vm::guest::Error;
use crate::vm::map::{HIGH_RAM, Map, RAM};

/// The memory of one machine, for one kernel.
pub(super) struct Ram<'a> {
    map: &'a Map,
    kernel: &'a str,
}

impl<'a> Ram<'a> {
    /// The memory of `map`, for the kernel of that name.
    pub(super) fn new(map: &'a Map, kernel: &'a str) -> Self {
        Self { map, kernel }
    }

    /// Where it all is.
    pub(super) fn map(&self) -> &'a Map {
        self.map
    }

    /// That the kernel could not be loaded.
    pub(super) fn failed(&self, why: impl std::fmt::Display) -> Error {
        failed(self.kernel, why)
    }

    /// Checks that a range is RAM, and free of what the loader itself needs.
    pub(super) fn check(&self, wanted: &Range<u64>, reserved: &[Range<u64>]) -> Result<(), Error> {
        let is_ram = self.map.windows().iter().any(|window| {
            let end = window.guest + window.len;
            window.block == RAM && window.guest <= wanted.start && wanted.end <= end
        });
        if !is_ram {
            return Err(self.failed(format_args!("{wanted:#x?} is not inside guest RAM")));
        }
        if reserved
            .iter()
            .any(|own| own.start < wanted.end && wanted.start < own.end)
        {
            return Err(self.failed(format_args!(
                "{wanted:#x?} overlaps the place of start info and command line"
            )));
        }
        Ok(())
    }

    /// Writes `bytes` at an address.
    pub(super) fn write(&self, bytes: &[u8], at: u64) -> Result<(), Error> {
        let written = self.map.memory().write_slice(bytes, GuestAddress(at));
        written.map_err(|error| self.failed(error))
    }

    /// Writes a string and the 0 behind it.
    pub(super) fn write_string(&self, text: &str, at: u64) -> Result<(), Error> {
        self.write(text.as_bytes(), at)?;
        self.write(&[0], at + text.len() as u64)
    }

    /// Reads `len` bytes at `offset` of a file to an address.
    pub(super) fn copy(
        &self,
        source: &Source,
        offset: u64,
        len: u64,
        at: u64,
    ) -> Result<(), Error> {
        let mut file = source.at(offset)?;
        let memory = self.map.memory();
        memory
            .read_exact_volatile_from(GuestAddress(at), &mut file, len as usize)
            .map_err(|error| self.failed(format_args!("'{}': {error}", source.name())))
    }

    /// Fills the memory of segments and returns where they end, as far as that is below 4 GiB.
    pub(super) fn fill(
        &self,
        source: &Source,
        segments: &[Segment],
        reserved: &[Range<u64>],
    ) -> Result<u64, Error> {
        for segment in segments {
            self.check(&segment.memory, reserved)?;
        }
        for segment in segments {
            let start = segment.memory.start;
            self.copy(source, segment.offset, segment.len, start)?;
            // A guest was here before, or a stream or a file brought what is there.
            self.clear(start + segment.len..segment.memory.end)?;
        }
        let ends = segments.iter().map(|segment| segment.memory.end);
        Ok(ends.filter(|end| *end < HIGH_RAM).max().unwrap_or(0))
    }

    /// Zeros memory, page by page, without touching what is zero already.
    pub(super) fn clear(&self, range: Range<u64>) -> Result<(), Error> {
        let memory = self.map.memory();
        let mut at = range.start;
        let mut seen = [0; ZEROS.len()];
        while at < range.end {
            let count = (range.end - at).min(ZEROS.len() as u64) as usize;
            memory
                .read_slice(&mut seen[..count], GuestAddress(at))
                .map_err(|error| self.failed(error))?;
            if seen[..count] != ZEROS[..count] {
                self.write(&ZEROS[..count], at)?;
            }
            at += count as u64;
        }
        Ok(())
    }

    /// Where RAM below 4 GiB ends.
    pub(super) fn low_end(&self) -> u64 {
        let low = self.map.windows().iter();
        let low = low.filter(|window| window.block == RAM && window.guest < HIGH_RAM);
        low.map(|w| w.guest + w.len).max().unwrap_or(0)
    }

    /// Places an initial RAM disk as QEMU does, page-aligned as high as it can be: its end at most
    /// at `last`, the last address a kernel can reach, and in RAM below 4 GiB. Returns where it is;
    /// it must not begin below `kernel_end`.
    pub(super) fn place_initrd(
        &self,
        initrd: &Source,
        last: u64,
        kernel_end: u64,
    ) -> Result<u64, Error> {
        let len = initrd.len();
        let last = last.min(self.low_end().saturating_sub(1));
        if len >= last {
            return Err(self.failed(format_args!(
                "initrd is too large, cannot support.(max: {last}, need {len})"
            )));
        }
        let at = (last - len) & !0xfff;
        if at < kernel_end.max(1 << 20) {
            return Err(Error::State(format!(
                "the initrd of {len} bytes does not fit into guest memory behind kernel '{}'",
                self.kernel
            )));
        }
        self.copy(initrd, 0, len, at)?;
        Ok(at)
    }
}

/// That the kernel of that name could not be loaded.
pub(super) fn failed(kernel: &str, why: impl std::fmt::Display) -> Error {
    Error::State(format!("could not load kernel '{kernel}': {why}"))
}

const ZEROS: &[u8] = &[0; 4096];
