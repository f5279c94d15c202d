//! QEMU's virtual clock, by which it counts the times of some devices.
//!
//! QEMU's section `timer` version 2. hmpsh has no such clock and sends none: a QEMU that gets
//! none counts from 0.

use crate::vmstate::{Result, Visitor, VmState};

/// What is of use here.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct VirtualClock {
    /// What it showed when the guest stopped, nanoseconds.
    pub(crate) time: i64,
}

impl VmState for VirtualClock {
    const NAME: &'static str = "timer";
    const VERSION: u32 = 2;

    fn fields(&mut self, v: &mut dyn Visitor, _version: u32) -> Result {
        // The TSC as QEMU's own emulation would need it.
        v.number("cpu_ticks_offset", &mut 0i64)?;
        v.unused(8)?;
        v.number("cpu_clock_offset", &mut self.time)
    }
}
