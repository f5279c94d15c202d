//! The chip's registers: a clock of the day with an alarm and a periodic interrupt, in 128 bytes of
//! battery-backed memory. Motorola's MC146818 data sheet, as QEMU's `hw/rtc/mc146818rtc.c` reads it
//! (lost periodic interrupts are dropped, as its machines have it).
//!
//! Times are the host's wall clock in nanoseconds since 1970, and so are those on the wire: a guest
//! on its way reads the right time where it arrives. Nothing here looks at a clock; callers say
//! what it shows.

use crate::calendar::{DAY, Date};
use crate::vmstate::{Result, Subsection, Visitor, VmState};

const SECONDS: usize = 0;
const SECONDS_ALARM: usize = 1;
const MINUTES: usize = 2;
const MINUTES_ALARM: usize = 3;
const HOURS: usize = 4;
const HOURS_ALARM: usize = 5;
const DAY_OF_WEEK: usize = 6;
const DAY_OF_MONTH: usize = 7;
const MONTH: usize = 8;
const YEAR: usize = 9;
const REG_A: usize = 10;
const REG_B: usize = 11;
const REG_C: usize = 12;
const REG_D: usize = 13;
/// Why the machine was shut down; a reset clears it.
const SHUTDOWN: usize = 0x0f;
const CENTURY: usize = 0x32;
/// The same where PS/2 machines have it.
const PS2_CENTURY: usize = 0x37;

/// Register A: an update is under way; the divider; the periodic rate.
const UIP: u8 = 0x80;
const DIVIDER: u8 = 0x70;
const DIVIDER_RESET: u8 = 0x60;
const DIVIDER_32_KHZ: u8 = 0x20;
const RATE: u8 = 0x0f;
/// Register B: time stands still; interrupts enabled, at the bits where register C has their
/// flags; square wave; binary; 24 hours.
const SET: u8 = 0x80;
const PIE: u8 = 0x40;
const AIE: u8 = 0x20;
const UIE: u8 = 0x10;
const SQWE: u8 = 0x08;
const BINARY: u8 = 0x04;
const HOURS_24: u8 = 0x02;
/// Register C: an interrupt is asked for; the reasons.
const IRQF: u8 = 0x80;
const PF: u8 = 0x40;
const AF: u8 = 0x20;
const UF: u8 = 0x10;
/// Register D: the battery is good.
const VALID: u8 = 0x80;
/// Hours after noon, if there are twelve of them.
const PM: u8 = 0x80;
/// An alarm field with both bits matches every value.
const ANY: u8 = 0xc0;

const SECOND: i64 = 1_000_000_000;
/// Ticks a second of the chip's quartz.
const QUARTZ: i128 = 32_768;
/// How long before an update the chip says that it is under way.
const UPDATE: i64 = 8 * SECOND / QUARTZ as i64;
/// A periodic interrupt that is overdue by more is scheduled anew.
const MAX_LATE: i64 = 60 * SECOND;

/// What is migrated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Registers {
    cmos: [u8; 128],
    index: u8,
    /// When the next periodic interrupt is due; -1: none.
    periodic: i64,
    next_periodic: i64,
    /// Ticks of the quartz between periodic interrupts, 0 for none.
    period: u32,
    /// What the clock of the day showed at `last_update`, seconds.
    base: i64,
    last_update: i64,
    /// To be added to what has passed since.
    offset: i64,
    /// When flags change next; -1: not before one of them is cleared.
    update: i64,
    next_alarm: i64,
}

impl Registers {
    /// A chip that was set to the host's time, in a machine with that much RAM below 4 GiB and
    /// above, bytes.
    pub(super) fn new(now: i64, low_ram: u64, high_ram: u64) -> Self {
        let mut chip = Self {
            cmos: [0; 128],
            index: 0,
            periodic: -1,
            next_periodic: 0,
            period: 0,
            base: now.div_euclid(SECOND),
            last_update: now,
            offset: 0,
            update: -1,
            next_alarm: 0,
        };
        chip.cmos[REG_A] = DIVIDER_32_KHZ | 6;
        chip.cmos[REG_B] = HOURS_24;
        chip.cmos[REG_D] = VALID;
        chip.note_memory(low_ram, high_ram);
        chip.show(now);
        chip.schedule_update(now);
        chip
    }

    /// A chip that takes its state from a stream.
    pub(crate) fn incoming() -> Self {
        Self::new(0, 0, 0)
    }

    /// Reads port 0 (the index, which is write-only) or 1.
    pub(super) fn read(&mut self, port: u8, now: i64) -> u8 {
        if port & 1 == 0 {
            return 0xff;
        }
        if usize::from(self.index) == PS2_CENTURY {
            self.index = CENTURY as u8;
        }
        let index = usize::from(self.index);
        match index {
            SECONDS | MINUTES | HOURS | DAY_OF_WEEK..=YEAR | CENTURY => {
                if self.runs() {
                    self.show(now);
                }
                self.cmos[index]
            }
            REG_A => self.cmos[REG_A] | if self.is_updating(now) { UIP } else { 0 },
            REG_C => {
                let flags = std::mem::take(&mut self.cmos[REG_C]);
                if flags & (UF | AF) != 0 {
                    self.schedule_update(now);
                }
                flags
            }
            _ => self.cmos[index],
        }
    }

    /// Writes port 0 (the index) or 1.
    pub(super) fn write(&mut self, port: u8, value: u8, now: i64) {
        if port & 1 == 0 {
            self.index = value & 0x7f;
            return;
        }
        if usize::from(self.index) == PS2_CENTURY {
            self.index = CENTURY as u8;
        }
        let index = usize::from(self.index);
        match index {
            SECONDS_ALARM | MINUTES_ALARM | HOURS_ALARM => {
                self.cmos[index] = value;
                self.schedule_update(now);
            }
            SECONDS | MINUTES | HOURS | DAY_OF_WEEK..=YEAR | CENTURY => {
                self.cmos[index] = value;
                if self.runs() {
                    self.set(now);
                    self.schedule_update(now);
                }
            }
            REG_A => self.write_a(value, now),
            REG_B => self.write_b(value, now),
            REG_C | REG_D => {}
            _ => self.cmos[index] = value,
        }
    }

    /// Level of the interrupt line.
    pub(super) fn irq(&self) -> bool {
        self.cmos[REG_C] & IRQF != 0
    }

    /// When [`Self::tick`] has something to do.
    pub(super) fn due(&self) -> Option<i64> {
        [self.periodic, self.update]
            .into_iter()
            .filter(|at| *at != -1)
            .min()
    }

    /// Sets the flags of everything that is due, and asks for interrupts that are enabled.
    pub(super) fn tick(&mut self, now: i64) {
        if self.periodic != -1 && self.periodic <= now {
            // A machine that was late does not make up for what it missed.
            let late = (now - self.periodic) % interval(self.period).max(1);
            self.schedule_periodic(now - late);
            self.cmos[REG_C] |= PF;
            if self.cmos[REG_B] & PIE != 0 {
                self.cmos[REG_C] |= IRQF;
            }
        }
        if self.update != -1 && self.update <= now {
            self.show(now);
            self.cmos[REG_A] &= !UIP;
            let alarm = if now >= self.next_alarm { AF } else { 0 };
            let flags = UF | alarm;
            let new = flags & !self.cmos[REG_C];
            self.cmos[REG_C] |= flags;
            if new & self.cmos[REG_B] != 0 {
                self.cmos[REG_C] |= IRQF;
            }
            self.schedule_update(now);
        }
    }

    /// The machine's reset: interrupts are disabled, time goes on.
    pub(super) fn reset(&mut self, now: i64) {
        self.cmos[SHUTDOWN] = 0;
        self.cmos[REG_B] &= !(PIE | AIE | SQWE);
        self.cmos[REG_C] &= !(UF | IRQF | PF | AF);
        self.schedule_periodic(now);
        self.schedule_update(now);
    }

    /// Brings what the registers show up to date, to be saved.
    pub(super) fn show(&mut self, now: i64) {
        if self.cmos[REG_B] & SET != 0 {
            return;
        }
        let date = Date::at(self.time(now).div_euclid(SECOND));
        self.cmos[SECONDS] = self.encoded(date.second);
        self.cmos[MINUTES] = self.encoded(date.minute);
        self.cmos[HOURS] = if self.cmos[REG_B] & HOURS_24 != 0 {
            self.encoded(date.hour)
        } else {
            let hour = if date.hour % 12 == 0 {
                12
            } else {
                date.hour % 12
            };
            self.encoded(hour) | if date.hour >= 12 { PM } else { 0 }
        };
        self.cmos[DAY_OF_WEEK] = self.encoded(date.weekday);
        self.cmos[DAY_OF_MONTH] = self.encoded(date.day);
        self.cmos[MONTH] = self.encoded(date.month);
        self.cmos[YEAR] = self.encoded(date.year.rem_euclid(100));
        self.cmos[CENTURY] = self.encoded(date.year.div_euclid(100));
    }

    /// The guest goes on after a rest, or somewhere else. What came due meanwhile is due now, but
    /// no time that was loaded is relied upon.
    pub(super) fn resume(&mut self, now: i64) {
        self.period = self.ticks();
        if self.period == 0 || !(now - MAX_LATE..=now).contains(&self.next_periodic) {
            self.schedule_periodic(now);
        } else {
            self.periodic = self.next_periodic;
        }
        if self.update == -1 || self.update > now {
            self.schedule_update(now);
        }
    }

    /// Where firmware finds how much memory there is.
    fn note_memory(&mut self, low_ram: u64, high_ram: u64) {
        let mut note = |at: usize, value: u64, len: usize| {
            self.cmos[at..at + len].copy_from_slice(&value.to_le_bytes()[..len]);
        };
        note(0x15, (low_ram >> 10).min(640), 2);
        let extended = (low_ram.saturating_sub(1 << 20) >> 10).min(0xffff);
        note(0x17, extended, 2);
        note(0x30, extended, 2);
        note(
            0x34,
            (low_ram.saturating_sub(16 << 20) >> 16).min(0xffff),
            2,
        );
        note(0x5b, high_ram >> 16, 3);
    }

    fn write_a(&mut self, value: u8, now: i64) {
        let old = self.cmos[REG_A];
        if value & DIVIDER_RESET == DIVIDER_RESET {
            if self.runs() {
                self.show(now);
            }
            self.cmos[REG_A] &= !UIP;
        } else if old & DIVIDER_RESET == DIVIDER_RESET && value & DIVIDER <= DIVIDER_32_KHZ {
            // The first update comes half a second after the divider is let go.
            if self.cmos[REG_B] & SET == 0 {
                self.offset = SECOND / 2;
                self.set(now);
            }
            self.cmos[REG_A] &= !UIP;
        }
        self.cmos[REG_A] = (value & !UIP) | (self.cmos[REG_A] & UIP);
        if (old ^ value) & RATE != 0 {
            self.change_period(now);
        }
        self.schedule_update(now);
    }

    fn write_b(&mut self, mut value: u8, now: i64) {
        let old = self.cmos[REG_B];
        if value & SET != 0 {
            if self.runs() {
                self.show(now);
            }
            self.cmos[REG_A] &= !UIP;
            value &= !UIE;
        } else if old & SET != 0 && self.cmos[REG_A] & DIVIDER <= DIVIDER_32_KHZ {
            self.offset = self.time(now).rem_euclid(SECOND);
            self.set(now);
        }
        // An interrupt whose flag is up already when it is enabled comes at once.
        if value & self.cmos[REG_C] & (PF | AF | UF) != 0 {
            self.cmos[REG_C] |= IRQF;
        } else {
            self.cmos[REG_C] &= !IRQF;
        }
        self.cmos[REG_B] = value;
        if (old ^ value) & PIE != 0 {
            self.change_period(now);
        }
        self.schedule_update(now);
    }

    fn runs(&self) -> bool {
        self.cmos[REG_B] & SET == 0 && self.cmos[REG_A] & DIVIDER <= DIVIDER_32_KHZ
    }

    /// What the clock of the day shows, nanoseconds since 1970.
    fn time(&self, now: i64) -> i64 {
        // A guest, or a stream, may have set any time.
        self.base
            .wrapping_mul(SECOND)
            .wrapping_add(now)
            .wrapping_sub(self.last_update)
            .wrapping_add(self.offset)
    }

    /// Sets the clock of the day to what the registers show.
    fn set(&mut self, now: i64) {
        let date = Date {
            year: self.decoded(YEAR) + self.decoded(CENTURY) * 100,
            month: self.decoded(MONTH),
            day: self.decoded(DAY_OF_MONTH),
            weekday: 0,
            hour: self.hour(HOURS),
            minute: self.decoded(MINUTES),
            second: self.decoded(SECONDS),
        };
        self.base = date.seconds();
        self.last_update = now;
    }

    /// An hour of 24, from a register that may count twelve.
    fn hour(&self, register: usize) -> i64 {
        let value = self.cmos[register];
        if self.cmos[REG_B] & HOURS_24 != 0 {
            return self.decode(value);
        }
        self.decode(value & !PM) % 12 + if value & PM != 0 { 12 } else { 0 }
    }

    fn decoded(&self, register: usize) -> i64 {
        self.decode(self.cmos[register])
    }

    fn decode(&self, value: u8) -> i64 {
        let value = i64::from(value);
        if self.cmos[REG_B] & BINARY != 0 {
            value
        } else {
            (value >> 4) * 10 + (value & 15)
        }
    }

    /// `value` is below 100.
    fn encoded(&self, value: i64) -> u8 {
        let value = value as u8;
        if self.cmos[REG_B] & BINARY != 0 {
            value
        } else {
            ((value / 10) << 4) | (value % 10)
        }
    }

    fn is_updating(&mut self, now: i64) -> bool {
        if !self.runs() {
            return false;
        }
        if self.update != -1 && now >= self.update.saturating_sub(UPDATE) {
            // Stays so until the update has been made.
            self.cmos[REG_A] |= UIP;
            return true;
        }
        self.time(now).rem_euclid(SECOND) >= SECOND - UPDATE
    }

    /// Finds when flags change next.
    fn schedule_update(&mut self, now: i64) {
        self.update = -1;
        if self.cmos[REG_A] & DIVIDER_RESET == DIVIDER_RESET {
            return;
        }
        self.show(now);
        let mut next = now + SECOND - self.time(now).rem_euclid(SECOND);
        self.next_alarm = next + (self.seconds_to_alarm(now) - 1) * SECOND;
        if self.cmos[REG_A] & UIP == 0 && self.cmos[REG_C] & UF != 0 {
            if self.cmos[REG_B] & SET != 0 || self.cmos[REG_C] & AF != 0 {
                return;
            }
            next = self.next_alarm;
        }
        self.update = next;
    }

    /// Seconds from the one shown to the alarm, at least 1. One that matches no time of the day is
    /// taken for a day away.
    fn seconds_to_alarm(&self, now: i64) -> i64 {
        let shown = Date {
            hour: self.hour(HOURS),
            minute: self.decoded(MINUTES),
            second: self.decoded(SECONDS),
            ..Date::at(now.div_euclid(SECOND))
        };
        let start = shown.hour * 3600 + shown.minute * 60 + shown.second;
        let wanted = |register| (self.cmos[register] & ANY != ANY).then(|| self.decoded(register));
        let hour = wanted(HOURS_ALARM).map(|_| self.hour(HOURS_ALARM));
        let (minute, second) = (wanted(MINUTES_ALARM), wanted(SECONDS_ALARM));
        let fits = |wanted: Option<i64>, value| wanted.is_none_or(|wanted| wanted == value);
        let mut ahead = 1;
        while ahead < DAY {
            let at = (start + ahead) % DAY;
            if !fits(hour, at / 3600) {
                ahead += 3600 - at % 3600;
            } else if !fits(minute, at / 60 % 60) {
                ahead += 60 - at % 60;
            } else if !fits(second, at % 60) {
                ahead += 1;
            } else {
                return ahead;
            }
        }
        DAY
    }

    /// Ticks between periodic interrupts, as registers A and B say.
    fn ticks(&self) -> u32 {
        match self.cmos[REG_A] & RATE {
            _ if self.cmos[REG_B] & PIE == 0 => 0,
            0 => 0,
            // The two fastest settings are those of a slower quartz.
            rate @ 1..=2 => 1 << (rate + 6),
            rate => 1 << (rate - 1),
        }
    }

    /// The rate has changed; what has passed of the old period counts for the new one.
    fn change_period(&mut self, now: i64) {
        let old = interval(self.period);
        let new = interval(self.ticks());
        let passed = match old {
            0 => 0,
            _ => (now - (self.next_periodic - old)).clamp(0, new),
        };
        self.schedule_periodic(now - passed);
    }

    /// Makes the next periodic interrupt due a period after `from`.
    fn schedule_periodic(&mut self, from: i64) {
        self.period = self.ticks();
        if self.period == 0 {
            self.periodic = -1;
            return;
        }
        let ticks = i128::from(from) * QUARTZ / i128::from(SECOND) + i128::from(self.period);
        let next = ticks * i128::from(SECOND) / QUARTZ + 1;
        self.next_periodic = i64::try_from(next).unwrap_or(i64::MAX);
        self.periodic = self.next_periodic;
    }
}

/// Nanoseconds of that many ticks.
fn interval(ticks: u32) -> i64 {
    (i128::from(ticks) * i128::from(SECOND) / QUARTZ) as i64
}

impl VmState for Registers {
    const NAME: &'static str = "mc146818rtc";
    const VERSION: u32 = 3;
    const SUBSECTIONS: &'static [Subsection<Self>] = &[Subsection {
        name: "mc146818rtc/irq_reinject_on_ack_count",
        version: 1,
        // Lost interrupts are not made up for.
        needed: |_| false,
        fields: |_, v| v.number("irq_reinject_on_ack_count", &mut 0u16),
    }];

    fn fields(&mut self, v: &mut dyn Visitor, _version: u32) -> Result {
        v.buffer("cmos_data", &mut self.cmos)?;
        v.ranged("cmos_index", &mut self.index, 0..=127)?;
        v.unused(28)?;
        v.timer("periodic_timer", &mut self.periodic)?;
        v.ranged(
            "next_periodic_time",
            &mut self.next_periodic,
            0..=i64::MAX / 2,
        )?;
        v.unused(24)?;
        v.number("irq_coalesced", &mut 0u32)?;
        v.number("period", &mut self.period)?;
        unsigned(v, "base_rtc", &mut self.base)?;
        unsigned(v, "last_update", &mut self.last_update)?;
        v.number("offset", &mut self.offset)?;
        v.timer("update_timer", &mut self.update)?;
        unsigned(v, "next_alarm_time", &mut self.next_alarm)
    }
}

/// A time that QEMU keeps unsigned.
fn unsigned(v: &mut dyn Visitor, name: &'static str, time: &mut i64) -> Result {
    let mut bits = time.cast_unsigned();
    v.number(name, &mut bits)?;
    *time = bits.cast_signed();
    Ok(())
}

#[cfg(test)]
mod tests;
