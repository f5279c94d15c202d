//! The machine at its edges, as an operator meets them: 1 to 16 vCPUs, memory above the hole,
//! every kind of memory backend, resets and shutdowns, no accelerator, no serial port.

mod common;

use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

use common::beacon::{Beacons, wait_beacons};
use common::journey::moved;
use common::need::{self, Need, require};
use common::poll;
use common::vmm::Program::{Hmpsh, Qemu7};
use common::vmm::{Program, Setup, Vmm, firmware};

fn small() -> Setup {
    Setup::new(Hmpsh).append("window=1M")
}

/// Waits until every vCPU of the guest that lived on these hosts has ticked on.
#[track_caller]
fn all_vcpus_tick(hosts: &[&Vmm], vcpus: u64) {
    let logs: Vec<_> = hosts.iter().map(|host| host.log()).collect();
    let logs: Vec<&Path> = logs.iter().map(|log| log.as_path()).collect();
    let start = Beacons::check(&logs).ticks;
    let before = |vcpu| {
        start
            .iter()
            .find(|(of, _)| *of == vcpu)
            .map_or(0, |(_, n)| *n)
    };
    let mut now = Vec::new();
    let ticking = poll(Duration::from_secs(30), || {
        now = Beacons::check(&logs).ticks;
        let ahead = |vcpu| now.iter().any(|(of, n)| *of == vcpu && *n > before(vcpu));
        (1..vcpus).all(ahead).then_some(())
    });
    assert!(ticking.is_some(), "from {start:?} to {now:?}");
    wait_beacons(&logs, 2);
}

/// Boots, pauses, moves and resets a guest with that many vCPUs; none is left behind.
fn with_vcpus(vcpus: u32) {
    if !require(&[Need::Kvm]) {
        return;
    }
    let setup = || small().vcpus(vcpus);
    let count = u64::from(vcpus);
    let mut a = setup().start();
    all_vcpus_tick(&[&a], count);
    let list = a.command("info cpus");
    assert_eq!(list.lines().count(), vcpus as usize, "{list}");
    let last = vcpus - 1;
    a.quiet(&format!("cpu {last}"));
    assert!(
        a.command("info cpus")
            .contains(&format!("* CPU #{last}: thread_id="))
    );
    assert!(
        a.command(&format!("cpu {vcpus}"))
            .contains("invalid CPU index")
    );
    let registers = a.command("info registers -a");
    assert_eq!(
        registers.matches("RIP=").count(),
        vcpus as usize,
        "{registers}"
    );
    a.quiet("stop");
    let log = std::fs::read(a.log()).unwrap();
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(
        std::fs::read(a.log()).unwrap(),
        log,
        "a stopped guest says nothing"
    );
    a.quiet("cont");
    all_vcpus_tick(&[&a], count);

    let mut b = moved(&mut a, setup());
    all_vcpus_tick(&[&a, &b], count);
    b.quiet("system_reset");
    let log = b.log();
    let again = poll(Duration::from_secs(30), || {
        let text = std::fs::read_to_string(&log).unwrap();
        let (_, life) = text.split_once("hmpsh guest")?;
        let beacons = Beacons::parse(format!("hmpsh guest{life}").as_bytes()).unwrap();
        let all = beacons.ticks.len() as u64 == count - 1;
        (beacons.last > 2 && all).then_some(())
    });
    assert!(
        again.is_some(),
        "{}",
        std::fs::read_to_string(&log).unwrap()
    );
}

#[test]
fn one_vcpu() {
    with_vcpus(1);
}

#[test]
fn two_vcpus() {
    with_vcpus(2);
}

#[test]
fn four_vcpus() {
    with_vcpus(4);
}

#[test]
fn sixteen_vcpus() {
    with_vcpus(16);
}

#[test]
fn another_number_of_vcpus_is_refused_and_the_guest_stays() {
    if !require(&[Need::Kvm]) {
        return;
    }
    let mut a = small().vcpus(2).start();
    a.wait_beacons(3);
    for vcpus in [1, 4] {
        let mut b = small().vcpus(vcpus).incoming("tcp:127.0.0.1:0").start();
        let port = b.port();
        let told = a.command(&format!("migrate tcp:127.0.0.1:{port}")) + &a.command("info migrate");
        assert!(told.contains("Migration status: failed"), "{told}");
        assert!(told.contains("cpu"), "{told}");
        a.wait_beacons(2);
    }
}

/// 5 GiB: RAM ends at 3 GiB and goes on at 4. The window lies at the end of the low part or in
/// the high one; the untouched rest costs next to nothing.
fn beyond_the_hole(between: Program, window: &str) {
    if !(require(Hmpsh.needs()) && require(between.needs())) {
        return;
    }
    let setup = |program| Setup::new(program).memory_mib(5 << 10).append(window);
    let mut a = setup(Hmpsh).start();
    a.wait_beacons(5);
    let mut b = moved(&mut a, setup(between));
    wait_beacons(&[&a.log(), &b.log()], 12);
    let c = moved(&mut b, setup(Hmpsh));
    wait_beacons(&[&a.log(), &b.log(), &c.log()], 12);
}

#[test]
fn a_window_above_4_gib() {
    beyond_the_hole(Hmpsh, "window=1M base=5G");
}

#[test]
fn a_window_that_begins_at_4_gib_by_way_of_7_2() {
    beyond_the_hole(Qemu7, "window=1M base=4G");
}

#[test]
fn a_window_that_ends_at_the_hole() {
    beyond_the_hole(Hmpsh, "window=1M base=3071M");
}

#[test]
fn a_window_across_the_hole_is_refused() {
    let setup = Setup::new(Hmpsh).memory_mib(5 << 10).accel("none");
    let (status, said) = setup
        .append("window=2M base=3071M")
        .try_start()
        .unwrap_err();
    assert_eq!(status.code(), Some(1));
    assert!(said.contains("is not inside guest RAM"), "{said}");
}

/// A small machine whose RAM is the memory backend `options`.
fn backed(program: Program, options: &str) -> Setup {
    let object = format!("{options},id=mem0,size=16M");
    Setup::new(program)
        .append("window=1M")
        .memory_mib(16)
        .machine(",memory-backend=mem0")
        .args(&["-object", &object])
}

/// One guest wanders through every kind of memory. Each destination holds exactly what the source
/// had, whatever was in its file before.
#[test]
fn through_all_memory_backends() {
    if !require(&[Need::Kvm, Need::Qemu7]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str| {
        let path = dir.path().join(name);
        std::fs::write(&path, vec![0x5a; 16 << 20]).unwrap();
        format!("memory-backend-file,mem-path={}", path.display())
    };
    let stages = [
        (Hmpsh, "memory-backend-memfd".to_owned()),
        (Hmpsh, file("shared") + ",share=on"),
        (Qemu7, "memory-backend-ram".to_owned()),
        (Hmpsh, file("private") + ",share=off"),
        (Hmpsh, "memory-backend-memfd,share=off".to_owned()),
        (Hmpsh, "memory-backend-ram,share=on".to_owned()),
    ];
    let mut hosts = vec![backed(Hmpsh, "memory-backend-ram").start()];
    hosts[0].wait_beacons(3);
    for (program, options) in stages {
        let from = hosts.last_mut().unwrap();
        let mut to = moved(from, backed(program, &options).args(&["-S"]));
        assert!(from.memory(16 << 20) == to.memory(16 << 20), "{options}");
        if options.contains("shared") {
            let content = std::fs::read(dir.path().join("shared")).unwrap();
            // But for the firmware's place below 1 MiB, which is no RAM.
            let memory = to.memory(16 << 20);
            assert!(
                content[1 << 20..] == memory[1 << 20..],
                "RAM is what is in the file"
            );
        }
        to.quiet("cont");
        hosts.push(to);
        let logs: Vec<_> = hosts.iter().map(Vmm::log).collect();
        wait_beacons(&logs.iter().map(|log| log.as_path()).collect::<Vec<_>>(), 4);
    }
    let private = std::fs::read(dir.path().join("private")).unwrap();
    assert!(
        private.iter().all(|byte| *byte == 0x5a),
        "share=off leaves the file alone"
    );
}

/// Looking for what there is to send, and for what is stale, must not fill a gigabyte with zeros.
#[test]
fn untouched_shared_memory_stays_untouched() {
    if !require(&[Need::Kvm]) {
        return;
    }
    let setup = || {
        let object = "memory-backend-memfd,id=mem0,size=1G";
        let setup = small().memory_mib(1 << 10).machine(",memory-backend=mem0");
        setup.args(&["-object", object])
    };
    let shared = |vm: &Vmm| {
        let status = std::fs::read_to_string(format!("/proc/{}/status", vm.pid())).unwrap();
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("RssShmem:"));
        let kib: u64 = line
            .unwrap()
            .trim()
            .strip_suffix(" kB")
            .unwrap()
            .parse()
            .unwrap();
        kib
    };
    let mut a = setup().start();
    a.wait_beacons(3);
    let b = moved(&mut a, setup());
    wait_beacons(&[&a.log(), &b.log()], 5);
    for vm in [&a, &b] {
        assert!((1..64 << 10).contains(&shared(vm)), "{} KiB", shared(vm));
    }
}

#[test]
fn a_backend_gives_the_block_its_name() {
    if !require(&[Need::Kvm]) {
        return;
    }
    let mut a = backed(Hmpsh, "memory-backend-memfd").start();
    assert!(a.command("info ramblock").contains(" mem0 "));
    a.wait_beacons(3);
    let mut b = small().memory_mib(16).incoming("tcp:127.0.0.1:0").start();
    let port = b.port();
    let told = a.command(&format!("migrate tcp:127.0.0.1:{port}")) + &a.command("info migrate");
    assert!(told.contains("Migration status: failed"), "{told}");
    assert!(
        told.contains("mem0") || b.said().contains("mem0"),
        "{told}{}",
        b.said()
    );
    a.wait_beacons(2);
}

#[test]
fn backends_that_can_not_be_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).display().to_string();
    std::fs::write(at("short"), [0; 4096]).unwrap();
    let file = |path: &str| format!("memory-backend-file,id=mem0,size=16M,mem-path={path}");
    for (object, words) in [
        (
            "memory-backend-ram,id=mem0,size=8M".to_owned(),
            "Machine memory size does not match the size of the memory backend".to_owned(),
        ),
        (
            file(&at("short")),
            "backing store size 0x1000 does not match 'size' option 0x1000000".to_owned(),
        ),
        (
            file(&at("nowhere/ram")),
            format!(
                "can't open backing store {} for guest RAM: No such file",
                at("nowhere/ram")
            ),
        ),
        // A program that runs can not be written, not even by root.
        (
            file("/proc/self/exe"),
            "for guest RAM: Text file busy".to_owned(),
        ),
        (
            "memory-backend-ram,id=mem1,size=16M".to_owned(),
            "mem0".to_owned(),
        ),
    ] {
        let setup = Setup::new(Hmpsh).accel("none").memory_mib(16);
        let setup = setup
            .machine(",memory-backend=mem0")
            .args(&["-object", &object]);
        let (status, said) = setup.try_start().unwrap_err();
        assert_eq!(status.code(), Some(1), "{object}: {said}");
        assert!(said.contains(&words), "{object}: {said}");
    }
    assert_eq!(
        std::fs::read(at("short")).unwrap().len(),
        4096,
        "it is left as it was"
    );
    let object = file(&at("new"));
    let setup = Setup::new(Hmpsh).accel("none").memory_mib(16);
    let setup = setup
        .machine(",memory-backend=mem0")
        .args(&["-object", &object]);
    drop(setup.start());
    assert_eq!(std::fs::metadata(at("new")).unwrap().len(), 16 << 20);
}

#[test]
fn paused_from_the_start_until_cont() {
    if !require(&[Need::Kvm]) {
        return;
    }
    let mut vm = small().args(&["-S"]).start();
    assert_eq!(vm.command("info status"), "VM status: paused (prelaunch)\n");
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(std::fs::read(vm.log()).unwrap(), b"");
    vm.quiet("cont");
    vm.wait_beacons(2);
    vm.quiet("stop");
    assert_eq!(vm.command("info status"), "VM status: paused\n");
    vm.quiet("system_reset");
    assert_eq!(vm.command("info status"), "VM status: paused (prelaunch)\n");
    vm.quiet("cont");
    assert_eq!(vm.command("info status"), "VM status: running\n");
}

/// Prints `R`, then faults without an interrupt table and with paging over empty page tables.
const TRIPLE_FAULT: &[u8] = &[
    0xba, 0xf8, 0x03, 0xb0, 0x52, 0xee, 0x2e, 0x66, 0x0f, 0x01, 0x1e, 0x26, 0x00, 0x0f, 0x20, 0xc0,
    0x0c, 0x01, 0x0f, 0x22, 0xc0, 0x66, 0x31, 0xc0, 0x0f, 0x22, 0xd8, 0x66, 0xb8, 0x01, 0x00, 0x00,
    0x80, 0x0f, 0x22, 0xc0, 0x90, 0xf4,
];

/// Prints `H` and rests with interrupts off.
const HALT: &[u8] = &[0xfa, 0xba, 0xf8, 0x03, 0xb0, 0x48, 0xee, 0xf4, 0xeb, 0xfd];

#[track_caller]
fn wait_log(vm: &Vmm, words: &str) {
    let log = vm.log();
    let found = poll(Duration::from_secs(20), || {
        std::fs::read_to_string(&log)
            .unwrap()
            .contains(words)
            .then_some(())
    });
    assert!(found.is_some(), "{:?}", std::fs::read_to_string(&log));
}

#[test]
fn a_triple_fault_is_a_reset() {
    if !require(&[Need::Kvm]) {
        return;
    }
    let bios = firmware(TRIPLE_FAULT);
    let mut vm = Setup::new(Hmpsh).bios(bios.path()).start();
    wait_log(&vm, "RRRR");
    assert_eq!(vm.command("info status"), "VM status: running\n");
    vm.quiet("stop");
    vm.wait_status("paused");
    vm.quiet("cont");
    assert!(vm.is_alive());
}

#[test]
fn with_no_reboot_it_is_the_end() {
    if !require(&[Need::Kvm]) {
        return;
    }
    let bios = firmware(TRIPLE_FAULT);
    let setup = || Setup::new(Hmpsh).bios(bios.path()).args(&["-no-reboot"]);
    let mut vm = setup().args(&["-S"]).start();
    vm.hmp.send("cont");
    assert_eq!(vm.wait_exit().code(), Some(0));
    assert_eq!(std::fs::read(vm.log()).unwrap(), b"R");
    let mut vm = small().args(&["-no-reboot"]).start();
    vm.hmp.send("system_reset");
    assert_eq!(vm.wait_exit().code(), Some(0));
}

#[test]
fn a_guest_that_halts_for_ever_can_be_stopped_and_moved() {
    if !require(&[Need::Kvm]) {
        return;
    }
    let bios = firmware(HALT);
    let setup = || Setup::new(Hmpsh).bios(bios.path());
    let mut a = setup().start();
    wait_log(&a, "H");
    a.wait_for("info registers", "HLT=1");
    a.quiet("stop");
    a.quiet("cont");
    let mut b = moved(&mut a, setup());
    assert_eq!(b.command("info status"), "VM status: running\n");
    b.wait_for("info registers", "HLT=1");
    assert_eq!(
        std::fs::read(b.log()).unwrap(),
        b"",
        "it does not start anew"
    );
    b.quiet("system_reset");
    wait_log(&b, "H");
}

/// A machine that can run nothing takes a guest in, shows it, and passes it on unharmed.
#[test]
fn through_a_machine_without_an_accelerator() {
    if !require(&[Need::Kvm]) {
        return;
    }
    let mut a = small().vcpus(2).start();
    a.wait_beacons(5);
    let mut b = moved(&mut a, small().vcpus(2).accel("none"));
    assert!(b.command("info status").starts_with("VM status: paused"));
    assert!(b.command("cont").contains("-accel none"));
    for line in [
        "info registers -a",
        "x /4i $pc",
        "x /8gx 0x100000",
        "xp /8gx 0x100000",
    ] {
        assert_eq!(b.command(line), a.command(line), "{line}");
    }
    assert!(a.memory(64 << 20) == b.memory(64 << 20), "memory differs");
    let mut c = moved(&mut b, small().vcpus(2));
    // As it was where it came from.
    assert_eq!(c.command("info status"), "VM status: paused\n");
    c.quiet("cont");
    all_vcpus_tick(&[&a, &b, &c], 2);
}

/// Runs hmpsh with these options to its end.
fn run(options: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hmpsh"));
    command.args(options).output().unwrap()
}

/// Runs hmpsh where `/dev` is what the shell command `furnish` makes of nothing; `None` where that
/// can not be had.
fn run_with_other_dev(furnish: &str, options: &[&str]) -> Option<Output> {
    let mut command = Command::new("unshare");
    command.args(["-rm", "sh", "-c"]);
    command.arg(format!(
        "mount -t tmpfs none /dev || exit 77; {furnish}; exec \"$0\" \"$@\""
    ));
    command.arg(env!("CARGO_BIN_EXE_hmpsh")).args(options);
    let output = command.output().ok()?;
    let said = String::from_utf8_lossy(&output.stderr);
    let is_refused = output.status.code() == Some(77) || said.contains("unshare");
    (!is_refused && output.status.signal().is_none()).then_some(output)
}

#[test]
fn without_dev_kvm_it_says_so_and_stays_paused() {
    let options = [
        "-nodefaults",
        "-e",
        "info status",
        "-e",
        "info kvm",
        "-e",
        "quit",
    ];
    for (furnish, reason) in [
        ("true", "No such file or directory"),
        ("touch /dev/kvm", "kvm version not supported"),
    ] {
        let Some(output) = run_with_other_dev(furnish, &options) else {
            return need::skipped("no mount namespace to be had");
        };
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{said}");
        let lines: Vec<_> = said.lines().filter(|line| line.contains("KVM")).collect();
        assert_eq!(lines.len(), 1, "{said}");
        assert!(lines[0].contains(reason), "{said}");
        assert!(lines[0].contains("using -accel none"), "{said}");
        let printed = String::from_utf8_lossy(&output.stdout);
        let paused = printed.contains("VM status: paused (prelaunch)");
        assert!(
            paused && printed.contains("kvm support: disabled"),
            "{printed}"
        );

        let output = run_with_other_dev(furnish, &["-accel", "kvm", "-e", "quit"]).unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(
            said.contains("Could not access KVM kernel module"),
            "{said}"
        );
        assert!(said.contains(reason), "{said}");
    }
}

#[test]
fn an_unknown_processor_is_refused() {
    let output = run(&["-accel", "none", "-cpu", "Nehalem", "-e", "quit"]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        said.contains("unable to find CPU model 'Nehalem'"),
        "{said}"
    );
}

#[test]
fn without_a_serial_port_there_is_no_section_of_it() {
    if !require(&[Need::Kvm]) {
        return;
    }
    let silent = || small().serial("none");
    // The first page's sequence number moves on, or nobody runs the guest.
    let alive = |vm: &mut Vmm| {
        let first = vm.command("xp /1gx 0x100000");
        let moves = poll(Duration::from_secs(20), || {
            (vm.command("xp /1gx 0x100000") != first).then_some(())
        });
        assert!(moves.is_some(), "{first}");
    };
    let mut a = silent().start();
    alive(&mut a);
    // Nobody there has a place for, or can do without, the port of the other.
    let mut b = small().incoming("tcp:127.0.0.1:0").start();
    let port = b.port();
    let told = a.command(&format!("migrate tcp:127.0.0.1:{port}")) + &a.command("info migrate");
    assert!(told.contains("Migration status: failed"), "{told}");
    assert!(told.contains("serial"), "{told}");
    alive(&mut a);
    let mut b = moved(&mut a, silent());
    alive(&mut b);

    let mut c = small().start();
    c.wait_beacons(2);
    let mut d = silent().incoming("tcp:127.0.0.1:0").start();
    let port = d.port();
    let told = c.command(&format!("migrate tcp:127.0.0.1:{port}")) + &c.command("info migrate");
    assert!(told.contains("Migration status: failed"), "{told}");
    assert!(told.contains("'serial' 0"), "{told}");
    c.wait_beacons(2);
}
