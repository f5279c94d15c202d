//! The passing of the guest, as the destination sees it.

use std::sync::PoisonError;
use std::time::Duration;

use super::{Arrival, Source};
use crate::migration::Error;
use crate::migration::block;
use crate::migration::channel::Fault;
use crate::migration::globalstate;
use crate::migration::return_path::{Message, say};
use crate::migration::section::{COMMAND, Command};
use crate::migration::stats::Status;
use crate::vm::run_state::RunState;

impl Arrival<'_> {
    /// Everything is in the guest: waits for the source to let go, and enters the guest's state.
    pub(super) fn hand_over(&mut self) -> Result<RunState, Error> {
        // A source that sends no state had `store-global-state` off: QEMU runs such a guest.
        let received = self.state.unwrap_or(RunState::Running);
        match self.source {
            Source::Hmpsh => self.take_from_hmpsh(received),
            Source::Listening => self.take_from_stock(received),
            Source::Unknown => {
                self.pass()?;
                self.enter(received)
            }
        }
    }

    fn take_from_hmpsh(&mut self, received: RunState) -> Result<RunState, Error> {
        say(self.reader.channel(), &Message::Loaded)?;
        while self.reader.u8()? == COMMAND {
            if self.command()? == Command::Go {
                self.pass()?;
                let state = self.enter(received)?;
                // The guest is here whether or not the source gets to hear it.
                if let Err(fault) = say(self.reader.channel(), &Message::Running) {
                    log::warn!("The source was not told that the guest is here: {fault}");
                }
                return Ok(state);
            }
        }
        Err(Error::stream("Something else than GO came after the end"))
    }

    /// A stock QEMU resumes the guest if it does not hear SHUT, so SHUT must have reached it
    /// before the guest may run here. If that stays unknown, the guest stays paused here.
    fn take_from_stock(&mut self, received: RunState) -> Result<RunState, Error> {
        self.pass()?;
        say(self.reader.channel(), &Message::Shut(0))?;
        if self.reader.channel().drain(DRAIN) {
            return self.enter(received);
        }
        // Told before there is a guest to continue.
        self.doubt = Some(DOUBT);
        self.show(Status::Failed, Some(DOUBT.to_owned()));
        self.enter(RunState::Paused)
    }

    /// From here on the arrival is not given up any more: the guest is about to be ours.
    fn pass(&mut self) -> Result<(), Error> {
        if self.order.point.pass() {
            Ok(())
        } else {
            Err(Fault::Cancelled.into())
        }
    }

    fn enter(&mut self, received: RunState) -> Result<RunState, Error> {
        let wish = self.order.autostart.lock();
        let wish = wish.unwrap_or_else(PoisonError::into_inner);
        let state = globalstate::entered(received, *wish);
        self.bitmaps.enable();
        let filled = self.block.finish();
        match state {
            RunState::Running => self.order.guest.start()?,
            other => {
                // In doubt the source may have resumed it, images and all.
                if self.doubt.is_none() {
                    self.order.guest.claim_drives()?;
                }
                self.order.guest.stop(other)?;
            }
        }
        self.bitmaps.keep();
        if !filled.is_empty() {
            block::sync(filled);
        }
        Ok(state)
    }
}

/// How long SHUT may take to reach a stock source's kernel.
const DRAIN: Duration = Duration::from_secs(1);
const DOUBT: &str = "The source has not taken the last message within a second and may have \
                     resumed the guest: look with `info status` there; if it has not, `cont -f` \
                     runs it here";
