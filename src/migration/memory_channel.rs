//! For tests: two ends of a connection in one process, their clock, and everything that can go
//! wrong between them.
//!
//! Only one side runs at any instant: a side runs until it has to wait, then the other goes on; if
//! both wait, the clock jumps to the nearer deadline. So a run is the same every time, whatever
//! the machine is doing, and 30 seconds of silence take no time.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

use super::channel::{Cancel, Channel, Fault};
use super::clock::Clock;
use super::handover::PointOfNoReturn;
use super::stream::Reader;
use crate::iov::{In, Out};

/// A direction, and the side that writes in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Way {
    /// Source to destination.
    Forth = 0,
    /// Destination to source.
    Back = 1,
}

/// Something that is done once.
pub(super) type Event = Arc<dyn Fn() + Send + Sync>;

/// What happens to the connection.
#[derive(Clone, Default)]
pub(super) struct Faults {
    /// The connection breaks when this byte is to be written.
    pub cut: Option<(Way, u64)>,
    /// No byte from this one on is taken.
    pub stall: Option<(Way, u64)>,
    /// This byte is changed by XOR.
    pub flip: Option<(Way, u64, u8)>,
    /// Most bytes that one read or write moves.
    pub piece: Option<usize>,
    /// The operator cancels when this byte is written.
    pub cancel: Option<(Way, u64)>,
    /// This happens when this byte is written.
    pub at: Option<(Way, u64, Event)>,
    /// Neither end can answer: a one-way transport.
    pub one_way: bool,
}

/// The connection.
pub(super) struct Link {
    state: Mutex<State>,
    turn: Condvar,
    pub cancel: Cancel,
    pub point: PointOfNoReturn,
}

struct State {
    now: Duration,
    turn: usize,
    waiting: [Option<Wait>; 2],
    has_left: [bool; 2],
    is_closed: [bool; 2],
    is_broken: bool,
    wires: [VecDeque<u8>; 2],
    passed: [u64; 2],
    /// Everything that was written, before it was changed.
    written: [Vec<u8>; 2],
    faults: Faults,
}

#[derive(Clone, Copy)]
struct Wait {
    until: Duration,
    what: Need,
}

#[derive(Clone, Copy, PartialEq)]
enum Need {
    Read,
    Write,
    Sleep,
}

impl State {
    fn is_met(&self, side: usize, need: Need, cancel: &Cancel) -> bool {
        let other = 1 - side;
        let cancelled = side == 0 && cancel.is_cancelled();
        cancelled
            || match need {
                Need::Read => {
                    !self.wires[other].is_empty() || self.is_closed[other] || self.is_broken
                }
                Need::Write => self.room(side) > 0 || self.is_closed[other] || self.is_broken,
                Need::Sleep => false,
            }
    }

    fn room(&self, side: usize) -> usize {
        let free = CAPACITY.saturating_sub(self.wires[side].len());
        match self.faults.stall {
            Some((way, at)) if way as usize == side => {
                free.min(at.saturating_sub(self.passed[side]) as usize)
            }
            _ => free,
        }
    }
}

impl Link {
    pub(super) fn new(faults: Faults) -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::new(State {
                now: Duration::from_secs(1000),
                turn: 0,
                waiting: [None; 2],
                has_left: [false; 2],
                is_closed: [false; 2],
                is_broken: false,
                wires: Default::default(),
                passed: [0; 2],
                written: Default::default(),
                faults,
            }),
            turn: Condvar::new(),
            cancel: Cancel::new().unwrap(),
            point: PointOfNoReturn::new(),
        })
    }

    /// Runs both sides to their ends and returns what they return.
    pub(super) fn run<A: Send, B: Send>(
        self: &Arc<Self>,
        source: impl FnOnce(Box<dyn Channel>, &SideClock) -> A + Send,
        dest: impl FnOnce(Box<dyn Channel>, &SideClock) -> B + Send,
    ) -> (A, B) {
        std::thread::scope(|scope| {
            let a = scope.spawn(|| self.side(0, source));
            let b = self.side(1, dest);
            (a.join().unwrap(), b)
        })
    }

    fn side<T>(
        self: &Arc<Self>,
        side: usize,
        run: impl FnOnce(Box<dyn Channel>, &SideClock) -> T,
    ) -> T {
        struct Leave<'a>(&'a Link, usize);
        impl Drop for Leave<'_> {
            fn drop(&mut self) {
                let mut state = self.0.lock();
                state.has_left[self.1] = true;
                state.is_closed[self.1] = true;
                state.turn = 1 - self.1;
                self.0.turn.notify_all();
            }
        }
        let _leave = Leave(self, side);
        drop(self.await_turn(self.lock(), side));
        let end = End {
            link: self.clone(),
            side,
        };
        run(Box::new(end), &SideClock(self.clone(), side))
    }

    /// Bytes that passed in each direction.
    pub(super) fn passed(&self, way: Way) -> u64 {
        self.lock().passed[way as usize]
    }

    /// The bytes that passed in that direction, as they were written.
    pub(super) fn written(&self, way: Way) -> Vec<u8> {
        self.lock().written[way as usize].clone()
    }

    pub(super) fn now(&self) -> Duration {
        self.lock().now
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state
            .lock()
            .unwrap_or_else(|poison| poison.into_inner())
    }

    fn await_turn<'s>(
        &self,
        mut state: MutexGuard<'s, State>,
        side: usize,
    ) -> MutexGuard<'s, State> {
        while state.turn != side {
            state = self
                .turn
                .wait(state)
                .unwrap_or_else(|poison| poison.into_inner());
        }
        state
    }

    /// Waits until `need` is met; `false` when `patience` is over.
    fn wait<'s>(
        &self,
        mut state: MutexGuard<'s, State>,
        side: usize,
        need: Need,
        patience: Duration,
    ) -> (MutexGuard<'s, State>, bool) {
        let until = state.now.saturating_add(patience);
        loop {
            if state.is_met(side, need, &self.cancel) {
                return (state, true);
            }
            if state.now >= until {
                return (state, false);
            }
            let other = 1 - side;
            let others = state.waiting[other];
            if state.has_left[other] {
                state.now = until;
                continue;
            }
            match others {
                Some(wait) if !state.is_met(other, wait.what, &self.cancel) => {
                    if until <= wait.until {
                        state.now = until;
                        continue;
                    }
                    state.now = wait.until;
                }
                _ => {}
            }
            state.waiting[side] = Some(Wait { until, what: need });
            state.turn = other;
            self.turn.notify_all();
            state = self.await_turn(state, side);
            state.waiting[side] = None;
        }
    }
}

/// The clock as one side sees it: sleeping gives the turn away.
pub(super) struct SideClock(Arc<Link>, usize);

impl Clock for SideClock {
    fn now(&self) -> Duration {
        self.0.now()
    }

    fn sleep(&self, time: Duration, _cancel: &Cancel) {
        drop(self.0.wait(self.0.lock(), self.1, Need::Sleep, time));
    }
}

struct End {
    link: Arc<Link>,
    side: usize,
}

impl Channel for End {
    fn write(&mut self, pieces: &[Out<'_>], patience: Duration) -> Result<usize, Fault> {
        let state = self.link.lock();
        let (mut state, met) = self.link.wait(state, self.side, Need::Write, patience);
        if self.side == 0 && self.link.cancel.is_cancelled() {
            return Err(Fault::Cancelled);
        }
        if state.is_broken || state.is_closed[1 - self.side] || state.is_closed[self.side] {
            return Err(broken("Unable to write to socket"));
        }
        if !met {
            return Err(Fault::TimedOut);
        }
        let mut limit = state
            .room(self.side)
            .min(state.faults.piece.unwrap_or(usize::MAX));
        let from = state.passed[self.side];
        if let Some((way, at)) = state.faults.cut
            && way as usize == self.side
        {
            limit = limit.min((at - from) as usize);
            if limit == 0 {
                state.is_broken = true;
                return Err(broken("Unable to write to socket"));
            }
        }
        let mut bytes = Vec::new();
        for piece in pieces {
            if bytes.len() >= limit {
                break;
            }
            piece.copy_to(&mut bytes);
        }
        bytes.truncate(limit);
        state.written[self.side].extend(&bytes);
        let to = from + bytes.len() as u64;
        if let Some((way, at, mask)) = state.faults.flip
            && way as usize == self.side
            && (from..to).contains(&at)
        {
            bytes[(at - from) as usize] ^= mask;
        }
        if let Some((way, at)) = state.faults.cancel
            && way as usize == self.side
            && (from..to).contains(&at)
        {
            self.link.point.cancel(&self.link.cancel);
        }
        if let Some((way, at, event)) = &state.faults.at
            && *way as usize == self.side
            && (from..to).contains(at)
        {
            event();
        }
        state.passed[self.side] = to;
        state.wires[self.side].extend(&bytes);
        Ok(bytes.len())
    }

    fn read(&mut self, rooms: &mut [In<'_>], patience: Duration) -> Result<usize, Fault> {
        let other = 1 - self.side;
        let state = self.link.lock();
        let (mut state, met) = self.link.wait(state, self.side, Need::Read, patience);
        if self.side == 0 && self.link.cancel.is_cancelled() {
            return Err(Fault::Cancelled);
        }
        if state.wires[other].is_empty() {
            return match (met, state.is_broken) {
                (_, true) => Err(broken("Unable to read from socket")),
                (true, _) => Ok(0),
                (false, _) => Err(Fault::TimedOut),
            };
        }
        let most = state.faults.piece.unwrap_or(usize::MAX);
        let bytes: Vec<u8> = {
            let n = state.wires[other]
                .len()
                .min(most)
                .min(rooms.iter().map(In::len).sum());
            state.wires[other].drain(..n).collect()
        };
        let mut done = 0;
        for room in rooms {
            done += room.fill(&bytes[done..]);
        }
        Ok(done)
    }

    fn is_duplex(&self) -> bool {
        !self.link.lock().faults.one_way
    }

    fn commit(&mut self) -> Result<(), Fault> {
        Ok(())
    }

    fn abandon(&mut self) {
        self.link.lock().is_closed[self.side] = true;
    }

    fn drain(&mut self, _patience: Duration) -> bool {
        !self.link.lock().is_broken
    }
}

impl Drop for End {
    fn drop(&mut self) {
        self.abandon();
    }
}

fn broken(what: &str) -> Fault {
    let source = io::Error::from(io::ErrorKind::ConnectionReset);
    Fault::Io {
        what: what.to_owned(),
        source,
    }
}

/// Bytes that are under way at most.
const CAPACITY: usize = 16 << 10;

/// A one-way channel that remembers what is written and reads what it was given.
#[derive(Default)]
pub(super) struct Recording {
    input: VecDeque<u8>,
    piece: Option<usize>,
    output: Arc<Mutex<Vec<u8>>>,
}

impl Recording {
    /// A channel to write to, and where the bytes go.
    pub(super) fn to() -> (Box<dyn Channel>, Arc<Mutex<Vec<u8>>>) {
        let recording = Self::default();
        let output = recording.output.clone();
        (Box::new(recording), output)
    }

    /// A channel that delivers `bytes`.
    pub(super) fn of(bytes: &[u8]) -> Box<dyn Channel> {
        Box::new(Self {
            input: bytes.iter().copied().collect(),
            ..Self::default()
        })
    }

    /// A reader of `bytes`.
    pub(super) fn reader(bytes: &[u8]) -> Reader {
        Reader::new(Self::of(bytes), Duration::from_secs(1))
    }

    /// A reader of `bytes`, of which at most `piece` come at once.
    pub(super) fn reader_in_pieces(bytes: &[u8], piece: usize) -> Reader {
        let input = bytes.iter().copied().collect();
        let recording = Self {
            input,
            piece: Some(piece),
            ..Self::default()
        };
        Reader::new(Box::new(recording), Duration::from_secs(1))
    }
}

impl Channel for Recording {
    fn write(&mut self, pieces: &[Out<'_>], _patience: Duration) -> Result<usize, Fault> {
        let mut output = self.output.lock().unwrap();
        let before = output.len();
        for piece in pieces {
            piece.copy_to(&mut output);
        }
        Ok(output.len() - before)
    }

    fn read(&mut self, rooms: &mut [In<'_>], _patience: Duration) -> Result<usize, Fault> {
        let most = self.piece.unwrap_or(usize::MAX);
        let n = self
            .input
            .len()
            .min(most)
            .min(rooms.iter().map(In::len).sum());
        let bytes: Vec<u8> = self.input.drain(..n).collect();
        let mut done = 0;
        for room in rooms {
            done += room.fill(&bytes[done..]);
        }
        Ok(done)
    }

    fn is_duplex(&self) -> bool {
        false
    }

    fn commit(&mut self) -> Result<(), Fault> {
        Ok(())
    }

    fn abandon(&mut self) {}

    fn drain(&mut self, _patience: Duration) -> bool {
        true
    }
}
