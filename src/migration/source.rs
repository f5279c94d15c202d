//! The outgoing script.
//!
//! [`Outgoing::run`] moves a guest over a channel that is already connected, on the calling
//! thread. However it ends, it leaves the guest in the state the board tells of: gone, running
//! where it was, or, when nobody here can know, paused. QEMU: `migration_thread`.

mod ending;
mod hand_over;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use super::Error;
use super::block::{self, BlockSave};
use super::channel::{Cancel, Channel, Fault};
use super::clock::Clock;
use super::configuration;
use super::dialect::Dialect;
use super::dirty_bitmap::BitmapSave;
use super::globalstate;
use super::handover::{Peer, PointOfNoReturn};
use super::integrity::PROMISE;
use super::manifest::Manifest;
use super::progress::Progress;
use super::ram::RamSave;
use super::return_path::{HAIL, Message, REPLY, ReturnPath, SOUNDING, objection};
use super::section::{Command, FULL, MAGIC, VERSION, put_header};
use super::stats::Board;
use super::stream::{TICK, Writer};
use super::switchover;
use super::throttle::Throttle;
use crate::vm::guest::{Guest, SavedSection};
use crate::vm::run_state::RunState;

/// The parameters that the engine obeys; asked for again and again, so changes take effect at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// `max-bandwidth`, bytes per second, 0 for no limit.
    pub max_bandwidth: u64,
    /// `downtime-limit`.
    pub downtime_limit: Duration,
    /// `avail-switchover-bandwidth`, bytes per second, 0 to go by what is measured.
    pub avail_switchover_bandwidth: u64,
}

/// A migration to be done.
pub struct Outgoing<'a> {
    /// What moves.
    pub guest: &'a dyn Guest,
    /// The present limits.
    pub limits: &'a (dyn Fn() -> Limits + Sync),
    /// How the disks go with it (`-b`, `-i`), if they do. Between two hmpsh chunks of zeros always go
    /// as such.
    pub block: Option<block::Options>,
    /// Capability `dirty-bitmaps`: those of the drives go with it.
    pub bitmaps: bool,
    /// Capability `return-path`; without effect on channels that have no way back.
    pub return_path: bool,
    /// The bytes may be taken as slowly as they are: whoever takes them sees to it that this ends.
    pub is_patient: bool,
    /// Which records are sent.
    pub dialect: Dialect,
    /// Where status and figures are published.
    pub board: &'a Board,
    /// Time.
    pub clock: &'a dyn Clock,
    /// When the operator asked for the migration, on that clock (connecting counts).
    pub started: Duration,
    /// Interrupts the migration; to be used through `point`.
    pub cancel: &'a Cancel,
    /// Knows whether it is too late to cancel.
    pub point: &'a PointOfNoReturn,
}

impl<'a> Outgoing<'a> {
    /// Migrates. `Ok` means `completed`; after an error the board says what became of the guest,
    /// and the error is what the operator should read.
    pub fn run(self, channel: Box<dyn Channel>) -> Result<(), Error> {
        let total = self.guest.ram().iter().map(|block| block.len()).sum();
        let progress = Progress::new(self.board, self.clock, self.started, total);
        let mut run = Run {
            writer: Writer::new(channel, progress, self.cancel),
            order: self,
            return_path: ReturnPath::default(),
            peer: Peer::OneWay,
            block: None,
            bitmaps: BitmapSave::default(),
            lead: 0,
            ram: None,
            soundings: 0,
            before: None,
            is_ambiguous: false,
        };
        if run.order.is_patient {
            run.writer.set_patience(Duration::MAX);
        }
        // A defect of ours must not cost the guest: it ends like any other failure.
        let ended = catch_unwind(AssertUnwindSafe(|| run.script())).unwrap_or_else(|_| {
            run.writer.tear();
            Err(Error::stream("internal error in the migration thread"))
        });
        match ended {
            Ok(()) => run.succeed(),
            Err(error) => Err(run.fail(error)),
        }
    }
}

/// A migration under way.
struct Run<'a> {
    order: Outgoing<'a>,
    writer: Writer<'a>,
    return_path: ReturnPath,
    peer: Peer,
    block: Option<BlockSave<'a>>,
    bitmaps: BitmapSave,
    /// By how many bytes disks are ahead of memory, since both have had something to send.
    lead: i64,
    ram: Option<RamSave<'a>>,
    /// How often the way to the destination was sounded.
    soundings: u32,
    /// What the guest was doing when we stopped it.
    before: Option<RunState>,
    /// Whether the destination may have the guest for all we know.
    is_ambiguous: bool,
}

impl<'a> Run<'a> {
    fn script(&mut self) -> Result<(), Error> {
        self.take_bitmaps()?;
        self.take_disks();
        self.header();
        self.hail()?;
        self.advise();
        self.begin_block();
        self.begin_ram()?;
        self.begin_bitmaps()?;
        self.iterate()?;
        let before = self.stop_guest()?;
        self.finish_block()?;
        self.finish_ram()?;
        self.finish_bitmaps()?;
        // The destination locks them before it says that it is ready.
        self.order
            .guest
            .release_drives(self.order.block.is_none())?;
        let sections = self.devices(before)?;
        self.hand_over(&sections)
    }

    /// From here on only the guest changes them.
    fn take_bitmaps(&mut self) -> Result<(), Error> {
        if self.order.bitmaps {
            self.bitmaps = BitmapSave::new(self.order.guest.drives())?;
        }
        Ok(())
    }

    /// From here on it is noted what is written to them, and they stay as long as they are announced.
    fn take_disks(&mut self) {
        if let Some(options) = self.order.block {
            let (drives, clock) = (self.order.guest.drives(), self.order.clock);
            let dialect = self.order.dialect;
            self.block = Some(BlockSave::new(drives, clock, dialect, options));
        }
    }

    fn header(&mut self) {
        let machine = self.order.guest.machine_type();
        let dialect = self.order.dialect;
        self.writer.put(|to| {
            to.extend(MAGIC.to_be_bytes());
            to.extend(VERSION.to_be_bytes());
            if dialect.configuration {
                configuration::put(machine, to);
            }
        });
        self.writer.mark();
    }

    /// Finds out who is there, and, if it is hmpsh, whether the guest fits there.
    fn hail(&mut self) -> Result<(), Error> {
        if !self.writer.channel().is_duplex() {
            self.peer = Peer::OneWay;
            return Ok(self.writer.flush()?);
        }
        if !self.order.return_path {
            self.peer = Peer::Silent;
            return Ok(self.writer.flush()?);
        }
        self.writer.put(|to| {
            Command::OpenReturnPath.put(&[], to);
            Command::Ping.put(&HAIL.to_be_bytes(), to);
        });
        self.writer.flush()?;
        self.peer = self.expect(NO_ANSWER, |message| match message {
            Message::Pong(HAIL) => Some(Peer::Stock),
            Message::Pong(REPLY) => Some(Peer::Hmpsh),
            _ => None,
        })?;
        if self.peer == Peer::Hmpsh {
            let mut manifest = Manifest::of(self.order.guest);
            if let Some(block) = &self.block {
                manifest = manifest.with_disks(block.announced());
            }
            manifest = manifest.with_bitmaps(self.bitmaps.announced());
            self.writer
                .put(|to| Command::Manifest.put(&manifest.bytes(), to));
            self.writer.flush()?;
            self.expect(
                "The destination has not answered the manifest within 5 seconds",
                |m| (*m == Message::Accepted).then_some(()),
            )?;
        }
        Ok(())
    }

    /// A QEMU says so, bitmaps or not: they could follow the guest.
    fn advise(&mut self) {
        if self.order.bitmaps {
            self.writer.put(|to| Command::PostcopyAdvise.put(&[], to));
        }
    }

    fn begin_block(&mut self) {
        if let Some(block) = &mut self.block {
            block.setup(&mut self.writer, self.peer == Peer::Hmpsh);
        }
    }

    fn begin_ram(&mut self) -> Result<(), Error> {
        let ram = self.ram.insert(RamSave::new(
            self.order.guest,
            self.order.clock,
            self.order.dialect,
        )?);
        ram.setup(&mut self.writer, self.peer == Peer::Hmpsh)?;
        self.writer.flush()?;
        let limits = (self.order.limits)();
        self.writer
            .progress
            .begin_iterating(self.writer.sent(), limits.downtime_limit);
        Ok(())
    }

    fn begin_bitmaps(&mut self) -> Result<(), Error> {
        if !self.bitmaps.is_empty() {
            self.bitmaps.setup(&mut self.writer, self.order.dialect);
            self.writer.flush()?;
        }
        Ok(())
    }

    /// Sends disks and memory while the guest runs, until the rest is small enough.
    fn iterate(&mut self) -> Result<(), Error> {
        let mut throttle = Throttle::new(self.writer.total());
        loop {
            self.listen()?;
            let limits = (self.order.limits)();
            self.writer.progress.promised_bandwidth = limits.avail_switchover_bandwidth;
            self.writer.progress.tick(self.writer.sent());
            if self.is_small_enough(&limits)? && self.has_arrived(&limits)? {
                return Ok(());
            }
            let now = self.order.clock.now();
            match throttle.allowance(now, self.writer.total(), limits.max_bandwidth) {
                0 => {
                    let rest = throttle.next().saturating_sub(now);
                    self.order.clock.sleep(rest, self.order.cancel);
                }
                allowance => self.send(allowance)?,
            }
        }
    }

    /// One PART of about `allowance` bytes, of disks or of memory. Until every chunk of the disks has
    /// been sent once memory waits: it changes faster. Then whatever has had less goes first: a
    /// chunk that is written to all the time could take everything.
    fn send(&mut self, allowance: u64) -> Result<(), Error> {
        let begin = self.writer.total();
        let wants_ram = self.ram()?.0.pending() > 0;
        let (is_bulk, wants_block) = self.block.as_ref().map_or((false, false), |block| {
            (block.is_bulk(), block.pending() > 0)
        });
        let is_contest = wants_ram && wants_block && !is_bulk;
        let block_goes = wants_block && (!is_contest || self.lead <= 0);
        match self.block.as_mut().filter(|_| block_goes) {
            Some(block) => block.iterate(&mut self.writer, allowance)?,
            None => {
                let (ram, writer) = self.ram()?;
                ram.iterate(writer, allowance)?;
            }
        }
        let sent = (self.writer.total() - begin) as i64;
        // Where one has nothing to send, the other takes nothing from it.
        self.lead = match (is_contest, block_goes) {
            (false, _) => 0,
            (true, true) => self.lead.saturating_add(sent),
            (true, false) => self.lead.saturating_sub(sent),
        };
        Ok(())
    }

    /// Bytes that are left to be sent, as far as is known.
    fn pending(&mut self) -> Result<u64, Error> {
        let on_disk = self.block.as_ref().map_or(0, BlockSave::pending);
        Ok(self.ram()?.0.pending().saturating_add(on_disk))
    }

    /// Whether what is left can be sent within the downtime limit.
    fn is_small_enough(&mut self, limits: &Limits) -> Result<bool, Error> {
        let bandwidth = self.writer.progress.bandwidth();
        let threshold = switchover::threshold(bandwidth, limits.downtime_limit);
        let pending = self.pending()?;
        if pending > 0 && pending >= threshold {
            return Ok(false);
        }
        if limits.downtime_limit.is_zero() {
            // As QEMU does: one pass, and whatever was dirtied meanwhile goes with the rest.
            return Ok(true);
        }
        // The bitmap is small because it is old: look again.
        let (ram, writer) = self.ram()?;
        ram.sync(writer)?;
        writer.progress.show(writer.sent());
        let pending = self.pending()?;
        Ok(pending == 0 || pending < threshold)
    }

    /// What is still under way would add to the downtime, and megabytes can be, in the buffers of
    /// both kernels. So the destination is asked whether it has read everything, while the guest
    /// runs. False if too much was dirtied meanwhile; a few times, for on a slow line it might be
    /// so for ever. (QEMU stops the guest at once.)
    fn has_arrived(&mut self, limits: &Limits) -> Result<bool, Error> {
        if !self.has_return_path() || self.soundings == MOST_SOUNDINGS {
            return Ok(true);
        }
        self.soundings += 1;
        self.writer
            .put(|to| Command::Ping.put(&SOUNDING.to_be_bytes(), to));
        self.writer.flush()?;
        self.expect(NOT_READING, |message| {
            (*message == Message::Pong(SOUNDING)).then_some(())
        })?;
        self.is_small_enough(limits)
    }

    fn stop_guest(&mut self) -> Result<RunState, Error> {
        let at = self.order.clock.now();
        let before = self.order.guest.stop(RunState::FinishMigrate)?;
        self.before = Some(before);
        self.writer.progress.begin_downtime(at);
        if !self.order.is_patient {
            self.writer.set_patience(PATIENCE);
        }
        Ok(before)
    }

    fn finish_block(&mut self) -> Result<(), Error> {
        if self.order.dialect.switchover_start {
            self.writer.put(|to| Command::SwitchoverStart.put(&[], to));
        }
        match &mut self.block {
            Some(block) => block.complete(&mut self.writer),
            None => Ok(()),
        }
    }

    fn finish_ram(&mut self) -> Result<(), Error> {
        let (ram, writer) = self.ram()?;
        ram.complete(writer)?;
        writer.progress.show(writer.sent());
        Ok(())
    }

    fn finish_bitmaps(&mut self) -> Result<(), Error> {
        match self.bitmaps.is_empty() {
            true => Ok(()),
            false => self.bitmaps.complete(&mut self.writer, self.order.dialect),
        }
    }

    fn devices(&mut self, before: RunState) -> Result<Vec<SavedSection>, Error> {
        let mut sections = self.order.guest.save_devices()?;
        let ids = (FIRST_DEVICE..).take(sections.len()).chain([PROMISE]);
        let dialect = self.order.dialect;
        if dialect.global_state {
            sections.push(globalstate::save(before));
        }
        for (section, id) in sections.iter().zip(ids) {
            self.writer.put(|to| {
                put_header(FULL, id, &section.header, to);
                to.extend(&section.body);
                dialect.put_footer(id, to);
            });
            self.writer.mark();
        }
        self.writer.flush()?;
        Ok(sections)
    }

    fn ram(&mut self) -> Result<(&mut RamSave<'a>, &mut Writer<'a>), Error> {
        let ram = self
            .ram
            .as_mut()
            .ok_or_else(|| Error::stream("RAM was not set up"))?;
        Ok((ram, &mut self.writer))
    }

    /// Looks whether the destination has something to say; in the middle of the stream that can
    /// only be that it gives up.
    fn listen(&mut self) -> Result<(), Error> {
        if self.order.cancel.is_cancelled() {
            return Err(Fault::Cancelled.into());
        }
        if !self.has_return_path() {
            return Ok(());
        }
        match self.return_path.poll(self.writer.channel())? {
            None | Some(Message::SwitchoverAck) => Ok(()),
            Some(message) => Err(objection(&message).unwrap_or_else(|| unexpected(&message))),
        }
    }

    /// Waits for a message that `accept` takes; `silence` is the error when none comes in time.
    fn expect<T>(
        &mut self,
        silence: &str,
        accept: impl Fn(&Message) -> Option<T>,
    ) -> Result<T, Error> {
        loop {
            let message = match self.hear() {
                Err(Error::Channel(Fault::TimedOut)) => {
                    return Err(Fault::Failed(silence.to_owned()).into());
                }
                message => message?,
            };
            if let Some(answer) = accept(&message) {
                return Ok(answer);
            }
            if message != Message::SwitchoverAck {
                return Err(objection(&message).unwrap_or_else(|| unexpected(&message)));
            }
        }
    }

    fn hear(&mut self) -> Result<Message, Error> {
        let heard = self.hear_within(PATIENCE);
        let is_silent = matches!(heard, Err(Error::Channel(Fault::TimedOut)));
        let channel = self.writer.channel();
        // While our own bytes are still on the line, silence is the line's fault.
        if is_silent && !channel.drain(Duration::ZERO) && channel.drain(PATIENCE) {
            return self.hear_within(PATIENCE);
        }
        heard
    }

    /// Meanwhile the figures stay true.
    fn hear_within(&mut self, patience: Duration) -> Result<Message, Error> {
        let clock = self.order.clock;
        let until = clock.now().saturating_add(patience);
        loop {
            let slice = until.saturating_sub(clock.now()).min(TICK);
            let heard = self.return_path.wait(self.writer.channel(), clock, slice);
            let is_silent = matches!(heard, Err(Error::Channel(Fault::TimedOut)));
            if !is_silent || clock.now() >= until {
                return heard;
            }
            self.writer.progress.tick(self.writer.sent());
        }
    }

    fn has_return_path(&self) -> bool {
        matches!(self.peer, Peer::Hmpsh | Peer::Stock)
    }
}

fn unexpected(message: &Message) -> Error {
    Error::Stream(format!(
        "The destination said {message:?} where it makes no sense"
    ))
}

/// Section id of the first device; RAM has the one before.
const FIRST_DEVICE: u32 = super::ram::SECTION_ID + 1;
/// How long the destination may say nothing, or take no byte while the guest stands still.
const PATIENCE: Duration = Duration::from_secs(5);
/// How often to sound at most.
const MOST_SOUNDINGS: u32 = 3;
const NOT_READING: &str = "The destination has not read on for 5 seconds";
const NO_ANSWER: &str = "No answer from the destination within 5 seconds: it hangs, is busy with \
                         another migration, or can not answer; `migrate_set_capability return-path \
                         off` migrates without";
