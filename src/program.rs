//! The program as a whole: chardevs, machine, monitors and event loop, put together and run.
//!
//! Starts what a [`Config`] describes and stays until the operator, a signal or the guest ends it.

use std::io::{self, IsTerminal};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::chardev::{self, Chardev};
use crate::cli::daemon;
use crate::cli::pidfile::Pidfile;
use crate::config::{ChardevConfig, ChardevKind, Config};
use crate::control::{Control, Error, NamedFds, Shared};
use crate::errno::Errno;
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
    let shell = Arc::new(AtomicBool::new(false));
    let chardevs = open_chardevs(&config, &poll, &signals)?;
    let control = Control::new(config, poll, chardevs, inherited)?;
    control.launch()?;
    obey_signals(&signals, &control, &shell);
    let _terminal = Terminal::take(control.config())?;
    attach_monitors(&control, &shell)?;
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

/// All but the terminal, if a shell drives it.
fn open_chardevs(
    config: &Config,
    poll: &Poll,
    signals: &Signals,
) -> Result<Vec<Arc<dyn Chardev>>, Error> {
    let shell = terminal_of_shell(config);
    let open = |chardev: &ChardevConfig| {
        chardev::open(chardev, poll, &|| signals.is_pending()).map_err(|error| {
            let ChardevConfig { id, kind } = chardev;
            Error(format!("chardev {id} ({kind}): {error}"))
        })
    };
    let mut chardevs = config.chardevs.iter();
    let rest = chardevs.by_ref().filter(|chardev| Some(*chardev) != shell);
    rest.map(open).collect()
}

/// The chardev a shell is to drive: standard input and output, if they are a terminal and a
/// monitor is there.
fn terminal_of_shell(config: &Config) -> Option<&ChardevConfig> {
    let is_monitor = |chardev: &ChardevConfig| {
        let mut monitors = config.monitors.iter();
        monitors.any(|monitor| monitor.chardev == chardev.id)
    };
    let mut chardevs = config.chardevs.iter();
    chardevs
        .find(|chardev| chardev.kind == ChardevKind::Stdio && is_monitor(chardev))
        .filter(|_| terminal::is_there())
}

/// The terminal the program was started on: given back as it was, however [`run`] ends.
struct Terminal;

impl Terminal {
    /// A serial port on the terminal gets each key; a shell takes the terminal by itself.
    fn take(config: &Config) -> Result<Self, Error> {
        let mut chardevs = config.chardevs.iter();
        let is_used = chardevs.any(|chardev| chardev.kind == ChardevKind::Stdio);
        if is_used && terminal::is_there() && terminal_of_shell(config).is_none() {
            terminal::pass_keys().map_err(Error::new)?;
        }
        Ok(Self)
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        terminal::release();
    }
}

/// Says so when it is dropped: the shell has ended, orderly or by a panic.
struct Alive(Arc<AtomicBool>);

impl Drop for Alive {
    fn drop(&mut self) {
        self.0.store(false, Ordering::SeqCst);
    }
}

fn attach_monitors(control: &Shared, shell: &Arc<AtomicBool>) -> Result<(), Error> {
    for monitor in &control.config().monitors {
        match control.chardev(&monitor.chardev) {
            Some(chardev) => {
                wire::attach(control, chardev, control.poll(), &control.config().prompt);
            }
            None => start_shell(control, shell)?,
        }
    }
    Ok(())
}

/// The terminal has a thread of its own: reading a line can not be interrupted.
fn start_shell(control: &Shared, alive: &Arc<AtomicBool>) -> Result<(), Error> {
    let control = control.clone();
    alive.store(true, Ordering::SeqCst);
    let alive = Alive(Arc::clone(alive));
    let run = move || {
        let _alive = alive;
        let session = Session::new(control.clone(), Box::new(io::stdout()), History::default());
        let shell = match Shell::new(session, &control.config().prompt) {
            Ok(shell) => shell,
            Err(error) => return log::error!("The terminal can not be used: {error}"),
        };
        let notices = shell.notices();
        logger::to_sink(Box::new(move |line| notices.print(line)));
        shell.run();
        logger::to_stderr();
    };
    std::thread::Builder::new()
        .name("shell".to_owned())
        .spawn(run)
        .map_err(|error| Error(format!("Failed to start the shell's thread: {error}")))?;
    Ok(())
}

/// A signal ends the program as `quit` does; as long as there is a shell ^C is its business.
fn obey_signals(signals: &Signals, control: &Shared, shell: &Arc<AtomicBool>) {
    let (control, shell) = (control.clone(), Arc::clone(shell));
    signals.receive(Box::new(move |signal| {
        let has_shell = shell.load(Ordering::SeqCst);
        if has_shell && signal.is_interrupt() {
            return;
        }
        terminal::release();
        logger::to_stderr();
        if has_shell {
            // Off the line that is being typed.
            terminal::say("\n");
        }
        log::warn!("{signal}");
        control.quit();
    }));
}

fn has_commands(control: &Control) -> bool {
    !control.config().commands.is_empty() || control.config().script.is_some()
}
