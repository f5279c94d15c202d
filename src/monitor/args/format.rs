//! `/[count][format][size]`, and the format and size that stay for the commands after it.

use nom::bytes::complete::tag;
use nom::character::complete::digit0;
use nom::{IResult, Parser};

use super::Fault;
use crate::monitor::expr::is_blank;

/// How `x`, `xp` and `print` show a value, and how wide a port is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Format {
    /// How many items.
    pub count: u32,
    /// Which notation.
    pub style: Style,
    /// Bytes of an item: 1, 2, 4 or 8; `None` when the style is instructions and none was given.
    pub size: Option<u8>,
}

/// Notations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    /// `o`.
    Octal,
    /// `d`.
    Signed,
    /// `u`.
    Unsigned,
    /// `x`.
    Hexadecimal,
    /// `i`.
    Instructions,
    /// `c`.
    Character,
}

/// The format and size of the last command that named them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sticky {
    style: Style,
    size: u8,
}

impl Default for Sticky {
    fn default() -> Self {
        Self {
            style: Style::Hexadecimal,
            size: 4,
        }
    }
}

impl Sticky {
    /// Reads a format, or yields the last one with a count of 1 if there is none.
    pub(super) fn read<'a>(&mut self, input: &'a str) -> IResult<&'a str, Format, Fault> {
        let Ok((rest, _)) = tag::<_, _, Fault>("/")(input) else {
            return Ok((input, self.format(1, None)));
        };
        let (rest, digits) = digit0.parse(rest)?;
        let count = match digits {
            "" => 1,
            _ => digits.parse().unwrap_or(u32::MAX),
        };
        let mut style = None;
        let mut size = None;
        let letters = rest.split(is_blank).next().unwrap_or_default();
        for letter in letters.chars() {
            match letter {
                'o' => style = Some(Style::Octal),
                'd' => style = Some(Style::Signed),
                'u' => style = Some(Style::Unsigned),
                'x' => style = Some(Style::Hexadecimal),
                'i' => style = Some(Style::Instructions),
                'c' => style = Some(Style::Character),
                'b' => size = Some(1),
                'h' => size = Some(2),
                'w' => size = Some(4),
                'g' | 'L' => size = Some(8),
                other => {
                    let text = format!("invalid char in format: '{other}'");
                    return Err(nom::Err::Failure(Fault::Text(text)));
                }
            }
        }
        self.style = style.unwrap_or(self.style);
        if self.style != Style::Instructions {
            self.size = size.unwrap_or(self.size);
        }
        Ok((&rest[letters.len()..], self.format(count, size)))
    }

    fn format(&self, count: u32, size: Option<u8>) -> Format {
        let size = if self.style == Style::Instructions {
            size
        } else {
            Some(self.size)
        };
        Format {
            count,
            style: self.style,
            size,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stays_until_changed() {
        let mut sticky = Sticky::default();
        let mut read = |text: &str| {
            sticky
                .read(text)
                .map(|(rest, format)| (rest.to_owned(), format.count, format.style, format.size))
        };
        assert_eq!(
            read("5"),
            Ok(("5".to_owned(), 1, Style::Hexadecimal, Some(4)))
        );
        assert_eq!(
            read("/3db 5"),
            Ok((" 5".to_owned(), 3, Style::Signed, Some(1)))
        );
        assert_eq!(read("/u"), Ok((String::new(), 1, Style::Unsigned, Some(1))));
        assert_eq!(
            read("/2i 0"),
            Ok((" 0".to_owned(), 2, Style::Instructions, None))
        );
        assert_eq!(
            read("0"),
            Ok(("0".to_owned(), 1, Style::Instructions, None))
        );
        assert_eq!(
            read("/x"),
            Ok((String::new(), 1, Style::Hexadecimal, Some(1)))
        );
        assert_eq!(read("/99999999999x").map(|read| read.1), Ok(u32::MAX));
    }
}
