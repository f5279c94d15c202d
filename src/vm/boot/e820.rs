//! The memory table a kernel is given, as QEMU's firmware for the microvm gives it: what is RAM,
//! what the firmware keeps, what KVM keeps.
//!
//! Entries and their order are qboot's (`extract_e820`): its own four, then those of fw_cfg's
//! `etc/e820`, the first of which is KVM's. qboot counts one empty entry more, which has nothing
//! to say and is left out.

use crate::vm::map::{HIGH_RAM, Map, RAM};

/// A range of guest-physical space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    /// First address.
    pub(super) start: u64,
    /// Bytes, not 0.
    pub(super) len: u64,
    /// What it is.
    pub(super) kind: Kind,
}

/// Types of ACPI's `INT 15H, E820H`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Usable.
    Ram = 1,
    /// Not usable.
    Reserved = 2,
    /// Kept by ACPI firmware.
    Nvs = 4,
}

/// The table for the memory of `map`.
pub(super) fn table(map: &Map) -> Vec<Entry> {
    let mut low = 0;
    let mut high = 0;
    for window in map.windows().iter().filter(|window| window.block == RAM) {
        let end = window.guest + window.len;
        if window.guest < HIGH_RAM {
            low = low.max(end);
        } else {
            high = high.max(end);
        }
    }
    let entry = |start, end: u64, kind| Entry {
        start,
        len: end.saturating_sub(start),
        kind,
    };
    let mut table = vec![
        entry(0, low.min(EBDA), Kind::Ram),
        entry(EBDA, EBDA_END, Kind::Reserved),
        entry(0xd_0000, 0xf_0000, Kind::Nvs),
        entry(0xf_0000, MIB, Kind::Reserved),
        entry(KVM_PAGES, KVM_PAGES_END, Kind::Reserved),
        entry(MIB, low, Kind::Ram),
        entry(HIGH_RAM, high, Kind::Ram),
    ];
    table.retain(|entry| entry.len > 0);
    table
}

/// Extended BIOS data area: the last KiB below 640 KiB. The MP table is there.
pub(super) const EBDA: u64 = 0x9_fc00;
/// Behind it.
pub(super) const EBDA_END: u64 = 0xa_0000;
/// Where what is reserved below 1 MiB ends.
pub(super) const MIB: u64 = 1 << 20;
/// What KVM keeps for itself.
const KVM_PAGES: u64 = 0xfeff_c000;
const KVM_PAGES_END: u64 = 0xff00_0000;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::boot::tests::machine;

    #[test]
    fn what_qboot_has() {
        let show = |memory| {
            let table = table(&machine(memory));
            let rows = table
                .iter()
                .map(|e| (e.start, e.start + e.len, e.kind as u32));
            rows.collect::<Vec<_>>()
        };
        let firmware = [
            (0, 0x9_fc00, 1),
            (0x9_fc00, 0xa_0000, 2),
            (0xd_0000, 0xf_0000, 4),
            (0xf_0000, 0x10_0000, 2),
            (0xfeff_c000, 0xff00_0000, 2),
        ];
        assert_eq!(show(64 << 20)[..5], firmware);
        assert_eq!(show(64 << 20)[5..], [(0x10_0000, 64 << 20, 1)]);
        let five = show(5 << 30);
        assert_eq!(five[..5], firmware);
        assert_eq!(
            five[5..],
            [(0x10_0000, 0xc000_0000, 1), (1 << 32, 6 << 30, 1)]
        );
        assert_eq!(show(512 << 10)[0], (0, 512 << 10, 1));
        assert_eq!(show(512 << 10).len(), 5);
    }
}
