//! Running, stopping and resetting a machine.
//!
//! Whoever changes between running and not running holds the lifecycle lock. A guest that resets
//! itself does so on a vCPU's thread, which can not wait for itself: the request is noted there
//! and served by a thread of its own, or by whoever stops the machine first, so that a stopped
//! machine never has a reset outstanding.

use std::sync::atomic::Ordering;
use std::sync::{Mutex, MutexGuard, PoisonError, Weak};

use super::Machine;
use super::disks;
use crate::event::Event;
use crate::vm::boot::Processors;
use crate::vm::guest::Error;
use crate::vm::run_state::RunState;
use crate::vm::vcpu::Report;

impl Machine {
    /// Resets the machine as `system_reset` does; a running guest goes on running, from the start.
    /// A guest that is on its way here or away is not reset: half of it is elsewhere.
    pub fn reset(&self) -> Result<(), Error> {
        let _lifecycle = self.lock_lifecycle();
        let refused = |why: &str| Err(Error::State(why.to_owned()));
        match self.current_run_state() {
            RunState::InMigrate => refused("Guest is waiting for an incoming migration"),
            RunState::FinishMigrate => refused("The guest is being handed over"),
            RunState::SaveVm | RunState::RestoreVm => {
                refused("A snapshot is being taken or loaded")
            }
            _ => self.reset_locked(),
        }
    }

    /// Stops a running guest for the operator, and returns the state it was found in. A guest
    /// that does not run keeps its state.
    pub fn pause(&self) -> Result<RunState, Error> {
        let _lifecycle = self.lock_lifecycle();
        match self.current_run_state() {
            RunState::Running => self.stop_locked(RunState::Paused),
            other => Ok(other),
        }
    }

    /// Runs a guest that does not run, if `may` has nothing against it in the state it is in; that
    /// state can not change in between.
    pub fn start_if(&self, may: impl FnOnce(RunState) -> Result<(), String>) -> Result<(), Error> {
        let _lifecycle = self.lock_lifecycle();
        match self.current_run_state() {
            RunState::Running => Ok(()),
            other => {
                may(other).map_err(Error::State)?;
                self.start_locked()
            }
        }
    }

    /// Sets the run state of a guest that is not running (`inmigrate`, `prelaunch`, …).
    pub fn set_run_state(&self, state: RunState) {
        *self.lock_run_state() = state;
    }

    /// Whether a guest that resets itself starts again (the default), or stops in run state
    /// `shutdown` with [`Event::Shutdown`] (`-no-reboot`). [`Self::reset`] always starts it again.
    pub fn set_reboots(&self, reboots: bool) {
        self.reboots.store(reboots, Ordering::SeqCst);
    }

    pub(super) fn current_run_state(&self) -> RunState {
        *self.lock_run_state()
    }

    pub(super) fn start_guest(&self) -> Result<(), Error> {
        let _lifecycle = self.lock_lifecycle();
        if self.current_run_state().is_running() {
            return Ok(());
        }
        self.start_locked()
    }

    fn start_locked(&self) -> Result<(), Error> {
        disks::claim(&self.attached)?;
        disks::forget_faults(&self.attached);
        self.resume()?;
        self.set_run_state(RunState::Running);
        (self.events)(Event::Resume);
        Ok(())
    }

    pub(super) fn stop_guest(&self, state: RunState) -> Result<RunState, Error> {
        let _lifecycle = self.lock_lifecycle();
        self.stop_locked(state)
    }

    fn stop_locked(&self, state: RunState) -> Result<RunState, Error> {
        let before = self.current_run_state();
        if !before.is_running() {
            self.set_run_state(state);
            return Ok(before);
        }
        self.rest()?;
        self.set_run_state(state);
        (self.events)(Event::Stop);
        match self.reports.take() {
            // The request that failed is executed when the guest runs again, as it would be.
            None | Some(Report::IoError) => Ok(before),
            Some(Report::Shutdown) if self.reboots.load(Ordering::SeqCst) => {
                self.load_reset().map(|()| before)
            }
            Some(report) => Err(Error::State(self.end(report))),
        }
    }

    /// Puts the program into memory and, for a kernel, the boot vCPU at its entry.
    pub(super) fn boot(&self) -> Result<(), Error> {
        let (signature, features) = self.accel.processor();
        let processors = Processors {
            count: self.vcpus as u8,
            signature,
            features,
        };
        let Some(entry) = self.program.load(&self.map, &processors)? else {
            return Ok(());
        };
        let mut state = self.accel.reset_state();
        if let Some((boot_cpu, _)) = state.cpus.first_mut() {
            boot_cpu.enter(&entry);
        }
        self.accel.restore(state.into_reset())
    }

    /// A vCPU rests because the guest reset itself, or because KVM can not go on, or a disk does
    /// because a request failed; serves that unless somebody has.
    fn serve_report(&self) -> Result<(), Error> {
        let _lifecycle = self.lock_lifecycle();
        let was_running = self.current_run_state().is_running();
        match self.reports.take() {
            None => Ok(()),
            // The guest has been stopped for another reason, which stays.
            Some(Report::IoError) if !was_running => Ok(()),
            Some(Report::Shutdown) if self.reboots.load(Ordering::SeqCst) => self.reset_locked(),
            Some(report) => {
                self.rest()?;
                // What was under way may have failed until now. It must not stop the guest again.
                self.reports.forget_io_error();
                if was_running {
                    (self.events)(Event::Stop);
                }
                self.end(report);
                Ok(())
            }
        }
    }

    /// Enters the state of a machine at rest that can not go on, tells of it, and says why.
    fn end(&self, report: Report) -> String {
        match report {
            Report::IoError => {
                self.set_run_state(RunState::IoError);
                "a disk's request failed".to_owned()
            }
            Report::Shutdown => {
                self.set_run_state(RunState::Shutdown);
                (self.events)(Event::Shutdown("guest-reset".to_owned()));
                "the guest has shut down".to_owned()
            }
            Report::Failed(why) => {
                self.set_run_state(RunState::InternalError);
                (self.events)(Event::Notice(why.clone()));
                why
            }
        }
    }

    fn reset_locked(&self) -> Result<(), Error> {
        let state = self.current_run_state();
        if state.is_running() {
            self.rest()?;
            self.load_reset()?;
            return self.resume().map_err(|error| self.broken(error));
        }
        self.load_reset()?;
        if !matches!(state, RunState::InMigrate | RunState::FinishMigrate) {
            self.set_run_state(RunState::Prelaunch);
        }
        Ok(())
    }

    /// Everything as at power on, the program loaded anew. A machine at rest of which that could
    /// not be made is in run state `internal-error` afterwards.
    fn load_reset(&self) -> Result<(), Error> {
        self.try_load_reset().map_err(|error| self.broken(error))
    }

    fn try_load_reset(&self) -> Result<(), Error> {
        self.reports.take();
        self.accel.restore(self.accel.reset_state().into_reset())?;
        if let Some(rtc) = &self.bus.rtc {
            rtc.reset();
        }
        if let Some(serial) = &self.bus.serial {
            serial.restore(Default::default());
        }
        for disk in &self.bus.disks {
            disk.restore(disk.reset_state()).map_err(Error::State)?;
        }
        self.boot()?;
        (self.events)(Event::Reset);
        Ok(())
    }

    /// Says that the machine, which is at rest, can not go on because of `error`.
    fn broken(&self, error: Error) -> Error {
        let was_running = self.current_run_state().is_running();
        self.set_run_state(RunState::InternalError);
        if was_running {
            (self.events)(Event::Stop);
        }
        error
    }

    fn resume(&self) -> Result<(), Error> {
        let Some(kvm) = self.accel.kvm() else {
            return Err(Error::State(
                "This machine can not run: it has no accelerator (-accel none)".to_owned(),
            ));
        };
        kvm.start()?;
        self.bus.set_running(true);
        Ok(())
    }

    fn rest(&self) -> Result<(), Error> {
        if let Some(kvm) = self.accel.kvm() {
            kvm.stop()?;
        }
        self.bus.set_running(false);
        Ok(())
    }

    fn lock_lifecycle(&self) -> MutexGuard<'_, ()> {
        self.lifecycle
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_run_state(&self) -> MutexGuard<'_, RunState> {
        self.run_state
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// What vCPUs and disks have reported and nobody has served yet.
#[derive(Default)]
pub(super) struct Reports {
    pending: Mutex<Option<Report>>,
}

impl Reports {
    /// Notes a report, on the vCPU's or the disk's thread, before that counts as resting. Of two
    /// the graver one counts.
    fn note(&self, report: Report) {
        let mut pending = self.lock();
        match (&*pending, &report) {
            (Some(Report::Failed(_)), _) | (Some(Report::Shutdown), Report::IoError) => {}
            _ => *pending = Some(report),
        }
    }

    fn take(&self) -> Option<Report> {
        self.lock().take()
    }

    /// Of a machine at rest: what failed is executed when the guest runs again.
    fn forget_io_error(&self) {
        self.lock().take_if(|report| *report == Report::IoError);
    }

    fn lock(&self) -> MutexGuard<'_, Option<Report>> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Takes a vCPU's or a disk's report on its own thread and has it served on another: a machine waits for its
/// vCPUs, and so does its end.
pub(super) fn accept(reports: &Reports, machine: Option<&Weak<Machine>>, report: Report) {
    reports.note(report);
    let Some(machine) = machine.map(Weak::clone) else {
        return;
    };
    let serve = move || {
        if let Some(machine) = machine.upgrade()
            && let Err(error) = machine.serve_report()
        {
            (machine.events)(Event::Notice(error.to_string()));
        }
    };
    if let Err(error) = std::thread::Builder::new()
        .name("machine".to_owned())
        .spawn(serve)
    {
        // The report stays pending; the next stop serves it.
        log::error!("could not start a thread for a report: {error}");
    }
}
