//! The end of the stream, and the passing of the guest: one way for each kind of peer.

use std::time::Duration;

use super::Run;
use crate::migration::Error;
use crate::migration::channel::Fault;
use crate::migration::description;
use crate::migration::handover::Peer;
use crate::migration::integrity::Seal;
use crate::migration::return_path::{CHECK, Message};
use crate::migration::section::{Command, EOF};
use crate::vm::guest::SavedSection;

impl Run<'_> {
    /// Returns once the destination has the guest, or the bytes are safe.
    pub(super) fn hand_over(&mut self, sections: &[SavedSection]) -> Result<(), Error> {
        match self.peer {
            Peer::Hmpsh => self.hand_to_hmpsh(sections),
            Peer::Stock => self.hand_to_stock(sections),
            Peer::Silent => self.hand_to_silent(sections),
            Peer::OneWay => self.hand_to_store(sections),
        }
    }

    /// LOADED, GO, RUNNING.
    fn hand_to_hmpsh(&mut self, sections: &[SavedSection]) -> Result<(), Error> {
        self.queue_ending(sections)?;
        self.writer.flush()?;
        self.expect(
            "The destination has not said within 5 seconds that it is ready",
            |message| (*message == Message::Loaded).then_some(()),
        )?;
        self.pass()?;
        self.writer.put(|to| Command::Go.put(&[], to));
        self.flush_ambiguous()?;
        self.expect(
            "The destination has not said within 5 seconds that it has the guest",
            |m| (*m == Message::Running).then_some(()),
        )?;
        self.is_ambiguous = false;
        Ok(())
    }

    /// A stock QEMU runs the guest as soon as it has read EOF, whatever happens to the rest. So a
    /// PING goes before EOF: its answer proves that every device was loaded.
    fn hand_to_stock(&mut self, sections: &[SavedSection]) -> Result<(), Error> {
        self.writer
            .put(|to| Command::Ping.put(&CHECK.to_be_bytes(), to));
        self.writer.flush()?;
        self.expect(
            "The destination has not loaded the guest within 5 seconds",
            |message| (*message == Message::Pong(CHECK)).then_some(()),
        )?;
        self.pass()?;
        self.queue_ending(sections)?;
        self.flush_ambiguous()?;
        let shut = self.expect(
            "The destination has not said within 5 seconds that it has the guest",
            |message| match message {
                Message::Shut(value) => Some(*value),
                _ => None,
            },
        )?;
        if shut != 0 {
            // It had loaded everything, and a QEMU whose connection fails after that runs the
            // guest all the same: this is no proof that it does not.
            return Err(Error::Peer(format!("Sibling indicated error {shut}")));
        }
        self.is_ambiguous = false;
        Ok(())
    }

    /// QEMU's way without a return path: what the peer's kernel has taken counts as arrived.
    fn hand_to_silent(&mut self, sections: &[SavedSection]) -> Result<(), Error> {
        self.pass()?;
        self.queue_ending(sections)?;
        self.flush_ambiguous()?;
        if !self.writer.channel().drain(DRAIN) {
            let text = "The destination has not taken the end of the stream within 30 seconds";
            return Err(Fault::Failed(text.to_owned()).into());
        }
        self.writer.channel().commit()?;
        self.is_ambiguous = false;
        Ok(())
    }

    /// Nobody runs what lies in a file: until it is safe there the guest is ours.
    fn hand_to_store(&mut self, sections: &[SavedSection]) -> Result<(), Error> {
        self.queue_ending(sections)?;
        self.writer.flush()?;
        // May take long, so it can be cancelled.
        self.writer.channel().settle()?;
        self.pass()?;
        Ok(self.writer.channel().commit()?)
    }

    /// From here on a cancel comes too late.
    fn pass(&mut self) -> Result<(), Error> {
        if self.order.cancel.is_cancelled() || !self.order.point.pass() {
            return Err(Fault::Cancelled.into());
        }
        Ok(())
    }

    fn queue_ending(&mut self, sections: &[SavedSection]) -> Result<(), Error> {
        self.writer.put(|to| to.push(EOF));
        let ram = self.ram()?.0.sum();
        let seal = Seal {
            stream: self.writer.digest(),
            ram,
            marks: self.writer.marks().to_vec(),
        };
        let machine = self.order.guest.machine_type();
        self.writer
            .put(|to| description::put(machine, sections, &seal, to));
        Ok(())
    }

    /// Sends what is queued; from its first byte on the destination may have the guest.
    fn flush_ambiguous(&mut self) -> Result<(), Error> {
        let before = self.writer.sent();
        // Should flushing not even return.
        self.is_ambiguous = true;
        let result = self.writer.flush();
        self.is_ambiguous = self.writer.sent() > before;
        Ok(result?)
    }
}

/// How long the peer's kernel may take for what is in the queue, when nobody can answer.
const DRAIN: Duration = Duration::from_secs(30);
