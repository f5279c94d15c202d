//! How fast the bare engine is: `cargo test --release engine_speed -- --ignored --nocapture`.

use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::time::{ClockId, clock_gettime};

use super::*;
use crate::iov::{self, In, Out};
use crate::migration::channel::Fault;
use crate::migration::clock::HostClock;
use crate::migration::memory_channel::Link;
use crate::vm::memory::PAGE_SIZE;

/// As little as a socket can be wrapped in.
struct Socket(TcpStream);

impl Socket {
    fn wait(&self, events: PollFlags, patience: Duration) -> Result<(), Fault> {
        let timeout = Timespec::try_from(patience).unwrap();
        match poll(&mut [PollFd::new(&self.0, events)], Some(&timeout)) {
            Ok(0) => Err(Fault::TimedOut),
            Ok(_) => Ok(()),
            Err(error) => Err(fault(error.into())),
        }
    }
}

fn fault(source: std::io::Error) -> Fault {
    Fault::Io {
        what: "socket".to_owned(),
        source,
    }
}

impl Channel for Socket {
    fn write(&mut self, pieces: &[Out<'_>], patience: Duration) -> Result<usize, Fault> {
        self.wait(PollFlags::OUT, patience)?;
        iov::write(self.0.as_fd(), pieces).map_err(fault)
    }

    fn read(&mut self, rooms: &mut [In<'_>], patience: Duration) -> Result<usize, Fault> {
        self.wait(PollFlags::IN, patience)?;
        iov::read(self.0.as_fd(), rooms).map_err(fault)
    }

    fn is_duplex(&self) -> bool {
        true
    }

    fn commit(&mut self) -> Result<(), Fault> {
        Ok(())
    }

    fn abandon(&mut self) {
        let _ = self.0.shutdown(std::net::Shutdown::Both);
    }

    fn drain(&mut self, _patience: Duration) -> bool {
        true
    }
}

/// Processor seconds this thread has used.
fn processor_time() -> f64 {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

/// Moves a paused guest over a real loopback connection; returns the seconds it took, and the
/// processor seconds at the source and at the destination.
fn race(source: &FakeGuest, dest: &FakeGuest) -> [f64; 3] {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let there = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (here, _) = listener.accept().unwrap();
    let link = Link::new(Faults::default());
    let limits = || Setting::new(Kind::Hmpsh).limits;
    let begin = Instant::now();
    let (sending, receiving) = std::thread::scope(|scope| {
        let receiver = scope.spawn(|| {
            let (board, clock) = (Board::default(), HostClock::new());
            let order = Incoming {
                guest: dest,
                board: &board,
                clock: &clock,
                autostart: &Mutex::new(true),
                point: &PointOfNoReturn::new(),
                uuid: None,
            };
            order.run(Box::new(Socket(here))).unwrap();
            processor_time()
        });
        let before = processor_time();
        let (board, clock) = (Board::default(), HostClock::new());
        let outgoing = Outgoing {
            guest: source,
            limits: &limits,
            return_path: true,
            board: &board,
            clock: &clock,
            started: Duration::ZERO,
            cancel: &link.cancel,
            point: &link.point,
        };
        outgoing.run(Box::new(Socket(there))).unwrap();
        (processor_time() - before, receiver.join().unwrap())
    });
    [begin.elapsed().as_secs_f64(), sending, receiving]
}

/// The bare limit: header and page gathered, header and page scattered, nothing else.
fn bare(source: &FakeGuest, dest: &FakeGuest) -> [f64; 3] {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let there = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (here, _) = listener.accept().unwrap();
    let (from, to) = (&source.ram()[0], &dest.ram()[0]);
    let length = from.pages() * (PAGE_SIZE + 8);
    let begin = Instant::now();
    let (sending, receiving) = std::thread::scope(|scope| {
        let receiver = scope.spawn(|| {
            let mut headers = vec![0u8; 8 * BATCH];
            let mut done = 0;
            while done < length {
                let (page, inside) = (done / (PAGE_SIZE + 8), done % (PAGE_SIZE + 8));
                let mut rooms = Vec::with_capacity(2 * BATCH);
                let mut skip = inside;
                for (index, header) in headers.chunks_exact_mut(8).enumerate() {
                    if page + index >= to.pages() {
                        break;
                    }
                    if skip < 8 {
                        rooms.push(In::from(&mut header[skip..]));
                        skip = 8;
                    }
                    rooms.push(to.page(page + index).room().skip(skip - 8));
                    skip = 0;
                }
                done += iov::read(here.as_fd(), &mut rooms).unwrap();
            }
            processor_time()
        });
        let before = processor_time();
        let header = [0u8; 8];
        for first in (0..from.pages()).step_by(BATCH) {
            let pages = first..(first + BATCH).min(from.pages());
            let pieces: Vec<_> = pages
                .flat_map(|page| [Out::from(&header[..]), from.page(page).out()])
                .collect();
            let mut skip = 0;
            let mut rest = &pieces[..];
            while !rest.is_empty() {
                let mut now = rest.to_vec();
                now[0] = now[0].skip(skip);
                let mut n = iov::write(there.as_fd(), &now).unwrap() + skip;
                while !rest.is_empty() && n >= rest[0].len() {
                    n -= rest[0].len();
                    rest = &rest[1..];
                }
                skip = n;
            }
        }
        (processor_time() - before, receiver.join().unwrap())
    });
    [begin.elapsed().as_secs_f64(), sending, receiving]
}

/// Pages per system call of [`bare`].
const BATCH: usize = 256;

#[test]
#[ignore = "a measurement, and it wants 3 GiB"]
fn engine_speed() {
    let pages = 256 << 10;
    let owners = Arc::default();
    let source = FakeGuest::new(&owners, &[pages], 1);
    for round in 0..6 {
        for page in 0..pages {
            source.store((0, page, (page % 255) as u8 + 1));
        }
        let dest = FakeGuest::new(&owners, &[pages], 1);
        let size = (pages * PAGE_SIZE) as f64 / 1e9;
        let fresh = race(&source, &dest).map(|seconds| size / seconds);
        // The same again into memory that has been touched and is zero.
        for page in 0..pages {
            dest.store((0, page, 0));
            source.store((0, page, (page % 255) as u8 + 1));
        }
        let warm = race(&source, &dest).map(|seconds| size / seconds);
        let limit = bare(&source, &dest).map(|seconds| size / seconds);
        assert_eq!(
            source.ram()[0].page(pages - 1).hash(0),
            dest.ram()[0].page(pages - 1).hash(0)
        );
        println!(
            "round {round}: GB/s and per processor second: fresh {fresh:.2?} warm {warm:.2?} bare {limit:.2?}"
        );
    }
    let untouched = FakeGuest::new(&owners, &[2 << 20], 1);
    let dest = FakeGuest::new(&owners, &[2 << 20], 1);
    println!("8 GiB untouched: {:.3?} s", race(&untouched, &dest));
}
