//! Completion and hints for rustyline, out of the interpreter's own.

use std::borrow::Cow;
use std::cell::RefCell;
use std::env;
use std::rc::Rc;

use crossterm::style::Stylize;
use rustyline::completion::Completer;
use rustyline::highlight::Highlighter;
use rustyline::hint::Hinter;
use rustyline::validate::Validator;
use rustyline::{Context, Result};

use crate::monitor::interpreter::Interpreter;

/// What rustyline asks.
pub(super) struct Helper<I> {
    interpreter: Rc<RefCell<I>>,
    has_colour: bool,
}

impl<I: Interpreter> Helper<I> {
    pub(super) fn new(interpreter: Rc<RefCell<I>>) -> Self {
        let has_colour = env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
        Self {
            interpreter,
            has_colour,
        }
    }
}

impl<I: Interpreter> Completer for Helper<I> {
    type Candidate = String;

    fn complete(&self, line: &str, at: usize, _: &Context<'_>) -> Result<(usize, Vec<String>)> {
        let before = line.get(..at).unwrap_or(line);
        let candidates = self.interpreter.borrow().complete(before);
        let mut words = candidates.words;
        if let [only] = &mut words[..]
            && !only.ends_with(['/', ':'])
        {
            only.push(' ');
        }
        Ok((before.len().saturating_sub(candidates.typed), words))
    }
}

impl<I: Interpreter> Hinter for Helper<I> {
    type Hint = String;

    fn hint(&self, line: &str, at: usize, _: &Context<'_>) -> Option<String> {
        if at < line.len() {
            None
        } else {
            self.interpreter.borrow().hint(line)
        }
    }
}

impl<I: Interpreter> Highlighter for Helper<I> {
    fn highlight_hint<'h>(&self, hint: &'h str) -> Cow<'h, str> {
        if self.has_colour {
            Cow::Owned(hint.dim().to_string())
        } else {
            hint.into()
        }
    }
}

impl<I: Interpreter> Validator for Helper<I> {}

impl<I: Interpreter> rustyline::Helper for Helper<I> {}
