//! What the commands do: one file per family, one function per row of commands.toml.
//!
//! A handler asks the verbs and prints; texts are made by pure functions beside it. QEMU:
//! `monitor/hmp-cmds.c`, `migration/migration-hmp-cmds.c` and others.

pub(super) mod bitmaps;
pub(super) mod block;
pub(super) mod chardev;
pub(super) mod cpu;
pub(super) mod drives;
pub(super) mod dump;
pub(super) mod fd;
pub(super) mod help;
pub(super) mod identity;
pub(super) mod log;
pub(super) mod memory;
pub(super) mod migrate;
pub(super) mod migrate_status;
pub(super) mod port;
pub(super) mod run;
pub(super) mod snapshots;
