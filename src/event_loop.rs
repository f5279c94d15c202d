//! Runs the poll registry, and turns signals into callbacks on its thread; no policy.

mod signal;

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use crate::poll::{Interest, Poll, Registration};

pub use signal::Signal;

/// Serves the registry until `is_over` says so; it is asked after every turn.
///
/// # Errors
/// What `poll(2)` says.
pub fn run(poll: &Poll, is_over: impl Fn() -> bool) -> io::Result<()> {
    while !is_over() {
        poll.turn(None)?;
    }
    Ok(())
}

/// `SIGINT`, `SIGTERM`, `SIGHUP` and `SIGQUIT`, delivered through the registry. While it exists they
/// do nothing else to the process.
pub struct Signals {
    mailbox: Arc<Mutex<Mailbox>>,
    _registration: Registration,
    _handlers: signal::Handlers,
}

#[derive(Default)]
struct Mailbox {
    /// Those nobody asked for yet, oldest first.
    early: Vec<Signal>,
    receiver: Option<Receiver>,
}

/// Who is told of signals, on the event loop's thread.
pub type Receiver = Box<dyn FnMut(Signal) + Send>;

impl Signals {
    /// Takes the signals over. (`SIGPIPE` is ignored by Rust's own start-up.)
    ///
    /// # Errors
    /// Out of descriptors.
    pub fn install(poll: &Poll) -> io::Result<Self> {
        let (handlers, fd) = signal::Handlers::install()?;
        let fd = Arc::new(fd);
        let mailbox: Arc<Mutex<Mailbox>> = Arc::default();
        let source = Arc::clone(&fd);
        let target = Arc::clone(&mailbox);
        let interest = Interest {
            readable: true,
            ..Interest::default()
        };
        let ready = Box::new(move |_| {
            while let Some(signal) = signal::next(&source) {
                deliver(&target, signal);
            }
        });
        Ok(Self {
            mailbox,
            _registration: poll.register(fd, interest, ready),
            _handlers: handlers,
        })
    }

    /// Whether a signal has come that nobody was told of: a start that waits should give up.
    pub fn is_pending(&self) -> bool {
        !self
            .mailbox
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .early
            .is_empty()
    }

    /// Tells `receiver` of every signal, of those that came before at once.
    pub fn receive(&self, mut receiver: Receiver) {
        loop {
            let mut mailbox = self.mailbox.lock().unwrap_or_else(PoisonError::into_inner);
            let early = std::mem::take(&mut mailbox.early);
            if early.is_empty() {
                mailbox.receiver = Some(receiver);
                return;
            }
            drop(mailbox);
            early.into_iter().for_each(&mut receiver);
        }
    }
}

/// The receiver is called without the lock: it may ask for pending signals or replace itself.
fn deliver(mailbox: &Mutex<Mailbox>, signal: Signal) {
    let lock = || mailbox.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(mut receiver) = lock().receiver.take() else {
        lock().early.push(signal);
        return;
    };
    receiver(signal);
    lock().receiver.get_or_insert(receiver);
}

#[cfg(test)]
mod tests {
    use std::process::Command;
    use std::sync::mpsc;
    use std::time::Duration;

    use rustix::process::{getpid, kill_process};

    use super::*;

    /// Runs one test of this module alone in a process of its own: signals are the process's.
    fn alone(name: &str) -> bool {
        if std::env::var_os("HMPSH_TEST_SIGNALS").is_some() {
            return true;
        }
        let output = Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                &format!("event_loop::tests::{name}"),
                "--test-threads=1",
            ])
            .env("HMPSH_TEST_SIGNALS", "1")
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(
            output.status.success() && said.contains("1 passed"),
            "{said}"
        );
        false
    }

    #[test]
    fn a_signal_is_a_callback_that_knows_its_sender() {
        if !alone("a_signal_is_a_callback_that_knows_its_sender") {
            return;
        }
        let poll = Poll::new().unwrap();
        let signals = Signals::install(&poll).unwrap();
        assert!(!signals.is_pending());
        kill_process(getpid(), rustix::process::Signal::TERM).unwrap();
        while !signals.is_pending() {
            poll.turn(Some(Duration::from_secs(5))).unwrap();
        }
        let (tell, told) = mpsc::channel();
        signals.receive(Box::new(move |signal| {
            tell.send(signal.to_string()).unwrap();
        }));
        assert!(!signals.is_pending());
        kill_process(getpid(), rustix::process::Signal::INT).unwrap();
        let mut said = Vec::new();
        while said.len() < 2 {
            poll.turn(Some(Duration::from_millis(20))).unwrap();
            said.extend(told.try_iter());
        }
        let own = getpid();
        let name = std::env::args().next().unwrap();
        let expected = |number| format!("terminating on signal {number} from pid {own} ({name})");
        assert_eq!(said, [expected(15), expected(2)]);
    }

    #[test]
    fn a_child_can_still_be_terminated() {
        if !alone("a_child_can_still_be_terminated") {
            return;
        }
        let poll = Poll::new().unwrap();
        let _signals = Signals::install(&poll).unwrap();
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        kill_process(
            rustix::process::Pid::from_child(&child),
            rustix::process::Signal::TERM,
        )
        .unwrap();
        let status = child.wait().unwrap();
        assert_eq!(
            std::os::unix::process::ExitStatusExt::signal(&status),
            Some(15)
        );
    }

    #[test]
    fn the_loop_runs_until_it_is_told() {
        let poll = Poll::new().unwrap();
        let over = Arc::new(std::sync::atomic::AtomicBool::new(false));
        let (other, set) = (poll.clone(), Arc::clone(&over));
        let thread = std::thread::spawn(move || {
            set.store(true, std::sync::atomic::Ordering::SeqCst);
            other.defer(Box::new(|| ()));
        });
        run(&poll, || over.load(std::sync::atomic::Ordering::SeqCst)).unwrap();
        thread.join().unwrap();
    }
}
