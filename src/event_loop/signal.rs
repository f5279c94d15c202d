//! Signals as a descriptor: the handler writes what came into a pipe.
//!
//! One of the rooms where `unsafe` may live: a handler is a bare function that runs between any
//! two instructions. It calls `write(2)` and nothing else. Not `signalfd`: it needs the signals
//! blocked, and the commands of `exec:` would inherit that and could not be terminated.
//! The pipe's number is one of the pieces of global state the program allows itself.
#![expect(unsafe_code, reason = "signal handlers have no safe wrapper")]

use std::fmt;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicI32, Ordering};

use rustix::pipe::{PipeFlags, pipe_with};

/// What came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Signal {
    /// Its number.
    pub number: i32,
    /// Who sent it; 0: the kernel (Ctrl-C, a terminal that went away).
    pub sender: u32,
    /// The sender's program as it was started, if it could still be found.
    pub program: Option<String>,
}

impl Signal {
    /// Whether it is what ^C sends.
    pub fn is_interrupt(&self) -> bool {
        self.number == libc::SIGINT
    }
}

impl fmt::Display for Signal {
    /// QEMU's line, without the program's own name.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "terminating on signal {}", self.number)?;
        if self.sender == 0 {
            return Ok(());
        }
        let program = self.program.as_deref().unwrap_or("<unknown process>");
        write!(f, " from pid {} ({program})", self.sender)
    }
}

/// The signals that end the program.
const TAKEN: [libc::c_int; 4] = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT];

/// Where the handler writes; -1: nowhere.
static WAKEUP: AtomicI32 = AtomicI32::new(-1);

/// Bytes the handler writes for a signal: its number and its sender.
const RECORD: usize = 8;

/// The handlers in place, and their pipe. Dropping it gives the signals their own meaning back.
pub(super) struct Handlers {
    /// Held open for [`WAKEUP`].
    _write_end: OwnedFd,
}

impl Handlers {
    /// Puts the handlers in place and gives the descriptor to be read with [`next`]. The last one
    /// to be called gets the signals.
    pub(super) fn install() -> io::Result<(Self, OwnedFd)> {
        let (read_end, write_end) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        WAKEUP.store(write_end.as_raw_fd(), Ordering::SeqCst);
        let handlers = Self {
            _write_end: write_end,
        };
        for number in TAKEN {
            set_action(number, handle as *const () as libc::sighandler_t)?;
        }
        Ok((handlers, read_end))
    }
}

impl Drop for Handlers {
    fn drop(&mut self) {
        for number in TAKEN {
            // It worked when the handler was put there.
            let _ = set_action(number, libc::SIG_DFL);
        }
        WAKEUP.store(-1, Ordering::SeqCst);
    }
}

fn set_action(number: libc::c_int, action: libc::sighandler_t) -> io::Result<()> {
    // SAFETY: all-zero is a valid sigaction (default action, empty mask, no flags).
    let mut wanted: libc::sigaction = unsafe { std::mem::zeroed() };
    wanted.sa_sigaction = action;
    wanted.sa_flags = libc::SA_SIGINFO | libc::SA_RESTART;
    // SAFETY: `wanted` is initialised and outlives the call; its action is SIG_DFL or `handle`,
    // which has the three arguments SA_SIGINFO promises; the old action is not asked for.
    let answer = unsafe { libc::sigaction(number, &raw const wanted, std::ptr::null_mut()) };
    if answer < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

extern "C" fn handle(number: libc::c_int, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    // SAFETY: with SA_SIGINFO the kernel passes a valid siginfo; who sent it is in there for every
    // signal a process or the terminal sends.
    let sender = unsafe { if info.is_null() { 0 } else { (*info).si_pid() } };
    let mut record = [0; RECORD];
    record[..4].copy_from_slice(&number.to_ne_bytes());
    record[4..].copy_from_slice(&sender.to_ne_bytes());
    // SAFETY: errno is the thread's own and must be as it was when the handler returns; write(2)
    // is async-signal-safe, the record is valid for its length, and a closed or full pipe only
    // makes it fail.
    unsafe {
        let errno = *libc::__errno_location();
        libc::write(
            WAKEUP.load(Ordering::SeqCst),
            record.as_ptr().cast(),
            RECORD,
        );
        *libc::__errno_location() = errno;
    }
}

/// The next signal, if one is waiting.
pub(super) fn next(fd: &OwnedFd) -> Option<Signal> {
    let mut record = [0; RECORD];
    if rustix::io::read(fd, &mut record).ok()? < RECORD {
        return None;
    }
    let (number, sender) = record.split_first_chunk()?;
    let sender = u32::from_ne_bytes(*sender.first_chunk()?);
    Some(Signal {
        number: i32::from_ne_bytes(*number),
        sender,
        program: program(sender),
    })
}

/// The first word of a process's command line.
fn program(pid: u32) -> Option<String> {
    let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let first = line
        .split(|byte| *byte == 0)
        .next()
        .filter(|first| !first.is_empty())?;
    Some(String::from_utf8_lossy(first).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_is_qemus() {
        let text = |number, sender, program: Option<&str>| {
            Signal {
                number,
                sender,
                program: program.map(str::to_owned),
            }
            .to_string()
        };
        assert_eq!(
            text(15, 8330, Some("python3")),
            "terminating on signal 15 from pid 8330 (python3)"
        );
        assert_eq!(
            text(15, 8330, None),
            "terminating on signal 15 from pid 8330 (<unknown process>)"
        );
        assert_eq!(text(2, 0, None), "terminating on signal 2");
    }
}
