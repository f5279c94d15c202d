//! A client of a human monitor on a unix socket, as a script is one: it sends lines and waits for
//! the prompt.

use std::io::{ErrorKind, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

/// What the monitor prints when it waits for a command.
pub(crate) const PROMPT: &str = "(qemu) ";

/// How long any command may take that is not said to take longer.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// One monitor session.
#[derive(Debug)]
pub(crate) struct Hmp {
    socket: UnixStream,
    pending: Vec<u8>,
}

impl Hmp {
    /// Connects and waits for the first prompt; `None` if nobody listens there yet, or whoever does
    /// ends before it has one.
    pub(crate) fn connect(path: &Path) -> Option<Self> {
        let socket = UnixStream::connect(path).ok()?;
        let mut hmp = Self {
            socket,
            pending: Vec::new(),
        };
        hmp.answer(PATIENCE).ok()?;
        Some(hmp)
    }

    /// Runs a command and returns what it printed, without the echo, line ends as `\n`.
    pub(crate) fn command(&mut self, line: &str) -> String {
        self.send(line);
        self.answer(PATIENCE)
            .unwrap_or_else(|so_far| panic!("no prompt after '{line}': {so_far}"))
    }

    /// Sends a line without waiting.
    pub(crate) fn send(&mut self, line: &str) {
        self.type_in(&format!("{line}\n"));
    }

    /// Sends bytes as typed.
    pub(crate) fn type_in(&mut self, bytes: &str) {
        self.socket
            .write_all(bytes.as_bytes())
            .expect("the monitor takes input");
    }

    /// Runs a command with a descriptor along with it (`getfd`).
    pub(crate) fn command_with_fd(&mut self, line: &str, fd: BorrowedFd<'_>) -> String {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let fds = [fd];
        assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
        let text = format!("{line}\n");
        let sent = sendmsg(
            &self.socket,
            &[IoSlice::new(text.as_bytes())],
            &mut control,
            SendFlags::empty(),
        )
        .expect("the monitor takes a descriptor");
        assert_eq!(sent, text.len());
        self.answer(PATIENCE)
            .unwrap_or_else(|so_far| panic!("no prompt after '{line}': {so_far}"))
    }

    /// What is printed up to the next prompt, without its first line (the echo); `Err` with what
    /// came instead when `patience` is over or the monitor is closed.
    pub(crate) fn answer(&mut self, patience: Duration) -> Result<String, String> {
        let end = Instant::now() + patience;
        while !self.pending.ends_with(PROMPT.as_bytes()) {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() || !self.receive(left) {
                return Err(String::from_utf8_lossy(&self.pending).into_owned());
            }
        }
        let text =
            String::from_utf8_lossy(&std::mem::take(&mut self.pending)).replace("\r\n", "\n");
        let text = text.strip_suffix(PROMPT).unwrap_or(&text);
        Ok(text
            .split_once('\n')
            .map_or("", |(_echo, rest)| rest)
            .to_owned())
    }

    /// Everything that has come so far and what comes within `patience`, prompt or not.
    pub(crate) fn printed_within(&mut self, patience: Duration) -> String {
        let end = Instant::now() + patience;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() || !self.receive(left) {
                return String::from_utf8_lossy(&self.pending).into_owned();
            }
        }
    }

    /// Whether something came before `patience` was over.
    fn receive(&mut self, patience: Duration) -> bool {
        let mut bytes = [0; 4096];
        self.socket
            .set_read_timeout(Some(patience))
            .expect("a read timeout can be set");
        match self.socket.read(&mut bytes) {
            Ok(n) => {
                self.pending.extend_from_slice(&bytes[..n]);
                n > 0
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => true,
            Err(_) => false,
        }
    }
}
