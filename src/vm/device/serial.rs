//! COM1: the 16550A between a chardev and an interrupt line.
//!
//! Output goes to the chardev at once. Input is taken only while the guest runs and only as much
//! as the receiver has room for; the rest stays with the chardev, or (what was under way already)
//! in a queue here that is not part of the migrated state, as with QEMU's own host side.

pub(crate) mod uart;

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use self::uart::Uart;
use super::bus::IrqLine;
use crate::chardev::{Chardev, Incoming};
use crate::vmstate::{Result, Visitor, VmState};

/// First I/O port.
pub(crate) const PORT: u16 = 0x3f8;
/// Number of ports.
pub(crate) const PORTS: u16 = 8;
/// Interrupt line.
pub(crate) const IRQ: u32 = 4;

/// Most bytes kept for the receiver: what a chardev had under way when it was told to hold back.
const WAITING_MAX: usize = 64 << 10;

/// The device.
pub(crate) struct Serial {
    chardev: Arc<dyn Chardev>,
    irq: IrqLine,
    inner: Mutex<Inner>,
}

struct Inner {
    uart: Uart,
    waiting: VecDeque<u8>,
    running: bool,
    level: bool,
    /// Whether there is room for input.
    readable: bool,
    /// What the chardev was told last.
    told: bool,
    /// A thread is telling it.
    telling: bool,
}

impl Serial {
    /// The device at reset, of a guest that does not run.
    pub(crate) fn new(chardev: Arc<dyn Chardev>, irq: IrqLine) -> Arc<Self> {
        let inner = Inner {
            uart: Uart::default(),
            waiting: VecDeque::new(),
            running: false,
            level: false,
            readable: false,
            told: false,
            telling: false,
        };
        let serial = Arc::new(Self {
            chardev,
            irq,
            inner: Mutex::new(inner),
        });
        serial.listen();
        serial
    }

    /// Takes the chardev's input, which another device may have had meanwhile.
    pub(crate) fn listen(self: &Arc<Self>) {
        let weak = Arc::downgrade(self);
        self.chardev.receive(Box::new(move |incoming| {
            if let (Incoming::Bytes(bytes, _), Some(serial)) = (incoming, weak.upgrade()) {
                serial.change(|inner| {
                    let room = WAITING_MAX.saturating_sub(inner.waiting.len());
                    inner.waiting.extend(bytes.into_iter().take(room));
                });
            }
        }));
        // Not before: a device that gets a receiver takes input for it.
        self.chardev.set_readable(false);
        self.change(|inner| inner.told = false);
    }

    /// Reads register 0 to 7.
    pub(crate) fn read(&self, register: u8) -> u8 {
        self.change(|inner| inner.uart.read(register))
    }

    /// Writes register 0 to 7.
    pub(crate) fn write(&self, register: u8, value: u8) {
        self.change(|inner| {
            if let Some(byte) = inner.uart.write(register, value) {
                self.chardev.write(&[byte]);
            }
        });
    }

    /// The guest starts or stops: input is taken only while it runs.
    pub(crate) fn set_running(&self, running: bool) {
        self.change(|inner| inner.running = running);
    }

    /// Registers as they are now.
    pub(crate) fn state(&self) -> Uart {
        self.lock().uart.clone()
    }

    /// Replaces all registers; what the new ones were still transmitting is sent. Drives the
    /// interrupt line even if its level does not change.
    pub(crate) fn restore(&self, mut uart: Uart) {
        self.change(|inner| {
            let unsent = uart.settle();
            if !unsent.is_empty() {
                self.chardev.write(&unsent);
            }
            inner.uart = uart;
            inner.level = inner.uart.irq();
            (self.irq)(inner.level);
        });
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes a change, then brings receiver, interrupt line and chardev up to date.
    fn change<T>(&self, change: impl FnOnce(&mut Inner) -> T) -> T {
        let mut inner = self.lock();
        let result = change(&mut inner);
        let Inner {
            uart,
            waiting,
            running,
            ..
        } = &mut *inner;
        if *running && !waiting.is_empty() {
            let taken = uart.receive(waiting.make_contiguous());
            waiting.drain(..taken);
        }
        let level = inner.uart.irq();
        if level != inner.level {
            inner.level = level;
            (self.irq)(level);
        }
        inner.readable = inner.running && inner.waiting.is_empty() && inner.uart.room() > 0;
        if !inner.telling {
            self.tell(inner);
        }
        result
    }

    /// Tells the chardev whether there is room. It has locks of its own, so it is told outside of
    /// this one, and by one thread at a time: of two, the one that comes last might bring old news.
    fn tell<'a>(&'a self, mut inner: MutexGuard<'a, Inner>) {
        inner.telling = true;
        while inner.told != inner.readable {
            inner.told = inner.readable;
            let readable = inner.readable;
            drop(inner);
            self.chardev.set_readable(readable);
            inner = self.lock();
        }
        inner.telling = false;
    }
}

/// QEMU's section: the chip inside a struct of the same name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SerialSection(pub(crate) Uart);

impl VmState for SerialSection {
    const NAME: &'static str = "serial";
    const VERSION: u32 = 3;
    const MINIMUM: u32 = 2;

    fn fields(&mut self, v: &mut dyn Visitor, _version: u32) -> Result {
        v.state("state", &mut self.0)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

    use super::*;
    use crate::chardev::Receiver;
    use crate::vmstate::save;

    #[derive(Default)]
    struct Wire {
        out: Mutex<Vec<u8>>,
        receiver: Mutex<Option<Receiver>>,
        readable: AtomicBool,
        /// Met twice by whoever says that there is no room: before and after it is noted.
        slow: Option<std::sync::Barrier>,
    }

    impl Wire {
        fn is_open(&self) -> bool {
            self.readable.load(Ordering::SeqCst)
        }

        fn type_in(&self, bytes: &[u8]) {
            let mut receiver = self.receiver.lock().unwrap();
            receiver.as_mut().unwrap()(Incoming::Bytes(bytes.to_vec(), Vec::new()));
        }
    }

    impl Chardev for Wire {
        fn id(&self) -> &str {
            "wire"
        }

        fn description(&self) -> String {
            "wire".to_owned()
        }

        fn write(&self, bytes: &[u8]) {
            self.out.lock().unwrap().extend_from_slice(bytes);
        }

        fn receive(&self, receiver: Receiver) {
            *self.receiver.lock().unwrap() = Some(receiver);
        }

        fn set_readable(&self, readable: bool) {
            let slow = self.slow.as_ref().filter(|_| !readable && self.is_open());
            slow.map(std::sync::Barrier::wait);
            slow.map(std::sync::Barrier::wait);
            self.readable.store(readable, Ordering::SeqCst);
        }
    }

    #[test]
    fn input_waits_for_a_running_guest_with_room() {
        let wire = Arc::new(Wire::default());
        let edges = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&edges);
        let irq = Box::new(move |_| {
            count.fetch_add(1, Ordering::SeqCst);
        });
        let serial = Serial::new(Arc::clone(&wire) as Arc<dyn Chardev>, irq);
        serial.write(1, 1);
        wire.type_in(b"abc");
        assert_eq!(serial.read(5) & 1, 0, "a stopped guest takes no input");
        assert!(!wire.readable.load(Ordering::SeqCst));

        serial.set_running(true);
        assert!(
            !wire.readable.load(Ordering::SeqCst),
            "more is waiting than there is room for"
        );
        let read: Vec<u8> = (0..3).map(|_| serial.read(0)).collect();
        assert_eq!(read, b"abc");
        assert!(wire.readable.load(Ordering::SeqCst));
        assert_eq!(edges.load(Ordering::SeqCst) % 2, 0, "the line is low again");
        serial.write(0, b'o');
        serial.write(0, b'k');
        assert_eq!(*wire.out.lock().unwrap(), b"ok");
        serial.set_running(false);
        assert!(!wire.readable.load(Ordering::SeqCst));
    }

    /// A guest that reads a byte while the chardev is still being told to hold back must not be
    /// left without input for ever.
    #[test]
    fn the_chardev_is_told_the_latest() {
        let wire = Arc::new(Wire {
            slow: Some(std::sync::Barrier::new(2)),
            ..Wire::default()
        });
        let serial = Serial::new(Arc::clone(&wire) as Arc<dyn Chardev>, Box::new(|_| ()));
        serial.set_running(true);
        assert!(wire.is_open());
        std::thread::scope(|scope| {
            scope.spawn(|| wire.type_in(b"a"));
            wire.slow.as_ref().map(std::sync::Barrier::wait);
            assert_eq!(serial.read(0), b'a');
            wire.slow.as_ref().map(std::sync::Barrier::wait);
        });
        assert!(wire.is_open());
    }

    #[test]
    fn the_section_is_eleven_bytes_at_reset() {
        assert_eq!(save(&mut SerialSection(Uart::default())).unwrap().len(), 11);
    }
}
