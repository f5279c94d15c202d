//! The incoming script.
//!
//! [`Incoming::run`] takes a guest in over an accepted connection, on the calling thread. Memory
//! goes straight into the (fresh) machine, devices are decoded and checked first and applied only
//! when everything is there and the hashes agree. After an error the machine must be thrown away.
//! QEMU: `qemu_loadvm_state` and `process_incoming_migration_co`.

mod hand_over;
mod place;
mod sections;

use std::collections::BTreeSet;
use std::sync::Mutex;
use std::time::Duration;

use self::place::Place;
use super::Error;
use super::block::BlockLoad;
use super::channel::Channel;
use super::clock::Clock;
use super::configuration;
use super::dialect::Dialect;
use super::dirty_bitmap::BitmapLoad;
use super::handover::PointOfNoReturn;
use super::integrity::{SEAL_REACH, Seal, Sealing};
use super::progress::show_incoming;
use super::ram::RamLoad;
use super::return_path::{Message, say};
use super::section::{MAGIC, VERSION, VERSION_OBSOLETE, VMDESCRIPTION};
use super::stats::{Board, Status};
use super::stream::Reader;
use crate::iov::In;
use crate::vm::guest::{DeviceLoader, Guest};
use crate::vm::run_state::RunState;
use crate::vmstate::StateReader;

/// A migration to be taken in.
pub struct Incoming<'a> {
    /// A machine that has not run and whose anonymous memory is zero.
    pub guest: &'a dyn Guest,
    /// Where status and figures are published.
    pub board: &'a Board,
    /// Time.
    pub clock: &'a dyn Clock,
    /// Whether a guest that ran at the source runs here at once (no `-S`). Looked at when the
    /// guest has arrived, and held until it has entered its state: whoever changes it before is
    /// obeyed, whoever comes later finds a guest that runs or does not.
    pub autostart: &'a Mutex<bool>,
    /// Knows whether it is too late to give the arrival up.
    pub point: &'a PointOfNoReturn,
    /// `-uuid`.
    pub uuid: Option<[u8; 16]>,
    /// The bytes may come as slowly as they do: whoever sends them sees to it that this ends.
    pub is_patient: bool,
    /// Which records are expected.
    pub dialect: Dialect,
}

impl Incoming<'_> {
    /// Takes the guest in, enters its run state and returns that state. After an error this side
    /// does not have the guest; the error is what the operator should read, and the source has
    /// been told. `Ok` with [`Status::Failed`] on the board is the rare case of a stock source
    /// that may have resumed the guest: it is here then, but paused.
    pub fn run(self, channel: Box<dyn Channel>) -> Result<RunState, Error> {
        let mut arrival = Arrival {
            started: self.clock.now(),
            reader: Reader::new(channel, self.patience(FIRST_PATIENCE)),
            ram: RamLoad::new(self.guest.ram()),
            block: BlockLoad::new(self.guest.drives()),
            bitmaps: BitmapLoad::new(self.guest.drives()),
            is_advised: false,
            loader: Some(self.guest.loader()),
            seen: BTreeSet::new(),
            source: Source::Unknown,
            state: None,
            is_promised: false,
            doubt: None,
            place: Place::default(),
            order: self,
        };
        arrival.show(Status::Setup, None);
        match arrival.script() {
            Ok(state) => {
                match arrival.doubt {
                    None => arrival.show(Status::Completed, None),
                    Some(doubt) => arrival.show(Status::Failed, Some(doubt.to_owned())),
                }
                Ok(state)
            }
            Err(error) => {
                let position = arrival.reader.position();
                let error = arrival.place.of(error, position);
                Err(arrival.fail(error))
            }
        }
    }

    /// How long to wait for a byte, unless that is of no concern.
    fn patience(&self, limit: Duration) -> Duration {
        match self.is_patient {
            true => Duration::MAX,
            false => limit,
        }
    }
}

/// What is known about the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    /// It has not asked for answers.
    Unknown,
    /// It listens, and has not shown to be hmpsh.
    Listening,
    /// It is hmpsh.
    Hmpsh,
}

/// A migration under way.
struct Arrival<'a> {
    order: Incoming<'a>,
    reader: Reader,
    ram: RamLoad<'a>,
    block: BlockLoad,
    bitmaps: BitmapLoad,
    /// Whether the source has said that something may follow the guest.
    is_advised: bool,
    loader: Option<Box<dyn DeviceLoader + 'a>>,
    /// Device sections that have arrived, name and instance.
    seen: BTreeSet<(String, u32)>,
    source: Source,
    /// What the guest was doing at the source.
    state: Option<RunState>,
    /// Whether the source said that hashes will close the stream.
    is_promised: bool,
    /// Why nobody here can know whether the source has resumed the guest.
    doubt: Option<&'static str>,
    place: Place,
    started: Duration,
}

impl Arrival<'_> {
    fn script(&mut self) -> Result<RunState, Error> {
        self.header()?;
        self.sections()?;
        self.check_completeness()?;
        let (stream, end) = (self.reader.digest().value(), self.reader.position());
        let seal = self.description()?;
        self.place.forget();
        self.block.check(self.is_promised || seal.is_some())?;
        self.check_integrity(seal, stream, end)?;
        if self.source == Source::Unknown {
            self.reader.channel().settle()?;
        }
        self.apply()?;
        self.hand_over()
    }

    fn header(&mut self) -> Result<(), Error> {
        if self.reader.be32()? != MAGIC {
            return Err(Error::stream("Not a migration stream"));
        }
        self.place.enter("header".to_owned(), 0);
        self.reader.set_patience(self.order.patience(PATIENCE));
        match self.reader.be32()? {
            VERSION => {}
            VERSION_OBSOLETE => {
                return Err(Error::stream(
                    "SaveVM v2 format is obsolete and don't work anymore",
                ));
            }
            other => {
                return Err(Error::Stream(format!(
                    "Unsupported migration stream version {other}"
                )));
            }
        }
        self.show(Status::Active, None);
        if self.order.dialect.configuration {
            let machine = self.order.guest.machine_type();
            configuration::load(
                &mut self.reader,
                configuration::Local {
                    machine,
                    uuid: self.order.uuid,
                },
            )?;
        }
        self.mark();
        Ok(())
    }

    /// What was being read is over, and hashed up to here.
    fn mark(&mut self) {
        self.place.mark(self.reader.position());
        self.reader.digest().mark();
        self.place.leave();
    }

    /// Reads the trailing JSON, of which only the end is of interest.
    fn description(&mut self) -> Result<Option<Seal>, Error> {
        let from = self.reader.position();
        let next = self.reader.peek(1).map(|byte| byte.first().copied());
        let next = next.map_err(|error| self.io_error(&error))?;
        if next != Some(VMDESCRIPTION) {
            let found = next.map_or("the end".to_owned(), |byte| byte.to_string());
            let text = format!("Expected vmdescription section, but got {found}");
            // A QEMU can be told to send none, and sends nothing else then. With a way back it
            // would wait for us.
            if next.is_none() && self.source == Source::Unknown && !self.is_promised {
                log::warn!("{text}");
                return Ok(None);
            }
            return Err(Error::Stream(text));
        }
        self.reader.u8()?;
        self.place.enter("description".to_owned(), from);
        let mut left = self.reader.be32()? as usize;
        let mut piece = [0; 4096];
        let mut tail = Vec::with_capacity(SEAL_REACH + piece.len());
        while left > 0 {
            let n = left.min(piece.len());
            self.reader.exact(&mut piece[..n])?;
            tail.extend(&piece[..n]);
            tail.drain(..tail.len().saturating_sub(SEAL_REACH));
            left -= n;
        }
        match Seal::find(&tail) {
            Sealing::Sealed(seal) => Ok(Some(seal)),
            _ if self.source == Source::Hmpsh || self.is_promised => Err(Error::stream(
                "The migration stream has no integrity key, or a damaged one",
            )),
            Sealing::Absent => Ok(None),
            Sealing::Foreign => {
                log::warn!("Integrity key of another version: the stream is not checked");
                Ok(None)
            }
        }
    }

    fn check_completeness(&self) -> Result<(), Error> {
        let missing = self.block.missing().or_else(|| self.ram.missing());
        if let Some(missing) = missing.or_else(|| self.bitmaps.missing()) {
            return Err(Error::Stream(format!(
                "The migration stream has no {missing}"
            )));
        }
        let mut missing = self
            .loader
            .as_ref()
            .map_or_else(Vec::new, |loader| loader.missing());
        if self.source != Source::Hmpsh {
            missing.retain(|name| !UNRELIABLE.iter().any(|prefix| name.starts_with(prefix)));
        } else if self.order.dialect.global_state && self.state.is_none() {
            missing.push("globalstate".to_owned());
        }
        if missing.is_empty() {
            return Ok(());
        }
        Err(Error::Stream(format!(
            "The migration stream lacks: {}",
            missing.join(", ")
        )))
    }

    /// Compares with what the source says: `stream` is the hash of what was read here, `end` the
    /// number of its bytes.
    fn check_integrity(&mut self, seal: Option<Seal>, stream: u64, end: u64) -> Result<(), Error> {
        let Some(seal) = seal else { return Ok(()) };
        if seal.stream != stream {
            let ours = self.reader.digest().marks();
            let place = self.place.of_damage(&seal.marks, ours, end);
            return Err(Error::Stream(format!(
                "The migration stream was corrupted on its way: its hash differs ({place})"
            )));
        }
        if seal.ram != self.ram.sum() {
            return Err(Error::stream(
                "Guest memory was corrupted on its way: its hash differs",
            ));
        }
        Ok(())
    }

    fn apply(&mut self) -> Result<(), Error> {
        match self.loader.take() {
            Some(loader) => {
                loader.apply()?;
                self.order.guest.claim_drives()?;
                // They can be locked; not for good yet: if the connection breaks now, the source
                // must have them at once. Images that were sent are not the source's.
                if self.block.stats.is_none() {
                    self.order.guest.release_drives(false)?;
                }
                Ok(())
            }
            None => Err(Error::stream("Device state was applied already")),
        }
    }

    /// Tells the source and the board why there will be no guest here.
    fn fail(&mut self, error: Error) -> Error {
        self.loader = None;
        if error.is_cancel() {
            return self.leave(error);
        }
        let text = error.to_string();
        if self.source == Source::Hmpsh {
            let _ = say(self.reader.channel(), &Message::Reason(text.clone()));
        }
        if self.source != Source::Unknown {
            let _ = say(self.reader.channel(), &Message::Shut(1));
            self.linger();
        }
        self.reader.channel().abandon();
        self.show(Status::Failed, Some(text));
        error
    }

    /// As [`Self::fail`], when nothing may be waited for any more.
    fn leave(&mut self, error: Error) -> Error {
        if self.source == Source::Hmpsh {
            let reason = Message::Reason("it was told to quit".to_owned());
            self.reader.channel().part(&reason.bytes());
        }
        if self.source != Source::Unknown {
            self.reader.channel().part(&Message::Shut(1).bytes());
        }
        self.reader.channel().abandon();
        self.show(Status::Failed, Some(error.to_string()));
        error
    }

    /// Closing a connection with unread bytes resets it, which could overtake the reason: let the
    /// source read it and close first.
    fn linger(&mut self) {
        let until = self.order.clock.now() + LINGER;
        let mut bytes = vec![0; 64 << 10];
        loop {
            let left = until.saturating_sub(self.order.clock.now());
            let read = self
                .reader
                .channel()
                .read(&mut [In::from(&mut bytes[..])], left);
            if left.is_zero() || !matches!(read, Ok(1..)) {
                return;
            }
        }
    }

    fn show(&mut self, status: Status, error: Option<String>) {
        let time = self.order.clock.now().saturating_sub(self.started);
        self.ram.stats.transferred = self.reader.received();
        let ram = (status != Status::Setup).then(|| self.ram.stats.clone());
        show_incoming(
            self.order.board,
            status,
            time,
            (ram, self.block.stats.clone(), self.bitmaps.lost.clone()),
            error,
            self.doubt.is_some(),
        );
    }

    /// The error behind one that went through a device's hands.
    fn io_error(&mut self, error: &std::io::Error) -> Error {
        self.reader
            .take_fault()
            .unwrap_or_else(|| Error::stream(error.to_string()))
    }
}

/// A connection that says nothing is no source.
const FIRST_PATIENCE: Duration = Duration::from_secs(5);
/// How long a source may say nothing.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long the source has to read why it was refused.
const LINGER: Duration = Duration::from_secs(1);
/// Sections that a QEMU sends or not, depending on what accelerates it.
const UNRELIABLE: [&str; 2] = ["kvmclock", "globalstate"];
