//! RAM blocks: the memory a guest sees and the engine moves.
//!
//! A [`RamBlock`] owns one mapping, named as QEMU names it on the wire (`microvm.ram`, `pc.bios`).
//! Where a block appears in guest-physical space is the machine's business (`vm::map`). Pages are
//! handed out as [`Page`]: an address with a lifetime, because the guest may write at any instant.
//! This file is one of the rooms where `unsafe` may live.
#![expect(
    unsafe_code,
    reason = "guest memory is shared with the guest: raw pointers only"
)]

pub mod hash;

use std::io;
use std::marker::PhantomData;

use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;

use rustix::fs::{SeekFrom, fstatfs, seek};
use rustix::io::Errno;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, MmapRegion};

use super::page_bits::{PageBits, WriteLog};
use crate::iov::{In, Out};

/// Bytes of a page, on the wire and in the dirty log.
pub const PAGE_SIZE: usize = 4096;

/// Where a block's bytes live.
pub enum Backing {
    /// Private anonymous memory, huge pages where the host has them.
    Anonymous,
    /// A file or memfd; `share` makes guest writes visible in it.
    File {
        /// The file and the offset the block starts at.
        file: FileOffset,
        /// `MAP_SHARED` instead of `MAP_PRIVATE`.
        share: bool,
    },
}

/// One named piece of guest RAM, a multiple of [`PAGE_SIZE`] long.
#[derive(Debug)]
pub struct RamBlock {
    name: String,
    region: MmapRegion<()>,
    anonymous: bool,
    shared: bool,
}

impl RamBlock {
    /// Maps `len` bytes (a multiple of [`PAGE_SIZE`], not 0), all zero unless `backing` has content.
    pub fn new(name: &str, len: u64, backing: Backing) -> io::Result<Self> {
        let bytes = usize::try_from(len).map_err(io::Error::other)?;
        if bytes == 0 || !bytes.is_multiple_of(PAGE_SIZE) {
            return Err(io::Error::other(format!(
                "RAM block of {len} bytes is not whole pages"
            )));
        }
        let mut builder =
            MmapRegionBuilder::new(bytes).with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE);
        let anonymous = matches!(backing, Backing::Anonymous);
        let shared = matches!(backing, Backing::File { share: true, .. });
        builder = match backing {
            Backing::Anonymous => builder
                .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE),
            Backing::File { file, share } => builder.with_file_offset(file).with_mmap_flags(
                if share {
                    libc::MAP_SHARED
                } else {
                    libc::MAP_PRIVATE
                } | libc::MAP_NORESERVE,
            ),
        };
        let region = builder.build().map_err(io::Error::other)?;
        let block = Self {
            name: name.to_owned(),
            region,
            anonymous,
            shared,
        };
        if anonymous {
            // Advice only: without huge pages everything works, the first touch is slower.
            // SAFETY: the range is exactly the mapping made above.
            unsafe { libc::madvise(block.host().cast(), bytes, libc::MADV_HUGEPAGE) };
        }
        // Guest memory does not belong into core dumps. SAFETY: as above.
        unsafe { libc::madvise(block.host().cast(), bytes, libc::MADV_DONTDUMP) };
        Ok(block)
    }

    /// The block's name on the wire.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Length in bytes.
    #[expect(clippy::len_without_is_empty, reason = "a block is never empty")]
    pub fn len(&self) -> u64 {
        self.region.size() as u64
    }

    /// Length in pages.
    pub fn pages(&self) -> usize {
        self.region.size() / PAGE_SIZE
    }

    /// Whether untouched pages are known to be zero because nothing but this mapping backs them.
    pub fn is_anonymous(&self) -> bool {
        self.anonymous
    }

    /// Host address of the first byte, for KVM memory slots and `gpa2hva`.
    pub fn host(&self) -> *mut u8 {
        self.region.as_ptr()
    }

    /// A second view of `len` bytes from `offset` on, for vm-memory; writes through it are marked
    /// in `bits`.
    pub(super) fn view(
        self: &Arc<Self>,
        offset: usize,
        len: usize,
        bits: &Arc<PageBits>,
    ) -> io::Result<MmapRegion<WriteLog>> {
        if offset
            .checked_add(len)
            .is_none_or(|end| end > self.region.size())
        {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let log = WriteLog::new(Arc::clone(self), Arc::clone(bits), offset);
        let builder = MmapRegionBuilder::new_with_bitmap(len, log)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE);
        // SAFETY: offset + len lies within the mapping (checked above), and the log inside the
        // view holds the block, so that the mapping outlives it.
        unsafe { builder.with_raw_mmap_pointer(self.host().add(offset)) }
            .build()
            .map_err(io::Error::other)
    }

    /// Has the kernel provide these pages now; their content stays. Pages outside the block are
    /// ignored.
    pub fn populate(&self, pages: Range<usize>) {
        let end = pages.end.min(self.pages());
        if pages.start < end {
            let len = (end - pages.start) * PAGE_SIZE;
            // Advice only: without it the first touch provides the page.
            // SAFETY: start and end lie within the mapping.
            unsafe {
                let start = self.host().add(pages.start * PAGE_SIZE);
                libc::madvise(start.cast(), len, libc::MADV_POPULATE_WRITE);
            }
        }
    }

    /// Calls `found` with every run of pages that may differ from zero: those ever touched of
    /// anonymous memory and of a memfd, all of other memory. The others are not touched by it.
    pub fn populated(&self, mut found: impl FnMut(Range<usize>)) -> io::Result<()> {
        if let Some(file) = self.region.file_offset() {
            if self.shared && fstatfs(file.file())?.f_type == TMPFS_MAGIC {
                return self.scan_file(file, &mut found);
            }
            // A private page may be a changed copy, and what a file system calls a hole may have
            // been written a moment ago.
            found(0..self.pages());
            return Ok(());
        }
        match self.scan_pagemap(&mut found) {
            // Kernels before 6.7 do not know the request.
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOTTY | libc::EINVAL)) => {
                self.read_pagemap(&mut found)
            }
            result => result,
        }
    }

    fn scan_file(&self, file: &FileOffset, found: &mut impl FnMut(Range<usize>)) -> io::Result<()> {
        let start = file.start();
        let end = start + self.len();
        let mut at = start;
        while at < end {
            let data = match seek(file.file(), SeekFrom::Data(at)) {
                Ok(data) if data < end => data,
                // Nothing but a hole is left.
                Ok(_) | Err(Errno::NXIO) => break,
                Err(error) => return Err(error.into()),
            };
            let hole = seek(file.file(), SeekFrom::Hole(data))?.clamp(data + 1, end);
            let page = PAGE_SIZE as u64;
            found(((data - start) / page) as usize..(hole - start).div_ceil(page) as usize);
            at = hole;
        }
        Ok(())
    }

    fn scan_pagemap(&self, found: &mut impl FnMut(Range<usize>)) -> io::Result<()> {
        let pagemap = std::fs::File::open("/proc/self/pagemap")?;
        let start = self.host() as u64;
        let end = start + self.len();
        let mut regions = [PageRegion::default(); 256];
        let mut scan = PmScanArg {
            size: size_of::<PmScanArg>() as u64,
            start,
            end,
            vec: regions.as_mut_ptr() as u64,
            vec_len: regions.len() as u64,
            category_anyof_mask: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
            return_mask: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
            ..PmScanArg::default()
        };
        while scan.start < end {
            // SAFETY: the request reads and writes `scan` and writes at most vec_len of the regions.
            let count = unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN, &raw mut scan) };
            let count = usize::try_from(count).map_err(|_| io::Error::last_os_error())?;
            for region in &regions[..count.min(regions.len())] {
                let page = |address: u64| ((address - start) / PAGE_SIZE as u64) as usize;
                found(page(region.start)..page(region.end));
            }
            if scan.walk_end <= scan.start {
                return Err(io::Error::other("pagemap scan does not advance"));
            }
            scan.start = scan.walk_end;
        }
        Ok(())
    }

    fn read_pagemap(&self, found: &mut impl FnMut(Range<usize>)) -> io::Result<()> {
        let pagemap = std::fs::File::open("/proc/self/pagemap")?;
        let first = self.host() as u64 / PAGE_SIZE as u64;
        let mut entries = vec![0; 64 * 1024];
        let mut page = 0;
        while page < self.pages() {
            let len = entries.len().min((self.pages() - page) * 8);
            let read = rustix::io::pread(
                pagemap.as_fd(),
                &mut entries[..len],
                (first + page as u64) * 8,
            )?;
            if read < 8 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let mut run = page..page;
            for (index, entry) in entries[..read].chunks_exact(8).enumerate() {
                // Present or swapped out: the two top bits of a little-endian word.
                if entry[7] & 0xc0 != 0 {
                    if run.end != page + index {
                        run = page + index..page + index;
                    }
                    run.end += 1;
                } else if !run.is_empty() {
                    found(run.clone());
                    run = page..page;
                }
            }
            if !run.is_empty() {
                found(run);
            }
            page += read / 8;
        }
        Ok(())
    }

    /// The page with that index.
    ///
    /// # Panics
    /// When `index` is not below [`Self::pages`].
    #[inline]
    pub fn page(&self, index: usize) -> Page<'_> {
        assert!(
            index < self.pages(),
            "page {index} is outside {}",
            self.name
        );
        // SAFETY: index is below the number of pages, so the offset lies within the mapping.
        let at = unsafe { self.host().add(index * PAGE_SIZE) };
        Page {
            at,
            of: PhantomData,
        }
    }
}

/// One page of guest memory. The guest may change it at any time.
#[derive(Clone, Copy)]
pub struct Page<'a> {
    at: *mut u8,
    of: PhantomData<&'a RamBlock>,
}

impl<'a> Page<'a> {
    /// The page as bytes, for reading only, with the caveat of every user of live guest memory:
    /// a byte may change between two reads. All callers here treat the bytes as opaque and redo
    /// the page when the dirty log says that it changed.
    #[inline]
    fn bytes(&self) -> &'a [u8; PAGE_SIZE] {
        // SAFETY: the page lies in a live mapping of 'a and u8 has no invalid values. Concurrent
        // guest stores are outside the compiler's view, as with memory shared with a device; no
        // decision that memory safety rests on is taken from these bytes.
        unsafe { &*self.at.cast() }
    }

    /// Whether all 4096 bytes are zero.
    #[inline]
    pub fn is_zero(&self) -> bool {
        is_zero(self.bytes())
    }

    /// Has the first bytes brought into the cache, without waiting.
    #[inline]
    pub fn prefetch(&self) {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: a hint that reads nothing; SSE is part of the architecture.
        unsafe {
            std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(self.at.cast());
        }
    }

    /// The page's hash at that place (the engine's is the offset in all blocks).
    #[inline]
    pub fn hash(&self, place: u64) -> u64 {
        hash::page(self.bytes(), place)
    }

    /// The page as a piece for a gather write.
    #[inline]
    pub fn out(&self) -> Out<'a> {
        // SAFETY: the page is readable during 'a.
        unsafe { Out::from_raw(self.at, PAGE_SIZE) }
    }

    /// The page as room for a scatter read.
    #[inline]
    pub fn room(&self) -> In<'a> {
        // SAFETY: the page is writable during 'a and only ever reached through raw pointers.
        unsafe { In::from_raw(self.at, PAGE_SIZE) }
    }

    /// Copies the page's bytes out.
    pub fn read(&self, to: &mut [u8; PAGE_SIZE]) {
        // SAFETY: both spans are PAGE_SIZE long; `to` is exclusive and so does not overlap.
        unsafe { std::ptr::copy_nonoverlapping(self.at, to.as_mut_ptr(), PAGE_SIZE) };
    }

    /// Overwrites the page.
    pub fn write(&self, from: &[u8; PAGE_SIZE]) {
        // SAFETY: as for read, the other way round.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), self.at, PAGE_SIZE) };
    }

    /// Makes the page zero. A page that reads as zero already is left untouched, so that memory
    /// that was never populated stays so.
    pub fn clear(&self) {
        if !self.is_zero() {
            // SAFETY: the page is writable for PAGE_SIZE bytes.
            unsafe { std::ptr::write_bytes(self.at, 0, PAGE_SIZE) };
        }
    }
}

/// Whether all bytes of a page are zero.
#[inline]
pub fn is_zero(bytes: &[u8; PAGE_SIZE]) -> bool {
    // Most pages that are not zero say so in the first bytes, and those may have been prefetched.
    bytes[..8] == [0; 8]
        && bytes
            .chunks_exact(256)
            .all(|chunk| chunk.iter().fold(0, |all, byte| all | byte) == 0)
}

/// `struct pm_scan_arg` of linux/fs.h.
#[derive(Default)]
#[repr(C)]
struct PmScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// `struct page_region` of linux/fs.h.
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

const _: () = assert!(size_of::<PmScanArg>() == 96 && size_of::<PageRegion>() == 24);

/// What a memfd lives on, by `statfs(2)`.
const TMPFS_MAGIC: rustix::fs::FsWord = 0x0102_1994;
/// `_IOWR('f', 16, struct pm_scan_arg)`.
const PAGEMAP_SCAN: libc::c_ulong = 0xc060_6610;
const PAGE_IS_PRESENT: u64 = 1 << 3;
const PAGE_IS_SWAPPED: u64 = 1 << 4;

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use rustix::fs::{MemfdFlags, memfd_create};

    use super::*;

    fn populated(block: &RamBlock) -> Vec<usize> {
        let mut pages = Vec::new();
        block.populated(|run| pages.extend(run)).unwrap();
        pages
    }

    #[test]
    fn only_touched_pages_are_populated_by_either_way() {
        let block = RamBlock::new("test", 256 << 20, Backing::Anonymous).unwrap();
        assert!(populated(&block).is_empty());
        // Pages of the same and of different huge pages, and the last one.
        for page in [0, 1, 700, 5000, 65535] {
            block.page(page).write(&[1; PAGE_SIZE]);
        }
        let scanned = populated(&block);
        assert!(
            [0, 1, 700, 5000, 65535]
                .iter()
                .all(|page| scanned.contains(page))
        );
        assert!(scanned.len() <= 5 * 512, "at most one huge page each");
        let mut read = Vec::new();
        block.read_pagemap(&mut |run| read.extend(run)).unwrap();
        assert_eq!(read, scanned);
    }

    #[test]
    fn a_huge_untouched_block_is_looked_through_fast() {
        let block = RamBlock::new("test", 8 << 30, Backing::Anonymous).unwrap();
        block.page(12345).write(&[1; PAGE_SIZE]);
        let mut read = Vec::new();
        let start = Instant::now();
        block.read_pagemap(&mut |run| read.extend(run)).unwrap();
        let fallback = start.elapsed();
        assert_eq!(populated(&block), read);
        assert!(fallback.as_millis() < 1000, "{fallback:?} for 8 GiB");
    }

    #[test]
    fn only_touched_pages_of_a_memfd_are_populated() {
        let file = memfd_create("test", MemfdFlags::CLOEXEC).unwrap();
        let file = std::fs::File::from(file);
        file.set_len(64 << 20).unwrap();
        let share = |share| Backing::File {
            file: FileOffset::new(file.try_clone().unwrap(), 0),
            share,
        };
        let block = RamBlock::new("test", 64 << 20, share(true)).unwrap();
        assert!(populated(&block).is_empty());
        for page in [0, 1, 700, 16383] {
            block.page(page).write(&[1; PAGE_SIZE]);
        }
        assert_eq!(populated(&block), [0, 1, 700, 16383]);
        let private = RamBlock::new("test", 64 << 20, share(false)).unwrap();
        assert_eq!(populated(&private).len(), 16384);
    }

    #[test]
    fn a_file_is_populated_throughout() {
        // Where the sources are is no tmpfs, unlike, perhaps, the place for temporary files.
        let file = tempfile::tempfile_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        if fstatfs(&file).unwrap().f_type == TMPFS_MAGIC {
            return;
        }
        file.set_len(8 * PAGE_SIZE as u64).unwrap();
        let backing = Backing::File {
            file: FileOffset::new(file, 0),
            share: true,
        };
        let block = RamBlock::new("test", 8 * PAGE_SIZE as u64, backing).unwrap();
        assert_eq!(populated(&block), (0..8).collect::<Vec<_>>());
    }

    #[test]
    fn odd_lengths_are_refused() {
        assert!(RamBlock::new("test", 5000, Backing::Anonymous).is_err());
        assert!(RamBlock::new("test", 0, Backing::Anonymous).is_err());
    }
}
