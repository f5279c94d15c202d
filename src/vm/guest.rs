//! The seam between the engine and a machine: everything migration needs of a guest, and no more.
//!
//! `Machine` (KVM) implements it, and in tests a fake guest of a few pages does; the engine never
//! sees KVM.

use std::sync::Arc;

use serde_json::Value;

use super::dirty::DirtyLog;
use super::memory::RamBlock;
use super::run_state::RunState;
use crate::block::Drive;
use crate::errno::Errno;
use crate::vmstate::StateReader;

/// What can go wrong with a guest, worded for the operator.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A KVM or other system call failed; `what` says which and with what value.
    #[error("{what}: {}", Errno(.source))]
    System {
        /// What was tried.
        what: String,
        /// Why it failed.
        source: std::io::Error,
    },
    /// A section of the stream does not fit this machine.
    #[error("{0}")]
    Section(String),
    /// The request makes no sense in the present run state.
    #[error("{0}")]
    State(String),
}

/// Name, instance and version of a device section.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SectionHeader {
    /// QEMU's section name, such as `cpu` or `serial`.
    pub idstr: String,
    /// Instance number among sections of the same name.
    pub instance: u32,
    /// Version of the body.
    pub version: u32,
}

/// One device, saved: its body for the stream and its description for the trailing JSON.
#[derive(Clone, Debug)]
pub struct SavedSection {
    /// What it is.
    pub header: SectionHeader,
    /// The bytes between header and footer.
    pub body: Vec<u8>,
    /// The members `vmsd_name`, `version`, `fields`, `subsections` (stream spec §1.6).
    pub description: Value,
}

/// A machine that can be moved.
pub trait Guest: Send + Sync {
    /// Machine type in the stream's configuration section (`microvm`).
    fn machine_type(&self) -> &str;

    /// RAM blocks in the order they are announced, biggest first.
    fn ram(&self) -> &[Arc<RamBlock>];

    /// The dirty log over exactly those blocks.
    fn dirty_log(&self) -> &dyn DirtyLog;

    /// Drives, in the order they were given.
    fn drives(&self) -> Vec<Arc<Drive>>;

    /// Locks the images that its disks use, if they are not locked yet. [`Self::start`] does so too.
    fn claim_drives(&self) -> Result<(), Error>;

    /// Leaves the images to somebody else; the guest is at rest. With `flush`, what was written has
    /// reached them.
    fn release_drives(&self, flush: bool) -> Result<(), Error>;

    /// Present run state.
    fn run_state(&self) -> RunState;

    /// Brings every vCPU to rest with its pending I/O completed, enters `state` and returns the
    /// state before, both in one step. A guest that is at rest only changes the state. A guest
    /// that turns out to have ended by itself (KVM gave up on it) is an error, and keeps the run
    /// state that says so.
    fn stop(&self, state: RunState) -> Result<RunState, Error>;

    /// Runs the guest (or goes on running it).
    fn start(&self) -> Result<(), Error>;

    /// Saves every device of a guest at rest, in stream order, without `globalstate`.
    fn save_devices(&self) -> Result<Vec<SavedSection>, Error>;

    /// The sections this machine saves, in order, without their bodies.
    fn sections(&self) -> Vec<SectionHeader>;

    /// Begins loading device state: sections are decoded and checked into the loader, and touch
    /// the guest only in [`DeviceLoader::apply`].
    fn loader(&self) -> Box<dyn DeviceLoader + '_>;
}

/// Device state on its way in: decode and check everything, then apply (two phases).
pub trait DeviceLoader {
    /// Decodes one FULL section's body, up to but without its footer. Sections that QEMU sends
    /// and this machine has no use for are decoded and dropped; an unknown one is an error that
    /// names it, with QEMU's wording.
    fn load(&mut self, header: &SectionHeader, body: &mut dyn StateReader) -> Result<(), Error>;

    /// Names of sections this machine needs that have not arrived.
    fn missing(&self) -> Vec<String>;

    /// Puts everything into the guest, which is at rest. The first value that KVM refuses is an
    /// error with its name; the machine must then be thrown away.
    fn apply(self: Box<Self>) -> Result<(), Error>;
}

/// QEMU's words for a section that this machine does not take, and what to change.
pub fn unknown_section(idstr: &str, instance: u32) -> String {
    let advice = match idstr {
        "cpu" | "cpu_common" | "apic" => " (give both sides the same -smp)",
        "i8259" => " (give both sides the same pic=)",
        "i8254" => " (give both sides the same pit=)",
        "mc146818rtc" => " (give both sides the same rtc=)",
        "serial" => " (give both sides a -serial, or none)",
        "ioapic" | "acpi-ged" => " (start QEMU with -M microvm,acpi=off)",
        "0000:00:00.0/gpex_root" | "PCIHost" | "PCIBUS" => " (start QEMU with -M microvm,pcie=off)",
        "slirp" => " (start QEMU with -nic none)",
        _ if idstr.starts_with("virtio-mmio@") => " (give both sides the same devices)",
        _ => "",
    };
    format!(
        "Unknown savevm section or instance '{}' {instance}. Make sure that your current VM setup \
         matches your saved VM setup, including any hotplugged devices{advice}",
        idstr.escape_default()
    )
}
