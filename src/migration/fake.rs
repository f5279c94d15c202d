//! For tests: a guest of a few pages that dirties them by script, and that knows who runs it.
//!
//! Its dirty log remembers every page ever written until `sync` takes the bit away. A migration
//! that fails and does not give the bits back makes the next one lose pages, visibly.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use serde_json::json;

use crate::block::Drive;
use crate::vm::dirty::{DirtyLog, DirtySink};
use crate::vm::guest::{DeviceLoader, Error, Guest, SavedSection, SectionHeader};
use crate::vm::memory::{Backing, PAGE_SIZE, RamBlock};
use crate::vm::run_state::RunState;
use crate::vmstate::StateReader;

/// How many guests run at this instant, all sides taken together.
#[derive(Default)]
pub(super) struct Owners {
    running: AtomicI32,
    was_double: AtomicBool,
    /// Who has locked the images that both sides use: an address that only that guest has, or 0.
    locked: AtomicUsize,
}

impl Owners {
    fn claim(&self, who: usize) -> bool {
        let seen = self
            .locked
            .compare_exchange(0, who, Ordering::SeqCst, Ordering::SeqCst);
        seen.is_ok() || seen == Err(who)
    }

    fn release(&self, who: usize) {
        let _ = self
            .locked
            .compare_exchange(who, 0, Ordering::SeqCst, Ordering::SeqCst);
    }

    fn change(&self, by: i32) {
        if self.running.fetch_add(by, Ordering::SeqCst) + by > 1 {
            self.was_double.store(true, Ordering::SeqCst);
        }
    }

    pub(super) fn running(&self) -> i32 {
        self.running.load(Ordering::SeqCst)
    }

    pub(super) fn was_double(&self) -> bool {
        self.was_double.load(Ordering::SeqCst)
    }
}

/// A store of the guest: block, page, and the byte the page is filled with.
pub(super) type Store = (usize, usize, u8);

/// What the guest does around one reading of its log.
#[derive(Clone, Debug, Default)]
pub(super) struct Step {
    /// Before the bits are read.
    pub before: Vec<Store>,
    /// After they were read, before the pages are sent.
    pub after: Vec<Store>,
}

pub(super) struct FakeGuest {
    blocks: Vec<Arc<RamBlock>>,
    /// What disks it has.
    pub drives: Vec<Arc<Drive>>,
    state: Mutex<RunState>,
    owners: Arc<Owners>,
    log: Mutex<Vec<Vec<u64>>>,
    script: Mutex<VecDeque<Step>>,
    devices: Mutex<Vec<u32>>,
    /// The mutant: bits that are given back are lost.
    pub forgets: bool,
    /// A device that says no when its state is applied.
    pub refuses: bool,
    /// A guest that KVM gives up on when it is to be stopped.
    pub dies: bool,
    /// Somebody else has its images by the time it wants them back.
    pub is_robbed: AtomicBool,
    /// A defect of ours: the next time devices are saved the thread panics.
    pub panics: AtomicBool,
}

impl FakeGuest {
    /// A guest at rest with blocks of that many pages and that many devices.
    pub(super) fn new(owners: &Arc<Owners>, pages: &[usize], devices: usize) -> Self {
        let block = |(index, pages): (usize, &usize)| {
            let name = ["fake.ram", "fake.bios"][index];
            let length = (pages * PAGE_SIZE) as u64;
            Arc::new(RamBlock::new(name, length, Backing::Anonymous).unwrap())
        };
        Self {
            blocks: pages.iter().enumerate().map(block).collect(),
            drives: Vec::new(),
            state: Mutex::new(RunState::InMigrate),
            owners: owners.clone(),
            log: Mutex::new(
                pages
                    .iter()
                    .map(|pages| vec![0; pages.div_ceil(64)])
                    .collect(),
            ),
            script: Mutex::default(),
            devices: Mutex::new(vec![0; devices]),
            forgets: false,
            refuses: false,
            dies: false,
            is_robbed: AtomicBool::new(false),
            panics: AtomicBool::new(false),
        }
    }

    /// Stores into memory, as the guest does.
    pub(super) fn store(&self, (block, page, fill): Store) {
        let mut content = [fill; PAGE_SIZE];
        if fill != 0 {
            content[..8].copy_from_slice(&(page as u64).to_le_bytes());
        }
        self.blocks[block].page(page).write(&content);
        self.log.lock().unwrap()[block][page / 64] |= 1 << (page % 64);
    }

    /// What the guest will do while it is migrated.
    pub(super) fn plan(&self, script: impl IntoIterator<Item = Step>) {
        self.script.lock().unwrap().extend(script);
    }

    pub(super) fn set_device(&self, index: usize, value: u32) {
        self.devices.lock().unwrap()[index] = value;
    }

    /// Memory and devices.
    pub(super) fn content(&self) -> (Vec<Vec<u8>>, Vec<u32>) {
        let memory = self.blocks.iter().map(|block| {
            let mut bytes = Vec::new();
            for page in 0..block.pages() {
                block.page(page).out().copy_to(&mut bytes);
            }
            bytes
        });
        (memory.collect(), self.devices.lock().unwrap().clone())
    }

    fn side(&self) -> usize {
        self.blocks.as_ptr() as usize
    }

    fn enter(&self, state: RunState) -> RunState {
        let mut now = self.state.lock().unwrap();
        self.owners
            .change(i32::from(state.is_running()) - i32::from(now.is_running()));
        std::mem::replace(&mut *now, state)
    }

    fn header(index: usize) -> SectionHeader {
        SectionHeader {
            idstr: "toy".to_owned(),
            instance: index as u32,
            version: 2,
        }
    }
}

impl Drop for FakeGuest {
    fn drop(&mut self) {
        self.enter(RunState::Shutdown);
        self.owners.release(self.side());
    }
}

impl Guest for FakeGuest {
    fn machine_type(&self) -> &str {
        "fake"
    }

    fn ram(&self) -> &[Arc<RamBlock>] {
        &self.blocks
    }

    fn dirty_log(&self) -> &dyn DirtyLog {
        self
    }

    fn drives(&self) -> Vec<Arc<Drive>> {
        self.drives.clone()
    }

    fn claim_drives(&self) -> Result<(), Error> {
        match !self.is_robbed.load(Ordering::SeqCst) && self.owners.claim(self.side()) {
            true => Ok(()),
            false => Err(Error::State("the images are somebody else's".to_owned())),
        }
    }

    fn release_drives(&self, _flush: bool) -> Result<(), Error> {
        assert!(!self.run_state().is_running(), "its disks are in use");
        self.owners.release(self.side());
        Ok(())
    }

    fn run_state(&self) -> RunState {
        *self.state.lock().unwrap()
    }

    fn stop(&self, state: RunState) -> Result<RunState, Error> {
        if self.dies && self.run_state().is_running() {
            self.enter(RunState::InternalError);
            return Err(Error::State("KVM gave up".to_owned()));
        }
        Ok(self.enter(state))
    }

    fn start(&self) -> Result<(), Error> {
        self.claim_drives()?;
        self.enter(RunState::Running);
        Ok(())
    }

    fn save_devices(&self) -> Result<Vec<SavedSection>, Error> {
        assert!(!self.run_state().is_running(), "devices are saved at rest");
        assert!(!self.panics.swap(false, Ordering::SeqCst), "on purpose");
        let save = |(index, value): (usize, &u32)| SavedSection {
            header: Self::header(index),
            body: value.to_be_bytes().to_vec(),
            description: json!({
                "vmsd_name": "toy",
                "version": 2,
                "fields": [{"name": "value", "type": "uint32", "size": 4}],
            }),
        };
        Ok(self
            .devices
            .lock()
            .unwrap()
            .iter()
            .enumerate()
            .map(save)
            .collect())
    }

    fn sections(&self) -> Vec<SectionHeader> {
        (0..self.devices.lock().unwrap().len())
            .map(Self::header)
            .collect()
    }

    fn loader(&self) -> Box<dyn DeviceLoader + '_> {
        let count = self.devices.lock().unwrap().len();
        Box::new(Loader {
            guest: self,
            values: vec![None; count],
        })
    }
}

impl DirtyLog for FakeGuest {
    fn start(&self) -> Result<(), Error> {
        Ok(())
    }

    fn sync(&self, sink: &mut dyn DirtySink) -> Result<(), Error> {
        let step = match self.run_state().is_running() {
            true => self.script.lock().unwrap().pop_front().unwrap_or_default(),
            false => Step::default(),
        };
        step.before.into_iter().for_each(|store| self.store(store));
        let mut log = self.log.lock().unwrap();
        for (block, words) in log.iter_mut().enumerate() {
            for (word, bits) in words.iter_mut().enumerate().filter(|(_, bits)| **bits != 0) {
                sink.dirty(block, word, std::mem::take(bits));
            }
        }
        drop(log);
        step.after.into_iter().for_each(|store| self.store(store));
        Ok(())
    }

    fn give_back(&self, block: usize, word: usize, bits: u64) {
        if !self.forgets {
            self.log.lock().unwrap()[block][word] |= bits;
        }
    }

    fn stop(&self) {}
}

struct Loader<'a> {
    guest: &'a FakeGuest,
    values: Vec<Option<u32>>,
}

impl DeviceLoader for Loader<'_> {
    fn load(&mut self, header: &SectionHeader, body: &mut dyn StateReader) -> Result<(), Error> {
        let index = header.instance as usize;
        let slot = self.values.get_mut(index).filter(|_| header.idstr == "toy");
        let slot = slot.ok_or_else(|| {
            Error::Section(crate::vm::guest::unknown_section(
                &header.idstr,
                header.instance,
            ))
        })?;
        if header.version != 2 {
            let version = header.version;
            let text = format!("savevm: unsupported version {version} for 'toy' v2");
            return Err(Error::Section(text));
        }
        let mut bytes = [0; 4];
        body.read(&mut bytes)
            .map_err(|error| Error::Section(error.to_string()))?;
        *slot = Some(u32::from_be_bytes(bytes));
        Ok(())
    }

    fn missing(&self) -> Vec<String> {
        let missing = self
            .values
            .iter()
            .enumerate()
            .filter(|(_, value)| value.is_none());
        missing.map(|(index, _)| format!("toy {index}")).collect()
    }

    fn apply(self: Box<Self>) -> Result<(), Error> {
        if self.guest.refuses {
            return Err(Error::Section("toy 0: value refused".to_owned()));
        }
        let values = self.values.iter().map(|value| value.unwrap_or_default());
        *self.guest.devices.lock().unwrap() = values.collect();
        Ok(())
    }
}
