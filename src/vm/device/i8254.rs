//! The PIT: an 8254 with three counters, emulated by KVM; here only its state on the wire.
//!
//! QEMU's section `i8254` version 3. Its times are readings of QEMU's virtual clock, which stands
//! still while the guest does and which the section `timer` carries; KVM's are host time. Here
//! they count from the moment the guest stopped, so none is later than 0 but the next transition.

use kvm_bindings::{KVM_PIT_FLAGS_HPET_LEGACY, kvm_pit_channel_state, kvm_pit_state2};

use crate::vmstate::{Result, Visitor, VmState};

/// First port of the chip's registers.
pub(crate) const PORT: u16 = 0x40;
/// Number of its ports.
pub(crate) const PORTS: u64 = 4;

/// Counters of the chip.
const COUNTERS: usize = 3;
/// Input clock, Hz.
const FREQUENCY: i128 = 1_193_182;
const NANOSECONDS: i128 = 1_000_000_000;
/// A counter that is set to 0 counts this many.
const FULL: i32 = 0x10000;
/// Counts to the end and stays there.
const INTERRUPT_ON_TERMINAL_COUNT: u8 = 0;
/// Bits of a mode that say the same: 6 is 2, and 7 is 3.
const MODE_ALIAS: u8 = 4;

/// What is migrated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Pit {
    /// Whether counter 0 is cut off from its line.
    irq_disabled: u32,
    counters: [Counter; COUNTERS],
}

/// One counter.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Counter {
    count: i32,
    latched_count: u16,
    count_latched: u8,
    status_latched: u8,
    status: u8,
    read_state: u8,
    write_state: u8,
    write_latch: u8,
    rw_mode: u8,
    mode: u8,
    bcd: u8,
    gate: u8,
    /// When counting began, nanoseconds.
    load_time: i64,
    /// When the output changes next, nanoseconds; -1 for never. QEMU knows it of counter 0 alone.
    next_transition: i64,
}

impl Default for Pit {
    /// The chip at reset, as QEMU has it: counters run full periods, 18.2 a second.
    fn default() -> Self {
        let counter = |gate| Counter {
            count: FULL,
            latched_count: 0,
            count_latched: 0,
            status_latched: 0,
            status: 0,
            read_state: 0,
            write_state: 0,
            write_latch: 0,
            rw_mode: 0,
            mode: 3,
            bcd: 0,
            gate,
            load_time: 0,
            next_transition: 0,
        };
        Self {
            irq_disabled: 0,
            counters: [counter(1), counter(1), counter(0)],
        }
        .scheduled()
    }
}

impl Pit {
    /// KVM's state, read when the host's monotonic clock stood at `now` nanoseconds.
    pub(crate) fn from_kvm(state: &kvm_pit_state2, now: i64) -> Self {
        Self {
            irq_disabled: u32::from(state.flags & KVM_PIT_FLAGS_HPET_LEGACY != 0),
            counters: state.channels.map(|channel| Counter {
                count: channel.count as i32,
                latched_count: channel.latched_count,
                count_latched: channel.count_latched,
                status_latched: channel.status_latched,
                status: channel.status,
                read_state: channel.read_state,
                write_state: channel.write_state,
                write_latch: channel.write_latch,
                rw_mode: channel.rw_mode,
                mode: channel.mode,
                bcd: channel.bcd,
                gate: channel.gate,
                load_time: channel.count_load_time.wrapping_sub(now),
                next_transition: 0,
            }),
        }
        .scheduled()
    }

    /// State for KVM, to count on from `now`.
    pub(crate) fn to_kvm(&self, now: i64) -> kvm_pit_state2 {
        let channel = |counter: &Counter| kvm_pit_channel_state {
            count: counter.count as u32,
            latched_count: counter.latched_count,
            count_latched: counter.count_latched,
            status_latched: counter.status_latched,
            status: counter.status,
            read_state: counter.read_state,
            write_state: counter.write_state,
            write_latch: counter.write_latch,
            rw_mode: counter.rw_mode,
            mode: counter.mode,
            bcd: counter.bcd,
            gate: counter.gate,
            count_load_time: counter.load_time.wrapping_add(now),
        };
        kvm_pit_state2 {
            channels: [0, 1, 2].map(|n: usize| channel(&self.counters[n])),
            flags: if self.irq_disabled == 0 {
                0
            } else {
                KVM_PIT_FLAGS_HPET_LEGACY
            },
            ..Default::default()
        }
    }

    /// The same with counter 0 cut off from its line: KVM's timer stands still then.
    pub(crate) fn silenced(&self) -> Self {
        Self {
            irq_disabled: 1,
            ..self.clone()
        }
    }

    /// Makes times that count from the zero of a clock count from the moment it showed `clock`.
    pub(crate) fn rebase(&mut self, clock: i64) {
        for counter in &mut self.counters {
            counter.load_time = counter.load_time.wrapping_sub(clock);
        }
        self.counters[0].next_transition = self.counters[0].next();
    }

    fn scheduled(mut self) -> Self {
        self.rebase(0);
        self
    }
}

impl Counter {
    /// When the output changes next, from the moment the guest stopped on. As QEMU's
    /// `pit_get_next_transition_time`.
    fn next(&self) -> i64 {
        let count = i128::from(self.count.max(1));
        let load_time = i128::from(self.load_time);
        let gone = (-load_time).max(0) * FREQUENCY / NANOSECONDS;
        let period = gone - gone % count;
        let ticks = match self.mode & !MODE_ALIAS {
            // A pulse of one tick at the end of each period.
            2 if gone == period && gone != 0 => period + 1,
            2 => period + count,
            // Half of the period high, half of it low.
            3 if gone - period < (count + 1) / 2 => period + (count + 1) / 2,
            3 => period + count,
            INTERRUPT_ON_TERMINAL_COUNT | 1 if gone < count => count,
            _ => return -1,
        };
        let next = load_time + ticks * NANOSECONDS / FREQUENCY;
        i64::try_from(next.max(1)).unwrap_or(-1)
    }
}

impl VmState for Pit {
    const NAME: &'static str = "i8254";
    const VERSION: u32 = 3;

    fn fields(&mut self, v: &mut dyn Visitor, _version: u32) -> Result {
        v.ranged("channels[0].irq_disabled", &mut self.irq_disabled, 0..=1)?;
        v.states("channels", &mut self.counters)?;
        let mut next = self.counters[0].next_transition;
        v.number("channels[0].next_transition_time", &mut next)
    }
}

impl VmState for Counter {
    const NAME: &'static str = "pit channel";
    const VERSION: u32 = 2;

    fn fields(&mut self, v: &mut dyn Visitor, _version: u32) -> Result {
        v.ranged("count", &mut self.count, 0..=FULL)?;
        v.number("latched_count", &mut self.latched_count)?;
        v.ranged("count_latched", &mut self.count_latched, 0..=4)?;
        v.ranged("status_latched", &mut self.status_latched, 0..=1)?;
        v.number("status", &mut self.status)?;
        v.ranged("read_state", &mut self.read_state, 0..=4)?;
        v.ranged("write_state", &mut self.write_state, 0..=4)?;
        v.number("write_latch", &mut self.write_latch)?;
        v.ranged("rw_mode", &mut self.rw_mode, 0..=3)?;
        v.ranged("mode", &mut self.mode, 0..=7)?;
        v.ranged("bcd", &mut self.bcd, 0..=1)?;
        v.ranged("gate", &mut self.gate, 0..=1)?;
        v.number("count_load_time", &mut self.load_time)?;
        v.number("next_transition_time", &mut self.next_transition)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmstate::{load, save};

    fn counting(mode: u8, count: i32, gone: i64) -> Counter {
        Counter {
            mode,
            count,
            load_time: gone.wrapping_neg(),
            ..Pit::default().counters[0].clone()
        }
    }

    #[test]
    fn state_is_108_bytes_and_loads() {
        let mut pit = Pit::default();
        pit.counters[0] = counting(2, 11932, 5_000_000);
        pit.rebase(0);
        let bytes = save(&mut pit).unwrap();
        assert_eq!(bytes.len(), 108);
        assert_eq!(bytes[..8], [0, 0, 0, 0, 0, 0, 0x2e, 0x9c]);
        let mut again = Pit::default();
        load(&mut again, 3, &mut &bytes[..]).unwrap();
        assert_eq!(again, pit);
    }

    #[test]
    fn times_follow_the_clock_they_are_counted_by() {
        let mut pit = Pit::default();
        pit.counters[0] = counting(2, 11932, 5_000_000);
        pit.rebase(0);
        let state = pit.to_kvm(1_000_000_000);
        assert_eq!(state.channels[0].count_load_time, 995_000_000);
        assert_eq!(Pit::from_kvm(&state, 1_000_000_000), pit);
        let mut later = Pit::from_kvm(&state, 0);
        later.rebase(1_000_000_000);
        assert_eq!(later, pit);
        assert_eq!(Pit::from_kvm(&pit.silenced().to_kvm(7), 7).irq_disabled, 1);
    }

    /// 11932 ticks are 10.000151 ms.
    #[test]
    fn the_next_transition_is_found_in_every_mode() {
        for mode in [2, 6] {
            assert_eq!(counting(mode, 11932, 5_000_000).next(), 5_000_150);
            assert_eq!(counting(mode, 11932, 15_000_000).next(), 5_000_301);
        }
        for mode in [3, 7] {
            assert_eq!(counting(mode, 11932, 1_000_000).next(), 4_000_075);
            assert_eq!(counting(mode, 11932, 6_000_000).next(), 4_000_150);
        }
        assert_eq!(counting(0, 11932, 1_000_000).next(), 9_000_150);
        assert_eq!(counting(0, 11932, 20_000_000).next(), -1);
        // Whatever a stream says, nothing overflows and nothing is due before now.
        for gone in [i64::MIN, -1, 0, 1, i64::MAX] {
            for count in [0, 1, FULL] {
                for mode in 0..8 {
                    let next = counting(mode, count, gone).next();
                    assert!(next == -1 || next > 0, "{mode} {count} {gone}: {next}");
                }
            }
        }
    }
}
