//! Words: up to white space, or quoted with escapes when the word starts with a quote.

use nom::branch::alt;
use nom::bytes::complete::{is_not, tag, take_while1};
use nom::character::complete::anychar;
use nom::combinator::{cut, map};
use nom::multi::fold_many0;
use nom::sequence::preceded;
use nom::{IResult, Parser};

use super::Fault;
use crate::monitor::expr::is_blank;

/// A word; an error with a text says what is wrong with the quoting.
pub(crate) fn word(input: &str) -> IResult<&str, String, Fault> {
    alt((
        preceded(tag("\""), cut(quoted)),
        map(take_while1(|c| !is_blank(c)), str::to_owned),
    ))
    .parse(input)
}

/// What QEMU says about the quoting, as a line to put before the refusal; empty if the word was
/// just missing.
pub(crate) fn cause(error: nom::Err<Fault>) -> String {
    match error {
        nom::Err::Failure(Fault::Text(text)) => text + "\n",
        _ => String::new(),
    }
}

/// The rest of a quoted word, the closing quote included.
fn quoted(input: &str) -> IResult<&str, String, Fault> {
    let plain = map(is_not("\"\\"), str::to_owned);
    let piece = alt((plain, preceded(tag("\\"), cut(escape))));
    let (rest, text) = fold_many0(piece, String::new, |text, piece| text + &piece).parse(input)?;
    match rest.strip_prefix('"') {
        Some(rest) => Ok((rest, text)),
        None => fail("unterminated string".to_owned()),
    }
}

fn escape(input: &str) -> IResult<&str, String, Fault> {
    let Ok((rest, escaped)) = anychar::<_, Fault>(input) else {
        return fail("unterminated string".to_owned());
    };
    let meant = match escaped {
        'n' => '\n',
        'r' => '\r',
        '\\' | '\'' | '"' => escaped,
        other => return fail(format!("unsupported escape code: '\\{other}'")),
    };
    Ok((rest, meant.to_string()))
}

fn fail<I, T>(text: String) -> Result<(I, T), nom::Err<Fault>> {
    Err(nom::Err::Failure(Fault::Text(text)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_and_quotes() {
        assert_eq!(word("a\"b c"), Ok((" c", "a\"b".to_owned())));
        assert_eq!(word(r#""a b"c"#), Ok(("c", "a b".to_owned())));
        assert_eq!(word(r#""\n\\\"\'" x"#), Ok((" x", "\n\\\"'".to_owned())));
        assert_eq!(word(r#""""#), Ok(("", String::new())));
        assert_eq!(word("").map_err(cause), Err(String::new()));
        let text = |input| word(input).map_err(cause).expect_err("bad quoting");
        assert_eq!(text(r#""a\q""#), "unsupported escape code: '\\q'\n");
        assert_eq!(text(r#""a"#), "unterminated string\n");
        assert_eq!(text(r#""a\"#), "unterminated string\n");
    }
}
