//! A stream of QEMU's own (`tests/data`), damaged. It carries no hash, so a destination can not know;
//! but it refuses what makes no sense, and ends with a state that it can save and load again.

use std::fs::File;
use std::io::Write;
use std::ops::Range;

use super::*;
use crate::chardev::{Chardev, Receiver};
use crate::config::{Accel, Boot, Chips, Interface, MachineConfig};
use crate::vm::guest::SavedSection;
use crate::vm::machine::Machine;

/// QEMU 7.2, one vCPU, every chip; 2 MiB of memory, paused.
const STREAM: &[u8] = include_bytes!("../../../tests/data/qemu-7.2-chips.mig");

/// A machine as the stream's.
pub(super) fn machine(accel: Accel) -> Arc<Machine> {
    let config = MachineConfig {
        accel: Some(accel),
        cpu: "qemu64".to_owned(),
        memory: 2 << 20,
        vcpus: 1,
        uuid: None,
        boot: Boot::Builtin,
        append: "window=4K".to_owned(),
        auto_kernel_cmdline: true,
        serial: None,
        chips: Chips {
            rtc: true,
            ..Chips::default()
        },
        interface: Interface::default(),
        drives: Vec::new(),
        disks: Vec::new(),
        memory_backend: None,
    };
    Machine::new(&config, Some(Arc::new(Nobody)), Arc::new(|_| ()), true).unwrap()
}

/// Whom COM1 leads to.
struct Nobody;

impl Chardev for Nobody {
    fn id(&self) -> &str {
        "serial0"
    }

    fn description(&self) -> String {
        "nobody".to_owned()
    }

    fn write(&self, _bytes: &[u8]) {}

    fn receive(&self, _receiver: Receiver) {}

    fn set_readable(&self, _readable: bool) {}
}

/// Where the devices' sections lie, with everything around them.
fn devices() -> Range<usize> {
    let find = |what: &[u8]| STREAM.windows(what.len()).position(|found| found == what);
    // Type and id in front of the name; EOF, type and length in front of the description.
    find(b"\x05timer").unwrap() - 5..find(b"{\"page_size\"").unwrap() - 5
}

/// Everything in front of the first page.
fn head() -> Range<usize> {
    0..STREAM
        .windows(8)
        .position(|word| word == [0, 0, 0, 0, 0, 0, 0, 0x10])
        .unwrap()
        + 13
}

/// The machine that the stream brings.
pub(super) fn receive() -> Arc<Machine> {
    arrives(Accel::None, STREAM).unwrap()
}

/// Whether there is time for every bit.
fn has_time() -> bool {
    std::env::var_os("HMPSH_EVERY_BIT").is_some()
}

/// Which bits of the byte at an offset are flipped.
pub(super) fn bits(at: usize) -> Range<usize> {
    match has_time() {
        true => 0..8,
        false => at % 8..at % 8 + 1,
    }
}

/// Every `step`th number, or every one if there is time.
pub(super) fn some(range: Range<usize>, step: usize) -> impl Iterator<Item = usize> {
    range.step_by(if has_time() { 1 } else { step })
}

/// Loads a stream. `Err` is what the operator reads.
pub(super) fn arrives(accel: Accel, stream: &[u8]) -> Result<Arc<Machine>, String> {
    let dest = machine(accel);
    match load(&*dest, &Board::default(), stream) {
        Ok(state) => {
            assert!(!state.is_running() || accel == Accel::Kvm);
            Ok(dest)
        }
        Err(error) => Err(error.to_string()),
    }
}

/// What a machine holds, but for what passes by itself.
pub(super) fn state(saved: &[SavedSection]) -> Vec<&[u8]> {
    // The time of day goes on.
    let clock = |section: &SavedSection| section.header.idstr == "mc146818rtc";
    let from = |section| if clock(section) { 10 } else { 0 };
    saved.iter().map(|s| &s.body[from(s)..]).collect()
}

/// What a machine holds can be loaded, and is the same then.
fn can_move_on(machine: &Machine, why: &str) {
    let saved = machine.save_devices().unwrap();
    let other = self::machine(Accel::None);
    let mut loader = other.loader();
    for section in &saved {
        let loaded = loader.load(&section.header, &mut &section.body[..]);
        loaded.unwrap_or_else(|error| panic!("{why}: {error}"));
    }
    loader.apply().unwrap();
    let again = other.save_devices().unwrap();
    assert!(state(&saved) == state(&again), "{why}");
}

fn flip(accel: Accel, stream: &mut [u8], at: usize, bit: usize) {
    stream[at] ^= 1 << bit;
    match arrives(accel, stream) {
        Ok(machine) => can_move_on(&machine, &format!("byte {at:#x} bit {bit}")),
        Err(error) => assert!(!error.is_empty()),
    }
    stream[at] ^= 1 << bit;
}

#[test]
fn the_stream_itself_arrives() {
    can_move_on(&receive(), "unharmed");
    assert!(STREAM[..8].starts_with(b"QEVM") && head().len() > 60);
}

#[test]
fn no_flipped_bit_does_harm() {
    let mut stream = STREAM.to_vec();
    for at in head().chain(devices()) {
        for bit in bits(at) {
            flip(Accel::None, &mut stream, at, bit);
        }
    }
}

/// What every field's range admits, KVM takes, or refuses by name.
#[test]
fn no_flipped_bit_upsets_kvm() {
    if let Err(error) = File::open("/dev/kvm") {
        let required = std::env::var("HMPSH_REQUIRE").unwrap_or_default();
        assert!(!required.contains("kvm"), "no /dev/kvm: {error}");
        // Past the test harness, which would swallow it.
        let line = format!("no_flipped_bit_upsets_kvm: skipped: no /dev/kvm: {error}\n");
        let _ = std::io::stderr().write_all(line.as_bytes());
        return;
    }
    let mut stream = STREAM.to_vec();
    for at in devices().step_by(23) {
        flip(Accel::Kvm, &mut stream, at, at % 7);
    }
}

#[test]
fn no_cut_is_taken_for_the_end() {
    for at in (0..devices().end).step_by(7).chain(devices()) {
        assert!(
            arrives(Accel::None, &STREAM[..at]).is_err(),
            "cut at {at:#x}"
        );
    }
}
