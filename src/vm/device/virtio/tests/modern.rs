//! The present interface: what QEMU 7.2 and 10.0 show and send with `force-legacy=off`.

mod section;

use super::super::status;
use super::*;
use crate::block::{Drive, Memory as Ram};

const MODERN: Interface = Interface::Modern;
/// Descriptors where the bench's requests are; the rings elsewhere, and not in their usual order.
const AVAIL: u64 = RING + 0x5100;
const USED: u64 = RING + 0x5000;
const WANTED: u64 = VERSION_1 | FLUSH | CONFIG_WCE;

fn modern() -> Bench {
    bench_with(MODERN, Image::new(8))
}

impl Bench {
    fn set(&self, offset: u64, value: u32) {
        self.disk.write(offset, 4, value);
    }

    fn get(&self, offset: u64) -> u32 {
        self.disk.read(offset, 4)
    }

    /// What of these features the device agrees to: the status register.
    fn negotiate(&self, features: u64) -> u8 {
        self.set(0x70, 0);
        self.set(0x70, 3);
        self.set(0x24, 1);
        self.set(0x20, (features >> 32) as u32);
        self.set(0x24, 0);
        self.set(0x20, features as u32);
        self.set(0x70, 11);
        self.get(0x70) as u8
    }

    fn place(&self, desc: u64, avail: u64, used: u64) {
        self.set(0x30, 0);
        self.set(0x38, NUM as u32);
        for (offset, address) in [(0x80, desc), (0x90, avail), (0xa0, used)] {
            self.set(offset, address as u32);
            self.set(offset + 4, (address >> 32) as u32);
        }
        self.set(0x44, 1);
    }

    fn set_up_modern(&self) {
        assert_eq!(self.negotiate(WANTED), 11);
        self.place(RING, AVAIL, USED);
        self.set(0x70, 15);
    }

    /// Offers the request at descriptor 0; the used index when it is given back.
    fn offer_modern(&self) -> u16 {
        let index: u16 = self.read(AVAIL + 2);
        self.write(0u16, AVAIL + 4 + 2 * (u64::from(index) % NUM));
        self.write(index.wrapping_add(1), AVAIL + 2);
        self.set(0x50, 0);
        index.wrapping_add(1)
    }

    /// Executes the request at descriptor 0; its status.
    fn run_modern(&self) -> u8 {
        let used = self.offer_modern();
        self.wait_modern(used);
        self.read(STATUS)
    }

    fn wait_modern(&self, used: u16) {
        let end = Instant::now() + PATIENCE;
        while self.read::<u16>(USED + 2) != used {
            assert!(Instant::now() < end, "the request was not executed");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

#[test]
fn registers_are_qemus() {
    let bench = bench_with(MODERN, Image::new(2048));
    let slots = Slots::new(std::slice::from_ref(&bench.disk), MODERN);
    let word = |address| {
        let mut bytes = [0x55; 4];
        assert!(slots.read(address, &mut bytes));
        u32::from_le_bytes(bytes)
    };
    let words = |base: u64| (0..64).map(|n| word(base + 4 * n)).collect::<Vec<_>>();
    let mut expected = vec![0x7472_6976, 2, 0, 0x554d_4551];
    expected.resize(64, 0);
    assert_eq!(words(0xfeb0_0000), expected, "an empty slot");
    expected[2] = 2;
    expected[4] = 0x3000_6e54;
    expected[13] = 0x400;
    expected[44] = !0;
    expected[45] = !0;
    assert_eq!(words(0xfeb0_0e00), expected);
    bench.set(0x14, 7);
    // QEMU shows 0x101: it offers the reset of a queue, without a register for it.
    assert_eq!(bench.get(0x10), 1);
    assert_eq!(bench.get(0x100), 0x800, "the configuration is the same");
    let state = bench.disk.state();
    assert_eq!(state.registers.host_features_sel, 1);
}

#[test]
fn registers_of_the_other_interface_are_not_there() {
    let modern = modern();
    let before = modern.disk.state();
    for offset in [0x28, 0x3c, 0x40] {
        modern.set(offset, 0x1000);
        assert_eq!(modern.get(offset), 0);
    }
    assert_eq!(modern.disk.state(), before);
    let legacy = bench(Image::new(8));
    let before = legacy.disk.state();
    for offset in [0x44, 0x80, 0x84, 0x90, 0x94, 0xa0, 0xa4, 0xfc] {
        legacy.set(offset, 0x1000);
        assert_eq!(legacy.get(offset), 0);
    }
    legacy.set(0x14, 1);
    assert_eq!(legacy.get(0x10), 0);
    legacy.set(0x24, 1);
    legacy.set(0x20, !0);
    legacy.set(0x70, 11);
    let after = legacy.disk.state();
    assert_eq!(after.registers.features, 0);
    assert_eq!(after.registers.proposal, before.registers.proposal);
}

#[test]
fn features_that_are_not_offered_are_not_agreed_on() {
    let bench = modern();
    assert_eq!(bench.negotiate(OFFERED_MODERN), 11);
    for bit in 0..64 {
        let is_offered = OFFERED_MODERN >> bit & 1 != 0;
        let status = bench.negotiate(VERSION_1 | 1 << bit);
        assert_eq!(status, if is_offered { 11 } else { 3 }, "bit {bit}");
        // Who does not look has what is there.
        let state = bench.disk.state();
        let agreed = (VERSION_1 | 1 << bit) & OFFERED_MODERN;
        assert_eq!(state.registers.features, agreed);
    }
    assert_eq!(bench.negotiate(FLUSH), 3, "the present interface is meant");
    assert_eq!(bench.negotiate(0), 3);
    assert_eq!(bench.negotiate(WANTED), 11);
    // Too late.
    bench.set(0x20, 0);
    bench.set(0x70, 15);
    let state = bench.disk.state();
    assert_eq!(state.registers.features, WANTED);
    assert!(state.is_started);
    bench.set(0x70, 0);
    let state = bench.disk.state();
    assert_eq!((state.registers.features, state.is_started), (0, false));

    let read_only = OFFERED_MODERN | RO;
    assert_eq!(super::super::offered(MODERN, true), read_only);
}

#[test]
fn requests_are_executed_with_rings_anywhere() {
    let bench = modern();
    bench.set_up_modern();
    assert_eq!(bench.get(0x44), 1);
    bench.disk.set_running(true);
    bench.write([7u8; 32], DATA + 480);
    bench.request(1, 3, 512, false);
    assert_eq!(bench.run_modern(), 0);
    bench.write([0u8; 32], DATA + 480);
    bench.request(0, 3, 512, true);
    assert_eq!(bench.run_modern(), 0);
    assert_eq!(bench.read::<[u8; 2]>(DATA + 510), [7; 2]);
    bench.request(4, 0, 0, true);
    assert_eq!(bench.run_modern(), 0);
    assert_eq!(bench.level.load(Ordering::SeqCst), 1);
    assert_eq!(bench.get(0x60), 1);
    bench.set(0x64, 1);
    assert_eq!(bench.level.load(Ordering::SeqCst), 0);

    // At rest, elsewhere, and on.
    bench.disk.set_running(false);
    let mut section = DiskSection(bench.disk.state());
    let bytes = save(&mut section).unwrap();
    let mut again = DiskSection(bench.disk.reset_state());
    load(&mut again, 2, &mut &bytes[..]).unwrap();
    assert_eq!(again, section);
    let there = modern();
    there.disk.check(&again.0).unwrap();
    there.disk.restore(again.0.clone()).unwrap();
    assert!(there.disk.state().is_broken, "memory goes with the section");
    bench.set(0x70, 0);
    bench.disk.restore(again.0).unwrap();
    bench.disk.set_running(true);
    bench.request(8, 0, 20, true);
    assert_eq!(bench.run_modern(), 0);
    assert_eq!(&bench.read::<[u8; 4]>(DATA), b"four");
}

#[test]
fn a_queue_that_is_not_ready_is_left_alone() {
    let bench = modern();
    bench.set_up_modern();
    bench.set(0x44, 0);
    assert_eq!(bench.get(0x44), 0);
    bench.disk.set_running(true);
    bench.request(4, 0, 0, true);
    bench.write([0u16, 1, 0], AVAIL);
    bench.set(0x50, 0);
    std::thread::sleep(Duration::from_millis(30));
    assert_eq!(bench.read::<u16>(USED + 2), 0);
    // Its memory may be anything else's by now.
    bench.disk.set_running(false);
    bench.write([9u16; 2], AVAIL);
    let state = bench.disk.state();
    bench.disk.check(&state).unwrap();
    bench.disk.restore(state).unwrap();
    bench.write([0u16, 1], AVAIL);
    bench.disk.set_running(true);
    bench.set(0x44, 2);
    assert_eq!(bench.get(0x44), 1);
    bench.set(0x50, 0);
    bench.wait_modern(1);

    // There is no other queue.
    bench.set(0x30, 5);
    assert_eq!(bench.get(0x34), 0);
    bench.set(0x80, 0x1000);
    bench.set(0x44, 1);
    assert_eq!(bench.get(0x44), 0);
    bench.set(0x30, 0);
    assert_eq!(bench.get(0x44), 1);
    bench.set(0x70, 0);
    assert_eq!(bench.get(0x44), 0, "a reset takes it away");
    // What was written is still there, as in QEMU.
    bench.write([0u16, 1], AVAIL);
    bench.write([0u16, 0], USED);
    bench.set(0x44, 1);
    assert_eq!(bench.disk.state().queue.num, NUM as u32);
    bench.set(0x50, 0);
    bench.wait_modern(1);
}

#[test]
fn a_ring_outside_ram_breaks_the_device_and_the_guest_is_told() {
    let outside = [0x1f_fff8, 0xfeb0_0000, 1 << 40, u64::MAX - 1];
    for part in 0..3 {
        for address in outside {
            let bench = modern();
            bench.set_up_modern();
            bench.disk.set_running(true);
            let mut places = [RING, AVAIL, USED];
            places[part] = address;
            let [desc, avail, used] = places;
            bench.place(desc, avail, used);
            let status = 15 | u32::from(status::NEEDS_RESET);
            assert_eq!((bench.get(0x70), bench.get(0x60)), (status, 3));
            assert_eq!(bench.level.load(Ordering::SeqCst), 1);
            bench.set(0x50, 0);
            let state = bench.disk.state();
            assert!(state.is_broken);
            // It is so wherever the guest goes.
            bench.disk.check(&state).unwrap();
            bench.disk.restore(state).unwrap();
            assert_eq!(bench.get(0x70), status);
            bench.set_up_modern();
            bench.request(4, 0, 0, true);
            assert_eq!(bench.run_modern(), 0, "a reset heals it");
        }
    }
    // RAM ends with the used ring; the word behind it is only needed for the index of an event.
    for (features, is_broken) in [(WANTED, false), (WANTED | EVENT_IDX, true)] {
        let bench = modern();
        bench.negotiate(features);
        bench.place(RING, AVAIL, 0x20_0000 - (4 + 8 * NUM));
        let state = bench.disk.state();
        assert_eq!(state.is_broken, is_broken);
        bench.disk.check(&state).unwrap();
    }
    // It grows out of RAM.
    let bench = modern();
    bench.set_up_modern();
    bench.place(RING, AVAIL, 0x20_0000 - 256);
    assert_eq!(bench.get(0x70), 15);
    bench.set(0x38, 32);
    assert!(bench.disk.state().is_broken);
    // A driver that does not work yet is not interrupted.
    let bench = modern();
    bench.negotiate(WANTED);
    bench.place(u64::MAX, 0, 0);
    assert_eq!((bench.get(0x70), bench.get(0x60)), (75, 0));
}

#[test]
fn a_ring_that_goes_where_it_can_not_be_under_a_request_stops_nobody() {
    for (features, avail, used) in [
        (WANTED, AVAIL, NOWHERE),
        (WANTED, NOWHERE, USED),
        (WANTED | EVENT_IDX, NOWHERE, USED),
    ] {
        let gate = Gate::default();
        let bench = bench_with(MODERN, gate.clone());
        bench.negotiate(features);
        bench.place(RING, AVAIL, USED);
        bench.set(0x70, 15);
        bench.disk.set_running(true);
        bench.request(4, 0, 0, true);
        bench.offer_modern();
        gate.has(1);
        bench.place(RING, avail, used);
        gate.set(true);
        bench.stop();
        assert!(bench.disk.state().is_broken);
        assert_eq!(bench.read::<u16>(USED + 2), 0, "nothing is given back");
        bench.disk.set_running(true);
        bench.set_up_modern();
        bench.write([0u16; 2], AVAIL);
        assert_eq!(bench.run_modern(), 0, "a reset heals it");
    }
}

#[test]
fn another_length_is_another_generation() {
    let image = Arc::new(Drive::new("d0".to_owned(), Box::new(Ram::new(4096))));
    let stop = Box::new(|_| ());
    let shared = Arc::clone(&image) as Arc<dyn Backend>;
    let bench = stopping_bench(MODERN, shared, OnError::DEFAULT, stop);
    let before = bench.get(0xfc);
    assert_eq!(bench.get(0x100), 8);
    assert_eq!(bench.get(0xfc), before);
    // Between one half of the length and the other, and before anybody is told.
    image.delete();
    assert_eq!(bench.get(0x104), 0);
    let after = bench.get(0xfc);
    assert_ne!(after, before);
    bench.disk.config_changed();
    assert_eq!((bench.get(0x100), bench.get(0xfc)), (0, after));
    assert_eq!(bench.get(0x60), 0, "no driver works yet");
    let state = bench.disk.state();
    bench.disk.restore(state).unwrap();
    assert_eq!(bench.get(0xfc), after);
}

#[test]
fn a_queue_is_not_taken_away_before_its_requests_are_given_back() {
    let gate = Gate::default();
    let bench = bench_with(MODERN, gate.clone());
    bench.set_up_modern();
    bench.disk.set_running(true);
    bench.request(4, 0, 0, true);
    bench.offer_modern();
    gate.has(1);
    let disk = Arc::clone(&bench.disk);
    let guest = std::thread::spawn(move || {
        disk.write(0x44, 4, 0);
        disk.read(0x44, 4)
    });
    std::thread::sleep(Duration::from_millis(20));
    assert!(!guest.is_finished());
    gate.set(true);
    assert_eq!(guest.join().unwrap(), 0);
    assert_eq!(bench.read::<u16>(USED + 2), 1);
}

/// The last aligned word there is.
const NOWHERE: u64 = u64::MAX - 3;

/// Writes that put the queue somewhere.
fn placement() -> impl Strategy<Value = Vec<(u64, u32)>> {
    let address = || {
        prop_oneof![
            prop::sample::select(vec![RING, AVAIL, USED, NOWHERE]),
            any::<u64>()
        ]
    };
    [address(), address(), address()].prop_map(|places| {
        let halves = |(part, place)| {
            let offset = 0x80 + 0x10 * part as u64;
            [(offset, place as u32), (offset + 4, (place >> 32) as u32)]
        };
        let halves = places.into_iter().enumerate().flat_map(halves);
        halves.chain([(0x44, 1)]).collect()
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Whatever a guest writes into whatever register, with requests under way or not, there is no
    /// panic, it can be stopped, and its state is one that can be saved and loaded.
    #[test]
    fn any_guest_is_survived(
        modern in any::<bool>(),
        requests in 0..4,
        writes in prop::collection::vec(prop_oneof![
            1 => placement(),
            6 => (prop_oneof![
                0u64..0x140,
                prop::sample::select(vec![
                    0x20u64, 0x24, 0x28, 0x30, 0x38, 0x40, 0x44, 0x44, 0x50, 0x50, 0x70, 0x70,
                    0x80, 0x84, 0x90, 0x94, 0xa0, 0xa4,
                ])],
             prop_oneof![
                any::<u32>(), 0u32..32, Just(1u32), Just(0x10_0000u32), Just(RING as u32 >> 12),
                Just(AVAIL as u32), Just(USED as u32), Just(WANTED as u32)])
                .prop_map(|write| vec![write])],
            0..60,
        ),
    ) {
        let interface = if modern { MODERN } else { Interface::Legacy };
        let gate = Gate::default();
        gate.set(true);
        let bench = bench_with(interface, gate);
        bench.request(0, 0, 512, true);
        for _ in 0..requests {
            bench.offer(0);
            bench.offer_modern();
        }
        if modern {
            bench.set_up_modern();
        } else {
            bench.set_up();
        }
        bench.disk.set_running(true);
        for (offset, value) in writes.into_iter().flatten() {
            bench.disk.write(offset & !3, 4, value);
            bench.disk.read(offset & !3, 4);
        }
        bench.stop();
        let state = bench.disk.state();
        let bytes = save(&mut DiskSection(state)).unwrap();
        let mut again = DiskSection(bench.disk.reset_state());
        if load(&mut again, 2, &mut &bytes[..]).is_ok() {
            let checked = bench.disk.check(&again.0);
            prop_assert_eq!(bench.disk.restore(again.0), checked);
        }
    }
}
