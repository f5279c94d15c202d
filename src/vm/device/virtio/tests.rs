//! The disk against what QEMU 7.2 shows and sends, and against guests that mean no good.

mod modern;
mod worker;

use std::io;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, mpsc};
use std::time::{Duration, Instant};

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::disk::Parts;
use super::queue::Queue;
use super::request::{Outcome, Scratch, Target};
use super::ring::{Broken, Chain, Ring};
use super::section::{DiskSection, State};
use super::*;
use crate::block::{Backend, Fault, SECTOR};
use crate::config::OnError;
use crate::iov::{In, Out};
use crate::vm::map::{Map, RAM};
use crate::vm::memory::{Backing, RamBlock};
use crate::vmstate::{describe, load, save};

/// An image in memory; the sector at `bad` can be neither read nor written.
struct Image {
    bytes: Mutex<Vec<u8>>,
    bad: Option<u64>,
    flushes: AtomicU32,
}

impl Image {
    fn new(sectors: usize) -> Self {
        Self {
            bytes: Mutex::new(vec![0; sectors * SECTOR as usize]),
            bad: None,
            flushes: AtomicU32::new(0),
        }
    }

    fn check(&self, offset: u64, len: usize) -> io::Result<()> {
        let end = offset + len as u64;
        match self.bad {
            Some(bad) if (offset..end).contains(&(bad * SECTOR)) => Err(io::Error::other("bad")),
            _ => Ok(()),
        }
    }
}

impl Backend for Image {
    fn sectors(&self) -> u64 {
        self.bytes.lock().unwrap().len() as u64 / SECTOR
    }

    fn is_read_only(&self) -> bool {
        false
    }

    fn read(&self, offset: u64, rooms: &mut Vec<In<'_>>) -> io::Result<()> {
        let bytes = self.bytes.lock().unwrap();
        let mut at = offset as usize;
        for room in rooms {
            self.check(at as u64, room.len())?;
            at += room.fill(&bytes[at..]);
        }
        Ok(())
    }

    fn write(&self, offset: u64, pieces: &mut Vec<Out<'_>>) -> io::Result<()> {
        let mut all = Vec::new();
        pieces.iter().for_each(|piece| piece.copy_to(&mut all));
        self.check(offset, all.len())?;
        let offset = offset as usize;
        self.bytes.lock().unwrap()[offset..offset + all.len()].copy_from_slice(&all);
        Ok(())
    }

    fn zero(&self, offset: u64, len: u64, _may_unmap: bool) -> io::Result<()> {
        self.check(offset, len as usize)?;
        self.bytes.lock().unwrap()[offset as usize..(offset + len) as usize].fill(0);
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        self.flushes.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
}

fn map() -> Arc<Map> {
    let block = |name, len| Arc::new(RamBlock::new(name, len, Backing::Anonymous).unwrap());
    let map = Map::new(block("microvm.ram", 2 << 20), block("pc.bios", 64 << 10)).unwrap();
    Arc::new(map)
}

/// An image whose requests stay under way until the gate is open, and a moment longer. Clones are
/// the same image.
#[derive(Clone, Default)]
struct Gate(Arc<(Mutex<Passage>, Condvar)>);

#[derive(Default)]
struct Passage {
    is_open: bool,
    under_way: usize,
}

impl Gate {
    fn set(&self, is_open: bool) {
        self.0.0.lock().unwrap().is_open = is_open;
        self.0.1.notify_all();
    }

    fn wait(&self, until: impl Fn(&Passage) -> bool) -> MutexGuard<'_, Passage> {
        let (passage, changed) = &*self.0;
        let waited =
            changed.wait_timeout_while(passage.lock().unwrap(), PATIENCE, |now| !until(now));
        let (passage, timeout) = waited.unwrap();
        assert!(!timeout.timed_out(), "the gate waits in vain");
        passage
    }

    /// Waits until so many requests are under way.
    fn has(&self, under_way: usize) {
        drop(self.wait(|now| now.under_way == under_way));
    }

    fn pass(&self) -> io::Result<()> {
        self.0.0.lock().unwrap().under_way += 1;
        self.0.1.notify_all();
        // Long enough to be worth another thread.
        std::thread::sleep(Duration::from_micros(300));
        self.wait(|now| now.is_open).under_way -= 1;
        Ok(())
    }
}

impl Backend for Gate {
    fn sectors(&self) -> u64 {
        8
    }

    fn is_read_only(&self) -> bool {
        false
    }

    fn read(&self, _: u64, rooms: &mut Vec<In<'_>>) -> io::Result<()> {
        rooms.iter_mut().for_each(In::zero);
        self.pass()
    }

    fn write(&self, _: u64, _: &mut Vec<Out<'_>>) -> io::Result<()> {
        self.pass()
    }

    fn zero(&self, _: u64, _: u64, _: bool) -> io::Result<()> {
        self.pass()
    }

    fn flush(&self) -> io::Result<()> {
        self.pass()
    }
}

/// Nothing here takes so long.
const PATIENCE: Duration = Duration::from_secs(10);

struct Bench {
    disk: Arc<Disk>,
    map: Arc<Map>,
    level: Arc<AtomicU32>,
}

fn bench(image: impl Backend + 'static) -> Bench {
    bench_with(Interface::Legacy, image)
}

fn bench_with(interface: Interface, image: impl Backend + 'static) -> Bench {
    let stop = Box::new(|_| ());
    stopping_bench(interface, Arc::new(image), OnError::DEFAULT, stop)
}

fn stopping_bench(
    interface: Interface,
    image: Arc<dyn Backend>,
    on_error: [OnError; 2],
    stop: Box<dyn Fn(Fault) + Send + Sync>,
) -> Bench {
    let map = map();
    let level = Arc::new(AtomicU32::new(0));
    let line = Arc::clone(&level);
    let disk = Disk::new(Parts {
        slot: 7,
        interface,
        serial: "four".to_owned(),
        image,
        map: Arc::clone(&map),
        irq: Box::new(move |high| line.store(u32::from(high), Ordering::SeqCst)),
        is_writeback: true,
        on_error,
        stop,
    });
    Bench {
        disk: disk.unwrap(),
        map,
        level,
    }
}

const RING: u64 = 0x10_0000;
const NUM: u64 = 16;
const USED: u64 = RING + 0x1000;
const HEADER: u64 = RING + 0x2000;
const DATA: u64 = RING + 0x3000;
const STATUS: u64 = RING + 0x4000;

impl Bench {
    fn write<T: vm_memory::ByteValued>(&self, value: T, at: u64) {
        let memory = self.map.memory();
        memory.write_obj(value, GuestAddress(at)).unwrap();
    }

    fn read<T: vm_memory::ByteValued>(&self, at: u64) -> T {
        self.map.memory().read_obj(GuestAddress(at)).unwrap()
    }

    fn descriptor(&self, index: u64, address: u64, len: u32, flags: u16, next: u16) {
        let rest = u64::from(len) | u64::from(flags) << 32 | u64::from(next) << 48;
        self.write([address, rest], RING + 16 * index);
    }

    /// Header, so many bytes of data (written by the device or read), status.
    fn request(&self, kind: u32, sector: u64, len: u32, is_answer: bool) {
        self.write(u64::from(kind), HEADER);
        self.write(sector, HEADER + 8);
        self.descriptor(0, HEADER, 16, 1, if len == 0 { 2 } else { 1 });
        self.descriptor(1, DATA, len, if is_answer { 3 } else { 1 }, 2);
        self.descriptor(2, STATUS, 1, 2, 0);
        self.write(0xffu8, STATUS);
    }

    fn offer(&self, head: u16) {
        let index: u16 = self.read(RING + 16 * NUM + 2);
        let place = u64::from(index) % NUM;
        self.write(head, RING + 16 * NUM + 4 + 2 * place);
        self.write(index.wrapping_add(1), RING + 16 * NUM + 2);
    }

    fn set_up(&self) {
        let write = |offset, value| self.disk.write(offset, 4, value);
        write(0x70, 3);
        write(0x28, 4096);
        write(0x20, (FLUSH | CONFIG_WCE) as u32);
        write(0x38, NUM as u32);
        write(0x3c, 4096);
        write(0x40, (RING >> 12) as u32);
        write(0x70, 7);
    }

    /// Executes the request at descriptor 0; its status.
    fn run(&self) -> u8 {
        let before: u16 = self.read(USED + 2);
        self.offer(0);
        self.disk.write(0x50, 4, 0);
        self.wait(before.wrapping_add(1));
        self.read(STATUS)
    }

    /// Offers the request at descriptor 0 as a driver does that kicks only when it is asked to.
    fn offer_politely(&self, has_event: bool) {
        self.offer(0);
        let new: u16 = self.read(RING + 16 * NUM + 2);
        let wants = match has_event {
            true => self.read::<u16>(USED + 4 + 8 * NUM) == new.wrapping_sub(1),
            false => self.read::<u16>(USED) & 1 == 0,
        };
        if wants {
            self.disk.write(0x50, 4, 0);
        }
    }

    /// Stops the guest. A disk that does not come to rest is left behind.
    fn stop(&self) {
        let (told, has_stopped) = mpsc::channel();
        let disk = Arc::clone(&self.disk);
        std::thread::spawn(move || {
            disk.set_running(false);
            told.send(())
        });
        let stopped = has_stopped.recv_timeout(PATIENCE);
        assert_eq!(stopped, Ok(()), "the disk does not come to rest");
    }

    fn wait(&self, used: u16) {
        let end = Instant::now() + PATIENCE;
        while self.read::<u16>(USED + 2) != used {
            assert!(Instant::now() < end, "the request was not executed");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

#[test]
fn registers_are_qemus() {
    let bench = bench(Image::new(2048));
    let slots = Slots::new(std::slice::from_ref(&bench.disk), Interface::Legacy);
    let word = |address| {
        let mut bytes = [0x55; 4];
        assert!(slots.read(address, &mut bytes));
        u32::from_le_bytes(bytes)
    };
    let words = |base: u64| (0..16).map(|n| word(base + 4 * n)).collect::<Vec<_>>();
    let mut expected = vec![0x7472_6976, 1, 0, 0x554d_4551];
    expected.resize(16, 0);
    assert_eq!(words(0xfeb0_0000), expected, "an empty slot");
    expected[2] = 2;
    expected[4] = 0x3100_6ed4;
    expected[13] = 0x400;
    assert_eq!(words(0xfeb0_0e00), expected);
    assert_eq!(word(0xfeb0_0eb0), !0);
    assert_eq!(
        words(0xfeb0_0f00),
        [
            0x800,
            0,
            0,
            0xfe,
            0x3f10_0002,
            0x200,
            0,
            0,
            0x0001_0001,
            0x3f_ffff,
            1,
            1,
            0x3f_ffff,
            1,
            !0,
            !0
        ]
    );
    let mut wide = [0; 8];
    assert!(slots.read(0xfeb0_0e00, &mut wide));
    assert_eq!(&wide, b"virt\x01\0\0\0");
    let mut narrow = [9; 2];
    assert!(slots.read(0xfeb0_0e00, &mut narrow));
    assert_eq!(narrow, [0; 2], "registers are four bytes wide");
    assert!(slots.read(0xfeb0_0f14, &mut narrow));
    assert_eq!(narrow, [0, 2], "the configuration is not");
    assert!(!slots.read(0xfeb0_1000, &mut wide) && !slots.read(0xfeaf_fffc, &mut wide));
    assert!(slots.write(0xfeb0_0ffd, &[0; 8]));
}

#[test]
fn requests_are_executed_and_marked() {
    let image = Image::new(8);
    image.bytes.lock().unwrap()[1024..1536].fill(3);
    let bench = bench(image);
    bench.set_up();
    bench.disk.set_running(true);
    bench.map.written()[RAM].drain(|_, _| ());
    bench.request(0, 2, 512, true);
    assert_eq!(bench.run(), 0);
    assert_eq!(bench.read::<[u8; 4]>(DATA + 508), [3; 4]);
    let mut pages = Vec::new();
    bench.map.written()[RAM].drain(|word, bits| pages.push((word, bits)));
    // Available ring (the test's), used ring, header of no request, data, status.
    assert_eq!(pages, [(4, 0b11011 | 0b100)]);
    assert_eq!(bench.read::<[u32; 2]>(USED + 4), [0, 513]);
    assert_eq!(bench.level.load(Ordering::SeqCst), 1);
    assert_eq!(bench.disk.read(0x60, 4), 1);
    bench.disk.write(0x64, 4, 1);
    assert_eq!(bench.level.load(Ordering::SeqCst), 0);

    bench.write([7u8; 8], DATA);
    bench.request(1, 0, 512, false);
    assert_eq!(bench.run(), 0);
    bench.request(0, 7, 1024, true);
    assert_eq!(bench.run(), 1, "beyond the end");
    bench.request(0, u64::MAX, 512, true);
    assert_eq!(bench.run(), 1);
    bench.request(0, 0, 100, true);
    assert_eq!(bench.run(), 1, "no whole sector");
    bench.request(4, 0, 0, true);
    assert_eq!(bench.run(), 0);
    bench.request(99, 0, 0, true);
    assert_eq!(bench.run(), 2);
    bench.request(8, 0, 20, true);
    assert_eq!(bench.run(), 0);
    assert_eq!(&bench.read::<[u8; 5]>(DATA), b"four\0");
    // Sector 0, one sector, no flags: discarded (it stays), made zero.
    bench.write([0u64, 1], DATA);
    bench.request(11, 0, 16, false);
    assert_eq!(bench.run(), 0);
    bench.request(13, 0, 15, false);
    bench.offer(0);
    bench.disk.write(0x50, 4, 0);
    while !bench.disk.state().is_broken {
        std::thread::sleep(Duration::from_millis(1));
    }
    bench.disk.write(0x70, 4, 0);
    assert!(!bench.disk.state().is_broken);
}

#[test]
fn zeroes_are_written_and_the_rest_is_refused() {
    let image = Image::new(8);
    image.bytes.lock().unwrap().fill(3);
    let bench = bench(image);
    bench.set_up();
    bench.disk.set_running(true);
    bench.write([1u64, 1 | 1 << 32], DATA);
    bench.request(13, 0, 16, false);
    assert_eq!(bench.run(), 0);
    bench.write([0u64, 2], DATA + 0x100);
    bench.request(0, 0, 1536, true);
    assert_eq!(bench.run(), 0);
    let at = |sector: u64| bench.read::<u8>(DATA + sector * 512);
    assert_eq!((at(0), at(1), at(2)), (3, 0, 3));
    for (run, status) in [
        ([0u64, 9], 1),
        ([8, 1], 1),
        ([0, 0x40_0000], 1),
        ([0, 1 | 2 << 32], 2),
    ] {
        bench.write(run, DATA);
        bench.request(13, 0, 16, false);
        assert_eq!(bench.run(), status, "{run:x?}");
    }
    bench.request(13, 0, 32, false);
    assert_eq!(bench.run(), 2);
    // The direction is part of the type.
    bench.request(12, 0, 16, false);
    assert_eq!(bench.run(), 2);
}

#[test]
fn errors_of_the_host_are_the_guests() {
    let bench = bench(Image {
        bad: Some(3),
        ..Image::new(8)
    });
    bench.set_up();
    bench.disk.set_running(true);
    for (kind, is_answer) in [(0, true), (1, false)] {
        bench.request(kind, 3, 512, is_answer);
        assert_eq!(bench.run(), 1);
        bench.request(kind, 4, 512, is_answer);
        assert_eq!(bench.run(), 0);
    }
}

#[test]
fn a_stopped_guests_requests_wait_and_need_no_kick() {
    let bench = bench(Image::new(8));
    bench.set_up();
    bench.request(4, 0, 0, true);
    bench.offer(0);
    bench.disk.write(0x50, 4, 0);
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(bench.read::<u16>(USED + 2), 0);
    bench.disk.set_running(true);
    bench.wait(1);
    bench.disk.set_running(false);
    bench.offer(0);
    let state = bench.disk.state();
    assert_eq!(state.queue.last_avail, 1);
    assert_eq!(state.isr, 1);

    // Elsewhere it goes on.
    bench.disk.write(0x70, 4, 0);
    assert_eq!(bench.level.load(Ordering::SeqCst), 0);
    bench.disk.check(&state).unwrap();
    bench.disk.restore(state).unwrap();
    assert_eq!(bench.level.load(Ordering::SeqCst), 1, "the line follows");
    bench.disk.set_running(true);
    bench.wait(2);
}

/// The section of a disk of QEMU 7.2 at reset, from a stream.
const AT_RESET: &str = "\
    0000000000000000000000000000000000000000000000390000000000000000000000000000000000000000\
    0000000000000000000000000000000000000000000000000000000000000000000000000000000001000001\
    00000010000000000000000000000000051576697274696f2f36346269745f66656174757265730000000100\
    00000000000000";

#[test]
fn the_section_is_qemus() {
    let mut section = DiskSection(State::at_reset(Interface::Legacy, OFFERED));
    let bytes = save(&mut section).unwrap();
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(hex, AT_RESET);
    assert_eq!(bytes.len(), 139);
    let described = describe(&mut section).unwrap();
    let size = described["fields"][0]["size"].as_u64();
    assert_eq!(size, Some(139));

    section.0.queue = Queue {
        num: 16,
        desc: 0x1000,
        last_avail: 0x1234,
        ..section.0.queue
    };
    section.0.registers.features = 0x3000_6e54;
    section.0.registers.status = 7;
    section.0.is_started = true;
    section.0.is_broken = true;
    section.0.isr = 1;
    let bytes = save(&mut section).unwrap();
    // A ring of another size: 4096 bytes more, and three heads of subsections.
    assert_eq!(
        bytes.len(),
        139 + (6 + 15 + 4096) + (6 + 13 + 1) + (6 + 14 + 1) + 3 - 3
    );
    let mut again = DiskSection(State::at_reset(Interface::Legacy, OFFERED));
    load(&mut again, 2, &mut &bytes[..]).unwrap();
    assert_eq!(again, section);
}

#[test]
fn sections_that_can_not_be_are_refused() {
    let refused = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = save(&mut DiskSection(State::at_reset(
            Interface::Legacy,
            OFFERED,
        )))
        .unwrap();
        change(&mut bytes);
        let mut section = DiskSection(State::at_reset(Interface::Legacy, OFFERED));
        load(&mut section, 2, &mut &bytes[..])
            .unwrap_err()
            .to_string()
    };
    assert_eq!(
        refused(&|bytes| bytes[134] = 1),
        "virtio-blk.virtio: Features 0x100000000 unsupported: VIRTIO_F_VERSION_1 (bit 32). \
         Allowed features: 0x31006ed4"
    );
    assert!(
        refused(&|bytes| bytes[138] = 0x21).contains(
            "Features 0x21 unsupported: bit 0, VIRTIO_BLK_F_RO (bit 5). Allowed features"
        )
    );
    assert!(refused(&|bytes| bytes[84] = 2).contains("field 'queues' is 0x2"));
    assert!(refused(&|bytes| bytes[87] = 8).contains("field 'vring.num' is 0x800"));
    assert!(refused(&|bytes| bytes[102] = 8).contains("VQ 0 address 0x0 inconsistent"));
    let packed = |bytes: &mut Vec<u8>| {
        bytes.extend(b"\x05\x18virtio/packed_virtqueues\0\0\0\x01");
    };
    assert!(refused(&packed).contains("packed=on: not built in this version"));
}

#[test]
fn requests_under_way_are_taken_up_again() {
    let bench = bench(Image::new(8));
    bench.set_up();
    bench.request(8, 0, 20, true);
    bench.offer(0);
    let mut state = bench.disk.state();
    state.queue.last_avail = 1;
    let mut bytes = save(&mut DiskSection(state)).unwrap();
    // One element, of which only the index means something here, before the end of the list.
    let end = 103;
    assert_eq!(bytes[end], 0);
    bytes.splice(end..end, [&[1][..], &[0; 49168]].concat());
    let mut section = DiskSection(bench.disk.reset_state());
    load(&mut section, 2, &mut &bytes[..]).unwrap();
    bench.disk.restore(section.0).unwrap();
    bench.disk.set_running(true);
    bench.wait(1);
    assert_eq!(&bench.read::<[u8; 4]>(DATA), b"four");

    // No such descriptor; more parts than there is place for.
    for (at, value) in [(1, 16), (6, 5), (10, 5), (4, 0xff)] {
        let mut bytes = bytes.clone();
        bytes[end + at] = value;
        let mut section = DiskSection(bench.disk.reset_state());
        let error = load(&mut section, 2, &mut &bytes[..]).unwrap_err();
        let text = "request 0 under way is none that this ring could have";
        assert!(error.to_string().ends_with(text), "{error}");
    }
}

#[test]
fn a_ring_that_contradicts_the_section_is_broken_or_refused() {
    let bench = bench(Image::new(8));
    bench.set_up();
    let mut state = bench.disk.state();
    // The guest uses that memory for something else.
    state.queue.last_avail = 5;
    bench.disk.check(&state).unwrap();
    bench.disk.restore(state.clone()).unwrap();
    assert!(bench.disk.state().is_broken);
    assert_eq!(bench.level.load(Ordering::SeqCst), 0);
    bench.disk.write(0x70, 4, 0);
    bench.set_up();
    bench.disk.set_running(true);
    bench.request(4, 0, 0, true);
    assert_eq!(bench.run(), 0, "a reset heals it");
    bench.disk.set_running(false);

    bench.write(0u16, USED + 2);
    bench.write(20u16, RING + 16 * NUM + 2);
    state.queue.last_avail = 18;
    assert_eq!(
        bench.disk.restore(state.clone()).unwrap_err(),
        "VQ 0 size 0x10 < last_avail_idx 0x12 - used_idx 0x0"
    );
    state.is_broken = true;
    bench.disk.check(&state).unwrap();
}

#[test]
fn a_cache_that_is_switched_off_is_flushed_by_every_write() {
    let image = Arc::new(Image::new(8));
    struct Shared(Arc<Image>);
    impl Backend for Shared {
        fn sectors(&self) -> u64 {
            self.0.sectors()
        }
        fn is_read_only(&self) -> bool {
            false
        }
        fn read(&self, offset: u64, rooms: &mut Vec<In<'_>>) -> io::Result<()> {
            self.0.read(offset, rooms)
        }
        fn write(&self, offset: u64, pieces: &mut Vec<Out<'_>>) -> io::Result<()> {
            self.0.write(offset, pieces)
        }
        fn zero(&self, offset: u64, len: u64, may_unmap: bool) -> io::Result<()> {
            self.0.zero(offset, len, may_unmap)
        }
        fn flush(&self) -> io::Result<()> {
            self.0.flush()
        }
    }
    let bench = bench(Shared(Arc::clone(&image)));
    bench.set_up();
    bench.disk.set_running(true);
    let flushes = || {
        bench.request(1, 0, 512, false);
        assert_eq!(bench.run(), 0);
        image.flushes.swap(0, Ordering::SeqCst)
    };
    assert_eq!(bench.disk.read(0x120, 1), 1);
    assert_eq!(flushes(), 0);
    bench.disk.write(0x120, 1, 0);
    assert_eq!(flushes(), 1);
    bench.disk.set_running(false);
    let state = bench.disk.state();
    bench.disk.restore(state).unwrap();
    bench.disk.set_running(true);
    assert_eq!(flushes(), 1, "it stays off where the guest goes");
    bench.disk.write(0x120, 1, 1);
    assert_eq!(flushes(), 0);
}

/// A ring of 8 entries that agrees on those features; its available ring is at 0x1080, its used ring
/// at 0x2000.
fn small_ring(memory: &Memory, features: u64) -> Ring {
    let mut ring = Ring::new(Queue::new(8, Interface::Legacy));
    ring.set_features(features);
    ring.set_address(0x1000);
    ring.check(memory).unwrap();
    ring
}

#[test]
fn an_index_that_comes_round_to_what_was_signalled_is_signalled_again() {
    let map = map();
    let memory = map.memory();
    let mut ring = small_ring(memory, NOTIFY_ON_EMPTY | EVENT_IDX);
    // A request at descriptor 0, and everything the available ring names is that.
    let mut chain = Chain::default();
    let descriptor = [0x9000u64, 16];
    memory.write_obj(descriptor, GuestAddress(0x1000)).unwrap();
    let put = |value: u16, at| memory.write_obj(value, GuestAddress(at)).unwrap();
    let mut serve = |offered: u16, event: u16| {
        put(offered, 0x1082);
        put(event, 0x1084 + 16);
        assert!(ring.pop(memory, &mut chain).unwrap());
        ring.push(memory, 0, 0).unwrap();
        ring.wants_interrupt(memory).unwrap()
    };
    assert!(serve(2, 0), "nothing was signalled before");
    assert!(!serve(3, 0), "the guest has seen that");
    for index in 3..=u16::MAX {
        assert!(serve(index, 0), "the ring is empty");
    }
    assert!(serve(0, 0) && serve(1, 0));
    assert!(serve(3, 1), "the next one it has not seen");
}

/// Takes and executes requests until there are none, as the worker does.
fn serve(ring: &mut Ring, memory: &Memory, image: &Image) -> std::result::Result<u32, Broken> {
    let (mut chain, mut scratch, mut count) = (Chain::default(), Scratch::default(), 0);
    let target = Target {
        image,
        serial: "",
        has_cache: false,
        on_error: [OnError::Report; 2],
    };
    while ring.pop(memory, &mut chain)? {
        if let Outcome::Answered(len) = scratch.execute(&mut chain, &target)? {
            ring.push(memory, chain.element.head, len)?;
        }
        ring.wants_interrupt(memory)?;
        count += 1;
    }
    ring.want_kicks(memory)?;
    Ok(count)
}

/// Address, length, flags, next.
type Raw = (u64, u32, u16, u16);

/// A ring at the beginning of memory whose first request has those descriptors.
fn broken_by(descriptors: &[Raw]) -> String {
    let map = map();
    let memory = map.memory();
    let mut ring = small_ring(memory, 0);
    for (index, (address, len, flags, next)) in descriptors.iter().enumerate() {
        let rest = u64::from(*len) | u64::from(*flags) << 32 | u64::from(*next) << 48;
        let at = GuestAddress(0x1000 + 16 * index as u64);
        memory.write_obj([*address, rest], at).unwrap();
    }
    memory.write_obj(1u16, GuestAddress(0x1082)).unwrap();
    let Broken(why) = serve(&mut ring, memory, &Image::new(1)).unwrap_err();
    why
}

#[test]
fn chains_that_can_not_be_break_the_device() {
    let cases: [(&[Raw], &str); 11] = [
        (&[(0x9000, 16, 1, 0)], "Looped descriptor"),
        (&[(0x9000, 16, 1, 8)], "Desc next is 8"),
        (
            &[(0x9000, 0, 0, 0)],
            "virtio: zero sized buffers are not allowed",
        ),
        (
            &[(0x9000, 1, 3, 1), (0x9000, 16, 0, 0)],
            "Incorrect order for descriptors",
        ),
        (
            &[(0xfeb0_0000, 16, 0, 0)],
            "virtio: bogus descriptor or out of resources",
        ),
        (
            &[(0x1f_fff8, 16, 0, 0)],
            "virtio: bogus descriptor or out of resources",
        ),
        (
            &[(u64::MAX - 3, 16, 0, 0)],
            "virtio: bogus descriptor or out of resources",
        ),
        (
            &[(0x9000, 17, 4, 0)],
            "Invalid size for indirect buffer table",
        ),
        (
            &[(0x9000, 0, 4, 0)],
            "Invalid size for indirect buffer table",
        ),
        (&[(0x9000, 16, 0, 0)], "virtio-blk missing headers"),
        (
            &[(0x9000, 15, 1, 1), (0x9000, 1, 2, 0)],
            "virtio-blk request outhdr too short",
        ),
    ];
    for (descriptors, why) in cases {
        assert_eq!(broken_by(descriptors), why, "{descriptors:x?}");
    }
}

#[test]
fn a_ring_outside_ram_breaks_the_device() {
    let map = map();
    let mut ring = Ring::new(Queue::new(256, Interface::Legacy));
    for address in [0x1f_f000, 0xfeb0_0000, u64::MAX - 0xfff] {
        ring.set_address(address);
        assert!(ring.check(map.memory()).is_err());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// Whatever stands in the ring, there is an end, no panic, and no write outside RAM.
    #[test]
    fn any_ring_is_survived(
        num in 1u32..20,
        align in prop_oneof![Just(4096u32), Just(1), any::<u32>()],
        desc in prop_oneof![Just(0x1000u64), Just(0x1f_fe00), any::<u64>()],
        features in any::<u32>(),
        table in prop::collection::vec(
            (prop_oneof![0x1000u64..0x4000, any::<u64>()],
             prop_oneof![1u32..1024, any::<u32>()], 0u16..8, 0u16..24),
            24,
        ),
        words in prop::collection::vec(any::<u16>(), 64),
        index in 0u16..24,
    ) {
        let map = map();
        let memory = map.memory();
        let mut ring = Ring::new(Queue::new(num, Interface::Legacy));
        ring.set_features(features.into());
        ring.set_align(align);
        ring.set_address(desc);
        let is_good = ring.check(memory).is_ok();
        for (n, (address, len, flags, next)) in table.iter().enumerate() {
            let rest = u64::from(*len) | u64::from(*flags) << 32 | u64::from(*next) << 48;
            let at = desc.wrapping_add(16 * n as u64);
            let _ = memory.write_obj([*address, rest], GuestAddress(at));
        }
        let avail = desc.wrapping_add(16 * u64::from(num));
        for (n, word) in words.iter().enumerate() {
            let at = avail.wrapping_add(4 + 2 * n as u64);
            let _ = memory.write_obj(word % 24, GuestAddress(at));
        }
        let _ = memory.write_obj(index, GuestAddress(avail.wrapping_add(2)));
        if is_good && ring.is_set() {
            let _ = serve(&mut ring, memory, &Image::new(4));
        }
    }

    /// Any bytes for a section are refused or taken, and what is taken comes back.
    #[test]
    fn any_section_is_answered(change in prop::collection::vec((0usize..139, any::<u8>()), 0..6)) {
        let mut bytes = save(&mut DiskSection(State::at_reset(Interface::Legacy, OFFERED))).unwrap();
        for (at, value) in change {
            bytes[at] = value;
        }
        let mut section = DiskSection(State::at_reset(Interface::Legacy, OFFERED));
        if load(&mut section, 2, &mut &bytes[..]).is_ok() {
            let mut again = DiskSection(State::at_reset(Interface::Legacy, OFFERED));
            let saved = save(&mut section).unwrap();
            load(&mut again, 2, &mut &saved[..]).unwrap();
            prop_assert_eq!(again, section);
        }
    }
}
