//! How an outgoing migration ends: the only place that lets the guest go, or takes it back.

use std::io::ErrorKind;
use std::time::Duration;

use super::Run;
use crate::iov::Out;
use crate::migration::Error;
use crate::migration::channel::Fault;
use crate::migration::dirty_bitmap::BitmapSave;
use crate::migration::handover::Peer;
use crate::migration::return_path::CLOSED;
use crate::migration::section::Command;
use crate::migration::stats::Status;
use crate::vm::guest;
use crate::vm::run_state::RunState;

impl Run<'_> {
    /// The guest is elsewhere.
    pub(super) fn succeed(mut self) -> Result<(), Error> {
        self.writer.progress.end_downtime();
        self.end_ram(true);
        let stopped = self.order.guest.stop(RunState::PostMigrate);
        self.writer
            .progress
            .finish(self.writer.sent(), Status::Completed, |_| {});
        Ok(stopped.map(drop)?)
    }

    /// Nothing was moved, or nobody knows. Every dirty bit is given back; the guest goes on here
    /// unless the destination may have it. Returns the error that the operator should see.
    pub(super) fn fail(mut self, error: Error) -> Error {
        let error = self.reason(error);
        self.end_ram(false);
        let is_cancel = error.is_cancel() && !self.is_ambiguous;
        let trouble = if self.is_ambiguous {
            self.order.guest.stop(RunState::PostMigrate).map(drop)
        } else {
            self.resume()
        };
        if !self.is_ambiguous {
            self.tell(&error);
        }
        self.writer.channel().abandon();
        let mut text = error.to_string();
        if self.is_ambiguous {
            text = format!("{text}. {UNKNOWN}");
        }
        if let Err(trouble) = trouble {
            text = format!("{text}; then the guest could not be resumed: {trouble}");
            if self.order.guest.run_state() == RunState::Paused {
                text.push_str("; it stays paused here, and `cont` tries again");
            }
        }
        let status = if is_cancel {
            Status::Cancelled
        } else {
            Status::Failed
        };
        let is_ambiguous = self.is_ambiguous;
        self.writer
            .progress
            .finish(self.writer.sent(), status, |snapshot| {
                snapshot.error = (!is_cancel).then(|| text.clone());
                snapshot.handover_unknown = is_ambiguous;
            });
        if is_cancel { error } else { Error::Ended(text) }
    }

    /// A broken connection says little: the destination may have told why before it broke. And
    /// what breaks because the operator cancelled is a cancel.
    fn reason(&mut self, error: Error) -> Error {
        if self.order.cancel.is_cancelled() && !self.is_ambiguous {
            return Fault::Cancelled.into();
        }
        let is_broken = matches!(error, Error::Channel(_)) && !error.is_cancel();
        if is_broken && matches!(self.peer, Peer::Hmpsh | Peer::Stock) {
            return self
                .return_path
                .last_words(self.writer.channel())
                .unwrap_or_else(|| wordless(error));
        }
        error
    }

    fn end_ram(&mut self, success: bool) {
        // What was written to a disk is in its image: nothing is to be given back.
        self.block = None;
        // The operator has the bitmaps again, as they are.
        self.bitmaps = BitmapSave::default();
        if let Some(ram) = self.ram.take() {
            ram.cleanup(success);
        }
    }

    /// Back to what the guest was doing; where that can not be, it is left to the operator, who may
    /// know who has its images.
    fn resume(&mut self) -> Result<(), guest::Error> {
        let (Some(before), guest) = (self.before, self.order.guest) else {
            return Ok(());
        };
        let resumed = guest.claim_drives().and_then(|()| match before {
            RunState::Running => guest.start(),
            before => guest.stop(before).map(drop),
        });
        if resumed.is_err() && guest.run_state() == RunState::FinishMigrate {
            guest.stop(RunState::Paused)?;
        }
        resumed
    }

    /// Tells hmpsh why the stream ends here, if it ends where a command may stand. Best effort.
    fn tell(&mut self, error: &Error) {
        if self.peer != Peer::Hmpsh || self.writer.is_torn() || matches!(error, Error::Peer(_)) {
            return;
        }
        let text = if error.is_cancel() {
            "cancelled".to_owned()
        } else {
            error.to_string()
        };
        let mut bytes = Vec::new();
        Command::Abandon.put(&text.as_bytes()[..text.len().min(LONGEST)], &mut bytes);
        if error.is_cancel() {
            return self.writer.channel().part(&bytes);
        }
        let _ = self
            .writer
            .channel()
            .write(&[Out::from(&bytes[..])], BRIEFLY);
    }
}

/// A destination that ends with bytes unread resets the connection, one that has read them closes
/// it: which of the two is chance, and must not be what the operator is left with.
fn wordless(error: Error) -> Error {
    match &error {
        Error::Channel(Fault::Io { source, .. })
            if matches!(
                source.kind(),
                ErrorKind::BrokenPipe | ErrorKind::ConnectionReset
            ) =>
        {
            Fault::Failed(format!("{CLOSED} ({error})")).into()
        }
        _ => error,
    }
}

const UNKNOWN: &str = "Nobody here knows who has the guest: look with `info status` at the \
                       destination; if it does not have it, `cont -f` runs it here";
/// Longest text of an ABANDON.
const LONGEST: usize = 512;
/// A courtesy is not worth waiting for.
const BRIEFLY: Duration = Duration::from_millis(50);
