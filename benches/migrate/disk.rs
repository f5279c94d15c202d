//! A disk that goes along: `migrate -b` of an image that nobody writes to, and what a plain copy of it
//! through a socket takes.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Instant;

use tempfile::NamedTempFile;

use super::common::vmm::{Program, Setup, Vmm};
use super::{CHUNK, Sample, fill, move_over, name};

/// An image of that length, in MiB a whole number, in the host's cache.
pub(super) fn image(bytes: u64) -> NamedTempFile {
    let image = NamedTempFile::new().expect("an image");
    let mut chunk = vec![0; CHUNK];
    for at in (0..bytes).step_by(CHUNK) {
        fill(at, &mut chunk);
        image.as_file().write_all_at(&chunk, at).expect("room");
    }
    image
}

/// Images of both sides, in the host's cache.
pub(super) struct Images {
    from: NamedTempFile,
    to: NamedTempFile,
    bytes: u64,
}

impl Images {
    /// Images of that length, in MiB a whole number.
    pub(super) fn new(bytes: u64) -> Self {
        Self {
            from: image(bytes),
            to: image(bytes),
            bytes,
        }
    }

    fn wipe(&self) {
        let zeros = vec![0; CHUNK];
        for at in (0..self.bytes).step_by(CHUNK) {
            self.to.as_file().write_all_at(&zeros, at).expect("room");
        }
    }

    fn compare(&self, who: &str) {
        let (mut one, mut other) = (vec![0; CHUNK], vec![0; CHUNK]);
        for at in (0..self.bytes).step_by(CHUNK) {
            self.from.as_file().read_exact_at(&mut one, at).expect("it");
            self.to.as_file().read_exact_at(&mut other, at).expect("it");
            assert!(one == other, "{who}: the images differ at {at:#x}");
        }
    }

    /// With a machine of that program at each end.
    pub(super) fn move_over(&self, program: Program) -> Sample {
        self.wipe();
        let setup = |image: &Path| {
            let image = image.display();
            let drive = format!("if=none,id=d0,format=raw,file={image}");
            let device = "virtio-blk-device,drive=d0";
            let args = ["-S", "-drive", &drive, "-device", device];
            Setup::new(program).memory_mib(64).args(&args)
        };
        let mut source = setup(self.from.path()).start();
        source.quiet("migrate_set_parameter max-bandwidth 100g");
        // Or else a QEMU may end in the middle of the disk.
        source.quiet("migrate_set_parameter downtime-limit 0");
        source.quiet("migrate_set_capability block on");
        let mut dest: Vmm = setup(self.to.path()).incoming("tcp:127.0.0.1:0").start();
        let sample = move_over(&mut source, &mut dest);
        self.compare(name(program));
        sample
    }

    /// Read, sent, received, written, a chunk at a time.
    pub(super) fn copy(&self) -> Sample {
        self.wipe();
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener.local_addr().expect("a port").port();
        let start = Instant::now();
        std::thread::scope(|threads| {
            threads.spawn(|| {
                let (mut wire, _) = listener.accept().expect("the sender");
                let mut chunk = vec![0; CHUNK];
                let mut at = 0;
                loop {
                    let n = wire.read(&mut chunk).expect("bytes");
                    if n == 0 {
                        return;
                    }
                    let to = self.to.as_file();
                    to.write_all_at(&chunk[..n], at).expect("room");
                    at += n as u64;
                }
            });
            let mut wire = TcpStream::connect(("127.0.0.1", port)).expect("the receiver");
            let mut chunk = vec![0; CHUNK];
            for at in (0..self.bytes).step_by(CHUNK) {
                let from = self.from.as_file();
                from.read_exact_at(&mut chunk, at).expect("the image");
                wire.write_all(&chunk).expect("the receiver");
            }
        });
        let sample = Sample::of(start.elapsed());
        self.compare("copy");
        sample
    }
}
