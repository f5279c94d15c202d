//! Command lines to commands and arguments: one grammar per argument letter.
//!
//! Texts and order of refusals are QEMU's; where it prints a reason to its own stdout only (bad
//! escapes, open quotes) it comes before the text the monitor shows. QEMU: `monitor_parse_command`
//! and `monitor_parse_arguments` in `monitor/hmp.c`.

mod format;
mod quantity;
mod word;

use std::collections::BTreeMap;

use nom::error::{ErrorKind, FromExternalError, ParseError};
use nom::{IResult, Parser};

pub use format::{Format, Sticky, Style};

use super::expr::{self, Registers, blank, is_blank};
use super::session::Error;
use super::table::{self, Arg, Command, Kind, Presence};

/// The arguments of one command line.
#[derive(Debug, Default, PartialEq)]
pub struct Args {
    values: BTreeMap<&'static str, Value>,
}

/// One argument's value.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// `F`, `B`, `s`, `S`, `-xs`.
    Text(String),
    /// `i`, `l`, `M` (bytes), `o` (bytes).
    Int(i64),
    /// `T`, seconds.
    Seconds(f64),
    /// `b`, `-x`.
    Flag(bool),
    /// `/`.
    Format(Format),
}

impl Args {
    /// The text of an argument that must be there. Fails if the table does not know it as text.
    pub fn text(&self, key: &str) -> Result<&str, Error> {
        self.text_if_any(key).ok_or_else(|| Self::missing(key))
    }

    /// The text of an optional argument.
    pub fn text_if_any(&self, key: &str) -> Option<&str> {
        match self.values.get(key) {
            Some(Value::Text(text)) => Some(text),
            _ => None,
        }
    }

    /// The number of an argument that must be there. Fails if the table knows it otherwise.
    pub fn int(&self, key: &str) -> Result<i64, Error> {
        self.int_if_any(key).ok_or_else(|| Self::missing(key))
    }

    /// The number of an optional argument.
    pub fn int_if_any(&self, key: &str) -> Option<i64> {
        match self.values.get(key) {
            Some(Value::Int(value)) => Some(*value),
            _ => None,
        }
    }

    /// Whether a flag was given, or `on` said.
    pub fn flag(&self, key: &str) -> bool {
        matches!(self.values.get(key), Some(Value::Flag(true)))
    }

    /// The format; absent in the line means the session's last one.
    pub fn format(&self, key: &str) -> Result<Format, Error> {
        match self.values.get(key) {
            Some(Value::Format(format)) => Ok(*format),
            _ => Err(Self::missing(key)),
        }
    }

    fn missing(key: &str) -> Error {
        Error::Text(format!(
            "commands.toml does not give this command an argument '{key}'"
        ))
    }
}

/// What the grammars report: a text for the operator, or that nothing fits here.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Nothing fits; the caller words it.
    Grammar,
    /// For the operator.
    Text(String),
}

impl<I> ParseError<I> for Fault {
    fn from_error_kind(_: I, _: ErrorKind) -> Self {
        Self::Grammar
    }

    fn append(_: I, _: ErrorKind, other: Self) -> Self {
        other
    }
}

impl<I, E> FromExternalError<I, E> for Fault {
    fn from_external_error(_: I, _: ErrorKind, _: E) -> Self {
        Self::Grammar
    }
}

/// Parses a whole command line. `Ok(None)`: there is nothing on it.
pub fn parse(
    line: &str,
    sticky: &mut Sticky,
    registers: &dyn Registers,
) -> Result<Option<(&'static Command, Args)>, Error> {
    let Some((command, rest)) = command(line)? else {
        return Ok(None);
    };
    let mut reader = Reader {
        command,
        spelling: command.spelling(),
        sticky,
        registers,
    };
    match reader.arguments(rest) {
        Ok(args) => Ok(Some((command, args))),
        Err(problem) => {
            let typed = line[..line.len() - rest.len()].trim_end_matches(is_blank);
            Err(Error::Text(format!(
                "{problem}\nTry \"help {typed}\" for more information"
            )))
        }
    }
}

/// Finds the command, going down into `info`; yields it and the rest of the line.
fn command(line: &str) -> Result<Option<(&'static Command, &str)>, Error> {
    let mut commands = table::COMMANDS;
    let mut path = String::new();
    let mut rest = line;
    loop {
        rest = rest.trim_start_matches(is_blank);
        if rest.is_empty() {
            return Ok(None);
        }
        let end = rest.find(|c| is_blank(c) || c == '/').unwrap_or(rest.len());
        let (name, after) = rest.split_at(end);
        path = if path.is_empty() {
            name.to_owned()
        } else {
            format!("{path} {name}")
        };
        let Some(found) = table::find(commands, name) else {
            if table::is_not_built(&path) {
                return Err(Error::Refused(format!("{path}: not built in this version")));
            }
            let typed = &line[..line.len() - after.len()];
            return Err(Error::Text(format!("unknown command: '{typed}'")));
        };
        rest = after.trim_start_matches(is_blank);
        if found.items.is_empty() || rest.is_empty() {
            return Ok(Some((found, rest)));
        }
        commands = found.items;
    }
}

/// The grammar of one command's arguments.
struct Reader<'a> {
    command: &'static Command,
    spelling: String,
    sticky: &'a mut Sticky,
    registers: &'a dyn Registers,
}

impl Reader<'_> {
    fn arguments(&mut self, input: &str) -> Result<Args, String> {
        let mut args = Args::default();
        let mut input = input;
        for (index, arg) in self.command.args.iter().enumerate() {
            let (rest, value) = match self.argument(index, arg, input) {
                Ok(parsed) => parsed,
                Err(nom::Err::Failure(Fault::Text(text)) | nom::Err::Error(Fault::Text(text))) => {
                    return Err(text);
                }
                Err(_) => return Err(format!("{}: bad argument", self.spelling)),
            };
            if let Some(value) = value {
                args.values.insert(arg.key, value);
            }
            input = rest;
        }
        if input.trim_start_matches(is_blank).is_empty() {
            Ok(args)
        } else {
            Err(format!(
                "{}: extraneous characters at the end of line",
                self.spelling
            ))
        }
    }

    fn argument<'i>(
        &mut self,
        index: usize,
        arg: &Arg,
        input: &'i str,
    ) -> IResult<&'i str, Option<Value>, Fault> {
        let (after_blank, ()) = blank(input)?;
        let mut at = after_blank;
        match arg.presence {
            Presence::Optional if at.is_empty() => return Ok((at, None)),
            Presence::AfterDot => match at.strip_prefix('.') {
                Some(rest) => (at, ()) = blank(rest)?,
                None => return Ok((at, None)),
            },
            _ => (),
        }
        let name = &self.spelling;
        match arg.kind {
            Kind::File => self.text(at, "filename expected"),
            Kind::Block => self.text(at, "block device name expected"),
            Kind::Word => self.text(at, "string expected"),
            Kind::Rest if at.is_empty() => refuse(format!("{name}: string expected")),
            Kind::Rest => Ok(("", Some(Value::Text(at.to_owned())))),
            Kind::Int32 => {
                let (rest, value) = expr::expression(self.registers, at)?;
                if u32::try_from(value).is_err() {
                    return refuse(format!("'{name}' has failed: integer is for 32-bit values"));
                }
                Ok((rest, Some(Value::Int(value))))
            }
            Kind::Int64 => expr::expression(self.registers, at)
                .map(|(rest, value)| (rest, Some(Value::Int(value)))),
            Kind::Mebibytes => {
                let (rest, value) = expr::expression(self.registers, at)?;
                match value.checked_mul(1 << 20).filter(|bytes| *bytes >= 0) {
                    Some(bytes) => Ok((rest, Some(Value::Int(bytes)))),
                    None => refuse("enter a positive value".to_owned()),
                }
            }
            Kind::Size => quantity::size(at).map(|(rest, bytes)| (rest, Some(Value::Int(bytes)))),
            Kind::Seconds => {
                quantity::seconds(at).map(|(rest, value)| (rest, Some(Value::Seconds(value))))
            }
            Kind::OnOff => {
                let (rest, on) = quantity::on_off(at)?;
                Ok((rest, Some(Value::Flag(on))))
            }
            Kind::Format => {
                let (rest, format) = self.sticky.read(at)?;
                Ok((rest, Some(Value::Format(format))))
            }
            Kind::Flag(letter) | Kind::FlagValue(letter) => self.flag(index, arg, letter, input),
        }
    }

    fn text<'i>(&self, input: &'i str, problem: &str) -> IResult<&'i str, Option<Value>, Fault> {
        match word::word.parse(input) {
            Ok((rest, word)) => Ok((rest, Some(Value::Text(word)))),
            Err(error) => refuse(format!(
                "{}{}: {problem}",
                word::cause(error),
                self.spelling
            )),
        }
    }

    /// A flag that is not here is absent, unless no later one fits what is here either.
    fn flag<'i>(
        &self,
        index: usize,
        arg: &Arg,
        letter: char,
        input: &'i str,
    ) -> IResult<&'i str, Option<Value>, Fault> {
        let (at, ()) = blank(input)?;
        let Some(after_dash) = at.strip_prefix('-') else {
            return Ok((input, None));
        };
        let typed = after_dash.chars().next();
        if typed != Some(letter) {
            let is_later = self.command.args[index + 1..]
                .iter()
                .any(|later| typed.is_some() && later.kind.flag() == typed);
            return if is_later {
                Ok((input, None))
            } else {
                let typed = typed.map(String::from).unwrap_or_default();
                refuse(format!("{}: unsupported option -{typed}", self.spelling))
            };
        }
        let rest = &after_dash[letter.len_utf8()..];
        if let Kind::Flag(_) = arg.kind {
            return Ok((rest, Some(Value::Flag(true))));
        }
        let (rest, ()) = blank(rest)?;
        self.text(rest, &format!("value expected for -{letter}"))
    }
}

/// Splits a line into words, quoted ones unquoted; `None` if a quote is wrong.
pub(crate) fn words(line: &str) -> Option<Vec<String>> {
    let mut found = Vec::new();
    let mut rest = line.trim_start_matches(is_blank);
    while !rest.is_empty() {
        let (after, next) = word::word(rest).ok()?;
        found.push(next);
        rest = after.trim_start_matches(is_blank);
    }
    Some(found)
}

fn refuse<I, T>(text: String) -> Result<(I, T), nom::Err<Fault>> {
    Err(nom::Err::Failure(Fault::Text(text)))
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::monitor::commands::{dump, fd};
    use crate::monitor::{help, registers};
    use crate::vm::machine;

    /// A vCPU at reset, as the one whose answers were recorded.
    struct Reset(machine::Registers);

    impl Default for Reset {
        fn default() -> Self {
            let mut registers = machine::Registers::default();
            let sregs = &mut registers.sregs;
            for segment in [&mut sregs.ds, &mut sregs.es, &mut sregs.ss, &mut sregs.cs] {
                segment.limit = 0xffff;
            }
            sregs.cs.selector = 0xf000;
            sregs.cs.base = 0xffff_0000;
            registers.regs.rip = 0xfff0;
            registers.regs.rdx = 0x6_0fb1;
            registers.regs.rflags = 2;
            Self(registers)
        }
    }

    impl Registers for Reset {
        fn register(&self, name: &str) -> Option<i64> {
            registers::value(&self.0, name)
        }
    }

    /// What the monitor answers to a line, for the commands that need no machine.
    pub(crate) fn answer(line: &str, sticky: &mut Sticky) -> String {
        let (command, args) = match parse(line, sticky, &Reset::default()) {
            Ok(Some(parsed)) => parsed,
            Ok(None) => return String::new(),
            Err(error) => return format!("{error}\n"),
        };
        let answer = match command.name {
            "print" => args
                .int("val")
                .and_then(|value| Ok(dump::number(value, args.format("fmt")?.style) + "\n")),
            "closefd" => args
                .text("fdname")
                .map(|name| format!("Error: {}\n", fd::not_found(name))),
            "help" => help::topic(args.text_if_any("name").unwrap_or_default())
                .or_else(|text| Ok(text + "\n")),
            _ => Ok(String::new()),
        };
        answer.unwrap_or_else(|error| format!("{error}\n"))
    }

    /// Lines and answers recorded from QEMU 7.2, in one session.
    #[test]
    fn answers_as_qemu() {
        let mut sticky = Sticky::default();
        let mut cases = 0;
        for case in include_str!("golden/args.txt").split("> ").skip(1) {
            let (line, expected) = case.split_once('\n').expect("a line");
            let mut got = answer(line, &mut sticky);
            // QEMU prints these two on its own stdout, where no operator looks.
            for own in [
                "unterminated string\n",
                "unsupported escape code: '\\q'\n",
                "unsupported escape code: '\\t'\n",
            ] {
                if let Some(rest) = got.strip_prefix(own) {
                    got = rest.to_owned();
                }
            }
            assert_eq!(got, expected, "{line}");
            cases += 1;
        }
        assert!(cases > 200, "only {cases} cases");
    }

    fn text(line: &str) -> String {
        match parse(line, &mut Sticky::default(), &Reset::default()) {
            Err(error) => error.to_string(),
            Ok(parsed) => panic!("{line} was accepted: {parsed:?}"),
        }
    }

    #[test]
    fn own_answers() {
        assert_eq!(
            text("gpa2hpa x"),
            "Error: gpa2hpa: not built in this version"
        );
        assert_eq!(
            text("info  lapic"),
            "Error: info lapic: not built in this version"
        );
        assert_eq!(text("info gpa2hpa"), "unknown command: 'info gpa2hpa'");
        assert_eq!(
            text("migrate \"a\\qb\""),
            "unsupported escape code: '\\q'\nmigrate: string expected\nTry \"help migrate\" for more information"
        );
        assert_eq!(
            text("migrate -"),
            "migrate: unsupported option -\nTry \"help migrate\" for more information"
        );
        let deep = format!("print {}1", "(".repeat(4000));
        assert!(text(&deep).starts_with("expression is nested too deeply\n"));
        let mut sticky = Sticky::default();
        assert_eq!(answer("print $rip", &mut sticky), "0xfff0\n");
        assert_eq!(
            answer("closefd \"a\\nb\"", &mut sticky),
            "Error: File descriptor named 'a\nb' not found\n"
        );
    }

    #[test]
    fn arguments_by_name() {
        let parsed = |line: &str| {
            let parsed = parse(line, &mut Sticky::default(), &Reset::default());
            parsed.expect("accepted").expect("a command").1
        };
        let args = parsed("migrate -d -i \"tcp:a b\"");
        assert!(args.flag("detach") && args.flag("inc") && !args.flag("blk"));
        assert_eq!(args.text("uri").ok(), Some("tcp:a b"));
        assert!(args.int("uri").is_err());
        assert_eq!(parsed("info registers 3").int_if_any("vcpu"), Some(3));
        assert_eq!(parsed("info registers").int_if_any("vcpu"), None);
        assert_eq!(parsed("i/b 0x70. 5").int_if_any("index"), Some(5));
        assert_eq!(parsed("i/b 0x70").int_if_any("index"), None);
        assert!(parsed("cont -f").flag("force"));
        assert_eq!(parsed("help  a  b ").text_if_any("name"), Some("a  b "));
    }

    #[test]
    fn splits_words() {
        assert_eq!(
            words(" a \"b c\"  d"),
            Some(vec!["a".to_owned(), "b c".to_owned(), "d".to_owned()])
        );
        assert_eq!(words("a \"b"), None);
    }

    proptest! {
        #[test]
        fn no_line_panics(line in "\\PC{0,80}") {
            let _ = parse(&line, &mut Sticky::default(), &Reset::default());
        }

        #[test]
        fn no_command_line_panics(
            line in "(migrate|x|print|i|o|help|info registers|closefd) [-dbi/xgw \"\\\\$()'+*0-9a-f.~%]{0,40}"
        ) {
            let _ = parse(&line, &mut Sticky::default(), &Reset::default());
        }

        #[test]
        fn quoting_gives_back_any_word(word in "[^\\x00-\\x1f]{0,40}") {
            let quoted = word.replace('\\', "\\\\").replace('"', "\\\"");
            prop_assert_eq!(words(&format!("\"{quoted}\"")), Some(vec![word]));
        }
    }
}
