//! What a guest gets from its disk: the built-in guest reads or writes an image in the host's cache,
//! one request after the other, as fast as they are answered.

use std::time::{Duration, Instant};

use tempfile::NamedTempFile;

use super::Sample;
use super::common::disk::{drive, on_drive};
use super::common::vmm::{Program, Setup, Vmm};

/// One way of using a disk.
pub(super) struct Io {
    /// `disk=` of the guest.
    work: &'static str,
    /// `request=` of the guest.
    request: &'static str,
    /// What monitors call its bytes.
    counter: &'static str,
}

/// All that are measured, eight requests under way in each.
pub(super) const WAYS: [Io; 6] = [
    Io::reads("512K"),
    Io::writes("512K"),
    Io::reads("64K"),
    Io::writes("64K"),
    Io::reads("4K"),
    Io::writes("4K"),
];

impl Io {
    const fn reads(request: &'static str) -> Self {
        Self {
            work: "read",
            request,
            counter: "rd_bytes",
        }
    }

    const fn writes(request: &'static str) -> Self {
        Self {
            work: "write",
            request,
            counter: "wr_bytes",
        }
    }

    /// For a headline.
    pub(super) fn name(&self) -> String {
        format!("{}s of {}", self.work, self.request)
    }

    /// What a gigabyte takes.
    pub(super) fn run(&self, program: Program, image: &NamedTempFile) -> Sample {
        let Self { work, request, .. } = self;
        // As little else to do as the guest can have.
        let append = format!("window=4K rate=100 disk={work} request={request} depth=8");
        let setup = Setup::new(program).append(&append);
        let drive = drive("d0", image.path(), ",cache=writeback");
        let mut vm = on_drive(setup, &drive).start();
        vm.wait_beacons(3);
        let before = self.so_far(&mut vm);
        std::thread::sleep(LONG);
        let after = self.so_far(&mut vm);
        vm.wait_beacons(1);
        let gigabytes = (after.0 - before.0) as f64 / 1e9;
        Sample {
            time: after.1.duration_since(before.1).div_f64(gigabytes),
            processor: (after.2 - before.2).div_f64(gigabytes),
        }
    }

    /// Bytes, when that was, processor time.
    fn so_far(&self, vm: &mut Vmm) -> (u64, Instant, Duration) {
        (vm.blockstats(self.counter), Instant::now(), vm.cpu_time())
    }
}

/// How long a guest is watched.
const LONG: Duration = Duration::from_millis(500);
