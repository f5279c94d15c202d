//! The guest-physical memory map of the microvm, and access to memory by guest-physical address.
//!
//! RAM lies below 3 GiB, the rest of it at 4 GiB. The firmware block ends at 4 GiB, and its last
//! 128 KiB (or all of it) show a second time below 1 MiB, in front of the RAM there. Both places
//! are the same memory and can be written.

use std::io;
use std::sync::Arc;

use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
};

use super::kvm::Slot;
use super::memory::RamBlock;
use super::page_bits::{PageBits, WriteLog};

/// First address that is not RAM below 4 GiB, however much of it there is.
const LOW_RAM_END: u64 = 0xc000_0000;
/// Where the RAM above 3 GiB goes on.
pub(super) const HIGH_RAM: u64 = 1 << 32;
/// Most bytes of firmware shown below 1 MiB.
const LOW_FIRMWARE_MAX: u64 = 128 << 10;
const MIB: u64 = 1 << 20;

/// Index of the main RAM block.
pub(super) const RAM: usize = 0;
/// Index of the firmware block.
pub(super) const FIRMWARE: usize = 1;

/// Part of a RAM block at its place in guest-physical space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Window {
    /// First guest-physical address.
    pub(super) guest: u64,
    /// Bytes.
    pub(super) len: u64,
    /// Index of the block.
    pub(super) block: usize,
    /// Offset in the block.
    pub(super) offset: u64,
}

/// The windows for `ram` and `firmware` bytes, in order of address.
pub(super) fn layout(ram: u64, firmware: u64) -> Vec<Window> {
    let shadow = firmware.min(LOW_FIRMWARE_MAX);
    let mut windows = Vec::new();
    let mut add = |guest, end: u64, block, offset| {
        if end > guest {
            windows.push(Window {
                guest,
                len: end - guest,
                block,
                offset,
            });
        }
    };
    let low_end = ram.min(LOW_RAM_END);
    add(0, low_end.min(MIB - shadow), RAM, 0);
    add(MIB - shadow, MIB, FIRMWARE, firmware - shadow);
    add(MIB, low_end, RAM, MIB);
    add(HIGH_RAM - firmware, HIGH_RAM, FIRMWARE, 0);
    add(
        HIGH_RAM,
        HIGH_RAM + ram.saturating_sub(low_end),
        RAM,
        low_end,
    );
    windows
}

/// Guest-physical memory.
pub(super) struct Map {
    blocks: Vec<Arc<RamBlock>>,
    written: Vec<Arc<PageBits>>,
    windows: Vec<Window>,
    memory: GuestMemoryMmap<WriteLog>,
}

impl Map {
    /// Lays out the main block and the firmware block.
    pub(super) fn new(ram: Arc<RamBlock>, firmware: Arc<RamBlock>) -> io::Result<Self> {
        let windows = layout(ram.len(), firmware.len());
        let blocks = vec![ram, firmware];
        let written: Vec<Arc<PageBits>> = blocks
            .iter()
            .map(|block| Arc::new(PageBits::new(block.pages())))
            .collect();
        let regions = windows
            .iter()
            .map(|window| {
                let (block, bits) = (&blocks[window.block], &written[window.block]);
                let view = block.view(window.offset as usize, window.len as usize, bits)?;
                GuestRegionMmap::new(view, GuestAddress(window.guest))
                    .ok_or_else(|| io::Error::other("a memory window wraps around"))
            })
            .collect::<io::Result<Vec<_>>>()?;
        let memory = GuestMemoryMmap::from_regions(regions).map_err(io::Error::other)?;
        Ok(Self {
            blocks,
            written,
            windows,
            memory,
        })
    }

    /// RAM blocks: the main one, then the firmware.
    pub(super) fn blocks(&self) -> &[Arc<RamBlock>] {
        &self.blocks
    }

    /// Pages of each block that this program wrote through [`Self::memory`].
    pub(super) fn written(&self) -> &[Arc<PageBits>] {
        &self.written
    }

    /// Where the blocks appear, in order of address.
    pub(super) fn windows(&self) -> &[Window] {
        &self.windows
    }

    /// Bytes of RAM below 4 GiB and above.
    pub(super) fn ram(&self) -> [u64; 2] {
        let ram = self.blocks[RAM].len();
        let low = ram.min(LOW_RAM_END);
        [low, ram - low]
    }

    /// Guest memory by guest-physical address; writes are marked.
    pub(super) fn memory(&self) -> &GuestMemoryMmap<WriteLog> {
        &self.memory
    }

    /// KVM's slot for the window of that index.
    pub(super) fn slot(&self, index: usize) -> (Slot, &Arc<RamBlock>) {
        let window = &self.windows[index];
        let slot = Slot {
            number: index as u32,
            guest: window.guest,
            offset: window.offset,
            len: window.len,
        };
        (slot, &self.blocks[window.block])
    }

    /// Reads memory; `Err` holds the first address that is no RAM.
    pub(super) fn read(&self, address: u64, to: &mut [u8]) -> Result<(), u64> {
        let mut done = 0;
        while done < to.len() {
            let at = address.checked_add(done as u64).ok_or(u64::MAX)?;
            match self.memory.read(&mut to[done..], GuestAddress(at)) {
                Ok(count) if count > 0 => done += count,
                _ => return Err(at),
            }
        }
        Ok(())
    }

    /// Block, offset in it and host address of guest-physical RAM.
    pub(super) fn find(&self, address: u64) -> Option<(usize, Arc<RamBlock>, u64)> {
        let region = self.memory.find_region(GuestAddress(address))?;
        let log = (**region).bitmap();
        let offset = log.base() as u64 + (address - region.start_addr().0);
        let block = Arc::clone(log.block());
        Some((block.host() as usize + offset as usize, block, offset))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::memory::Backing;

    fn show(ram: u64, firmware: u64) -> Vec<(u64, u64, usize, u64)> {
        layout(ram, firmware)
            .iter()
            .map(|w| (w.guest, w.len, w.block, w.offset))
            .collect()
    }

    #[test]
    fn small_machine() {
        assert_eq!(
            show(64 << 20, 64 << 10),
            [
                (0, 0xf0000, RAM, 0),
                (0xf0000, 0x10000, FIRMWARE, 0),
                (MIB, 63 << 20, RAM, MIB),
                (0xffff_0000, 0x10000, FIRMWARE, 0),
            ]
        );
    }

    #[test]
    fn big_firmware_shows_its_end_below_one_mib() {
        let windows = show(16 << 20, 192 << 10);
        assert_eq!(windows[0], (0, 0xe0000, RAM, 0));
        assert_eq!(windows[1], (0xe0000, 0x20000, FIRMWARE, 0x10000));
        assert_eq!(windows[3], (0xfffd_0000, 0x30000, FIRMWARE, 0));
    }

    #[test]
    fn ram_beyond_three_gib_goes_on_at_four() {
        let windows = show(5 << 30, 64 << 10);
        assert_eq!(windows[2], (MIB, LOW_RAM_END - MIB, RAM, MIB));
        assert_eq!(windows[4], (HIGH_RAM, 2 << 30, RAM, LOW_RAM_END));
        assert_eq!(show(3 << 30, 64 << 10).len(), 4);
    }

    #[test]
    fn less_than_a_mib_of_ram() {
        assert_eq!(show(512 << 10, 64 << 10)[0], (0, 512 << 10, RAM, 0));
        assert_eq!(show(512 << 10, 64 << 10).len(), 3);
    }

    #[test]
    fn both_places_of_the_firmware_are_one_memory_and_writes_are_marked() {
        let block = |name, len| Arc::new(RamBlock::new(name, len, Backing::Anonymous).unwrap());
        let map = Map::new(block("microvm.ram", 2 << 20), block("pc.bios", 64 << 10)).unwrap();
        map.memory()
            .write_slice(b"abc", GuestAddress(0xf_2fff))
            .unwrap();
        let mut seen = [0; 3];
        map.read(0xffff_2fff, &mut seen).unwrap();
        assert_eq!(&seen, b"abc");
        let mut marked = Vec::new();
        map.written()[FIRMWARE].drain(|word, bits| marked.push((word, bits)));
        assert_eq!(marked, [(0, 0b1100)]);
        map.written()[RAM].drain(|_, _| panic!("RAM was not written"));

        let (host, block, offset) = map.find(0xffff_2fff).unwrap();
        assert_eq!((block.name(), offset), ("pc.bios", 0x2fff));
        assert_eq!(host, block.host() as usize + 0x2fff);
        let mut across = [0; 16];
        map.read(0xe_fff8, &mut across).unwrap();
        assert_eq!(map.read((2 << 20) - 4, &mut across), Err(2 << 20));
        assert!(map.find(2 << 20).is_none());
    }
}
