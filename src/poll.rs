//! The registry of descriptors, timers and wakeups the event loop waits for.
//!
//! Level-triggered `poll(2)` over fewer than a hundred descriptors: nothing here needs more.
//! Callbacks run on the thread that calls `Poll::turn`, one after the other, without any lock of
//! the registry held: they may register, change and drop registrations, their own included.
//! Counterpart: QEMU's main loop (GLib's main context).

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError, Weak};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

/// A registered source; dropping it takes the source off the registry. A callback that is running
/// on another thread at that moment runs to its end.
#[must_use = "dropping it takes the source off the registry"]
pub struct Registration {
    shared: Weak<Shared>,
    id: u64,
}

/// What to wait for on a descriptor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Interest {
    /// Readable, closed or failed.
    pub readable: bool,
    /// Writable.
    pub writable: bool,
    /// Closed in both directions, or failed.
    pub over: bool,
}

/// Called on the event loop's thread with what is ready; it may use the registry.
pub type Ready = Box<dyn FnMut(Interest) + Send>;

/// Everything the event loop waits for. Cheap to clone; usable from every thread (a change wakes
/// the loop).
#[derive(Clone)]
pub struct Poll {
    shared: Arc<Shared>,
}

struct Shared {
    state: Mutex<State>,
    wakeup: OwnedFd,
}

#[derive(Default)]
struct State {
    next_id: u64,
    sources: BTreeMap<u64, Source>,
    tasks: VecDeque<Box<dyn FnOnce() + Send>>,
}

enum Source {
    Descriptor {
        fd: Arc<OwnedFd>,
        interest: Interest,
        ready: Arc<Mutex<Ready>>,
    },
    Timer {
        at: Instant,
        period: Option<Duration>,
        ready: Arc<Mutex<Tick>>,
    },
}

type Tick = Box<dyn FnMut() + Send>;

/// A descriptor source as it was when the wait began.
struct Watched {
    id: u64,
    fd: Arc<OwnedFd>,
    interest: Interest,
    ready: Arc<Mutex<Ready>>,
}

impl Poll {
    /// An empty registry. Fails when the process is out of descriptors.
    pub fn new() -> io::Result<Self> {
        let wakeup = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?;
        Ok(Self {
            shared: Arc::new(Shared {
                state: Mutex::default(),
                wakeup,
            }),
        })
    }

    /// Waits for `interest` on `fd`, level-triggered. Without any interest the descriptor is left
    /// alone.
    pub fn register(&self, fd: Arc<OwnedFd>, interest: Interest, ready: Ready) -> Registration {
        self.add(Source::Descriptor {
            fd,
            interest,
            ready: Arc::new(Mutex::new(ready)),
        })
    }

    /// Calls `ready` at `first` and, if given, every `period` from then on. A loop that was busy
    /// for several periods calls it once, not once for each.
    pub fn timer(&self, first: Instant, period: Option<Duration>, ready: Tick) -> Registration {
        self.add(Source::Timer {
            at: first,
            period,
            ready: Arc::new(Mutex::new(ready)),
        })
    }

    /// Runs `task` once on the event loop's thread, soon.
    pub fn defer(&self, task: Box<dyn FnOnce() + Send>) {
        self.shared.lock().tasks.push_back(task);
        self.shared.wake();
    }

    /// Waits once (at most `patience`) and serves what is ready. One thread at a time.
    ///
    /// # Errors
    /// What `poll(2)` says; an interrupted wait is none.
    pub fn turn(&self, patience: Option<Duration>) -> io::Result<()> {
        let (watched, deadline) = self.shared.watched();
        let until_timer = deadline.map(|at| at.saturating_duration_since(Instant::now()));
        let patience = [patience, until_timer].into_iter().flatten().min();
        let ready = self.wait(&watched, patience)?;
        self.serve_tasks();
        self.serve_timers();
        for (watched, interest) in ready {
            if self.shared.lock().sources.contains_key(&watched.id)
                && let Some(mut call) = claim(&watched.ready)
            {
                call(interest);
            }
        }
        Ok(())
    }

    fn add(&self, source: Source) -> Registration {
        let mut state = self.shared.lock();
        let id = state.next_id;
        state.next_id += 1;
        state.sources.insert(id, source);
        drop(state);
        self.shared.wake();
        Registration {
            shared: Arc::downgrade(&self.shared),
            id,
        }
    }

    fn wait<'w>(
        &self,
        watched: &'w [Watched],
        patience: Option<Duration>,
    ) -> io::Result<Vec<(&'w Watched, Interest)>> {
        let mut fds = vec![PollFd::from_borrowed_fd(
            self.shared.wakeup.as_fd(),
            PollFlags::IN,
        )];
        fds.extend(watched.iter().map(|watched| {
            let mut flags = PollFlags::empty();
            flags.set(PollFlags::IN, watched.interest.readable);
            flags.set(PollFlags::OUT, watched.interest.writable);
            PollFd::from_borrowed_fd(watched.fd.as_fd(), flags)
        }));
        let timeout = patience.and_then(|patience| Timespec::try_from(patience).ok());
        match poll(&mut fds, timeout.as_ref()) {
            Ok(0) | Err(rustix::io::Errno::INTR) => return Ok(Vec::new()),
            Ok(_) => {}
            Err(error) => return Err(error.into()),
        }
        if !fds[0].revents().is_empty() {
            // A counter that is empty again was cleared by another turn.
            let _ = rustix::io::read(&self.shared.wakeup, &mut [0; 8]);
        }
        let is_over = PollFlags::HUP | PollFlags::ERR | PollFlags::NVAL;
        let ready = watched.iter().zip(&fds[1..]).filter_map(|(watched, fd)| {
            let seen = fd.revents();
            let over = seen.intersects(is_over);
            let interest = Interest {
                readable: watched.interest.readable && (over || seen.contains(PollFlags::IN)),
                writable: watched.interest.writable && (over || seen.contains(PollFlags::OUT)),
                over: watched.interest.over && over,
            };
            (interest != Interest::default()).then_some((watched, interest))
        });
        Ok(ready.collect())
    }

    /// Tasks that tasks defer wait for the next turn, so that descriptors are not starved.
    fn serve_tasks(&self) {
        let tasks = std::mem::take(&mut self.shared.lock().tasks);
        for task in tasks {
            task();
        }
    }

    fn serve_timers(&self) {
        let now = Instant::now();
        for (id, ready) in self.shared.due(now) {
            let was_once = {
                let mut state = self.shared.lock();
                match state.sources.get_mut(&id) {
                    Some(Source::Timer {
                        at,
                        period: Some(period),
                        ..
                    }) => {
                        *at = (*at + *period).max(now);
                        None
                    }
                    Some(_) => state.sources.remove(&id),
                    // Dropped by a callback of this very turn.
                    None => continue,
                }
            };
            if let Some(mut call) = claim(&ready) {
                call();
            }
            // Dropped only now, with no lock held: it may own registrations.
            drop(was_once);
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self) {
        // The counter can only be full if it has been signalled already.
        let _ = rustix::io::write(&self.wakeup, &1u64.to_ne_bytes());
    }

    /// The descriptors to wait for, and when the first timer is due.
    fn watched(&self) -> (Vec<Watched>, Option<Instant>) {
        let state = self.lock();
        let mut first = None::<Instant>;
        let mut watched = Vec::new();
        for (id, source) in &state.sources {
            match source {
                Source::Timer { at, .. } => first = Some(first.map_or(*at, |first| first.min(*at))),
                Source::Descriptor { interest, .. } if *interest == Interest::default() => {}
                Source::Descriptor {
                    fd,
                    interest,
                    ready,
                } => watched.push(Watched {
                    id: *id,
                    fd: Arc::clone(fd),
                    interest: *interest,
                    ready: Arc::clone(ready),
                }),
            }
        }
        if !state.tasks.is_empty() {
            first = Some(Instant::now());
        }
        (watched, first)
    }

    fn due(&self, now: Instant) -> Vec<(u64, Arc<Mutex<Tick>>)> {
        let state = self.lock();
        let due = state
            .sources
            .iter()
            .filter_map(|(id, source)| match source {
                Source::Timer { at, ready, .. } if *at <= now => Some((*id, Arc::clone(ready))),
                _ => None,
            });
        due.collect()
    }
}

/// The callback, unless it is running already (a callback that turns the registry itself).
fn claim<T>(callback: &Mutex<T>) -> Option<MutexGuard<'_, T>> {
    match callback.try_lock() {
        Ok(callback) => Some(callback),
        Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
        Err(TryLockError::WouldBlock) => None,
    }
}

impl Registration {
    /// Changes what is waited for (descriptors only).
    pub fn set_interest(&self, wanted: Interest) {
        let Some(shared) = self.shared.upgrade() else {
            return;
        };
        let mut state = shared.lock();
        if let Some(Source::Descriptor { interest, .. }) = state.sources.get_mut(&self.id)
            && *interest != wanted
        {
            *interest = wanted;
            drop(state);
            shared.wake();
        }
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        if let Some(shared) = self.shared.upgrade() {
            let source = shared.lock().sources.remove(&self.id);
            // With no lock held: the callback may own registrations.
            drop(source);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use rustix::pipe::{PipeFlags, pipe_with};

    use super::*;

    const READ: Interest = Interest {
        readable: true,
        writable: false,
        over: false,
    };
    const WRITE: Interest = Interest {
        readable: false,
        writable: true,
        over: false,
    };
    const NONE: Interest = Interest {
        readable: false,
        writable: false,
        over: false,
    };

    fn at_once(poll: &Poll) {
        // Twice: the first turn may only have seen the wakeup.
        for _ in 0..2 {
            poll.turn(Some(Duration::ZERO)).unwrap();
        }
    }

    fn pipe() -> (Arc<OwnedFd>, OwnedFd) {
        let (read_end, write_end) = pipe_with(PipeFlags::CLOEXEC).unwrap();
        (Arc::new(read_end), write_end)
    }

    fn add(count: &AtomicUsize) {
        count.fetch_add(1, Ordering::SeqCst);
    }

    fn counter() -> (Arc<AtomicUsize>, Arc<AtomicUsize>) {
        let count = Arc::new(AtomicUsize::new(0));
        (Arc::clone(&count), count)
    }

    #[test]
    fn descriptors_are_level_triggered_and_change_their_interest() {
        let poll = Poll::new().unwrap();
        let (read_end, write_end) = pipe();
        let (count, counted) = counter();
        let ready = move |_| add(&count);
        let registration = poll.register(read_end, READ, Box::new(ready));
        at_once(&poll);
        assert_eq!(counted.load(Ordering::SeqCst), 0);
        rustix::io::write(&write_end, b"x").unwrap();
        at_once(&poll);
        assert_eq!(
            counted.load(Ordering::SeqCst),
            2,
            "still readable, so called again"
        );
        registration.set_interest(NONE);
        at_once(&poll);
        assert_eq!(counted.load(Ordering::SeqCst), 2);
        registration.set_interest(READ);
        drop(write_end);
        at_once(&poll);
        assert_eq!(counted.load(Ordering::SeqCst), 4, "an end is readable too");
        drop(registration);
        at_once(&poll);
        assert_eq!(counted.load(Ordering::SeqCst), 4);
    }

    #[test]
    fn writability_is_told_apart() {
        let poll = Poll::new().unwrap();
        let (_read_end, write_end) = pipe();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let log = Arc::clone(&seen);
        let ready = move |interest| log.lock().unwrap().push(interest);
        let _registration = poll.register(Arc::new(write_end), WRITE, Box::new(ready));
        poll.turn(Some(Duration::ZERO)).unwrap();
        assert_eq!(*seen.lock().unwrap(), [WRITE]);
    }

    #[test]
    fn timers_fire_in_time_once_or_again() {
        let poll = Poll::new().unwrap();
        let (once, fired_once) = counter();
        let (often, fired_often) = counter();
        let start = Instant::now();
        let tick = |count: Arc<AtomicUsize>| -> Tick { Box::new(move || add(&count)) };
        let _once = poll.timer(start + Duration::from_millis(5), None, tick(once));
        let _often = poll.timer(start, Some(Duration::from_millis(10)), tick(often));
        while fired_often.load(Ordering::SeqCst) < 4 {
            poll.turn(Some(Duration::from_secs(5))).unwrap();
        }
        assert!(start.elapsed() >= Duration::from_millis(30));
        assert_eq!(fired_once.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn a_task_or_a_change_from_another_thread_wakes_the_loop() {
        let poll = Poll::new().unwrap();
        let other = poll.clone();
        let (count, counted) = counter();
        let start = Instant::now();
        let thread = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(20));
            other.defer(Box::new(move || add(&count)));
        });
        while counted.load(Ordering::SeqCst) == 0 {
            poll.turn(Some(Duration::from_secs(5))).unwrap();
        }
        assert!(start.elapsed() < Duration::from_secs(2));
        thread.join().unwrap();
    }

    #[test]
    fn a_deferring_task_does_not_keep_the_loop_from_turning() {
        fn again(poll: Poll, count: Arc<AtomicUsize>) {
            let next = poll.clone();
            poll.defer(Box::new(move || {
                count.fetch_add(1, Ordering::SeqCst);
                again(next, count);
            }));
        }
        let poll = Poll::new().unwrap();
        let (count, counted) = counter();
        again(poll.clone(), count);
        poll.turn(Some(Duration::from_secs(5))).unwrap();
        assert_eq!(counted.load(Ordering::SeqCst), 1);
        poll.turn(Some(Duration::from_secs(5))).unwrap();
        assert_eq!(counted.load(Ordering::SeqCst), 2);
    }

    #[test]
    fn callbacks_drop_registrations_their_own_included() {
        let poll = Poll::new().unwrap();
        let (read_end, write_end) = pipe();
        rustix::io::write(&write_end, b"x").unwrap();
        let slot: Arc<Mutex<Vec<Registration>>> = Arc::default();
        let (count, counted) = counter();
        for _ in 0..2 {
            let held = Arc::clone(&slot);
            let count = Arc::clone(&count);
            let ready: Ready = Box::new(move |_| {
                count.fetch_add(1, Ordering::SeqCst);
                // Its own and its neighbour's.
                held.lock().unwrap().clear();
            });
            let registration = poll.register(Arc::clone(&read_end), READ, ready);
            slot.lock().unwrap().push(registration);
        }
        let held = Arc::clone(&slot);
        let tick: Tick = Box::new(move || drop(held.lock().unwrap().pop()));
        slot.lock()
            .unwrap()
            .push(poll.timer(Instant::now() + Duration::from_secs(60), None, tick));
        at_once(&poll);
        assert_eq!(
            counted.load(Ordering::SeqCst),
            1,
            "the neighbour was taken off in time"
        );
        assert!(slot.lock().unwrap().is_empty());
    }

    #[test]
    fn a_callback_that_owns_a_registration_is_dropped_without_a_deadlock() {
        let poll = Poll::new().unwrap();
        let (read_end, _write_end) = pipe();
        let inner = poll.register(Arc::clone(&read_end), READ, Box::new(|_| ()));
        let outer: Ready = Box::new(move |_| inner.set_interest(NONE));
        drop(poll.register(read_end, READ, outer));
        let owned = poll.timer(
            Instant::now(),
            Some(Duration::from_secs(9)),
            Box::new(|| ()),
        );
        let _timer = poll.timer(
            Instant::now(),
            None,
            Box::new(move || owned.set_interest(NONE)),
        );
        at_once(&poll);
    }
}
