//! One guest on eleven hosts, one after the other: QEMU 7.2, hmpsh, QEMU 10.0, hmpsh twice, and the
//! same way again. Its beacons count on without a gap, it finds no fault in its memory, and it
//! answers every byte that it is sent on the way.

mod common;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use common::beacon::{Beacons, wait_beacons};
use common::need::require;
use common::poll;
use common::vmm::Program::{Hmpsh, Qemu7, Qemu10};
use common::vmm::{Program, Setup, Vmm};

const ROUTE: [Program; 11] = [
    Qemu7, Hmpsh, Qemu10, Hmpsh, Hmpsh, Qemu7, Hmpsh, Qemu10, Hmpsh, Hmpsh, Qemu7,
];

/// A host whose COM1 is a socket: what the guest says goes on into a file.
struct Host {
    vmm: Vmm,
    line: UnixStream,
    log: PathBuf,
}

impl Host {
    /// Starts a host; the guest says nothing before its line is connected.
    fn start(program: Program, dir: &tempfile::TempDir, number: usize, args: &[&str]) -> Self {
        let socket = dir.path().join(format!("line{number}"));
        let log = dir.path().join(format!("log{number}"));
        let vmm = Setup::new(program)
            .vcpus(2)
            .irqchip("split")
            .default_chips()
            .append("window=2M")
            .serial(&format!("unix:{},server=on,wait=off", socket.display()))
            .args(args)
            .start();
        let line = UnixStream::connect(&socket).unwrap();
        let (mut from, mut to) = (
            line.try_clone().unwrap(),
            std::fs::File::create(&log).unwrap(),
        );
        std::thread::spawn(move || {
            let mut bytes = [0; 256];
            while let Ok(count @ 1..) = from.read(&mut bytes) {
                to.write_all(&bytes[..count]).unwrap();
            }
        });
        Self { vmm, line, log }
    }
}

/// The whole way so far.
struct Journey {
    hosts: Vec<Host>,
    sent: Vec<u8>,
}

impl Journey {
    fn logs(&self) -> Vec<&std::path::Path> {
        self.hosts.iter().map(|host| host.log.as_path()).collect()
    }

    fn here(&mut self) -> &mut Host {
        self.hosts.last_mut().expect("a host")
    }

    /// Sends the next byte to whoever runs the guest, that is, to the host `back` from the last,
    /// and waits for the answer.
    #[track_caller]
    fn ask(&mut self, back: usize) {
        let byte = b'0' + (self.sent.len() % 64) as u8;
        let at = self.hosts.len() - 1 - back;
        self.hosts[at].line.write_all(&[byte]).unwrap();
        self.sent.push(byte);
        let answered = poll(Duration::from_secs(10), || {
            (Beacons::check(&self.logs()).answers == self.sent).then_some(())
        });
        let answers = Beacons::check(&self.logs()).answers;
        assert!(
            answered.is_some(),
            "sent {:x?}, answered {answers:x?}",
            self.sent
        );
    }

    /// Moves the guest to the next host, talking to it all the while.
    fn hop(&mut self, to: Program, dir: &tempfile::TempDir) {
        let args = ["-incoming", "tcp:127.0.0.1:0"];
        let mut dest = Host::start(to, dir, self.hosts.len(), &args);
        let port = dest.vmm.port();
        self.hosts.push(dest);
        let from = self.hosts.len() - 2;
        let source = &mut self.hosts[from].vmm;
        // Slower than the guest writes, for as long as there is to talk.
        source.quiet("migrate_set_parameter max-bandwidth 1M");
        source.quiet(&format!("migrate -d tcp:127.0.0.1:{port}"));
        source.wait_migration("active");
        for _ in 0..3 {
            self.ask(1);
        }
        let source = &mut self.hosts[from].vmm;
        assert!(
            source
                .command("info migrate")
                .contains("Migration status: active")
        );
        source.quiet("migrate_set_parameter max-bandwidth 10G");
        source.wait_migration("completed");
        self.here().vmm.wait_status("running");
        self.ask(0);
        wait_beacons(&self.logs(), 10);
    }
}

#[test]
fn one_guest_makes_ten_hops() {
    if !ROUTE.iter().all(|program| require(program.needs())) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut first = Host::start(ROUTE[0], &dir, 0, &["-S"]);
    first.vmm.quiet("cont");
    let mut journey = Journey {
        hosts: vec![first],
        sent: Vec::new(),
    };
    wait_beacons(&journey.logs(), 5);
    for to in &ROUTE[1..] {
        journey.hop(*to, &dir);
    }
    assert_eq!(journey.sent.len(), 40);
}
