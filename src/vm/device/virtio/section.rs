//! A disk's section: `virtio-mmio@<slot>/virtio-blk` version 2, spec/device-state.md §2.10.

use super::modern::Arrived;
use super::queue::Queue;
use super::registers::{ENTRIES, QUEUES, Registers};
use super::ring::Element;
use super::{Interface, OFFERED, acceptable, config, names};
use crate::vmstate::{Error, Result, Subsection, Visitor, VmState};

/// All of a disk that is migrated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct State {
    pub(super) registers: Registers,
    /// Why the interrupt line is high, if it is.
    pub(super) isr: u8,
    /// The configuration as the guest has read or written it last; zero before that.
    pub(super) config: Vec<u8>,
    pub(super) queue: Queue,
    /// Entries the queue has after a reset.
    pub(super) entries: u32,
    /// Requests that failed and stopped the guest: they are to be executed again.
    pub(super) retries: Vec<Element>,
    /// The guest has driven the device wrong: it does nothing until it is reset.
    pub(super) is_broken: bool,
    /// The driver works.
    pub(super) is_started: bool,
    /// The device is switched off by its bus (never on this one).
    pub(super) is_disabled: bool,
    /// What the guest can have agreed to; not on the wire.
    pub(super) acceptable: u64,
    /// Not on the wire either.
    pub(super) arrived: Arrived,
}

impl State {
    /// A disk at reset that offers those features.
    pub(super) fn at_reset(interface: Interface, offered: u64) -> Self {
        Self {
            registers: Registers::default(),
            isr: 0,
            config: vec![0; config::LEN],
            queue: Queue::new(config::ENTRIES, interface),
            entries: config::ENTRIES,
            retries: Vec::new(),
            is_broken: false,
            is_started: false,
            is_disabled: false,
            acceptable: acceptable(interface, offered),
            arrived: Arrived::default(),
        }
    }

    /// A request, and whether there is one.
    fn retry(&mut self, number: usize, v: &mut dyn Visitor) -> Result<bool> {
        let mut is_request = number < self.retries.len();
        v.number("request", &mut is_request)?;
        if !is_request {
            return Ok(false);
        }
        let mut picture = match self.retries.get(number) {
            Some(element) => element.to_picture(),
            None => vec![0; ELEMENT],
        };
        v.buffer("element", &mut picture)?;
        if number == self.retries.len() {
            let element = Element::from_picture(&picture)
                .filter(|element| u32::from(element.head) < self.queue.num)
                .filter(|_| number < self.queue.num as usize);
            self.retries.push(element.ok_or_else(|| {
                inconsistent(format!(
                    "request {number} under way is none that this ring could have"
                ))
            })?);
        }
        Ok(true)
    }
}

/// QEMU's picture of a request in its memory (`VirtQueueElementOld`): first descriptor, number of
/// parts to write and to read (u32 each), then for each direction the addresses of 1024 parts, and
/// for each direction 1024 times a pointer and a length. The pointers mean nothing anywhere else.
impl Element {
    fn to_picture(&self) -> Vec<u8> {
        let mut picture = vec![0; ELEMENT];
        let mut put =
            |at: usize, bytes: &[u8]| picture[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &u32::from(self.head).to_le_bytes());
        for (side, parts) in [&self.readable, &self.writable].into_iter().enumerate() {
            let (count, addresses, vectors) = PLACES[side];
            put(count, &(parts.len() as u32).to_le_bytes());
            for (index, (address, len)) in parts.iter().take(PARTS).enumerate() {
                put(addresses + 8 * index, &address.to_le_bytes());
                put(vectors + 16 * index + 8, &len.to_le_bytes());
            }
        }
        picture
    }

    fn from_picture(picture: &[u8]) -> Option<Self> {
        let quad = |at: usize| {
            Some(u64::from_le_bytes(
                picture.get(at..at + 8)?.try_into().ok()?,
            ))
        };
        let word = |at: usize| quad(at).map(|quad| quad as u32);
        let mut sides = [Vec::new(), Vec::new()];
        for (parts, (count, addresses, vectors)) in sides.iter_mut().zip(PLACES) {
            let count = usize::try_from(word(count)?).ok()?;
            for index in (0..count).take(PARTS + 1) {
                let (address, len) = (addresses + 8 * index, vectors + 16 * index + 8);
                parts.push((quad(address)?, quad(len)?));
            }
            if count > PARTS {
                return None;
            }
        }
        let [readable, writable] = sides;
        Some(Self {
            head: u16::try_from(word(0)?).ok()?,
            readable,
            writable,
        })
    }
}

impl VmState for State {
    const NAME: &'static str = "virtio";
    const VERSION: u32 = 1;
    const SUBSECTIONS: &'static [Subsection<Self>] = &[
        Subsection {
            name: "virtio/device_endian",
            version: 1,
            needed: |_| false,
            fields: |_, v| v.ranged("device_endian", &mut LITTLE_ENDIAN.clone(), 1..=1),
        },
        Subsection {
            name: "virtio/64bit_features",
            version: 1,
            // QEMU sends it if it offers any bit above 31, and it does.
            needed: |_| true,
            fields: |s, v| v.number("guest_features", &mut s.registers.features),
        },
        Subsection {
            name: "virtio/virtqueues",
            version: 1,
            needed: |s| s.queue.rings.is_some(),
            fields: Self::walk_rings,
        },
        Subsection {
            name: "virtio/ringsize",
            version: 1,
            needed: |s| s.queue.num != s.entries,
            fields: |s, v| {
                let mut entries = vec![0; QUEUES as usize];
                entries[0] = s.entries;
                v.array("num_default", &mut entries)?;
                s.entries = entries[0];
                Ok(())
            },
        },
        Subsection {
            name: "virtio/broken",
            version: 1,
            needed: |s| s.is_broken,
            fields: |s, v| v.number("broken", &mut s.is_broken),
        },
        Subsection {
            name: "virtio/extra_state",
            version: 1,
            needed: |s| s.queue.rings.is_some(),
            fields: Self::walk_transport,
        },
        Subsection {
            name: "virtio/started",
            version: 1,
            needed: |s| s.is_started,
            fields: |s, v| v.number("started", &mut s.is_started),
        },
        Subsection {
            name: "virtio/packed_virtqueues",
            version: 1,
            needed: |_| false,
            fields: |_, _| packed(),
        },
        Subsection {
            name: "virtio/disabled",
            version: 1,
            needed: |s| s.is_disabled,
            fields: |s, v| v.number("disabled", &mut s.is_disabled),
        },
    ];

    fn fields(&mut self, v: &mut dyn Visitor, _version: u32) -> Result {
        let registers = &mut self.registers;
        v.number("host_features_sel", &mut registers.host_features_sel)?;
        v.number("guest_features_sel", &mut registers.guest_features_sel)?;
        v.ranged("guest_page_shift", &mut registers.page_shift, 0..=31)?;
        v.number("status", &mut registers.status)?;
        v.number("isr", &mut self.isr)?;
        v.ranged("queue_sel", &mut registers.queue_sel, 0..=QUEUES as u16 - 1)?;
        v.narrow("guest_features", &mut registers.features)?;
        let mut len = self.config.len() as u32;
        v.ranged("config_len", &mut len, 0..=CONFIG_MAX)?;
        self.config.resize(len as usize, 0);
        v.buffer("config", &mut self.config)?;
        v.ranged("queues", &mut 1u32, 1..=1)?;
        let queue = &mut self.queue;
        v.ranged("vring.num", &mut queue.num, 1..=ENTRIES)?;
        v.ranged("vring.align", &mut queue.align, 1..=u32::MAX)?;
        v.number("vring.desc", &mut queue.desc)?;
        v.number("last_avail_idx", &mut queue.last_avail)?;
        let mut number = 0;
        while self.retry(number, v)? {
            number += 1;
        }
        Ok(())
    }

    fn loaded(&mut self) -> std::result::Result<(), String> {
        self.config.resize(config::LEN, 0);
        self.check_interface()?;
        let alien = self.registers.features & !self.acceptable;
        if alien != 0 {
            return Err(format!(
                "Features {alien:#x} unsupported: {}. Allowed features: {:#x}",
                names(alien),
                self.acceptable
            ));
        }
        if !(1..=ENTRIES).contains(&self.entries) {
            return Err(format!("a queue has no {} entries", self.entries));
        }
        let Queue {
            desc, last_avail, ..
        } = self.queue;
        if desc == 0 && last_avail != 0 {
            return Err(format!(
                "VQ 0 address 0x0 inconsistent with Host index {last_avail:#x}"
            ));
        }
        Ok(())
    }
}

/// QEMU's section: the transport and the queue, in a struct of their own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct DiskSection(pub(crate) State);

impl VmState for DiskSection {
    const NAME: &'static str = "virtio-blk";
    const VERSION: u32 = 2;

    fn fields(&mut self, v: &mut dyn Visitor, _version: u32) -> Result {
        v.state("virtio", &mut self.0)
    }
}

/// What the wire calls this byte order.
const LITTLE_ENDIAN: u8 = 1;
/// Bytes of QEMU's picture of a request.
const ELEMENT: usize = 49168;
/// Most parts of one direction.
const PARTS: usize = 1024;
/// Where it has the number of parts, their addresses, and their pointers and lengths: of those for
/// the device to read, and of those for it to write.
const PLACES: [(usize, usize, usize); 2] = [
    (4, 16 + 8 * PARTS, 16 + 32 * PARTS),
    (8, 16, 16 + 16 * PARTS),
];
const _: () = assert!(ELEMENT == 16 + 48 * PARTS);
/// More configuration than any disk has.
const CONFIG_MAX: u32 = 4096;
const _: () = assert!(OFFERED >> 32 == 0);

/// The source's disk has `packed=on`.
fn packed() -> Result {
    Err(inconsistent(
        "virtio-blk with packed=on: not built in this version".to_owned(),
    ))
}

pub(super) fn inconsistent(what: String) -> Error {
    Error::Inconsistent {
        section: "virtio".to_owned(),
        what,
    }
}
