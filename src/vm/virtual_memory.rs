//! Memory as a vCPU sees it.

use std::sync::Arc;

use super::machine::Machine;
use super::memory::PAGE_SIZE;
use super::paging::{self, Paging};

/// Guest-virtual memory, by page tables as they stand at each access and by the registers that
/// the vCPU had when this was made.
pub struct VirtualMemory {
    machine: Arc<Machine>,
    paging: Paging,
}

impl VirtualMemory {
    pub(super) fn new(machine: Arc<Machine>, paging: Paging) -> Self {
        Self { machine, paging }
    }

    /// Guest-virtual to guest-physical; `None` where nothing is mapped.
    pub fn translate(&self, address: u64) -> Option<u64> {
        paging::translate(&self.paging, address, &|at, to| {
            self.machine.read_physical(at, to).ok()
        })
    }

    /// Reads memory; `Err` holds the first address that can not be read, rounded down to where
    /// the page or the whole begins.
    pub fn read(&self, address: u64, to: &mut [u8]) -> Result<(), u64> {
        let mut at = address;
        let mut rest = to;
        while !rest.is_empty() {
            let in_page = PAGE_SIZE - (at as usize & (PAGE_SIZE - 1));
            let (now, later) = rest.split_at_mut(in_page.min(rest.len()));
            let physical = self.translate(at).ok_or(at)?;
            self.machine.read_physical(physical, now).map_err(|_| at)?;
            at = at.wrapping_add(now.len() as u64);
            rest = later;
        }
        Ok(())
    }
}
