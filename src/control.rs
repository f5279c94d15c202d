//! The one set of verbs every mouth calls.
//!
//! Verbs return plain structs or an [`Error`] worded for the operator; never formatted text,
//! never JSON. They may be called from any thread and do not wait for the peer of a migration:
//! moving a guest happens on a thread of its own (`outgoing`, `incoming`).

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use crate::block::Drive;
use crate::chardev::Chardev;
use crate::config::{Config, Incoming};
use crate::errno::Errno;
use crate::event::Event;
use crate::logger;
pub use crate::migration::params::Listing as ParameterInfo;
use crate::migration::params::Settings;
use crate::migration::stats::{Board, Direction, Snapshot};
use crate::migration::uri::Uri;
use crate::poll::Poll;
use crate::vm::guest::Guest;
use crate::vm::machine::{EventSink, Machine};
use crate::vm::run_state::RunState;

mod bitmaps;
mod drives;
mod events;
mod incoming;
mod inspect;
mod job;
mod outgoing;
mod snapshots;

pub use events::{Events, Listener};
pub use inspect::{ChardevInfo, CpuInfo, DriveInfo, DriveStats, RamBlockInfo};
pub use outgoing::MigrateOptions;
pub use snapshots::SnapshotList;

/// Why a verb was refused or failed; the text is what the operator reads after `Error: `.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Error(pub String);

impl Error {
    /// From anything that can be said.
    pub fn new(text: impl ToString) -> Self {
        Self(text.to_string())
    }
}

impl From<crate::vm::guest::Error> for Error {
    fn from(error: crate::vm::guest::Error) -> Self {
        Self::new(error)
    }
}

/// Descriptors a monitor was given (`getfd`), by name.
pub type NamedFds = BTreeMap<String, OwnedFd>;

/// How mouths hold it.
pub type Shared = Arc<Control>;

/// The program's state behind the mouths.
pub struct Control {
    config: Config,
    poll: Poll,
    chardevs: Vec<Arc<dyn Chardev>>,
    /// Replaced as a whole when an incoming migration failed in it.
    machine: Mutex<Arc<Machine>>,
    settings: Arc<Settings>,
    board: Arc<Board>,
    job: Mutex<job::Job>,
    /// Start the guest when it has arrived; `stop` and `cont` change it while waiting.
    autostart: Mutex<bool>,
    events: Arc<Events>,
    /// Held alone while a snapshot is taken, loaded or removed, and by many while drives are
    /// changed.
    drives: RwLock<()>,
    /// Whether the disks are of different times: some have gone back, and some could not.
    at_odds: AtomicBool,
    /// Descriptors the program was started with, by number.
    inherited: Mutex<NamedFds>,
    quitting: AtomicBool,
    exit_status: AtomicU8,
}

impl Control {
    /// Builds the machine and everything around it. Nothing runs before [`Self::launch`].
    pub fn new(
        mut config: Config,
        poll: Poll,
        chardevs: Vec<Arc<dyn Chardev>>,
        inherited: NamedFds,
    ) -> Result<Shared, Error> {
        let settings = Arc::new(Settings::default());
        for global in &config.globals {
            settings
                .set_global(&global.driver, &global.name, &global.value)
                .map_err(Error::new)?;
        }
        let events = Arc::new(Events::default());
        let machine = build_machine(&config, &chardevs, &events, None)?;
        // Another one may have to be built, and a daemon goes to `/`.
        config.machine.fix_names().map_err(Error::new)?;
        let board = Arc::new(Board::default());
        let told = Arc::clone(&events);
        board.watch(Box::new(move |snapshot| {
            told.tell(&Event::Migration(snapshot.status.name()));
        }));
        let control = Arc::new(Self {
            // Without an accelerator the guest stays paused, and everything else works.
            autostart: Mutex::new(!config.start_paused && machine.has_kvm()),
            config,
            poll,
            chardevs,
            machine: Mutex::new(machine),
            settings,
            board,
            job: Mutex::default(),
            events,
            drives: RwLock::default(),
            at_odds: AtomicBool::new(false),
            inherited: Mutex::new(inherited),
            quitting: AtomicBool::new(false),
            exit_status: AtomicU8::new(0),
        });
        let weak = Arc::downgrade(&control);
        control.events.subscribe(Box::new(move |event| {
            if let Some(control) = weak.upgrade() {
                control.obey(event);
            }
        }));
        Ok(control)
    }

    /// Starts what the command line asked for: the guest, or waiting for one to arrive.
    pub fn launch(self: &Arc<Self>) -> Result<(), Error> {
        match &self.config.incoming {
            Some(incoming) => {
                self.machine().set_run_state(RunState::InMigrate);
                match incoming {
                    Incoming::Uri(uri) => self
                        .listen(uri, &mut NamedFds::new())
                        .map_err(|error| Error(format!("-incoming {uri}: {error}"))),
                    Incoming::Defer => Ok(()),
                }
            }
            None if self.config.start_paused || !self.has_kvm() => {
                self.machine().set_run_state(RunState::Prelaunch);
                Ok(())
            }
            None => Ok(self.machine().start()?),
        }
    }

    /// What the command line asked for.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The event loop's registry.
    pub fn poll(&self) -> &Poll {
        &self.poll
    }

    /// The chardev of that id.
    pub fn chardev(&self, id: &str) -> Option<&Arc<dyn Chardev>> {
        self.chardevs.iter().find(|chardev| chardev.id() == id)
    }

    /// Tells `listener` of every event from now on.
    pub fn subscribe(&self, listener: Listener) {
        self.events.subscribe(listener);
    }

    /// Present run state.
    pub fn run_state(&self) -> RunState {
        self.machine().run_state()
    }

    /// `-name`.
    pub fn name(&self) -> Option<&str> {
        self.config.name.as_deref()
    }

    /// `-uuid`.
    pub fn uuid(&self) -> Option<[u8; 16]> {
        self.config.machine.uuid
    }

    /// Stops the guest. While one is awaited: it will not start when it has arrived.
    pub fn stop(&self) -> Result<(), Error> {
        log::debug!("stop");
        if self.wish_on_arrival(false) {
            return Ok(());
        }
        match self.machine().pause()? {
            RunState::FinishMigrate => Err(Error::new(
                "The guest is being handed over, it can't be stopped now",
            )),
            // It is at rest, and runs again afterwards.
            RunState::SaveVm | RunState::RestoreVm => Err(Error::new(snapshots::UNDER_WAY)),
            _ => Ok(()),
        }
    }

    /// Runs the guest. `force` runs one that may be running elsewhere.
    pub fn cont(&self, force: bool) -> Result<(), Error> {
        log::debug!("cont, force {force}");
        if self.has_kvm() && self.wish_on_arrival(true) {
            return Ok(());
        }
        let mut job = self.job();
        self.machine().start_if(|state| {
            let refusal = match state {
                RunState::InMigrate => Some("This machine can not run: it has no accelerator"),
                RunState::FinishMigrate => {
                    Some("The guest is being handed over, it can't be resumed now")
                }
                RunState::Shutdown | RunState::InternalError => {
                    Some("Resetting the Virtual Machine is required")
                }
                RunState::SaveVm | RunState::RestoreVm => Some(snapshots::UNDER_WAY),
                _ => None,
            };
            if let Some(refusal) = refusal {
                return Err(refusal.to_owned());
            }
            if force {
                return Ok(());
            }
            if self.at_odds.load(Ordering::SeqCst) {
                return Err(snapshots::AT_ODDS.to_owned());
            }
            job.whereabouts(&self.board.read()).map_or(Ok(()), Err)
        })?;
        if force {
            self.at_odds.store(false, Ordering::SeqCst);
            job.forget();
            self.board.update(|snapshot| {
                if snapshot.direction == Direction::Incoming {
                    snapshot.handover_unknown = false;
                }
            });
        }
        Ok(())
    }

    /// What becomes of a guest that is on its way here; false if none is.
    fn wish_on_arrival(&self, run: bool) -> bool {
        // Held, so that the guest can not arrive in between.
        let mut autostart = lock(&self.autostart);
        let is_awaited = self.run_state() == RunState::InMigrate;
        if is_awaited {
            *autostart = run;
        }
        is_awaited
    }

    /// Resets the machine.
    pub fn system_reset(&self) -> Result<(), Error> {
        match self.run_state() {
            RunState::InMigrate => Err(Error::new("Guest is waiting for an incoming migration")),
            RunState::FinishMigrate => Err(Error::new("The guest is being handed over")),
            RunState::SaveVm | RunState::RestoreVm => Err(Error::new(snapshots::UNDER_WAY)),
            _ if self.config.no_reboot => {
                self.quit();
                Ok(())
            }
            _ => Ok(self.machine().reset()?),
        }
    }

    /// Ends the program, orderly, soon after this call: a migration under way is cancelled, or,
    /// when the guest has been let go already, brought to its end first.
    pub fn quit(&self) {
        self.quit_with(0);
    }

    /// Whether the program is to end, and with which status.
    pub fn exit_status(&self) -> Option<u8> {
        self.quitting
            .load(Ordering::SeqCst)
            .then(|| self.exit_status.load(Ordering::SeqCst))
    }

    /// The last thing done before the program ends: no thread of ours survives it.
    pub fn shut_down(&self) {
        // First: a migration that failed changes drives too.
        self.end_job();
        let _alone = self.drives.write().unwrap_or_else(PoisonError::into_inner);
        if self.run_state().is_running()
            && let Err(error) = self.machine().stop(RunState::Shutdown)
        {
            log::warn!("Failed to stop the guest: {error}");
        }
        let machine = self.machine();
        let released = machine.release_drives(true);
        // What could be written back was; the rest is lost in any case.
        if let Err(error) = released.or_else(|error| machine.release_drives(false).and(Err(error)))
        {
            log::error!("{error}");
        }
        for chardev in &self.chardevs {
            chardev.close();
        }
    }

    /// Status and statistics of the present or last migration.
    pub fn migration(&self) -> Snapshot {
        self.board.read()
    }

    /// The lines `globals:` is followed by in `info migrate`, name and value.
    pub fn migration_globals(&self) -> Vec<(&'static str, String)> {
        self.settings.globals()
    }

    /// All migration parameters in listing order.
    pub fn parameters(&self) -> Vec<ParameterInfo> {
        self.settings.parameters()
    }

    /// Sets a parameter from the text of `migrate_set_parameter`; takes effect at once, also on a
    /// migration under way.
    pub fn set_parameter(&self, name: &str, value: &str) -> Result<(), Error> {
        self.settings.set_parameter(name, value).map_err(Error::new)
    }

    /// All capabilities in listing order.
    pub fn capabilities(&self) -> Vec<(&'static str, bool)> {
        self.settings.capabilities()
    }

    /// Switches a capability; refused while a guest is leaving.
    pub fn set_capability(&self, name: &str, on: bool) -> Result<(), Error> {
        let snapshot = self.board.read();
        if snapshot.status.is_running() && snapshot.direction == Direction::Outgoing {
            return Err(Error::new(job::IN_PROGRESS));
        }
        self.settings.set_capability(name, on).map_err(Error::new)
    }

    /// Switches on exactly these log items (`none` switches all off).
    pub fn log(&self, items: &str) -> Result<(), Error> {
        logger::switch(items).map_err(|word| Error(format!("invalid log item: {word}")))
    }

    /// Appends the log to a file from now on.
    pub fn logfile(&self, file: &str) -> Result<(), Error> {
        logger::to_file(file.as_ref())
            .map_err(|error| Error(format!("Error opening logfile {file}: {}", Errno(&error))))
    }

    /// Log items and what they show.
    pub fn log_items(&self) -> &'static [(&'static str, &'static str)] {
        &logger::ITEMS
    }

    /// Lets `fd:N` name a descriptor the program was started with, unless the monitor has one of
    /// that name.
    fn lend_inherited(&self, uri: &Uri, fds: &mut NamedFds) {
        if let Uri::Fd(name) = uri
            && !fds.contains_key(name)
            && let Some(fd) = lock(&self.inherited).remove(name)
        {
            fds.insert(name.clone(), fd);
        }
    }

    fn machine(&self) -> Arc<Machine> {
        Arc::clone(&lock(&self.machine))
    }

    /// A machine like this one, for a guest that is to come.
    fn rebuild_machine(&self, drives: Vec<Arc<Drive>>) -> Result<Arc<Machine>, Error> {
        build_machine(&self.config, &self.chardevs, &self.events, Some(drives))
    }

    /// Ends the program with that status, orderly, soon after this call.
    pub fn quit_with(&self, status: u8) {
        self.exit_status.store(status, Ordering::SeqCst);
        self.quitting.store(true, Ordering::SeqCst);
        // The event loop looks at the flag after every turn: make it turn.
        self.poll.defer(Box::new(|| ()));
    }

    /// What the program does of its own accord when something happens to the machine.
    fn obey(&self, event: &Event) {
        if matches!(event, Event::Shutdown(_)) {
            self.quit_with(0);
        }
    }
}

/// The machine of that configuration; with drives, for a guest that is to come.
fn build_machine(
    config: &Config,
    chardevs: &[Arc<dyn Chardev>],
    events: &Arc<Events>,
    drives: Option<Vec<Arc<Drive>>>,
) -> Result<Arc<Machine>, Error> {
    let serial = config
        .machine
        .serial
        .as_ref()
        .and_then(|id| chardevs.iter().find(|chardev| chardev.id() == id))
        .map(Arc::clone);
    let told = Arc::clone(events);
    let sink: EventSink = Arc::new(move |event| told.tell(&event));
    let machine = match drives {
        None => Machine::new(&config.machine, serial, sink, config.incoming.is_some()),
        Some(drives) => Machine::with_drives(&config.machine, drives, serial, sink),
    }?;
    machine.set_reboots(!config.no_reboot);
    Ok(machine)
}

/// Locks what no panic can leave half-changed.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
