//! The I/O APIC: 24 pins, emulated by KVM; here only its state on the wire.
//!
//! QEMU's section `ioapic` version 3. KVM's remaining fields (base address) are fixed.

use crate::vmstate::{Result, Visitor, VmState};

/// First address of the chip's registers.
pub(crate) const BASE: u64 = 0xfec0_0000;
/// Bytes of its register window.
pub(crate) const SIZE: u64 = 0x1000;
/// Number of pins.
pub(crate) const PINS: usize = 24;

/// What is migrated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct IoApic {
    /// Identification register, bits 24 to 31.
    pub(crate) id: u8,
    /// Selected register.
    pub(crate) ioregsel: u8,
    /// Pins whose interrupt has not been delivered.
    pub(crate) irr: u32,
    /// Redirection table.
    pub(crate) redirection: [u64; PINS],
}

impl Default for IoApic {
    /// The chip at reset: every pin masked.
    fn default() -> Self {
        Self {
            id: 0,
            ioregsel: 0,
            irr: 0,
            redirection: [1 << 16; PINS],
        }
    }
}

impl VmState for IoApic {
    const NAME: &'static str = "ioapic";
    const VERSION: u32 = 3;

    fn fields(&mut self, v: &mut dyn Visitor, _version: u32) -> Result {
        v.number("id", &mut self.id)?;
        v.number("ioregsel", &mut self.ioregsel)?;
        v.unused(8)?;
        v.ranged("irr", &mut self.irr, 0..=(1 << PINS) - 1)?;
        v.array("ioredtbl", &mut self.redirection)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmstate::{load, save};

    #[test]
    fn state_is_206_bytes_and_loads() {
        let mut chip = IoApic {
            id: 2,
            ioregsel: 0x11,
            irr: 0x1000,
            ..IoApic::default()
        };
        chip.redirection[12] = 0x0300_0000_0000_0042;
        let bytes = save(&mut chip).unwrap();
        assert_eq!(bytes.len(), 206);
        let mut again = IoApic::default();
        load(&mut again, 3, &mut &bytes[..]).unwrap();
        assert_eq!(again, chip);
    }
}
