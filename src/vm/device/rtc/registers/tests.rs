//! The chip at work, by a clock of the test's own.

use proptest::prelude::*;

use super::*;
use crate::vmstate::{load, save};

/// 21 November 2026, 11:45:04 and a half.
const NOW: i64 = 1_795_261_504 * SECOND + SECOND / 2;

fn chip() -> Registers {
    Registers::new(NOW, 64 << 20, 0)
}

fn get(chip: &mut Registers, register: usize, now: i64) -> u8 {
    chip.write(0, register as u8, now);
    chip.read(1, now)
}

fn put(chip: &mut Registers, register: usize, value: u8, now: i64) {
    chip.write(0, register as u8, now);
    chip.write(1, value, now);
}

/// Lets time pass, a due moment after the other.
fn pass(chip: &mut Registers, until: i64) {
    while let Some(due) = chip.due().filter(|due| *due <= until) {
        chip.tick(due);
    }
}

/// What QEMU 7.2 had in its first 64 bytes for `-m 64M`, `-m 300M` and `-m 5000M`, but for the time.
#[test]
fn memory_is_told_as_qemu_tells_it() {
    let told = |low: u64, high: u64| {
        let chip = Registers::new(NOW, low << 20, high << 20);
        [
            0x15, 0x16, 0x17, 0x18, 0x30, 0x31, 0x34, 0x35, 0x5b, 0x5c, 0x5d,
        ]
        .map(|register| chip.cmos[register])
    };
    assert_eq!(told(64, 0), [0x80, 2, 0, 0xfc, 0, 0xfc, 0, 3, 0, 0, 0]);
    assert_eq!(
        told(300, 0),
        [0x80, 2, 0xff, 0xff, 0xff, 0xff, 0xc0, 0x11, 0, 0, 0]
    );
    assert_eq!(
        told(3072, 1928),
        [0x80, 2, 0xff, 0xff, 0xff, 0xff, 0, 0xbf, 0x80, 0x78, 0]
    );
}

#[test]
fn it_shows_the_host_s_time_and_goes_on() {
    let mut chip = chip();
    let show = |chip: &mut Registers, now| {
        [
            CENTURY,
            YEAR,
            MONTH,
            DAY_OF_MONTH,
            DAY_OF_WEEK,
            HOURS,
            MINUTES,
            SECONDS,
        ]
        .map(|register| get(chip, register, now))
    };
    assert_eq!(
        show(&mut chip, NOW),
        [0x20, 0x26, 0x11, 0x21, 7, 0x11, 0x45, 4]
    );
    assert_eq!(
        show(&mut chip, NOW + 56 * SECOND),
        [0x20, 0x26, 0x11, 0x21, 7, 0x11, 0x46, 0]
    );
    assert_eq!(get(&mut chip, PS2_CENTURY, NOW), 0x20);
    assert_eq!(get(&mut chip, REG_D, NOW), VALID);
    assert_eq!(chip.read(0, NOW), 0xff);

    put(&mut chip, REG_B, BINARY, NOW);
    assert_eq!(get(&mut chip, MINUTES, NOW), 45);
    assert_eq!(get(&mut chip, HOURS, NOW + 3600 * SECOND), PM | 12);
    assert_eq!(get(&mut chip, HOURS, NOW + 13 * 3600 * SECOND), 12);
}

#[test]
fn a_guest_sets_the_time() {
    let mut chip = chip();
    put(&mut chip, REG_B, SET | HOURS_24, NOW);
    for (register, value) in [
        (YEAR, 0x99),
        (CENTURY, 0x19),
        (MONTH, 0x12),
        (DAY_OF_MONTH, 0x31),
    ] {
        put(&mut chip, register, value, NOW);
    }
    for (register, value) in [(HOURS, 0x23), (MINUTES, 0x59), (SECONDS, 0x59)] {
        put(&mut chip, register, value, NOW);
    }
    assert_eq!(
        get(&mut chip, SECONDS, NOW + 5 * SECOND),
        0x59,
        "time stands still"
    );
    put(&mut chip, REG_B, HOURS_24, NOW);
    assert_eq!(get(&mut chip, SECONDS, NOW), 0x59);
    assert_eq!(get(&mut chip, CENTURY, NOW + SECOND), 0x20);
    assert_eq!(get(&mut chip, YEAR, NOW + SECOND), 0);
}

#[test]
fn an_update_is_announced_and_interrupts() {
    let mut chip = chip();
    put(&mut chip, REG_B, HOURS_24 | UIE, NOW);
    let second = NOW + SECOND / 2;
    // The chip's seconds began when it was made.
    let update = chip.due().unwrap();
    assert_eq!(update, NOW + SECOND);
    assert_eq!(get(&mut chip, REG_A, second) & UIP, 0);
    assert_eq!(get(&mut chip, REG_A, update - UPDATE) & UIP, UIP);
    pass(&mut chip, update);
    assert!(chip.irq());
    assert_eq!(get(&mut chip, REG_A, update) & UIP, 0);
    assert_eq!(get(&mut chip, REG_C, update), IRQF | UF);
    assert!(!chip.irq());
    assert_eq!(chip.due(), Some(update + SECOND));
}

#[test]
fn an_alarm_comes_at_its_time() {
    for (alarm, after) in [
        ([0x11, 0x46, 0x00], 56),
        ([0x11, 0x45, 0x04], 86_400),
        ([0x11, 0x45, 0x03], 86_399),
        ([ANY, ANY, ANY], 1),
        ([ANY, ANY, 0x03], 59),
        ([ANY, 0x44, 0x04], 3540),
        ([0x12, ANY, ANY], 896),
        ([0x11, ANY, 0x00], 56),
        ([0x00, 0x00, 0x00], 44_096),
    ] {
        let mut chip = chip();
        for (register, value) in [HOURS_ALARM, MINUTES_ALARM, SECONDS_ALARM]
            .iter()
            .zip(alarm)
        {
            put(&mut chip, *register, value, NOW);
        }
        put(&mut chip, REG_B, HOURS_24 | AIE, NOW);
        let at = NOW + after * SECOND;
        pass(&mut chip, at - 1);
        assert!(!chip.irq(), "{alarm:x?} was early");
        pass(&mut chip, at);
        assert!(chip.irq(), "{alarm:x?} did not come");
        assert_eq!(get(&mut chip, REG_C, at), IRQF | AF | UF);
    }
}

#[test]
fn periodic_interrupts_keep_their_rate_and_are_not_made_up_for() {
    let mut chip = chip();
    put(&mut chip, REG_B, HOURS_24 | PIE, NOW);
    let mut count = 0;
    while chip.due().unwrap() < NOW + SECOND {
        let due = chip.due().unwrap();
        chip.tick(due);
        assert!(chip.irq());
        assert_eq!(get(&mut chip, REG_C, due) & (IRQF | PF), IRQF | PF);
        count += 1;
    }
    assert_eq!(
        count, 1023,
        "1024 a second, the first one a period from now"
    );
    let late = NOW + 10 * SECOND;
    chip.tick(late);
    assert!(chip.due().unwrap() > late);
    put(&mut chip, REG_A, DIVIDER_32_KHZ | 15, late);
    let next = chip.periodic - late;
    assert!(next > 490_000_000 && next <= 500_000_000, "{next}");
    put(&mut chip, REG_B, HOURS_24, late);
    assert_eq!(chip.periodic, -1);
}

#[test]
fn a_reset_disables_interrupts_and_keeps_the_time() {
    let mut chip = chip();
    put(&mut chip, REG_B, HOURS_24 | PIE | UIE, NOW);
    put(&mut chip, SHUTDOWN, 5, NOW);
    pass(&mut chip, NOW + 2 * SECOND);
    assert!(chip.irq());
    chip.reset(NOW + 2 * SECOND);
    assert!(!chip.irq() && chip.periodic == -1);
    assert_eq!(get(&mut chip, SHUTDOWN, NOW), 0);
    assert_eq!(get(&mut chip, SECONDS, NOW + 2 * SECOND), 6);
}

#[test]
fn state_is_245_bytes_and_loads() {
    let mut chip = chip();
    put(&mut chip, REG_B, HOURS_24 | PIE, NOW);
    let bytes = save(&mut chip).unwrap();
    assert_eq!(bytes.len(), 245);
    let mut again = Registers::incoming();
    load(&mut again, 3, &mut &bytes[..]).unwrap();
    assert_eq!(again, chip);
    // On another host, a little later.
    again.resume(NOW + SECOND / 10);
    assert_eq!(again.periodic, chip.periodic);
    again.resume(NOW + 1000 * SECOND);
    assert!(again.periodic > NOW + 1000 * SECOND);
}

proptest! {
    /// Whatever a stream says and a guest writes, nothing overflows and time goes on.
    #[test]
    fn any_state_can_be_lived_with(
        bytes in proptest::collection::vec(any::<u8>(), 245),
        writes in proptest::collection::vec((0u8..=1, any::<u8>()), 0..40),
    ) {
        let mut chip = Registers::incoming();
        let mut bytes = bytes;
        bytes[128] &= 0x7f;
        bytes[165] &= 0x3f;
        load(&mut chip, 3, &mut &bytes[..]).unwrap();
        chip.resume(NOW);
        for (port, value) in writes {
            chip.write(port, value, NOW);
            chip.read(port, NOW);
            chip.show(NOW);
            if let Some(due) = chip.due() {
                chip.tick(due.max(NOW));
            }
            prop_assert!(chip.due().is_none_or(|due| due > NOW));
        }
        chip.reset(NOW);
        save(&mut chip).unwrap();
    }
}
