//! The built-in guest on stock QEMU: proof that the image is right before anything of ours runs
//! it, and that it notices what a bad migration would do to it.

mod common;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use common::beacon::{Beacons, wait_beacons, wait_fault};
use common::need::require;
use common::poll;
use common::vmm::Program::{Qemu7, Qemu10};
use common::vmm::{Program, Setup, Vmm};

/// Boots, tells what it does, counts, and rests at least half of the time.
fn boots_and_rests(program: Program) {
    if !require(program.needs()) {
        return;
    }
    // More than any interpreted host can do: only the guest's own rule lets it rest.
    let vm = Setup::new(program).append("window=1M rate=1000000").start();
    vm.wait_beacons(1);
    let (busy, clock) = (vm.cpu_time(), std::time::Instant::now());
    std::thread::sleep(Duration::from_secs(2));
    let share = (vm.cpu_time() - busy).as_secs_f64() / clock.elapsed().as_secs_f64();
    assert!(share < 0.6, "busy for {share:.2} of the time");
    let log = std::fs::read_to_string(vm.log()).unwrap();
    assert!(log.starts_with("hmpsh guest window=1048576 base=1048576 rate=1000000 smp=1\nB 1\n"));
}

#[test]
fn boots_and_rests_on_7_2() {
    boots_and_rests(Qemu7);
}

#[test]
fn boots_and_rests_on_10_0() {
    boots_and_rests(Qemu10);
}

#[test]
fn two_vcpus_share_the_window() {
    if !require(Qemu7.needs()) {
        return;
    }
    let vm = Setup::new(Qemu7).vcpus(2).append("window=4M").start();
    let log = vm.log();
    let working = poll(Duration::from_secs(10), || {
        let ticks = Beacons::check(&[&log]).ticks;
        ticks
            .iter()
            .any(|(vcpu, ticks)| *vcpu == 1 && *ticks > 20)
            .then_some(())
    });
    assert!(working.is_some(), "vCPU 1 does not work");
}

#[test]
fn a_vcpu_that_is_not_there_is_a_fault() {
    if !require(Qemu7.needs()) {
        return;
    }
    // The later -smp wins: the guest looks for two vCPUs on a machine with one.
    let vm = Setup::new(Qemu7).vcpus(2).args(&["-smp", "1"]).start();
    assert_eq!(wait_fault(&vm.log()), "FAULT cpu 1 does not start");
}

#[test]
fn a_window_above_4_gib() {
    if !require(Qemu7.needs()) {
        return;
    }
    let vm = Setup::new(Qemu7)
        .memory_mib(6 << 10)
        .append("window=1M base=5G")
        .start();
    vm.wait_beacons(20);
}

/// A guest that walked its window once notices a single changed bit in any of the three records,
/// the moving one (its place is in the page's hash) too.
#[test]
fn a_changed_bit_is_a_fault() {
    if !require(Qemu7.needs()) {
        return;
    }
    type Place = fn(&[u8]) -> usize;
    let moving = |page: &[u8]| 32 + (usize::from(u16::from_le_bytes([page[8], page[9]])) & 0xfc0);
    // Page, where the record starts, which byte of it.
    let cases: [(u64, Place, usize); 4] = [
        (0, |_| 0, 0),
        (100, |_| 0, 15),
        (255, |_| 4080, 15),
        (200, moving, 7),
    ];
    for (page, place, byte) in cases {
        let (vm, gdb) = with_gdb("window=1M rate=2000");
        vm.wait_beacons(4);
        let mut record = 0;
        gdb.edit(WINDOW + page * 4096, |page| {
            record = place(page);
            page[record + byte] ^= 0x10;
        });
        let fault = wait_fault(&vm.log());
        assert!(
            fault.starts_with(&format!("FAULT page {page} offset {record} ")),
            "{fault}"
        );
    }
}

/// A page as it was one walk before is consistent in itself, and a fault all the same.
#[test]
fn a_stale_page_is_a_fault() {
    if !require(Qemu7.needs()) {
        return;
    }
    let (vm, gdb) = with_gdb("window=1M rate=1000");
    vm.wait_beacons(8);
    let address = WINDOW + 128 * 4096;
    let mut old = Vec::new();
    gdb.edit(address, |page| old = page.clone());
    vm.wait_beacons(8);
    gdb.edit(address, |page| *page = old);
    assert!(wait_fault(&vm.log()).starts_with("FAULT page 128 offset 0 "));
}

/// A guest saved between STI and HLT may get its wake-up before the HLT, as QEMU does not restore
/// what holds it back; it must not sleep for ever.
#[test]
fn a_wake_up_just_before_the_halt_counts() {
    if !require(Qemu7.needs()) {
        return;
    }
    const STI_HLT_CLI: [u8; 3] = [0xfb, 0xf4, 0xfa];
    const RIP: std::ops::Range<usize> = 16 * 16..17 * 16;
    let image = hmpsh::vm::boot::builtin::image("window=1M", 64 << 20).unwrap();
    let rest = image.windows(3).position(|code| code == STI_HLT_CLI);
    let halt = 0xf0000 + rest.expect("the guest rests") as u64 + 1;
    let rip = |address: u64| -> String {
        let bytes = address.to_le_bytes();
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    };
    let (vm, gdb) = with_gdb("window=1M");
    vm.wait_beacons(2);
    let moved_back = poll(Duration::from_secs(20), || {
        let mut done = false;
        gdb.requests(|ask| {
            // All registers, of which the seventeenth is RIP.
            let registers = ask("g");
            if registers[RIP] == rip(halt + 1) {
                let before = [&registers[..RIP.start], &rip(halt), &registers[RIP.end..]];
                assert_eq!(ask(&format!("G{}", before.concat())), "OK");
                done = true;
            }
        });
        done.then_some(())
    });
    moved_back.expect("the guest rests");
    vm.wait_beacons(5);
}

#[test]
fn answers_what_comes_in_on_com1() {
    if !require(Qemu7.needs()) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("com1");
    let chardev = format!("unix:{},server=on,wait=off", path.display());
    let _vm = Setup::new(Qemu7).serial(&chardev).start();
    let mut com1 = UnixStream::connect(&path).unwrap();
    let com1_in = com1.try_clone().unwrap();
    com1.set_read_timeout(Some(Duration::from_millis(100)))
        .unwrap();
    let mut log = String::new();
    let mut wait_for = |words: &str| {
        poll(Duration::from_secs(10), || {
            let mut bytes = [0; 256];
            let n = com1.read(&mut bytes).unwrap_or(0);
            log += std::str::from_utf8(&bytes[..n]).unwrap();
            log.contains(words).then_some(())
        })
        .unwrap_or_else(|| panic!("no '{words}' in {log}"));
    };
    // Only then is the port set up: what comes before is lost.
    wait_for("B ");
    (&com1_in).write_all(b"hmp\xff").unwrap();
    wait_for("R 68\nR 6d\nR 70\nR ff\n");
}

#[test]
fn runs_without_a_serial_port() {
    if !require(Qemu7.needs()) {
        return;
    }
    let mut vm = Setup::new(Qemu7)
        .serial("none")
        .append("window=1M rate=500")
        .start();
    // The first page's sequence number moves on: 256 pages, each rewritten twice a second.
    let mut word = || vm.command("xp /1gx 0x100000");
    let first = poll(Duration::from_secs(5), || {
        Some(word()).filter(|w| !w.contains(": 0x0000000000000000"))
    });
    let first = first.expect("the guest fills its window");
    assert!(poll(Duration::from_secs(5), || (word() != first).then_some(())).is_some());
}

/// A saved and loaded guest goes on counting where it was, on the same or another QEMU.
fn saved_and_loaded(from: Program, to: Program, vcpus: u32) {
    if !(require(from.needs()) && require(to.needs())) {
        return;
    }
    let mut source = feeding(from, to).vcpus(vcpus).start();
    source.wait_beacons(5);
    let file = source.path("saved");
    source.quiet(&format!("migrate \"exec:cat > {}\"", file.display()));
    source.wait_migration("completed");
    let dest = Setup::new(to)
        .vcpus(vcpus)
        .incoming(&format!("exec:cat {}", file.display()))
        .start();
    // One walk of the window and more.
    wait_beacons(&[&source.log(), &dest.log()], 25);
}

#[test]
fn saved_and_loaded_7_2_to_7_2() {
    saved_and_loaded(Qemu7, Qemu7, 1);
}

#[test]
fn saved_and_loaded_7_2_to_10_0() {
    saved_and_loaded(Qemu7, Qemu10, 2);
}

#[test]
fn saved_and_loaded_10_0_to_7_2() {
    saved_and_loaded(Qemu10, Qemu7, 1);
}

/// Live over tcp, to and fro: three hosts see one life of the guest, and what a paused
/// destination holds is what the source had.
fn moved_live(first: Program, second: Program) {
    if !(require(first.needs()) && require(second.needs())) {
        return;
    }
    let mut a = feeding(first, second).append("window=8M").start();
    a.wait_beacons(5);
    let mut b = feeding(second, first).incoming("tcp:127.0.0.1:0").start();
    let port = b.port();
    a.quiet(&format!("migrate tcp:127.0.0.1:{port}"));
    a.wait_status("paused (postmigrate)");
    b.wait_status("running");
    wait_beacons(&[&a.log(), &b.log()], 15);
    let mut c = Setup::new(first)
        .incoming("tcp:127.0.0.1:0")
        .args(&["-S"])
        .start();
    let port = c.port();
    b.quiet(&format!("migrate tcp:127.0.0.1:{port}"));
    b.wait_status("paused (postmigrate)");
    c.wait_status("paused");
    let size = 64 << 20;
    assert!(b.memory(size) == c.memory(size), "memory differs");
    c.quiet("cont");
    wait_beacons(&[&a.log(), &b.log(), &c.log()], 30);
}

#[test]
fn moved_live_between_7_2_and_7_2() {
    moved_live(Qemu7, Qemu7);
}

#[test]
fn moved_live_between_7_2_and_10_0() {
    moved_live(Qemu7, Qemu10);
}

/// The check that all of these rest on fails when the guest is restarted on the way.
#[test]
fn a_reboot_does_not_pass_for_a_migration() {
    if !require(Qemu7.needs()) {
        return;
    }
    let mut vm = Setup::new(Qemu7).start();
    vm.wait_beacons(3);
    vm.quiet("system_reset");
    let log = vm.log();
    let wrong = poll(Duration::from_secs(10), || Beacons::read(&[&log]).err());
    assert!(
        wrong
            .expect("a second boot line")
            .contains("it booted again")
    );
}

/// A setup of `from` whose stream `to` can read.
fn feeding(from: Program, to: Program) -> Setup {
    let setup = Setup::new(from);
    match (from, to) {
        (Qemu10, Qemu7) => setup.args(&["-global", "migration.send-switchover-start=off"]),
        _ => setup,
    }
}

/// A machine whose memory can be changed behind the guest's back.
fn with_gdb(append: &str) -> (Vmm, Gdb) {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("gdb");
    let device = format!("unix:{},server=on,wait=off", socket.display());
    let vm = Setup::new(Qemu7)
        .append(append)
        .args(&["-gdb", &device])
        .start();
    (vm, Gdb { socket, _dir: dir })
}

/// Just enough of GDB's remote protocol: the guest stands still for the time of a request.
struct Gdb {
    socket: PathBuf,
    _dir: tempfile::TempDir,
}

impl Gdb {
    /// Changes the page at `address` while the guest stands still.
    fn edit(&self, address: u64, change: impl FnOnce(&mut Vec<u8>)) {
        self.requests(|ask| {
            let mut page = Vec::new();
            for at in (address..address + 4096).step_by(CHUNK) {
                let text = ask(&format!("m{at:x},{CHUNK:x}"));
                let byte = |i: usize| u8::from_str_radix(&text[i..i + 2], 16).unwrap();
                page.extend((0..text.len()).step_by(2).map(byte));
            }
            change(&mut page);
            for (at, chunk) in (address..).step_by(CHUNK).zip(page.chunks(CHUNK)) {
                let hex: String = chunk.iter().map(|byte| format!("{byte:02x}")).collect();
                assert_eq!(ask(&format!("M{at:x},{:x}:{hex}", chunk.len())), "OK");
            }
        });
    }

    /// Stops the guest, runs `session`, lets the guest go on.
    fn requests(&self, session: impl FnOnce(&mut dyn FnMut(&str) -> String)) {
        let mut stream = UnixStream::connect(&self.socket).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(10)))
            .unwrap();
        let mut ask = |body: &str| {
            let sum = body.bytes().fold(0u8, u8::wrapping_add);
            write!(stream, "${body}#{sum:02x}").unwrap();
            loop {
                let answer = packet(&mut stream);
                // Why the guest stopped, told unasked.
                if !answer.starts_with('T') {
                    return answer;
                }
            }
        };
        session(&mut ask);
        assert_eq!(ask("D"), "OK");
    }
}

/// The next packet's body, acknowledged.
fn packet(stream: &mut UnixStream) -> String {
    let mut packet = Vec::new();
    while packet.len() < 4 || packet[packet.len() - 3] != b'#' {
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
        // Acknowledgements stand before the packet.
        if byte != *b"+" || !packet.is_empty() {
            packet.push(byte[0]);
        }
    }
    stream.write_all(b"+").unwrap();
    String::from_utf8(packet[1..packet.len() - 3].to_vec()).unwrap()
}

/// Where the built-in guest's window starts.
const WINDOW: u64 = 1 << 20;

/// Bytes per request; the stub's packets are short.
const CHUNK: usize = 512;
