//! Sizes, numbers and switches as QEMU reads them.
//!
//! One grammar for the command line, for `-object` and for migration parameters. It reads and
//! never guesses: what QEMU refuses is refused here. Counterpart: QEMU's `util/cutils.c`.

use nom::branch::alt;
use nom::bytes::complete::{tag_no_case, take_while, take_while1};
use nom::character::complete::{char, multispace0, one_of};
use nom::combinator::{map, opt, rest, value, verify};
use nom::sequence::{pair, preceded};
use nom::{IResult, Parser};

/// One byte, as a default unit.
pub const BYTE: u64 = 1;
/// 1024 bytes.
pub const KIB: u64 = 1 << 10;
/// 1024 KiB.
pub const MIB: u64 = 1 << 20;
/// 1024 MiB.
pub const GIB: u64 = 1 << 30;

/// Why a text is no size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SizeError {
    /// Not a number with an optional suffix.
    #[error("not a size")]
    Invalid,
    /// A whole number below zero, or one that does not fit into 64 bits.
    #[error("size out of range")]
    OutOfRange,
}

impl SizeError {
    /// The sentence QEMU 10.0 answers with when the text was the value of a parameter.
    pub fn explain(self, parameter: &str, text: &str) -> String {
        match self {
            Self::Invalid => format!(
                "Parameter '{parameter}' expects a non-negative number below 2^64\n\
                 Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\n\
                 and exabytes, respectively."
            ),
            Self::OutOfRange => {
                format!("Value '{text}' is out of range for parameter '{parameter}'")
            }
        }
    }
}

/// Reads a size in bytes: decimal with an optional fraction and an optional suffix B, K, M, G, T,
/// P or E in either case, or hexadecimal without a suffix. A number without a suffix counts
/// `default_unit`s; a fraction of bytes is refused.
///
/// # Errors
/// [`SizeError::Invalid`] for anything else, [`SizeError::OutOfRange`] for what is below zero or
/// does not fit.
pub fn parse_size(text: &str, default_unit: u64) -> Result<u64, SizeError> {
    let number = preceded(
        multispace0,
        pair(opt(one_of("+-")), alt((hexadecimal, decimal))),
    );
    let (suffix, (sign, number)) = (number, rest)
        .parse(text)
        .map(|(_, ((sign, number), suffix))| (suffix, (sign, number)))
        .map_err(|_: nom::Err<nom::error::Error<&str>>| SizeError::Invalid)?;
    let unit = match (suffix, number.is_hex) {
        ("", _) => default_unit,
        (_, true) => return Err(SizeError::Invalid),
        (_, false) => multiplier(suffix).ok_or(SizeError::Invalid)?,
    };
    if unit == BYTE && number.fraction != 0.0 {
        return Err(SizeError::Invalid);
    }
    if sign == Some('-') {
        let is_whole = !number.has_point;
        return Err(if is_whole {
            SizeError::OutOfRange
        } else {
            SizeError::Invalid
        });
    }
    let whole = number.whole.ok_or(SizeError::OutOfRange)?;
    whole
        .checked_mul(unit)
        .and_then(|size| size.checked_add((number.fraction * unit as f64) as u64))
        .ok_or(SizeError::OutOfRange)
}

/// Reads a number as C's `strtoull` with base 0 does (`0x` hexadecimal, leading `0` octal, a minus
/// sign wraps round), all of the text.
pub fn parse_number(text: &str) -> Option<u64> {
    let text = text.trim_start_matches(|c: char| c.is_ascii_whitespace());
    let (negative, digits) = match text.as_bytes().first()? {
        b'-' => (true, &text[1..]),
        b'+' => (false, &text[1..]),
        _ => (false, text),
    };
    let (radix, digits) = match digits.as_bytes() {
        [b'0', b'x' | b'X', _, ..] => (16, &digits[2..]),
        [b'0', _, ..] => (8, &digits[1..]),
        _ => (10, digits),
    };
    // from_str_radix would take a second sign.
    if !digits.starts_with(|c: char| c.is_digit(radix)) {
        return None;
    }
    let number = u64::from_str_radix(digits, radix).ok()?;
    Some(if negative {
        number.wrapping_neg()
    } else {
        number
    })
}

/// Reads a switch: `on`, `yes`, `true`, `y` or `off`, `no`, `false`, `n`.
pub fn parse_switch(text: &str) -> Option<bool> {
    match text {
        "on" | "yes" | "true" | "y" => Some(true),
        "off" | "no" | "false" | "n" => Some(false),
        _ => None,
    }
}

/// How a switch is shown.
pub fn switch(on: bool) -> &'static str {
    if on { "on" } else { "off" }
}

/// What stands before the suffix.
struct Number {
    /// `None`: more than 64 bits.
    whole: Option<u64>,
    fraction: f64,
    has_point: bool,
    is_hex: bool,
}

fn hexadecimal(input: &str) -> IResult<&str, Number> {
    map(
        preceded(
            tag_no_case("0x"),
            take_while1(|c: char| c.is_ascii_hexdigit()),
        ),
        |digits: &str| Number {
            whole: u64::from_str_radix(digits, 16).ok(),
            fraction: 0.0,
            has_point: false,
            is_hex: true,
        },
    )
    .parse(input)
}

fn decimal(input: &str) -> IResult<&str, Number> {
    let digits = |input| take_while(|c: char| c.is_ascii_digit()).parse(input);
    let point = map(opt(preceded(char('.'), digits)), |part: Option<&str>| part);
    map(
        verify(
            pair(digits, point),
            |(whole, part): &(&str, Option<&str>)| {
                !whole.is_empty() || part.is_some_and(|part| !part.is_empty())
            },
        ),
        |(whole, part)| Number {
            whole: if whole.is_empty() {
                Some(0)
            } else {
                whole.parse().ok()
            },
            fraction: part.map_or(0.0, |part| format!("0.{part}").parse().unwrap_or(0.0)),
            has_point: part.is_some(),
            is_hex: false,
        },
    )
    .parse(input)
}

fn multiplier(suffix: &str) -> Option<u64> {
    let unit = |letter, size| value(size, tag_no_case::<_, _, nom::error::Error<&str>>(letter));
    let (rest, size) = alt((
        unit("b", BYTE),
        unit("k", KIB),
        unit("m", MIB),
        unit("g", GIB),
        unit("t", 1 << 40),
        unit("p", 1 << 50),
        unit("e", 1 << 60),
    ))
    .parse(suffix)
    .ok()?;
    rest.is_empty().then_some(size)
}

/// A size in bytes as three digits and a unit, as QEMU's `size_to_str` words it.
pub fn three_digits(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"];
    // A unit begins a little before 1024 of the one below, where three digits would end.
    let mut unit = 0;
    while unit + 1 < UNITS.len() && bytes as f64 / f64::powi(1024.0, unit as i32) >= 1000.0 {
        unit += 1;
    }
    let number = bytes as f64 / f64::powi(1024.0, unit as i32);
    let digits = match number {
        ..1.0 => 3,
        ..10.0 => 2,
        ..100.0 => 1,
        _ => 0,
    };
    let text = format!("{number:.digits$}");
    let text = match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.'),
        false => &text,
    };
    format!("{text} {}B", UNITS[unit])
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn sizes_are_read_as_qemu_10_reads_them() {
        // Each line was answered by a real QEMU 10.0 (max-postcopy-bandwidth, unit: bytes).
        let good = [
            ("0x10", 16),
            ("0x10B", 267),
            ("1.5k", 1536),
            ("1.0", 1),
            ("1.", 1),
            ("1.k", 1024),
            (".5k", 512),
            ("+5", 5),
            ("18446744073709551615", u64::MAX),
            ("0.1k", 102),
            ("0.00001k", 0),
            ("1P", 1 << 50),
            ("1b", 1),
            ("09", 9),
            ("0.5E", 1 << 59),
            ("1.99999999999999999M", 2 << 20),
            ("7.3k", 7475),
        ];
        for (text, size) in good {
            assert_eq!(parse_size(text, BYTE), Ok(size), "{text}");
        }
        for text in "0x1k 1.5 1.5B 1e3 .5 5kk 1KiB 1kb -1.5k 1.5.5 nan inf 0x 0x1.8k 1,000 00x1 1e3k 1E3 k . - abc"
            .split(' ')
            .chain([""])
        {
            assert_eq!(parse_size(text, BYTE), Err(SizeError::Invalid), "{text}");
        }
        for text in [
            "18446744073709551616",
            "15.9999999999999999999E",
            "16E",
            "-0",
            "-1",
            "-4096",
        ] {
            assert_eq!(parse_size(text, BYTE), Err(SizeError::OutOfRange), "{text}");
        }
    }

    #[test]
    fn a_bare_number_counts_the_default_unit() {
        assert_eq!(parse_size("512", MIB), Ok(512 * MIB));
        assert_eq!(parse_size("1.5", MIB), Ok(3 * MIB / 2));
        assert_eq!(parse_size("1k", MIB), Ok(KIB));
        assert_eq!(parse_size("0x10", MIB), Ok(16 * MIB));
        assert_eq!(parse_size("10B", MIB), Ok(10));
        assert_eq!(
            parse_size("17592186044416", MIB),
            Err(SizeError::OutOfRange)
        );
    }

    #[test]
    fn numbers_follow_strtoull() {
        assert_eq!(parse_number("0x10"), Some(16));
        assert_eq!(parse_number("010"), Some(8));
        assert_eq!(parse_number("0"), Some(0));
        assert_eq!(parse_number("-1"), Some(u64::MAX));
        for text in [
            "",
            "09",
            "1.5",
            "4k",
            "abc",
            "--1",
            "0x",
            "18446744073709551616",
            "+-1",
        ] {
            assert_eq!(parse_number(text), None, "{text}");
        }
    }

    proptest! {
        #[test]
        fn every_number_of_units_comes_back(count in 0u64..(1 << 30), letter in "[bBkKmMgG]") {
            let unit = match letter.to_ascii_lowercase().as_str() {
                "b" => BYTE, "k" => KIB, "m" => MIB, _ => GIB,
            };
            prop_assert_eq!(parse_size(&format!("{count}{letter}"), KIB), Ok(count * unit));
            prop_assert_eq!(parse_size(&count.to_string(), unit), Ok(count * unit));
            prop_assert_eq!(parse_size(&format!("{count:#x}"), BYTE), Ok(count));
        }

        #[test]
        fn halves_are_exact(count in 0u64..(1 << 20)) {
            prop_assert_eq!(parse_size(&format!("{count}.5M"), BYTE), Ok(count * MIB + MIB / 2));
        }

        #[test]
        fn any_text_is_answered(text in ".{0,40}", unit in 1u64..u64::MAX) {
            let _ = parse_size(&text, unit);
            let _ = parse_number(&text);
        }
    }

    #[test]
    fn sizes_have_three_digits() {
        for (bytes, text) in [
            (0, "0 B"),
            (512, "512 B"),
            (999, "999 B"),
            (1000, "0.977 KiB"),
            (1024, "1 KiB"),
            (1536, "1.5 KiB"),
            (10 << 20, "10 MiB"),
            (1_234_567_890, "1.15 GiB"),
            (u64::MAX, "16 EiB"),
        ] {
            assert_eq!(three_digits(bytes), text);
        }
    }
}
