//! A new snapshot in the making: takes the VM state piece by piece.

use std::io::{self, Write};

use xxhash_rust::xxh3::Xxh3;

use super::change::Change;
use super::error::Error;
use super::header::{MAX_SNAPSHOTS, check_l1_len};
use super::image::Image;
use super::storage::{self, Storage};
use super::table::Snapshot;
use super::tree;

/// What a new snapshot is to say of itself.
#[derive(Clone, Copy, Debug)]
pub struct New<'a> {
    /// Its name, 1 to 255 bytes (QEMU's lists end there).
    pub name: &'a str,
    /// When it is taken, in seconds since 1970.
    pub seconds: u32,
    /// And nanoseconds.
    pub nanoseconds: u32,
    /// Nanoseconds that the guest has run by its own clock.
    pub vm_clock: u64,
}

/// A new snapshot, of which nothing is to be seen before [`Self::commit`]. What is written to it
/// becomes its VM state; if nothing is, it is one of disks only. Dropped, it never was there.
pub struct Creation<'f, S: Storage> {
    change: Change<'f, S>,
    snapshot: Snapshot,
    /// Bytes of the state that are not yet in the file.
    bytes: Vec<u8>,
    /// Clusters of the state that no L2 table names yet.
    entries: Vec<u64>,
    /// L2 tables of the state.
    tables: Vec<u64>,
    len: u64,
    hash: Box<Xxh3>,
    is_broken: bool,
}

impl<'f, S: Storage> Creation<'f, S> {
    pub(super) fn begin(image: Image<'f, S>, new: &New<'_>) -> Result<Self, Error> {
        if new.name.is_empty() || new.name.len() > 255 || new.name.contains('\0') {
            return Err(Error::Name(new.name.to_owned()));
        }
        if image.snapshots.len() >= MAX_SNAPSHOTS as usize {
            return Err(Error::TooMany);
        }
        let snapshot = Snapshot {
            id: next_id(&image.snapshots)?.to_string().into_bytes(),
            name: new.name.as_bytes().to_vec(),
            seconds: new.seconds,
            nanoseconds: new.nanoseconds,
            vm_clock: new.vm_clock,
            vm_state_size: 0,
            disk_size: image.header.whole_sectors(),
            icount: None,
            unknown: Vec::new(),
            l1: 0,
            l1_len: 0,
        };
        let mut change = Change::begin(image)?;
        let active = change.image.active()?;
        tree::check(&change.image, &mut change.refcounts, &active)?;
        Ok(Self {
            change,
            snapshot,
            bytes: Vec::new(),
            entries: Vec::new(),
            tables: Vec::new(),
            len: 0,
            hash: Box::new(Xxh3::new()),
            is_broken: false,
        })
    }

    /// Bytes of the VM state so far.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether it has no VM state so far.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Makes it a snapshot of the image, and returns its ID.
    ///
    /// # Errors
    /// The image is as it was, unless its header could not be written: then it is that or has the
    /// snapshot.
    pub fn commit(mut self) -> Result<String, Error> {
        if self.is_broken {
            return Err(Error::Incomplete);
        }
        self.store_bytes()?;
        self.store_table()?;
        let Self {
            mut change,
            mut snapshot,
            ..
        } = self;
        if self.len > 0 {
            snapshot.note(self.len, self.hash.digest());
        }
        let mut active = change.image.active()?;
        // What the active table has behind the disk's end is the VM state of another snapshot.
        let disk = change.image.header.l1_entries(change.image.header.size)?;
        let disk = &mut active[..disk];
        tree::count(&mut change, disk, 1)?;
        tree::flag(&mut change, disk, 2)?;
        let l1 = [&*disk, &self.tables].concat();
        snapshot.l1 = change.place(&storage::bytes(&l1), 1, "write a snapshot's L1 table")?;
        snapshot.l1_len = l1.len() as u32;
        let id = snapshot.id().into_owned();
        change.image.snapshots.push(snapshot);
        change.tabulate()?;
        change.activate(&active)?;
        change.publish()?;
        Ok(id)
    }

    fn take(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.hash.update(bytes);
        self.len += bytes.len() as u64;
        let mut rest = bytes;
        while !rest.is_empty() {
            let room = self.batch() - self.bytes.len();
            let (piece, more) = rest.split_at(room.min(rest.len()));
            self.bytes.extend_from_slice(piece);
            rest = more;
            if self.bytes.len() == self.batch() {
                self.store_bytes()?;
            }
        }
        Ok(())
    }

    /// Bytes that are written at once, whole clusters.
    fn batch(&self) -> usize {
        BATCH.max(self.change.image.header.cluster_size() as usize)
    }

    fn store_bytes(&mut self) -> Result<(), Error> {
        let first = self.change.place(&self.bytes, 1, "write the VM state")?;
        let size = self.change.image.header.cluster_size();
        let clusters = self.change.image.header.clusters(self.bytes.len() as u64);
        self.bytes.clear();
        for cluster in 0..clusters {
            self.entries.push(first + cluster * size);
            if self.entries.len() as u64 == self.change.image.header.l2_entries() {
                self.store_table()?;
            }
        }
        Ok(())
    }

    fn store_table(&mut self) -> Result<(), Error> {
        if self.entries.is_empty() {
            return Ok(());
        }
        let table = storage::bytes(&self.entries);
        let offset = self.change.place(&table, 1, "write an L2 table")?;
        self.entries.clear();
        self.tables.push(offset);
        let header = &self.change.image.header;
        let entries = header.l1_entries(header.size)? + self.tables.len();
        check_l1_len(entries as u64)
    }
}

impl<S: Storage> Write for Creation<'_, S> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self.take(bytes) {
            Ok(()) => Ok(bytes.len()),
            Err(error) => {
                self.is_broken = true;
                Err(error.into())
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// One more than the highest ID that is a number, as QEMU counts.
fn next_id(snapshots: &[Snapshot]) -> Result<u64, Error> {
    let number = |snapshot: &Snapshot| {
        let digits = snapshot.id.iter().take_while(|byte| byte.is_ascii_digit());
        digits.fold(0, |sum: u64, digit| {
            sum.saturating_mul(10)
                .saturating_add(u64::from(digit - b'0'))
        })
    };
    let highest = snapshots.iter().map(number).max().unwrap_or(0);
    highest.checked_add(1).ok_or(Error::TooMany)
}

/// Least bytes of the VM state that are written at once; a power of two.
const BATCH: usize = 256 << 10;
