//! hmpsh and stock QEMU 7.2 and 10.0, each the source and each the destination of the other: the
//! cases that are none of the matrix's (`tests/matrix.rs`). In every one the guest must live one
//! life: no fault, no reboot, no beacon twice or missing.

mod common;

use std::path::Path;
use std::time::Duration;

use common::journey::goes_on_for;
use common::ticks::{BEATS, TICKS, check_rate};
use common::vmm::Program::{Hmpsh, Qemu7, Qemu10};
use common::vmm::{Program, Setup, Vmm, firmware, have};

/// How two machines of a cell are built.
#[derive(Clone, Copy)]
struct Shape {
    vcpus: u32,
    irqchip: &'static str,
    /// Further properties of `-M`, each with a comma in front.
    properties: &'static str,
}

const PLAIN: Shape = Shape {
    vcpus: 1,
    irqchip: "on",
    properties: "",
};
const SPLIT: Shape = Shape {
    irqchip: "split",
    ..PLAIN
};
const TWO_VCPUS: Shape = Shape { vcpus: 2, ..PLAIN };
/// With `kernel-irqchip=on` QEMU's microvm has two: the one that the guest talks to is KVM's, the
/// one that is saved and loaded is QEMU's own.
const PIC: Shape = Shape {
    properties: ",pic=on",
    ..SPLIT
};
/// What `-M microvm,acpi=off` alone is to QEMU.
const PIC_AND_PIT: Shape = Shape {
    properties: ",pic=on,pit=on",
    ..SPLIT
};

const PIC_AND_RTC: Shape = Shape {
    properties: ",pic=on,rtc=on",
    ..SPLIT
};

impl Shape {
    fn setup(self, program: Program) -> Setup {
        Setup::new(program)
            .vcpus(self.vcpus)
            .irqchip(self.irqchip)
            .machine(self.properties)
            .append("window=4M")
    }
}

/// Migrates and sees the guest gone.
#[track_caller]
fn migrate(source: &mut Vmm, uri: &str) {
    source.command(&format!("migrate {uri}"));
    // QEMU's prompt may be back while the devices are still on their way.
    source.wait_migration("completed");
    source.wait_status("paused (postmigrate)");
}

/// The guest goes on at the last of `hosts` for longer than a walk of its window takes.
#[track_caller]
fn goes_on(hosts: &[&Vmm]) {
    goes_on_for(hosts, 15);
}

/// Saves with one program through a pipe and loads with the other, from a pipe or from the file.
fn saved(from: Program, to: Program, shape: Shape) {
    if !have(&[from, to]) {
        return;
    }
    let mut source = shape.setup(from).start();
    source.wait_beacons(5);
    let [outgoing, incoming] = by_exec(&source.path("saved"));
    migrate(&mut source, &outgoing);
    for uri in [incoming, format!("file:{}", source.path("saved").display())] {
        let mut dest = shape.setup(to).incoming(&uri).start();
        dest.wait_status("running");
        goes_on(&[&source, &dest]);
    }
}

fn by_exec(file: &Path) -> [String; 2] {
    let file = file.display();
    [format!("\"exec:cat > {file}\""), format!("exec:cat {file}")]
}

/// Moves a running guest from `from` to `to` and back to a second `from`, over tcp.
fn to_and_fro(from: Program, to: Program, shape: Shape, options: &[&str]) {
    if !have(&[from, to]) {
        return;
    }
    let mut a = shape.setup(from).start();
    a.wait_beacons(5);
    for line in options {
        a.quiet(line);
    }
    let mut b = shape.setup(to).incoming("tcp:127.0.0.1:0").start();
    let port = b.port();
    migrate(&mut a, &format!("tcp:127.0.0.1:{port}"));
    b.wait_status("running");
    goes_on(&[&a, &b]);
    let mut c = shape.setup(from).incoming("tcp:127.0.0.1:0").start();
    let port = c.port();
    migrate(&mut b, &format!("tcp:127.0.0.1:{port}"));
    c.wait_status("running");
    goes_on(&[&a, &b, &c]);
}

/// The guest masked both interrupt controllers when it booted; a QEMU that was not told would have
/// them at reset, with nothing masked.
fn masks_arrive(to: Program) {
    if !have(&[Hmpsh, to]) {
        return;
    }
    let mut source = PIC.setup(Hmpsh).start();
    source.wait_beacons(5);
    let mut dest = PIC.setup(to).incoming("tcp:127.0.0.1:0").start();
    let port = dest.port();
    migrate(&mut source, &format!("tcp:127.0.0.1:{port}"));
    dest.wait_status("running");
    let state = dest.command("info pic");
    assert_eq!(state.matches("imr=ff").count(), 2, "{state}");
    goes_on(&[&source, &dest]);
}

/// A guest that lives by the interrupts of the PIT or of the clock chip goes on counting them at the
/// same rate, to `to` and back, and does not make up for the time in which it was saved.
fn ticks(to: Program, shape: Shape, guest: &[u8]) {
    if !have(&[Hmpsh, to]) {
        return;
    }
    let bios = firmware(guest);
    let setup = |program| shape.setup(program).bios(bios.path());
    let mut a = setup(Hmpsh).start();
    check_rate(&a);
    let mut b = setup(to).incoming("tcp:127.0.0.1:0").start();
    let port = b.port();
    migrate(&mut a, &format!("tcp:127.0.0.1:{port}"));
    b.wait_status("running");
    check_rate(&b);
    let [outgoing, incoming] = by_exec(&b.path("saved"));
    migrate(&mut b, &outgoing);
    std::thread::sleep(Duration::from_secs(1));
    let c = setup(Hmpsh).incoming(&incoming).start();
    check_rate(&c);
}

/// The clock chip goes on from the date that it was set to.
fn date_arrives(to: Program) {
    if !have(&[Hmpsh, to]) {
        return;
    }
    let mut source = PIC_AND_RTC.setup(Hmpsh).start();
    source.wait_beacons(5);
    let year = |vm: &mut Vmm| {
        vm.quiet("o /b 0x70 9");
        vm.command("i /b 0x71")
    };
    let here = year(&mut source);
    source.quiet("o /b 0x71 0x99");
    let mut dest = PIC_AND_RTC.setup(to).incoming("tcp:127.0.0.1:0").start();
    let port = dest.port();
    migrate(&mut source, &format!("tcp:127.0.0.1:{port}"));
    dest.wait_status("running");
    let there = year(&mut dest);
    assert!(there.contains("= 0x99"), "{here}{there}");
    goes_on(&[&source, &dest]);
}

/// Both sides speak a stream without configuration, footers and run state.
fn terse(from: Program, to: Program) {
    if !have(&[from, to]) {
        return;
    }
    let globals: Vec<String> = [
        "send-configuration",
        "send-section-footer",
        "store-global-state",
    ]
    .iter()
    // A QEMU 10.0 that leaves the configuration out aborts when it describes the stream.
    .filter(|name| from != Qemu10 || **name != "send-configuration")
    .flat_map(|name| ["-global".to_owned(), format!("migration.{name}=off")])
    .collect();
    let globals: Vec<&str> = globals.iter().map(String::as_str).collect();
    let mut source = PLAIN.setup(from).args(&globals).start();
    source.wait_beacons(5);
    let setup = || PLAIN.setup(to).incoming("tcp:127.0.0.1:0");
    let mut dest = setup().args(&globals).start();
    let port = dest.port();
    migrate(&mut source, &format!("tcp:127.0.0.1:{port}"));
    dest.wait_status("running");
    goes_on(&[&source, &dest]);
}

/// A destination has nothing to say on its standard error that the same QEMU, started for a guest of
/// its own, does not say too.
fn says_nothing(to: Program) {
    if !have(&[Hmpsh, to]) {
        return;
    }
    let image = tempfile::NamedTempFile::new().unwrap();
    image.as_file().set_len(1 << 20).unwrap();
    let drive = format!("if=none,id=d0,format=raw,file={}", image.path().display());
    let disk = ["-drive", &drive, "-device", "virtio-blk-device,drive=d0"];
    let shape = Shape {
        vcpus: 2,
        properties: ",pic=on,pit=on,rtc=on",
        ..SPLIT
    };
    let alone = shape.setup(to).args(&disk).args(&["-S"]).start().said();
    let mut source = shape.setup(Hmpsh).args(&disk).start();
    source.wait_beacons(5);
    let setup = shape.setup(to).args(&disk);
    let mut dest = setup.incoming("tcp:127.0.0.1:0").start();
    let port = dest.port();
    migrate(&mut source, &format!("tcp:127.0.0.1:{port}"));
    dest.wait_status("running");
    goes_on(&[&source, &dest]);
    let said = dest.said();
    let new: Vec<_> = said
        .lines()
        .filter(|line| !alone.contains(line.trim_end()))
        .collect();
    assert!(new.is_empty(), "{new:?}");
}

/// The command that QEMU 10.0 sends before the last memory: 10.0 understands it, 7.2 dies of it, and
/// then the guest goes on here.
fn switchover_start(to: Program, is_understood: bool) {
    if !have(&[Hmpsh, to]) {
        return;
    }
    let on = ["-global", "migration.send-switchover-start=on"];
    let mut source = PLAIN.setup(Hmpsh).args(&on).start();
    source.wait_beacons(5);
    let mut dest = PLAIN.setup(to).incoming("tcp:127.0.0.1:0").start();
    let port = dest.port();
    if is_understood {
        migrate(&mut source, &format!("tcp:127.0.0.1:{port}"));
        dest.wait_status("running");
        return goes_on(&[&source, &dest]);
    }
    source.command(&format!("migrate tcp:127.0.0.1:{port}"));
    source.wait_migration("failed");
    source.wait_status("running");
    dest.wait_said("MIG_CMD 0xb unknown");
    source.wait_beacons(10);
}

/// Moves a running guest over a unix socket; what a paused destination holds is what the source
/// had.
fn over_unix(from: Program, to: Program) {
    if !have(&[from, to]) {
        return;
    }
    let mut source = PLAIN.setup(from).start();
    source.wait_beacons(25);
    let uri = format!("unix:{}", source.path("migration").display());
    let mut dest = PLAIN.setup(to).args(&["-S"]).incoming(&uri).start();
    migrate(&mut source, &uri);
    dest.wait_status("paused");
    let size = 64 << 20;
    assert!(source.memory(size) == dest.memory(size), "memory differs");
    dest.quiet("cont");
    goes_on(&[&source, &dest]);
}

/// One test per line.
macro_rules! cells {
    ($($name:ident: $run:expr;)*) => {
        $(
            #[test]
            fn $name() {
                $run;
            }
        )*
    };
}

cells! {
    saved_by_7_2: saved(Qemu7, Hmpsh, PLAIN);
    saved_by_10_0: saved(Qemu10, Hmpsh, PLAIN);
    live_to_7_2_and_back: to_and_fro(Hmpsh, Qemu7, PLAIN, &[]);
    live_to_7_2_and_back_one_way:
        to_and_fro(Hmpsh, Qemu7, PLAIN, &["migrate_set_capability return-path off"]);
    live_to_10_0_and_back: to_and_fro(Hmpsh, Qemu10, PLAIN, &[]);
    live_to_10_0_and_back_one_way:
        to_and_fro(Hmpsh, Qemu10, PLAIN, &["migrate_set_capability return-path off"]);
    live_from_7_2_with_return_path:
        to_and_fro(Qemu7, Hmpsh, PLAIN, &["migrate_set_capability return-path on"]);
    live_from_10_0_with_return_path:
        to_and_fro(Qemu10, Hmpsh, PLAIN, &["migrate_set_capability return-path on"]);
    live_to_7_2_and_back_with_two_vcpus: to_and_fro(Hmpsh, Qemu7, TWO_VCPUS, &[]);
    live_from_10_0_with_pic: to_and_fro(Qemu10, Hmpsh, PIC, &[]);
    ticks_go_on_at_7_2_and_back: ticks(Qemu7, PIC_AND_PIT, TICKS);
    ticks_go_on_at_10_0_and_back: ticks(Qemu10, PIC_AND_PIT, TICKS);
    ticks_go_on_at_hmpsh: ticks(Hmpsh, PIC_AND_PIT, TICKS);
    clock_interrupts_go_on_at_7_2_and_back: ticks(Qemu7, PIC_AND_RTC, BEATS);
    clock_interrupts_go_on_at_10_0_and_back: ticks(Qemu10, PIC_AND_RTC, BEATS);
    clock_interrupts_go_on_at_hmpsh: ticks(Hmpsh, PIC_AND_RTC, BEATS);
    date_arrives_at_7_2: date_arrives(Qemu7);
    date_arrives_at_10_0: date_arrives(Qemu10);
    masks_arrive_at_7_2: masks_arrive(Qemu7);
    masks_arrive_at_10_0: masks_arrive(Qemu10);
    nothing_is_said_by_7_2: says_nothing(Qemu7);
    nothing_is_said_by_10_0: says_nothing(Qemu10);
    terse_to_7_2: terse(Hmpsh, Qemu7);
    terse_to_10_0: terse(Hmpsh, Qemu10);
    terse_from_7_2: terse(Qemu7, Hmpsh);
    terse_from_10_0: terse(Qemu10, Hmpsh);
    terse_between_ourselves: terse(Hmpsh, Hmpsh);
    switchover_start_to_10_0: switchover_start(Qemu10, true);
    switchover_start_to_7_2: switchover_start(Qemu7, false);
    switchover_start_to_ourselves: switchover_start(Hmpsh, true);
    over_unix_to_7_2: over_unix(Hmpsh, Qemu7);
    over_unix_to_10_0: over_unix(Hmpsh, Qemu10);
    over_unix_from_7_2: over_unix(Qemu7, Hmpsh);
    over_unix_from_10_0: over_unix(Qemu10, Hmpsh);
    // The harness itself, with nothing of ours in it: what fails here fails without us.
    live_from_7_2_to_10_0: over_unix(Qemu7, Qemu10);
}
