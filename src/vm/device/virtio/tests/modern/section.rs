//! Its section: QEMU's bytes, and what can not be.

use super::super::super::offered;
use super::super::super::queue::Rings;
use super::*;

/// The section of QEMU 7.2, byte for byte that of 10.0: what is not zero, and where.
fn qemus(len: usize, parts: &[(usize, &[u8])]) -> Vec<u8> {
    let mut bytes = vec![0; len];
    for (at, part) in parts {
        bytes[*at..at + part.len()].copy_from_slice(part);
    }
    bytes
}

fn at_reset() -> Vec<u8> {
    qemus(
        44249,
        &[
            (0x17, b"\x39"),
            (0x54, b"\x01\0\0\x01\0\0\0\x10"),
            (0x68, b"\x05\x15virtio/64bit_features\0\0\0\x01"),
            (0x8b, b"\x05\x11virtio/virtqueues\0\0\0\x01"),
            (0x40a2, b"\x05\x12virtio/extra_state\0\0\0\x01"),
            (0x40ba, b"\x05\x11virtio_mmio/state\0\0\0\x01"),
        ],
    )
}

fn at_work() -> Vec<u8> {
    qemus(
        48387,
        &[
            (
                0x03,
                b"\x01\0\0\0\x01\0\0\0\0\x0f\0\0\0\x30\0\x6e\x54\0\0\0\x39",
            ),
            (0x54, b"\x01\0\0\0\x10\0\0\x10\0\0\0\0\0\0\x21"),
            (
                0x68,
                b"\x05\x15virtio/64bit_features\0\0\0\x01\0\0\0\x01\x30\0\x6e\x54",
            ),
            (
                0x8b,
                b"\x05\x11virtio/virtqueues\0\0\0\x01\0\0\0\0\0\x21\x01\0\0\0\0\0\0\x21\x10",
            ),
            (0x40a2, b"\x05\x0fvirtio/ringsize\0\0\0\x01\0\0\x01"),
            (0x50b7, b"\x05\x12virtio/extra_state\0\0\0\x01"),
            (
                0x50cf,
                b"\x05\x11virtio_mmio/state\0\0\0\x01\x30\0\x6e\x54\0\0\0\x01\0\x10\x01",
            ),
            (0x50f1, b"\0\x21\0\0\0\0\0\0\0\x21\x01\0\0\0\0\0\0\x21\x10"),
            (0xbcee, b"\x05\x0evirtio/started\0\0\0\x01\x01"),
        ],
    )
}

/// The bench's disk, driven as QEMU's was when it was saved.
fn driven() -> Bench {
    let bench = modern();
    bench.set(0x14, 1);
    bench.set(0x70, 3);
    bench.set(0x24, 0);
    bench.set(0x20, 0x3000_6e54);
    bench.set(0x24, 1);
    bench.set(0x20, 1);
    bench.set(0x70, 11);
    bench.set(0x38, 16);
    for (offset, value) in [(0x80, 0x21_0000), (0x90, 0x21_0100), (0xa0, 0x21_1000)] {
        bench.set(offset, value);
    }
    bench
}

#[test]
fn the_section_is_qemus() {
    let mut section = DiskSection(State::at_reset(MODERN, OFFERED_MODERN));
    assert!(save(&mut section).unwrap() == at_reset());
    let described = describe(&mut section).unwrap();
    assert_eq!(described["fields"][0]["size"].as_u64(), Some(44249));

    let mut section = DiskSection(driven().disk.state());
    // The bench has not so much memory: what QueueReady and the last status would have done.
    section.0.queue.accept(&section.0.registers.proposal);
    section.0.queue.num = 16;
    section.0.registers.status = 15;
    section.0.is_started = true;
    let bytes = save(&mut section).unwrap();
    let expected = at_work();
    let differs = (0..expected.len()).find(|at| bytes.get(*at) != expected.get(*at));
    assert_eq!((bytes.len(), differs), (48387, None));
    let mut again = DiskSection(State::at_reset(MODERN, OFFERED_MODERN));
    load(&mut again, 2, &mut &bytes[..]).unwrap();
    assert_eq!(again, section);
}

/// Why a section is refused.
fn refusal(interface: Interface, bytes: &[u8]) -> String {
    let offered = offered(interface, false);
    let mut section = DiskSection(State::at_reset(interface, offered));
    load(&mut section, 2, &mut &bytes[..])
        .unwrap_err()
        .to_string()
}

#[test]
fn a_section_of_the_other_interface_is_refused_with_what_to_change() {
    let legacy = save(&mut DiskSection(State::at_reset(
        Interface::Legacy,
        OFFERED,
    )))
    .unwrap();
    assert_eq!(
        refusal(MODERN, &legacy),
        "virtio-blk.virtio: the source has virtio-mmio with force-legacy=on, this machine with \
         force-legacy=off (start it without -global virtio-mmio.force-legacy=off)"
    );
    for bytes in [at_reset(), at_work()] {
        assert_eq!(
            refusal(Interface::Legacy, &bytes),
            "virtio: the source has virtio-mmio with force-legacy=off, this machine with \
             force-legacy=on (start it with -global virtio-mmio.force-legacy=off)"
        );
    }
}

#[test]
fn a_guest_of_qemus_has_agreed_to_more_than_is_shown() {
    // What QEMU shows, and what it hides and takes nevertheless.
    for features in [0x101_3000_6e54u64, 0x101_3900_6e54] {
        let mut bytes = at_reset();
        bytes[0x83..0x8b].copy_from_slice(&features.to_be_bytes());
        let mut section = DiskSection(State::at_reset(MODERN, OFFERED_MODERN));
        load(&mut section, 2, &mut &bytes[..]).unwrap();
        assert_eq!(section.0.registers.features, features);
    }
    let mut bytes = at_reset();
    bytes[0x8a] = 0x80;
    assert_eq!(
        refusal(MODERN, &bytes),
        "virtio-blk.virtio: Features 0x80 unsupported: VIRTIO_BLK_F_SCSI (bit 7). \
         Allowed features: 0x10139006e54"
    );
}

#[test]
fn a_ring_that_can_not_be_is_broken_or_refused() {
    let bench = modern();
    bench.set_up_modern();
    let good = bench.disk.state();
    bench.disk.check(&good).unwrap();
    let changed = |change: &dyn Fn(&mut Queue)| {
        let mut state = good.clone();
        change(&mut state.queue);
        state
    };
    fn rings(queue: &mut Queue) -> &mut Rings {
        queue.rings.as_mut().unwrap()
    }
    let changes: [&dyn Fn(&mut Queue); 5] = [
        &|queue| queue.desc = 0x1f_ff10,
        &|queue| rings(queue).avail = u64::MAX,
        &|queue| rings(queue).used = 0xfeb0_0000,
        &|queue| rings(queue).used += 1,
        &|queue| queue.last_avail = 5,
    ];
    for change in changes {
        let state = changed(change);
        bench.disk.check(&state).unwrap();
        bench.disk.restore(state.clone()).unwrap();
        let broken = bench.disk.state();
        assert!(broken.is_broken);
        assert_eq!(broken.queue, state.queue);
        // The guest is told.
        let status = 15 | u32::from(status::NEEDS_RESET);
        assert_eq!((bench.get(0x70), bench.get(0x60)), (status, 3));
        assert_eq!(bench.level.load(Ordering::SeqCst), 1);
        bench.disk.restore(good.clone()).unwrap();
        assert!(!bench.disk.state().is_broken);
        assert_eq!(bench.level.load(Ordering::SeqCst), 0);
    }
    bench.write(20u16, AVAIL + 2);
    let state = changed(&|queue| queue.last_avail = 18);
    let why = "VQ 0 size 0x10 < last_avail_idx 0x12 - used_idx 0x0";
    assert_eq!(bench.disk.check(&state), Err(why.to_owned()));
    assert_eq!(bench.disk.restore(state), Err(why.to_owned()));
}

/// Every byte that means something, with every value that might do harm.
#[test]
fn every_field_of_a_section_is_answered() {
    let bench = modern();
    bench.set_up_modern();
    let good = save(&mut DiskSection(bench.disk.state())).unwrap();
    // Up to the first ring; a ring more than there is; the slot's registers; the end.
    let fields = [
        0..0xb2,
        0xb2..0xc2,
        0x50b7..0x5120,
        good.len() - 25..good.len(),
    ];
    for at in fields.into_iter().flatten() {
        for value in [0, 1, 0x7f, 0xff] {
            let mut bytes = good.clone();
            bytes[at] = value;
            let mut section = DiskSection(bench.disk.reset_state());
            if load(&mut section, 2, &mut &bytes[..]).is_ok() && section.0.retries.is_empty() {
                let checked = bench.disk.check(&section.0);
                assert_eq!(
                    bench.disk.restore(section.0),
                    checked,
                    "{at:#x}: {value:#x}"
                );
            }
        }
    }
    for len in [
        0, 0x50, 0x8b, 0x8c, 0xa0, 0x1000, 0x50b7, 0x50c0, 0x50e0, 0x8000,
    ] {
        let mut section = DiskSection(bench.disk.reset_state());
        load(&mut section, 2, &mut &good[..len]).unwrap_err();
    }
}
