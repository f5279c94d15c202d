//! The paravirtual clock: KVM's time at the moment the guest stopped.
//!
//! QEMU's section `kvmclock` version 1. The guest's clock stands still while the guest does: the
//! value is taken at every stop and set again at every start.

use crate::vmstate::{Result, Subsection, Visitor, VmState};

/// What is migrated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct KvmClock {
    /// Nanoseconds of guest time.
    pub(crate) clock: u64,
    /// Whether the value may be used as it is; if not, a destination reads the guest's own page.
    reliable: bool,
}

impl KvmClock {
    /// The clock at `clock` nanoseconds.
    pub(crate) fn at(clock: u64) -> Self {
        Self {
            clock,
            reliable: true,
        }
    }

    /// A clock that takes its state from a stream, which says so if it is reliable.
    pub(crate) fn incoming() -> Self {
        Self {
            clock: 0,
            reliable: false,
        }
    }
}

impl VmState for KvmClock {
    const NAME: &'static str = "kvmclock";
    const VERSION: u32 = 1;
    const SUBSECTIONS: &'static [Subsection<Self>] = &[Subsection {
        name: "kvmclock/clock_is_reliable",
        version: 1,
        needed: |s| s.reliable,
        fields: |s, v| v.number("clock_is_reliable", &mut s.reliable),
    }];

    fn fields(&mut self, v: &mut dyn Visitor, _version: u32) -> Result {
        v.number("clock", &mut self.clock)
    }
}
