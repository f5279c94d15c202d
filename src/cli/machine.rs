//! `-machine`, `-accel`, `-cpu`, `-smp` and what the machine boots.

use super::draft::{Draft, Machine};
use super::keyval::KeyVal;
use crate::config::{Accel, Chips};

type Answer = Result<(), String>;

/// Most vCPUs a machine can have here.
const MAX_CPUS: i64 = 16;

/// Machine properties of QEMU's that could only be given one way here.
const OTHER_PROPERTIES: [&str; 22] = [
    "confidential-guest-support",
    "dt-kernel-options",
    "dtb",
    "dump-guest-core",
    "dumpdtb",
    "fd-bootchk",
    "firmware",
    "graphics",
    "hmat",
    "i8042",
    "ioapic2",
    "kvm-shadow-mem",
    "mem-merge",
    "memory-encryption",
    "option-roms",
    "pcie",
    "phandle-start",
    "sgx-epc",
    "smm",
    "suppress-vmdesc",
    "usb",
    "vmport",
];

/// `-machine`.
pub(super) fn machine(draft: &mut Draft, value: &str) -> Answer {
    let mut list = KeyVal::parse_strict(value, Some("type"))?;
    match list.take("type").as_deref() {
        Some("help" | "?") => {
            let text = "Supported machines are:\nmicrovm              microvm (i386) (default)\n";
            draft.print = Some(text.to_owned());
            return Ok(());
        }
        Some("microvm") | None => {}
        Some(other) => {
            return Err(format!(
                "unsupported machine type: \"{other}\"\nUse -machine help to list supported machines"
            ));
        }
    }
    let mut machine = Machine {
        implies_acpi_off: true,
        ..Machine::default()
    };
    if let Some(acpi) = list.take("acpi") {
        machine.implies_acpi_off = false;
        // Written out or left to the machine: it is off.
        if is_on("acpi", &acpi, false)? {
            return Err("acpi=on: not built in this version".to_owned());
        }
    }
    let mut chip = |name, auto| {
        list.take(name)
            .map_or(Ok(auto), |value| is_on(name, &value, auto))
    };
    let default = Chips::default();
    machine.chips = Chips {
        pic: chip("pic", default.pic)?,
        pit: chip("pit", default.pit)?,
        rtc: chip("rtc", default.rtc)?,
        ..default
    };
    match list.take("kernel-irqchip").as_deref() {
        None | Some("split") => {}
        Some("on") => machine.chips.irqchip_on = true,
        Some("off") => return Err("kernel-irqchip=off: not built in this version".to_owned()),
        Some(value) => {
            return Err(format!(
                "Parameter 'kernel-irqchip' does not accept value '{value}'"
            ));
        }
    }
    machine.no_isa_serial = list.take_switch("isa-serial")? == Some(false);
    machine.no_auto_kernel_cmdline = list.take_switch("auto-kernel-cmdline")? == Some(false);
    machine.memory_backend = list.take("memory-backend");
    if let Some(name) = list.take("accel") {
        accel(draft, &name)?;
    }
    draft.machine = machine;
    list.refuse(&OTHER_PROPERTIES)?;
    match list.rest().next() {
        Some((key, _)) => Err(format!("Property 'microvm-machine.{key}' not found")),
        None => Ok(()),
    }
}

/// Reads an on-off-auto property.
fn is_on(name: &str, value: &str, auto: bool) -> Result<bool, String> {
    match value {
        "on" => Ok(true),
        "off" => Ok(false),
        "auto" => Ok(auto),
        _ => Err(format!(
            "Parameter '{name}' does not accept value '{value}'"
        )),
    }
}

/// `-accel`.
pub(super) fn accel(draft: &mut Draft, value: &str) -> Answer {
    let mut list = KeyVal::parse(value, Some("accel"))?;
    let name = list.take("accel").unwrap_or_default();
    draft.accel = Some(match name.as_str() {
        "kvm" => Accel::Kvm,
        "none" => Accel::None,
        "help" | "?" => {
            draft.print = Some("Accelerators supported in this version:\nkvm\nnone\n".to_owned());
            return Ok(());
        }
        "tcg" | "xen" | "hax" | "hvf" | "nvmm" | "whpx" | "qtest" => {
            return Err(format!("{name}: not built in this version"));
        }
        _ => return Err(format!("invalid accelerator {name}")),
    });
    list.refuse(&[
        "dirty-ring-size",
        "eager-split-size",
        "igd-passthru",
        "kernel-irqchip",
        "kvm-shadow-mem",
        "notify-vmexit",
        "notify-window",
        "one-insn-per-tb",
        "split-wx",
        "tb-size",
        "thread",
        "xen-version",
        "device",
    ])?;
    match list.rest().next() {
        Some((key, _)) => Err(format!("Property '{name}-accel.{key}' not found")),
        None => Ok(()),
    }
}

/// `-enable-kvm`.
pub(super) fn enable_kvm(draft: &mut Draft, _value: &str) -> Answer {
    accel(draft, "kvm")
}

/// `-cpu`.
pub(super) fn cpu(draft: &mut Draft, value: &str) -> Answer {
    let (name, features) = match value.split_once(',') {
        Some((name, features)) => (name, Some(features)),
        None => (value, None),
    };
    if matches!(name, "help" | "?") {
        draft.print = Some("Available CPUs:\n  host\n  qemu64 (default)\n".to_owned());
        return Ok(());
    }
    if !matches!(name, "host" | "qemu64") {
        return Err(format!("unable to find CPU model '{name}'"));
    }
    if let Some(features) = features {
        return Err(format!(
            "CPU features '{features}': not built in this version"
        ));
    }
    draft.cpu = Some(name.to_owned());
    Ok(())
}

/// `-smp`.
pub(super) fn smp(draft: &mut Draft, value: &str) -> Answer {
    let mut list = KeyVal::parse(value, Some("cpus"))?;
    let text = list.take("cpus").unwrap_or_else(|| "1".to_owned());
    let cpus: i64 = text
        .parse()
        .map_err(|_| "Parameter 'smp.cpus' expects integer".to_owned())?;
    if cpus == 0 {
        let text = "Invalid CPU topology: CPU topology parameters must be greater than zero";
        return Err(text.to_owned());
    }
    let vcpus = u8::try_from(cpus).ok().filter(|_| cpus <= MAX_CPUS);
    draft.vcpus = Some(vcpus.ok_or_else(|| {
        format!(
            "Invalid SMP CPUs {cpus}. The max CPUs supported by machine 'microvm' is {MAX_CPUS}"
        )
    })?);
    list.refuse(&[
        "books", "clusters", "cores", "dies", "drawers", "maxcpus", "modules", "sockets", "threads",
    ])?;
    match list.rest().next() {
        Some((key, _)) => Err(format!("Parameter 'smp.{key}' is unexpected")),
        None => Ok(()),
    }
}

/// `-bios`.
pub(super) fn bios(draft: &mut Draft, value: &str) -> Answer {
    draft.bios = Some(value.into());
    Ok(())
}

/// `-kernel`.
pub(super) fn kernel(draft: &mut Draft, value: &str) -> Answer {
    draft.kernel = Some(value.into());
    Ok(())
}

/// `-initrd`.
pub(super) fn initrd(draft: &mut Draft, value: &str) -> Answer {
    draft.initrd = Some(value.into());
    Ok(())
}

/// `-append`.
pub(super) fn append(draft: &mut Draft, value: &str) -> Answer {
    draft.append = Some(value.to_owned());
    Ok(())
}
