//! For tests: an image in memory, which fails when it is told to.

use std::io;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use super::{Backend, SECTOR};
use crate::errno::Errno;
use crate::iov::{In, Out};

/// An image in memory. Clones are the same image.
#[derive(Clone)]
pub(crate) struct Memory {
    bytes: Arc<Mutex<Vec<u8>>>,
    /// How many reads and writes still go well; below zero: all.
    reads: Arc<AtomicI64>,
    writes: Arc<AtomicI64>,
    is_read_only: bool,
    zeroed: Arc<AtomicI64>,
}

impl Memory {
    /// `len` zero bytes.
    pub(crate) fn new(len: u64) -> Self {
        Self {
            bytes: Arc::new(Mutex::new(vec![0; len as usize])),
            reads: Arc::new(AtomicI64::new(-1)),
            writes: Arc::new(AtomicI64::new(-1)),
            is_read_only: false,
            zeroed: Arc::default(),
        }
    }

    /// How often some of it was made zero.
    pub(crate) fn zeroed(&self) -> i64 {
        self.zeroed.load(Ordering::SeqCst)
    }

    /// The same image, as one that may not be written.
    pub(crate) fn read_only(mut self) -> Self {
        self.is_read_only = true;
        self
    }

    /// After so many reads the next ones fail.
    pub(crate) fn fail_reads(&self, after: i64) {
        self.reads.store(after, Ordering::SeqCst);
    }

    /// After so many writes the next ones fail.
    pub(crate) fn fail_writes(&self, after: i64) {
        self.writes.store(after, Ordering::SeqCst);
    }

    /// What is in it.
    pub(crate) fn bytes(&self) -> MutexGuard<'_, Vec<u8>> {
        self.bytes.lock().unwrap()
    }

    fn count(left: &AtomicI64, error: libc::c_int) -> io::Result<()> {
        match left.load(Ordering::SeqCst) {
            0 => Err(io::Error::from_raw_os_error(error)),
            1.. => {
                left.fetch_sub(1, Ordering::SeqCst);
                Ok(())
            }
            _ => Ok(()),
        }
    }
}

impl Backend for Memory {
    fn sectors(&self) -> u64 {
        self.bytes().len() as u64 / SECTOR
    }

    fn is_read_only(&self) -> bool {
        self.is_read_only
    }

    fn read(&self, offset: u64, rooms: &mut Vec<In<'_>>) -> io::Result<()> {
        Self::count(&self.reads, libc::EIO)?;
        let bytes = self.bytes();
        let mut from = &bytes[offset as usize..];
        for room in rooms {
            let (now, rest) = from.split_at(room.len());
            room.fill(now);
            from = rest;
        }
        Ok(())
    }

    fn write(&self, offset: u64, pieces: &mut Vec<Out<'_>>) -> io::Result<()> {
        Self::count(&self.writes, libc::ENOSPC)?;
        let mut data = Vec::new();
        pieces.iter().for_each(|piece| piece.copy_to(&mut data));
        self.bytes()[offset as usize..][..data.len()].copy_from_slice(&data);
        Ok(())
    }

    fn zero(&self, offset: u64, len: u64, _may_unmap: bool) -> io::Result<()> {
        Self::count(&self.writes, libc::ENOSPC)?;
        self.zeroed.fetch_add(1, Ordering::SeqCst);
        self.bytes()[offset as usize..][..len as usize].fill(0);
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
}

/// The error as the operator reads it.
pub(crate) fn words(error: libc::c_int) -> String {
    Errno(&io::Error::from_raw_os_error(error)).to_string()
}
