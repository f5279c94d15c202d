//! Virtio devices on memory-mapped slots, virtio 1.0 §4.2: by the legacy interface of §4.2.4, or
//! by the present one.
//!
//! The microvm has eight slots of 512 bytes. A slot with nobody in it answers who makes it and
//! that it is empty. The first disk takes the last slot, the next one the slot before. Bytes on
//! the wire: spec/device-state.md §2.10.

mod config;
pub(crate) mod disk;
mod modern;
mod queue;
mod registers;
mod request;
mod ring;
pub(crate) mod section;
mod worker;

use std::sync::Arc;

use vm_memory::GuestMemoryMmap;

pub(crate) use self::disk::Disk;
use self::registers::Register;
pub(crate) use crate::config::{Interface, SLOT_BYTES, SLOTS, SLOTS_BASE};
use crate::vm::page_bits::WriteLog;

/// Guest memory as devices reach it; writes are marked.
type Memory = GuestMemoryMmap<WriteLog>;

/// The eight slots.
#[derive(Default)]
pub(crate) struct Slots {
    disks: [Option<Arc<Disk>>; SLOTS],
    interface: Interface,
}

impl Slots {
    /// Slots with those disks in them.
    pub(crate) fn new(disks: &[Arc<Disk>], interface: Interface) -> Self {
        let mut slots = Self {
            interface,
            ..Self::default()
        };
        for disk in disks {
            slots.disks[disk.slot()] = Some(Arc::clone(disk));
        }
        slots
    }

    /// Reads guest-physical memory, if it is theirs.
    pub(crate) fn read(&self, address: u64, data: &mut [u8]) -> bool {
        let Some((slot, offset)) = place(address) else {
            return false;
        };
        pieces(offset, data.len(), |at, range| {
            let value = match &self.disks[slot] {
                Some(disk) => disk.read(at, range.len()),
                None => Register::at(at, self.interface)
                    .map_or(0, |register| register.of_empty_slot(self.interface)),
            };
            let len = range.len();
            data[range].copy_from_slice(&value.to_le_bytes()[..len]);
        });
        true
    }

    /// Writes guest-physical memory, if it is theirs.
    pub(crate) fn write(&self, address: u64, data: &[u8]) -> bool {
        let Some((slot, offset)) = place(address) else {
            return false;
        };
        if let Some(disk) = &self.disks[slot] {
            pieces(offset, data.len(), |at, range| {
                let mut value = [0; 4];
                value[..range.len()].copy_from_slice(&data[range.clone()]);
                disk.write(at, range.len(), u32::from_le_bytes(value));
            });
        }
        true
    }
}

/// Slot, and offset in it.
fn place(address: u64) -> Option<(usize, u64)> {
    let offset = address.checked_sub(SLOTS_BASE)?;
    let slot = (offset / SLOT_BYTES) as usize;
    (slot < SLOTS).then_some((slot, offset % SLOT_BYTES))
}

/// Cuts an access into aligned ones of at most four bytes, as QEMU does; what reaches beyond the
/// slot is lost.
fn pieces(offset: u64, len: usize, mut access: impl FnMut(u64, std::ops::Range<usize>)) {
    let mut done = 0;
    while done < len && offset + (done as u64) < SLOT_BYTES {
        let at = offset + done as u64;
        let aligned = 1 << at.trailing_zeros().min(2);
        let rest = 1 << (len - done).ilog2();
        let size = usize::min(aligned, rest);
        access(at, done..done + size);
        done += size;
    }
}

/// Bits of the features word: number, and the name virtio gives it.
macro_rules! features {
    ($($(#[$doc:meta])* $name:ident = $bit:literal, $shown:literal;)*) => {
        $($(#[$doc])* const $name: u64 = 1 << $bit;)*
        const FEATURES: &[(u64, &str)] = &[$(($name, $shown)),*];
    };
}

features! {
    /// A request may have so many pieces.
    SEG_MAX = 2, "VIRTIO_BLK_F_SEG_MAX";
    /// There are cylinders, heads and sectors.
    GEOMETRY = 4, "VIRTIO_BLK_F_GEOMETRY";
    /// Nothing may be written.
    RO = 5, "VIRTIO_BLK_F_RO";
    /// There is a block size.
    BLK_SIZE = 6, "VIRTIO_BLK_F_BLK_SIZE";
    /// SCSI commands may be sent; each is answered with UNSUPP, as QEMU does.
    SCSI = 7, "VIRTIO_BLK_F_SCSI";
    /// There is a cache and a request that empties it.
    FLUSH = 9, "VIRTIO_BLK_F_FLUSH";
    /// There are sizes to which requests should be aligned.
    TOPOLOGY = 10, "VIRTIO_BLK_F_TOPOLOGY";
    /// The guest can switch the cache off.
    CONFIG_WCE = 11, "VIRTIO_BLK_F_CONFIG_WCE";
    /// Sectors can be given back.
    DISCARD = 13, "VIRTIO_BLK_F_DISCARD";
    /// Sectors can be made zero.
    WRITE_ZEROES = 14, "VIRTIO_BLK_F_WRITE_ZEROES";
    /// An interrupt when the ring runs empty, whatever else was said.
    NOTIFY_ON_EMPTY = 24, "VIRTIO_F_NOTIFY_ON_EMPTY";
    /// A request may lie in a table of its own.
    INDIRECT_DESC = 28, "VIRTIO_RING_F_INDIRECT_DESC";
    /// Either side says at which index it wants to be told.
    EVENT_IDX = 29, "VIRTIO_RING_F_EVENT_IDX";
    /// The present interface.
    VERSION_1 = 32, "VIRTIO_F_VERSION_1";
    /// Not offered: a queue can be reset alone. QEMU offers it and has no register for it.
    RING_RESET = 40, "VIRTIO_F_RING_RESET";
    /// Not offered: several queues.
    MQ = 12, "VIRTIO_BLK_F_MQ";
    /// Not offered: no rule where a request's header ends. (None is needed here either.)
    ANY_LAYOUT = 27, "VIRTIO_F_ANY_LAYOUT";
}

/// What a disk offers: what QEMU 7.2 and 10.0 show in the register.
const OFFERED: u64 = SEG_MAX
    | GEOMETRY
    | BLK_SIZE
    | SCSI
    | FLUSH
    | TOPOLOGY
    | CONFIG_WCE
    | DISCARD
    | WRITE_ZEROES
    | NOTIFY_ON_EMPTY
    | INDIRECT_DESC
    | EVENT_IDX;

/// What a disk with the present interface offers: what QEMU shows, but for [`RING_RESET`].
const OFFERED_MODERN: u64 = OFFERED & !(SCSI | NOTIFY_ON_EMPTY) | VERSION_1;

/// What a guest of QEMU's can have agreed to besides: QEMU does not compare with what it shows.
/// There is nothing to be done for any of it that is not done here.
const TOLERATED_MODERN: u64 = NOTIFY_ON_EMPTY | ANY_LAYOUT | RING_RESET;

/// What a disk offers.
fn offered(interface: Interface, is_read_only: bool) -> u64 {
    let common = match interface {
        Interface::Legacy => OFFERED,
        Interface::Modern => OFFERED_MODERN,
    };
    common | if is_read_only { RO } else { 0 }
}

/// What a guest that arrives can have agreed to, with a disk that offers those features.
fn acceptable(interface: Interface, offered: u64) -> u64 {
    match interface {
        Interface::Legacy => offered,
        Interface::Modern => offered | TOLERATED_MODERN,
    }
}

/// Names of all bits in `features`.
fn names(features: u64) -> String {
    let bits = (0..64).filter(|bit| features >> bit & 1 != 0);
    let names = bits.map(|bit| {
        let known = FEATURES.iter().find(|(known, _)| *known == 1 << bit);
        known.map_or_else(
            || format!("bit {bit}"),
            |(_, name)| format!("{name} (bit {bit})"),
        )
    });
    names.collect::<Vec<_>>().join(", ")
}

/// Bits of the status register.
mod status {
    /// The driver works.
    pub(super) const DRIVER_OK: u8 = 4;
    /// Guest and device agree about features.
    pub(super) const FEATURES_OK: u8 = 8;
    /// The device is broken.
    pub(super) const NEEDS_RESET: u8 = 64;
}

#[cfg(test)]
mod tests;
