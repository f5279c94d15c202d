//! What QEMU's microvm adds to a kernel's command line: the kernel can not find virtio-mmio devices
//! by itself, so it is told of those that are there (`microvm_fix_kernel_cmdline`).

use std::cmp::Reverse;
use std::fmt::Write;

use crate::config::{DiskConfig, SLOT_BYTES};

/// `text` and behind it a parameter for each of `disks`: highest address first, as QEMU finds them
/// on its bus.
pub(super) fn with_disks(text: &str, disks: &[DiskConfig]) -> String {
    let mut disks: Vec<_> = disks.iter().collect();
    disks.sort_by_key(|disk| Reverse(disk.slot));
    let mut line = text.to_owned();
    for disk in disks {
        let (base, gsi) = (disk.base(), disk.gsi());
        // Writing to a string can not fail.
        let _ = write!(line, " virtio_mmio.device={SLOT_BYTES}@{base:#x}:{gsi}");
    }
    line
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::config::OnError;

    pub(in crate::vm::boot) fn disk(slot: usize) -> DiskConfig {
        DiskConfig {
            id: None,
            drive: 0,
            slot,
            serial: String::new(),
            on_error: OnError::DEFAULT,
            option: String::new(),
        }
    }

    #[test]
    fn disks_are_told_highest_first() {
        assert_eq!(with_disks("quiet", &[]), "quiet");
        assert_eq!(
            with_disks("quiet", &[disk(7)]),
            "quiet virtio_mmio.device=512@0xfeb00e00:12"
        );
        assert_eq!(
            with_disks("", &[disk(6), disk(7)]),
            " virtio_mmio.device=512@0xfeb00e00:12 virtio_mmio.device=512@0xfeb00c00:11"
        );
    }
}
