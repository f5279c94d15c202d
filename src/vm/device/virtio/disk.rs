//! A disk in a slot: registers for vCPUs, and its state. `worker` does what the ring says.
//!
//! Nobody holds the device while a request is executed, so registers answer at once. Who changes
//! what requests stand on (a reset, a stop, a state that is loaded) waits until none is under way.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::EventFd;

use super::config::Generation;
use super::modern::Arrived;
use super::registers::{self, Register, Registers};
use super::ring::{Broken, Element, Ring};
use super::section::State;
use super::worker::Crew;
use super::{
    CONFIG_WCE, FLUSH, Interface, SLOT_BYTES, SLOTS_BASE, VERSION_1, acceptable, config, offered,
    status,
};
use crate::block::{Backend, Fault};
use crate::config::OnError;
use crate::vm::device::bus::IrqLine;
use crate::vm::guest::Error;
use crate::vm::map::Map;

/// The device.
pub(crate) struct Disk {
    shared: Arc<Shared>,
}

/// What a disk is made of.
pub(crate) struct Parts {
    /// Number of its slot, below 8.
    pub(crate) slot: usize,
    /// What its slot looks like.
    pub(crate) interface: Interface,
    /// The serial number the guest can ask for.
    pub(crate) serial: String,
    /// Its bytes.
    pub(crate) image: Arc<dyn Backend>,
    /// Guest memory.
    pub(crate) map: Arc<Map>,
    /// Its interrupt line.
    pub(crate) irq: IrqLine,
    /// What is written may stay in the host's cache until the guest flushes, unless the guest says
    /// otherwise.
    pub(crate) is_writeback: bool,
    /// What becomes of reads that fail, and of writes and flushes.
    pub(crate) on_error: [OnError; 2],
    /// Told that the guest is to stop because a request failed. Must not wait for the disk.
    pub(crate) stop: Box<dyn Fn(Fault) + Send + Sync>,
}

/// What vCPUs and workers share.
pub(super) struct Shared {
    pub(super) slot: usize,
    interface: Interface,
    pub(super) serial: String,
    pub(super) image: Arc<dyn Backend>,
    pub(super) map: Arc<Map>,
    offered: u64,
    is_writeback: bool,
    pub(super) on_error: [OnError; 2],
    pub(super) stop: Box<dyn Fn(Fault) + Send + Sync>,
    core: Mutex<Core>,
    /// Nothing is under way any more.
    rest: Condvar,
    line: Mutex<Line>,
    irq: IrqLine,
    pub(super) kick: EventFd,
    pub(super) has_ended: AtomicBool,
    pub(super) crew: Crew,
}

/// The device as registers and ring show it.
pub(super) struct Core {
    pub(super) registers: Registers,
    config: Vec<u8>,
    generation: Generation,
    pub(super) ring: Ring,
    entries: u32,
    /// Requests that were taken and are still to be executed; the last one is the next.
    pub(super) retries: Vec<Element>,
    pub(super) is_broken: bool,
    pub(super) is_started: bool,
    pub(super) is_disabled: bool,
    /// What is written may stay in the host's cache until the guest flushes.
    pub(super) has_cache: bool,
    pub(super) is_running: bool,
    /// Requests being executed.
    pub(super) under_way: usize,
    /// How many wait until none is: no other is taken from the ring.
    pub(super) waiting: usize,
}

/// The interrupt line.
#[derive(Default)]
struct Line {
    isr: u8,
    is_high: bool,
}

/// Interrupt status: something was given back; the device itself has changed.
pub(super) const USED: u8 = 1;
const CHANGED: u8 = 2;

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
        let interface = parts.interface;
        let offered = offered(interface, parts.image.is_read_only());
        let shared = Arc::new(Shared {
            slot: parts.slot,
            interface,
            serial: parts.serial,
            image: parts.image,
            map: parts.map,
            offered,
            is_writeback: parts.is_writeback,
            on_error: parts.on_error,
            stop: parts.stop,
            core: Mutex::new(Core::new(
                State::at_reset(interface, offered),
                None,
                parts.is_writeback,
            )),
            rest: Condvar::new(),
            line: Mutex::default(),
            irq: parts.irq,
            kick: EventFd::new(libc::EFD_CLOEXEC).map_err(failed)?,
            has_ended: AtomicBool::new(false),
            crew: Crew::default(),
        });
        shared.hire().map_err(failed)?;
        Ok(Arc::new(Self { shared }))
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
        // A kick may have been lost on the way here: this one follows.
        self.shared.at_rest(|core| core.is_running = is_running);
    }

    /// The disk's length is another one.
    pub(crate) fn config_changed(&self) {
        let mut core = self.shared.core();
        core.generation.of(self.shared.image.sectors());
        if core.is_started {
            self.shared.raise(USED | CHANGED);
        }
    }

    /// State of a disk at rest at power on, to load a section into.
    pub(crate) fn reset_state(&self) -> State {
        State::at_reset(self.shared.interface, self.shared.offered)
    }

    /// State of a disk whose guest does not run.
    pub(crate) fn state(&self) -> State {
        let core = self.shared.core();
        State {
            registers: core.registers.clone(),
            isr: lock(&self.shared.line).isr,
            config: core.config.clone(),
            queue: core.ring.queue().clone(),
            entries: core.entries,
            // As they were taken: the guest may have changed their descriptors since.
            retries: core.retries.clone(),
            is_broken: core.is_broken,
            is_started: core.is_started,
            is_disabled: core.is_disabled,
            acceptable: acceptable(self.shared.interface, self.shared.offered),
            arrived: Arrived::default(),
        }
    }

    /// Whether the state goes with what guest memory holds; the text says what does not.
    pub(crate) fn check(&self, state: &State) -> Result<(), String> {
        self.shared.ring_of(state).map(|_| ())
    }

    /// Takes that state, of a guest that does not run. Drives the interrupt line even if its
    /// level does not change. A ring that is not in memory any more breaks the disk.
    ///
    /// # Errors
    /// As [`Self::check`].
    pub(crate) fn restore(&self, state: State) -> Result<(), String> {
        let (ring, broken) = self.shared.ring_of(&state)?;
        let isr = state.isr;
        self.shared.at_rest(|core| {
            *core = Core {
                generation: core.generation,
                is_running: core.is_running,
                waiting: core.waiting,
                ..Core::new(state, Some(ring), self.shared.is_writeback)
            };
        });
        let mut line = lock(&self.shared.line);
        line.isr = isr;
        line.is_high = isr != 0;
        (self.shared.irq)(line.is_high);
        drop(line);
        if let Some(broken) = broken {
            self.shared.fail(&mut self.shared.core(), &broken);
        }
        Ok(())
    }

    /// A vCPU reads `size` bytes, 1, 2 or 4, at an offset in the slot.
    pub(crate) fn read(&self, offset: u64, size: usize) -> u32 {
        let shared = &self.shared;
        if let Some(at) = offset.checked_sub(registers::CONFIG) {
            return shared.visit(|core| {
                let sectors = shared.image.sectors();
                core.generation.of(sectors);
                core.config = config::bytes(sectors, core.has_cache).to_vec();
                config::read(&core.config, at, size)
            });
        }
        let (Some(register), 4) = (Register::at(offset, shared.interface), size) else {
            return 0;
        };
        match register {
            Register::DeviceId => registers::BLOCK,
            Register::InterruptStatus => u32::from(lock(&shared.line).isr),
            Register::ShmLen => u32::MAX,
            Register::HostFeatures => shared.visit(|core| {
                let word = core.registers.host_features_sel;
                (shared.offered >> (32 * word.min(1))) as u32
            }),
            Register::QueueNumMax => shared.visit(|core| match core.registers.queue_sel {
                0 => registers::ENTRIES,
                _ => 0,
            }),
            Register::QueuePfn => shared.visit(|core| match core.registers.queue_sel {
                0 => (core.ring.queue().desc >> core.registers.page_shift) as u32,
                _ => 0,
            }),
            Register::QueueReady => shared
                .visit(|core| core.registers.queue_sel == 0 && core.ring.is_ready())
                .into(),
            Register::Status => shared.visit(|core| core.registers.status).into(),
            Register::ConfigGeneration => {
                shared.visit(|core| core.generation.of(shared.image.sectors()))
            }
            other => other.of_empty_slot(shared.interface),
        }
    }

    /// A vCPU writes.
    pub(crate) fn write(&self, offset: u64, size: usize, value: u32) {
        let shared = &self.shared;
        if let Some(at) = offset.checked_sub(registers::CONFIG) {
            return shared.visit(|core| core.write_config(at as usize, size, value));
        }
        let (Some(register), 4) = (Register::at(offset, shared.interface), size) else {
            return;
        };
        match register {
            Register::QueueNotify if value == 0 => shared.kick(),
            Register::InterruptAck => shared.acknowledge(value as u8),
            Register::QueuePfn if value == 0 => shared.reset(),
            Register::Status if value as u8 == 0 => shared.reset(),
            Register::QueueReady if value == 0 => shared.retire(),
            _ => shared.visit(|core| shared.write(core, register, value)),
        }
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        self.shared.has_ended.store(true, Ordering::SeqCst);
        self.shared.at_rest(|core| core.is_running = false);
        self.shared.crew.dismiss();
    }
}

impl Core {
    fn new(state: State, ring: Option<Ring>, is_writeback: bool) -> Self {
        let features = state.registers.features;
        let wce = match features & CONFIG_WCE != 0 {
            // The guest's own choice, if it ever looked.
            true if state.config.iter().all(|byte| *byte == 0) => is_writeback,
            true => state.config[config::WCE] != 0,
            false if state.registers.status & status::DRIVER_OK == 0 => is_writeback,
            false => features & FLUSH != 0,
        };
        Self {
            registers: state.registers,
            config: state.config,
            generation: Generation::default(),
            ring: ring.unwrap_or_else(|| Ring::new(state.queue)),
            entries: state.entries,
            retries: state.retries,
            is_broken: state.is_broken,
            is_started: state.is_started,
            is_disabled: state.is_disabled,
            has_cache: wce,
            is_running: false,
            under_way: 0,
            waiting: 0,
        }
    }

    /// The guest resets the device.
    fn reset(&mut self, is_writeback: bool) {
        self.registers.reset_device();
        self.ring = Ring::new(self.ring.queue().at_reset(self.entries));
        self.retries.clear();
        self.is_broken = false;
        self.is_started = false;
        self.is_disabled = false;
        self.has_cache = is_writeback;
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
}

impl Shared {
    /// The core, whether requests are under way or not.
    pub(super) fn core(&self) -> MutexGuard<'_, Core> {
        lock(&self.core)
    }

    /// Does something with the core, for which nothing need be at rest.
    fn visit<T>(&self, change: impl FnOnce(&mut Core) -> T) -> T {
        change(&mut self.core())
    }

    /// Does something with the core when no request is under way.
    fn at_rest(&self, change: impl FnOnce(&mut Core)) {
        let mut core = self.core();
        core.waiting += 1;
        self.image.hurry(true);
        while core.under_way > 0 {
            core = self.rest.wait(core).unwrap_or_else(PoisonError::into_inner);
        }
        self.image.hurry(false);
        change(&mut core);
        core.waiting -= 1;
        drop(core);
        // For what was left in the ring.
        self.kick();
    }

    /// A request is not under way any more.
    pub(super) fn is_done(&self, core: &mut Core) {
        core.under_way -= 1;
        if core.under_way == 0 && core.waiting > 0 {
            self.rest.notify_all();
        }
    }

    fn write(&self, core: &mut Core, register: Register, value: u32) {
        let registers = &mut core.registers;
        let is_queue = registers.queue_sel == 0;
        match register {
            Register::HostFeaturesSel => registers.host_features_sel = u32::from(value != 0),
            Register::GuestFeaturesSel => registers.guest_features_sel = u32::from(value != 0),
            Register::GuestFeatures if self.interface == Interface::Modern => {
                let word = registers.guest_features_sel.min(1);
                registers.proposal.features[word as usize] = value;
            }
            Register::GuestFeatures if registers.guest_features_sel == 0 => {
                registers.features = u64::from(value) & self.offered;
            }
            Register::GuestPageSize => registers.set_page_size(value),
            Register::QueueSel if value < registers::QUEUES => registers.queue_sel = value as u16,
            Register::QueueNum if is_queue => {
                registers.proposal.num = value as u16;
                core.ring.set_num(value);
                self.check_ring(core);
            }
            Register::QueueAlign if is_queue => {
                core.ring.set_align(value);
                self.check_ring(core);
            }
            Register::QueuePfn if is_queue && value != 0 => {
                let address = u64::from(value) << registers.page_shift;
                core.ring.set_address(address);
                self.check_ring(core);
            }
            Register::QueueAddress(part) if is_queue => registers.proposal.addresses[part] = value,
            Register::QueueReady if is_queue => {
                core.ring.accept(&registers.proposal);
                self.check_ring(core);
            }
            Register::Status => {
                let mut status = value as u8;
                if self.interface == Interface::Modern {
                    status = registers.negotiate(status, self.offered);
                }
                core.set_status(status);
            }
            _ => {}
        }
    }

    /// The guest resets the device; what is under way is finished first.
    fn reset(&self) {
        self.at_rest(|core| core.reset(self.is_writeback));
        self.acknowledge(!0);
    }

    /// The guest takes its ring away; what is under way is given back to it first.
    fn retire(&self) {
        self.at_rest(|core| {
            if core.registers.queue_sel == 0 {
                core.ring.retire();
            }
        });
    }

    /// A ring that the guest has put somewhere must be RAM.
    fn check_ring(&self, core: &mut Core) {
        core.ring.set_features(core.registers.features);
        if let Err(error) = core.ring.check(self.map.memory()) {
            self.fail(core, &error);
        }
    }

    /// The guest has driven the device wrong. By the present interface it is told.
    pub(super) fn fail(&self, core: &mut Core, Broken(why): &Broken) {
        log::error!("{why}");
        core.is_broken = true;
        let registers = &mut core.registers;
        if registers.features & VERSION_1 != 0 {
            registers.status |= status::NEEDS_RESET;
            if registers.status & status::DRIVER_OK != 0 {
                self.raise(USED | CHANGED);
            }
        }
    }

    /// The ring of that state, and why it is broken if guest memory holds something else there by
    /// now: a guest that drives no disk may use that for anything. As in QEMU only too many requests
    /// under way can not be.
    fn ring_of(&self, state: &State) -> Result<(Ring, Option<Broken>), String> {
        let mut ring = Ring::new(state.queue.clone());
        if state.is_broken {
            return Ok((ring, None));
        }
        ring.set_features(state.registers.features);
        if let Err(broken) = ring.resume(self.map.memory()) {
            return Ok((ring, Some(broken)));
        }
        ring.check_under_way().map(|()| (ring, None))
    }

    pub(super) fn kick(&self) {
        if let Err(error) = self.kick.write(1) {
            log::error!("virtio-blk: {error}");
        }
    }

    pub(super) fn interrupt(&self) {
        self.raise(USED);
    }

    fn raise(&self, why: u8) {
        let mut line = lock(&self.line);
        line.isr |= why;
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
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
