//! Streams that stock QEMU wrote (`tests/data`), read without a QEMU at hand.

mod common;

use std::path::PathBuf;

use common::beacon::wait_beacons;
use common::need::require;
use common::vmm::Program::Hmpsh;
use common::vmm::Setup;

/// The machine that a captured guest lived in.
fn machine(name: &str, vcpus: u32) -> Setup {
    let uri = format!("file:{}", data(name, "mig").display());
    Setup::new(Hmpsh)
        .memory_mib(2)
        .vcpus(vcpus)
        .append("window=64K")
        .incoming(&uri)
}

fn data(name: &str, kind: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(format!("tests/data/{name}.{kind}"))
}

/// Goes on where QEMU left it.
fn goes_on(name: &str, vcpus: u32) {
    if !require(Hmpsh.needs()) {
        return;
    }
    let mut vm = machine(name, vcpus).start();
    vm.wait_status("running");
    wait_beacons(&[&data(name, "log"), &vm.log()], 10);
}

/// Memory is what the guest had written, seen without KVM.
fn memory_is_right(name: &str, vcpus: u32) {
    let mut vm = machine(name, vcpus).accel("none").start();
    vm.wait_migration("completed");
    let memory = vm.memory(2 << 20);
    let window = memory[1 << 20..].chunks_exact(4096).take(16);
    let wrong = window
        .enumerate()
        .filter(|(number, page)| !is_right(*number as u64, page));
    // Each vCPU may have been stopped between two stores.
    assert!(wrong.count() <= vcpus as usize);
}

/// Whether a page holds its three records: a word of sequence number and page number, and its
/// hash.
fn is_right(number: u64, page: &[u8]) -> bool {
    let word = |at: usize| u64::from_le_bytes(page[at..at + 8].try_into().expect("8 bytes"));
    let (stamp, hash) = (word(0), word(8));
    let product = stamp.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let moving = 32 + (hash & 0xfc0) as usize;
    stamp & 0xff_ffff == number
        && stamp >> 24 > 0
        && hash == product ^ (product >> 32)
        && [4080, moving]
            .iter()
            .all(|at| (word(*at), word(at + 8)) == (stamp, hash))
}

#[test]
fn a_guest_saved_by_qemu_7_2_goes_on() {
    goes_on("qemu-7.2", 1);
}

#[test]
fn two_vcpus_saved_by_qemu_10_0_go_on() {
    goes_on("qemu-10.0", 2);
}

#[test]
fn memory_saved_by_qemu_7_2_is_right() {
    memory_is_right("qemu-7.2", 1);
}

#[test]
fn memory_saved_by_qemu_10_0_is_right() {
    memory_is_right("qemu-10.0", 2);
}
