//! The threads that execute a disk's requests.
//!
//! All are alike: they wait for a kick, and take requests from the ring until it is empty. There is
//! one, which serves a disk that answers at once best of all; while requests take longer than
//! waking somebody does, the others are called, or hired, for what waits in the ring, and the guest
//! is asked for kicks for what comes there. One of them hears kicks: while the disk is fast always the
//! same, while it is slow the next one each time.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::disk::{Core, Shared, lock};
use super::request::{Outcome, Scratch, Target};
use super::ring::{Broken, Chain, Element};

/// A disk's threads.
#[derive(Default)]
pub(super) struct Crew {
    threads: Mutex<Vec<JoinHandle<()>>>,
    /// Who has it hears kicks. (A kick wakes all who read at the time.)
    turn: Mutex<()>,
    /// Nanoseconds that the last request took.
    last: AtomicU64,
}

type Turn<'a> = MutexGuard<'a, ()>;

/// Most threads of a disk.
const THREADS: usize = 16;
/// Waking a thread, and the way of the ring to its processor, cost about this much.
const CALL: Duration = Duration::from_micros(50);

impl Crew {
    /// Waits for the end of all, who must know that they are to end.
    pub(super) fn dismiss(&self) {
        loop {
            let thread = lock(&self.threads).pop();
            match thread.map(JoinHandle::join) {
                None => return,
                Some(Ok(())) => {}
                Some(Err(_)) => log::error!("a disk's thread panicked"),
            }
        }
    }
}

impl Shared {
    /// Starts another thread, if there may be one.
    pub(super) fn hire(self: &Arc<Self>) -> io::Result<()> {
        let mut threads = lock(&self.crew.threads);
        if threads.len() >= THREADS {
            return Ok(());
        }
        let its = Arc::clone(self);
        let thread = std::thread::Builder::new()
            .name(format!("disk {}", self.slot))
            .spawn(move || its.work())?;
        threads.push(thread);
        Ok(())
    }

    /// A thread.
    fn work(self: Arc<Self>) {
        let mut scratch = Scratch::default();
        let mut chain = Chain::default();
        let mut turn = None;
        loop {
            turn.get_or_insert_with(|| lock(&self.crew.turn));
            match self.kick.read() {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return log::error!("virtio-blk: {error}"),
            }
            if self.has_ended.load(Ordering::SeqCst) {
                // The next one.
                return self.kick();
            }
            while self.serve(&mut chain, &mut scratch, &mut turn) {}
        }
    }

    /// Executes the next request; false if there is none, or it is not the time. While the disk is
    /// slow the turn is the next one's.
    fn serve<'a>(
        self: &'a Arc<Self>,
        chain: &mut Chain<'a>,
        scratch: &mut Scratch<'a>,
        turn: &mut Option<Turn<'_>>,
    ) -> bool {
        let mut core = self.core();
        match unless_it_panics(|| self.take(&mut core, chain)) {
            Ok(true) => {}
            Ok(false) => return false,
            Err(error) => {
                self.fail(&mut core, &error);
                return false;
            }
        }
        core.under_way += 1;
        let under_way = core.under_way;
        let target = Target {
            image: &*self.image,
            serial: &self.serial,
            has_cache: core.has_cache,
            on_error: self.on_error,
        };
        // A fast one that came between says nothing of those that are not done yet.
        let is_slow =
            under_way > 1 || self.crew.last.load(Ordering::Relaxed) > CALL.as_nanos() as u64;
        // What comes while this one is executed is for others, who have to hear of it.
        let is_more = is_slow
            && under_way < THREADS
            && matches!(core.ring.want_kicks(self.map.memory()), Ok(true));
        drop(core);
        if is_slow {
            *turn = None;
            self.call(under_way, is_more);
        }
        let begin = Instant::now();
        let outcome = unless_it_panics(|| scratch.execute(chain, &target));
        let took = u64::try_from(begin.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.crew.last.store(took, Ordering::Relaxed);

        let mut core = self.core();
        let give_back = |outcome| self.give_back(&mut core, &chain.element, outcome);
        if let Err(error) = unless_it_panics(|| outcome.and_then(give_back)) {
            self.fail(&mut core, &error);
        }
        self.is_done(&mut core);
        true
    }

    /// Takes the next request.
    fn take<'a>(&'a self, core: &mut Core, chain: &mut Chain<'a>) -> Result<bool, Broken> {
        let may_work = core.is_running && !core.is_broken && !core.is_disabled;
        if !may_work || core.waiting > 0 || !core.ring.is_set() {
            return Ok(false);
        }
        let memory = self.map.memory();
        // Some drivers kick before they say that they work.
        core.is_started = true;
        core.ring.set_features(core.registers.features);
        if let Some(Element { head, .. }) = core.retries.pop() {
            return core.ring.take(head, memory, chain).map(|()| true);
        }
        core.ring.ignore_kicks(memory)?;
        loop {
            if core.ring.pop(memory, chain)? {
                return Ok(true);
            }
            if !core.ring.want_kicks(memory)? {
                return Ok(false);
            }
        }
    }

    fn give_back(
        &self,
        core: &mut Core,
        element: &Element,
        outcome: Outcome,
    ) -> Result<(), Broken> {
        let memory = self.map.memory();
        // The guest may have put the ring anywhere meanwhile: nothing is written there.
        if core.is_broken {
            return Ok(());
        }
        match outcome {
            Outcome::Answered(len) => {
                core.ring.push(memory, element.head, len)?;
                if core.ring.wants_interrupt(memory)? {
                    self.interrupt();
                }
            }
            Outcome::Kept(fault) => {
                core.retries.push(element.clone());
                // The guest stops later; until then nothing else is executed.
                core.is_running = false;
                (self.stop)(fault);
            }
        }
        Ok(())
    }

    /// While so many threads are at work, sees that there is another one that hears kicks, and wakes
    /// it if more is to be done already.
    fn call(self: &Arc<Self>, under_way: usize, is_more: bool) {
        let threads = lock(&self.crew.threads).len();
        if under_way >= threads {
            if threads >= THREADS {
                return;
            }
            if let Err(error) = self.hire() {
                return log::warn!("virtio-blk: {error}");
            }
        }
        if is_more {
            self.kick();
        }
    }
}

/// What `work` returns; a panic is an error. An image's metadata and a ring can be anything: a
/// request that panics over them must not stay under way for ever.
fn unless_it_panics<T>(work: impl FnOnce() -> Result<T, Broken>) -> Result<T, Broken> {
    let result = catch_unwind(AssertUnwindSafe(work));
    result.unwrap_or_else(|_| Err(Broken("a request panicked".to_owned())))
}
