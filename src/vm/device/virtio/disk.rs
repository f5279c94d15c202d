//! A disk in a slot: registers for vCPUs, and a thread that does what the ring says.
//!
//! The thread holds the device while it works through the ring, and lets go of it between two
//! requests when somebody else wants it. A vCPU that only wants to know why it was interrupted
//! does not wait for requests: interrupt status has a lock of its own.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use vmm_sys_util::eventfd::EventFd;

use super::registers::{self, Register, Registers};
use super::request::{Scratch, Target};
use super::ring::{Broken, Chain, Queue, Ring};
use super::section::State;
use super::{CONFIG_WCE, FLUSH, OFFERED, RO, SLOT_BYTES, SLOTS_BASE, config, status};
use crate::block::Backend;
use crate::vm::device::bus::IrqLine;
use crate::vm::guest::Error;
use crate::vm::map::Map;

/// The device.
pub(crate) struct Disk {
    shared: Arc<Shared>,
    worker: Option<JoinHandle<()>>,
}

/// What a disk is made of.
pub(crate) struct Parts {
    /// Number of its slot, below 8.
    pub(crate) slot: usize,
    /// The serial number the guest can ask for.
    pub(crate) serial: String,
    /// Its bytes.
    pub(crate) image: Arc<dyn Backend>,
    /// Guest memory.
    pub(crate) map: Arc<Map>,
    /// Its interrupt line.
    pub(crate) irq: IrqLine,
}

struct Shared {
    slot: usize,
    serial: String,
    image: Arc<dyn Backend>,
    map: Arc<Map>,
    offered: u64,
    core: Mutex<Core>,
    /// How many want the core while the worker may have it.
    visitors: AtomicU32,
    line: Mutex<Line>,
    irq: IrqLine,
    kick: EventFd,
    has_ended: AtomicBool,
}

/// What the worker holds while it works.
struct Core {
    registers: Registers,
    config: Vec<u8>,
    ring: Ring,
    entries: u32,
    retries: Vec<u16>,
    is_broken: bool,
    is_started: bool,
    is_disabled: bool,
    /// What is written may stay in the host's cache until the guest flushes.
    has_cache: bool,
    is_running: bool,
    /// The worker has let go with requests left in the ring.
    is_left: bool,
}

/// The interrupt line.
#[derive(Default)]
struct Line {
    isr: u8,
    is_high: bool,
}

/// Interrupt status: something was given back.
const USED: u8 = 1;

impl Disk {
    /// The disk at reset, of a guest that does not run.
    ///
    /// # Errors
    /// The host has no event descriptor or no thread left.
    pub(crate) fn new(parts: Parts) -> Result<Arc<Self>, Error> {
        let failed = |source| Error::System {
            what: format!("virtio-blk in slot {}", parts.slot),
            source,
        };
        let offered = match parts.image.is_read_only() {
            true => OFFERED | RO,
            false => OFFERED,
        };
        let shared = Arc::new(Shared {
            slot: parts.slot,
            serial: parts.serial,
            image: parts.image,
            map: parts.map,
            offered,
            core: Mutex::new(Core::new(State::at_reset(offered), None)),
            visitors: AtomicU32::new(0),
            line: Mutex::default(),
            irq: parts.irq,
            kick: EventFd::new(libc::EFD_CLOEXEC).map_err(failed)?,
            has_ended: AtomicBool::new(false),
        });
        let its = Arc::clone(&shared);
        let worker = std::thread::Builder::new()
            .name(format!("disk {}", parts.slot))
            .spawn(move || its.work())
            .map_err(failed)?;
        Ok(Arc::new(Self {
            shared,
            worker: Some(worker),
        }))
    }

    /// Number of its slot.
    pub(crate) fn slot(&self) -> usize {
        self.shared.slot
    }

    /// Name of its section.
    pub(crate) fn section(&self) -> String {
        let base = SLOTS_BASE + SLOT_BYTES * self.slot() as u64;
        format!("virtio-mmio@{base:016x}/virtio-blk")
    }

    /// Where a write of four bytes, all zero, is a kick, and what to signal for it: KVM can do
    /// that without leaving the guest for long.
    pub(crate) fn doorbell(&self) -> (u64, &EventFd) {
        let base = SLOTS_BASE + SLOT_BYTES * self.slot() as u64;
        (base + registers::NOTIFY, &self.shared.kick)
    }

    /// The guest starts or stops. A stopped one's requests under way are finished first; what
    /// waits in the ring stays there.
    pub(crate) fn set_running(&self, is_running: bool) {
        self.shared.visit(|core| core.is_running = is_running);
        if is_running {
            // A kick may have been lost on the way here.
            self.shared.kick();
        }
    }

    /// State of a disk at rest at power on, to load a section into.
    pub(crate) fn reset_state(&self) -> State {
        State::at_reset(self.shared.offered)
    }

    /// State of a disk whose guest does not run.
    ///
    /// # Errors
    /// It was given requests that are still to be executed.
    pub(crate) fn state(&self) -> Result<State, Error> {
        let mut state = self.shared.visit(|core| State {
            registers: core.registers.clone(),
            isr: 0,
            config: core.config.clone(),
            queue: core.ring.queue().clone(),
            entries: core.entries,
            retries: core.retries.clone(),
            is_broken: core.is_broken,
            is_started: core.is_started,
            is_disabled: core.is_disabled,
            offered: self.shared.offered,
        });
        state.isr = lock(&self.shared.line).isr;
        if !state.retries.is_empty() {
            return Err(Error::State(format!(
                "'{}' came here with requests under way, which only a running guest's disk \
                 executes: let the guest run first",
                self.section()
            )));
        }
        Ok(state)
    }

    /// Whether the state goes with what guest memory holds; the text says what does not.
    pub(crate) fn check(&self, state: &State) -> Result<(), String> {
        self.shared
            .ring_of(state)
            .map(|_| ())
            .map_err(|Broken(why)| why)
    }

    /// Takes that state, of a guest that does not run. Drives the interrupt line even if its
    /// level does not change.
    ///
    /// # Errors
    /// As [`Self::check`].
    pub(crate) fn restore(&self, state: State) -> Result<(), String> {
        let ring = self.shared.ring_of(&state).map_err(|Broken(why)| why)?;
        let isr = state.isr;
        self.shared.visit(|core| {
            let is_running = core.is_running;
            *core = Core::new(state, Some(ring));
            core.is_running = is_running;
        });
        let mut line = lock(&self.shared.line);
        line.isr = isr;
        line.is_high = isr != 0;
        (self.shared.irq)(line.is_high);
        Ok(())
    }

    /// A vCPU reads `size` bytes, 1, 2 or 4, at an offset in the slot.
    pub(crate) fn read(&self, offset: u64, size: usize) -> u32 {
        let shared = &self.shared;
        if let Some(at) = offset.checked_sub(registers::CONFIG) {
            return shared.visit(|core| {
                core.config = config::bytes(shared.image.sectors(), core.has_cache).to_vec();
                config::read(&core.config, at, size)
            });
        }
        let (Some(register), 4) = (Register::at(offset), size) else {
            return 0;
        };
        match register {
            Register::DeviceId => registers::BLOCK,
            Register::InterruptStatus => u32::from(lock(&shared.line).isr),
            Register::ShmLen => u32::MAX,
            Register::HostFeatures => shared.visit(|core| match core.registers.host_features_sel {
                0 => shared.offered as u32,
                _ => 0,
            }),
            Register::QueueNumMax => shared.visit(|core| match core.registers.queue_sel {
                0 => registers::ENTRIES,
                _ => 0,
            }),
            Register::QueuePfn => shared.visit(|core| match core.registers.queue_sel {
                0 => (core.ring.queue().desc >> core.registers.page_shift) as u32,
                _ => 0,
            }),
            Register::Status => shared.visit(|core| core.registers.status).into(),
            other => other.of_empty_slot(),
        }
    }

    /// A vCPU writes.
    pub(crate) fn write(&self, offset: u64, size: usize, value: u32) {
        let shared = &self.shared;
        if let Some(at) = offset.checked_sub(registers::CONFIG) {
            return shared.visit(|core| core.write_config(at as usize, size, value));
        }
        let (Some(register), 4) = (Register::at(offset), size) else {
            return;
        };
        match register {
            Register::QueueNotify if value == 0 => shared.kick(),
            Register::InterruptAck => shared.acknowledge(value as u8),
            _ => shared.visit(|core| shared.write(core, register, value)),
        }
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        self.shared.has_ended.store(true, Ordering::SeqCst);
        // Counted as a visitor, so that the worker finishes one request, not all.
        self.shared.visitors.fetch_add(1, Ordering::SeqCst);
        self.shared.kick();
        if let Some(worker) = self.worker.take()
            && worker.join().is_err()
        {
            log::error!("a disk's thread panicked");
        }
    }
}

impl Core {
    fn new(state: State, ring: Option<Ring>) -> Self {
        let features = state.registers.features;
        let wce = match features & CONFIG_WCE != 0 {
            // The guest's own choice, if it ever looked.
            true => state.config.iter().all(|byte| *byte == 0) || state.config[config::WCE] != 0,
            false => state.registers.status & status::DRIVER_OK == 0 || features & FLUSH != 0,
        };
        Self {
            registers: state.registers,
            config: state.config,
            ring: ring.unwrap_or_else(|| Ring::new(state.queue)),
            entries: state.entries,
            retries: state.retries,
            is_broken: state.is_broken,
            is_started: state.is_started,
            is_disabled: state.is_disabled,
            has_cache: wce,
            is_running: false,
            is_left: false,
        }
    }

    /// The guest resets the device.
    fn reset(&mut self) {
        self.registers.reset_device();
        self.ring = Ring::new(Queue {
            align: self.ring.queue().align,
            ..Queue::new(self.entries)
        });
        self.retries.clear();
        self.is_broken = false;
        self.is_started = false;
        self.is_disabled = false;
        self.has_cache = true;
    }

    fn write_config(&mut self, at: usize, size: usize, value: u32) {
        if let Some(bytes) = self.config.get_mut(at..at + size) {
            bytes.copy_from_slice(&value.to_le_bytes()[..size]);
            self.has_cache = self.config[config::WCE] != 0;
        }
    }

    fn set_status(&mut self, value: u8) {
        self.registers.status = value;
        self.is_started = value & status::DRIVER_OK != 0;
        let features = self.registers.features;
        if self.is_started && features & CONFIG_WCE == 0 {
            // A driver that can not flush must not have to.
            self.has_cache = features & FLUSH != 0;
        }
    }

    fn fail(&mut self, Broken(why): &Broken) {
        log::error!("{why}");
        self.is_broken = true;
    }
}

impl Shared {
    /// Does something with the core; the worker lets go of it after its present request.
    fn visit<T>(&self, change: impl FnOnce(&mut Core) -> T) -> T {
        self.visitors.fetch_add(1, Ordering::SeqCst);
        let mut core = lock(&self.core);
        self.visitors.fetch_sub(1, Ordering::SeqCst);
        let result = change(&mut core);
        let has_work = std::mem::take(&mut core.is_left);
        drop(core);
        if has_work {
            self.kick();
        }
        result
    }

    fn write(&self, core: &mut Core, register: Register, value: u32) {
        let registers = &mut core.registers;
        let is_queue = registers.queue_sel == 0;
        match register {
            Register::HostFeaturesSel => registers.host_features_sel = u32::from(value != 0),
            Register::GuestFeaturesSel => registers.guest_features_sel = u32::from(value != 0),
            Register::GuestFeatures if registers.guest_features_sel == 0 => {
                registers.features = u64::from(value) & self.offered;
            }
            Register::GuestPageSize => registers.set_page_size(value),
            Register::QueueSel if value < registers::QUEUES => registers.queue_sel = value as u16,
            Register::QueueNum if is_queue => core.ring.set_num(value),
            Register::QueueAlign if is_queue => core.ring.set_align(value),
            Register::QueuePfn if value == 0 => self.reset(core),
            Register::QueuePfn if is_queue => {
                let address = u64::from(value) << registers.page_shift;
                if let Err(error) = core.ring.set_address(address, self.map.memory()) {
                    core.fail(&error);
                }
            }
            Register::Status => {
                core.set_status(value as u8);
                if core.registers.status == 0 {
                    self.reset(core);
                }
            }
            _ => {}
        }
    }

    fn reset(&self, core: &mut Core) {
        core.reset();
        self.acknowledge(!0);
    }

    fn ring_of(&self, state: &State) -> Result<Ring, Broken> {
        if state.is_broken {
            return Ok(Ring::new(state.queue.clone()));
        }
        let features = state.registers.features;
        Ring::resumed(state.queue.clone(), features, self.map.memory())
    }

    fn kick(&self) {
        if let Err(error) = self.kick.write(1) {
            log::error!("virtio-blk: {error}");
        }
    }

    fn interrupt(&self) {
        let mut line = lock(&self.line);
        line.isr |= USED;
        if !line.is_high {
            line.is_high = true;
            (self.irq)(true);
        }
    }

    fn acknowledge(&self, bits: u8) {
        let mut line = lock(&self.line);
        line.isr &= !bits;
        if line.isr == 0 && line.is_high {
            line.is_high = false;
            (self.irq)(false);
        }
    }

    /// The worker's thread.
    fn work(&self) {
        let mut chain = Chain::default();
        let mut scratch = Scratch::default();
        loop {
            match self.kick.read() {
                Ok(_) => {}
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(error) => return log::error!("virtio-blk: {error}"),
            }
            if self.has_ended.load(Ordering::SeqCst) {
                return;
            }
            let mut core = lock(&self.core);
            if let Err(error) = self.serve(&mut core, &mut chain, &mut scratch) {
                core.fail(&error);
            }
        }
    }

    /// Does what waits in the ring, until it is empty or somebody else wants the core.
    fn serve<'a>(
        &'a self,
        core: &mut Core,
        chain: &mut Chain<'a>,
        scratch: &mut Scratch<'a>,
    ) -> Result<(), Broken> {
        let may_work = core.is_running && !core.is_broken && !core.is_disabled;
        if !may_work || !core.ring.is_set() {
            return Ok(());
        }
        let memory = self.map.memory();
        // Some drivers kick before they say that they work.
        core.is_started = true;
        core.ring.set_features(core.registers.features);
        loop {
            core.ring.ignore_kicks(memory)?;
            loop {
                match core.retries.pop() {
                    Some(head) => core.ring.take(head, memory, chain)?,
                    None if core.ring.pop(memory, chain)? => {}
                    None => break,
                }
                let target = Target {
                    image: &*self.image,
                    serial: &self.serial,
                    has_cache: core.has_cache,
                };
                let len = scratch.execute(chain, &target)?;
                core.ring.push(memory, chain.head, len)?;
                if core.ring.wants_interrupt(memory)? {
                    self.interrupt();
                }
                if self.visitors.load(Ordering::SeqCst) > 0 {
                    core.is_left = true;
                    core.ring.want_kicks(memory)?;
                    return Ok(());
                }
            }
            if !core.ring.want_kicks(memory)? {
                return Ok(());
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
