//! Devices of the microvm, each with its state as QEMU migrates it.

pub(crate) mod apic;
pub(crate) mod bus;
pub(crate) mod foreign;
pub(crate) mod i8254;
pub(crate) mod i8259;
pub(crate) mod ioapic;
pub(crate) mod kvmclock;
pub(crate) mod rtc;
pub(crate) mod serial;
pub(crate) mod timer;
pub(crate) mod virtio;
