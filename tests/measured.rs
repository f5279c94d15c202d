//! Where QEMU was measured to fail its users (`M1` to `M10`), each as a test of what we do
//! instead, against a destination of ours and, where the defect is on the other side, stock QEMU.

mod common;

use std::time::{Duration, Instant};

use common::beacon::wait_beacons;
use common::hmp::PROMPT;
use common::need::require;
use common::poll;
use common::vmm::Program::{Hmpsh, Qemu7, Qemu10};
use common::vmm::{Program, Setup, Vmm};
use rustix::process::Signal;

fn machine(program: Program) -> Setup {
    Setup::new(program).append("window=4M")
}

fn have(destination: Program) -> bool {
    require(Hmpsh.needs()) && require(destination.needs())
}

/// Migrates in the foreground; what the operator was told, by the command and by `info migrate`.
#[track_caller]
fn told(from: &mut Vmm, uri: &str, patience: Duration) -> String {
    from.hmp.send(&format!("migrate {uri}"));
    let printed = from.hmp.answer(patience).expect("the prompt comes back");
    printed + &from.command("info migrate")
}

/// The guest runs at the source and nowhere else, and a second try moves it.
#[track_caller]
fn nothing_lost(source: &mut Vmm) {
    assert_eq!(source.command("info status"), "VM status: running\n");
    source.wait_beacons(5);
    let mut dest = machine(Hmpsh).incoming("tcp:127.0.0.1:0").start();
    let port = dest.port();
    let told = told(source, &format!("tcp:127.0.0.1:{port}"), LONG);
    assert!(told.contains("Migration status: completed\n"), "{told}");
    dest.wait_status("running");
    wait_beacons(&[&source.log(), &dest.log()], 10);
}

/// M1, M9: a device that the destination lacks.
fn a_missing_device(program: Program, reason: &str) {
    if !have(program) {
        return;
    }
    let mut source = machine(Hmpsh).start();
    source.wait_beacons(3);
    let mut dest = machine(program)
        .serial("none")
        .incoming("tcp:127.0.0.1:0")
        .start();
    let port = dest.port();
    let told = told(&mut source, &format!("tcp:127.0.0.1:{port}"), LONG);
    assert!(told.contains("Migration status: failed ("), "{told}");
    assert!(told.contains(reason), "{told}");
    if program == Hmpsh {
        assert!(dest.is_alive(), "{}", dest.said());
        assert_eq!(
            dest.command("info status"),
            "VM status: paused (inmigrate)\n"
        );
    }
    nothing_lost(&mut source);
}

#[test]
fn m1_a_missing_device_keeps_the_guest_and_names_itself() {
    a_missing_device(Hmpsh, "serial");
}

#[test]
fn m9_a_missing_device_at_qemu_7_2_fails_with_a_reason() {
    // It ends without a word.
    a_missing_device(Qemu7, "The destination closed the connection");
}

#[test]
fn m9_a_missing_device_at_qemu_10_0_fails_with_a_reason() {
    a_missing_device(Qemu10, "Sibling indicated error");
}

/// M2: a destination frozen before it accepts is no success.
fn a_frozen_destination(program: Program) {
    if !have(program) {
        return;
    }
    let mut source = machine(Hmpsh).start();
    source.wait_beacons(3);
    let mut dest = machine(program).incoming("tcp:127.0.0.1:0").start();
    let port = dest.port();
    dest.signal(Signal::STOP);
    let told = told(&mut source, &format!("tcp:127.0.0.1:{port}"), LONG);
    assert!(told.contains("Migration status: failed ("), "{told}");
    assert!(told.contains("return-path off"), "{told}");
    nothing_lost(&mut source);
}

#[test]
fn m2_a_frozen_destination_is_no_success() {
    a_frozen_destination(Hmpsh);
}

#[test]
fn m2_a_frozen_qemu_is_no_success() {
    a_frozen_destination(Qemu7);
}

/// M3: the monitor that waits for a frozen destination is no hostage of it: another monitor
/// cancels, and the prompt comes back.
#[test]
fn m3_a_frozen_destination_does_not_hang_the_monitor() {
    if !have(Hmpsh) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("second");
    let second = format!("unix:{},server=on,wait=off", socket.display());
    let mut source = machine(Hmpsh).args(&["-monitor", &second]).start();
    let mut other = source.session(&socket);
    source.wait_beacons(3);
    let mut dest = machine(Hmpsh).incoming("tcp:127.0.0.1:0").start();
    let port = dest.port();
    dest.signal(Signal::STOP);
    source.hmp.send(&format!("migrate tcp:127.0.0.1:{port}"));
    let begun = poll(LONG, || {
        other
            .command("info migrate")
            .contains("Migration status: ")
            .then_some(())
    });
    assert!(begun.is_some());
    let start = Instant::now();
    assert_eq!(other.command("migrate_cancel"), "");
    source.hmp.answer(LONG).expect("the prompt comes back");
    assert!(
        start.elapsed() < Duration::from_secs(2),
        "it took {:?}",
        start.elapsed()
    );
    source.wait_migration("cancelled");
    nothing_lost(&mut source);
}

/// M5: a foreground migration tells every second how far it is, and keeps what is typed.
#[test]
fn m5_a_foreground_migration_tells_how_far_it_is() {
    if !have(Hmpsh) {
        return;
    }
    let mut source = Setup::new(Hmpsh).append("window=16M").start();
    source.wait_beacons(20);
    source.quiet("stop");
    source.quiet("migrate_set_parameter max-bandwidth 3M");
    let mut dest = Setup::new(Hmpsh)
        .append("window=16M")
        .incoming("tcp:127.0.0.1:0")
        .start();
    let port = dest.port();
    source.hmp.send(&format!("migrate tcp:127.0.0.1:{port}"));
    source.hmp.send("info status");
    let mut printed = String::new();
    let both = poll(LONG, || {
        printed = source.hmp.printed_within(Duration::from_millis(50));
        (printed.matches(PROMPT).count() == 2).then_some(())
    });
    assert!(both.is_some(), "two prompts should have come: {printed}");
    let (progress, typed) = printed.split_once(PROMPT).unwrap();
    assert!(typed.contains("VM status: paused (postmigrate)"), "{typed}");
    let percents: Vec<u32> = progress
        .split("Completed ")
        .skip(1)
        .map(|rest| {
            rest.split_once(" %")
                .expect("a percentage")
                .0
                .parse()
                .unwrap()
        })
        .collect();
    assert!(percents.len() >= 2, "{progress}");
    assert!(
        percents.is_sorted() && percents[0] < percents[percents.len() - 1],
        "{percents:?}"
    );
    let last = percents.len() - 1;
    assert!(
        percents[..last].iter().all(|percent| *percent < 100),
        "{percents:?}"
    );
    dest.wait_status("paused");
    dest.quiet("cont");
    wait_beacons(&[&source.log(), &dest.log()], 5);
}

/// M6: a destination that stops reading shows in the figures or ends the migration, and a cancel
/// does not wait for it.
#[test]
fn m6_a_stalled_destination_shows() {
    if !have(Hmpsh) {
        return;
    }
    // More than socket buffers hold.
    let mut source = Setup::new(Hmpsh).append("window=32M").start();
    source.wait_beacons(40);
    source.quiet("migrate_set_parameter max-bandwidth 1M");
    let mut dest = Setup::new(Hmpsh)
        .append("window=32M")
        .incoming("tcp:127.0.0.1:0")
        .start();
    let port = dest.port();
    source.quiet(&format!("migrate -d tcp:127.0.0.1:{port}"));
    let flows = poll(LONG, || {
        (throughput(&source.command("info migrate"))? > 1.0).then_some(())
    });
    assert!(flows.is_some());
    dest.signal(Signal::STOP);
    source.quiet("migrate_set_parameter max-bandwidth 0");
    let shown = poll(LONG, || {
        let state = source.command("info migrate");
        let stands = throughput(&state).is_some_and(|mbps| mbps < 1.0);
        (stands || state.contains("Migration status: failed (")).then_some(state)
    });
    let shown = shown.expect("throughput falls to nothing, or the migration fails");
    if shown.contains("Migration status: active") {
        let start = Instant::now();
        source.quiet("migrate_cancel");
        source.wait_migration("cancelled");
        assert!(
            start.elapsed() < Duration::from_secs(1),
            "it took {:?}",
            start.elapsed()
        );
    }
    assert_eq!(source.command("info status"), "VM status: running\n");
    source.wait_beacons(5);
}

/// M6: while nobody answers, the time that `info migrate` shows goes on.
#[test]
fn m6_time_goes_on_while_nobody_answers() {
    if !have(Hmpsh) {
        return;
    }
    let mut source = machine(Hmpsh).start();
    let mut dest = machine(Hmpsh).incoming("tcp:127.0.0.1:0").start();
    let port = dest.port();
    dest.signal(Signal::STOP);
    source.quiet(&format!("migrate -d tcp:127.0.0.1:{port}"));
    let waited = poll(LONG, || {
        let state = source.command("info migrate");
        assert!(state.contains("Migration status: setup"), "{state}");
        (figure(&state, "total time: ")? > 1000).then_some(())
    });
    assert!(waited.is_some());
    dest.signal(Signal::CONT);
    source.wait_migration("completed");
    dest.wait_status("running");
}

/// M7: figures stay after a cancel.
#[test]
fn m7_a_cancel_keeps_the_figures() {
    if !have(Hmpsh) {
        return;
    }
    let mut source = machine(Hmpsh).start();
    source.wait_beacons(10);
    source.quiet("migrate_set_parameter max-bandwidth 64k");
    let mut dest = machine(Hmpsh).incoming("tcp:127.0.0.1:0").start();
    let port = dest.port();
    source.quiet(&format!("migrate -d tcp:127.0.0.1:{port}"));
    let moving = poll(LONG, || {
        let state = source.command("info migrate");
        (state.contains("Migration status: active") && figure(&state, "transferred ram: ")? > 10)
            .then_some(())
    });
    assert!(moving.is_some());
    source.quiet("migrate_cancel");
    let state = source.wait_migration("cancelled");
    assert!(
        figure(&state, "transferred ram: ").is_some_and(|kilobytes| kilobytes > 10),
        "{state}"
    );
    assert!(
        figure(&state, "total time: ").is_some_and(|milliseconds| milliseconds > 0),
        "{state}"
    );
    assert!(
        figure(&state, "total ram: ").is_some_and(|kilobytes| kilobytes > 60_000),
        "{state}"
    );
    source.quiet("migrate_set_parameter max-bandwidth 1g");
    nothing_lost(&mut source);
}

/// M8: different sizes of RAM are named, with both figures, where the operator sits.
#[test]
fn m8_different_sizes_of_ram_are_named_at_the_source() {
    if !have(Hmpsh) {
        return;
    }
    let mut source = machine(Hmpsh).start();
    source.wait_beacons(3);
    let mut dest = machine(Hmpsh)
        .memory_mib(48)
        .incoming("tcp:127.0.0.1:0")
        .start();
    let port = dest.port();
    let told = told(&mut source, &format!("tcp:127.0.0.1:{port}"), LONG);
    assert!(told.contains("Migration status: failed ("), "{told}");
    assert!(
        told.contains("Size mismatch: microvm.ram: 0x4000000 != 0x3000000"),
        "{told}"
    );
    assert!(dest.is_alive(), "{}", dest.said());
    nothing_lost(&mut source);
}

/// M10: a guest that went elsewhere is not run here by accident.
#[test]
fn m10_cont_after_the_guest_left_wants_force() {
    if !have(Hmpsh) {
        return;
    }
    let mut source = machine(Hmpsh).start();
    source.wait_beacons(3);
    let mut dest = machine(Hmpsh).incoming("tcp:127.0.0.1:0").start();
    let port = dest.port();
    let told = told(&mut source, &format!("tcp:127.0.0.1:{port}"), LONG);
    assert!(told.contains("Migration status: completed\n"), "{told}");
    let refused = source.command("cont");
    assert!(
        refused.starts_with("Error: ") && refused.contains("cont -f"),
        "{refused}"
    );
    assert_eq!(
        source.command("info status"),
        "VM status: paused (postmigrate)\n"
    );
    wait_beacons(&[&source.log(), &dest.log()], 10);
    source.quiet("cont -f");
    source.wait_status("running");
}

/// Megabits per second.
fn throughput(state: &str) -> Option<f64> {
    state
        .split("throughput: ")
        .nth(1)?
        .split(' ')
        .next()?
        .parse()
        .ok()
}

/// The number after `label` in what `info migrate` said.
fn figure(state: &str, label: &str) -> Option<u64> {
    state.split(label).nth(1)?.split(' ').next()?.parse().ok()
}

/// More than any of our own time-outs.
const LONG: Duration = Duration::from_secs(20);
