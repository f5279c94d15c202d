//! A file in memory, which remembers what was done to it and fails when it is told to.

use std::cell::{Cell, RefCell};
use std::io;

use hmpsh::block::snapshots::Storage;

/// What was done to a file.
#[derive(Debug, Clone)]
pub(crate) enum Event {
    /// That was written there.
    Write(usize, Vec<u8>),
    /// What was written before will last.
    Flush,
    /// It got that length.
    Size(usize),
}

/// A file in memory.
#[derive(Debug, Default)]
pub(crate) struct Memory {
    /// What is in it.
    pub(crate) bytes: RefCell<Vec<u8>>,
    /// All that was done to it.
    pub(crate) events: RefCell<Vec<Event>>,
    /// How often anything was asked of it.
    pub(crate) requests: Cell<u64>,
    /// The request that fails, and whether all later ones do as well.
    pub(crate) fails: Cell<Option<(u64, bool)>>,
}

impl Memory {
    /// One of these bytes.
    pub(crate) fn new(bytes: &[u8]) -> Self {
        Self {
            bytes: RefCell::new(bytes.to_vec()),
            ..Self::default()
        }
    }

    fn request(&self, error: i32) -> io::Result<()> {
        let number = self.requests.replace(self.requests.get() + 1);
        match self.fails.get() {
            Some((first, _)) if number == first => Err(io::Error::from_raw_os_error(error)),
            Some((first, true)) if number > first => Err(io::Error::from_raw_os_error(error)),
            _ => Ok(()),
        }
    }

    fn done(&self, event: Event) {
        play(&mut self.bytes.borrow_mut(), &event);
        self.events.borrow_mut().push(event);
    }
}

/// Does that to a file.
pub(crate) fn play(bytes: &mut Vec<u8>, event: &Event) {
    match event {
        Event::Write(at, piece) => {
            let end = at + piece.len();
            bytes.resize(bytes.len().max(end), 0);
            bytes[*at..end].copy_from_slice(piece);
        }
        Event::Flush => {}
        Event::Size(size) => bytes.resize(*size, 0),
    }
}

const EIO: i32 = 5;
const ENOSPC: i32 = 28;

impl Storage for Memory {
    fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<usize> {
        self.request(EIO)?;
        let all = self.bytes.borrow();
        let there = all.get(offset as usize..).unwrap_or_default();
        // Never all that could be had at once.
        let len = there.len().min(bytes.len()).min(100_000);
        bytes[..len].copy_from_slice(&there[..len]);
        Ok(len)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<usize> {
        self.request(ENOSPC)?;
        let len = bytes.len().min(100_000);
        self.done(Event::Write(offset as usize, bytes[..len].to_vec()));
        Ok(len)
    }

    fn flush(&self) -> io::Result<()> {
        self.request(EIO)?;
        self.done(Event::Flush);
        Ok(())
    }

    fn size(&self) -> io::Result<u64> {
        self.request(EIO)?;
        Ok(self.bytes.borrow().len() as u64)
    }

    fn set_size(&self, size: u64) -> io::Result<()> {
        self.request(EIO)?;
        self.done(Event::Size(size as usize));
        Ok(())
    }
}
