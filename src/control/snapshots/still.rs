//! A guest that stands still while its state is written down, and stays where it is.

use std::sync::Arc;

use crate::block::Drive;
use crate::vm::dirty::DirtyLog;
use crate::vm::guest::{DeviceLoader, Error, Guest, SavedSection, SectionHeader};
use crate::vm::machine::Machine;
use crate::vm::memory::RamBlock;
use crate::vm::run_state::RunState;

/// What the engine sees of the machine: nothing that it does to it changes where the guest is.
pub(super) struct Still<'a> {
    pub(super) machine: &'a Machine,
    /// What the guest was doing before it was stopped for this.
    pub(super) before: RunState,
}

impl Guest for Still<'_> {
    fn machine_type(&self) -> &str {
        self.machine.machine_type()
    }

    fn ram(&self) -> &[Arc<RamBlock>] {
        self.machine.ram()
    }

    fn dirty_log(&self) -> &dyn DirtyLog {
        self.machine.dirty_log()
    }

    fn drives(&self) -> Vec<Arc<Drive>> {
        Vec::new()
    }

    fn claim_drives(&self) -> Result<(), Error> {
        Ok(())
    }

    fn release_drives(&self, _flush: bool) -> Result<(), Error> {
        Ok(())
    }

    fn run_state(&self) -> RunState {
        self.before
    }

    fn stop(&self, _state: RunState) -> Result<RunState, Error> {
        Ok(self.before)
    }

    fn start(&self) -> Result<(), Error> {
        Ok(())
    }

    fn save_devices(&self) -> Result<Vec<SavedSection>, Error> {
        self.machine.save_devices()
    }

    fn sections(&self) -> Vec<SectionHeader> {
        self.machine.sections()
    }

    fn loader(&self) -> Box<dyn DeviceLoader + '_> {
        self.machine.loader()
    }
}
