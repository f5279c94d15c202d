//! What the present interface has more than the legacy one (virtio 1.0 §4.2.2): what the guest
//! proposes before it is in force, and how that is on the wire.
//!
//! A guest writes features and a queue's place word by word; FEATURES_OK and QueueReady say that it
//! has finished. QEMU migrates the words too (`virtio_mmio/state` of hw/virtio/virtio-mmio.c).

use super::queue::Rings;
use super::registers::{QUEUES, Registers};
use super::section::{State, inconsistent};
use super::{VERSION_1, names, status};
use crate::vmstate::{Result, Subsection, Visitor, VmState};

/// What the guest has written and not said yet that it is to be used.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Proposal {
    /// Features, low word first.
    pub(super) features: [u32; 2],
    /// Entries of the queue.
    pub(super) num: u16,
    /// Descriptors, available ring, used ring; of each the low word first.
    pub(super) addresses: [u32; 6],
}

impl Proposal {
    /// Guest-physical address of descriptors (0), available ring (1) or used ring (2).
    pub(super) fn address(&self, part: usize) -> u64 {
        wide(self.addresses[2 * part], self.addresses[2 * part + 1])
    }
}

fn wide(low: u32, high: u32) -> u64 {
    u64::from(low) | u64::from(high) << 32
}

impl Registers {
    /// The status register after the guest has written it: the bit that says that features are
    /// agreed on does not come up if the guest wants one that is not offered, or no
    /// [`VERSION_1`], without which QEMU would look for the rings elsewhere when the guest comes
    /// to it. QEMU itself never refuses; a driver that does not look gets what is offered, as there.
    pub(super) fn negotiate(&mut self, written: u8, offered: u64) -> u8 {
        if written & status::FEATURES_OK == 0 || self.status & status::FEATURES_OK != 0 {
            return written;
        }
        let wanted = wide(self.proposal.features[0], self.proposal.features[1]);
        self.features = wanted & offered;
        let alien = wanted & !offered;
        if alien == 0 && wanted & VERSION_1 != 0 {
            return written;
        }
        log::debug!(
            "virtio-blk: features {wanted:#x} refused; not offered: {}",
            names(alien)
        );
        written & !status::FEATURES_OK
    }
}

/// Which subsections of the present interface have been walked. A stream that lacks one of them
/// comes from another interface.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Arrived {
    rings: bool,
    transport: bool,
}

/// What belongs to the slot and not to the device in it.
#[derive(Default)]
struct Transport {
    features: [u32; 2],
    queues: Vec<QueueState>,
}

impl VmState for Transport {
    const NAME: &'static str = "virtio_mmio";
    const VERSION: u32 = 1;
    const SUBSECTIONS: &'static [Subsection<Self>] = &[Subsection {
        name: "virtio_mmio/state",
        version: 1,
        needed: |_| true,
        fields: |s, v| {
            v.array("guest_features", &mut s.features)?;
            v.states("vqs", &mut s.queues)
        },
    }];

    fn fields(&mut self, _v: &mut dyn Visitor, _version: u32) -> Result {
        Ok(())
    }
}

/// A queue as the slot knows it.
#[derive(Clone, Default)]
struct QueueState {
    num: u16,
    is_ready: bool,
    addresses: [u32; 6],
}

impl VmState for QueueState {
    const NAME: &'static str = "virtio_mmio/queue_state";
    const VERSION: u32 = 1;

    fn fields(&mut self, v: &mut dyn Visitor, _version: u32) -> Result {
        v.number("num", &mut self.num)?;
        v.number("enabled", &mut self.is_ready)?;
        let [desc, avail, used] = [0..2, 2..4, 4..6];
        v.array("desc", &mut self.addresses[desc])?;
        v.array("avail", &mut self.addresses[avail])?;
        v.array("used", &mut self.addresses[used])
    }
}

/// The rings of a queue as the device knows it.
#[derive(Clone, Default)]
struct RingState {
    avail: u64,
    used: u64,
}

impl VmState for RingState {
    const NAME: &'static str = "virtqueue_state";
    const VERSION: u32 = 1;

    fn fields(&mut self, v: &mut dyn Visitor, _version: u32) -> Result {
        v.number("vring.avail", &mut self.avail)?;
        v.number("vring.used", &mut self.used)
    }
}

impl State {
    /// `virtio/virtqueues`. All queues but the first are those of no device; what a guest has
    /// written of them means nothing.
    pub(super) fn walk_rings(&mut self, v: &mut dyn Visitor) -> Result {
        let rings = of_this_machine(&mut self.queue.rings)?;
        let mut all = vec![RingState::default(); QUEUES as usize];
        (all[0].avail, all[0].used) = (rings.avail, rings.used);
        v.states("vq", &mut all)?;
        (rings.avail, rings.used) = (all[0].avail, all[0].used);
        self.arrived.rings = true;
        Ok(())
    }

    /// `virtio/extra_state`.
    pub(super) fn walk_transport(&mut self, v: &mut dyn Visitor) -> Result {
        let rings = of_this_machine(&mut self.queue.rings)?;
        let proposal = &mut self.registers.proposal;
        let mut transport = Transport {
            features: proposal.features,
            queues: vec![QueueState::default(); QUEUES as usize],
        };
        transport.queues[0] = QueueState {
            num: proposal.num,
            is_ready: rings.is_ready,
            addresses: proposal.addresses,
        };
        v.state("extra_state", &mut transport)?;
        proposal.features = transport.features;
        if let Some(queue) = transport.queues.first() {
            proposal.num = queue.num;
            proposal.addresses = queue.addresses;
            rings.is_ready = queue.is_ready;
        }
        self.arrived.transport = true;
        Ok(())
    }

    /// Whether a section was that of a slot with this machine's interface.
    pub(super) fn check_interface(&self) -> std::result::Result<(), String> {
        let has_arrived = self.arrived.rings && self.arrived.transport;
        match self.queue.rings.is_some() && !has_arrived {
            true => Err(
                "the source has virtio-mmio with force-legacy=on, this machine with \
                 force-legacy=off (start it without -global virtio-mmio.force-legacy=off)"
                    .to_owned(),
            ),
            false => Ok(()),
        }
    }
}

/// The rings, if slots have the present interface here as at the source.
fn of_this_machine(rings: &mut Option<Rings>) -> Result<&mut Rings> {
    rings.as_mut().ok_or_else(|| {
        inconsistent(
            "the source has virtio-mmio with force-legacy=off, this machine with force-legacy=on \
             (start it with -global virtio-mmio.force-legacy=off)"
                .to_owned(),
        )
    })
}
