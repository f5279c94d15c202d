//! A disk's section: `virtio-mmio@<slot>/virtio-blk` version 2, spec/device-state.md §2.10.

use super::registers::{ENTRIES, QUEUES, Registers};
use super::ring::Queue;
use super::{OFFERED, config, names};
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
    /// First descriptors of requests that were under way when the guest stopped. QEMU keeps them
    /// after an I/O error; here there are none in a guest that is saved.
    pub(super) retries: Vec<u16>,
    /// The guest has driven the device wrong: it does nothing until it is reset.
    pub(super) is_broken: bool,
    /// The driver works.
    pub(super) is_started: bool,
    /// The device is switched off by its bus (never on this one).
    pub(super) is_disabled: bool,
    /// What the guest can have agreed to; not on the wire.
    pub(super) offered: u64,
}

impl State {
    /// A disk at reset that offers those features.
    pub(super) fn at_reset(offered: u64) -> Self {
        Self {
            registers: Registers::default(),
            isr: 0,
            config: vec![0; config::LEN],
            queue: Queue::new(config::ENTRIES),
            entries: config::ENTRIES,
            retries: Vec::new(),
            is_broken: false,
            is_started: false,
            is_disabled: false,
            offered,
        }
    }

    fn read_retry(&mut self, v: &mut dyn Visitor) -> Result {
        // A picture of QEMU's memory: the first descriptor's number is all that means something
        // here; the rest can be read from the ring.
        let mut element = vec![0; ELEMENT];
        v.buffer("element", &mut element)?;
        let mut index = [0; 4];
        index.copy_from_slice(&element[..4]);
        let index = u32::from_le_bytes(index);
        let is_sane = index < self.queue.num && self.retries.len() < self.queue.num as usize;
        match u16::try_from(index) {
            Ok(head) if is_sane => self.retries.push(head),
            _ => {
                return Err(inconsistent(format!(
                    "the ring has no request {index} that could be under way"
                )));
            }
        }
        Ok(())
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
            needed: |_| false,
            fields: |_, _| modern(),
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
            needed: |_| false,
            fields: |_, _| modern(),
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
            fields: |_, _| modern(),
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
        loop {
            let mut is_request = false;
            v.number("request", &mut is_request)?;
            if !is_request {
                return Ok(());
            }
            self.read_retry(v)?;
        }
    }

    fn loaded(&mut self) -> std::result::Result<(), String> {
        self.config.resize(config::LEN, 0);
        let alien = self.registers.features & !self.offered;
        if alien != 0 {
            return Err(format!(
                "Features {alien:#x} unsupported: {}. Allowed features: {:#x}",
                names(alien),
                self.offered
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
/// More configuration than any disk has.
const CONFIG_MAX: u32 = 4096;
const _: () = assert!(OFFERED >> 32 == 0);

/// The source's slots have virtio's present interface (force-legacy=off).
fn modern() -> Result {
    Err(inconsistent(
        "virtio-mmio with force-legacy=off: not built in this version".to_owned(),
    ))
}

fn inconsistent(what: String) -> Error {
    Error::Inconsistent {
        section: "virtio".to_owned(),
        what,
    }
}
