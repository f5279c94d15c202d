//! Two real hmpsh processes, a KVM guest between them: every transport, failure, cancel and the
//! second try after it. The guest's own log is the witness; see `common::beacon`.

mod common;

use std::net::TcpListener;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use common::beacon::wait_beacons;
use common::need::{Need, require};
use common::vmm::Program::Hmpsh;
use common::vmm::{Setup, Vmm};

fn source() -> Setup {
    Setup::new(Hmpsh).append("window=4M")
}

/// A destination that listens on a port of its own, and that port.
fn destination() -> (Vmm, u16) {
    let mut dest = source().incoming("tcp:127.0.0.1:0").start();
    let port = dest.port();
    (dest, port)
}

/// Migrates in the foreground and sees the guest gone.
#[track_caller]
fn migrate(from: &mut Vmm, uri: &str) {
    let printed = from.command(&format!("migrate {uri}"));
    let state = from.command("info migrate");
    assert!(
        state.contains("Migration status: completed\n"),
        "migrate {uri}: {printed}{state}{}",
        from.said()
    );
    from.wait_status("paused (postmigrate)");
}

/// Migrates in the foreground, sees it fail and the guest running where it was, and returns what
/// the operator was told.
#[track_caller]
fn migrate_in_vain(from: &mut Vmm, uri: &str) -> String {
    let printed = from.command(&format!("migrate {uri}"));
    let state = from.command("info migrate");
    assert!(
        state.contains("Migration status: failed ("),
        "migrate {uri}: {printed}{state}"
    );
    assert_eq!(from.command("info status"), "VM status: running\n");
    from.wait_beacons(3);
    printed + &state
}

/// The guest runs at the last of `hosts` and goes on for longer than a walk of its window takes.
#[track_caller]
fn arrived(hosts: &mut [&mut Vmm]) {
    hosts.last_mut().expect("a host").wait_status("running");
    let logs: Vec<_> = hosts.iter().map(|host| host.log()).collect();
    let logs: Vec<&Path> = logs.iter().map(|log| log.as_path()).collect();
    wait_beacons(&logs, 15);
}

/// A whole migration between a source and a destination with the same URI.
#[track_caller]
fn over(uri: &str) {
    let mut a = source().start();
    a.wait_beacons(3);
    let mut b = source().incoming(uri).start();
    migrate(&mut a, uri);
    arrived(&mut [&mut a, &mut b]);
}

/// Saves to one URI and loads from another.
#[track_caller]
fn through(file: &Path, outgoing: &str, incoming: &str) {
    let mut a = source().start();
    a.wait_beacons(3);
    migrate(&mut a, outgoing);
    assert!(file.metadata().is_ok_and(|file| file.len() > 0));
    let mut b = source().incoming(incoming).start();
    arrived(&mut [&mut a, &mut b]);
}

#[test]
fn over_tcp() {
    if !require(&[Need::Kvm]) {
        return;
    }
    let mut a = source().start();
    a.wait_beacons(3);
    let (mut b, port) = destination();
    migrate(&mut a, &format!("tcp:localhost:{port}"));
    arrived(&mut [&mut a, &mut b]);
    // And on: what came in can go out again.
    let (mut c, port) = destination();
    migrate(&mut b, &format!("tcp:127.0.0.1:{port}"));
    arrived(&mut [&mut a, &mut b, &mut c]);
}

#[test]
fn over_tcp_with_ipv6() {
    if !require(&[Need::Kvm, Need::Ipv6]) {
        return;
    }
    let mut a = source().start();
    a.wait_beacons(3);
    let mut b = source().incoming("tcp:[::1]:0").start();
    let port = b.port();
    migrate(&mut a, &format!("tcp:[::1]:{port}"));
    arrived(&mut [&mut a, &mut b]);
}

#[test]
fn over_unix() {
    if !require(&[Need::Kvm]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    over(&format!("unix:{}", dir.path().join("migration").display()));
}

#[test]
fn through_exec() {
    if !require(&[Need::Kvm]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("saved");
    let name = file.display();
    through(
        &file,
        &format!("\"exec:cat > {name}\""),
        &format!("exec:cat {name}"),
    );
}

#[test]
fn through_a_file() {
    if !require(&[Need::Kvm]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("saved");
    let uri = format!("file:{}", file.display());
    through(&file, &uri, &uri);
}

#[test]
fn through_a_file_from_an_offset() {
    if !require(&[Need::Kvm]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("saved");
    std::fs::write(&file, [0x5a; 10_000]).unwrap();
    let uri = format!("file:{},offset=0x1000", file.display());
    through(&file, &uri, &uri);
    assert_eq!(std::fs::read(&file).unwrap()[..4096], [0x5a; 4096]);
}

#[test]
fn over_descriptors_given_to_the_monitors() {
    if !require(&[Need::Kvm]) {
        return;
    }
    let (left, right) = UnixStream::pair().unwrap();
    let mut a = source().start();
    a.wait_beacons(3);
    let mut b = source().incoming("defer").start();
    assert_eq!(b.hmp.command_with_fd("getfd there", right.as_fd()), "");
    assert_eq!(a.hmp.command_with_fd("getfd here", left.as_fd()), "");
    drop((left, right));
    b.quiet("migrate_incoming fd:there");
    migrate(&mut a, "fd:here");
    arrived(&mut [&mut a, &mut b]);
}

#[test]
fn over_inherited_descriptors() {
    if !require(&[Need::Kvm]) {
        return;
    }
    let (left, right) = UnixStream::pair().unwrap();
    let mut a = source().stdin(OwnedFd::from(left)).start();
    a.wait_beacons(3);
    let mut b = source()
        .stdin(OwnedFd::from(right))
        .incoming("fd:0")
        .start();
    migrate(&mut a, "fd:0");
    arrived(&mut [&mut a, &mut b]);
}

#[test]
fn two_vcpus() {
    if !require(&[Need::Kvm]) {
        return;
    }
    let mut a = source().vcpus(2).start();
    a.wait_beacons(3);
    let mut b = source().vcpus(2).incoming("tcp:127.0.0.1:0").start();
    let port = b.port();
    migrate(&mut a, &format!("tcp:127.0.0.1:{port}"));
    arrived(&mut [&mut a, &mut b]);
    let ticks = |host: &Vmm| {
        let text = std::fs::read_to_string(host.log()).unwrap();
        text.lines()
            .rfind(|line| line.starts_with("C 1 "))
            .map(str::to_owned)
    };
    let first = ticks(&b).expect("vCPU 1 shows its ticks");
    arrived(&mut [&mut a, &mut b]);
    assert_ne!(ticks(&b).unwrap(), first, "vCPU 1 stands still");
}

#[test]
fn memory_above_4_gib() {
    if !require(&[Need::Kvm]) {
        return;
    }
    let big = || {
        Setup::new(Hmpsh)
            .memory_mib(6 << 10)
            .append("window=4M base=5G")
    };
    let mut a = big().start();
    a.wait_beacons(3);
    let mut b = big().incoming("tcp:127.0.0.1:0").start();
    let port = b.port();
    migrate(&mut a, &format!("tcp:127.0.0.1:{port}"));
    arrived(&mut [&mut a, &mut b]);
}

#[test]
fn memory_arrives_byte_for_byte() {
    if !require(&[Need::Kvm]) {
        return;
    }
    let mut a = source().start();
    a.wait_beacons(25);
    let mut b = source().args(&["-S"]).incoming("tcp:127.0.0.1:0").start();
    let port = b.port();
    migrate(&mut a, &format!("tcp:127.0.0.1:{port}"));
    b.wait_status("paused");
    let size = 64 << 20;
    assert!(a.memory(size) == b.memory(size), "memory differs");
    b.quiet("cont");
    arrived(&mut [&mut a, &mut b]);
}

#[test]
fn a_paused_guest_arrives_paused() {
    if !require(&[Need::Kvm]) {
        return;
    }
    let mut a = source().start();
    a.wait_beacons(3);
    a.quiet("stop");
    let (mut b, port) = destination();
    migrate(&mut a, &format!("tcp:127.0.0.1:{port}"));
    b.wait_migration("completed");
    assert_eq!(b.command("info status"), "VM status: paused\n");
    b.quiet("cont");
    arrived(&mut [&mut a, &mut b]);
}

/// Starts a migration that would take minutes, in the background.
#[track_caller]
fn crawl(from: &mut Vmm, uri: &str) {
    from.quiet("migrate_set_parameter max-bandwidth 64k");
    from.quiet(&format!("migrate -d {uri}"));
    from.wait_migration("active");
}

#[test]
fn the_second_try_after_a_cancel_reaches_the_same_destination() {
    if !require(&[Need::Kvm]) {
        return;
    }
    let mut a = source().start();
    a.wait_beacons(25);
    let (mut b, port) = destination();
    let uri = format!("tcp:127.0.0.1:{port}");
    for _ in 0..2 {
        crawl(&mut a, &uri);
        a.quiet("migrate_cancel");
        assert!(
            a.command("info migrate")
                .contains("Migration status: cancell")
        );
        a.wait_migration("cancelled");
        assert_eq!(a.command("info status"), "VM status: running\n");
        a.wait_beacons(3);
        assert!(b.is_alive(), "{}", b.said());
    }
    a.quiet("migrate_set_parameter max-bandwidth 1g");
    assert!(b.command("info migrate").contains("socket address: ["));
    migrate(&mut a, &uri);
    arrived(&mut [&mut a, &mut b]);
    // Nobody listens any more, and nobody may be told to.
    assert!(!b.command("info migrate").contains("socket address"));
    assert_eq!(
        b.command("migrate_incoming tcp:127.0.0.1:0"),
        "Error: The incoming migration has already been started\n"
    );
}

#[test]
fn a_destination_that_dies_costs_nothing_but_the_try() {
    if !require(&[Need::Kvm]) {
        return;
    }
    let mut a = source().start();
    a.wait_beacons(25);
    let (b, port) = destination();
    crawl(&mut a, &format!("tcp:127.0.0.1:{port}"));
    drop(b);
    a.wait_migration("failed (");
    assert_eq!(a.command("info status"), "VM status: running\n");
    a.wait_beacons(3);
    a.quiet("migrate_set_parameter max-bandwidth 1g");
    let (mut c, port) = destination();
    migrate(&mut a, &format!("tcp:127.0.0.1:{port}"));
    arrived(&mut [&mut a, &mut c]);
}

#[test]
fn a_stranger_does_not_take_the_destination_down() {
    if !require(&[Need::Kvm]) {
        return;
    }
    let (mut b, port) = destination();
    for garbage in [
        &b""[..],
        b"GET / HTTP/1.0\r\n\r\n",
        b"QEVM\0\0\0\x03\xff\xff\xff\xff",
    ] {
        let mut stranger = std::net::TcpStream::connect(("127.0.0.1", port)).unwrap();
        std::io::Write::write_all(&mut stranger, garbage).unwrap();
    }
    let mut a = source().start();
    a.wait_beacons(3);
    migrate(&mut a, &format!("tcp:127.0.0.1:{port}"));
    arrived(&mut [&mut a, &mut b]);
}

/// Nobody there, nothing to write to, a child that fails: the reason is told and the guest stays.
#[test]
fn transports_that_fail() {
    if !require(&[Need::Kvm]) {
        return;
    }
    let mut a = source().start();
    a.wait_beacons(3);
    let dir = tempfile::tempdir().unwrap();
    let missing = dir.path().join("nowhere").join("x");
    for (uri, reason) in [
        ("tcp:127.0.0.1:1".to_owned(), "Connection refused"),
        (
            format!("unix:{}", missing.display()),
            "No such file or directory",
        ),
        (
            format!("file:{}", missing.display()),
            "No such file or directory",
        ),
        ("\"exec:cat > /dev/null; exit 3\"".to_owned(), "3"),
        ("\"exec:cat > /dev/full\"".to_owned(), "1"),
        ("\"exec:true\"".to_owned(), "Broken pipe"),
    ] {
        let told = migrate_in_vain(&mut a, &uri);
        assert!(told.contains(reason), "{uri}: {told}");
    }
    let (mut b, port) = destination();
    migrate(&mut a, &format!("tcp:127.0.0.1:{port}"));
    arrived(&mut [&mut a, &mut b]);
}

#[test]
fn a_cancelled_file_leaves_nothing_behind_and_the_old_one_as_it_was() {
    if !require(&[Need::Kvm]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("saved");
    std::fs::write(&file, "before").unwrap();
    let mut a = source().start();
    a.wait_beacons(25);
    crawl(&mut a, &format!("file:{}", file.display()));
    a.quiet("migrate_cancel");
    a.wait_migration("cancelled");
    assert_eq!(std::fs::read(&file).unwrap(), b"before");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    a.wait_beacons(3);
}

/// A saved guest of which one bit is wrong is not run.
#[test]
fn a_flipped_bit_in_a_saved_page_is_refused() {
    if !require(&[Need::Kvm]) {
        return;
    }
    let mut a = source().start();
    a.wait_beacons(25);
    let file = a.path("saved");
    migrate(&mut a, &format!("file:{}", file.display()));
    let mut stream = std::fs::read(&file).unwrap();
    let middle = stream.len() / 2;
    stream[middle] ^= 1;
    std::fs::write(&file, stream).unwrap();
    let end = source()
        .incoming(&format!("file:{}", file.display()))
        .try_start();
    let (status, said) = match end {
        Err(end) => end,
        // The monitor may come up before the stream is read to its end.
        Ok(mut b) => (b.wait_exit(), b.said()),
    };
    assert_eq!(status.code(), Some(1), "{said}");
    assert!(!said.trim().is_empty());
}

#[test]
fn the_answer_of_a_cancel_does_not_wait_for_the_peer() {
    if !require(&[Need::Kvm]) {
        return;
    }
    // Takes the connection and never reads.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut a = source().start();
    a.wait_beacons(3);
    a.quiet(&format!("migrate -d tcp:127.0.0.1:{port}"));
    a.quiet("migrate_cancel");
    let start = std::time::Instant::now();
    a.wait_migration("cancelled");
    assert!(start.elapsed() < Duration::from_secs(2));
    a.wait_beacons(3);
}

#[test]
fn stop_and_cont_while_memory_moves_are_obeyed() {
    if !require(&[Need::Kvm]) {
        return;
    }
    let mut a = source().start();
    a.wait_beacons(25);
    let (mut b, port) = destination();
    let uri = format!("tcp:127.0.0.1:{port}");
    crawl(&mut a, &uri);
    a.quiet("stop");
    assert_eq!(a.command("info status"), "VM status: paused\n");
    a.quiet("cont");
    assert_eq!(a.command("info status"), "VM status: running\n");
    a.quiet("stop");
    a.quiet("migrate_cancel");
    // The next one at once: what the last one still has to do must not touch it.
    a.quiet("migrate_set_parameter max-bandwidth 1g");
    a.wait_migration("cancelled");
    migrate(&mut a, &uri);
    b.wait_migration("completed");
    assert_eq!(b.command("info status"), "VM status: paused\n");
    // It is there now, although it was continued here while it left.
    let refusal = a.command("cont");
    assert!(refusal.contains("this VM runs at"), "{refusal}");
    b.quiet("cont");
    arrived(&mut [&mut a, &mut b]);
}

#[test]
fn the_destination_may_be_told_to_wait_while_the_guest_arrives() {
    if !require(&[Need::Kvm]) {
        return;
    }
    let mut a = source().start();
    a.wait_beacons(25);
    let (mut b, port) = destination();
    crawl(&mut a, &format!("tcp:127.0.0.1:{port}"));
    b.wait_migration("active");
    b.quiet("stop");
    a.quiet("migrate_set_parameter max-bandwidth 1g");
    a.wait_migration("completed");
    b.wait_migration("completed");
    assert_eq!(b.command("info status"), "VM status: paused\n");
    b.quiet("cont");
    arrived(&mut [&mut a, &mut b]);
}

#[test]
fn a_command_that_never_ends_can_be_cancelled_and_quit() {
    if !require(&[Need::Kvm]) {
        return;
    }
    let mut a = source().start();
    a.wait_beacons(3);
    let endless = "migrate -d \"exec:cat > /dev/null; sleep 600\"";
    a.quiet(endless);
    a.wait_migration("device");
    a.quiet("migrate_cancel");
    a.wait_migration("cancelled");
    assert_eq!(a.command("info status"), "VM status: running\n");
    a.wait_beacons(3);
    a.quiet(endless);
    a.wait_migration("device");
    a.signal(rustix::process::Signal::TERM);
    assert!(a.wait_exit().success());
}

#[test]
fn an_incoming_command_that_failed_brought_nothing() {
    if !require(&[Need::Kvm]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("saved");
    let mut a = source().start();
    a.wait_beacons(3);
    migrate(&mut a, &format!("file:{}", file.display()));
    let uri = format!("exec:cat {}; exit 3", file.display());
    // It may end before its monitor is there.
    let (status, said) = match source().incoming(&uri).try_start() {
        Err(ended) => ended,
        Ok(mut b) => (b.wait_exit(), b.said()),
    };
    assert!(!status.success());
    assert!(said.contains("exited with status 3"), "{said}");
}
