//! The machine's disks: images opened, devices made, kicks and interrupts wired to KVM.

use std::sync::Arc;

use kvm_ioctls::IoEventAddress;

use crate::block::{self, Backend, Drive, Fault, OpenOptions, Policy};
use crate::config::{DriveConfig, Format, MachineConfig};
use crate::vm::accel::SharedVm;
use crate::vm::device::bus::IrqLine;
use crate::vm::device::virtio::Disk;
use crate::vm::device::virtio::disk::Parts;
use crate::vm::guest::Error;
use crate::vm::map::Map;
use crate::vm::vcpu::{Report, Reporter};

/// Opens every drive, used by a disk or not.
pub(super) fn open_drives(config: &MachineConfig) -> Result<Vec<Arc<Drive>>, Error> {
    let drives = config.drives.iter().enumerate();
    drives
        .map(|(index, drive)| {
            open_drive(drive, config.disk_of(index)).map_err(|text| {
                let option = &drive.option;
                Error::State(format!("{option}: {text}"))
            })
        })
        .collect()
}

/// Opens a drive, which that disk uses; the text says why that can not be.
pub(super) fn open_drive(drive: &DriveConfig, disk: Option<String>) -> Result<Arc<Drive>, String> {
    let policy = Policy {
        cache: drive.cache,
        discards: drive.discards,
        zeroes: drive.zeroes,
    };
    let new = Drive::new(drive.id.clone(), open(drive)?);
    Ok(Arc::new(new.with_policy(policy).of_disk(disk)))
}

/// Makes the disks in the order of their sections, each with the interrupt line that `line` makes of
/// a number.
pub(super) fn make(
    config: &MachineConfig,
    attached: &[Attached],
    map: &Arc<Map>,
    vm: Option<&SharedVm>,
    line: &dyn Fn(u32) -> IrqLine,
    stop: &Reporter,
) -> Result<Vec<Arc<Disk>>, Error> {
    let mut disks = Vec::new();
    for (wanted, (drive, _)) in config.disks.iter().zip(attached) {
        let disk = Disk::new(Parts {
            slot: wanted.slot,
            interface: config.interface,
            serial: wanted.serial.clone(),
            image: Arc::clone(drive) as _,
            map: Arc::clone(map),
            irq: line(wanted.gsi()),
            is_writeback: drive.policy().cache.is_writeback,
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

/// All of them, in the order of the disks.
pub(super) fn attached(
    config: &MachineConfig,
    drives: &[Arc<Drive>],
) -> Result<Vec<Attached>, Error> {
    let disks = config.disks.iter();
    let found = disks.map(|disk| {
        let name = config.disk_of(disk.drive);
        let mut its = drives
            .iter()
            .filter(|drive| drive.disk() == name.as_deref());
        let drive = its.next();
        let drive =
            drive.ok_or_else(|| Error::State(format!("no drive for slot {}", disk.slot)))?;
        Ok((Arc::clone(drive), disk.option.clone()))
    });
    found.collect()
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

/// Unlocks the images of a guest at rest; with `flush`, after what was written has reached all of
/// them, or none is unlocked.
pub(super) fn release(attached: &[Attached], flush: bool) -> Result<(), Error> {
    if flush {
        self::flush(attached)?;
    }
    attached.iter().for_each(|(drive, _)| drive.release());
    Ok(())
}

/// What was written reaches the images. One that fails does not keep the others from it.
fn flush(attached: &[Attached]) -> Result<(), Error> {
    let mut result = Ok(());
    // Of a drive that was taken out there is nothing left to be flushed.
    for (drive, _) in attached.iter().filter(|(drive, _)| !drive.is_deleted()) {
        let what = format!("Flushing disk '{}'", drive.id());
        let flushed = drive.flush();
        result = result.and(flushed.map_err(|source| Error::System { what, source }));
    }
    result
}

fn open(drive: &DriveConfig) -> Result<Box<dyn Backend>, String> {
    let options = OpenOptions {
        path: drive.file.clone(),
        directory: drive.directory.clone(),
        format: drive.format,
        is_read_only: drive.is_read_only,
        locks: drive.locks,
        is_direct: drive.cache.is_direct,
    };
    let image = block::open(options).map_err(|error| error.to_string())?;
    let is_raw = image
        .layers()
        .first()
        .is_some_and(|top| top.format == Format::Raw);
    if drive.format.is_none() && is_raw {
        log::warn!(
            "WARNING: Image format was not specified for '{}' and probing guessed raw.\n         \
             Automatically detecting the format is dangerous for raw images, write operations on \
             block 0 will be restricted.\n         \
             Specify the 'raw' format explicitly to remove the restrictions.",
            drive.file.display()
        );
    }
    Ok(image)
}
