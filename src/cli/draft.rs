//! What the options said so far, and how it becomes a [`Config`] when all have been read.

use std::path::PathBuf;

use super::Error;
use super::disk::{self, DeviceDraft, DriveDraft};
use crate::config::{
    Accel, Boot, ChardevConfig, ChardevKind, Chips, Config, Global, Incoming, Interface,
    MachineConfig, MemoryBackend, MonitorConfig,
};
use crate::units::MIB;

/// Half a configuration: handlers fill it in, in any order.
#[derive(Debug, Default)]
pub(super) struct Draft {
    /// The option being read, as it was typed.
    pub(super) option: String,
    /// Print this and be done.
    pub(super) print: Option<String>,
    pub(super) machine: Machine,
    pub(super) accel: Option<Accel>,
    pub(super) cpu: Option<String>,
    pub(super) memory: Option<u64>,
    pub(super) vcpus: Option<u8>,
    pub(super) name: Option<String>,
    pub(super) uuid: Option<[u8; 16]>,
    pub(super) start_paused: bool,
    pub(super) no_reboot: bool,
    pub(super) no_defaults: bool,
    pub(super) daemonize: bool,
    pub(super) pidfile: Option<PathBuf>,
    pub(super) log_file: Option<PathBuf>,
    pub(super) log_items: Vec<String>,
    pub(super) bios: Option<PathBuf>,
    pub(super) kernel: Option<PathBuf>,
    pub(super) initrd: Option<PathBuf>,
    pub(super) append: Option<String>,
    pub(super) backends: Vec<MemoryBackend>,
    pub(super) drives: Vec<DriveDraft>,
    pub(super) devices: Vec<DeviceDraft>,
    pub(super) chardevs: Vec<ChardevConfig>,
    /// `-serial`, in order; `None` is `none`.
    pub(super) serials: Vec<Option<Place>>,
    /// `-monitor` and `-mon`, in order.
    pub(super) monitors: Vec<(String, Place)>,
    /// Whether one of them was given, `none` included.
    pub(super) has_monitor_option: bool,
    pub(super) incoming: Option<Incoming>,
    pub(super) globals: Vec<Global>,
    pub(super) interface: Interface,
    pub(super) commands: Vec<String>,
    pub(super) script: Option<PathBuf>,
    pub(super) prompt: Option<String>,
}

/// `-M`.
#[derive(Debug, Default)]
pub(super) struct Machine {
    /// Whether `-M` was given without `acpi=`.
    pub(super) implies_acpi_off: bool,
    pub(super) no_isa_serial: bool,
    pub(super) no_auto_kernel_cmdline: bool,
    pub(super) chips: Chips,
    pub(super) memory_backend: Option<String>,
}

/// Where a serial port or a monitor gets its bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// `chardev:ID`.
    Chardev(String),
    /// A device of its own.
    Own(ChardevKind),
}

/// What the default serial port keeps.
const SERIAL_RING: usize = 64 << 10;

impl Draft {
    /// The whole configuration.
    ///
    /// # Errors
    /// Options that do not go together, or name what is not there.
    pub(super) fn finish(mut self) -> Result<Config, Error> {
        if self.machine.implies_acpi_off {
            log::warn!(
                "machine 'microvm': acpi=off is implied, acpi=on is not built in this version"
            );
        }
        let memory_backend = self.memory_backend()?;
        let memory = self
            .memory
            .or(memory_backend.as_ref().map(|backend| backend.size))
            .unwrap_or(128 * MIB);
        let boot = self.boot()?;
        let (drives, disks) = disk::connect(&mut self)?;
        let serial = self.serial()?;
        let monitors = self.monitors()?;
        self.check_stdio()?;
        Ok(Config {
            machine: MachineConfig {
                accel: self.accel,
                cpu: self.cpu.unwrap_or_else(|| "qemu64".to_owned()),
                memory,
                vcpus: self.vcpus.unwrap_or(1),
                uuid: self.uuid,
                boot,
                append: self.append.unwrap_or_default(),
                auto_kernel_cmdline: !self.machine.no_auto_kernel_cmdline,
                serial,
                chips: self.machine.chips,
                interface: self.interface,
                drives,
                disks,
                memory_backend,
            },
            name: self.name,
            start_paused: self.start_paused,
            no_reboot: self.no_reboot,
            pidfile: self.pidfile,
            daemonize: self.daemonize,
            log_file: self.log_file,
            log_items: self.log_items,
            chardevs: self.chardevs,
            monitors,
            incoming: self.incoming,
            globals: self.globals,
            commands: self.commands,
            script: self.script,
            prompt: self.prompt.unwrap_or_else(|| "(qemu) ".to_owned()),
        })
    }

    fn memory_backend(&mut self) -> Result<Option<MemoryBackend>, Error> {
        let wanted = self.machine.memory_backend.take();
        for backend in &self.backends {
            if wanted.as_ref() != Some(&backend.id) {
                log::warn!("memory backend '{}' is not used", backend.id);
            }
        }
        let Some(wanted) = wanted else {
            return Ok(None);
        };
        let backend = self
            .backends
            .iter()
            .find(|backend| backend.id == wanted)
            .ok_or_else(|| Error::Whole(format!("Memory backend '{wanted}' not found")))?;
        if self.memory.is_some_and(|memory| memory != backend.size) {
            let text = "Machine memory size does not match the size of the memory backend";
            return Err(Error::Whole(text.to_owned()));
        }
        Ok(Some(backend.clone()))
    }

    fn boot(&mut self) -> Result<Boot, Error> {
        let whole = |text: &str| Err(Error::Whole(text.to_owned()));
        match (self.bios.take(), self.kernel.take(), self.initrd.take()) {
            (_, None, Some(_)) => whole("-initrd only allowed with -kernel option"),
            (Some(_), Some(_), _) => whole("-bios with -kernel: not built in this version"),
            (Some(_), ..) if self.append.is_some() => {
                whole("-append only allowed with -kernel option")
            }
            (Some(bios), ..) => Ok(Boot::Bios(bios)),
            (None, Some(kernel), initrd) => Ok(Boot::Kernel { kernel, initrd }),
            (None, None, None) => Ok(Boot::Builtin),
        }
    }

    /// The chardev of COM1.
    fn serial(&mut self) -> Result<Option<String>, Error> {
        let has_port = !self.machine.no_isa_serial;
        let serials = std::mem::take(&mut self.serials);
        if serials.is_empty() {
            if self.no_defaults || !has_port {
                return Ok(None);
            }
            let kind = ChardevKind::Ringbuf { size: SERIAL_RING };
            self.add("serial0".to_owned(), kind)?;
            return Ok(Some("serial0".to_owned()));
        }
        let mut used = serials.into_iter().flatten();
        let first = used.next();
        if used.next().is_some() {
            let text = "-serial: more than one serial port: not built in this version";
            return Err(Error::Whole(text.to_owned()));
        }
        let id = match first {
            None => return Ok(None),
            Some(Place::Chardev(id)) => {
                if !self.has(&id) {
                    return Err(Error::Option {
                        option: format!("-serial chardev:{id}"),
                        text: format!(
                            "could not connect serial device to character backend 'chardev:{id}'"
                        ),
                    });
                }
                id
            }
            Some(Place::Own(kind)) => {
                self.add("serial0".to_owned(), kind)?;
                "serial0".to_owned()
            }
        };
        Ok(has_port.then_some(id))
    }

    fn monitors(&mut self) -> Result<Vec<MonitorConfig>, Error> {
        let mut monitors: Vec<MonitorConfig> = Vec::new();
        let wants_none = self.no_defaults || self.daemonize;
        let only_commands = !self.commands.is_empty() || self.script.is_some();
        if !self.has_monitor_option && !wants_none && !only_commands {
            let place = Place::Own(ChardevKind::Stdio);
            self.monitors.push(("-monitor stdio".to_owned(), place));
        }
        for (option, place) in std::mem::take(&mut self.monitors) {
            let refused = |text: String| Error::Option {
                option: option.clone(),
                text,
            };
            let chardev = match place {
                Place::Chardev(id) => {
                    if !self.has(&id) {
                        return Err(refused(format!("chardev \"{id}\" not found")));
                    }
                    id
                }
                Place::Own(kind) => {
                    let id = format!("compat_monitor{}", monitors.len());
                    self.add(id.clone(), kind)?;
                    id
                }
            };
            if monitors.iter().any(|monitor| monitor.chardev == chardev) {
                return Err(refused(format!("chardev '{chardev}' is already in use")));
            }
            monitors.push(MonitorConfig { chardev });
        }
        Ok(monitors)
    }

    fn check_stdio(&self) -> Result<(), Error> {
        let uses = self
            .chardevs
            .iter()
            .filter(|chardev| chardev.kind == ChardevKind::Stdio);
        let text = match uses.count() {
            0 => return Ok(()),
            _ if self.daemonize => "-daemonize: cannot be used with stdio",
            1 => return Ok(()),
            _ => "cannot use stdio by multiple character devices",
        };
        Err(Error::Whole(text.to_owned()))
    }

    fn has(&self, id: &str) -> bool {
        self.chardevs.iter().any(|chardev| chardev.id == id)
    }

    fn add(&mut self, id: String, kind: ChardevKind) -> Result<(), Error> {
        if self.has(&id) {
            return Err(Error::Whole(format!("Duplicate ID '{id}' for chardev")));
        }
        self.chardevs.push(ChardevConfig { id, kind });
        Ok(())
    }
}
