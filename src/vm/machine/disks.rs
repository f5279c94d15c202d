//! The machine's disks: images opened, devices made, kicks and interrupts wired to KVM.

use std::sync::Arc;

use kvm_ioctls::IoEventAddress;

use crate::block::Raw;
use crate::config::{Drive, MachineConfig};
use crate::vm::accel::SharedVm;
use crate::vm::device::bus::IrqLine;
use crate::vm::device::virtio::Disk;
use crate::vm::device::virtio::disk::Parts;
use crate::vm::guest::Error;
use crate::vm::map::Map;

/// Opens every drive, used by a disk or not, and makes the disks in the order of their sections, each
/// with the interrupt line that `line` makes of a number.
pub(super) fn make(
    config: &MachineConfig,
    map: &Arc<Map>,
    vm: Option<&SharedVm>,
    line: &dyn Fn(u32) -> IrqLine,
) -> Result<Vec<Arc<Disk>>, Error> {
    let mut images = Vec::new();
    for drive in &config.drives {
        images.push(Some(open(drive)?));
    }
    let mut disks = Vec::new();
    for wanted in &config.disks {
        let Some(image) = images.get_mut(wanted.drive).and_then(Option::take) else {
            return Err(Error::State(format!("no drive for slot {}", wanted.slot)));
        };
        let disk = Disk::new(Parts {
            slot: wanted.slot,
            serial: wanted.serial.clone(),
            image: Box::new(image),
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

fn open(drive: &Drive) -> Result<Raw, Error> {
    let Drive {
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
