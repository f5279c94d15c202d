//! The registers of a slot: which there are, and those that only remember.

use super::modern::Proposal;
use crate::config::Interface;

/// A register, four bytes wide.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Register {
    Magic,
    Version,
    DeviceId,
    VendorId,
    HostFeatures,
    HostFeaturesSel,
    GuestFeatures,
    GuestFeaturesSel,
    GuestPageSize,
    QueueSel,
    QueueNumMax,
    QueueNum,
    QueueAlign,
    QueuePfn,
    QueueReady,
    QueueNotify,
    InterruptStatus,
    InterruptAck,
    Status,
    /// A half of where descriptors, available ring and used ring are: 0 to 5.
    QueueAddress(usize),
    ShmLen,
    ConfigGeneration,
}

/// Where the device's own configuration begins.
pub(super) const CONFIG: u64 = 0x100;
/// Offset of [`Register::QueueNotify`].
pub(super) const NOTIFY: u64 = 0x50;

impl Register {
    /// The register at an offset in the slot. Those of the other interface are not there.
    pub(super) fn at(offset: u64, interface: Interface) -> Option<Self> {
        let is_modern = interface == Interface::Modern;
        Some(match offset {
            0x28 | 0x3c | 0x40 if is_modern => return None,
            0x44 | 0x80..=0xa4 | 0xfc if !is_modern => return None,
            0x00 => Self::Magic,
            0x04 => Self::Version,
            0x08 => Self::DeviceId,
            0x0c => Self::VendorId,
            0x10 => Self::HostFeatures,
            0x14 => Self::HostFeaturesSel,
            0x20 => Self::GuestFeatures,
            0x24 => Self::GuestFeaturesSel,
            0x28 => Self::GuestPageSize,
            0x30 => Self::QueueSel,
            0x34 => Self::QueueNumMax,
            0x38 => Self::QueueNum,
            0x3c => Self::QueueAlign,
            0x40 => Self::QueuePfn,
            0x44 => Self::QueueReady,
            NOTIFY => Self::QueueNotify,
            0x60 => Self::InterruptStatus,
            0x64 => Self::InterruptAck,
            0x70 => Self::Status,
            0x80 => Self::QueueAddress(0),
            0x84 => Self::QueueAddress(1),
            0x90 => Self::QueueAddress(2),
            0x94 => Self::QueueAddress(3),
            0xa0 => Self::QueueAddress(4),
            0xa4 => Self::QueueAddress(5),
            0xb0 | 0xb4 => Self::ShmLen,
            0xfc => Self::ConfigGeneration,
            _ => return None,
        })
    }

    /// What a slot with nobody in it answers.
    pub(super) fn of_empty_slot(self, interface: Interface) -> u32 {
        match self {
            Self::Magic => MAGIC,
            Self::Version => match interface {
                Interface::Legacy => 1,
                Interface::Modern => 2,
            },
            Self::VendorId => VENDOR,
            _ => 0,
        }
    }
}

/// `virt`.
pub(super) const MAGIC: u32 = 0x7472_6976;
/// `QEMU`: a guest that moves must find the same.
pub(super) const VENDOR: u32 = 0x554d_4551;
/// A block device.
pub(super) const BLOCK: u32 = 2;
/// Queues that can be selected, though most do not exist, and most entries of one.
pub(super) const QUEUES: u32 = 1024;
/// Most entries of a queue.
pub(super) const ENTRIES: u32 = 1024;

/// Registers that are what the guest wrote last.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Registers {
    /// Which word of our features is shown.
    pub(super) host_features_sel: u32,
    /// Which word of its features the guest writes.
    pub(super) guest_features_sel: u32,
    /// log2 of the page size in which the guest counts a queue's address.
    pub(super) page_shift: u32,
    /// How far the driver is.
    pub(super) status: u8,
    /// Selected queue.
    pub(super) queue_sel: u16,
    /// What guest and device have agreed on.
    pub(super) features: u64,
    /// What the guest has written by the present interface.
    pub(super) proposal: Proposal,
}

impl Registers {
    /// The guest resets the device: what belongs to the slot stays, as in QEMU.
    pub(super) fn reset_device(&mut self) {
        self.status = 0;
        self.queue_sel = 0;
        self.features = 0;
    }

    /// The guest's page size: a power of two, or the lowest bit of what was written.
    pub(super) fn set_page_size(&mut self, bytes: u32) {
        self.page_shift = match bytes.trailing_zeros() {
            shift @ 0..=31 => shift,
            _ => 0,
        };
    }
}
