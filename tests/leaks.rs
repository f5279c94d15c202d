//! What a machine takes it gives back: building, running and dropping many leaves no thread and no
//! descriptor behind. The only test of its process, so that nobody else's are counted.

mod common;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use common::need::{Need, require};
use common::poll;
use hmpsh::config::{
    Accel, BackendKind, Boot, Cache, Chips, DiskConfig, DriveConfig, Format, Interface,
    MachineConfig, MemoryBackend, OnError, Zeroes,
};
use hmpsh::vm::guest::Guest;
use hmpsh::vm::machine::Machine;
use hmpsh::vm::run_state::RunState;

fn config(accel: Accel, kind: BackendKind, image: &Path) -> MachineConfig {
    MachineConfig {
        accel: Some(accel),
        cpu: "qemu64".to_owned(),
        memory: 16 << 20,
        vcpus: 4,
        uuid: None,
        boot: Boot::Builtin,
        append: "window=1M smp=4".to_owned(),
        auto_kernel_cmdline: true,
        serial: None,
        chips: Chips::default(),
        interface: Interface::default(),
        drives: vec![DriveConfig {
            id: "d0".to_owned(),
            file: image.to_owned(),
            directory: std::path::PathBuf::new(),
            is_read_only: false,
            format: Some(Format::Raw),
            cache: Cache::default(),
            discards: false,
            zeroes: Zeroes::Off,
            locks: true,
            option: String::new(),
        }],
        disks: vec![DiskConfig {
            id: None,
            drive: 0,
            slot: 7,
            serial: String::new(),
            on_error: OnError::DEFAULT,
            option: String::new(),
        }],
        memory_backend: Some(MemoryBackend {
            id: "mem0".to_owned(),
            size: 16 << 20,
            kind,
            share: true,
        }),
    }
}

fn count(what: &str) -> usize {
    std::fs::read_dir(PathBuf::from("/proc/self").join(what))
        .unwrap()
        .count()
}

#[test]
fn fifty_machines_come_and_go() {
    let accel = if require(&[Need::Kvm]) {
        Accel::Kvm
    } else {
        Accel::None
    };
    let dir = tempfile::tempdir().unwrap();
    let image = tempfile::NamedTempFile::new().unwrap();
    let live = |number: usize| {
        let kind = match number % 3 {
            0 => BackendKind::Ram,
            1 => BackendKind::Memfd,
            _ => BackendKind::File(dir.path().join("ram")),
        };
        let machine = Machine::new(
            &config(accel, kind, image.path()),
            None,
            Arc::new(|_| ()),
            false,
        )
        .unwrap();
        if accel == Accel::Kvm {
            machine.start().unwrap();
            machine.dirty_log().start().unwrap();
            match number % 4 {
                // Dropped while it runs, while it is at rest, with its log on, after a reset.
                0 => {}
                1 => drop(machine.stop(RunState::Paused).unwrap()),
                2 => machine.dirty_log().stop(),
                _ => machine.reset().unwrap(),
            }
        }
    };
    // The first one brings what a process keeps.
    live(0);
    let before = ["task", "fd"].map(count);
    (0..50).for_each(live);
    // A thread's entry goes a little after it was joined.
    let back = poll(Duration::from_secs(10), || {
        (["task", "fd"].map(count) == before).then_some(())
    });
    assert!(
        back.is_some(),
        "{before:?} before, {:?} after",
        ["task", "fd"].map(count)
    );
}
