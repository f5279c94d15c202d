//! Sizes (`o`), seconds (`T`) and switches (`b`).

use nom::bytes::complete::{take_while, take_while1};
use nom::character::complete::alpha0;
use nom::number::complete::recognize_float;
use nom::{IResult, Parser};

use super::Fault;
use crate::monitor::expr::is_blank;
use crate::units::{MIB, parse_size};

/// Bytes: a size as [`parse_size`] reads it, MiB without a suffix.
pub(crate) fn size(input: &str) -> IResult<&str, i64, Fault> {
    let (rest, word) = take_while(|c| !is_blank(c)).parse(input)?;
    match parse_size(word, MIB).map(i64::try_from) {
        Ok(Ok(bytes)) => Ok((rest, bytes)),
        _ => fail("invalid size"),
    }
}

/// Seconds, or with a suffix milli-, micro- or nanoseconds.
pub(crate) fn seconds(input: &str) -> IResult<&str, f64, Fault> {
    let Ok((rest, text)): IResult<&str, &str, Fault> = recognize_float(input) else {
        return fail("Number expected");
    };
    let value: f64 = match text.parse::<f64>() {
        Ok(value) if value.is_finite() => value,
        _ => return fail("Bad number"),
    };
    let (rest, unit) = alpha0.parse(rest)?;
    let divisor = match unit {
        "" => 1.0,
        "ms" => 1e3,
        "us" => 1e6,
        "ns" => 1e9,
        _ => return fail("Unknown unit suffix"),
    };
    let is_end = rest.chars().next().is_none_or(is_blank);
    if is_end {
        Ok((rest, value / divisor))
    } else {
        fail("Unknown unit suffix")
    }
}

/// `on` or `off`.
pub(crate) fn on_off(input: &str) -> IResult<&str, bool, Fault> {
    let word: IResult<&str, &str, Fault> = take_while1(|c: char| c.is_ascii_graphic()).parse(input);
    match word {
        Ok((rest, "on")) => Ok((rest, true)),
        Ok((rest, "off")) => Ok((rest, false)),
        _ => fail("Expected 'on' or 'off'"),
    }
}

fn fail<I, T>(text: &str) -> Result<(I, T), nom::Err<Fault>> {
    Err(nom::Err::Failure(Fault::Text(text.to_owned())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        let ok = |text| {
            size(text)
                .map(|(rest, value)| (rest.to_owned(), value))
                .ok()
        };
        let whole = |value| Some((String::new(), value));
        assert_eq!(ok("1"), whole(1 << 20));
        assert_eq!(ok("1b"), whole(1));
        assert_eq!(ok("1.5G"), whole(3 << 29));
        assert_eq!(ok("1.k x"), Some((" x".to_owned(), 1024)));
        assert_eq!(ok("0x10"), whole(16 << 20));
        assert_eq!(ok("7E"), whole(7 << 60));
        for bad in [
            "",
            "-1",
            "x",
            "8E",
            "1.5B",
            "99999999999999999999",
            "0xffffffffffff",
            "0x10k",
        ] {
            assert_eq!(ok(bad), None, "{bad}");
        }
    }

    #[test]
    fn seconds_and_units() {
        let value = |text| seconds(text).map(|(_, value)| value).ok();
        assert_eq!(value("2"), Some(2.0));
        assert_eq!(value("1.5e3ms"), Some(1.5));
        assert_eq!(value("250us"), Some(0.00025));
        assert_eq!(value("x"), None);
        assert_eq!(value("1h"), None);
        assert_eq!(value("1e999"), None);
    }

    #[test]
    fn switches() {
        assert_eq!(on_off("on x"), Ok((" x", true)));
        assert_eq!(on_off("off"), Ok(("", false)));
        assert!(on_off("ON").is_err());
        assert!(on_off("on,").is_err());
    }
}
