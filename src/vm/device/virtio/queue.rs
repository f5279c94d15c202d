//! Where a queue lies: by the legacy interface in one piece of memory, with the used ring at the next
//! multiple of an alignment (virtio 1.0 §2.4.2); by the present one in three pieces.

use vm_memory::{GuestAddress, GuestMemoryBackend};

use super::modern::Proposal;
use super::ring::{Broken, Result};
use super::{EVENT_IDX, Interface, Memory};

/// Where the guest has put its queue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Queue {
    /// Entries, 1 to 1024.
    pub(super) num: u32,
    /// Alignment of the used ring, bytes.
    pub(super) align: u32,
    /// Guest-physical address of the descriptors; 0: there is no queue yet.
    pub(super) desc: u64,
    /// Index of the next request to be taken.
    pub(super) last_avail: u16,
    /// By the present interface; without it they follow from the descriptors.
    pub(super) rings: Option<Rings>,
}

/// What the present interface says besides.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Rings {
    /// Guest-physical address of the available ring.
    pub(super) avail: u64,
    /// Guest-physical address of the used ring.
    pub(super) used: u64,
    /// The queue is to be used (QueueReady).
    pub(super) is_ready: bool,
}

/// Default alignment of the used ring.
const ALIGN: u32 = 4096;
/// Bytes of a descriptor.
pub(super) const DESCRIPTOR: u64 = 16;

impl Queue {
    /// A queue of so many entries that is nowhere yet.
    pub(super) fn new(num: u32, interface: Interface) -> Self {
        Self {
            num,
            align: ALIGN,
            desc: 0,
            last_avail: 0,
            rings: (interface == Interface::Modern).then(Rings::default),
        }
    }

    /// This queue after a reset of the device.
    pub(super) fn at_reset(&self, num: u32) -> Self {
        Self {
            num,
            align: self.align,
            desc: 0,
            last_avail: 0,
            rings: self.rings.as_ref().map(|_| Rings::default()),
        }
    }

    /// Whether it is somewhere, and to be used.
    pub(super) fn is_set(&self) -> bool {
        self.desc != 0 && self.rings.as_ref().is_none_or(|rings| rings.is_ready)
    }

    /// Addresses of the available and of the used ring.
    pub(super) fn rings(&self) -> (u64, u64) {
        if let Some(rings) = &self.rings {
            return (rings.avail, rings.used);
        }
        let (num, align) = (u64::from(self.num), u64::from(self.align));
        let avail = self.desc.wrapping_add(num * DESCRIPTOR);
        let end = avail.wrapping_add(4 + 2 * num);
        (avail, end.wrapping_add(align - 1) & !(align - 1))
    }

    /// Goes where the guest has proposed; the next request stays the same.
    pub(super) fn accept(&mut self, proposal: &Proposal) {
        let [desc, avail, used] = [0, 1, 2].map(|part| proposal.address(part));
        self.desc = desc;
        self.rings = Some(Rings {
            avail,
            used,
            is_ready: true,
        });
    }

    /// Whether all of it is RAM.
    pub(super) fn check(&self, features: u64, memory: &Memory) -> Result {
        let num = u64::from(self.num);
        // Flags and index, and the index of an event.
        let head = if features & EVENT_IDX != 0 { 6 } else { 4 };
        let (avail, used) = self.rings();
        for (name, address, len) in [
            ("desc", self.desc, DESCRIPTOR * num),
            ("avail", avail, head + 2 * num),
            ("used", used, head + 8 * num),
        ] {
            if !memory.check_range(GuestAddress(address), len as usize) {
                return Err(Broken(format!("Cannot map {name} ring at {address:#x}")));
            }
        }
        Ok(())
    }
}
