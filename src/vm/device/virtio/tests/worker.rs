//! Several requests at once, and requests that fail.

use super::*;
use crate::block::{Drive, Fault, Memory as Ram};
use crate::config::OnError;

/// An image whose reads wait for each other: so many must be under way at once.
struct Meeting {
    expected: usize,
    present: Mutex<usize>,
    changed: Condvar,
}

impl Backend for Meeting {
    fn sectors(&self) -> u64 {
        8
    }

    fn is_read_only(&self) -> bool {
        false
    }

    fn read(&self, _: u64, rooms: &mut Vec<In<'_>>) -> io::Result<()> {
        // Long enough to be worth another thread.
        std::thread::sleep(Duration::from_millis(2));
        let mut present = self.present.lock().unwrap();
        *present += 1;
        self.changed.notify_all();
        let limit = Duration::from_secs(10);
        let waited = self
            .changed
            .wait_timeout_while(present, limit, |present| *present < self.expected);
        assert!(!waited.unwrap().1.timed_out(), "nobody else came");
        rooms.iter_mut().for_each(In::zero);
        Ok(())
    }

    fn write(&self, _: u64, _: &mut Vec<Out<'_>>) -> io::Result<()> {
        Ok(())
    }

    fn zero(&self, _: u64, _: u64, _: bool) -> io::Result<()> {
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        std::thread::sleep(Duration::from_millis(2));
        Ok(())
    }
}

#[test]
fn slow_requests_are_executed_at_once() {
    let bench = bench(Meeting {
        expected: 4,
        present: Mutex::new(0),
        changed: Condvar::new(),
    });
    bench.set_up();
    bench.disk.set_running(true);
    // From here on it is known to be slow.
    bench.request(4, 0, 0, true);
    assert_eq!(bench.run(), 0);
    bench.request(0, 0, 512, true);
    (0..4).for_each(|_| bench.offer(0));
    bench.disk.write(0x50, 4, 0);
    bench.wait(5);
    assert_eq!(bench.read::<u8>(STATUS), 0);
    // A stop waits for what is under way.
    bench.offer(0);
    bench.disk.write(0x50, 4, 0);
    bench.disk.set_running(false);
    let state = bench.disk.state();
    assert_eq!(state.queue.last_avail, bench.read::<u16>(USED + 2));
}

#[test]
fn a_slow_request_keeps_none_waiting_that_comes_later() {
    for event in [0, EVENT_IDX] {
        let gate = Gate::default();
        gate.set(true);
        let bench = bench(gate.clone());
        bench.set_up();
        bench.disk.write(0x20, 4, (FLUSH | event) as u32);
        bench.disk.set_running(true);
        bench.request(4, 0, 0, true);
        // From here on it is known to be slow.
        assert_eq!(bench.run(), 0);
        gate.set(false);
        for under_way in 1..=4 {
            bench.offer_politely(event != 0);
            gate.has(under_way);
        }
        gate.set(true);
        bench.wait(5);
        bench.stop();
    }
}

/// A disk whose guest is stopped by what fails.
fn stopping(image: &Ram, on_error: [OnError; 2]) -> (Bench, mpsc::Receiver<Fault>) {
    let (told, faults) = mpsc::channel();
    let stop = Box::new(move |fault| told.send(fault).unwrap_or(()));
    let bench = stopping_bench(Interface::Legacy, Arc::new(image.clone()), on_error, stop);
    bench.set_up();
    bench.disk.set_running(true);
    (bench, faults)
}

#[test]
fn a_policy_says_what_becomes_of_errors() {
    use OnError::{Enospc, Ignore, Report, Stop};
    for (on_error, read, write) in [
        ([Report, Report], Ok(1), Ok(1)),
        ([Ignore, Ignore], Ok(0), Ok(0)),
        ([Report, Enospc], Ok(1), Err(Fault::NoSpace)),
        ([Enospc, Stop], Ok(1), Err(Fault::NoSpace)),
        ([Stop, Report], Err(Fault::Failed), Ok(1)),
    ] {
        // Reads end with EIO, writes with ENOSPC.
        let image = Ram::new(4096);
        image.fail_reads(0);
        image.fail_writes(0);
        for (kind, expected) in [(0, read), (1, write)] {
            let (bench, faults) = stopping(&image, on_error);
            bench.request(kind, 0, 512, kind == 0);
            match expected {
                Ok(status) => assert_eq!(bench.run(), status, "{on_error:?} {kind}"),
                Err(fault) => {
                    bench.offer(0);
                    bench.disk.write(0x50, 4, 0);
                    let limit = Duration::from_secs(10);
                    assert_eq!(faults.recv_timeout(limit), Ok(fault), "{on_error:?}");
                    assert_eq!(bench.read::<u16>(USED + 2), 0, "the guest knows nothing");
                }
            }
        }
    }
}

#[test]
fn a_drive_that_was_taken_out_stops_no_guest() {
    let drive = Arc::new(Drive::new("d0".to_owned(), Box::new(Ram::new(4096))));
    for on_error in [OnError::Stop, OnError::Ignore] {
        let image = Arc::clone(&drive) as Arc<dyn Backend>;
        let stop = Box::new(|_| panic!("the guest is stopped"));
        let bench = stopping_bench(Interface::Legacy, image, [on_error; 2], stop);
        bench.set_up();
        bench.disk.set_running(true);
        drive.delete();
        bench.request(4, 0, 0, true);
        assert_eq!(bench.run(), 1);
    }
}

#[test]
fn what_stopped_the_guest_is_executed_when_it_runs_again_here_or_elsewhere() {
    let image = Ram::new(4096);
    let (bench, faults) = stopping(&image, OnError::DEFAULT);
    bench.write([0x0707_0707_0707_0707u64; 32], DATA);
    bench.request(1, 1, 512, false);
    let write = || {
        image.fail_writes(0);
        bench.offer(0);
        bench.disk.write(0x50, 4, 0);
        faults.recv_timeout(Duration::from_secs(10)).unwrap();
        bench.disk.set_running(false);
    };
    write();
    // Again, and again in vain.
    bench.disk.set_running(true);
    faults.recv_timeout(Duration::from_secs(10)).unwrap();
    bench.disk.set_running(false);
    image.fail_writes(-1);
    bench.disk.set_running(true);
    bench.wait(1);
    assert_eq!(bench.read::<u8>(STATUS), 0);
    assert_eq!(image.bytes()[512..768], [7; 256]);

    // The request goes with the guest: as a picture of its parts, in QEMU's places.
    bench.write([0x0808_0808_0808_0808u64; 32], DATA);
    write();
    let state = bench.disk.state();
    let mut section = DiskSection(state);
    let bytes = save(&mut section).unwrap();
    let at = |at: usize| u64::from_le_bytes(bytes[104 + at..][..8].try_into().unwrap());
    assert_eq!(bytes[103], 1, "there is a request");
    assert_eq!(
        (at(0), at(8) as u32),
        (2 << 32, 1),
        "two parts to read, one to write"
    );
    assert_eq!((at(16), at(16 + 16384 + 8)), (STATUS, 1));
    assert_eq!((at(16 + 8192), at(16 + 32768 + 8)), (HEADER, 16));
    assert_eq!((at(24 + 8192), at(32 + 32768 + 8)), (DATA, 512));
    assert_eq!(bytes[104 + 49168], 0, "and no other");
    image.fail_writes(-1);
    let mut arrived = DiskSection(bench.disk.reset_state());
    load(&mut arrived, 2, &mut &bytes[..]).unwrap();
    assert_eq!(arrived.0.retries, section.0.retries);
    bench.disk.restore(arrived.0).unwrap();
    let further = save(&mut DiskSection(bench.disk.state()));
    assert!(further.unwrap() == bytes, "and further");
    bench.disk.set_running(true);
    bench.wait(2);
    assert_eq!(image.bytes()[512..768], [8; 256]);
    bench.disk.set_running(false);
    assert_eq!(bench.disk.state().retries, []);
}

#[test]
fn what_failed_is_saved_as_it_was_taken() {
    let image = Ram::new(4096);
    image.fail_writes(0);
    let (bench, faults) = stopping(&image, OnError::DEFAULT);
    bench.request(1, 1, 512, false);
    bench.offer(0);
    bench.disk.write(0x50, 4, 0);
    faults.recv_timeout(PATIENCE).unwrap();
    bench.disk.set_running(false);
    let state = bench.disk.state();
    // A table whose first descriptor is the next one too; no table.
    bench.descriptor(8, DATA, 1, 1, 0);
    for (table, len) in [(RING + 16 * 8, 1024), (0, 7)] {
        bench.descriptor(0, table, len, 4, 0);
        assert_eq!(bench.disk.state(), state);
    }
    assert_eq!(state.retries[0].readable, [(HEADER, 16), (DATA, 512)]);
    assert_eq!(state.retries[0].writable, [(STATUS, 1)]);
}

#[test]
fn a_reset_forgets_what_failed() {
    let image = Ram::new(4096);
    image.fail_writes(0);
    let (bench, faults) = stopping(&image, OnError::DEFAULT);
    bench.request(1, 1, 512, false);
    bench.offer(0);
    bench.disk.write(0x50, 4, 0);
    faults.recv_timeout(Duration::from_secs(10)).unwrap();
    bench.disk.set_running(false);
    bench.disk.write(0x70, 4, 0);
    assert_eq!(bench.disk.state().retries, []);
}
