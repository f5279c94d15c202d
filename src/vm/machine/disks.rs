//! The machine's disks: images opened, devices made, kicks and interrupts wired to KVM.

use std::sync::Arc;

use kvm_ioctls::IoEventAddress;

use crate::block::{Drive, Raw};
use crate::config::{DriveConfig, MachineConfig};
use crate::vm::accel::SharedVm;
use crate::vm::device::bus::IrqLine;
use crate::vm::device::virtio::Disk;
use crate::vm::device::virtio::disk::Parts;
use crate::vm::guest::Error;
use crate::vm::map::Map;

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

fn open(drive: &DriveConfig) -> Result<Raw, Error> {
    let DriveConfig {
        id: _,
        file,
        is_read_only,
        is_guessed,
        option,
    } = drive;
    let image = Raw::open(file, *is_read_only, *is_guessed)
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
