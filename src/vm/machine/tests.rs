use std::io::Write;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::*;
use crate::chardev::{Incoming, Receiver};
use crate::config::{Accel as WantedAccel, BackendKind, Boot, Interface, MemoryBackend};
use crate::vm::boot::specimen::{Class, elf};
use crate::vm::dirty::DirtySink;
use crate::vm::guest::Guest;
use crate::vm::memory::PAGE_SIZE;
use crate::vm::vcpu::{Report, Vcpu};

mod interop;
mod migration;

/// Real mode; counts at 0x1000, prints `.` every 256, `F` for ever if port 0x80 is not all ones.
const COUNTER: &[u8] = &[
    0x31, 0xc0, 0x8e, 0xd8, 0xba, 0xf8, 0x03, 0xb0, 0x41, 0xee, 0x66, 0xff, 0x06, 0x00, 0x10, 0xe4,
    0x80, 0x3c, 0xff, 0x75, 0x0c, 0xf6, 0x06, 0x00, 0x10, 0xff, 0x75, 0xee, 0xb0, 0x2e, 0xee, 0xeb,
    0xe9, 0xb0, 0x46, 0xee, 0xeb, 0xfb,
];
/// Polls COM1 and sends back every byte plus one.
const ECHO: &[u8] = &[
    0xba, 0xfd, 0x03, 0xec, 0xa8, 0x01, 0x74, 0xfb, 0xba, 0xf8, 0x03, 0xec, 0xfe, 0xc0, 0xee, 0xeb,
    0xef,
];
/// Prints `R`, then switches paging on with empty tables and without an interrupt table. (Without
/// paging, the kvm-amd of Linux 6.1 does not run the vCPU again after the fault.)
const TRIPLE_FAULT: &[u8] = &[
    0xba, 0xf8, 0x03, 0xb0, 0x52, 0xee, 0x2e, 0x66, 0x0f, 0x01, 0x1e, 0x26, 0x00, 0x0f, 0x20, 0xc0,
    0x0c, 0x01, 0x0f, 0x22, 0xc0, 0x66, 0x31, 0xc0, 0x0f, 0x22, 0xd8, 0x66, 0xb8, 0x01, 0x00, 0x00,
    0x80, 0x0f, 0x22, 0xc0, 0x90, 0xf4, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00,
];
/// 32-bit: prints the command line's first letter (`X` if EBX is no start info), counts at
/// 0x200000 and prints the count, and loops.
const PVH_KERNEL: &[u8] = &[
    0xba, 0xf8, 0x03, 0x00, 0x00, 0xb0, 0x58, 0x81, 0x3b, 0x78, 0xc5, 0x6e, 0x33, 0x75, 0x05, 0x8b,
    0x73, 0x18, 0x8a, 0x06, 0xee, 0xff, 0x05, 0x00, 0x00, 0x20, 0x00, 0xa0, 0x00, 0x00, 0x20, 0x00,
    0x04, 0x30, 0xee, 0xeb, 0xfe,
];
/// CLI, STI, NOP, over and over: in the interrupt shadow of STI for a good part of its time.
const SHADOWS: &[u8] = &[0xfa, 0xfb, 0x90, 0xeb, 0xfb];
/// Jumps to 0x90000.
const ASTRAY: &[u8] = &[0xea, 0x00, 0x00, 0x00, 0x90];
/// Jumps to the image's first byte, from the reset vector 16 bytes before its end.
const RESET_VECTOR: [u8; 5] = [0xea, 0x00, 0x00, 0x00, 0xf0];

/// A 64 KiB firmware image with `code` at its start.
fn image(code: &[u8]) -> tempfile::NamedTempFile {
    let mut bytes = vec![0; 0x10000];
    bytes[..code.len()].copy_from_slice(code);
    bytes[0xfff0..0xfff5].copy_from_slice(&RESET_VECTOR);
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(&bytes).unwrap();
    file
}

fn config(bios: PathBuf) -> MachineConfig {
    MachineConfig {
        accel: Some(WantedAccel::Kvm),
        cpu: "qemu64".to_owned(),
        memory: 16 << 20,
        vcpus: 1,
        uuid: None,
        boot: Boot::Bios(bios),
        append: String::new(),
        auto_kernel_cmdline: true,
        serial: None,
        chips: Chips::default(),
        interface: Interface::default(),
        drives: Vec::new(),
        disks: Vec::new(),
        memory_backend: None,
    }
}

/// All that `-M` can switch on.
const EVERY_CHIP: Chips = Chips {
    pic: true,
    pit: true,
    rtc: true,
    irqchip_on: false,
};
/// All that it can switch off.
const NO_CHIP: Chips = Chips {
    pic: false,
    pit: false,
    rtc: false,
    irqchip_on: false,
};

/// Without KVM: says so and ends the test, unless the environment demands KVM.
fn has_kvm() -> bool {
    let found = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .is_ok();
    found || skipped("kvm", "no /dev/kvm")
}

/// Tells why a test is skipped, past the test harness that would swallow it.
fn skipped(what: &str, why: &str) -> bool {
    let required = std::env::var("HMPSH_REQUIRE").unwrap_or_default();
    assert!(
        !required.split(',').any(|word| word == what),
        "HMPSH_REQUIRE={required}, but {why}"
    );
    let test = std::thread::current().name().unwrap_or("test").to_owned();
    let line = format!("{test}: skipped: {why}\n");
    let _ = std::io::stderr().write_all(line.as_bytes());
    false
}

/// A chardev that keeps what the guest prints.
#[derive(Default)]
struct Wire {
    out: Mutex<Vec<u8>>,
    receiver: Mutex<Option<Receiver>>,
}

impl Wire {
    fn text(&self) -> String {
        String::from_utf8_lossy(&self.out.lock().unwrap()).into_owned()
    }

    fn type_in(&self, bytes: &[u8]) {
        let mut receiver = self.receiver.lock().unwrap();
        receiver.as_mut().unwrap()(Incoming::Bytes(bytes.to_vec(), Vec::new()));
    }

    /// Waits until the output is as wanted.
    fn wait(&self, wanted: impl Fn(&str) -> bool) {
        let start = Instant::now();
        while !wanted(&self.text()) {
            assert!(
                start.elapsed() < PATIENCE,
                "the guest printed {:?}",
                self.text()
            );
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Waits for `more` bytes from now on.
    fn wait_for_more(&self, more: usize) {
        let now = self.text().len();
        self.wait(|text| text.len() >= now + more);
    }
}

impl Chardev for Wire {
    fn id(&self) -> &str {
        "serial0"
    }

    fn description(&self) -> String {
        "wire".to_owned()
    }

    fn write(&self, bytes: &[u8]) {
        self.out.lock().unwrap().extend_from_slice(bytes);
    }

    fn receive(&self, receiver: Receiver) {
        *self.receiver.lock().unwrap() = Some(receiver);
    }

    fn set_readable(&self, _readable: bool) {}
}

/// A machine, its serial line and what happened to it.
struct Bench {
    machine: Arc<Machine>,
    wire: Arc<Wire>,
    events: Arc<Mutex<Vec<Event>>>,
}

impl Bench {
    fn new(config: &MachineConfig, incoming: bool) -> Self {
        Self::try_new(config, incoming).unwrap()
    }

    fn try_new(config: &MachineConfig, incoming: bool) -> Result<Self, Error> {
        let wire = Arc::new(Wire::default());
        let events = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&events);
        let machine = Machine::new(
            config,
            Some(Arc::clone(&wire) as Arc<dyn Chardev>),
            Arc::new(move |event| sink.lock().unwrap().push(event)),
            incoming,
        )?;
        Ok(Self {
            machine,
            wire,
            events,
        })
    }

    fn wait_for(&self, event: &Event) {
        let start = Instant::now();
        while !self.events.lock().unwrap().contains(event) {
            assert!(
                start.elapsed() < PATIENCE,
                "{:?}",
                self.events.lock().unwrap()
            );
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn counter(&self) -> u32 {
        let mut bytes = [0; 4];
        self.machine.read_physical(0x1000, &mut bytes).unwrap();
        u32::from_le_bytes(bytes)
    }
}

const PATIENCE: Duration = Duration::from_secs(20);

#[derive(Default)]
struct Pages(std::collections::BTreeSet<(usize, usize)>);

impl DirtySink for Pages {
    fn dirty(&mut self, block: usize, word: usize, bits: u64) {
        let set = (0..64).filter(|bit| bits >> bit & 1 != 0);
        self.0.extend(set.map(|bit| (block, word * 64 + bit)));
    }
}

#[test]
fn a_flat_image_runs_pauses_and_goes_on() {
    if !has_kvm() {
        return;
    }
    let bios = image(COUNTER);
    let bench = Bench::new(&config(bios.path().to_owned()), false);
    let machine = &bench.machine;
    assert_eq!(machine.run_state(), RunState::Prelaunch);
    assert!(bench.wire.text().is_empty());
    machine.start().unwrap();
    assert!(machine.vcpu_thread(0) > 0);
    bench.wire.wait(|text| text.starts_with("A.."));
    for _ in 0..20 {
        machine.stop(RunState::Paused).unwrap();
        let (count, registers) = (bench.counter(), machine.registers(0).unwrap());
        std::thread::sleep(Duration::from_millis(5));
        assert_eq!(bench.counter(), count, "a paused guest does not run");
        assert_eq!(machine.registers(0).unwrap().regs.rip, registers.regs.rip);
        assert_eq!(registers.sregs.cs.base, 0xf0000);
        machine.start().unwrap();
        bench.wire.wait_for_more(1);
        assert_eq!(machine.registers(0).unwrap().regs.rdx & 0xffff, 0x3f8);
    }
    assert!(!bench.wire.text().contains('F'), "{}", bench.wire.text());
    assert_eq!(
        bench.events.lock().unwrap()[..2],
        [Event::Resume, Event::Stop]
    );
}

#[test]
fn input_reaches_the_guest_in_order() {
    if !has_kvm() {
        return;
    }
    let bios = image(ECHO);
    let bench = Bench::new(&config(bios.path().to_owned()), false);
    bench.wire.type_in(b"GD");
    bench.machine.start().unwrap();
    bench.wire.type_in(b"KKN");
    bench.wire.wait(|text| text == "HELLO");
}

#[test]
fn reset_starts_over_and_restores_the_firmware() {
    if !has_kvm() {
        return;
    }
    let bios = image(COUNTER);
    let bench = Bench::new(&config(bios.path().to_owned()), false);
    bench.machine.start().unwrap();
    bench.wire.wait(|text| text.starts_with("A."));
    bench.machine.stop(RunState::Paused).unwrap();
    bench.machine.ram()[1].page(0).clear();
    bench.machine.reset().unwrap();
    assert_eq!(bench.machine.run_state(), RunState::Prelaunch);
    let registers = bench.machine.registers(0).unwrap();
    assert_eq!(
        (registers.regs.rip, registers.sregs.cs.base),
        (0xfff0, 0xffff_0000)
    );
    bench.machine.start().unwrap();
    bench
        .wire
        .wait(|text| text.matches('A').count() == 2 && text.ends_with('.'));
    // And while it runs.
    bench.machine.reset().unwrap();
    assert!(bench.machine.run_state().is_running());
    bench.wire.wait(|text| text.matches('A').count() == 3);
    assert!(!bench.wire.text().contains('F'));
}

#[test]
fn a_triple_fault_resets_or_ends_the_machine() {
    if !has_kvm() {
        return;
    }
    let bios = image(TRIPLE_FAULT);
    let bench = Bench::new(&config(bios.path().to_owned()), false);
    bench.machine.start().unwrap();
    bench.wait_for(&Event::Reset);
    bench.wire.wait(|text| text.starts_with("RRR"));
    // A stop never leaves a reset outstanding.
    for _ in 0..20 {
        bench.machine.stop(RunState::Paused).unwrap();
        assert_eq!(bench.machine.run_state(), RunState::Paused);
        let printed = bench.wire.text();
        std::thread::sleep(Duration::from_millis(3));
        assert_eq!(bench.wire.text(), printed);
        bench.machine.start().unwrap();
        bench.wire.wait_for_more(1);
    }

    let bench = Bench::new(&config(bios.path().to_owned()), false);
    bench.machine.set_reboots(false);
    bench.machine.start().unwrap();
    bench.wait_for(&Event::Shutdown("guest-reset".to_owned()));
    assert_eq!(bench.machine.run_state(), RunState::Shutdown);
    assert_eq!(bench.wire.text(), "R");
}

#[test]
fn an_io_error_stops_a_running_guest_and_no_other() {
    if !has_kvm() {
        return;
    }
    let bios = image(COUNTER);
    let bench = Bench::new(&config(bios.path().to_owned()), false);
    let machine = &bench.machine;
    let report = || {
        let itself = Arc::downgrade(machine);
        power::accept(&machine.reports, Some(&itself), Report::IoError);
    };
    let stops = || {
        let events = bench.events.lock().unwrap();
        events.iter().filter(|event| **event == Event::Stop).count()
    };
    machine.start().unwrap();
    report();
    bench.wait_for(&Event::Stop);
    machine.pause().unwrap();
    assert_eq!(machine.run_state(), RunState::IoError);
    for state in [
        RunState::Shutdown,
        RunState::InternalError,
        RunState::FinishMigrate,
    ] {
        machine.set_run_state(state);
        report();
        std::thread::sleep(Duration::from_millis(50));
        assert_eq!((machine.run_state(), stops()), (state, 1));
    }
}

#[test]
fn a_guest_that_kvm_can_not_run_stops_with_a_notice() {
    if !has_kvm() {
        return;
    }
    let bios = image(ASTRAY);
    let config = MachineConfig {
        memory: 512 << 10,
        ..config(bios.path().to_owned())
    };
    let bench = Bench::new(&config, false);
    bench.machine.start().unwrap();
    let start = Instant::now();
    while bench.machine.run_state() != RunState::InternalError {
        assert!(
            start.elapsed() < PATIENCE,
            "{:?}",
            bench.events.lock().unwrap()
        );
        std::thread::sleep(Duration::from_millis(2));
    }
    bench.wait_for(&Event::Stop);
    bench.machine.reset().unwrap();
    assert_eq!(bench.machine.run_state(), RunState::Prelaunch);
}

#[test]
fn the_log_sees_the_guest_and_the_loader() {
    if !has_kvm() {
        return;
    }
    let bios = image(COUNTER);
    let bench = Bench::new(&config(bios.path().to_owned()), false);
    let log = bench.machine.dirty_log();
    bench.machine.start().unwrap();
    bench.wire.wait(|text| text.starts_with("A."));
    log.start().unwrap();
    let synced = || {
        let mut pages = Pages::default();
        log.sync(&mut pages).unwrap();
        pages.0
    };
    let first = synced();
    assert!(
        first.contains(&(0, 1)) && first.contains(&(1, 15)),
        "{first:?}"
    );
    assert!(first.len() <= 16 + 512, "{}", first.len());
    bench.wire.wait_for_more(1);
    assert_eq!(synced(), [(0, 1)].into());
    bench.machine.stop(RunState::Paused).unwrap();
    synced();
    assert!(synced().is_empty());
    bench.machine.reset().unwrap();
    assert_eq!(
        synced().len(),
        16,
        "a reset writes all 16 pages of firmware"
    );
    log.stop();
}

#[test]
fn a_pvh_kernel_runs_and_starts_afresh_after_a_reset() {
    if !has_kvm() {
        return;
    }
    let code = [&[0; 16], PVH_KERNEL].concat();
    let mut kernel = tempfile::NamedTempFile::new().unwrap();
    kernel.write_all(&elf(Class::Elf64, &code, true)).unwrap();
    let boot = Boot::Kernel {
        kernel: kernel.path().to_owned(),
        initrd: None,
    };
    let config = MachineConfig {
        boot,
        append: "console".to_owned(),
        ..config(PathBuf::new())
    };
    let bench = Bench::new(&config, false);
    let firmware = &bench.machine.ram()[1];
    assert_eq!((firmware.name(), firmware.len()), ("pc.bios", 64 << 10));
    bench.machine.start().unwrap();
    bench.wire.wait(|text| text == "c1");
    bench.machine.reset().unwrap();
    bench.wire.wait(|text| text == "c1c1");
}

/// A machine whose memory and registers are partly of the old life and partly of the new one must
/// not be said to run, nor be run.
#[test]
fn a_reset_that_fails_leaves_the_machine_at_rest() {
    if !has_kvm() {
        return;
    }
    let code = [&[0; 16], PVH_KERNEL].concat();
    let content = elf(Class::Elf32, &code, true);
    let mut kernel = tempfile::NamedTempFile::new().unwrap();
    kernel.write_all(&content).unwrap();
    let config = MachineConfig {
        boot: Boot::Kernel {
            kernel: kernel.path().to_owned(),
            initrd: None,
        },
        append: "console".to_owned(),
        ..config(PathBuf::new())
    };
    let bench = Bench::new(&config, false);
    bench.machine.start().unwrap();
    bench.wire.wait(|text| text == "c1");
    kernel.as_file().set_len(0x1000).unwrap();
    let error = bench.machine.reset().unwrap_err().to_string();
    assert!(error.starts_with("could not load kernel"), "{error}");
    assert_eq!(bench.machine.run_state(), RunState::InternalError);
    assert_eq!(bench.events.lock().unwrap().last(), Some(&Event::Stop));
    std::fs::write(kernel.path(), content).unwrap();
    bench.machine.reset().unwrap();
    assert_eq!(bench.machine.run_state(), RunState::Prelaunch);
    bench.machine.start().unwrap();
    bench.wire.wait(|text| text == "c1c1");
}

#[test]
fn several_vcpus_wait_for_the_first() {
    if !has_kvm() {
        return;
    }
    let bios = image(COUNTER);
    let config = MachineConfig {
        vcpus: 4,
        ..config(bios.path().to_owned())
    };
    let bench = Bench::new(&config, false);
    bench.machine.start().unwrap();
    bench.wire.wait(|text| text.starts_with("A."));
    bench.machine.stop(RunState::Paused).unwrap();
    let names: Vec<_> = bench
        .machine
        .sections()
        .iter()
        .map(|h| format!("{} {}", h.idstr, h.instance))
        .collect();
    assert_eq!(names[..4], ["cpu 0", "apic 0", "cpu 1", "apic 1"]);
    assert_eq!(names[8..10], ["ioapic 0", "kvmclock 0"]);
    assert_eq!(names[10..], ["i8259 0", "i8259 1", "i8254 0", "serial 0"]);
    assert!(bench.machine.registers(4).is_err());
    bench.machine.start().unwrap();
    bench.wire.wait_for_more(1);
}

#[test]
fn a_reset_takes_every_vcpu_back() {
    if !has_kvm() {
        return;
    }
    let config = MachineConfig {
        boot: Boot::Builtin,
        vcpus: 2,
        append: "window=1M smp=2".to_owned(),
        ..config(PathBuf::new())
    };
    let bench = Bench::new(&config, false);
    bench.machine.start().unwrap();
    for boot in 1..=3 {
        bench.wire.wait(|text| {
            assert!(!text.contains("FAULT"), "{text}");
            let boots: Vec<_> = text.split("hmpsh guest").collect();
            boots.len() == boot + 1 && boots[boot].contains("C 1 ") && boots[boot].contains("B 3")
        });
        bench.machine.reset().unwrap();
    }
}

#[test]
fn without_an_accelerator_everything_but_running_works() {
    let bios = image(COUNTER);
    let config = MachineConfig {
        accel: Some(WantedAccel::None),
        ..config(bios.path().to_owned())
    };
    let bench = Bench::new(&config, false);
    assert!(!bench.machine.has_kvm());
    assert_eq!(bench.machine.vcpu_thread(0), 0);
    let error = bench.machine.start().unwrap_err().to_string();
    assert!(error.contains("-accel none"), "{error}");
    assert_eq!(bench.machine.run_state(), RunState::Prelaunch);
    assert_eq!(bench.machine.registers(0).unwrap().regs.rip, 0xfff0);
    bench.machine.reset().unwrap();
    bench.machine.write_port(0x3f8, 1, u32::from(b'x'));
    assert_eq!(bench.wire.text(), "x");
}

#[test]
fn ports_map_and_addresses() {
    let bios = image(COUNTER);
    let config = MachineConfig {
        accel: Some(WantedAccel::None),
        memory: 5 << 30,
        chips: EVERY_CHIP,
        ..config(bios.path().to_owned())
    };
    let machine = Bench::new(&config, false).machine;
    // The clock chip tells firmware of the memory above 4 GiB, in units of 64 KiB.
    machine.write_port(0x70, 1, 0x5c);
    assert_eq!(machine.read_port(0x70, 2), 0x80ff);
    assert_eq!(machine.read_port(0x80, 4), 0xffff_ffff);
    assert_eq!(machine.read_port(0x80, 1), 0xff);
    assert_eq!(machine.read_port(0x3fd, 1), 0x60);
    assert_eq!(machine.read_port(0x3fc, 2), 0x6008);
    let map = machine.map();
    let (slots, map): (Vec<_>, Vec<_>) = map.iter().partition(|e| e.name == "virtio-mmio");
    let starts: Vec<_> = slots.iter().map(|e| e.start).collect();
    assert_eq!((starts[0], starts[7]), (0xfeb0_0000, 0xfeb0_0e00));
    let names: Vec<_> = map.iter().map(|e| (e.name.as_str(), e.start)).collect();
    assert_eq!(
        names,
        [
            ("microvm.ram", 0),
            ("pc.bios", 0xf0000),
            ("microvm.ram", 0x100000),
            ("ioapic", 0xfec0_0000),
            ("kvm-apic-msi", 0xfee0_0000),
            ("pc.bios", 0xffff_0000),
            ("microvm.ram", 1 << 32),
            ("pic", 0x20),
            ("pit", 0x40),
            ("rtc", 0x70),
            ("pic", 0xa0),
            ("serial", 0x3f8),
            ("elcr", 0x4d0),
            ("elcr", 0x4d1),
        ]
    );
    let (host, block, offset) = machine.host_address((1 << 32) + 5).unwrap();
    assert_eq!((block.name(), offset), ("microvm.ram", 0xc000_0005));
    assert_eq!(host, block.host() as usize + 0xc000_0005);
    assert_eq!(
        machine.virtual_memory(0).unwrap().translate(0x1234),
        Some(0x1234)
    );
    let mut code = [0; 2];
    machine.read_physical(0xffff_0000, &mut code).unwrap();
    assert_eq!(code, [0x31, 0xc0]);
    assert_eq!(
        machine.read_physical(0xfec0_0000, &mut code),
        Err(0xfec0_0000)
    );
}

#[test]
fn memory_backends() {
    let bios = image(COUNTER);
    let with = |kind, size, share| MachineConfig {
        accel: Some(WantedAccel::None),
        memory_backend: Some(MemoryBackend {
            id: "mem0".to_owned(),
            size,
            kind,
            share,
        }),
        ..config(bios.path().to_owned())
    };
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ram");
    for kind in [
        BackendKind::Ram,
        BackendKind::Memfd,
        BackendKind::File(path.clone()),
    ] {
        let machine = Bench::new(&with(kind, 16 << 20, true), false).machine;
        let ram = &machine.ram()[0];
        assert_eq!((ram.name(), ram.len()), ("mem0", 16 << 20));
        ram.page(5).write(&[7; PAGE_SIZE]);
    }
    let file = std::fs::read(&path).unwrap();
    assert_eq!(
        (file.len(), file[5 * PAGE_SIZE]),
        (16 << 20, 7),
        "a shared file has what is in RAM"
    );
    let refused = |config: &MachineConfig| Bench::try_new(config, false).err().unwrap().to_string();
    assert_eq!(
        refused(&with(BackendKind::Ram, 8 << 20, false)),
        "Machine memory size does not match the size of the memory backend"
    );
    let nowhere = BackendKind::File(dir.path().join("none/ram"));
    let error = refused(&with(nowhere, 16 << 20, false));
    assert!(error.starts_with("can't open backing store "), "{error}");
}

#[test]
fn impossible_machines_are_refused() {
    let bios = image(COUNTER);
    let good = MachineConfig {
        accel: Some(WantedAccel::None),
        ..config(bios.path().to_owned())
    };
    let refused = |config: &MachineConfig| Bench::try_new(config, false).err().unwrap().to_string();
    for vcpus in [0, 17] {
        let error = refused(&MachineConfig {
            vcpus,
            ..good.clone()
        });
        assert!(error.starts_with("Invalid SMP CPUs"), "{error}");
    }
    let error = refused(&MachineConfig {
        memory: 5000,
        ..good.clone()
    });
    assert!(error.contains("5000 bytes"), "{error}");
    let error = refused(&MachineConfig {
        cpu: "Nehalem".to_owned(),
        ..good
    });
    assert_eq!(error, "unable to find CPU model 'Nehalem'");
}

/// QEMU does not hand the shadow of STI to KVM, so no guest is left standing in it.
#[test]
fn a_vcpu_does_not_come_to_rest_in_an_interrupt_shadow() {
    if !has_kvm() {
        return;
    }
    let bios = image(SHADOWS);
    let machine = Bench::new(&config(bios.path().to_owned()), false).machine;
    machine.start().unwrap();
    let mut seen = 0;
    for _ in 0..50 {
        std::thread::sleep(Duration::from_millis(1));
        seen += u32::from(machine.registers(0).unwrap().inhibited);
        machine.pause().unwrap();
        assert!(!machine.registers(0).unwrap().inhibited);
        machine.start().unwrap();
    }
    assert!(seen > 0, "the guest was never in a shadow, running");
}

/// Whoever asks for the state of a vCPU whose thread broke down gets an error, and waits for
/// nothing.
#[test]
fn a_vcpu_thread_that_ended_is_waited_for_by_nobody() {
    if !has_kvm() {
        return;
    }
    let vm = kvm_ioctls::Kvm::new().unwrap().create_vm().unwrap();
    let fd = vm.create_vcpu(0).unwrap();
    let reporter: Reporter = Arc::new(|_| ());
    let vcpu = Vcpu::spawn(0, fd, Arc::new(Bus::default()), reporter).unwrap();
    assert_eq!(vcpu.with(|_| Ok(7)).unwrap(), 7);
    let broken = vcpu.with(|_| -> Result<(), Error> { std::panic::resume_unwind(Box::new(())) });
    for result in [broken, vcpu.with(|_| Ok(()))] {
        let error = result.unwrap_err().to_string();
        assert_eq!(error, "the vCPU's thread has ended");
    }
    vcpu.resume();
    vcpu.pause();
    vcpu.wait();
}
