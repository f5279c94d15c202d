//! The option table: what is accepted, what it takes, how it is explained, who obeys it.

use super::draft::Draft;
use super::{character, disk, machine, memory, program};

/// One option.
pub(super) struct Row {
    /// Without dashes; the first one is shown first.
    pub(super) names: &'static [&'static str],
    /// What follows it, if anything does.
    pub(super) argument: Option<&'static str>,
    /// One line, for `-help`.
    pub(super) help: &'static str,
    /// What the man page adds; paragraphs are separated by empty lines.
    #[cfg_attr(not(test), expect(dead_code, reason = "a test writes the man page"))]
    pub(super) text: &'static str,
    /// Takes the value; the error is QEMU's sentence.
    pub(super) handler: fn(&mut Draft, &str) -> Result<(), String>,
}

/// A handler with the shape of all of them.
type Handler = fn(&mut Draft, &str) -> Result<(), String>;

const fn takes(
    names: &'static [&'static str],
    argument: &'static str,
    help: &'static str,
    text: &'static str,
    handler: Handler,
) -> Row {
    Row {
        names,
        argument: Some(argument),
        help,
        text,
        handler,
    }
}

const fn alone(
    names: &'static [&'static str],
    help: &'static str,
    text: &'static str,
    handler: Handler,
) -> Row {
    Row {
        names,
        argument: None,
        help,
        text,
        handler,
    }
}

/// In the order of `-help` and of the man page.
pub(super) const OPTIONS: &[Row] = &[
    alone(&["h", "help", "?"], "show this and exit", "", program::help),
    alone(
        &["version"],
        "show the version and exit",
        "",
        program::version,
    ),
    takes(
        &["machine", "M"],
        "microvm[,prop=value...]",
        "choose the machine and its properties",
        "There is one machine, microvm. Properties: acpi=off (implied; on is not built), \
         pic=on|off, pit=on|off and rtc=on|off (auto, the default, is on, on and off), \
         isa-serial=on|off, kernel-irqchip=on|split (both are realised in the kernel; the \
         migration stream is the same), memory-backend=ID, \
         auto-kernel-cmdline=on|off (whether a kernel is told of virtio-mmio devices on its \
         command line; default on), accel=kvm|none.",
        machine::machine,
    ),
    takes(
        &["accel"],
        "kvm|none",
        "choose what runs the guest",
        "With none the guest stays paused and everything else works. Without this option KVM is \
         used if it is there, none if not, and a line says so.",
        machine::accel,
    ),
    alone(
        &["enable-kvm"],
        "the same as -accel kvm",
        "",
        machine::enable_kvm,
    ),
    takes(
        &["cpu"],
        "qemu64|host",
        "choose the CPU model",
        "The default is qemu64, which exists on every host a guest may be moved to.",
        machine::cpu,
    ),
    takes(
        &["smp"],
        "N",
        "number of vCPUs, 1 to 16; default 1",
        "",
        machine::smp,
    ),
    takes(
        &["m"],
        "[size=]SIZE",
        "guest memory; default 128 MiB",
        "A bare number counts MiB; the suffixes are those of all sizes: B, K, M, G, T, P, E.",
        memory::memory,
    ),
    takes(
        &["object"],
        "TYPE,id=ID,size=SIZE[,prop=value...]",
        "create a memory backend",
        "TYPE is memory-backend-ram, memory-backend-file (with mem-path=PATH) or \
         memory-backend-memfd; share=on|off. Its id becomes the name of the RAM block when the \
         machine uses it with memory-backend=ID.",
        memory::object,
    ),
    takes(&["name"], "NAME", "name of the guest", "", program::name),
    takes(&["uuid"], "UUID", "UUID of the guest", "", program::uuid),
    takes(
        &["bios"],
        "FILE",
        "boot a flat firmware image",
        "Without -bios and -kernel a built-in guest is booted that checks its own memory, and a \
         disk if -append says so.",
        machine::bios,
    ),
    takes(
        &["kernel"],
        "FILE",
        "boot a kernel (bzImage, multiboot, PVH ELF)",
        "",
        machine::kernel,
    ),
    takes(
        &["initrd"],
        "FILE",
        "initial RAM disk for the kernel",
        "For a multiboot kernel: its modules, separated by commas, each a file and, behind a \
         space, arguments. A comma in a name is written twice.",
        machine::initrd,
    ),
    takes(
        &["append"],
        "STRING",
        "command line of the kernel or the built-in guest",
        "For the built-in guest: window=SIZE rate=PAGES_PER_SECOND base=ADDRESS smp=VCPUS, and with \
         a disk disk=1|read|write request=SIZE depth=REQUESTS. disk=1 writes records to the disk's \
         first sectors and checks them, a few with each tick; disk=read and disk=write go through \
         all of it, depth requests (default 4) of SIZE (default 4K) at once. What the disk held is \
         lost, unless it is only read.",
        machine::append,
    ),
    takes(
        &["drive"],
        "file=FILE,format=raw|qcow2[,prop=value...]",
        "open a disk image",
        "FILE is an image or a block device; without format= it is looked at, and if it is raw its \
         first sector can not be made to look like another format. Properties: id=ID, \
         if=none|virtio, readonly=on|off, cache=writeback|none|writethrough|directsync|unsafe \
         (or cache.writeback=, cache.direct=, cache.no-flush=on|off), discard=ignore|unmap \
         (whether what the guest discards is given back to the host), detect-zeroes=off|on|unmap \
         (what becomes of zeros it writes), file.locking=auto|on|off (whether an \
         image that a disk uses is locked against others, as QEMU does it; on unless off), \
         media=disk, rerror=report|ignore|stop, werror=enospc|report|ignore|stop (what \
         becomes of a request that the host fails: the guest is told, or told that all is well, or \
         stops until `cont`; enospc is stop for a full host, else report, and werror's default). \
         With if=virtio, or without if= when no -device names it, the drive gets a disk of its \
         own, as -device virtio-blk-device makes it.",
        disk::drive,
    ),
    takes(
        &["device"],
        "virtio-blk-device,drive=ID[,prop=value...]",
        "give the guest a disk",
        "Properties: id=ID, bus=virtio-mmio-bus.N (the default is the last of the eight slots \
         that is free), serial=STRING (what the guest reads as the disk's serial number), \
         rerror= and werror= as -drive has them, or auto: as the drive says.",
        disk::device,
    ),
    takes(
        &["chardev"],
        "BACKEND,id=ID[,prop=value...]",
        "create a character device",
        "Backends: null; stdio; pty; file,path=PATH; ringbuf[,size=SIZE]; \
         socket,path=PATH or socket,host=HOST,port=PORT, both with server=on|off and wait=on|off. \
         A server takes one client at a time. A unix socket is private to its user and is \
         removed at the end.",
        character::chardev,
    ),
    takes(
        &["serial"],
        "DEVICE",
        "where the guest's serial port goes",
        "DEVICE is none, null, stdio, pty, ringbuf, file:PATH, unix:PATH[,server][,nowait], \
         tcp:HOST:PORT[,server][,nowait] or chardev:ID. The default is a ring buffer of 64 KiB \
         with the id serial0, to be read with the command ringbuf_read.",
        character::serial,
    ),
    takes(
        &["monitor"],
        "DEVICE",
        "where a human monitor listens; repeatable",
        "DEVICE is as for -serial. The default is one monitor on stdio.",
        character::monitor,
    ),
    takes(
        &["mon"],
        "[chardev=]ID[,mode=readline]",
        "put a human monitor on a character device",
        "",
        character::mon,
    ),
    takes(
        &["incoming"],
        "URI|defer",
        "wait for a guest to arrive",
        "URI is tcp:HOST:PORT, unix:PATH, exec:COMMAND, fd:NUMBER or file:PATH[,offset=N]. With \
         defer the command migrate_incoming names it later.",
        program::incoming,
    ),
    takes(
        &["global"],
        "DRIVER.NAME=VALUE",
        "set a property",
        "Drivers: migration (its parameters and capabilities, and properties of the stream), \
         virtio-mmio (force-legacy=on|off: disks have the interface of before virtio 1.0, the \
         default, or the present one; both sides of a migration need the same) and hmpsh \
         (exit-on-error=on|off: whether a failed incoming migration always ends the program).",
        program::global,
    ),
    takes(
        &["e"],
        "COMMAND",
        "run a monitor command and exit; repeatable",
        "Exit status 0 if all commands succeeded, 1 at the first error. There is no default \
         monitor then.",
        program::command,
    ),
    takes(
        &["script"],
        "FILE",
        "run the monitor commands of a file and exit",
        "After those of -e, one command a line.",
        program::script,
    ),
    takes(
        &["prompt"],
        "STRING",
        "the monitor's prompt; default '(qemu) '",
        "",
        program::prompt,
    ),
    alone(&["S"], "do not start the guest", "", program::start_paused),
    alone(
        &["no-reboot"],
        "exit when the guest resets",
        "",
        program::no_reboot,
    ),
    alone(
        &["nodefaults"],
        "no default monitor and serial port",
        "",
        program::no_defaults,
    ),
    takes(
        &["display"],
        "none",
        "accepted: there is no display",
        "",
        program::display,
    ),
    alone(
        &["nographic"],
        "accepted: there is no display",
        "",
        program::nothing_to_do,
    ),
    alone(
        &["no-user-config"],
        "accepted: there is none",
        "",
        program::nothing_to_do,
    ),
    takes(
        &["sandbox"],
        "on|off",
        "accepted: there is no sandbox, on says so",
        "",
        program::sandbox,
    ),
    takes(
        &["pidfile"],
        "FILE",
        "write the process id to a file, locked while we run",
        "",
        program::pidfile,
    ),
    alone(
        &["daemonize"],
        "go to the background when everything is set up",
        "The parent exits with 0 once the machine is there, and with 1 and the reason on stderr \
         if it is not.",
        program::daemonize,
    ),
    takes(
        &["D"],
        "FILE",
        "append the log to a file instead of stderr",
        "",
        program::log_file,
    ),
    takes(
        &["d"],
        "ITEM[,...]",
        "switch log items on",
        "The monitor command help log lists them.",
        program::log_items,
    ),
    takes(
        &["trace"],
        "[enable=]ITEM",
        "switch a log item on, as -d does",
        "A trailing * is ignored.",
        program::trace,
    ),
];
