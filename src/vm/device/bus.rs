//! Ports and unclaimed memory, as vCPUs reach them.
//!
//! Devices here are one byte wide; a wider access is one access per byte. Nobody home: port reads
//! are all ones, memory reads zero, writes are lost, as on QEMU's microvm.

use std::sync::Arc;

use super::serial::{PORT, PORTS, Serial};

/// Devices by address.
pub(crate) struct Bus {
    serial: Option<Arc<Serial>>,
}

impl Bus {
    /// The ports of a machine, perhaps with COM1.
    pub(crate) fn new(serial: Option<Arc<Serial>>) -> Self {
        Self { serial }
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
        self.serial_at(port)
            .map_or(0xff, |(serial, register)| serial.read(register))
    }

    fn write(&self, port: u16, value: u8) {
        if let Some((serial, register)) = self.serial_at(port) {
            serial.write(register, value);
        }
    }

    fn serial_at(&self, port: u16) -> Option<(&Serial, u8)> {
        let register = port
            .checked_sub(PORT)
            .filter(|register| *register < PORTS)?;
        self.serial
            .as_deref()
            .map(|serial| (serial, register as u8))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_home() {
        let bus = Bus::new(None);
        let mut data = [0; 8];
        bus.input(0x3f8, 4, &mut data);
        assert_eq!(data, [0xff; 8]);
        bus.output(0xffff, 4, &data);
    }
}
