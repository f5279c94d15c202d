//! Ports and unclaimed memory, as vCPUs reach them.
//!
//! Devices at ports are one byte wide; a wider access is one access per byte. Nobody home: port reads
//! are all ones, memory reads zero, writes are lost, as on QEMU's microvm.

use std::ops::Range;
use std::sync::Arc;

use super::rtc::{self, Rtc};
use super::serial::{self, Serial};
use super::virtio::{Disk, Slots};

/// Drives an interrupt line. Called with every change of level.
pub(crate) type IrqLine = Box<dyn Fn(bool) + Send + Sync>;

/// Devices by address.
#[derive(Default)]
pub(crate) struct Bus {
    /// COM1.
    pub(crate) serial: Option<Arc<Serial>>,
    /// The clock chip.
    pub(crate) rtc: Option<Rtc>,
    /// Disks in the order of their sections.
    pub(crate) disks: Vec<Arc<Disk>>,
    /// The same by slot.
    pub(crate) slots: Slots,
}

impl Bus {
    /// The guest starts or stops. What a disk still does when it stops dirties memory and drives
    /// lines: it belongs to the guest's life here.
    pub(crate) fn set_running(&self, running: bool) {
        if let Some(serial) = &self.serial {
            serial.set_running(running);
        }
        if let Some(rtc) = &self.rtc {
            rtc.set_running(running);
        }
        for disk in &self.disks {
            disk.set_running(running);
        }
    }

    /// Reads memory that is not RAM.
    pub(crate) fn read_memory(&self, address: u64, data: &mut [u8]) {
        data.fill(0);
        self.slots.read(address, data);
    }

    /// Writes memory that is not RAM.
    pub(crate) fn write_memory(&self, address: u64, data: &[u8]) {
        self.slots.write(address, data);
    }

    /// Port input, units of `size` bytes from the same port.
    pub(crate) fn input(&self, port: u16, size: usize, data: &mut [u8]) {
        for unit in data.chunks_mut(size.max(1)) {
            for (offset, byte) in unit.iter_mut().enumerate() {
                *byte = self.read(port.wrapping_add(offset as u16));
            }
        }
    }

    /// Port output, units of `size` bytes to the same port.
    pub(crate) fn output(&self, port: u16, size: usize, data: &[u8]) {
        for unit in data.chunks(size.max(1)) {
            for (offset, byte) in unit.iter().enumerate() {
                self.write(port.wrapping_add(offset as u16), *byte);
            }
        }
    }

    fn read(&self, port: u16) -> u8 {
        match (&self.serial, &self.rtc) {
            (Some(serial), _) if SERIAL.contains(&port) => serial.read((port - serial::PORT) as u8),
            (_, Some(rtc)) if RTC.contains(&port) => rtc.read((port - rtc::PORT) as u8),
            _ => 0xff,
        }
    }

    fn write(&self, port: u16, value: u8) {
        match (&self.serial, &self.rtc) {
            (Some(serial), _) if SERIAL.contains(&port) => {
                serial.write((port - serial::PORT) as u8, value);
            }
            (_, Some(rtc)) if RTC.contains(&port) => rtc.write((port - rtc::PORT) as u8, value),
            _ => {}
        }
    }
}

const SERIAL: Range<u16> = serial::PORT..serial::PORT + serial::PORTS;
const RTC: Range<u16> = rtc::PORT..rtc::PORT + rtc::PORTS;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_home() {
        let bus = Bus::default();
        let mut data = [0; 8];
        bus.input(0x3f8, 4, &mut data);
        assert_eq!(data, [0xff; 8]);
        bus.output(0xffff, 4, &data);
    }
}
