//! hmpsh: a human monitor, one KVM machine and a live-migration engine that speaks QEMU's stream.
//!
//! The modules stand on six floors; each uses only the floors below it and its own children
//! (`tests/architecture.rs` holds that). ARCHITECTURE.md draws the map and walks it.

// Floor 6: mouths.
// QEMU's command line to a `config::Config`.
pub mod cli;
// `hmpsh demo`: a migration on this machine, explained.
pub mod demo;
// The human monitor: sessions, command table, terminal shell.
pub mod monitor;
// Everything put together and run.
pub mod program;

// Floor 5: the verbs.
// The one set of verbs every mouth calls.
pub mod control;
// Runs the poll registry; no policy.
pub mod event_loop;

// Floor 4: migration.
// The live-migration engine: both scripts, the stream, RAM, channels.
pub mod migration;

// Floor 3: the guest.
// The KVM machine, and the `vm::guest::Guest` seam the engine sees it through.
pub mod vm;

// Floor 2: what a guest stands on.
// Disk images: what disks read and write.
pub mod block;
// Character devices: where monitors and serial ports get their bytes.
pub mod chardev;
// The log behind `-d`, `-D`, `log` and `logfile`.
pub mod logger;
// The registry of descriptors, timers and wakeups the event loop waits for.
pub mod poll;
// Sockets as chardevs and channels open them.
pub mod socket;

// Floor 1: leaves.
// Days and dates.
pub(crate) mod calendar;
// What the command line asked for.
pub mod config;
// What the system said, in `strerror`'s words.
pub mod errno;
// What happened, for whoever wants to tell the operator.
pub mod event;
// Borrowed pieces of memory for gather writes and scatter reads.
pub mod iov;
// Sizes as QEMU reads and prints them.
pub mod units;
// One description of a device's fields: saver, loader and JSON describer read it.
pub mod vmstate;
