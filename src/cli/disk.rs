//! `-drive` and `-device`: images, and the disks the guest sees them as.

use super::Error;
use super::draft::Draft;
use super::keyval::KeyVal;
use super::memory::check_id;
use crate::config::{Cache, DiskConfig, DriveConfig, Format, OnError, SLOTS, Zeroes};
use crate::units::parse_switch;

type Answer = Result<(), String>;

/// A `-drive`.
#[derive(Debug)]
pub(super) struct DriveDraft {
    interface: Interface,
    drive: DriveConfig,
    on_error: [OnError; 2],
}

/// A `-device`.
#[derive(Debug)]
pub(super) struct DeviceDraft {
    /// As it was typed.
    option: String,
    id: Option<String>,
    drive: String,
    /// `bus=`.
    slot: Option<usize>,
    serial: String,
    /// `rerror=`, `werror=`, where they are not what the drive says.
    on_error: [Option<OnError>; 2],
}

/// What a drive is connected to by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Interface {
    /// `if=none`: nothing.
    None,
    /// `if=virtio`: a disk of its own.
    Virtio,
    /// Not said: a disk of its own, unless a `-device` wants it.
    Open,
}

/// `-drive`.
pub(super) fn drive(draft: &mut Draft, value: &str) -> Answer {
    let mut list = KeyVal::parse(value, Some("file"))?;
    let id = list.take("id");
    if let Some(id) = &id {
        check_id(id)?;
        if draft.drives.iter().any(|drive| drive.drive.id == *id) {
            return Err(format!("Duplicate ID '{id}' for drive"));
        }
    }
    let interface = match list.take("if").as_deref() {
        None => Interface::Open,
        Some("none") => Interface::None,
        Some("virtio") => Interface::Virtio,
        Some(other @ ("ide" | "scsi" | "floppy" | "pflash" | "mtd" | "sd" | "xen")) => {
            return Err(format!("if={other}: not built in this version"));
        }
        Some(other) => return Err(format!("unsupported bus type '{other}'")),
    };
    let format = list.take("format").or_else(|| list.take("driver"));
    let format = match format.as_deref() {
        None => None,
        Some(name) => Some(match Format::from_name(name) {
            Some(format) => format,
            None if FORMATS.contains(&name) => {
                return Err(format!("format={name}: not built in this version"));
            }
            None => return Err(format!("Unknown driver '{name}'")),
        }),
    };
    let cache = cache(&mut list)?;
    let discards = match list.take("discard").as_deref() {
        None | Some("ignore" | "off") => false,
        Some("unmap" | "on") => true,
        Some(_) => return Err("Invalid discard option".to_owned()),
    };
    let zeroes = match list.take("detect-zeroes").as_deref() {
        None | Some("off") => Zeroes::Off,
        Some("on") => Zeroes::On,
        Some("unmap") if discards => Zeroes::Unmap,
        Some("unmap") => {
            return Err(
                "setting detect-zeroes to unmap is not allowed without setting discard \
                        operation to unmap"
                    .to_owned(),
            );
        }
        Some(other) => return Err(format!("invalid parameter value: {other}")),
    };
    let locks = match list.take("file.locking").as_deref() {
        None | Some("auto" | "on") => true,
        Some("off") => false,
        Some(other) => return Err(format!("invalid parameter value: {other}")),
    };
    match list.take("media").as_deref() {
        None | Some("disk") => {}
        Some("cdrom") => return Err("media=cdrom: not built in this version".to_owned()),
        Some(other) => return Err(format!("'{other}' invalid media")),
    }
    let mut is_read_only = false;
    for key in ["readonly", "read-only"] {
        if let Some(value) = list.take(key) {
            is_read_only = parse_switch(&value)
                .ok_or_else(|| "Parameter 'read-only' expects 'on' or 'off'".to_owned())?;
        }
    }
    let mut on_error = OnError::DEFAULT;
    for (policy, (key, side)) in on_error.iter_mut().zip(POLICIES) {
        if let Some(value) = list.take(key) {
            *policy = OnError::from_name(&value)
                .filter(|policy| side == "write" || *policy != OnError::Enospc)
                .ok_or_else(|| format!("'{value}' invalid {side} error action"))?;
        }
    }
    let file = list.take("file").unwrap_or_default();
    list.refuse(&OTHER_DRIVE_OPTIONS)?;
    if let Some((key, value)) = list.rest().next() {
        let is_nested = key.starts_with("file.") || key.starts_with("throttling");
        return Err(match is_nested {
            true => format!("{key}={value}: not built in this version"),
            false => format!("Block format 'raw' does not support the option '{key}'"),
        });
    }
    if file.is_empty() {
        return Err("A block device must be specified for \"file\"".to_owned());
    }
    let count = draft.drives.len();
    let name = match interface {
        Interface::Virtio => format!("virtio{count}"),
        Interface::None | Interface::Open => format!("none{count}0"),
    };
    draft.drives.push(DriveDraft {
        interface,
        drive: DriveConfig {
            id: id.unwrap_or(name),
            file: file.into(),
            // None: so it leads from where the process is.
            directory: std::env::current_dir().unwrap_or_default(),
            is_read_only,
            format,
            cache,
            discards,
            zeroes,
            locks,
            option: draft.option.clone(),
        },
        on_error,
    });
    Ok(())
}

/// A drive for `drive_add`, beside those of these names.
///
/// # Errors
/// The text says what is wrong with it.
pub fn hot_drive(options: &str, names: &[String]) -> Result<DriveConfig, String> {
    let mut draft = Draft::default();
    drive(&mut draft, options)?;
    let Some(DriveDraft {
        interface, drive, ..
    }) = draft.drives.pop()
    else {
        return Err("A block device must be specified for \"file\"".to_owned());
    };
    if names.contains(&drive.id) {
        return Err(format!("Duplicate ID '{}' for drive", drive.id));
    }
    match interface {
        // QEMU's number of the interface.
        Interface::Virtio => Err("Can't hot-add drive to type 7".to_owned()),
        Interface::None | Interface::Open => Ok(drive),
    }
}

/// `cache=` and what it stands for.
fn cache(list: &mut KeyVal) -> Result<Cache, String> {
    let [is_writeback, is_direct, ignores_flushes] = match list.take("cache").as_deref() {
        None | Some("writeback") => [true, false, false],
        Some("none" | "off") => [true, true, false],
        Some("writethrough") => [false, false, false],
        Some("directsync") => [false, true, false],
        Some("unsafe") => [true, false, true],
        Some(_) => return Err("invalid cache option".to_owned()),
    };
    let mut cache = Cache {
        is_writeback,
        is_direct,
        ignores_flushes,
    };
    for (key, switch) in [
        ("cache.writeback", &mut cache.is_writeback),
        ("cache.direct", &mut cache.is_direct),
        ("cache.no-flush", &mut cache.ignores_flushes),
    ] {
        if let Some(value) = list.take(key) {
            *switch = parse_switch(&value)
                .ok_or_else(|| format!("Parameter '{key}' expects 'on' or 'off'"))?;
        }
    }
    Ok(cache)
}

/// `-device`.
pub(super) fn device(draft: &mut Draft, value: &str) -> Answer {
    let mut list = KeyVal::parse(value, Some("driver"))?;
    let driver = list.take("driver").ok_or("Parameter 'driver' is missing")?;
    match driver.as_str() {
        DISK => {}
        "help" | "?" => {
            draft.print = Some(format!(
                "Storage devices:\nname \"{DISK}\", bus virtio-bus\n"
            ));
            return Ok(());
        }
        other if OTHER_DEVICES.contains(&other) => {
            return Err(format!("{other}: not built in this version"));
        }
        other => return Err(format!("'{other}' is not a valid device model name")),
    }
    let id = list.take("id");
    if let Some(id) = &id {
        check_id(id)?;
        if draft
            .devices
            .iter()
            .any(|device| device.id.as_ref() == Some(id))
        {
            return Err(format!("Duplicate ID '{id}' for device"));
        }
    }
    let slot = list.take("bus").map(|bus| slot_of(&bus)).transpose()?;
    let serial = list.take("serial").unwrap_or_default();
    let drive = list.take("drive").unwrap_or_default();
    let mut on_error = [None; 2];
    for (policy, (key, _)) in on_error.iter_mut().zip(POLICIES) {
        *policy = match list.take(key).as_deref() {
            None | Some("auto") => None,
            Some(value) => Some(OnError::from_name(value).ok_or_else(|| {
                format!("Parameter '{DISK}.{key}' does not accept value '{value}'")
            })?),
        };
    }
    list.refuse(&OTHER_DISK_PROPERTIES)?;
    if let Some((key, _)) = list.rest().next() {
        return Err(format!("Property '{DISK}.{key}' not found"));
    }
    if drive.is_empty() {
        return Err("drive property not set".to_owned());
    }
    draft.devices.push(DeviceDraft {
        option: draft.option.clone(),
        id,
        drive,
        slot,
        serial,
        on_error,
    });
    Ok(())
}

fn slot_of(bus: &str) -> Result<usize, String> {
    (0..SLOTS)
        .find(|slot| bus == format!("virtio-mmio-bus.{slot}"))
        .ok_or_else(|| format!("Bus '{bus}' not found"))
}

/// Connects devices and drives.
pub(super) fn connect(draft: &mut Draft) -> Result<(Vec<DriveConfig>, Vec<DiskConfig>), Error> {
    let drives = std::mem::take(&mut draft.drives);
    let mut disks: Vec<DiskConfig> = Vec::new();
    for device in std::mem::take(&mut draft.devices) {
        let refused = |text: String| Error::Option {
            option: device.option.clone(),
            text,
        };
        let id = &device.drive;
        let Some(drive) = drives.iter().position(|drive| drive.drive.id == *id) else {
            return Err(refused(format!(
                "Property '{DISK}.drive' can't find value '{id}'"
            )));
        };
        if drives[drive].interface == Interface::Virtio {
            return Err(refused(format!(
                "Drive '{id}' is already in use because it has been automatically connected to \
                 another device (did you need 'if=none' in the drive options?)"
            )));
        }
        if disks.iter().any(|disk| disk.drive == drive) {
            return Err(refused(format!(
                "Drive '{id}' is already in use by another device"
            )));
        }
        let slot = free_slot(&disks, device.slot).map_err(refused)?;
        let [read, write] = drives[drive].on_error;
        let [own_read, own_write] = device.on_error;
        disks.push(DiskConfig {
            id: device.id,
            drive,
            slot,
            serial: device.serial,
            on_error: [own_read.unwrap_or(read), own_write.unwrap_or(write)],
            option: device.option,
        });
    }
    for (drive, wanted) in drives.iter().enumerate() {
        let is_used = disks.iter().any(|disk| disk.drive == drive);
        if is_used || wanted.interface == Interface::None {
            continue;
        }
        let refused = |text| Error::Option {
            option: wanted.drive.option.clone(),
            text,
        };
        disks.push(DiskConfig {
            id: None,
            drive,
            slot: free_slot(&disks, None).map_err(refused)?,
            serial: String::new(),
            on_error: wanted.on_error,
            option: wanted.drive.option.clone(),
        });
    }
    Ok((drives.into_iter().map(|drive| drive.drive).collect(), disks))
}

/// The slot that was asked for, or the last one that nobody has.
fn free_slot(disks: &[DiskConfig], wanted: Option<usize>) -> Result<usize, String> {
    let is_free = |slot: &usize| disks.iter().all(|disk| disk.slot != *slot);
    match wanted {
        Some(slot) if is_free(&slot) => Ok(slot),
        Some(slot) => Err(format!("Bus 'virtio-mmio-bus.{slot}' is full")),
        None => (0..SLOTS)
            .rev()
            .find(is_free)
            .ok_or_else(|| format!("No 'virtio-bus' bus found for device '{DISK}'")),
    }
}

/// Options that say what becomes of requests that fail, and of which.
const POLICIES: [(&str, &str); 2] = [("rerror", "read"), ("werror", "write")];

/// The one device there is.
const DISK: &str = "virtio-blk-device";

/// Formats and protocols of QEMU's that this version does not build.
#[rustfmt::skip]
const FORMATS: [&str; 35] = [
    "blkdebug", "blklogwrites", "blkreplay", "blkverify", "bochs", "cloop", "copy-before-write",
    "copy-on-read", "curl", "dmg", "file", "ftp", "ftps", "gluster", "host_cdrom", "host_device",
    "http", "https", "iscsi", "luks", "nbd", "nfs", "null-aio", "null-co", "nvme", "parallels",
    "preallocate", "qcow", "qed", "quorum", "rbd", "vdi", "vhdx", "vmdk", "vpc",
];

/// Options of a drive that QEMU has and this version does not build.
#[rustfmt::skip]
const OTHER_DRIVE_OPTIONS: [&str; 26] = [
    "aio", "auto-read-only", "bps", "bps_max", "bps_rd", "bps_wr", "bus", "copy-on-read",
    "force-share", "format.name", "group", "index", "iops", "iops_max", "iops_rd", "iops_size",
    "iops_wr", "locking", "node-name", "offset", "serial", "size", "snapshot",
    "stats-account-failed", "stats-account-invalid", "unit",
];

/// Properties of the disk that QEMU has and this version does not build.
#[rustfmt::skip]
const OTHER_DISK_PROPERTIES: [&str; 36] = [
    "account-failed", "account-invalid", "any_layout", "backend_defaults", "bootindex",
    "config-wce", "cyls", "discard", "discard_granularity", "event_idx", "heads",
    "indirect_desc", "iommu_platform", "iothread", "iothread-vq-mapping", "lcyls", "lheads",
    "logical_block_size", "lsecs", "max-discard-sectors", "max-write-zeroes-sectors",
    "min_io_size", "notify_on_empty", "num-queues", "opt_io_size", "packed",
    "physical_block_size", "queue-size", "queue_reset", "report-discard-granularity",
    "request-merging", "scsi", "secs", "seg-max-adjust", "share-rw", "write-zeroes",
];

/// Devices of QEMU's microvm that this version does not build.
#[rustfmt::skip]
const OTHER_DEVICES: [&str; 24] = [
    "isa-serial", "loader", "pvpanic", "scsi-cd", "scsi-hd", "vhost-vsock-device",
    "virtconsole", "virtio-9p-device", "virtio-balloon-device", "virtio-blk", "virtio-blk-pci",
    "virtio-crypto-device", "virtio-gpu-device", "virtio-input-host-device",
    "virtio-iommu-device", "virtio-keyboard-device", "virtio-net-device", "virtio-net-pci",
    "virtio-rng-device", "virtio-scsi-device", "virtio-serial-device", "virtserialport",
    "vhost-user-fs-device", "vmcoreinfo",
];

#[cfg(test)]
mod tests {
    use crate::cli::tests::{config, refusal};

    fn slots(line: &str) -> Vec<(String, usize, u64, u32)> {
        let machine = config(line).machine;
        let disks = machine.disks.iter();
        disks
            .map(|disk| {
                let file = machine.drives[disk.drive].file.display().to_string();
                (file, disk.slot, disk.base(), disk.gsi())
            })
            .collect()
    }

    #[test]
    fn disks_take_the_last_slot_that_is_free() {
        let one = ("a".to_owned(), 7, 0xfeb0_0e00, 12);
        for line in [
            "-drive if=none,id=d0,file=a,format=raw -device virtio-blk-device,drive=d0",
            "-device virtio-blk-device,drive=d0,id=x -drive id=d0,file=a,format=raw,readonly=off",
            "-drive a,format=raw,cache=writeback,file.locking=off",
            "-drive if=virtio,file=a,format=raw,media=disk",
        ] {
            assert_eq!(slots(line), std::slice::from_ref(&one), "{line}");
        }
        assert_eq!(
            slots(
                "-drive file=c,format=raw -drive if=none,id=d0,file=a,format=raw \
                 -drive if=none,id=d1,file=b,format=raw -drive if=none,file=e,format=raw \
                 -device virtio-blk-device,drive=d0 \
                 -device virtio-blk-device,drive=d1,bus=virtio-mmio-bus.0"
            ),
            [
                one,
                ("b".to_owned(), 0, 0xfeb0_0000, 5),
                ("c".to_owned(), 6, 0xfeb0_0c00, 11),
            ]
        );
        let machine = config("-drive file=a,readonly=on").machine;
        let drive = &machine.drives[0];
        assert!(drive.is_read_only && drive.format.is_none());
        assert_eq!(drive.option, "-drive file=a,readonly=on");
    }

    #[test]
    fn caches_are_qemus() {
        let cache = |more: &str| {
            let drive = &config(&format!("-drive file=a,{more}")).machine.drives[0];
            let cache = drive.cache;
            [cache.is_writeback, cache.is_direct, cache.ignores_flushes]
        };
        for (option, expected) in [
            ("format=qcow2", [true, false, false]),
            ("cache=writeback", [true, false, false]),
            ("cache=none", [true, true, false]),
            ("cache=writethrough", [false, false, false]),
            ("cache=directsync", [false, true, false]),
            ("cache=unsafe", [true, false, true]),
            (
                "cache=none,cache.direct=off,cache.no-flush=on",
                [true, false, true],
            ),
        ] {
            assert_eq!(cache(option), expected, "{option}");
        }
    }

    #[test]
    fn what_becomes_of_errors_is_the_disks_or_the_drives_wish() {
        use crate::config::OnError::{Enospc, Ignore, Report, Stop};
        let policy = |line: &str| config(line).machine.disks[0].on_error;
        let d0 = "-drive id=d0,file=a,format=raw";
        let blk = "-device virtio-blk-device,drive=d0";
        for (line, wanted) in [
            (d0.to_owned(), [Report, Enospc]),
            (format!("{d0},werror=stop,rerror=ignore"), [Ignore, Stop]),
            (
                format!("{d0},werror=stop {blk},rerror=stop,werror=auto"),
                [Stop, Stop],
            ),
            (format!("{d0},werror=stop {blk},werror=report"), [Report; 2]),
        ] {
            assert_eq!(policy(&line), wanted, "{line}");
        }
    }

    #[test]
    fn what_does_not_fit_is_refused_in_qemus_words() {
        let d0 = "-drive if=none,id=d0,file=a,format=raw";
        let blk = "-device virtio-blk-device";
        let cases = [
            (
                format!("{blk},drive=d1"),
                "Property 'virtio-blk-device.drive' can't find value 'd1'",
            ),
            (blk.to_owned(), "drive property not set"),
            (format!("{blk},drive="), "drive property not set"),
            (
                format!("{d0} {blk},drive=d0 {blk},drive=d0"),
                "Drive 'd0' is already in use by another device",
            ),
            (format!("{d0} {d0}"), "Duplicate ID 'd0' for drive"),
            (format!("{d0},cache=foo"), "invalid cache option"),
            (
                format!("{d0},cache.direct=x"),
                "Parameter 'cache.direct' expects 'on' or 'off'",
            ),
            (format!("{d0},discard=x"), "Invalid discard option"),
            (
                format!("{d0},detect-zeroes=x"),
                "invalid parameter value: x",
            ),
            (
                format!("{d0},detect-zeroes=unmap"),
                "setting detect-zeroes to unmap is not allowed without setting discard operation \
                 to unmap",
            ),
            (
                format!("{d0},aio=native"),
                "aio=native: not built in this version",
            ),
            (
                format!("{d0},bar=foo"),
                "Block format 'raw' does not support the option 'bar'",
            ),
            (format!("{d0},werror=x"), "'x' invalid write error action"),
            (
                format!("{d0},rerror=enospc"),
                "'enospc' invalid read error action",
            ),
            (
                format!("{d0} {blk},drive=d0,rerror=x"),
                "Parameter 'virtio-blk-device.rerror' does not accept value 'x'",
            ),
            (format!("{d0},format=foo"), "Unknown driver 'foo'"),
            (
                format!("{d0},format=qed"),
                "format=qed: not built in this version",
            ),
            (format!("{d0},if=foo"), "unsupported bus type 'foo'"),
            (
                format!("{d0},readonly=x"),
                "Parameter 'read-only' expects 'on' or 'off'",
            ),
            (format!("{d0},file.locking=x"), "invalid parameter value: x"),
            (format!("{d0},media=foo"), "'foo' invalid media"),
            (
                "-drive if=none,id=d0,format=raw".to_owned(),
                "A block device must be specified for \"file\"",
            ),
            (
                "-drive id=1d,file=a,format=raw".to_owned(),
                "Parameter 'id' expects an identifier\nIdentifiers consist of letters, digits, \
                 '-', '.', '_', starting with a letter.",
            ),
            (
                format!("{d0} {blk},drive=d0,bus=virtio-mmio-bus.9"),
                "Bus 'virtio-mmio-bus.9' not found",
            ),
            (
                format!("{d0} {blk},drive=d0,foo=1"),
                "Property 'virtio-blk-device.foo' not found",
            ),
            (
                format!("{d0} {blk},drive=d0,packed=on"),
                "packed=on: not built in this version",
            ),
            (
                "-device foo,drive=d0".to_owned(),
                "'foo' is not a valid device model name",
            ),
            (
                "-device virtio-net-device".to_owned(),
                "virtio-net-device: not built in this version",
            ),
            (
                "-device drive=d0".to_owned(),
                "Parameter 'driver' is missing",
            ),
            (
                format!("{d0},if=virtio {blk},drive=d0"),
                "Drive 'd0' is already in use because it has been automatically connected to \
                 another device (did you need 'if=none' in the drive options?)",
            ),
        ];
        for (line, text) in cases {
            let refusal = refusal(&line);
            let last = line.rsplit(" -").next().unwrap().trim_start_matches('-');
            assert_eq!(refusal, format!("-{last}: {text}"), "{line}");
        }
        let full = (0..9)
            .map(|n| format!("-drive file={n},format=raw "))
            .collect::<String>();
        assert_eq!(
            refusal(&full),
            "-drive file=8,format=raw: No 'virtio-bus' bus found for device 'virtio-blk-device'"
        );
        let two = format!(
            "{d0} -drive if=none,id=d1,file=b,format=raw {blk},drive=d0,bus=virtio-mmio-bus.0 \
             {blk},drive=d1,bus=virtio-mmio-bus.0"
        );
        assert!(refusal(&two).ends_with(": Bus 'virtio-mmio-bus.0' is full"));
    }
}
