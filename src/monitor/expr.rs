//! HMP expressions: 64-bit, wrapping, with registers.
//!
//! The precedence is the monitor's own and not C's: `* / %` bind tightest, then `& | ^`, then
//! `+ -`; all associate to the left. QEMU: `get_expr` in `monitor/hmp.c`.

use nom::branch::alt;
use nom::bytes::complete::{tag, take_while};
use nom::character::complete::{anychar, digit1, hex_digit1, oct_digit0, one_of};
use nom::combinator::{cut, map, map_res, peek, success};
use nom::sequence::{preceded, terminated};
use nom::{IResult, Parser};

use super::args::Fault;

/// Where the values of `$name` come from.
pub trait Registers {
    /// The value of the default CPU's register of that name, sign-extended where it is shorter
    /// than 64 bits; `None` if there is none.
    fn register(&self, name: &str) -> Option<i64>;
}

/// What a piece of the grammar yields: the rest of the line and a value, or a text for the
/// operator.
type Parsed<'a, T> = IResult<&'a str, T, Fault>;

/// Parses an expression at the start of `input`, up to the first thing that can not belong to it;
/// white space around it is eaten.
pub(crate) fn expression<'a>(registers: &dyn Registers, input: &'a str) -> Parsed<'a, i64> {
    let (input, ()) = blank(input)?;
    Grammar { registers }.level(input, 0, 0)
}

struct Grammar<'r> {
    registers: &'r dyn Registers,
}

impl Grammar<'_> {
    /// Operators of [`LEVELS`]`[level]` over operands of the next level; past the last, a unary.
    fn level<'a>(&self, input: &'a str, level: usize, depth: usize) -> Parsed<'a, i64> {
        let Some(operators) = LEVELS.get(level) else {
            return self.unary(input, depth);
        };
        let (mut input, mut value) = self.level(input, level + 1, depth)?;
        while let Ok((rest, operator)) = lexeme(one_of::<_, _, Fault>(*operators)).parse(input) {
            let (rest, operand) = self.level(rest, level + 1, depth)?;
            value = apply(operator, value, operand)?;
            input = rest;
        }
        Ok((input, value))
    }

    fn unary<'a>(&self, input: &'a str, depth: usize) -> Parsed<'a, i64> {
        if depth > MAX_DEPTH {
            return fail("expression is nested too deeply");
        }
        let Some(first) = input.chars().next() else {
            return fail("unexpected end of expression");
        };
        let rest = &input[first.len_utf8()..];
        match first {
            '+' | '-' | '~' => {
                let (rest, ()) = blank(rest)?;
                let (rest, value) = self.unary(rest, depth + 1)?;
                let value = match first {
                    '-' => value.wrapping_neg(),
                    '~' => !value,
                    _ => value,
                };
                Ok((rest, value))
            }
            '(' => {
                let (rest, ()) = blank(rest)?;
                let (rest, value) = self.level(rest, 0, depth + 1)?;
                match lexeme(tag::<_, _, Fault>(")")).parse(rest) {
                    Ok((rest, _)) => Ok((rest, value)),
                    Err(_) => fail("')' expected"),
                }
            }
            '\'' => character(rest),
            '$' => {
                let (rest, name) = lexeme(take_while(|c: char| {
                    c.is_ascii_alphanumeric() || c == '_' || c == '.'
                }))
                .parse(rest)?;
                match self.registers.register(name) {
                    Some(value) => Ok((rest, value)),
                    None => fail("unknown register"),
                }
            }
            '0'..='9' => lexeme(number).parse(input),
            other => fail(&format!("invalid char '{other}' in expression")),
        }
    }
}

fn apply(operator: char, left: i64, right: i64) -> Result<i64, nom::Err<Fault>> {
    Ok(match operator {
        '+' => left.wrapping_add(right),
        '-' => left.wrapping_sub(right),
        '&' => left & right,
        '|' => left | right,
        '^' => left ^ right,
        '*' => left.wrapping_mul(right),
        _ if right == 0 => return fail("division by zero").map(|((), value)| value),
        '/' => left.wrapping_div(right),
        _ => left.wrapping_rem(right),
    })
}

/// What follows the opening quote of `'c'`.
fn character(input: &str) -> Parsed<'_, i64> {
    let Ok((rest, constant)) = anychar::<_, Fault>(input) else {
        return fail("character constant expected");
    };
    match lexeme(tag::<_, _, Fault>("'")).parse(rest) {
        Ok((rest, _)) => Ok((rest, i64::from(u32::from(constant)))),
        Err(_) => fail("missing terminating ' character"),
    }
}

/// `strtoull` with base 0: a prefix that no digit of its base follows is the number 0.
fn number(input: &str) -> Parsed<'_, i64> {
    let of = |radix| {
        move |digits: &str| match digits {
            "" => Ok(0),
            _ => u64::from_str_radix(digits, radix),
        }
    };
    // Once a digit of its base has come, there is no other base to try.
    let hexadecimal = preceded(
        alt((tag("0x"), tag("0X"))),
        preceded(peek(hex_digit1), cut(map_res(hex_digit1, of(16)))),
    );
    let octal = map_res(preceded(tag("0"), oct_digit0), of(8));
    let decimal = map_res(digit1, of(10));
    match alt((hexadecimal, octal, decimal)).parse(input) {
        // The bits of the unsigned value are kept, as in QEMU.
        Ok((rest, value)) => Ok((rest, value.cast_signed())),
        Err(nom::Err::Error(Fault::Grammar) | nom::Err::Failure(Fault::Grammar)) => {
            fail("number too large")
        }
        Err(error) => Err(error),
    }
}

/// A parser and the white space after it.
fn lexeme<'a, O>(
    parser: impl Parser<&'a str, Output = O, Error = Fault>,
) -> impl Parser<&'a str, Output = O, Error = Fault> {
    terminated(parser, blank)
}

/// White space as `isspace` knows it.
pub(crate) fn blank(input: &str) -> Parsed<'_, ()> {
    map(take_while(is_blank), |_| ())
        .or(success(()))
        .parse(input)
}

/// Whether a character is white space in C's sense.
pub(crate) fn is_blank(c: char) -> bool {
    c.is_ascii_whitespace() || c == '\x0b'
}

fn fail<I, T>(text: &str) -> Result<(I, T), nom::Err<Fault>> {
    Err(nom::Err::Failure(Fault::Text(text.to_owned())))
}

/// Operators from the loosest to the tightest.
const LEVELS: [&str; 3] = ["+-", "&|^", "*/%"];

/// How deep signs and parentheses may nest; a line is shorter than what would harm the stack.
const MAX_DEPTH: usize = 256;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    struct One;

    impl Registers for One {
        fn register(&self, name: &str) -> Option<i64> {
            (name == "eax").then_some(7)
        }
    }

    fn value(input: &str) -> Result<(&str, i64), String> {
        expression(&One, input).map_err(|error| match error {
            nom::Err::Failure(Fault::Text(text)) | nom::Err::Error(Fault::Text(text)) => text,
            other => format!("{other:?}"),
        })
    }

    #[test]
    fn stops_where_an_expression_can_not_go_on() {
        assert_eq!(value(" 1 + $eax * 2 rest"), Ok(("rest", 15)));
        assert_eq!(value("1.5"), Ok((".5", 1)));
        assert_eq!(value("0x"), Ok(("x", 0)));
        assert_eq!(value("08"), Ok(("8", 0)));
        assert_eq!(value("$ebx"), Err("unknown register".to_owned()));
        assert_eq!(value("é"), Err("invalid char 'é' in expression".to_owned()));
        assert_eq!(value("-9223372036854775808/-1"), Ok(("", i64::MIN)));
    }

    proptest! {
        #[test]
        fn numbers_in_all_bases(number: u64) {
            let signed = number.cast_signed();
            for text in [format!("{number}"), format!("{number:#x}"), format!("0{number:o}")] {
                prop_assert_eq!(value(&text), Ok(("", signed)));
            }
        }

        #[test]
        fn wraps(a: i32, b: i32) {
            let (x, y) = (i64::from(a), i64::from(b));
            let wide = x.wrapping_mul(y).wrapping_mul(y);
            let text = format!("({a})*({b})*({b})");
            prop_assert_eq!(value(&text), Ok(("", wide)));
            let text = format!("({a})-({b})");
            prop_assert_eq!(value(&text), Ok(("", x.wrapping_sub(y))));
        }
    }
}
