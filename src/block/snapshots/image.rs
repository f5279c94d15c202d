//! An image as its snapshots see it, read only.

use std::ops::Range;

use super::error::{Error, to};
use super::header::Header;
use super::refcounts::Refcounts;
use super::storage::{self, Storage};
use super::table::{self, Snapshot};
use super::tree;
use crate::block::SECTOR;

/// A qcow2 whose metadata nobody else has open.
pub(super) struct Image<'f, S> {
    pub(super) storage: &'f S,
    pub(super) header: Header,
    /// Bytes of the file.
    pub(super) len: u64,
    pub(super) snapshots: Vec<Snapshot>,
    /// Bytes of the snapshot table.
    pub(super) table_len: u64,
}

impl<'f, S: Storage> Image<'f, S> {
    pub(super) fn open(storage: &'f S) -> Result<Self, Error> {
        let header = Header::read(storage)?;
        let len = to("ask for the file's size", storage.size())?;
        let (snapshots, table_len) = table::read(storage, &header, len)?;
        Ok(Self {
            storage,
            header,
            len,
            snapshots,
            table_len,
        })
    }

    /// Where in the table the snapshot with that ID is.
    pub(super) fn find(&self, id: &str) -> Result<usize, Error> {
        let ids = self.snapshots.iter().map(|snapshot| &*snapshot.id);
        let found = ids.zip(0..).find(|(known, _)| *known == id.as_bytes());
        found
            .map(|(_, at)| at)
            .ok_or_else(|| Error::NotFound(id.to_owned()))
    }

    fn check_l1(&self, offset: u64, entries: u32) -> Result<(), Error> {
        self.header.check_l1(offset, entries)?;
        match offset + u64::from(entries) * 8 > self.len {
            true => Err(Error::Corrupt(format!(
                "L1 table {offset:#x} beyond the end of the file"
            ))),
            false => Ok(()),
        }
    }

    /// The L1 table that stands there.
    pub(super) fn l1(&self, offset: u64, entries: u32) -> Result<Vec<u64>, Error> {
        self.check_l1(offset, entries)?;
        let mut bytes = vec![0; entries as usize * 8];
        storage::read(self.storage, &mut bytes, offset, "read an L1 table")?;
        Ok(storage::words(&bytes))
    }

    /// The active L1 table.
    pub(super) fn active(&self) -> Result<Vec<u64>, Error> {
        self.l1(self.header.l1, self.header.l1_len)
    }

    /// The clusters that so many bytes at `offset` are in.
    pub(super) fn clusters(&self, offset: u64, bytes: u64) -> Range<u64> {
        let first = offset >> self.header.cluster_bits;
        first..first + self.header.clusters(bytes)
    }

    /// The reference counts; header and tables are in use by them. Without that their clusters
    /// could be given out and written over.
    pub(super) fn refcounts(&self) -> Result<Refcounts<'f, S>, Error> {
        let mut refcounts = Refcounts::read(self.storage, &self.header, self.len)?;
        refcounts.check()?;
        refcounts.check_used(0, "The header")?;
        for cluster in self.l1_clusters()?.into_iter().flatten() {
            refcounts.check_used(cluster, "An L1 table")?;
        }
        for cluster in self.clusters(self.header.snapshot_table, self.table_len) {
            refcounts.check_used(cluster, "The snapshot table")?;
        }
        Ok(refcounts)
    }

    /// The clusters of all L1 tables. None is there twice, so that there are not more of them than
    /// the file has.
    fn l1_clusters(&self) -> Result<Vec<Range<u64>>, Error> {
        let inactive = self.snapshots.iter();
        let inactive = inactive.map(|snapshot| (snapshot.l1, snapshot.l1_len));
        let mut all = Vec::new();
        for (offset, entries) in inactive.chain([(self.header.l1, self.header.l1_len)]) {
            self.check_l1(offset, entries)?;
            all.push(self.clusters(offset, u64::from(entries) * 8));
        }
        all.retain(|clusters| !clusters.is_empty());
        all.sort_unstable_by_key(|clusters| clusters.start);
        match all.windows(2).find(|pair| pair[1].start < pair[0].end) {
            None => Ok(all),
            Some(pair) => Err(Error::Corrupt(format!(
                "The L1 table at {:#x} is in the place of another",
                pair[1].start << self.header.cluster_bits
            ))),
        }
    }

    /// The snapshot's L1 table, for the disk and behind that for its VM state, after everything in
    /// it was found to be well.
    pub(super) fn checked(
        &self,
        snapshot: &Snapshot,
        refcounts: &mut Refcounts<'f, S>,
    ) -> Result<(Vec<u64>, Vec<u64>), Error> {
        let l1 = self.l1(snapshot.l1, snapshot.l1_len)?;
        tree::check(self, refcounts, &l1)?;
        self.split(snapshot, l1)
    }

    /// The parts of a snapshot's L1 table for the disk, in its full length, and for the VM state.
    pub(super) fn split(
        &self,
        snapshot: &Snapshot,
        mut l1: Vec<u64>,
    ) -> Result<(Vec<u64>, Vec<u64>), Error> {
        let disk = self.header.l1_entries(self.disk_size(snapshot))?;
        l1.resize(l1.len().max(disk), 0);
        let state = l1.split_off(disk);
        Ok((l1, state))
    }

    /// The size of the snapshot's disk: the disk's own if only that has a last sector in part.
    pub(super) fn disk_size(&self, snapshot: &Snapshot) -> u64 {
        match snapshot.disk_size == self.header.whole_sectors() {
            true => self.header.size,
            false => snapshot.disk_size,
        }
    }

    /// The disk may be made as large as the snapshot's, by QEMU's rules.
    pub(super) fn check_size(&self, snapshot: &Snapshot) -> Result<(), Error> {
        if self.disk_size(snapshot) == self.header.size {
            return Ok(());
        }
        if !snapshot.disk_size.is_multiple_of(SECTOR) {
            let text = format!("A snapshot's disk size of {}", snapshot.disk_size);
            return Err(Error::Corrupt(text));
        }
        self.header.check_resize()
    }
}
