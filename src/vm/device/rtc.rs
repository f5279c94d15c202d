//! The clock chip: registers behind two ports, an interrupt line, and a thread that waits for what
//! is due.
//!
//! Only a running guest's chip raises interrupts. The clock of the day goes on while the guest
//! rests: it follows the host's.

mod registers;

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

pub(crate) use self::registers::Registers;
use super::bus::IrqLine;

/// First I/O port.
pub(crate) const PORT: u16 = 0x70;
/// Number of ports.
pub(crate) const PORTS: u16 = 2;
/// Interrupt line.
pub(crate) const IRQ: u32 = 8;

/// The device.
pub(crate) struct Rtc {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    irq: IrqLine,
    inner: Mutex<Inner>,
    changed: Condvar,
}

struct Inner {
    chip: Registers,
    level: bool,
    running: bool,
    ended: bool,
}

impl Rtc {
    /// The device, set to the host's time, of a guest that does not run. `low_ram` and `high_ram`
    /// are the bytes of RAM below 4 GiB and above: firmware reads them here.
    ///
    /// # Errors
    /// When no thread can be started.
    pub(crate) fn new(low_ram: u64, high_ram: u64, irq: IrqLine) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            irq,
            inner: Mutex::new(Inner {
                chip: Registers::new(host_time(), low_ram, high_ram),
                level: false,
                running: false,
                ended: false,
            }),
            changed: Condvar::new(),
        });
        let thread = std::thread::Builder::new().name("rtc".to_owned()).spawn({
            let shared = Arc::clone(&shared);
            move || shared.serve()
        })?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    /// Reads port 0 or 1.
    pub(crate) fn read(&self, port: u8) -> u8 {
        self.shared.change(|chip, now| chip.read(port, now))
    }

    /// Writes port 0 or 1.
    pub(crate) fn write(&self, port: u8, value: u8) {
        self.shared.change(|chip, now| chip.write(port, value, now));
    }

    /// The guest starts or stops.
    pub(crate) fn set_running(&self, running: bool) {
        self.shared.lock().running = running;
        if running {
            self.shared.change(|chip, now| chip.resume(now));
            self.shared.changed.notify_all();
        }
    }

    /// Registers as they are now.
    pub(crate) fn state(&self) -> Registers {
        self.shared.change(|chip, now| {
            chip.show(now);
            chip.clone()
        })
    }

    /// The machine's reset.
    pub(crate) fn reset(&self) {
        self.shared.change(|chip, now| chip.reset(now));
    }

    /// Replaces all registers. An interrupt that was asked for is on its way in the controllers'
    /// state: the line is not raised a second time.
    pub(crate) fn restore(&self, chip: Registers) {
        let mut inner = self.shared.lock();
        inner.level = chip.irq();
        inner.chip = chip;
        self.shared.changed.notify_all();
    }
}

impl Drop for Rtc {
    fn drop(&mut self) {
        self.shared.lock().ended = true;
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("the clock chip's thread panicked");
        }
    }
}

impl Shared {
    /// Makes a change, then brings the interrupt line and the waiting thread up to date.
    fn change<T>(&self, change: impl FnOnce(&mut Registers, i64) -> T) -> T {
        let mut inner = self.lock();
        let before = inner.chip.due();
        let result = change(&mut inner.chip, host_time());
        self.drive(&mut inner);
        if inner.chip.due() != before {
            self.changed.notify_all();
        }
        result
    }

    fn drive(&self, inner: &mut Inner) {
        let level = inner.chip.irq();
        if level != inner.level {
            inner.level = level;
            (self.irq)(level);
        }
    }

    /// The thread: sets flags when they are due.
    fn serve(&self) {
        let mut inner = self.lock();
        while !inner.ended {
            let due = inner.chip.due().filter(|_| inner.running);
            let now = host_time();
            inner = match due {
                None => self
                    .changed
                    .wait(inner)
                    .unwrap_or_else(PoisonError::into_inner),
                Some(due) if due > now => {
                    let patience = Duration::from_nanos((due - now).unsigned_abs()).min(LOOK_AGAIN);
                    let waited = self.changed.wait_timeout(inner, patience);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
                Some(_) => {
                    inner.chip.tick(now);
                    self.drive(&mut inner);
                    inner
                }
            };
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The host's wall clock can be set: a long wait is looked at anew.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// The host's wall clock, nanoseconds since 1970.
fn host_time() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| {
        i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
    })
}
