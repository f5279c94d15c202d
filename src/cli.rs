//! QEMU's option grammar to a `Config`.
//!
//! One table (`table.rs`) drives parser, help and man page. What a QEMU option asks for and this
//! version does not build is refused by name; nothing is accepted and ignored. Nothing is opened
//! or started here. Counterpart: QEMU's `qemu-options.hx` and `system/vl.c`.

mod character;
pub mod daemon;
mod disk;
mod draft;
mod foreign;
mod keyval;
mod machine;
mod man;
mod memory;
pub mod pidfile;
mod program;
mod table;

use std::ffi::OsString;

use crate::config::Config;
pub use disk::hot_drive;
use draft::Draft;
use table::{OPTIONS, Row};

/// What the command line asks for.
#[derive(Clone, Debug)]
pub enum Request {
    /// Run a machine.
    Run(Box<Config>),
    /// Print this and be done (`-help`, `-version`).
    Print(String),
    /// `hmpsh demo`.
    Demo,
}

/// Why a command line is refused; the text does not begin with the program's name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// An option, as it was typed, and what is wrong with it.
    #[error("{option}: {text}")]
    Option {
        /// `-m foo`.
        option: String,
        /// QEMU's sentence.
        text: String,
    },
    /// Options that do not go together.
    #[error("{0}")]
    Whole(String),
}

/// Reads the arguments (without the program's own name). `-opt` and `--opt` are the same.
///
/// # Errors
/// The first thing that is wrong.
pub fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Request, Error> {
    let mut words = Vec::new();
    for argument in arguments {
        let refused = |argument: OsString| Error::Option {
            option: argument.to_string_lossy().into_owned(),
            text: "is not UTF-8".to_owned(),
        };
        words.push(argument.into_string().map_err(refused)?);
    }
    match words.first().map(String::as_str) {
        Some("demo") => sub_command(&words).map(|()| Request::Demo),
        Some("inspect") => Err(not_built("inspect")),
        _ => options(&words),
    }
}

fn sub_command(words: &[String]) -> Result<(), Error> {
    match words.get(1) {
        None => Ok(()),
        Some(extra) => Err(Error::Option {
            option: words[0].clone(),
            text: format!("unexpected argument '{extra}'"),
        }),
    }
}

fn options(words: &[String]) -> Result<Request, Error> {
    let mut draft = Draft::default();
    let mut words = words.iter();
    while let Some(word) = words.next() {
        let Some(name) = word.strip_prefix("--").or_else(|| word.strip_prefix('-')) else {
            return Err(Error::Option {
                option: word.clone(),
                text: "disk images: not built in this version".to_owned(),
            });
        };
        let Some(row) = OPTIONS.iter().find(|row| row.names.contains(&name)) else {
            return Err(unknown(word, name));
        };
        let value = match row.argument {
            None => "",
            Some(_) => words.next().ok_or_else(|| Error::Option {
                option: word.clone(),
                text: "requires an argument".to_owned(),
            })?,
        };
        if let Some(request) = obey(row, word, value, &mut draft)? {
            return Ok(request);
        }
    }
    Ok(Request::Run(Box::new(draft.finish()?)))
}

fn obey(row: &Row, word: &str, value: &str, draft: &mut Draft) -> Result<Option<Request>, Error> {
    let option = match row.argument {
        Some(_) => format!("{word} {value}"),
        None => word.to_owned(),
    };
    draft.option.clone_from(&option);
    match (row.handler)(draft, value) {
        Ok(()) => Ok(draft.print.take().map(Request::Print)),
        Err(text) => Err(Error::Option { option, text }),
    }
}

fn unknown(word: &str, name: &str) -> Error {
    if foreign::OPTIONS.contains(&name) {
        return not_built(word);
    }
    Error::Option {
        option: word.to_owned(),
        text: "invalid option".to_owned(),
    }
}

fn not_built(word: &str) -> Error {
    Error::Option {
        option: word.to_owned(),
        text: "not built in this version".to_owned(),
    }
}

#[cfg(test)]
mod tests;
