//! The shell on the operator's terminal: rustyline around an interpreter.
//!
//! It owns the terminal as long as it runs, on a thread of its own (a read can not be woken);
//! [`super::terminal`] puts the terminal back whatever ends the program. History is kept in the
//! user's state directory. A migration in the foreground is shown by `foreground`.

use std::cell::RefCell;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::{env, fs, io};

use rustyline::config::{BellStyle, CompletionType, Configurer};
use rustyline::error::ReadlineError;
use rustyline::history::FileHistory;
use rustyline::{
    Cmd, ConditionalEventHandler, Config, Editor, Event, EventContext, EventHandler, KeyEvent,
    RepeatCount,
};

use self::foreground::End;
use self::helper::Helper;
pub use self::notices::Notices;
use super::conversation::banner;
use super::interpreter::Interpreter;
use super::session::{Outcome, conclusion};
use super::terminal::{self, Keys, say};
use crate::migration::stats::{Snapshot, Status};

mod foreground;
mod helper;
mod notices;

/// A shell that has the terminal.
pub struct Shell<I: Interpreter> {
    interpreter: Rc<RefCell<I>>,
    editor: Editor<Helper<I>, FileHistory>,
    prompt: String,
    notices: Notices,
    history: Option<PathBuf>,
    /// Whether ^C ended the line.
    was_interrupted: Arc<AtomicBool>,
    /// Typed while a migration ran in the foreground.
    ahead: String,
    /// Between two lines too nothing is echoed, and ^C and ^Z are keys. None on a terminal that
    /// edits its lines itself.
    keys: Option<Keys>,
}

impl<I: Interpreter + 'static> Shell<I> {
    /// Takes the terminal. Fails if standard input or output is none.
    pub fn new(interpreter: I, prompt: &str) -> io::Result<Self> {
        terminal::save()?;
        terminal::restore_on_panic();
        let keys = if terminal::is_dumb() {
            None
        } else {
            Some(Keys::grab()?)
        };
        let mut config = Config::builder();
        config.enable_synchronized_output(false);
        let config = config
            .bracketed_paste(false)
            .completion_type(CompletionType::List)
            .bell_style(BellStyle::None)
            .auto_add_history(false)
            .max_history_size(HISTORY_LINES)
            .map_err(into_io)?
            .build();
        let mut editor = Editor::with_config(config).map_err(into_io)?;
        let interpreter = Rc::new(RefCell::new(interpreter));
        editor.set_helper(Some(Helper::new(Rc::clone(&interpreter))));
        let was_interrupted = Arc::new(AtomicBool::new(false));
        let interrupt = Interrupt(Arc::clone(&was_interrupted));
        editor.bind_sequence(
            KeyEvent::ctrl('C'),
            EventHandler::Conditional(Box::new(interrupt)),
        );
        editor.bind_sequence(
            KeyEvent::ctrl('D'),
            EventHandler::Conditional(Box::new(EndOfInput)),
        );
        editor.bind_sequence(KeyEvent::ctrl('Z'), EventHandler::Simple(Cmd::Noop));
        // A dumb terminal has none.
        let notices = Notices::new(editor.create_external_printer().ok());
        let history = history_file();
        if let Some(path) = &history {
            // There is none the first time.
            let _ = editor.load_history(path);
        }
        Ok(Self {
            interpreter,
            editor,
            prompt: prompt.to_owned(),
            notices,
            history,
            was_interrupted,
            ahead: String::new(),
            keys,
        })
    }

    /// Where others print while the shell runs.
    pub fn notices(&self) -> Notices {
        self.notices.clone()
    }

    /// Talks with the operator until `quit`, or until the terminal is gone: then the virtual
    /// machine runs on without it.
    pub fn run(mut self) {
        say(&banner());
        while let Some(line) = self.line() {
            if !self.execute(&line) {
                break;
            }
        }
        terminal::restore();
    }

    /// The next line: typed ahead, or read. `None` at the end of input.
    fn line(&mut self) -> Option<String> {
        if let Some((line, rest)) = self.ahead.split_once('\n') {
            let (line, rest) = (line.to_owned(), rest.to_owned());
            self.ahead = rest;
            say(&format!("{}{line}\n", self.prompt));
            return Some(line);
        }
        loop {
            let typed = std::mem::take(&mut self.ahead);
            match self
                .editor
                .readline_with_initial(&self.prompt, (&typed, ""))
            {
                Ok(line) if self.was_interrupted.swap(false, Ordering::Relaxed) => {
                    if line.is_empty() {
                        say("Type quit to end the VM\n");
                    }
                }
                Ok(line) => return Some(line),
                // ^\ is as good as ^C, but takes with it what was typed ahead.
                Err(ReadlineError::Interrupted) => (),
                Err(ReadlineError::Eof) => return None,
                // A signal or a resized window: ask again.
                Err(ReadlineError::Signal(_)) => (),
                Err(_) if terminal::is_released() => return None,
                // A byte that is no UTF-8 takes its line with it, and nothing else.
                Err(ReadlineError::Io(error)) if error.kind() == io::ErrorKind::InvalidData => {
                    say("hmpsh: what was typed is not UTF-8\n");
                }
                Err(error) => {
                    say(&format!("hmpsh: the terminal can not be read: {error}\n"));
                    return None;
                }
            }
        }
    }

    /// False when the program is about to end.
    fn execute(&mut self, line: &str) -> bool {
        self.remember(line);
        let outcome = self.interpreter.borrow_mut().execute(line);
        match outcome {
            Outcome::Done | Outcome::Failed => true,
            Outcome::Quit => false,
            Outcome::Suspended => {
                let mut interpreter = self.interpreter.borrow_mut();
                // Without them there still is a migration to wait for.
                let _keys = self.keys.is_none().then(Keys::grab);
                match foreground::wait(&mut *interpreter, &mut self.ahead, &self.notices) {
                    End::Over => {
                        interpreter.conclude();
                    }
                    End::Detached => {
                        say("Migration continues in the background\n");
                        let notices = self.notices.clone();
                        interpreter.when_migration_ends(Box::new(move |snapshot| {
                            notices.print(&ended(snapshot));
                        }));
                    }
                }
                true
            }
        }
    }

    fn remember(&mut self, line: &str) {
        if line.is_empty() {
            return;
        }
        self.interpreter.borrow().history().add(line);
        let is_new = self.editor.add_history_entry(line).unwrap_or(false);
        if let (true, Some(path)) = (is_new, &self.history) {
            // After each line: a program that is killed has not lost what was typed. A history
            // that can not be written is no reason to bother an operator.
            let _ = self.editor.append_history(path);
        }
    }
}

/// What the operator is told of the end of a migration nobody waited for.
fn ended(snapshot: &Snapshot) -> String {
    match snapshot.status {
        Status::Completed => "Migration completed".to_owned(),
        Status::Cancelled => "Migration cancelled".to_owned(),
        _ => conclusion(snapshot).trim_end().to_owned(),
    }
}

/// ^C: ends the line like Enter and notes that it is not to be executed. The editor's own way to
/// interrupt would lose what was typed behind it.
struct Interrupt(Arc<AtomicBool>);

impl ConditionalEventHandler for Interrupt {
    fn handle(&self, _: &Event, _: RepeatCount, _: bool, _: &EventContext) -> Option<Cmd> {
        self.0.store(true, Ordering::Relaxed);
        Some(Cmd::AcceptLine)
    }
}

/// ^D: nothing on an empty line, so that it does not end anything; else it deletes, as usual.
struct EndOfInput;

impl ConditionalEventHandler for EndOfInput {
    fn handle(&self, _: &Event, _: RepeatCount, _: bool, context: &EventContext) -> Option<Cmd> {
        context.line().is_empty().then_some(Cmd::Noop)
    }
}

/// `$XDG_STATE_HOME/hmpsh/history`, its directory made; `None` if there is no place for it.
fn history_file() -> Option<PathBuf> {
    let from = |name| {
        env::var_os(name)
            .map(PathBuf::from)
            .filter(|path| path.is_absolute())
    };
    // Who has no home (`/nonexistent`, as Debian's system users) is not given one.
    let home = || from("HOME").filter(|home| home.is_dir());
    let state = from("XDG_STATE_HOME").or_else(|| Some(home()?.join(".local/state")))?;
    let directory = state.join("hmpsh");
    fs::create_dir_all(&directory).ok()?;
    Some(directory.join("history"))
}

fn into_io(error: ReadlineError) -> io::Error {
    match error {
        ReadlineError::Io(error) => error,
        ReadlineError::Errno(error) => error.into(),
        other => io::Error::other(other),
    }
}

/// Lines kept in the file.
const HISTORY_LINES: usize = 1000;
