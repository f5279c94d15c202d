//! Channels through a shell command: its input is the outgoing stream, its output the incoming
//! one, and its exit status counts.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::PollFlags;
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};

use super::descriptor::{Descriptor, Kind};
use super::{Cancel, Channel, Error, Fault};
use crate::iov::{In, Out};
use crate::socket::{Waited, wait};

/// A running command and the pipe to or from it.
#[derive(Debug)]
pub(super) struct ExecChannel {
    /// `None` once the command has been told that nothing more comes.
    wire: Option<Descriptor>,
    child: Child,
    status: Option<ExitStatus>,
    cancel: Arc<Cancel>,
    /// Whether the stream comes from it.
    is_source: bool,
}

/// How long a command that closed its pipe may take to exit before we go on without its status.
const LINGER: Duration = Duration::from_secs(1);

impl ExecChannel {
    /// Starts a command that reads the stream. What it prints goes where our errors go, never
    /// into a monitor on stdout.
    pub(super) fn to(command: &str, cancel: &Arc<Cancel>) -> Result<Self, Error> {
        let output = io::stderr()
            .as_fd()
            .try_clone_to_owned()
            .map_err(Error::Spawn)?;
        let mut child = shell(command)
            .stdin(Stdio::piped())
            .stdout(output)
            .spawn()
            .map_err(Error::Spawn)?;
        let pipe = child.stdin.take().map(OwnedFd::from);
        Self::over(pipe, child, false, cancel)
    }

    /// Starts a command that writes the stream.
    pub(super) fn from(command: &str, cancel: &Arc<Cancel>) -> Result<Self, Error> {
        let mut child = shell(command)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(Error::Spawn)?;
        let pipe = child.stdout.take().map(OwnedFd::from);
        Self::over(pipe, child, true, cancel)
    }

    fn over(
        pipe: Option<OwnedFd>,
        child: Child,
        is_source: bool,
        cancel: &Arc<Cancel>,
    ) -> Result<Self, Error> {
        let mut channel = Self {
            wire: None,
            child,
            status: None,
            cancel: Arc::clone(cancel),
            is_source,
        };
        let pipe = pipe.ok_or_else(|| Error::Spawn(io::ErrorKind::BrokenPipe.into()))?;
        // Our end of a pipe is our own description: the command's end keeps blocking.
        rustix::io::ioctl_fionbio(&pipe, true).map_err(|error| Error::Spawn(error.into()))?;
        channel.wire = Some(Descriptor::new(pipe, Kind::Command, cancel));
        Ok(channel)
    }

    /// Waits at most `patience` for the command to exit; `None`: it has not.
    fn exited(&mut self, patience: Duration) -> Result<Option<ExitStatus>, Fault> {
        let failed = |source| Fault::Io {
            what: "Unable to wait for command".to_owned(),
            source,
        };
        if self.status.is_none() {
            let pid = Pid::from_child(&self.child);
            let pidfd =
                pidfd_open(pid, PidfdFlags::empty()).map_err(|error| failed(error.into()))?;
            let interrupt = Some(self.cancel.event());
            match wait(pidfd.as_fd(), PollFlags::IN, patience, interrupt).map_err(failed)? {
                Waited::Ready => self.status = self.child.try_wait().map_err(failed)?,
                Waited::TimedOut => {}
                Waited::Interrupted => return Err(Fault::Cancelled),
            }
        }
        Ok(self.status)
    }

    /// After the stream: a command that failed behind its last byte (a checksum that is wrong)
    /// did not bring what it should. One that goes on is left alone.
    fn hear_out(&mut self) -> Result<(), Fault> {
        let end = Instant::now() + LINGER;
        let mut rest = [0; 4096];
        loop {
            let left = end.saturating_duration_since(Instant::now());
            match self.read(&mut [In::from(&mut rest[..])], left) {
                Ok(0) | Err(Fault::TimedOut) => return Ok(()),
                Ok(_) if left.is_zero() => return Ok(()),
                Ok(_) => {}
                Err(fault) => return Err(fault),
            }
        }
    }

    /// Adds the exit status to a failure that the command's early end may have caused.
    fn explain(&mut self, fault: Fault) -> Fault {
        let Fault::Io { source, .. } = &fault else {
            return fault;
        };
        if source.kind() != io::ErrorKind::BrokenPipe {
            return fault;
        }
        match self.exited(LINGER) {
            Ok(Some(status)) => Fault::Failed(format!("{fault} ({})", describe(status))),
            _ => fault,
        }
    }
}

impl Channel for ExecChannel {
    fn write(&mut self, pieces: &[Out<'_>], patience: Duration) -> Result<usize, Fault> {
        let wire = self.wire.as_mut().ok_or_else(closed)?;
        wire.write(pieces, patience)
            .map_err(|fault| self.explain(fault))
    }

    fn read(&mut self, rooms: &mut [In<'_>], patience: Duration) -> Result<usize, Fault> {
        let wire = self.wire.as_mut().ok_or_else(closed)?;
        let count = wire.read(rooms, patience)?;
        if count == 0
            && let Some(status) = self.exited(LINGER)?
            && !status.success()
        {
            let why = describe(status);
            return Err(Fault::Failed(format!("Unable to read from command: {why}")));
        }
        Ok(count)
    }

    fn is_duplex(&self) -> bool {
        false
    }

    fn settle(&mut self) -> Result<(), Fault> {
        if self.is_source {
            return self.hear_out();
        }
        self.wire = None;
        match self.exited(Duration::MAX)? {
            Some(status) if status.success() => Ok(()),
            Some(status) => Err(Fault::Failed(describe(status))),
            None => Err(Fault::TimedOut),
        }
    }

    fn abandon(&mut self) {
        self.wire = None;
        if self.status.is_none() {
            // Not reaped yet, so the group's number is still the command's. The whole group: the
            // shell's own children hold the pipe too.
            let _ = kill_process_group(Pid::from_child(&self.child), Signal::KILL);
            self.status = self.child.wait().ok();
        }
    }

    fn drain(&mut self, _patience: Duration) -> bool {
        true
    }
}

impl Drop for ExecChannel {
    fn drop(&mut self) {
        self.abandon();
    }
}

fn shell(command: &str) -> Command {
    let mut shell = Command::new("/bin/sh");
    shell.arg("-c").arg(command).process_group(0);
    shell
}

fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("command exited with status {code}"),
        (None, Some(signal)) => format!("command killed by signal {signal}"),
        (None, None) => format!("command ended: {status}"),
    }
}

fn closed() -> Fault {
    Fault::Failed("The command's pipe is closed".to_owned())
}
