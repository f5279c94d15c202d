//! An image that the imago crate reads and writes: qcow2 with what is behind it, or a raw one past
//! the host's cache.
//!
//! Its metadata are kept in memory, so it is open for writing only while it is ours: from
//! [`Backend::claim`], which reads them anew, to [`Backend::release`], which writes them back.

mod commit;
mod zeroes;

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use imago::FormatAccess;
use imago::file::File as Storage;
use imago::format::PreallocateMode;
use imago::format::drivers::ShallowMapping;

use super::chain::{self, Chain};
use super::lock::{self, Use, not_ours};
use super::source::Source;
use super::{Backend, Layer, LockError, OpenError, OpenOptions, SECTOR, probe, snapshots};
use crate::config::Format;
use crate::iov::{self, In, Out};

/// An image, its metadata in memory or not.
pub(super) struct Layered {
    options: OpenOptions,
    format: Format,
    file: Source,
    /// What was found behind it last. Kept open, so that names matter only at the start.
    behind: Mutex<Vec<Source>>,
    /// Nobody has said that it is raw: its guest can not make another format of it.
    is_guessed: bool,
    sectors: AtomicU64,
    layers: Mutex<Vec<Layer>>,
    access: RwLock<Option<Access>>,
}

struct Access {
    image: FormatAccess<Storage>,
    is_writable: bool,
    /// Parts of the disk, each with an L2 table of its own, that were written to.
    tables: Mutex<BTreeSet<u64>>,
    /// Bytes of such a part.
    table_reach: u64,
    /// What is behind it, for the locks.
    behind: Vec<Source>,
}

impl Layered {
    /// Opens an image of that format. It is looked at, and not written to.
    ///
    /// # Errors
    /// It is not there, can not be opened, or is not of that format; the same of what is behind it.
    pub(super) fn open(
        file: Source,
        format: Format,
        options: OpenOptions,
        is_guessed: bool,
    ) -> Result<Self, OpenError> {
        let image = Self {
            format,
            file,
            behind: Mutex::default(),
            is_guessed: is_guessed && format == Format::Raw,
            sectors: AtomicU64::new(0),
            layers: Mutex::default(),
            access: RwLock::new(None),
            options,
        };
        let access = image.read_metadata(false)?;
        *image.write_access() = Some(access);
        Ok(image)
    }

    /// Reads the metadata of all layers.
    fn read_metadata(&self, is_writable: bool) -> Result<Access, OpenError> {
        let known = self.lock_behind().clone();
        let Chain {
            image,
            layers,
            behind,
        } = chain::open(&self.file, self.format, &self.options, &known, is_writable)?;
        self.lock_behind().clone_from(&behind);
        let sectors = match self.format {
            Format::Raw => image.size().div_ceil(SECTOR),
            Format::Qcow2 => image.size() / SECTOR,
        };
        self.sectors.store(sectors, Ordering::SeqCst);
        let facts = layers.first().and_then(|top| top.facts);
        let table_reach = facts.map_or(u64::MAX, |facts| facts.cluster_size.pow(2) / 8);
        *self.lock_layers() = layers;
        Ok(Access {
            image,
            is_writable,
            tables: Mutex::default(),
            table_reach,
            behind,
        })
    }

    fn lock_layers(&self) -> MutexGuard<'_, Vec<Layer>> {
        self.layers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_behind(&self) -> MutexGuard<'_, Vec<Source>> {
        self.behind.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read_access(&self) -> RwLockReadGuard<'_, Option<Access>> {
        self.access.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_access(&self) -> RwLockWriteGuard<'_, Option<Access>> {
        self.access.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes so many bytes of an image that is ours.
    fn with(
        &self,
        [offset, len]: [u64; 2],
        act: impl FnOnce(&FormatAccess<Storage>) -> io::Result<()>,
    ) -> io::Result<()> {
        match &*self.read_access() {
            Some(access) if access.is_writable => {
                let done = act(&access.image);
                // What failed may have got a table before.
                let noted = access.note(offset, len);
                done.and(noted)
            }
            _ => Err(not_ours()),
        }
    }

    /// As [`Self::with`], while nobody else does anything with it.
    fn with_alone<T>(
        &self,
        act: impl FnOnce(&mut FormatAccess<Storage>) -> io::Result<T>,
    ) -> io::Result<T> {
        match &mut *self.write_access() {
            Some(access) if access.is_writable => act(&mut access.image),
            _ => Err(not_ours()),
        }
    }

    /// Does something with an image that need not be ours.
    fn look<T>(&self, act: impl FnOnce(&FormatAccess<Storage>) -> io::Result<T>) -> io::Result<T> {
        loop {
            if let Some(access) = &*self.read_access() {
                return act(&access.image);
            }
            let mut access = self.write_access();
            if access.is_none() {
                *access = Some(self.read_metadata(false).map_err(io::Error::other)?);
            }
        }
    }

    fn write_all(&self, offset: u64, pieces: &mut Vec<Out<'_>>) -> io::Result<()> {
        let len = pieces.iter().map(|piece| piece.len() as u64).sum();
        self.with([offset, len], |image| {
            self.reach(image, offset.saturating_add(len))?;
            image.writev(iov::as_slices(pieces).into(), offset)?;
            self.trim(offset + len)
        })
    }

    /// Of a raw image's last sector a part may be missing, until something is written there.
    fn reach(&self, image: &FormatAccess<Storage>, end: u64) -> io::Result<()> {
        let is_missing = end > image.size() && end <= self.sectors() * SECTOR;
        match self.format {
            Format::Raw if is_missing => image.resize_grow(end, PreallocateMode::None),
            _ => Ok(()),
        }
    }

    /// After something was written up to `end`. What the host does not take past its cache as it is,
    /// imago fills up to whole blocks, and a raw image's file is longer then than the image.
    fn trim(&self, end: u64) -> io::Result<()> {
        let len = self.sectors() * SECTOR;
        let is_last = self.format == Format::Raw && len.saturating_sub(end) < MOST_ALIGNED;
        match is_last && self.file.file().metadata()?.len() > len {
            true => self.file.file().set_len(len),
            false => Ok(()),
        }
    }

    /// imago follows metadata wherever they lead.
    fn inspect(&self) -> Result<(), OpenError> {
        let failed = |error: io::Error| OpenError::Image {
            path: self.options.name(),
            why: error.to_string(),
        };
        let inspect = |file: &File| Ok(snapshots::inspect(file)?);
        match self.format {
            Format::Raw => Ok(()),
            Format::Qcow2 => self.on_file(inspect).map_err(failed),
        }
    }

    /// The file as one that is read in any pieces.
    fn on_file<T>(&self, act: impl FnOnce(&File) -> io::Result<T>) -> io::Result<T> {
        act(self.file.buffered())
    }

    fn use_of(&self, is_top: bool) -> Use {
        Use {
            writes: is_top && !self.options.is_read_only,
            resizes: self.format != Format::Raw,
        }
    }

    /// `file.locking=off` is about the image, not about what is behind it.
    fn lock(&self, behind: &[Source]) -> Result<(), LockError> {
        if self.options.locks {
            lock::take(self.file.file(), &self.options.name(), self.use_of(true))?;
        }
        for source in behind {
            lock::take(source.file(), &source.text(), self.use_of(false))?;
        }
        Ok(())
    }

    fn unlock(&self) {
        lock::leave(self.file.file());
        let behind = self.lock_behind();
        behind.iter().for_each(|source| lock::leave(source.file()));
    }
}

impl Backend for Layered {
    fn sectors(&self) -> u64 {
        self.sectors.load(Ordering::SeqCst)
    }

    fn layers(&self) -> Vec<Layer> {
        let mut layers = self.lock_layers().clone();
        if let Some(top) = layers.first_mut() {
            [top.file_len, top.allocated] = probe::lengths(self.file.file());
        }
        layers
    }

    fn is_read_only(&self) -> bool {
        self.options.is_read_only
    }

    fn read(&self, offset: u64, rooms: &mut Vec<In<'_>>) -> io::Result<()> {
        self.look(|image| image.readv(iov::as_slices_mut(rooms).into(), offset))
    }

    fn write(&self, offset: u64, pieces: &mut Vec<Out<'_>>) -> io::Result<()> {
        match self.is_guessed && offset < SECTOR {
            true => probe::write_head(offset, pieces, |pieces| self.write_all(offset, pieces)),
            false => self.write_all(offset, pieces),
        }
    }

    fn zero(&self, offset: u64, len: u64, may_unmap: bool) -> io::Result<()> {
        // For a part of a cluster imago looks whether the rest of it is zero, and makes all of it zero
        // then: with others at the image, what they write between the two would be lost.
        let made = self.with_alone(|image| {
            self.reach(image, offset.saturating_add(len))?;
            match self.format {
                Format::Raw if !may_unmap => zeroes::keep(image, self.file.file(), [offset, len]),
                _ => zeroes::make(image, [offset, len], may_unmap),
            }?;
            self.trim(offset + len)
        });
        made.and(self.with([offset, len], |_| Ok(())))
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        let discarded = self.with_alone(|image| {
            self.reach(image, offset.saturating_add(len))?;
            image.discard_to_any(offset, len)
        });
        let noted = self.with([offset, len], |_| Ok(()));
        match discarded {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => noted,
            other => other.and(noted),
        }
    }

    fn is_allocated(&self, offset: u64, len: u64) -> io::Result<(bool, u64)> {
        self.look(|image| {
            let (mapping, count) = image.get_shallow_mapping(offset, len)?;
            let is_behind = matches!(
                mapping,
                ShallowMapping::Indirect { .. }
                    | ShallowMapping::Zero {
                        explicit: false,
                        ..
                    }
            );
            Ok((!is_behind || self.format == Format::Raw, count.max(SECTOR)))
        })
    }

    fn resize(&self, len: u64) -> io::Result<()> {
        // What is behind it must not show where there was nothing until now.
        let behind = self.lock_layers().get(1).map_or(0, |behind| behind.len);
        self.with_alone(|image| {
            if self.format == Format::Qcow2 {
                self.on_file(|file| Ok(snapshots::check_resize(file)?))?;
            }
            match behind > image.size() {
                true => zeroes::grow(image, len)?,
                false => image.resize(len, PreallocateMode::None)?,
            }
            let file = self.file.file();
            if self.format == Format::Raw && file.metadata()?.is_file() {
                // imago may think that it is so long: see `trim`.
                file.set_len(len)?;
            }
            image.flush()
        })?;
        self.sectors.store(len / SECTOR, Ordering::SeqCst);
        if let Some(top) = self.lock_layers().first_mut() {
            top.len = len;
        }
        Ok(())
    }

    fn with_file(
        &self,
        is_changed: bool,
        act: &mut dyn FnMut(&File) -> io::Result<()>,
    ) -> io::Result<()> {
        if self.format == Format::Raw {
            return Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP));
        }
        // Who only looks would see a table without its count while somebody writes.
        let mut access = self.write_access();
        if !is_changed {
            if let Some(access) = access.as_ref().filter(|access| access.is_writable) {
                access.image.flush()?;
            }
            return self.on_file(act);
        }
        let own = access.as_ref().filter(|access| access.is_writable);
        own.ok_or_else(not_ours)?.image.flush()?;
        let before = access.take();
        let done = self.on_file(act);
        // Not earlier: somebody else might get its descriptors meanwhile.
        drop(before);
        let again = self.read_metadata(true).map_err(io::Error::other);
        let again = again.and_then(|anew| {
            let locked = self.lock(&anew.behind);
            *access = Some(anew);
            locked.map_err(io::Error::other)
        });
        done.and(again)
    }

    fn commit(&self) -> io::Result<()> {
        let mut access = self.write_access();
        match &*access {
            Some(access) if access.is_writable => {}
            _ => return Err(not_ours()),
        }
        self.commit_alone(&mut access)
    }

    fn claim(&self) -> Result<(), LockError> {
        let mut access = self.write_access();
        if let Some(access) = &*access
            && access.is_writable
        {
            return self.lock(&access.behind);
        }
        // Locked first: what is read afterwards nobody changes any more.
        let taken = self.lock(&[]).and_then(|()| {
            self.inspect()?;
            let anew = self.read_metadata(!self.options.is_read_only)?;
            self.lock(&anew.behind)?;
            Ok(anew)
        });
        match taken {
            Ok(anew) => {
                *access = Some(anew);
                Ok(())
            }
            Err(error) => {
                self.unlock();
                Err(error)
            }
        }
    }

    fn release(&self) {
        let mut access = self.write_access();
        if let Some(Err(error)) = access.as_ref().map(|access| access.image.flush()) {
            // Kept, for whoever takes it back.
            log::error!("{}: {error}", self.options.name());
            return self.unlock();
        }
        *access = None;
        self.unlock();
    }

    fn settle(&self) -> io::Result<()> {
        match &*self.read_access() {
            Some(access) if access.is_writable => access.image.flush(),
            // There is nothing to be flushed.
            _ => Ok(()),
        }
    }

    fn flush(&self) -> io::Result<()> {
        self.settle()?;
        match &*self.read_access() {
            Some(access) if access.is_writable => access.image.sync(),
            _ => Ok(()),
        }
    }
}

impl Access {
    /// After that part was written to. imago puts a new L2 table into the L1 table on the disk at
    /// once, and its reference count there when it is flushed: a process that ended between the two
    /// would leave an image in which the table's place counts as free.
    fn note(&self, offset: u64, len: u64) -> io::Result<()> {
        let Some(last) = len
            .checked_sub(1)
            .map(|rest| (offset + rest) / self.table_reach)
        else {
            return Ok(());
        };
        let parts = offset / self.table_reach..=last;
        let is_known = |tables: &BTreeSet<u64>| parts.clone().all(|part| tables.contains(&part));
        let lock = || self.tables.lock().unwrap_or_else(PoisonError::into_inner);
        if is_known(&lock()) {
            return Ok(());
        }
        self.image.flush()?;
        lock().extend(parts);
        Ok(())
    }
}

/// More than any host wants bytes past its cache to be aligned to.
const MOST_ALIGNED: u64 = 64 << 10;

#[cfg(test)]
mod tests;
