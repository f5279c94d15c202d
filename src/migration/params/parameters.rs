//! The parameters, in one table: name, kind, default, range, unit.

use super::Error;
use crate::units::{BYTE, MIB, SizeError, parse_number, parse_size, parse_switch, switch};

/// A parameter as `info migrate_parameters` shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listing {
    /// QEMU's name.
    pub name: &'static str,
    /// Value with its unit.
    pub value: String,
    /// Whether `info migrate_parameters` lists it (multifd's compression levels are only settable).
    pub is_listed: bool,
    /// The words it can be set to; empty if it takes a number or text.
    pub words: &'static [&'static str],
}

/// How a value is written.
#[derive(Clone, Copy)]
enum Kind {
    /// A size; a bare number counts bytes (or milliseconds, or rounds).
    Size,
    /// A size whose bare number counts MiB.
    Bandwidth,
    /// An integer of at most that many bits, base 0.
    Integer(u32),
    Switch,
    /// One of QEMU's words; those after `built` are not built.
    Word {
        words: &'static [&'static str],
        built: usize,
    },
    /// Text that may only be empty: what it would name is not built.
    Nothing,
}

/// What a number must be.
#[derive(Clone, Copy)]
enum Range {
    Any,
    /// From, to, and the rest of QEMU's sentence after `Parameter 'x_y' `.
    Within(u64, u64, &'static str),
    /// At least 4096 and a power of two.
    PowerOfTwo,
}

/// A parameter.
struct Row {
    name: &'static str,
    kind: Kind,
    default: u64,
    range: Range,
    unit: &'static str,
    is_listed: bool,
}

const PERCENT_99: Range = Range::Within(1, 99, "expects an integer in the range of 1 to 99");
const TO_100000: Range = Range::Within(0, 100_000, "expects a value between 0 and 100000");
const TO_255: Range = Range::Within(1, 255, "expects a value between 1 and 255");

const fn row(
    name: &'static str,
    kind: Kind,
    default: u64,
    range: Range,
    unit: &'static str,
) -> Row {
    Row {
        name,
        kind,
        default,
        range,
        unit,
        is_listed: true,
    }
}

const fn level(name: &'static str, range: Range) -> Row {
    Row {
        name,
        kind: Kind::Integer(8),
        default: 1,
        range,
        unit: "",
        is_listed: false,
    }
}

const COMPRESSIONS: &[&str] = &["none", "zlib", "zstd"];
const ZERO_PAGES: &[&str] = &["multifd", "legacy", "none"];
const MODES: &[&str] = &["normal", "cpr-reboot", "cpr-transfer"];

/// In the order of `info migrate_parameters`.
const TABLE: [Row; 33] = [
    row("announce-initial", Kind::Size, 50, TO_100000, " ms"),
    row("announce-max", Kind::Size, 550, TO_100000, " ms"),
    row(
        "announce-rounds",
        Kind::Size,
        5,
        Range::Within(0, 1000, "expects a value between 0 and 1000"),
        "",
    ),
    // The sentence says 0, and 0 is refused: QEMU's words, QEMU's rule.
    row(
        "announce-step",
        Kind::Size,
        100,
        Range::Within(1, 10_000, "expects a value between 0 and 10000"),
        " ms",
    ),
    row("compress-level", Kind::Integer(8), 1, TO_9, ""),
    row("compress-threads", Kind::Integer(8), 8, TO_255, ""),
    row("compress-wait-thread", Kind::Switch, 1, Range::Any, ""),
    row("decompress-threads", Kind::Integer(8), 2, TO_255, ""),
    row(
        "throttle-trigger-threshold",
        Kind::Integer(8),
        50,
        Range::Within(1, 100, "expects an integer in the range of 1 to 100"),
        "",
    ),
    row("cpu-throttle-initial", Kind::Integer(8), 20, PERCENT_99, ""),
    row(
        "cpu-throttle-increment",
        Kind::Integer(8),
        10,
        PERCENT_99,
        "",
    ),
    row("cpu-throttle-tailslow", Kind::Switch, 0, Range::Any, ""),
    row(
        "max-cpu-throttle",
        Kind::Integer(8),
        99,
        Range::Within(
            0,
            99,
            "expects an integer in the range of cpu_throttle_initial to 99",
        ),
        "",
    ),
    row("tls-creds", Kind::Nothing, 0, Range::Any, ""),
    row("tls-hostname", Kind::Nothing, 0, Range::Any, ""),
    row(
        "max-bandwidth",
        Kind::Bandwidth,
        128 * MIB,
        Range::Any,
        " bytes/second",
    ),
    row(
        "avail-switchover-bandwidth",
        Kind::Bandwidth,
        0,
        Range::Any,
        " bytes/second",
    ),
    row(
        "downtime-limit",
        Kind::Size,
        300,
        Range::Within(
            0,
            2_000_000,
            "expects an integer in the range of 0 to (2000 * 1000) ms",
        ),
        " ms",
    ),
    row(
        "x-checkpoint-delay",
        Kind::Integer(32),
        20_000,
        Range::Any,
        " ms",
    ),
    row("block-incremental", Kind::Switch, 0, Range::Any, ""),
    row("multifd-channels", Kind::Integer(8), 2, TO_255, ""),
    row(
        "multifd-compression",
        Kind::Word {
            words: COMPRESSIONS,
            built: 3,
        },
        0,
        Range::Any,
        "",
    ),
    row(
        "zero-page-detection",
        Kind::Word {
            words: ZERO_PAGES,
            built: 2,
        },
        0,
        Range::Any,
        "",
    ),
    row(
        "xbzrle-cache-size",
        Kind::Size,
        64 * MIB,
        Range::PowerOfTwo,
        " bytes",
    ),
    row("max-postcopy-bandwidth", Kind::Size, 0, Range::Any, ""),
    row("tls-authz", Kind::Nothing, 0, Range::Any, ""),
    row(
        "x-vcpu-dirty-limit-period",
        Kind::Size,
        1000,
        Range::Within(1, 1000, "expects a value between 1 and 1000"),
        " ms",
    ),
    row(
        "vcpu-dirty-limit",
        Kind::Size,
        1,
        Range::Within(1, u64::MAX, "must be greater than 1 MB/s"),
        " MB/s",
    ),
    row(
        "mode",
        Kind::Word {
            words: MODES,
            built: 1,
        },
        0,
        Range::Any,
        "",
    ),
    row("direct-io", Kind::Switch, 0, Range::Any, ""),
    level("multifd-zlib-level", TO_9),
    level(
        "multifd-zstd-level",
        Range::Within(0, 20, "expects a value between 0 and 20"),
    ),
    level(
        "multifd-qatzip-level",
        Range::Within(1, 9, "expects a value between 1 and 9"),
    ),
];

const TO_9: Range = Range::Within(0, 9, "expects a value between 0 and 9");

/// The values, each as a number: a switch is 0 or 1, a word its place, text always empty.
#[derive(Clone, Debug)]
pub(super) struct Parameters([u64; TABLE.len()]);

impl Default for Parameters {
    fn default() -> Self {
        let mut values = [0; TABLE.len()];
        for (value, row) in values.iter_mut().zip(&TABLE) {
            *value = row.default;
        }
        Self(values)
    }
}

impl Parameters {
    pub(super) fn knows(name: &str) -> bool {
        place(name).is_some()
    }

    /// Sets a parameter from HMP text.
    pub(super) fn set(&mut self, name: &str, text: &str) -> Result<(), Error> {
        self.apply(name, text, MIB)
    }

    /// Sets a parameter from the text of `-global`, where every bare size counts bytes.
    pub(super) fn set_property(&mut self, name: &str, text: &str) -> Result<(), Error> {
        self.apply(name, text, BYTE)
    }

    /// The number, 0 for a name that is not in the table.
    pub(super) fn number(&self, name: &str) -> u64 {
        place(name).map_or(0, |place| self.0[place])
    }

    pub(super) fn list(&self) -> Vec<Listing> {
        let shown = TABLE.iter().zip(self.0);
        shown
            .map(|(row, value)| Listing {
                name: row.name,
                value: match row.kind {
                    Kind::Switch => switch(value != 0).to_owned(),
                    Kind::Word { words, .. } => words[value as usize].to_owned(),
                    Kind::Nothing => "''".to_owned(),
                    _ => format!("{value}{}", row.unit),
                },
                is_listed: row.is_listed,
                words: match row.kind {
                    Kind::Switch => &["off", "on"],
                    Kind::Word { words, built } => words.get(..built).unwrap_or(words),
                    _ => &[],
                },
            })
            .collect()
    }

    fn apply(&mut self, name: &str, text: &str, bandwidth_unit: u64) -> Result<(), Error> {
        if name == "block-bitmap-mapping" {
            let text = "The block-bitmap-mapping parameter can only be set through QMP";
            return Err(Error::BadValue(text.to_owned()));
        }
        let place = place(name).ok_or_else(|| Error::Unknown(name.to_owned()))?;
        let row = &TABLE[place];
        let value = row.read(text, bandwidth_unit)?;
        row.check(value)?;
        let mut changed = self.clone();
        changed.0[place] = value;
        if changed.number("max-cpu-throttle") < changed.number("cpu-throttle-initial") {
            let why = "expects an integer in the range of cpu_throttle_initial to 99";
            return Err(Error::BadValue(format!(
                "Parameter 'max_cpu_throttle' {why}"
            )));
        }
        *self = changed;
        Ok(())
    }
}

impl Row {
    /// The number a text stands for, whatever its range.
    fn read(&self, text: &str, bandwidth_unit: u64) -> Result<u64, Error> {
        let name = self.name;
        let bad = |sentence: String| Error::BadValue(sentence);
        let wants = |what: &str| Error::BadValue(format!("Parameter '{name}' expects {what}"));
        match self.kind {
            Kind::Size => {
                let size =
                    parse_size(text, BYTE).map_err(|error| bad(error.explain(name, text)))?;
                let is_signed = matches!(self.range, Range::PowerOfTwo);
                if is_signed && within_i64(size).is_err() {
                    return Err(bad(format!("Invalid size {text}")));
                }
                Ok(size)
            }
            Kind::Bandwidth => parse_size(text, bandwidth_unit)
                .and_then(within_i64)
                .map_err(|_| bad(format!("Invalid size {text}"))),
            Kind::Integer(bits) => {
                let number = parse_number(text).ok_or_else(|| wants("uint64"))?;
                if number >> bits == 0 {
                    Ok(number)
                } else {
                    Err(wants(&format!("uint{bits}_t")))
                }
            }
            Kind::Switch => parse_switch(text)
                .map(u64::from)
                .ok_or_else(|| wants("'on' or 'off'")),
            Kind::Word { words, built } => {
                let place = words.iter().position(|word| *word == text).ok_or_else(|| {
                    bad(format!("Parameter '{name}' does not accept value '{text}'"))
                })?;
                if place < built {
                    Ok(place as u64)
                } else {
                    Err(self.not_built(text))
                }
            }
            Kind::Nothing if text.is_empty() => Ok(0),
            Kind::Nothing => Err(self.not_built(text)),
        }
    }

    /// QEMU's range checker spells the name with underscores, but for experimental ones.
    fn check(&self, value: u64) -> Result<(), Error> {
        let name = match self.name {
            "x-vcpu-dirty-limit-period" => self.name.to_owned(),
            name => name.replace('-', "_"),
        };
        let why = match self.range {
            Range::Within(from, to, why) if value < from || value > to => why,
            Range::PowerOfTwo if value < 4096 || !value.is_power_of_two() => {
                "expects a power of two no less than the target page size"
            }
            _ => return Ok(()),
        };
        Err(Error::BadValue(format!("Parameter '{name}' {why}")))
    }

    fn not_built(&self, value: &str) -> Error {
        Error::ValueNotBuilt {
            name: self.name,
            value: value.to_owned(),
        }
    }
}

fn within_i64(size: u64) -> Result<u64, SizeError> {
    i64::try_from(size)
        .map(|_| size)
        .map_err(|_| SizeError::OutOfRange)
}

fn place(name: &str) -> Option<usize> {
    TABLE.iter().position(|row| row.name == name)
}

#[cfg(test)]
mod tests;
