//! The dirty log of a machine: KVM's over all its slots, and what this program wrote itself.

use std::sync::{Arc, Mutex, PoisonError};

use super::{DirtyLog, DirtySink};
use crate::vm::guest::Error;
use crate::vm::kvm::Vm;
use crate::vm::map::Map;
use crate::vm::memory::PAGE_SIZE;

/// Both logs; without KVM only this program's.
pub(in crate::vm) struct MachineLog {
    map: Arc<Map>,
    vm: Option<Arc<Vm>>,
    /// One buffer per slot while the log is on, so that a sync allocates nothing.
    buffers: Mutex<Vec<Vec<u64>>>,
}

impl MachineLog {
    /// The log of the memory in `map`, which `vm` has as its slots. It is off.
    pub(in crate::vm) fn new(map: Arc<Map>, vm: Option<Arc<Vm>>) -> Self {
        Self {
            map,
            vm,
            buffers: Mutex::default(),
        }
    }

    fn switch(&self, on: bool) -> Result<(), Error> {
        let Some(vm) = &self.vm else { return Ok(()) };
        for index in 0..self.map.windows().len() {
            let (slot, block) = self.map.slot(index);
            vm.set_slot(&slot, block, on)
                .map_err(|source| Error::System {
                    what: format!("could not switch the dirty log of slot {index}"),
                    source,
                })?;
        }
        Ok(())
    }
}

impl DirtyLog for MachineLog {
    fn start(&self) -> Result<(), Error> {
        let mut buffers = self.buffers.lock().unwrap_or_else(PoisonError::into_inner);
        self.switch(true)?;
        *buffers = self
            .map
            .windows()
            .iter()
            .map(|w| vec![0; pages(w.len).div_ceil(64)])
            .collect();
        // After the log is on: what is touched from here on is in it.
        for (block, written) in self.map.blocks().iter().zip(self.map.written()) {
            block
                .populated(|run| written.set_range(run.start, run.len()))
                .map_err(|source| Error::System {
                    what: format!(
                        "could not tell which pages of '{}' are in use",
                        block.name()
                    ),
                    source,
                })?;
        }
        Ok(())
    }

    fn sync(&self, sink: &mut dyn DirtySink) -> Result<(), Error> {
        let mut buffers = self.buffers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(vm) = &self.vm {
            for (index, (window, buffer)) in self
                .map
                .windows()
                .iter()
                .zip(buffers.iter_mut())
                .enumerate()
            {
                vm.dirty_log(index as u32, pages(window.len), buffer)
                    .map_err(|source| Error::System {
                        what: format!("could not read the dirty log of slot {index}"),
                        source,
                    })?;
                forward(window.block, pages(window.offset), buffer, sink);
            }
        }
        for (block, written) in self.map.written().iter().enumerate() {
            written.drain(|word, bits| sink.dirty(block, word, bits));
        }
        Ok(())
    }

    fn give_back(&self, block: usize, word: usize, bits: u64) {
        if let Some(written) = self.map.written().get(block) {
            written.set(word, bits);
        }
    }

    fn stop(&self) {
        let mut buffers = self.buffers.lock().unwrap_or_else(PoisonError::into_inner);
        buffers.clear();
        if let Err(error) = self.switch(false) {
            // The guest runs on, only slower.
            log::warn!("{error}");
        }
    }
}

fn pages(bytes: u64) -> usize {
    (bytes / PAGE_SIZE as u64) as usize
}

/// Passes a slot's words on as words of the block in which the slot begins at page `first`.
fn forward(block: usize, first: usize, words: &[u64], sink: &mut dyn DirtySink) {
    let (base, shift) = (first / 64, first % 64);
    for (index, bits) in words
        .iter()
        .copied()
        .enumerate()
        .filter(|(_, bits)| *bits != 0)
    {
        let low = bits << shift;
        if low != 0 {
            sink.dirty(block, base + index, low);
        }
        if shift != 0 && bits >> (64 - shift) != 0 {
            sink.dirty(block, base + index + 1, bits >> (64 - shift));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::vm::map::{FIRMWARE, RAM};
    use crate::vm::memory::{Backing, RamBlock};

    #[derive(Default)]
    struct Pages(BTreeSet<(usize, usize)>);

    impl DirtySink for Pages {
        fn dirty(&mut self, block: usize, word: usize, bits: u64) {
            assert_ne!(bits, 0);
            let set = (0..64).filter(|bit| bits >> bit & 1 != 0);
            self.0.extend(set.map(|bit| (block, word * 64 + bit)));
        }
    }

    proptest! {
        #[test]
        fn slots_map_to_pages_of_their_block(first in 0usize..200, pages in proptest::collection::btree_set(0usize..256, 0..40)) {
            let mut words = [0u64; 4];
            for page in &pages {
                words[page / 64] |= 1 << (page % 64);
            }
            let mut seen = Pages::default();
            forward(3, first, &words, &mut seen);
            let expected: BTreeSet<_> = pages.iter().map(|page| (3, first + page)).collect();
            prop_assert_eq!(seen.0, expected);
        }
    }

    fn synced(log: &MachineLog) -> BTreeSet<(usize, usize)> {
        let mut pages = Pages::default();
        log.sync(&mut pages).unwrap();
        pages.0
    }

    #[test]
    fn own_writes_and_what_was_given_back_are_seen_once() {
        let block = |name, len| Arc::new(RamBlock::new(name, len, Backing::Anonymous).unwrap());
        let firmware = block("pc.bios", 64 << 10);
        firmware.page(3).write(&[1; PAGE_SIZE]);
        let map = Arc::new(Map::new(block("microvm.ram", 4 << 20), firmware).unwrap());
        let log = MachineLog::new(Arc::clone(&map), None);
        log.start().unwrap();
        let first = synced(&log);
        assert!(first.contains(&(FIRMWARE, 3)));
        assert!(
            first.iter().all(|(block, _)| *block == FIRMWARE),
            "untouched RAM is not dirty"
        );
        assert!(synced(&log).is_empty());

        map.memory()
            .write_slice(&[1, 2], GuestAddress(0x20_0fff))
            .unwrap();
        assert_eq!(synced(&log), [(RAM, 512), (RAM, 513)].into());
        log.give_back(RAM, 8, 1 << 63);
        log.give_back(RAM, 16, 1);
        log.give_back(7, 0, 1);
        log.stop();
        log.start().unwrap();
        let again = synced(&log);
        assert!(again.contains(&(RAM, 575)) && again.contains(&(RAM, 513)));
        assert!(!again.contains(&(RAM, 1024)), "the block has 1024 pages");
    }
}
