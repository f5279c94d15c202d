//! The program as a whole: chardevs, machine, monitors and event loop, put together and run.
//!
//! Starts what a [`Config`] describes and stays until the operator, a signal or the guest ends it.

use std::io::{self, IsTerminal};
use std::sync::Arc;

use crate::chardev::{self, Chardev};
use crate::cli::daemon;
use crate::cli::pidfile::Pidfile;
use crate::config::{ChardevKind, Config};
use crate::control::{Control, Error, NamedFds, Shared};
use crate::errno::Errno;
use crate::event::Event;
use crate::event_loop::{self, Signals};
use crate::logger;
use crate::migration::channel;
use crate::monitor::history::History;
use crate::monitor::session::Session;
use crate::monitor::shell::Shell;
use crate::monitor::{script, terminal, wire};
use crate::poll::Poll;

/// Runs the program and returns its exit status: 0, or 1 when a command of `-e` or `-script`, or
/// an incoming migration that can not be repeated, failed.
///
/// # Errors
/// What kept it from starting.
pub fn run(config: Config) -> Result<u8, Error> {
    // First: what is not taken over here would reach the children of exec:.
    let inherited = claim_descriptors(&config);
    if config.daemonize {
        daemon::detach().map_err(Error::new)?;
    }
    start_log(&config)?;
    let _pidfile = config
        .pidfile
        .as_deref()
        .map(Pidfile::create)
        .transpose()
        .map_err(Error::new)?;
    let poll = Poll::new().map_err(Error::new)?;
    let signals = Signals::install(&poll).map_err(Error::new)?;
    let has_terminal = io::stdin().is_terminal() && io::stdout().is_terminal();
    let chardevs = open_chardevs(&config, &poll, &signals, has_terminal)?;
    let control = Control::new(config, poll, chardevs, inherited)?;
    control.launch()?;
    obey_signals(&signals, &control, has_terminal);
    attach_monitors(&control)?;
    if has_commands(&control) {
        script::start(&control)?;
    }
    if control.config().daemonize {
        daemon::ready().map_err(Error::new)?;
    }
    event_loop::run(control.poll(), || control.exit_status().is_some()).map_err(Error::new)?;
    control.shut_down();
    Ok(control.exit_status().unwrap_or(0))
}

/// What the program was started with, for `fd:N`; standard input too if nobody else reads it.
fn claim_descriptors(config: &Config) -> NamedFds {
    let mut inherited = channel::inherited::claim();
    let is_read = config
        .chardevs
        .iter()
        .any(|chardev| chardev.kind == ChardevKind::Stdio);
    if !is_read
        && !io::stdin().is_terminal()
        && let Ok(stdin) = channel::inherited::claim_stdin()
    {
        inherited.insert("0".to_owned(), stdin);
    }
    inherited
}

fn start_log(config: &Config) -> Result<(), Error> {
    if let Some(path) = &config.log_file {
        logger::to_file(path)
            .map_err(|error| Error(format!("-D {}: {}", path.display(), Errno(&error))))?;
    }
    if config.log_items.is_empty() {
        return Ok(());
    }
    logger::switch(&config.log_items.join(","))
        .map_err(|word| Error(format!("-d: invalid log item: {word}")))
}

/// All but the terminal, which the shell drives.
fn open_chardevs(
    config: &Config,
    poll: &Poll,
    signals: &Signals,
    has_terminal: bool,
) -> Result<Vec<Arc<dyn Chardev>>, Error> {
    config
        .chardevs
        .iter()
        .filter(|chardev| !(has_terminal && chardev.kind == ChardevKind::Stdio))
        .map(|chardev| chardev::open(chardev, poll, &|| signals.is_pending()).map_err(Error::new))
        .collect()
}

fn attach_monitors(control: &Shared) -> Result<(), Error> {
    for monitor in &control.config().monitors {
        match control.chardev(&monitor.chardev) {
            Some(chardev) => {
                wire::attach(control, chardev, control.poll(), &control.config().prompt);
            }
            None => start_shell(control)?,
        }
    }
    Ok(())
}

/// The terminal has a thread of its own: reading a line can not be interrupted.
fn start_shell(control: &Shared) -> Result<(), Error> {
    let control = control.clone();
    let run = move || {
        let session = Session::new(control.clone(), Box::new(io::stdout()), History::default());
        let shell = match Shell::new(session, &control.config().prompt) {
            Ok(shell) => shell,
            Err(error) => return log::error!("The terminal can not be used: {error}"),
        };
        let (notices, lines) = (shell.notices(), shell.notices());
        logger::to_sink(Box::new(move |line| lines.print(line)));
        control.subscribe(Box::new(move |event| {
            if let Event::Notice(text) = event {
                notices.print(text);
            }
        }));
        shell.run();
    };
    std::thread::Builder::new()
        .name("shell".to_owned())
        .spawn(run)
        .map_err(|error| Error(format!("Failed to start the shell's thread: {error}")))?;
    Ok(())
}

/// A signal ends the program as `quit` does; at a terminal ^C is the shell's business.
fn obey_signals(signals: &Signals, control: &Shared, has_terminal: bool) {
    let control = control.clone();
    signals.receive(Box::new(move |signal| {
        if has_terminal && signal.is_interrupt() {
            return;
        }
        terminal::restore();
        log::warn!("{signal}");
        control.quit();
    }));
}

fn has_commands(control: &Control) -> bool {
    !control.config().commands.is_empty() || control.config().script.is_some()
}
