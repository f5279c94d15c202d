//! What the command line asked for, checked in itself and ready to be built.

use std::fmt;
use std::io;
use std::path::PathBuf;

/// Everything the program needs to know to start.
#[derive(Clone, Debug)]
pub struct Config {
    /// The machine and what is in it.
    pub machine: MachineConfig,
    /// `-name`.
    pub name: Option<String>,
    /// `-S`: do not start the guest.
    pub start_paused: bool,
    /// `-no-reboot`: a guest reset ends the program.
    pub no_reboot: bool,
    /// `-pidfile`.
    pub pidfile: Option<PathBuf>,
    /// `-daemonize`.
    pub daemonize: bool,
    /// `-D FILE`: the log goes there instead of stderr.
    pub log_file: Option<PathBuf>,
    /// `-d ITEMS`: log items switched on at start.
    pub log_items: Vec<String>,
    /// Character devices by id: those of `-chardev` and those implied by other options.
    pub chardevs: Vec<ChardevConfig>,
    /// Monitors in the order given; the default is one on stdio.
    pub monitors: Vec<MonitorConfig>,
    /// `-incoming`.
    pub incoming: Option<Incoming>,
    /// `-global DRIVER.NAME=VALUE` that concern migration or hmpsh.
    pub globals: Vec<Global>,
    /// `-e CMD` in the order given, then the lines of `-script FILE`.
    pub commands: Vec<String>,
    /// `-script FILE`.
    pub script: Option<PathBuf>,
    /// `-prompt STR`; default `(qemu) `.
    pub prompt: String,
}

/// The machine itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MachineConfig {
    /// `-accel`; `None` when not given: KVM if it is there, else none with a line that says so.
    pub accel: Option<Accel>,
    /// `-cpu NAME`; default qemu64.
    pub cpu: String,
    /// `-m`, bytes.
    pub memory: u64,
    /// `-smp`, 1 to 16.
    pub vcpus: u8,
    /// `-uuid`.
    pub uuid: Option<[u8; 16]>,
    /// What the guest boots.
    pub boot: Boot,
    /// `-append`: for the built-in guest and for kernels.
    pub append: String,
    /// `-M auto-kernel-cmdline=on|off`: whether a kernel is told of virtio-mmio devices on its
    /// command line; default on.
    pub auto_kernel_cmdline: bool,
    /// Chardev id of COM1; `None`: no serial device and no serial section.
    pub serial: Option<String>,
    /// Chips that a machine may have or not.
    pub chips: Chips,
    /// What virtio devices look like to the guest.
    pub interface: Interface,
    /// `-drive`, in the order given, with or without a disk that uses it.
    pub drives: Vec<DriveConfig>,
    /// Disks in the order of their sections in a stream.
    pub disks: Vec<DiskConfig>,
    /// `-M memory-backend=ID`: names and backs the main RAM block.
    pub memory_backend: Option<MemoryBackend>,
}

/// Slots for virtio devices, 0 to 7.
pub const SLOTS: usize = 8;
/// Guest-physical address of slot 0.
pub const SLOTS_BASE: u64 = 0xfeb0_0000;
/// Bytes of a slot.
pub const SLOT_BYTES: u64 = 512;
/// Interrupt line of slot 0; the others follow.
const SLOTS_GSI: u32 = 5;

/// Registers of the slots: `-global virtio-mmio.force-legacy=`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Interface {
    /// What virtio was before 1.0, and the default.
    #[default]
    Legacy,
    /// Virtio 1.0 and later.
    Modern,
}

/// `-drive`: an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DriveConfig {
    /// `id=`, or the name QEMU gives.
    pub id: String,
    /// The file or block device.
    pub file: PathBuf,
    /// From where `file` leads there, if it is relative: the process may go elsewhere.
    pub directory: PathBuf,
    /// `readonly=on`.
    pub is_read_only: bool,
    /// `format=`; without it the image is looked at.
    pub format: Option<Format>,
    /// `cache=`.
    pub cache: Cache,
    /// `discard=unmap`: what the guest discards is given back to the host.
    pub discards: bool,
    /// `detect-zeroes=`.
    pub zeroes: Zeroes,
    /// The image is locked against others (`file.locking=`).
    pub locks: bool,
    /// The option as it was typed, for messages.
    pub option: String,
}

/// Formats of images.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// The bytes of the disk.
    Raw,
    /// QEMU's, versions 2 and 3.
    Qcow2,
}

impl Format {
    /// QEMU's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }

    /// The format of that name, if it is built.
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "raw" => Some(Self::Raw),
            "qcow2" => Some(Self::Qcow2),
            _ => None,
        }
    }
}

/// What becomes of zeros that are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Zeroes {
    /// They are written.
    #[default]
    Off,
    /// The place is made zero.
    On,
    /// As [`Self::On`], and it is given back to the host.
    Unmap,
}

impl Zeroes {
    /// QEMU's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::On => "on",
            Self::Unmap => "unmap",
        }
    }
}

/// `cache=`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cache {
    /// What is written may stay in the host's cache until the guest flushes.
    pub is_writeback: bool,
    /// Past the host's cache.
    pub is_direct: bool,
    /// Flushes go no further than the host.
    pub ignores_flushes: bool,
}

impl Default for Cache {
    fn default() -> Self {
        Self {
            is_writeback: true,
            is_direct: false,
            ignores_flushes: false,
        }
    }
}

/// `-device virtio-blk-device`, or what a drive gets by itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskConfig {
    /// `id=`.
    pub id: Option<String>,
    /// Its drive, an index into [`MachineConfig::drives`]; no two disks have the same.
    pub drive: usize,
    /// Its slot, below [`SLOTS`]; no two disks have the same.
    pub slot: usize,
    /// `serial=`, what the guest reads as the disk's serial number; at most 20 bytes are seen.
    pub serial: String,
    /// `rerror=`, `werror=`: what becomes of reads that fail, and of writes and flushes.
    pub on_error: [OnError; 2],
    /// The option that asked for it, as it was typed, for messages.
    pub option: String,
}

/// What becomes of a request that the host can not execute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnError {
    /// The guest is told.
    Report,
    /// The guest is told that all is well.
    Ignore,
    /// The guest stops; when it runs again the request is executed again.
    Stop,
    /// As [`Self::Stop`] if there is no room on the host, else as [`Self::Report`].
    Enospc,
}

impl OnError {
    /// Of reads, and of writes, if nothing was said.
    pub const DEFAULT: [Self; 2] = [Self::Report, Self::Enospc];

    /// As options name it.
    pub fn from_name(name: &str) -> Option<Self> {
        Some(match name {
            "report" => Self::Report,
            "ignore" => Self::Ignore,
            "stop" => Self::Stop,
            "enospc" => Self::Enospc,
            _ => return None,
        })
    }
}

impl MachineConfig {
    /// From here on names of files mean what they mean now, wherever the process goes. Those of
    /// drives know their directory.
    ///
    /// # Errors
    /// The directory is not there any more.
    pub fn fix_names(&mut self) -> io::Result<()> {
        let fix = |path: &mut PathBuf| std::path::absolute(&*path).map(|fixed| *path = fixed);
        match &mut self.boot {
            Boot::Builtin => {}
            Boot::Bios(path) => fix(path)?,
            Boot::Kernel { kernel, initrd } => {
                fix(kernel)?;
                initrd.as_mut().map_or(Ok(()), fix)?;
            }
        }
        match &mut self.memory_backend {
            Some(MemoryBackend {
                kind: BackendKind::File(path),
                ..
            }) => fix(path),
            _ => Ok(()),
        }
    }

    /// Id of the disk that uses that drive, or its place among those without.
    pub fn disk_of(&self, drive: usize) -> Option<String> {
        let at = self.disks.iter().position(|disk| disk.drive == drive)?;
        let nameless = self.disks[..at].iter().filter(|disk| disk.id.is_none());
        Some(match &self.disks[at].id {
            Some(id) => id.clone(),
            None => format!("/machine/peripheral-anon/device[{}]", nameless.count()),
        })
    }
}

impl DiskConfig {
    /// Guest-physical address of the slot, [`SLOT_BYTES`] long.
    pub fn base(&self) -> u64 {
        SLOTS_BASE + SLOT_BYTES * self.slot as u64
    }

    /// Interrupt line.
    pub fn gsi(&self) -> u32 {
        SLOTS_GSI + self.slot as u32
    }
}

/// Chips of `-M` that are there or not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chips {
    /// `pic=on`: two 8259A.
    pub pic: bool,
    /// `pit=on`: an 8254.
    pub pit: bool,
    /// `rtc=on`: an MC146818.
    pub rtc: bool,
    /// `kernel-irqchip=on`, else `split`. Both are the same chips here, but CPUID tells the guest
    /// which of QEMU's it could have.
    pub irqchip_on: bool,
}

impl Default for Chips {
    /// What `auto` means, as for a microvm of QEMU's with KVM.
    fn default() -> Self {
        Self {
            pic: true,
            pit: true,
            rtc: false,
            irqchip_on: false,
        }
    }
}

/// What executes guest instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accel {
    /// KVM.
    Kvm,
    /// Nothing: the guest stays paused, everything else works.
    None,
}

/// What the guest boots.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Boot {
    /// The self-checking guest that comes with hmpsh.
    Builtin,
    /// `-bios FILE`: a flat firmware image, a multiple of 64 KiB.
    Bios(PathBuf),
    /// `-kernel FILE` (and `-initrd FILE`).
    Kernel {
        /// The kernel image.
        kernel: PathBuf,
        /// The initial RAM disk.
        initrd: Option<PathBuf>,
    },
}

/// `-object memory-backend-…`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryBackend {
    /// `id=`; becomes the name of the RAM block.
    pub id: String,
    /// `size=`, bytes; must equal `-m`.
    pub size: u64,
    /// Where the bytes live.
    pub kind: BackendKind,
    /// `share=on`.
    pub share: bool,
}

/// The three kinds of memory backend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BackendKind {
    /// memory-backend-ram.
    Ram,
    /// memory-backend-file, with `mem-path`.
    File(PathBuf),
    /// memory-backend-memfd.
    Memfd,
}

/// One character device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChardevConfig {
    /// Its id, as `info chardev` shows it (`serial0`, `compat_monitor0`, …).
    pub id: String,
    /// What it is.
    pub kind: ChardevKind,
}

impl fmt::Display for ChardevKind {
    /// As options name it, but for `server` and `wait`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stdio => f.write_str("stdio"),
            Self::File(path) => write!(f, "file:{}", path.display()),
            Self::Unix { path, .. } => write!(f, "unix:{}", path.display()),
            Self::Tcp { host, port, .. } => write!(f, "tcp:{host}:{port}"),
            Self::Pty => f.write_str("pty"),
            Self::Null => f.write_str("null"),
            Self::Ringbuf { .. } => f.write_str("ringbuf"),
        }
    }
}

/// Kinds of character device built in this version.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ChardevKind {
    /// The process's own stdin and stdout.
    Stdio,
    /// Output to a file.
    File(PathBuf),
    /// A listening unix socket.
    Unix {
        /// Path of the socket.
        path: PathBuf,
        /// Listen (true) or connect.
        server: bool,
        /// Block the start until a client has connected.
        wait: bool,
    },
    /// TCP.
    Tcp {
        /// Host; empty: every interface.
        host: String,
        /// Port or service name.
        port: String,
        /// Listen (true) or connect.
        server: bool,
        /// Block the start until a client has connected.
        wait: bool,
    },
    /// A pseudo-terminal; its name is printed at start.
    Pty,
    /// Swallows output, never has input.
    Null,
    /// Memory, read with `ringbuf_read`.
    Ringbuf {
        /// Bytes, a power of two; default 65536.
        size: usize,
    },
}

/// One human monitor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MonitorConfig {
    /// The chardev it lives on.
    pub chardev: String,
}

/// `-incoming`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Incoming {
    /// A URI to listen on at once.
    Uri(String),
    /// Wait for `migrate_incoming`.
    Defer,
}

/// `-global DRIVER.NAME=VALUE`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Global {
    /// Before the first dot: `migration` or `hmpsh`.
    pub driver: String,
    /// Property name.
    pub name: String,
    /// Its value, not parsed.
    pub value: String,
}
