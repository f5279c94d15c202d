//! The machine's disks: images opened, devices made, kicks and interrupts wired to KVM.

use std::sync::Arc;

use kvm_ioctls::IoEventAddress;

use crate::block::{Backend, Drive, Fault, Raw};
use crate::config::{DriveConfig, MachineConfig};
use crate::vm::accel::SharedVm;
use crate::vm::device::bus::IrqLine;
use crate::vm::device::virtio::Disk;
use crate::vm::device::virtio::disk::Parts;
use crate::vm::guest::Error;
use crate::vm::map::Map;
use crate::vm::vcpu::{Report, Reporter};

/// Opens every drive, used by a disk or not.
pub(super) fn open_drives(config: &MachineConfig) -> Result<Vec<Arc<Drive>>, Error> {
    let open = |drive: &DriveConfig| {
        let image = Box::new(open(drive)?);
        Ok(Arc::new(Drive::new(drive.id.clone(), image)))
    };
    config.drives.iter().map(open).collect()
}

/// Makes the disks in the order of their sections, each with the interrupt line that `line` makes of
/// a number.
pub(super) fn make(
    config: &MachineConfig,
    drives: &[Arc<Drive>],
    map: &Arc<Map>,
    vm: Option<&SharedVm>,
    line: &dyn Fn(u32) -> IrqLine,
    stop: &Reporter,
) -> Result<Vec<Arc<Disk>>, Error> {
    let mut disks = Vec::new();
    for wanted in &config.disks {
        let Some(drive) = drives.get(wanted.drive) else {
            return Err(Error::State(format!("no drive for slot {}", wanted.slot)));
        };
        let disk = Disk::new(Parts {
            slot: wanted.slot,
            serial: wanted.serial.clone(),
            image: Arc::clone(drive) as _,
            map: Arc::clone(map),
            irq: line(wanted.gsi()),
            on_error: wanted.on_error,
            stop: on_fault(Arc::clone(drive), Arc::clone(stop)),
        })?;
        if let Some(vm) = vm {
            let (address, kick) = disk.doorbell();
            let at = IoEventAddress::Mmio(address);
            // Without it every kick comes out of the guest: slower, and otherwise the same.
            if let Err(error) = vm.fd().register_ioevent(kick, &at, 0u32) {
                log::debug!("KVM_IOEVENTFD {address:#x}: {error}");
            }
        }
        disks.push(disk);
    }
    Ok(disks)
}

/// Notes on the drive why the guest is to stop, and has it stopped.
fn on_fault(drive: Arc<Drive>, stop: Reporter) -> Box<dyn Fn(Fault) + Send + Sync> {
    Box::new(move |fault| {
        log::warn!(
            "Disk '{}' failed, and the guest stops: `cont` tries again",
            drive.id()
        );
        drive.set_fault(Some(fault));
        stop(Report::IoError);
    })
}

/// The guest runs again: what failed is tried again.
pub(super) fn forget_faults(attached: &[Attached]) {
    attached.iter().for_each(|(drive, _)| drive.set_fault(None));
}

/// A drive that a disk uses, and the option that asked for it.
pub(super) type Attached = (Arc<Drive>, String);

/// All of them.
pub(super) fn attached(config: &MachineConfig, drives: &[Arc<Drive>]) -> Vec<Attached> {
    let disks = config.disks.iter();
    disks
        .filter_map(|disk| Some((Arc::clone(drives.get(disk.drive)?), disk.option.clone())))
        .collect()
}

/// Locks the images of a machine that is being built.
pub(super) fn claim_at_start(attached: &[Attached]) -> Result<(), Error> {
    attached.iter().try_for_each(|(drive, option)| {
        let claimed = drive.claim();
        claimed.map_err(|error| Error::State(format!("{option}: {error}")))
    })
}

/// Locks the images, or none of them.
pub(super) fn claim(attached: &[Attached]) -> Result<(), Error> {
    let claimed = attached.iter().try_for_each(|(drive, _)| {
        let id = drive.id();
        let claimed = drive.claim();
        claimed.map_err(|error| Error::State(format!("Disk '{id}': {}", error.line())))
    });
    claimed.inspect_err(|_| attached.iter().for_each(|(drive, _)| drive.release()))
}

/// Unlocks the images of a guest at rest; with `flush`, after what was written has reached them.
pub(super) fn release(attached: &[Attached], flush: bool) -> Result<(), Error> {
    for (drive, _) in attached.iter().filter(|_| flush) {
        let what = format!("Flushing disk '{}'", drive.id());
        let flushed = drive.flush();
        flushed.map_err(|source| Error::System { what, source })?;
    }
    attached.iter().for_each(|(drive, _)| drive.release());
    Ok(())
}

fn open(drive: &DriveConfig) -> Result<Raw, Error> {
    let DriveConfig {
        id: _,
        file,
        is_read_only,
        is_guessed,
        locks,
        option,
    } = drive;
    let image = Raw::open(file, *is_read_only, *is_guessed, *locks)
        .map_err(|error| Error::State(format!("{option}: {error}")))?;
    if *is_guessed {
        log::warn!(
            "WARNING: Image format was not specified for '{}' and probing guessed raw.\n         \
             Automatically detecting the format is dangerous for raw images, write operations on \
             block 0 will be restricted.\n         \
             Specify the 'raw' format explicitly to remove the restrictions.",
            file.display()
        );
    }
    Ok(image)
}
