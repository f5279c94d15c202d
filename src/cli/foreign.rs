//! Names of QEMU's options that this version does not build, so that they are refused as such and
//! not as misspellings.

/// Without dashes.
#[rustfmt::skip]
pub(super) const OPTIONS: &[&str] = &[
    "L", "acpitable", "action", "add-fd", "async-teardown", "audio", "audio-help", "audiodev",
    "blockdev", "boot", "cdrom", "chroot", "compat", "debugcon", "dfilter",
    "dtb", "dump-vmstate", "echr", "enable-sync-profile", "fda", "fdb", "fsdev", "full-screen",
    "fw_cfg", "gdb", "hda", "hdb", "hdc", "hdd", "icount", "iscsi", "k", "loadvm", "mem-path",
    "mem-prealloc", "msg", "mtdblock", "net", "netdev", "nic", "no-acpi", "no-fd-bootchk",
    "no-hpet", "no-shutdown", "nouserconfig", "numa", "one-insn-per-tb", "only-migratable",
    "option-rom", "overcommit", "parallel", "perfmap", "pflash", "plugin", "portrait",
    "preconfig", "qmp", "qmp-pretty", "readconfig", "rotate", "rtc", "run-with", "runas", "s",
    "sd", "seed", "set", "shim", "singlestep", "smbios", "snapshot", "spice", "tb-size", "tpmdev",
    "usb", "usbdevice", "vga", "virtfs", "vnc", "watchdog-action", "win2k-hack", "writeconfig",
    "xen-attach", "xen-domid", "xen-domid-restrict",
];
