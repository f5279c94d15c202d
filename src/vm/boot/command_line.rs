//! What QEMU's microvm adds to a kernel's command line: the kernel can not find virtio-mmio devices
//! by itself, so it is told of those that are there (`microvm_fix_kernel_cmdline`).

use std::fmt::Write;

/// A virtio-mmio transport that a device is plugged into.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::vm) struct MmioDevice {
    /// Guest-physical address of its registers.
    pub(in crate::vm) base: u64,
    /// Bytes of them.
    pub(in crate::vm) size: u64,
    /// Its interrupt line.
    pub(in crate::vm) gsi: u32,
}

/// `text` and behind it a parameter for each of `devices`: highest address first, as QEMU finds
/// them on its bus.
pub(super) fn with_devices(text: &str, devices: &[MmioDevice]) -> String {
    let mut devices = devices.to_vec();
    devices.sort_by_key(|device| std::cmp::Reverse(device.base));
    let mut line = text.to_owned();
    for MmioDevice { base, size, gsi } in devices {
        // Writing to a string can not fail.
        let _ = write!(line, " virtio_mmio.device={size}@{base:#x}:{gsi}");
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_told_highest_first() {
        let slot = |index: u64| MmioDevice {
            base: 0xfeb0_0000 + index * 512,
            size: 512,
            gsi: 5 + index as u32,
        };
        assert_eq!(with_devices("quiet", &[]), "quiet");
        assert_eq!(
            with_devices("quiet", &[slot(7)]),
            "quiet virtio_mmio.device=512@0xfeb00e00:12"
        );
        assert_eq!(
            with_devices("", &[slot(6), slot(7)]),
            " virtio_mmio.device=512@0xfeb00e00:12 virtio_mmio.device=512@0xfeb00c00:11"
        );
    }
}
