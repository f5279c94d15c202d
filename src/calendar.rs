//! Days and dates of the Gregorian calendar, for a clock whose fields a guest may fill with anything.
//!
//! The count of days goes by years that begin in March, so that a leap day is the last of its year.

/// A date and time of day. What is read from a chip's registers may lie out of range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Date {
    /// 1970 and so on.
    pub(crate) year: i64,
    /// 1 to 12.
    pub(crate) month: i64,
    /// 1 to 31.
    pub(crate) day: i64,
    /// 1 (Sunday) to 7; not looked at by [`Self::seconds`].
    pub(crate) weekday: i64,
    /// 0 to 23.
    pub(crate) hour: i64,
    /// 0 to 59.
    pub(crate) minute: i64,
    /// 0 to 59.
    pub(crate) second: i64,
}

/// Seconds of a day.
pub(crate) const DAY: i64 = 86_400;
/// Days of 400 years.
const ERA: i64 = 146_097;
/// Days from 1 March of year 0 to 1 January 1970.
const EPOCH: i64 = 719_468;

impl Date {
    /// The date that many seconds after the beginning of 1970, UTC.
    pub(crate) fn at(seconds: i64) -> Self {
        let (days, time) = (seconds.div_euclid(DAY), seconds.rem_euclid(DAY));
        let count = days + EPOCH;
        let (era, of_era) = (count.div_euclid(ERA), count.rem_euclid(ERA));
        let year = (of_era - of_era / 1460 + of_era / 36524 - of_era / (ERA - 1)) / 365;
        let of_year = of_era - (365 * year + year / 4 - year / 100);
        // Months since March.
        let months = (5 * of_year + 2) / 153;
        let month = if months < 10 { months + 3 } else { months - 9 };
        Self {
            year: era * 400 + year + i64::from(month <= 2),
            month,
            day: of_year - (153 * months + 2) / 5 + 1,
            weekday: (days + 4).rem_euclid(7) + 1,
            hour: time / 3600,
            minute: time / 60 % 60,
            second: time % 60,
        }
    }

    /// Seconds since the beginning of 1970. Months and days out of range count on from where they
    /// would be, as with QEMU's `mktimegm`.
    pub(crate) fn seconds(&self) -> i64 {
        let (year, month) = if self.month < 3 {
            (self.year - 1, self.month + 12)
        } else {
            (self.year, self.month)
        };
        let leaps = year.div_euclid(4) - year.div_euclid(100) + year.div_euclid(400);
        let days = self.day - 1 + (153 * (month - 3) + 2).div_euclid(5) + 365 * year + leaps;
        (days - EPOCH) * DAY + self.hour * 3600 + self.minute * 60 + self.second
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn known_dates() {
        let date = |year, month, day, weekday, hour, minute, second| Date {
            year,
            month,
            day,
            weekday,
            hour,
            minute,
            second,
        };
        for (seconds, expected) in [
            (0, date(1970, 1, 1, 5, 0, 0, 0)),
            (-1, date(1969, 12, 31, 4, 23, 59, 59)),
            (951_782_400, date(2000, 2, 29, 3, 0, 0, 0)),
            (951_868_800, date(2000, 3, 1, 4, 0, 0, 0)),
            (1_795_261_504, date(2026, 11, 21, 7, 11, 45, 4)),
            (4_102_444_799, date(2099, 12, 31, 5, 23, 59, 59)),
        ] {
            assert_eq!(Date::at(seconds), expected);
            assert_eq!(expected.seconds(), seconds);
        }
    }

    proptest! {
        #[test]
        fn there_and_back(seconds in -10_000_000_000i64..10_000_000_000) {
            let date = Date::at(seconds);
            prop_assert!((1..=12).contains(&date.month) && (1..=31).contains(&date.day));
            prop_assert_eq!(date.seconds(), seconds);
        }
    }
}
