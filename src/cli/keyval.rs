//! Lists of `key=value`, as most options take them.
//!
//! A comma separates, two commas are one in a value, and the first part may leave out its key.

use nom::branch::alt;
use nom::bytes::complete::{tag, take_till, take_till1};
use nom::character::complete::char;
use nom::combinator::{map, opt, value};
use nom::multi::{fold_many0, separated_list0};
use nom::sequence::{pair, preceded};
use nom::{IResult, Parser};

use crate::units::parse_switch;

/// What was written, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct KeyVal(Vec<(String, String)>);

impl KeyVal {
    /// Reads a list; `first` is the key that the first part may leave out. A later part without a
    /// value is a switch: `server` is on, `nowait` is off.
    ///
    /// # Errors
    /// QEMU's sentence.
    pub(super) fn parse(text: &str, first: Option<&str>) -> Result<Self, String> {
        Self::read(text, first, |key| match key.strip_prefix("no") {
            Some(rest) if !rest.is_empty() => Ok((rest.to_owned(), "off".to_owned())),
            _ => Ok((key.to_owned(), "on".to_owned())),
        })
    }

    /// As [`Self::parse`], but every later part needs its value (`-machine`, `-object`).
    ///
    /// # Errors
    /// QEMU's sentence.
    pub(super) fn parse_strict(text: &str, first: Option<&str>) -> Result<Self, String> {
        Self::read(text, first, |key| {
            if key.is_empty() {
                return Err("Invalid parameter ''".to_owned());
            }
            Err(format!("Expected '=' after parameter '{key}'"))
        })
    }

    fn read(
        text: &str,
        first: Option<&str>,
        alone: impl Fn(&str) -> Result<(String, String), String>,
    ) -> Result<Self, String> {
        let (_, parts) = list(text).map_err(|_| format!("Invalid parameter '{text}'"))?;
        let mut pairs = Vec::new();
        for (place, (key, value)) in parts.into_iter().enumerate() {
            pairs.push(match (value, first) {
                (None, Some(first)) if place == 0 => (first.to_owned(), key.replace(",,", ",")),
                (Some(value), _) if !key.is_empty() => (key.to_owned(), value),
                (Some(_), _) => return Err("Invalid parameter ''".to_owned()),
                (None, _) => alone(key)?,
            });
        }
        Ok(Self(pairs))
    }

    /// Takes a key's value out, the last one if it was given several times.
    pub(super) fn take(&mut self, key: &str) -> Option<String> {
        let value = self.0.iter().rev().find(|(name, _)| name == key)?.1.clone();
        self.0.retain(|(name, _)| name != key);
        Some(value)
    }

    /// Takes a switch out.
    ///
    /// # Errors
    /// The value is neither on nor off.
    pub(super) fn take_switch(&mut self, key: &str) -> Result<Option<bool>, String> {
        self.take(key)
            .map(|value| {
                parse_switch(&value)
                    .ok_or_else(|| format!("Parameter '{key}' expects 'on' or 'off'"))
            })
            .transpose()
    }

    /// Refuses what QEMU has and this version does not build.
    ///
    /// # Errors
    /// The first of `keys` that was given.
    pub(super) fn refuse(&self, keys: &[&str]) -> Result<(), String> {
        match self.0.iter().find(|(key, _)| keys.contains(&key.as_str())) {
            Some((key, value)) => Err(format!("{key}={value}: not built in this version")),
            None => Ok(()),
        }
    }

    /// Makes sure that everything was taken.
    ///
    /// # Errors
    /// The first that was not.
    pub(super) fn finish(self) -> Result<(), String> {
        match self.0.into_iter().next() {
            Some((key, _)) => Err(format!("Invalid parameter '{key}'")),
            None => Ok(()),
        }
    }

    /// What is left, in order.
    pub(super) fn rest(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0
            .iter()
            .map(|(key, value)| (key.as_str(), value.as_str()))
    }
}

type Part<'a> = (&'a str, Option<String>);

fn list(text: &str) -> IResult<&str, Vec<Part<'_>>> {
    if text.is_empty() {
        return Ok(("", Vec::new()));
    }
    nom::combinator::all_consuming(separated_list0(char(','), part)).parse(text)
}

fn part(text: &str) -> IResult<&str, Part<'_>> {
    let key = take_till(|c| c == '=' || c == ',');
    pair(key, opt(preceded(char('='), escaped))).parse(text)
}

fn escaped(text: &str) -> IResult<&str, String> {
    let plain = map(take_till1(|c| c == ','), str::to_owned);
    let comma = value(",".to_owned(), tag(",,"));
    fold_many0(alt((plain, comma)), String::new, |all, part| all + &part).parse(text)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pairs(text: &str) -> Vec<(String, String)> {
        KeyVal::parse(text, Some("backend")).unwrap().0
    }

    fn expect(text: &str, expected: &[(&str, &str)]) {
        let expected: Vec<(String, String)> = expected
            .iter()
            .map(|(key, value)| ((*key).into(), (*value).into()))
            .collect();
        assert_eq!(pairs(text), expected, "{text}");
    }

    #[test]
    fn lists_are_read_as_qemu_reads_them() {
        expect("null,id=x", &[("backend", "null"), ("id", "x")]);
        expect("backend=null,id=", &[("backend", "null"), ("id", "")]);
        expect(
            "socket,server,nowait",
            &[("backend", "socket"), ("server", "on"), ("wait", "off")],
        );
        expect(
            "file,path=/a,,b=c,id=x",
            &[("backend", "file"), ("path", "/a,b=c"), ("id", "x")],
        );
        expect("", &[]);
        assert_eq!(
            KeyVal::parse_strict("microvm,acpi", Some("type")).unwrap_err(),
            "Expected '=' after parameter 'acpi'"
        );
        assert_eq!(
            KeyVal::parse_strict("microvm,,acpi=off", Some("type")).unwrap_err(),
            "Invalid parameter ''"
        );
    }

    #[test]
    fn what_is_not_taken_is_named() {
        let mut list = KeyVal::parse("a=1,b=2,a=3,c=maybe", None).unwrap();
        assert_eq!(list.take("a").as_deref(), Some("3"));
        assert_eq!(list.take("a"), None);
        assert_eq!(
            list.take_switch("c").unwrap_err(),
            "Parameter 'c' expects 'on' or 'off'"
        );
        assert_eq!(
            list.refuse(&["b"]).unwrap_err(),
            "b=2: not built in this version"
        );
        assert_eq!(list.finish().unwrap_err(), "Invalid parameter 'b'");
    }

    proptest! {
        #[test]
        fn values_with_commas_come_back(value in "[a-z,=]{0,12}") {
            let mut list = KeyVal::parse(&format!("k={}", value.replace(',', ",,")), None).unwrap();
            prop_assert_eq!(list.take("k"), Some(value));
            list.finish().unwrap();
        }

        #[test]
        fn any_text_is_answered(text in ".{0,40}") {
            let _ = KeyVal::parse(&text, Some("first"));
            let _ = KeyVal::parse_strict(&text, None);
        }
    }
}
