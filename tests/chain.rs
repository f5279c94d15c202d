//! One guest on many hosts, one after the other: QEMU 7.2, hmpsh, QEMU 10.0, hmpsh twice, and the
//! same way again. Its beacons count on without a gap, it finds no fault in its memory, and it
//! answers every byte that it is sent on the way. The built-in guest makes ten hops; a kernel that
//! has x2APICs, TSC deadlines and an interrupt from the I/O APIC for every byte makes five.

mod common;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use common::beacon::{Beacons, wait_beacons};
use common::kernel::{Class, elf};
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
    fn start(setup: Setup, dir: &Path, number: usize) -> Self {
        let socket = dir.join(format!("line{number}"));
        let log = dir.join(format!("log{number}"));
        let vmm = setup
            .vcpus(2)
            .irqchip("split")
            .default_chips()
            .serial(&format!("unix:{},server=on,wait=off", socket.display()))
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
    fn logs(&self) -> Vec<&Path> {
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
    fn hop(&mut self, to: Setup, dir: &Path) {
        let to = to.incoming("tcp:127.0.0.1:0");
        let mut dest = Host::start(to, dir, self.hosts.len());
        let port = dest.vmm.port();
        self.hosts.push(dest);
        let from = self.hosts.len() - 2;
        let source = &mut self.hosts[from].vmm;
        // Slower than the guest writes, for as long as there is to talk.
        source.quiet("migrate_set_parameter max-bandwidth 20K");
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

/// Takes a guest that lives in machines of that kind along the route.
fn travel(route: &[Program], setup: impl Fn(Program) -> Setup) {
    if !route.iter().all(|program| require(program.needs())) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let mut first = Host::start(setup(route[0]).args(&["-S"]), dir, 0);
    first.vmm.quiet("cont");
    let mut journey = Journey {
        hosts: vec![first],
        sent: Vec::new(),
    };
    wait_beacons(&journey.logs(), 5);
    for to in &route[1..] {
        journey.hop(setup(*to), dir);
    }
    assert_eq!(journey.sent.len(), 4 * (route.len() - 1));
}

#[test]
fn the_built_in_guest_makes_ten_hops() {
    travel(&ROUTE, |program| Setup::new(program).append("window=2M"));
}

#[test]
fn a_kernel_makes_five_hops() {
    let dir = tempfile::tempdir().unwrap();
    let kernel = dir.path().join("kernel");
    std::fs::write(&kernel, elf(Class::Elf64)).unwrap();
    travel(&ROUTE[..6], |program| {
        Setup::new(program)
            .host_cpu()
            .kernel(&kernel)
            .append("x2apic deadline")
    });
}
