//! The PIC: two 8259A interrupt controllers in a row, emulated by KVM; here only their state on
//! the wire.
//!
//! QEMU's section `i8259` version 1, instance 0 the master, 1 the slave. KVM's remaining field
//! (which inputs may be level-triggered) is fixed.

use crate::vmstate::{Result, Subsection, Visitor, VmState};

/// Command and data port of each chip.
pub(crate) const PORTS: [u16; CHIPS] = [0x20, 0xa0];
/// Edge or level control of each chip's inputs.
pub(crate) const ELCR_PORTS: [u16; CHIPS] = [0x4d0, 0x4d1];
/// Master and slave.
pub(crate) const CHIPS: usize = 2;
/// Inputs of a chip.
pub(crate) const PINS: usize = 8;
/// Inputs of each chip that a device may drive as a level.
pub(crate) const ELCR_MASKS: [u8; CHIPS] = [0xf8, 0xde];

/// What is migrated of one chip. At reset all of it is 0.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Pic {
    /// Levels of the inputs, to find edges.
    pub(crate) last_irr: u8,
    /// Interrupt requests.
    pub(crate) irr: u8,
    /// Masked inputs.
    pub(crate) imr: u8,
    /// Interrupts in service.
    pub(crate) isr: u8,
    /// Input of the highest priority.
    pub(crate) priority_add: u8,
    /// Vector of input 0.
    pub(crate) irq_base: u8,
    /// Whether the command port reads the service register.
    pub(crate) read_reg_select: u8,
    /// The next read polls.
    pub(crate) poll: u8,
    /// Special mask mode.
    pub(crate) special_mask: u8,
    /// Which initialization word comes next, 0 for none.
    pub(crate) init_state: u8,
    /// Interrupts end by themselves.
    pub(crate) auto_eoi: u8,
    /// And rotate priorities.
    pub(crate) rotate_on_auto_eoi: u8,
    /// Special fully nested mode.
    pub(crate) special_fully_nested_mode: u8,
    /// A fourth initialization word comes.
    pub(crate) init4: u8,
    /// Level-triggered inputs.
    pub(crate) elcr: u8,
}

impl VmState for Pic {
    const NAME: &'static str = "i8259";
    const VERSION: u32 = 1;
    const SUBSECTIONS: &'static [Subsection<Self>] = &[Subsection {
        name: "i8259/ltim",
        version: 1,
        // KVM has no level-triggered mode to be initialised to.
        needed: |_| false,
        fields: |_, v| v.ranged("ltim", &mut 0, 0..=1u8),
    }];

    fn fields(&mut self, v: &mut dyn Visitor, _version: u32) -> Result {
        v.number("last_irr", &mut self.last_irr)?;
        v.number("irr", &mut self.irr)?;
        v.number("imr", &mut self.imr)?;
        v.number("isr", &mut self.isr)?;
        v.ranged("priority_add", &mut self.priority_add, 0..=7)?;
        v.number("irq_base", &mut self.irq_base)?;
        v.ranged("read_reg_select", &mut self.read_reg_select, 0..=1)?;
        v.ranged("poll", &mut self.poll, 0..=1)?;
        v.ranged("special_mask", &mut self.special_mask, 0..=1)?;
        v.ranged("init_state", &mut self.init_state, 0..=3)?;
        v.ranged("auto_eoi", &mut self.auto_eoi, 0..=1)?;
        v.ranged("rotate_on_auto_eoi", &mut self.rotate_on_auto_eoi, 0..=1)?;
        v.ranged(
            "special_fully_nested_mode",
            &mut self.special_fully_nested_mode,
            0..=1,
        )?;
        v.ranged("init4", &mut self.init4, 0..=1)?;
        // QEMU's own bit (2: no slave was announced); KVM has no such mode.
        v.ranged("single_mode", &mut 0, 0..=2u8)?;
        v.number("elcr", &mut self.elcr)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmstate::{load, save};

    #[test]
    fn state_is_16_bytes_and_loads() {
        let mut chip = Pic {
            imr: 0xfb,
            irq_base: 0x20,
            init4: 1,
            elcr: 0x20,
            ..Pic::default()
        };
        let bytes = save(&mut chip).unwrap();
        assert_eq!(
            bytes,
            [0, 0, 0xfb, 0, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0x20]
        );
        let mut again = Pic::default();
        load(&mut again, 1, &mut &bytes[..]).unwrap();
        assert_eq!(again, chip);
    }

    #[test]
    fn a_level_triggered_mode_is_read_over() {
        let mut body = vec![0; 16];
        body.extend(b"\x05\x0ai8259/ltim\0\0\0\x01\x01");
        let mut from = &body[..];
        load(&mut Pic::default(), 1, &mut from).unwrap();
        assert!(from.is_empty());
    }

    #[test]
    fn nonsense_is_refused() {
        let mut body = [0; 16];
        body[9] = 4;
        let error = load(&mut Pic::default(), 1, &mut &body[..]).unwrap_err();
        assert!(error.to_string().contains("init_state"), "{error}");
    }
}
