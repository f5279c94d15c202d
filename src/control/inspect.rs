//! Looking at the machine: vCPUs, memory, ports, chardevs.

use std::sync::Arc;

use super::{Control, Error};
use crate::block::{Backend, Drive, Fault, Layer, Limits, Operations};
use crate::chardev::Ringbuf;
use crate::config::{Cache, Zeroes};
use crate::vm::guest::Guest;
use crate::vm::machine::{MapEntry, Registers};
use crate::vm::memory::PAGE_SIZE;
use crate::vm::virtual_memory::VirtualMemory;

/// `info cpus`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CpuInfo {
    /// Index.
    pub index: usize,
    /// Host thread id.
    pub thread: i32,
}

/// `info ramblock`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RamBlockInfo {
    /// Name on the wire.
    pub name: String,
    /// Host page size in bytes.
    pub page_size: u64,
    /// Offset in the RAM address space.
    pub offset: u64,
    /// Length in bytes.
    pub used: u64,
    /// Host address.
    pub host: u64,
}

/// `info chardev`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChardevInfo {
    /// Id.
    pub id: String,
    /// `filename=`.
    pub description: String,
}

/// A drive, for `info block`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DriveInfo {
    /// Its name; empty if its image was taken out.
    pub id: String,
    /// How many nodes there are of drives before it; each of its layers has two, file and format.
    pub nodes_before: usize,
    /// Its image and what is behind it.
    pub layers: Vec<Layer>,
    /// `cache=`.
    pub cache: Cache,
    /// `detect-zeroes=`.
    pub zeroes: Zeroes,
    /// `block_set_io_throttle`, and the name it was given.
    pub limits: (Limits, String),
    /// Whether nothing may be written.
    pub is_read_only: bool,
    /// The disk that uses it.
    pub disk: Option<String>,
    /// Why it has stopped the guest, in QEMU's word.
    pub fault: Option<&'static str>,
}

/// What a drive has done, for `info blockstats`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DriveStats {
    /// Its name.
    pub id: String,
    /// Bytes read and written.
    pub bytes: [u64; 2],
    /// Reads, writes and flushes.
    pub operations: [u64; 3],
    /// Nanoseconds they took.
    pub nanoseconds: [u64; 3],
    /// Nanoseconds since the last one ended; 0 if there was none.
    pub idle: u64,
}

/// The name of a drive; one that was taken out has none any more.
fn name(drive: &Drive) -> String {
    match drive.is_deleted() {
        true => String::new(),
        false => drive.id().to_owned(),
    }
}

impl Control {
    /// Drives, in the order they were given.
    pub fn drives(&self) -> Vec<DriveInfo> {
        let machine = self.machine();
        let mut nodes = 0;
        let info = |drive: &Arc<Drive>| {
            let layers = drive.layers();
            let nodes_before = nodes;
            nodes += 2 * layers.len();
            DriveInfo {
                id: name(drive),
                nodes_before,
                layers,
                cache: drive.policy().cache,
                zeroes: drive.policy().zeroes,
                limits: (drive.throttle().limits(), drive.throttle().group()),
                is_read_only: drive.is_read_only(),
                disk: drive.disk().map(str::to_owned),
                fault: drive.fault().map(Fault::name),
            }
        };
        machine.drives().iter().map(info).collect()
    }

    /// What the drives have done.
    pub fn drive_stats(&self) -> Vec<DriveStats> {
        let machine = self.machine();
        let stats = |drive: &Arc<Drive>| {
            let stats = drive.stats();
            let all = [&stats.reads, &stats.writes, &stats.flushes];
            DriveStats {
                id: name(drive),
                bytes: [stats.reads.bytes(), stats.writes.bytes()],
                operations: all.map(Operations::count),
                nanoseconds: all.map(Operations::nanoseconds),
                idle: stats.idle(),
            }
        };
        machine.drives().iter().map(stats).collect()
    }

    /// Whether KVM runs the guest.
    pub fn has_kvm(&self) -> bool {
        self.machine().has_kvm()
    }

    /// vCPUs.
    pub fn cpus(&self) -> Vec<CpuInfo> {
        let machine = self.machine();
        (0..machine.vcpus())
            .map(|index| CpuInfo {
                index,
                thread: machine.vcpu_thread(index),
            })
            .collect()
    }

    /// Registers of one vCPU.
    pub fn registers(&self, cpu: usize) -> Result<Registers, Error> {
        Ok(self.machine().registers(cpu)?)
    }

    /// Memory map.
    pub fn memory_map(&self) -> Vec<MapEntry> {
        self.machine().map()
    }

    /// RAM blocks.
    pub fn ram_blocks(&self) -> Vec<RamBlockInfo> {
        let mut offset = 0;
        self.machine()
            .ram()
            .iter()
            .map(|block| {
                let info = RamBlockInfo {
                    name: block.name().to_owned(),
                    page_size: PAGE_SIZE as u64,
                    offset,
                    used: block.len(),
                    host: block.host() as u64,
                };
                offset += block.len();
                info
            })
            .collect()
    }

    /// `-m`, bytes.
    pub fn memory_size(&self) -> u64 {
        self.config.machine.memory
    }

    /// Reads guest-physical memory; `Err` holds the first address that can not be read.
    pub fn read_physical(&self, address: u64, to: &mut [u8]) -> Result<(), u64> {
        self.machine().read_physical(address, to)
    }

    /// Memory as that vCPU sees it now.
    pub fn virtual_memory(&self, cpu: usize) -> Result<VirtualMemory, Error> {
        Ok(self.machine().virtual_memory(cpu)?)
    }

    /// Host address and region name of guest-physical RAM.
    pub fn host_address(&self, address: u64) -> Option<(u64, String)> {
        let (host, block, _) = self.machine().host_address(address)?;
        Some((host as u64, block.name().to_owned()))
    }

    /// Reads a port of 1, 2 or 4 bytes.
    pub fn read_port(&self, port: u16, size: u8) -> u32 {
        self.machine().read_port(port, size)
    }

    /// Writes a port of 1, 2 or 4 bytes.
    pub fn write_port(&self, port: u16, size: u8, value: u32) {
        self.machine().write_port(port, size, value);
    }

    /// Character devices.
    pub fn chardevs(&self) -> Vec<ChardevInfo> {
        let configured = self.config.chardevs.iter();
        configured
            .map(|configured| ChardevInfo {
                id: configured.id.clone(),
                description: match self.chardev(&configured.id) {
                    Some(chardev) => chardev.description(),
                    // The terminal, which its shell drives.
                    None => "stdio".to_owned(),
                },
            })
            .collect()
    }

    /// Takes at most `size` bytes out of a ring buffer.
    pub fn ringbuf_read(&self, device: &str, size: usize) -> Result<Vec<u8>, Error> {
        Ok(self.ringbuf(device)?.read(size))
    }

    /// Puts bytes into a ring buffer.
    pub fn ringbuf_write(&self, device: &str, data: &[u8]) -> Result<(), Error> {
        self.ringbuf(device)?.write(data);
        Ok(())
    }

    fn ringbuf(&self, device: &str) -> Result<&dyn Ringbuf, Error> {
        self.chardev(device)
            .ok_or_else(|| Error(format!("Device '{device}' not found")))?
            .ringbuf()
            .ok_or_else(|| Error(format!("{device} is not a ringbuf device")))
    }
}
